"""What vLLM asks about a folder: which layers are packed, and how each is to be loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import LinearBase, QKVParallelLinear, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.platforms import current_platform

from flash_llm.checkpoint import QUANT_METHOD, check_config, check_record, check_tensors
from flash_llm.errors import CheckpointError
from flash_llm.folder import CONFIG, ModelFolder
from flash_llm.integrations.vllm import DUMMY_SPARSITY, DUMMY_VALUES
from flash_llm.integrations.vllm.method import PackedLinearMethod
from flash_llm.integrations.vllm.passes import add_passes
from flash_llm.nn import DEFAULT_SKIP
from flash_llm.tensor import ValueKind, parse_metadata

_MERGED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
_REORDERED = "query_key_value"  # query, key and value in turn for each head, as in BLOOM and GPT-NeoX


class FlashLLMConfig(QuantizationConfig):
    """The quantization method ``flash_llm``.

    A compressed folder names its packed layers. Without such a record the folder is dense, and what is pruned enough
    is packed while it loads; or nothing is loaded at all, and packed weights are made up.

    Args:
        layers: metadata of the packed layers by their names in the files; None for a dense folder.
        dummy_sparsity: share of zeros of made-up weights, None where none was given.
        dummy_values: how they are stored.
    """

    def __init__(
        self,
        layers: Mapping[str, Any] | None = None,
        dummy_sparsity: float | None = None,
        dummy_values: str = ValueKind.BITS16.value,
    ) -> None:
        super().__init__()
        self.dummy_values = ValueKind(dummy_values)
        self.record: Mapping[str, Any] = {}
        self.layers = None if layers is None else dict(layers)
        self.dummy_sparsity = dummy_sparsity

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> FlashLLMConfig:
        """From the ``quantization_config`` of config.json.

        Raises:
            FormatError: of another format version.
            CheckpointError: parts are missing, or of the wrong kind.
            ValueError: a share of zeros that is none, or unknown values.
        """
        if DUMMY_SPARSITY in config and "layers" not in config:
            values = config.get(DUMMY_VALUES, ValueKind.BITS16.value)
            return cls(dummy_sparsity=_checked_sparsity(config[DUMMY_SPARSITY]), dummy_values=values)
        check_record(config)
        for metadata in config["layers"].values():
            parse_metadata(metadata)
        made = cls(config["layers"])
        made.record = config
        return made

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Checks a folder's config.json, its tensors' names and shapes, and its dense tensors, before anything loads.

        Packed tensors are checked when they are loaded.
        """
        path = Path(model_name)
        if self.record and path.is_dir() and any(path.glob("*.safetensors")):
            check_config(path)
            check_tensors(ModelFolder(path), self.record)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method of a linear layer; None for what is none.

        Raises:
            CheckpointError: a layer is packed that can't be multiplied packed here.
        """
        if not isinstance(layer, LinearBase):
            self._refuse_packed(layer, prefix)
            return None
        parts = self.parts(prefix)
        if self.layers is None:
            skipped = any(re.search(pattern, prefix) for pattern in DEFAULT_SKIP)
            return UnquantizedLinearMethod() if skipped else self._method(prefix, parts)
        if not self.layers.keys() & {prefix, *parts}:
            return UnquantizedLinearMethod()
        if isinstance(layer, QKVParallelLinear) and prefix.endswith(_REORDERED) and prefix in self.layers:
            raise CheckpointError(
                f"{prefix} is packed, but vLLM changes the order of its rows while it loads, which packed ones can't "
                f"follow; compress the model again with --skip '{_REORDERED}'"
            )
        return self._method(prefix, parts)

    def parts(self, prefix: str) -> list[str]:
        """The layers of the files that a layer of vLLM is made of: query, key and value of a merged one, say."""
        parent, _, name = prefix.rpartition(".")
        parent += "." if parent else ""
        names = self.packed_modules_mapping.get(name, [name])
        if names == [name] and any(f"{parent}{part}" in (self.layers or ()) for part in _MERGED.get(name, ())):
            names = _MERGED[name]  # GPT-J and StableLM merge them without saying so
        return [f"{parent}{part}" for part in names]

    def _method(self, prefix: str, parts: list[str]) -> PackedLinearMethod:
        engine = get_current_vllm_config()
        add_passes(engine.compilation_config.inductor_compile_config, current_platform.pass_key)
        dummy = engine.load_config.load_format == "dummy"
        sparsity = self._sparsity(parts) if dummy else None
        if dummy and sparsity is None:
            raise ValueError(
                "load format dummy: how many zeros? Give the share, as in --hf-overrides "
                f'\'{{"quantization_config": {{"quant_method": "{QUANT_METHOD}", "{DUMMY_SPARSITY}": 0.8}}}}\''
            )
        return PackedLinearMethod(
            prefix,
            parts,
            self.layers or {},
            pack_dense=self.layers is None,
            dummy=sparsity,
            dummy_values=self._values(parts),
        )

    def _values(self, parts: list[str]) -> ValueKind:
        """How made-up weights are stored: as given, or as the files' record says."""
        known = [self.layers[part] for part in parts if part in self.layers] if self.layers else []
        return parse_metadata(known[0])["kind"] if known else self.dummy_values

    def _sparsity(self, parts: list[str]) -> float | None:
        """Of made-up weights: as given, or as the files' record says."""
        known = [self.layers[part] for part in parts if part in self.layers] if self.layers else []
        if not known:
            return self.dummy_sparsity
        elements = sum(metadata["shape"][0] * metadata["shape"][1] for metadata in known)
        return 1 - sum(metadata["nnz"] for metadata in known) / elements

    def _refuse_packed(self, layer: torch.nn.Module, prefix: str) -> None:
        packed = [name for name in self.layers or () if name == prefix or name.startswith(f"{prefix}.")]
        if packed:
            raise CheckpointError(
                f"{packed[0]} is packed, but vLLM makes it a {type(layer).__name__}, which isn't multiplied from "
                f"packed weights; compress the model again with --skip '{packed[0].rpartition('.')[2]}'"
            )

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Renames the layers as vLLM renames tensors."""
        if self.layers is not None:
            self.layers = hf_to_vllm_mapper.apply_dict(self.layers)

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # it is all in config.json

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    def get_name(self) -> str:  # type: ignore[override]
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        wide = [torch.float32] if current_platform.is_cpu() else []  # where weights are expanded
        return [torch.float16, torch.bfloat16, *wide]


def _checked_sparsity(value: Any) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < 1:
        raise ValueError(f"{DUMMY_SPARSITY}={value!r} in {CONFIG}: it takes a number from 0 up to, not including, 1")
    return float(value)
