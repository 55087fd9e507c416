"""Compressed folders in transformers: ``from_pretrained`` loads them and ``save_pretrained`` writes them.

Importing this registers a quantizer and its config under the name that compressed folders have in their config.json;
``import flash_llm`` sees to it. What is loaded is checked tensor by tensor, since files get damaged: names, shapes and
dense tensors in the files, before anything is loaded; packed weights where they then are, which on a GPU takes next to
no time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from flash_llm.checkpoint import (
    QUANT_METHOD,
    check_config,
    check_record,
    check_tensors,
    fingerprint,
    make_record,
    validated,
)
from flash_llm.errors import CheckpointError
from flash_llm.folder import CONFIG, TensorFiles, config_digest
from flash_llm.layers import bias_of, is_packable, is_turned, oriented, sizes
from flash_llm.nn import (
    AFTER_COMPRESS,
    BUFFERS,
    DEFAULT_SKIP,
    TRANSPOSED,
    CompressReport,
    SparseLinear,
    expand_on_cpu,
    orientation,
    pack_linears,
    replace_module,
    sparse_layers,
)
from flash_llm.tensor import PackedWeight, ValueKind
from flash_llm.tensor.layout import VALUE_DTYPES

# This module is imported from within the import of transformers' quantizers. More of transformers, and so
# `flash_llm.structure`, is there only later, when the functions run.
if TYPE_CHECKING:
    from transformers import PreTrainedModel


class FlashLLMConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of compressed folders; see :func:`flash_llm.checkpoint.make_record`.

    ``from_pretrained(dense_folder, quantization_config=FlashLLMConfig())`` loads a pruned dense model and packs it.

    Args:
        skip: regular expressions; when a dense model is packed, layers in whose name one is found stay dense.
        values: how their nonzeros are then stored: "16-bit", "float8_e4m3" or "int8".
        record: the parts of a compressed folder's record, as they stand in its config.json.

    Raises:
        FormatError: of another format version.
        CheckpointError: parts are missing or of the wrong kind.
    """

    def __init__(
        self,
        skip: Iterable[str] = DEFAULT_SKIP,
        quant_method: str = QUANT_METHOD,
        values: str = ValueKind.BITS16.value,
        **record: Any,
    ) -> None:
        self.quant_method = quant_method  # type: ignore[assignment]  # an enumeration of transformers' own
        self.skip = tuple(skip)
        self.values = ValueKind(values).value
        if record:
            check_record(record)
        self.record = record

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": self.quant_method, **self.record} if self.record else vars(self) | {"record": {}}


class FlashLLMQuantizer(HfQuantizer):
    """Puts SparseLinear layers into a model that is being loaded, and packed weights into files that are saved."""

    requires_calibration = False

    def __init__(self, quantization_config: FlashLLMConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.config = quantization_config
        self.dtypes: dict[str, torch.dtype] = {}
        self.shapes: dict[str, torch.Size] = {}
        self.dtype: torch.dtype | None = None

    @property
    def is_trainable(self) -> bool:
        return False  # the packed weight has no gradient

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        from flash_llm.structure import PackedNames

        self.dtype = model.dtype
        if not self.pre_quantized:
            return model
        record = self.config.record
        if not record:
            raise CheckpointError(f"the quantization_config in {CONFIG} has nothing but a name: it is damaged")
        files = kwargs.get("checkpoint_files")
        if files:
            folder = Path(files[0]).parent
            if (folder / CONFIG).is_file():
                check_config(folder)
            check_tensors(TensorFiles(Path(file) for file in files), record)
        names = PackedNames(model)
        for layer, metadata in record["layers"].items():
            self._make_sparse(model, names.layer(layer), layer, metadata)
        self._expect_placeholder(model, names.target(f"{min(record['layers'])}.weight")[0])
        state = model.state_dict()
        self.dtypes = {name: tensor.dtype for name, tensor in state.items()}
        self.shapes = {name: tensor.shape for name, tensor in state.items()}
        return model

    def _expect_placeholder(self, model: PreTrainedModel, name: str | None) -> None:
        """Lets transformers ignore the weight without elements that is in the files: see flash_llm.checkpoint."""
        if name is None:
            return
        ignored = model._keys_to_ignore_on_load_unexpected  # a set, or in older releases a list
        patterns = [*(ignored or ()), f"^{re.escape(name)}$"]
        model._keys_to_ignore_on_load_unexpected = set(patterns) if isinstance(ignored, set) else patterns

    def _make_sparse(self, model: PreTrainedModel, name: str | None, layer: str, metadata: Mapping[str, Any]) -> None:
        """Replaces a linear layer by an empty SparseLinear."""
        architectures = model.config.architectures or []
        if name is None:
            if type(model).__name__ in architectures:
                raise CheckpointError(f"{type(model).__name__} has no linear layer for the packed {layer}")
            return  # a part of the model is being loaded, AutoModel say, and this layer is not in it
        linear = model.get_submodule(name)
        fits = is_packable(linear) and is_turned(linear) == bool(metadata.get(TRANSPOSED))
        if not fits or list(sizes(linear)) != list(metadata["shape"]):
            raise CheckpointError(
                f"the packed {layer} is {metadata['shape']}, but {name} of {type(model).__name__} is {linear}"
            )
        replace_module(model, name, SparseLinear(metadata, bias=bias_of(linear)))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if self.pre_quantized:
            self._check_loaded(model)
        else:
            self._pack(model)
        expand_on_cpu(model)
        _let_quantizers_be_found()
        return model

    def _check_loaded(self, model: PreTrainedModel) -> None:
        state = model.state_dict()
        for name, shape in self.shapes.items():
            if state[name].shape != shape:
                raise CheckpointError(
                    f"{name} is {list(state[name].shape)}, but config.json makes it {list(shape)}: they don't match"
                )
        for name, layer in sparse_layers(model).items():
            if any(buffer.is_meta for buffer in layer.buffers()):
                raise CheckpointError(f"{name} was offloaded, which packed layers can't be: leave offload_buffers off")
            validated(PackedWeight.from_state(_tensors(layer), layer.metadata), name, layer.metadata)
        self._cast(model)

    def _cast(self, model: PreTrainedModel) -> None:
        """Gives every tensor the dtype that was asked for; packed ones only now, when they have been checked."""
        from flash_llm.structure import kept_in_float32

        in_float32 = kept_in_float32(model, self.dtype) if self.dtype is not None else lambda name: False
        for name, parameter in model.named_parameters():
            wanted = self.dtypes.get(name, parameter.dtype)
            if parameter.dtype != wanted and parameter.is_floating_point() and not in_float32(name):
                parameter.data = parameter.data.to(wanted)
        for name, layer in sparse_layers(model).items():
            if self.dtype is None or layer.dtype == self.dtype:
                continue
            if layer.weight_values.device.type != "cpu" and self.dtype not in VALUE_DTYPES:
                raise ValueError(
                    f"dtype={self.dtype} can't be multiplied from compressed weights on {layer.weight_values.device} "
                    f"({name}); load the model with dtype='auto', torch.float16 or torch.bfloat16"
                )
            layer.to(self.dtype)

    def _pack(self, model: PreTrainedModel) -> None:
        """Packs a dense model that has been loaded."""
        if len(set((getattr(model, "hf_device_map", None) or {"": 0}).values())) > 1:
            raise ValueError(
                "a dense model can be packed at load on one device only, not over a device_map of several; compress "
                "its folder first with flash_llm.checkpoint.compress_folder, and load that"
            )
        self.config.record = unsaved_record(pack_linears(model, self.config.skip, self.config.values).skipped)

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What ``save_pretrained`` is to write. Updates the record, which it writes next, to match."""
        state = model.state_dict()
        layers = sparse_layers(model)
        offloaded = next((name for name, tensor in state.items() if tensor.is_meta), None)
        if offloaded is not None:
            raise ValueError(f"{offloaded} is offloaded; load the model without offload to save it")
        stored = _stored_names(model, layers)
        packed = {stored[name]: layer.packed for name, layer in layers.items()}
        for name in layers:
            state |= {f"{name}.{BUFFERS[part]}": tensor for part, tensor in packed[stored[name]].tensors().items()}
        if layers:  # see flash_llm.checkpoint
            first = min(layers, key=lambda name: stored[name])
            weight = packed[stored[first]]
            state[f"{first}.weight"] = torch.empty(0, dtype=weight.dtype, device=weight.device)
        old = self.config.record
        self.config.record = make_record(
            {stored[name]: packed[stored[name]].metadata() | orientation(layers[name].transposed) for name in layers},
            old.get("dense", {}),
            _dense_checksums(model, state, packed),
            old.get("pruning"),
        )
        self._sign(model)
        return state, {}

    def _sign(self, model: PreTrainedModel) -> None:
        """Records the digest of the config.json that save_pretrained is about to write."""
        from transformers import PreTrainedModel

        config = model.config
        for part in model.modules():  # of one that was compressed by itself, the config is within this one
            if isinstance(part, PreTrainedModel) and part.config is not config:
                vars(part.config).pop("quantization_config", None)
        config.dtype = str(model.dtype).removeprefix("torch.")
        config.architectures = [type(model).__name__]
        config.quantization_config = self.config
        self.config.record["config_digest"] = config_digest(json.loads(config.to_json_string()))

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype  # so it is in a config that was saved
        for name, layer in sparse_layers(model).items():
            replace_module(model, name, _dense_layer(layer, dtype or layer.dtype))
        return model


def _dense_layer(layer: SparseLinear, dtype: torch.dtype) -> nn.Module:
    """The layer that a packed one stands for, with its weight."""
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        if layer.transposed:
            dense: nn.Module = Conv1D(layer.out_features, layer.in_features)
        else:
            dense = nn.Linear(layer.in_features, layer.out_features, bias=False)
    dense.weight = nn.Parameter(oriented(layer.packed.to_dense(dtype), layer.transposed))
    dense.register_parameter("bias", layer.bias)
    return dense


def unsaved_record(dense: Mapping[str, str]) -> dict[str, Any]:
    """Of a model that was packed in memory, but for the layers in ``dense``: saving it makes the rest."""
    return make_record({}, dense, {}, None)


def make_savable(model: Any, report: CompressReport) -> None:
    """Has ``save_pretrained`` write a model of transformers, whose layers were packed, as a compressed folder.

    Without it the files would have packed tensors and no word of them, and load with random weights in their place.
    """
    from transformers import PreTrainedModel

    if not report.packed:
        return
    if isinstance(model, PreTrainedModel):
        quantizer = _quantizer_of(model, report.skipped)
        vars(model)["hf_quantizer"] = quantizer
        model.config.quantization_config = quantizer.config
    _let_quantizers_be_found()


def _let_quantizers_be_found() -> None:
    from transformers import PreTrainedModel

    if "hf_quantizer" not in vars(PreTrainedModel):
        PreTrainedModel.hf_quantizer = _QuantizerOfParts()  # type: ignore[attr-defined]


def _quantizer_of(model: PreTrainedModel, dense: Mapping[str, str]) -> FlashLLMQuantizer:
    quantizer = FlashLLMQuantizer(FlashLLMConfig())
    quantizer.config.record = unsaved_record(dense)
    quantizer.dtype = model.dtype
    return quantizer


class _QuantizerOfParts:
    """The ``hf_quantizer`` of a model that has packed layers and none of its own: so ``save_pretrained`` writes it as a
    compressed folder, too. A part of it was compressed, ``model.model`` say, or it is a part of one that was."""

    def __get__(self, model: PreTrainedModel | None, owner: type) -> FlashLLMQuantizer:
        if model is None or not sparse_layers(model):
            raise AttributeError(f"{owner.__name__} has no attribute 'hf_quantizer'")
        dense: dict[str, str] = {}
        for name, part in model.named_modules():
            own = vars(part).get("hf_quantizer")
            if isinstance(own, FlashLLMQuantizer):
                dense |= {f"{name}.{layer}": reason for layer, reason in own.config.record.get("dense", {}).items()}
        return _quantizer_of(model, dense)


def _tensors(layer: SparseLinear) -> dict[str, Tensor]:
    tensors = {part: getattr(layer, buffer) for part, buffer in BUFFERS.items()}
    return {part: tensor for part, tensor in tensors.items() if tensor is not None}


def _stored_names(model: PreTrainedModel, layers: Mapping[str, SparseLinear]) -> dict[str, str]:
    """The layers' names in the files: transformers turns its renamings round when it saves."""
    from transformers.core_model_loading import revert_weight_conversion

    order = list(layers)
    suffix = "." + BUFFERS["values"]
    marks = {f"{name}{suffix}": torch.tensor(number) for number, name in enumerate(order)}
    saved = revert_weight_conversion(model, marks)
    names = {order[int(mark)]: name.removesuffix(suffix) for name, mark in saved.items()}
    if sorted(names) != sorted(order):
        raise CheckpointError(f"transformers can't save {type(model).__name__} with packed layers; use compress_folder")
    return names


def _dense_checksums(
    model: PreTrainedModel, state: Mapping[str, Tensor], packed: Mapping[str, PackedWeight]
) -> dict[str, str]:
    """Fingerprints of all tensors but the packed ones, named and laid out as they are going to be saved."""
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    ignored = set(model._keys_to_ignore_on_save or ())
    kept = remove_tied_weights_from_state_dict({k: v for k, v in state.items() if k not in ignored}, model)
    saved = revert_weight_conversion(model, kept)
    buffers = {f"{name}.{buffer}" for name in packed for buffer in BUFFERS.values()}
    return {name: fingerprint(tensor) for name, tensor in saved.items() if name not in buffers}


AFTER_COMPRESS.append(make_savable)

# A second import, of another copy of this package say, leaves the first in charge.
if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantization_config(QUANT_METHOD)(FlashLLMConfig)
    register_quantizer(QUANT_METHOD)(FlashLLMQuantizer)
