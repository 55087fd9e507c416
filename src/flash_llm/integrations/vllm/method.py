"""How a linear layer of vLLM holds a packed weight and multiplies by it."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod

from flash_llm.checkpoint import pack_if_smaller
from flash_llm.errors import CheckpointError, SlowPathWarning
from flash_llm.integrations.vllm.operator import linear_at, remember
from flash_llm.integrations.vllm.shares import Part, Rank, Shares
from flash_llm.kernels import ahead, launch
from flash_llm.nn import BUFFERS, EXPANDED
from flash_llm.tensor import PackedWeight, ValueKind
from flash_llm.tensor.dummy import random_packed

logger = init_logger(f"vllm.{__name__}")  # vLLM prints what is below its own name

_PLACES = {"q": 0, "k": 1, "v": 2}


class PackedLinearMethod(LinearMethodBase):
    """One layer's. Until it is loaded the layer has empty parameters of the names in the files, which collect.

    Args:
        name: of the layer in vLLM.
        parts: the layers of the files that it is made of.
        metadata: of the packed layers in the files.
        pack_dense: pack the layer if that makes it smaller, though the files hold it dense.
        dummy: make up a weight with this share of zeros; None loads it.
        dummy_values: how a made-up weight is stored.
    """

    def __init__(
        self,
        name: str,
        parts: Sequence[str],
        metadata: Mapping[str, Mapping[str, Any]],
        *,
        pack_dense: bool = False,
        dummy: float | None = None,
        dummy_values: ValueKind = ValueKind.BITS16,
    ) -> None:
        self.name, self.parts, self.metadata = name, list(parts), metadata
        self.pack_dense, self.dummy, self.dummy_values = pack_dense, dummy, dummy_values
        self.shares: Shares | None = None
        self.dtype = torch.float16
        self.rows = 0
        self._dense: UnquantizedLinearMethod | None = None

    def create_weights(
        self,
        layer: LinearBase,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        if len(self.parts) != len(output_partition_sizes):
            # The files hold as one what vLLM merges, or vLLM doesn't say what it merges: numbers are names enough.
            self.parts = [f"{self.name}[{i}]" for i in range(len(output_partition_sizes))]
        self.dtype = params_dtype
        rank = Rank(getattr(layer, "tp_rank", 0), getattr(layer, "tp_size", 1))
        self.shares = Shares(
            name=self.name,
            parts=self.parts,
            rows=output_partition_sizes,
            columns=input_size_per_partition,
            metadata=self.metadata,
            rank=rank,
            device=torch.empty(0).device,  # of the context that vLLM makes layers in
            whole_rows=getattr(layer, "output_sizes", [output_size]),
        )
        for tensor_name, name in {"weight": "weight", **BUFFERS}.items():
            dtype = torch.int32 if tensor_name in ("bitmap", "offsets") else params_dtype
            parameter = Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            parameter.weight_loader = self._loader(tensor_name)  # type: ignore[attr-defined]
            layer.register_parameter(name, parameter)

    def _loader(self, tensor_name: str) -> Callable[..., None]:
        def load(parameter: Parameter, tensor: Tensor, shard: int | str | None = None) -> None:
            if self.shares is None:
                raise CheckpointError(f"{self.name} is loaded already, and packed layers can't be loaded again")
            place = _PLACES.get(shard, shard) if isinstance(shard, str) else shard
            if place is not None and place not in range(len(self.parts)):
                raise CheckpointError(f"{self.name}: vLLM loads a part {shard!r} into it, which isn't known here")
            self.shares.add(place, tensor_name, tensor)  # type: ignore[arg-type]

        return load

    def process_weights_after_loading(self, layer: LinearBase) -> None:
        """Puts what was collected in place of the empty parameters."""
        if self.shares is None:
            return  # done before
        shares, self.shares = self.shares, None
        share = self._made_up(shares) if self.dummy is not None else shares.result()
        if isinstance(share, Tensor) and self.pack_dense and share.device.type != "cpu":
            packed = pack_if_smaller(share.to(self.dtype))
            share = share if isinstance(packed, str) else packed
        if isinstance(share, PackedWeight) and share.device.type == "cpu":
            _say_expanded()
            share = share.to_dense(self.dtype)
        if isinstance(share, Tensor):
            self._keep_dense(layer, share)
        else:
            self._keep_packed(layer, share)

    def _made_up(self, shares: Shares) -> Part:
        """A random weight, the same for layers of one shape."""
        assert self.dummy is not None
        generator = torch.Generator(shares.device).manual_seed(0)
        dtype = self.dtype if self.dtype != torch.float32 else torch.bfloat16
        shape = (sum(shares.rows), shares.columns)
        return random_packed(*shape, self.dummy, dtype, shares.device, generator, self.dummy_values)

    def _keep_dense(self, layer: LinearBase, dense: Tensor) -> None:
        for name in BUFFERS.values():
            delattr(layer, name)
        layer.weight = Parameter(dense.to(self.dtype), requires_grad=False)
        self._dense = UnquantizedLinearMethod()
        self._dense.process_weights_after_loading(layer)

    def _keep_packed(self, layer: LinearBase, weight: PackedWeight) -> None:
        launch.architecture(weight.device.index)  # or an error that names the GPU
        weight = _settled(weight.in_dtype(self.dtype))
        tensors = weight.tensors()
        for tensor_name, name in BUFFERS.items():
            if tensor_name in tensors:
                setattr(layer, name, Parameter(tensors[tensor_name], requires_grad=False))
            else:
                delattr(layer, name)  # scales, which 16-bit values have none of
        layer.packed = remember(weight)
        self.rows = weight.shape[0]
        ahead.begin_weight(weight)  # while the next layers are loading

    def apply(self, layer: LinearBase, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if self._dense is not None:
            return self._dense.apply(layer, x, bias)
        return linear_at(x, bias, layer.weight_bitmap, self.rows)


def _settled(weight: PackedWeight) -> PackedWeight:
    """The weight in memory of its own size.

    While vLLM loads it keeps torch from splitting blocks of 20 MB and more. So a tensor that comes to lie in a block
    that was used before takes up to 20 MB more than it has, which made 1.3 GiB of OPT-66B. New blocks are whole 2 MB.
    """
    torch.cuda.empty_cache()
    return weight.together()


@functools.cache
def _say_expanded() -> None:
    message = f"compressed layers are {EXPANDED}"
    logger.warning(message)
    warnings.warn(message, SlowPathWarning, stacklevel=2)
