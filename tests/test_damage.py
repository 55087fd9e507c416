"""Damaged checkpoints: a load raises, or gives the very model that was saved. Nothing between the two."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM

from flash_llm import FlashLLMError
from flash_llm.checkpoint import compress_folder, verify_folder
from tiny_models import logits, pruned_folder

pytestmark = pytest.mark.filterwarnings("ignore")

Damage = Callable[[bytes, random.Random], bytes]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    """A compressed folder of three shards, and its logits."""
    base = tmp_path_factory.mktemp("original")
    compress_folder(pruned_folder(base / "dense"), base / "packed", max_shard_size="50KB")
    assert len(list((base / "packed").glob("*.safetensors"))) >= 3
    return base / "packed", logits(load(base / "packed"))


def load(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder)


def header_size(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


def flip(data: bytes, rng: random.Random, start: int, stop: int) -> bytes:
    """One bit, or one byte, or a few bytes in a row, between two places."""
    place = rng.randrange(start, stop)
    damaged = bytearray(data)
    kind = rng.choice(("bit", "byte", "run"))
    if kind == "bit":
        damaged[place] ^= 1 << rng.randrange(8)
    else:
        end = min(stop, place + (1 if kind == "byte" else rng.randrange(2, 40)))
        damaged[place:end] = rng.randbytes(end - place)
    return bytes(damaged)


def in_header(data: bytes, rng: random.Random) -> bytes:
    return flip(data, rng, 0, header_size(data))


def in_data(data: bytes, rng: random.Random) -> bytes:
    return flip(data, rng, header_size(data), len(data))


def anywhere(data: bytes, rng: random.Random) -> bytes:
    return flip(data, rng, 0, len(data))


def one_character(data: bytes, rng: random.Random) -> bytes:
    """A character for one of its kind, so that most of what comes out is still JSON."""
    kinds = (b"0123456789", b"abcdefghijklmnopqrstuvwxyz", b"ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    while True:
        place = rng.randrange(len(data))
        for kind in kinds:
            if data[place] in kind:
                return data[:place] + bytes([rng.choice(kind)]) + data[place + 1 :]


def truncated(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


CASES: list[tuple[str, Damage, int]] = [
    ("*.safetensors", in_header, 40),
    ("*.safetensors", in_data, 60),
    ("*.safetensors", truncated, 10),
    ("model.safetensors.index.json", one_character, 20),
    ("model.safetensors.index.json", anywhere, 10),
    ("config.json", one_character, 60),
    ("config.json", anywhere, 20),
    ("config.json", truncated, 10),
]


@pytest.mark.parametrize(("pattern", "damage", "times"), CASES, ids=[f"{c[0]}-{c[1].__name__}" for c in CASES])
def test_a_load_raises_or_gives_the_original(
    original: tuple[Path, Tensor], tmp_path: Path, pattern: str, damage: Damage, times: int
) -> None:
    folder, expected = original
    for seed in range(times):
        check(folder, expected, tmp_path / str(seed), pattern, damage, seed)


def check(folder: Path, expected: Tensor, target: Path, pattern: str, damage: Damage, seed: int) -> None:
    rng = random.Random(f"{pattern} {damage.__name__} {seed}")
    shutil.copytree(folder, target)
    file = rng.choice(sorted(target.glob(pattern)))
    file.write_bytes(damage(file.read_bytes(), rng))
    try:
        verify_folder(target)
        verified = True
    except (FlashLLMError, OSError):  # only our own words for it, whatever was damaged
        verified = False
    loaded = None
    try:
        loaded = logits(load(target))
    except (FlashLLMError, SafetensorError, OSError):
        pass
    except Exception:  # of all kinds, but only of transformers, which reads these before we do
        assert file.suffix == ".json"
    assert loaded is not None or not verified, f"seed {seed}: verified, but could not be loaded"
    assert loaded is None or torch.equal(loaded, expected), f"seed {seed}: another model"
    shutil.rmtree(target)


def edits(config: dict) -> Iterator[tuple[str, dict]]:
    """Every single entry of a config.json removed, and changed."""
    for key, value in config.items():
        yield f"without {key}", {k: v for k, v in config.items() if k != key}
        if key not in ("transformers_version", "_name_or_path") and not isinstance(value, dict):
            yield f"other {key}", config | {key: [] if value == "" else ""}
        if isinstance(value, dict) and len(value) < 20:
            for name, edited in edits(value):
                yield f"{key}: {name}", config | {key: edited}


def test_no_entry_of_the_config_can_be_changed_unnoticed(original: tuple[Path, Tensor], tmp_path: Path) -> None:
    folder = shutil.copytree(original[0], tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    config.pop("transformers_version")
    unnoticed = []
    for name, edited in edits(config):
        (folder / "config.json").write_text(json.dumps(edited))
        try:
            verify_folder(folder)
            unnoticed.append(name)
        except FlashLLMError:
            pass
    assert unnoticed == []
