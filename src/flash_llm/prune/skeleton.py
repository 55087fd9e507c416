"""A model without its weights: the blocks it is made of, and weights put in and taken out part by part."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from flash_llm.errors import CheckpointError
from flash_llm.layers import is_linear
from flash_llm.prune.source import SourceFolder
from flash_llm.prune.stored import StoredTensors


class Skeleton:
    """A causal language model of transformers with all parameters on the meta device, and its source.

    Buffers (rotary frequencies and the like) are real: most are computed by the model and stored nowhere.

    Args:
        source: the model's folder.
        dtype: in which the parts that are loaded compute.
        device: where the parts that are loaded live.

    Attributes:
        model: the model, in evaluation mode.
        block_names: names of its repeated blocks, in order.

    Raises:
        CheckpointError: no causal language model, or one without repeated blocks.
    """

    def __init__(self, source: SourceFolder, dtype: torch.dtype, device: torch.device) -> None:
        self.source, self.dtype, self.device = source, dtype, device
        try:
            with _parameters_on_meta():
                model = AutoModelForCausalLM.from_config(source.config, dtype=dtype)
        except (ValueError, ImportError, KeyError) as error:
            raise CheckpointError(f"{source.folder} is no causal language model of transformers: {error}") from error
        self.model: PreTrainedModel = model.eval()
        self._stored = StoredTensors(model, source)
        self.block_names = block_names(model)
        if not self.block_names:
            raise CheckpointError(
                f"{source.folder}: {type(model).__name__} has no list of repeated blocks to walk through."
            )

    def block(self, index: int) -> nn.Module:
        """The module of a block."""
        return self.model.get_submodule(self.block_names[index])

    @property
    def embedding_shape(self) -> tuple[int, int]:
        """Tokens in the vocabulary, and width of their embedding."""
        vocabulary, width = self.model.get_input_embeddings().get_parameter("weight").shape
        return vocabulary, width

    @property
    def head_name(self) -> str:
        """Name of the output head.

        Raises:
            ValueError: there is none, or it shares its weight with the embedding.
        """
        head = self.model.get_output_embeddings()
        if head is None:
            raise ValueError(f"{self.source.folder}: the model has no output head; leave include_lm_head out.")
        if self.source.config.get_text_config().tie_word_embeddings:
            raise ValueError(
                f"{self.source.folder}: lm_head shares its weight with the embedding, which would be pruned with it; "
                "leave include_lm_head out, or untie the two and save the model first."
            )
        return next(name for name, module in self.model.named_modules() if module is head)

    def linears(self, prefix: str) -> dict[str, nn.Module]:
        """Linear layers at or under the module ``prefix``, by their full names."""
        found = self.model.get_submodule(prefix).named_modules(prefix=prefix)
        return {name: module for name, module in found if is_linear(module)}

    def fused(self, prefix: str) -> dict[str, int]:
        """Weights under the module ``prefix`` that are in no layer but in merged matrices: experts, for example.

        These are three-dimensional, or matrices at least as wide and as high as the hidden states are wide: a router
        is not.
        """
        found: dict[str, int] = {}
        width = self.embedding_shape[1]
        for name, module in self.model.get_submodule(prefix).named_modules(prefix=prefix):
            if is_linear(module) or isinstance(module, (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
                continue
            for leaf, p in module.named_parameters(recurse=False):
                if p.dim() >= 2 and min(p.shape) >= (width if p.dim() == 2 else 2):
                    found[f"{name}.{leaf}"] = p.numel()
        return found

    def key(self, name: str) -> str | None:
        """Under which name the source stores a parameter; None if it doesn't, or merged with others or in parts."""
        return self._stored.key(name)

    def parts(self, name: str) -> list[str]:
        """The source's names of the tensors that a parameter is merged from or is a part of."""
        return self._stored.parts(name)

    def is_shared(self, name: str) -> bool:
        """Whether a parameter is stored under another parameter's name, because both are one."""
        return self.key(name) is None and name in self.model.all_tied_weights_keys

    def keys_under(self, prefix: str) -> list[str]:
        """All names that the source stores for the module ``prefix``."""
        return self._stored.under(prefix)

    @contextmanager
    def loaded(self, prefix: str, wanted: Callable[[str], bool] = lambda name: True) -> Iterator[nn.Module]:
        """Load the weights of the module ``prefix`` (all of the model if it is empty) for as long as the context lasts.

        Args:
            prefix: the module's name.
            wanted: of the parameters' and buffers' full names: which to load; the others stay as they are.

        Raises:
            CheckpointError: the source lacks one, or has it in another shape or as integers.
        """
        module = self.model.get_submodule(prefix)
        names = [name for name, _ in module.named_parameters(prefix=prefix) if wanted(name)]
        try:
            for name in names:
                self._set(name, nn.Parameter(self._read(name), requires_grad=False))
            for name, buffer in module.named_buffers(prefix=prefix):
                if not wanted(name):
                    continue
                key = self.key(name)
                self._set(name, (buffer if key is None else self.source.read(key)).to(self.device))
            yield module
        finally:
            for name in names:
                meta = torch.empty_like(self.model.get_parameter(name), device="meta")
                self._set(name, nn.Parameter(meta, requires_grad=False))

    def check_weight(self, layer_name: str) -> str:
        """The source's name of a linear layer's weight, once its shape and dtype are known to be right.

        Raises:
            CheckpointError: the source lacks it, or has it in another shape or as integers.
        """
        return self._checked_key(layer_name + ".weight")

    def _checked_key(self, name: str) -> str:
        key = self.key(name)
        if key is None:
            raise CheckpointError(
                f"{self.source.folder} has no tensor for {name}: it is incomplete, or stores this architecture "
                f"({self.source.config.model_type}) in a way that is not supported."
            )
        self._check_shape(key, self.source.shape(key), name)
        self._check_floating(key)
        return key

    def _check_shape(self, what: str, shape: list[int], name: str) -> None:
        expected = list(self.model.get_parameter(name).shape)
        if shape != expected:
            raise CheckpointError(f"{self.source.folder}: {what} is {shape}, but config.json makes it {expected}.")

    def _check_floating(self, key: str) -> None:
        if not self.source.is_floating(key):
            raise CheckpointError(
                f"{self.source.folder}: {key} is stored as {self.source.stored_dtype(key)}; only models in float16, "
                "bfloat16, float32 or float64 can be pruned. Take the unquantised original."
            )

    def _read(self, name: str) -> Tensor:
        parts = self.parts(name)
        if parts:
            for key in parts:
                self._check_floating(key)
            value = self._stored.merged(name)
            self._check_shape(name, list(value.shape), name)
        else:
            value = self.source.read(self._checked_key(name))
        return value.to(self.device, self.dtype)

    def _set(self, name: str, value: Tensor) -> None:
        owner, _, leaf = name.rpartition(".")
        setattr(self.model.get_submodule(owner), leaf, value)


def block_names(model: nn.Module) -> list[str]:
    """Names of a model's repeated blocks: the list of modules that holds most parameters. Empty if there is none.

    Of a model that also sees or hears, only the text decoder is searched.
    """
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    sizes = {name: sum(p.numel() for p in module.parameters()) for name, module in lists.items()}
    prefix = _decoder_prefix(model)
    # What transformers takes for the decoder may be the head, which has no blocks.
    sizes = {name: size for name, size in sizes.items() if name.startswith(prefix)} or sizes
    if not sizes or not max(sizes.values()):
        return []
    largest = max(sizes, key=lambda name: sizes[name])
    return [f"{largest}.{index}" for index in range(len(lists[largest]))]


def _decoder_prefix(model: nn.Module) -> str:
    """What the names in the text decoder begin with; empty if there is none apart from the rest."""
    decoder = model.get_decoder() if isinstance(model, PreTrainedModel) else model
    name = next((name for name, module in model.named_modules() if module is decoder), "")
    return name + "." if name else ""


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules made in this context have their parameters on the meta device, and their buffers where they belong.

    ``torch.device("meta")`` would lose the values of buffers that no checkpoint holds.
    """
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.detach().to("meta"), requires_grad=False)
        original(module, name, param)

    nn.Module.register_parameter = register  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]
