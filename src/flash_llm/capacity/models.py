"""What a model is made of, from its config alone: built by transformers on the meta device, so without weights.

Shapes, biases, tied embeddings and grouped heads are read off the modules; the KV cache off a run of one token on the
meta device, which moves no data. So any decoder that transformers knows will do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from flash_llm.errors import CheckpointError
from flash_llm.folder import CONFIG, read_json
from flash_llm.layers import is_linear, is_packable, sizes
from flash_llm.structure import meta_model

_NEEDED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
"""Layers with the same input, which serving engines multiply at once."""


def _opt(width: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "opt",
        "hidden_size": width,
        "word_embed_proj_dim": width,
        "ffn_dim": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": 50272,
        "max_position_embeddings": 2048,
    }


def _llama(
    model_type: str, width: int, mlp: int, layers: int, heads: tuple[int, int], vocabulary: int, **more: Any
) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
    } | more


_LONG = {"max_position_embeddings": 131072}
_TIED = {"tie_word_embeddings": True}

BUILT_IN: dict[str, dict[str, Any]] = {
    "opt-125m": _opt(768, 12, 12),
    "opt-1.3b": _opt(2048, 24, 32),
    "opt-6.7b": _opt(4096, 32, 32),
    "opt-13b": _opt(5120, 40, 40),
    "opt-30b": _opt(7168, 48, 56),
    "opt-66b": _opt(9216, 64, 72),
    "opt-175b": _opt(12288, 96, 96),
    "llama-2-7b": _llama("llama", 4096, 11008, 32, (32, 32), 32000, max_position_embeddings=4096),
    "llama-2-13b": _llama("llama", 5120, 13824, 40, (40, 40), 32000, max_position_embeddings=4096),
    "llama-2-70b": _llama("llama", 8192, 28672, 80, (64, 8), 32000, max_position_embeddings=4096),
    "llama-3-8b": _llama("llama", 4096, 14336, 32, (32, 8), 128256, **_LONG),
    "llama-3-70b": _llama("llama", 8192, 28672, 80, (64, 8), 128256, **_LONG),
    "llama-3.1-405b": _llama("llama", 16384, 53248, 126, (128, 8), 128256, **_LONG),
    "mistral-7b": _llama(
        "mistral", 4096, 14336, 32, (32, 8), 32768, max_position_embeddings=32768, sliding_window=None
    ),
    "qwen2.5-0.5b": _llama("qwen2", 896, 4864, 24, (14, 2), 151936, **_TIED),
    "qwen2.5-7b": _llama("qwen2", 3584, 18944, 28, (28, 4), 152064, **_LONG),
    "qwen2.5-14b": _llama("qwen2", 5120, 13824, 48, (40, 8), 152064, **_LONG),
    "qwen2.5-32b": _llama("qwen2", 5120, 27648, 64, (40, 8), 152064, **_LONG),
    "qwen2.5-72b": _llama("qwen2", 8192, 29568, 80, (64, 8), 152064, **_LONG),
    "qwen3-8b": _llama("qwen3", 4096, 12288, 36, (32, 8), 151936, head_dim=128, max_position_embeddings=40960),
    "qwen3-32b": _llama("qwen3", 5120, 25600, 64, (64, 8), 151936, head_dim=128, max_position_embeddings=40960),
    "smollm2-135m": _llama("llama", 576, 1536, 30, (9, 3), 49152, max_position_embeddings=8192, **_TIED),
}


@dataclass(frozen=True)
class Linear:
    """Linear layers of one shape that are multiplied at once, and how many times the model has them.

    Attributes:
        rows: of each of them: (4096, 1024, 1024) for a query, key and value projection.
        columns: of all.
        count: how many times.
        packable: whether compressing a model packs them.
    """

    rows: tuple[int, ...]
    columns: int
    count: int
    packable: bool

    @property
    def weights(self) -> int:
        """Elements of all of them."""
        return self.count * sum(self.rows) * self.columns


@dataclass(frozen=True)
class Cache:
    """One block's keys and values.

    Attributes:
        heads: key and value heads.
        width: elements of a token's key and value in a head.
        window: tokens kept at most; None: all.
    """

    heads: int
    width: int
    window: int | None

    def elements(self, tokens: float, gpus: int = 1) -> float:
        """Elements that ``tokens`` take on each of ``gpus`` that share the heads, of which each keeps at least one."""
        kept = tokens if self.window is None else min(tokens, self.window)
        return kept * self.width * math.ceil(self.heads / gpus)


@dataclass(frozen=True)
class ModelShape:
    """A decoder's shape.

    Attributes:
        name: a folder or a built-in name.
        parameters: elements of all weights, shared ones once.
        linears: all linear layers of its blocks.
        head: (vocabulary, width) of the output layer, which stays dense.
        embedding: elements of the token embedding, and of the output layer where that isn't the same tensor.
        caches: one a block.
        heads: query heads of a block.
        query_width: their elements, of which attention's arithmetic is made.
        longest: tokens that a sequence may have, or None if the config doesn't say.
    """

    name: str
    parameters: int
    linears: tuple[Linear, ...]
    head: tuple[int, int]
    embedding: int
    caches: tuple[Cache, ...]
    heads: int
    query_width: int
    longest: int | None

    @property
    def other(self) -> int:
        """Elements that are in no linear layer of a block, nor in an embedding: biases, norms, positions."""
        return self.parameters - self.embedding - sum(linear.weights for linear in self.linears)


def load_model(name: str | Path) -> ModelShape:
    """The shape of a model.

    Args:
        name: a Hugging Face folder, of which only config.json is read, or a name from BUILT_IN.

    Raises:
        ValueError: neither a folder nor a known name.
        CheckpointError: a config that lacks fields, or describes what can't be planned.
    """
    with _quiet():
        if Path(name).is_dir():
            return describe(str(name), _from_folder(Path(name)))
        known = BUILT_IN.get(str(name).lower())
        if known is None:
            raise ValueError(
                f"model {str(name)!r} is neither a folder nor a known name: give a folder with a config.json, or one "
                f"of {', '.join(BUILT_IN)}"
            )
        fields = {key: value for key, value in known.items() if key != "model_type"}
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(known["model_type"], **fields))
        return describe(str(name), model)


def _from_folder(path: Path) -> PreTrainedModel:
    if not (path / CONFIG).is_file():
        raise CheckpointError(f"{path} has no {CONFIG}: it is no model folder; give one that has, or a built-in name")
    try:
        raw = read_json(path / CONFIG)
    except ValueError as error:
        raise CheckpointError(f"{path / CONFIG} is no JSON ({error}): copy the model again") from error
    model = meta_model(path)
    _require_fields(path / CONFIG, raw, model.config)
    return model


def _require_fields(path: Path, raw: Any, config: PreTrainedConfig) -> None:
    """Without them transformers would take its own defaults, and the plan would be another model's."""
    if "text_config" in raw:
        return  # of which transformers saves only what is not the default
    names = list(_NEEDED)
    names += [name for name in ("intermediate_size", "ffn_dim") if getattr(config, name, None) is not None]
    spellings = {name: {name, config.attribute_map.get(name, name)} for name in names}
    lacking = [name for name, spelled in spellings.items() if not any(raw.get(word) is not None for word in spelled)]
    if lacking:
        raise CheckpointError(
            f"{path} lacks {', '.join(lacking)}, without which the model's size isn't known: add it (models without "
            "attention can't be planned)"
        )


def describe(name: str, model: PreTrainedModel) -> ModelShape:
    """The shape of a model that is on the meta device.

    Raises:
        CheckpointError: weights that are no matrices (experts, convolutions), no output layer, or no KV cache.
    """
    model.tie_weights()  # which early releases of transformers 5 leave to loading
    _check_weights(name, model)
    config = model.config.get_text_config()
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    if head is None:
        raise CheckpointError(f"{name}: {type(model).__name__} has no output layer; give a causal language model")
    tied = head.weight is embedding.weight
    caches = _caches(name, model)
    heads = config.num_attention_heads
    return ModelShape(
        name=name,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        linears=_linears(model, head),
        head=sizes(head),
        embedding=embedding.weight.numel() + (0 if tied else head.weight.numel()),
        caches=caches,
        heads=heads,
        query_width=heads * (caches[0].width // 2),
        longest=getattr(config, "max_position_embeddings", None),
    )


def _check_weights(name: str, model: PreTrainedModel) -> None:
    for key, parameter in model.named_parameters():
        if parameter.dim() > 2:
            raise CheckpointError(
                f"{name}: {key} has shape {list(parameter.shape)}; only decoders whose weights are matrices can be "
                f"planned, not mixtures of experts or convolutions"
            )


def _linears(model: PreTrainedModel, head: nn.Module) -> tuple[Linear, ...]:
    """Linear layers but the output layer, those with the same input together, equal ones counted."""
    counts: dict[tuple[tuple[int, ...], int, bool], int] = {}
    for module in model.modules():
        children = {key: child for key, child in module.named_children() if is_linear(child) and child is not head}
        for group in _groups(children):
            shapes = [sizes(child) for child in group]
            key = (tuple(rows for rows, _ in shapes), shapes[0][1], all(is_packable(child) for child in group))
            counts[key] = counts.get(key, 0) + 1
    return tuple(Linear(rows, columns, count, packable) for (rows, columns, packable), count in counts.items())


def _groups(children: dict[str, nn.Module]) -> list[list[nn.Module]]:
    groups = []
    left = dict(children)
    for names in SIBLINGS:
        if all(name in left for name in names):
            groups.append([left.pop(name) for name in names])
    return [*groups, *([child] for child in left.values())]


def _caches(name: str, model: PreTrainedModel) -> tuple[Cache, ...]:
    config = model.config.get_text_config()
    padding, attention = config.pad_token_id, config._attn_implementation
    model.eval()
    try:
        # Without padding some models don't look for it in the prompt, which has no values; others need it. And the
        # quick attentions of some look whether the mask is all ones.
        for config._attn_implementation, tried in product((attention, "eager"), (None, padding)):
            try:
                config.pad_token_id = tried
                with torch.device("meta"), torch.no_grad(), _without_autocast():
                    output: Any = model.__call__(torch.zeros(1, 1, dtype=torch.long), use_cache=True)
                return tuple(_cache(layer) for layer in output.past_key_values.layers)
            except Exception as raised:  # whatever an architecture without such a cache makes transformers raise
                error = raised
    finally:
        config.pad_token_id, config._attn_implementation = padding, attention
    raise CheckpointError(
        f"{name}: {type(model).__name__} can't be planned, since a run of one token without weights shows no KV cache "
        f"with keys and values for every block ({type(error).__name__}: {str(error).splitlines()[0]})"
    ) from error


@contextmanager
def _without_autocast() -> Iterator[None]:
    """Releases of transformers before 5.5 ask whether there is autocast on "meta", which torch can't answer."""
    asked = torch.is_autocast_enabled
    torch.is_autocast_enabled = lambda *_: False
    try:
        yield
    finally:
        torch.is_autocast_enabled = asked


def _cache(layer: Any) -> Cache:
    _, heads, _, width = layer.keys.shape
    return Cache(heads, width + layer.values.shape[-1], getattr(layer, "sliding_window", None))


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers tells of odd configs at length, which is of no use to who plans."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
