"""Compressed folders: what is written, what is refused, and that nothing half-written is left."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flash_llm import CheckpointError, FormatError
from flash_llm import checkpoint as ck
from flash_llm.folder import ModelFolder, config_digest
from tiny_models import CONFIGS, pruned_folder


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pruned_folder(tmp_path_factory.mktemp("dense") / "model")


@pytest.fixture(scope="module")
def packed(dense: Path) -> Path:
    out = dense.parent / "packed"
    ck.compress_folder(dense, out)
    return out


def tensors(path: Path) -> dict[str, torch.Tensor]:
    folder = ModelFolder(path)
    return {name: folder.read(name) for name in folder.names}


def edit_config(path: Path, **changes: object) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8)), name


@pytest.mark.parametrize("kind", CONFIGS)
def test_round_trip_is_exact(kind: str, tmp_path: Path) -> None:
    dense = pruned_folder(tmp_path / "dense", kind)
    report = ck.compress_folder(dense, tmp_path / "packed", min_sparsity=0.1)
    assert len(report.packed) >= 8
    assert ck.verify_folder(tmp_path / "packed") == len(tensors(tmp_path / "packed"))
    ck.decompress_folder(tmp_path / "packed", tmp_path / "back")
    assert_same(tensors(tmp_path / "back"), tensors(dense))
    assert json.loads((tmp_path / "back/config.json").read_text()) == json.loads((dense / "config.json").read_text())


def test_shards_are_read_and_written_one_by_one(dense: Path, tmp_path: Path) -> None:
    many = pruned_folder(tmp_path / "many", max_shard_size="30KB")
    assert len(list(many.glob("*.safetensors"))) > 5
    ck.compress_folder(many, tmp_path / "packed", max_shard_size="20KB")
    files = list((tmp_path / "packed").glob("*.safetensors"))
    index = json.loads((tmp_path / "packed/model.safetensors.index.json").read_text())
    assert len(files) > 5
    assert {file.name for file in files} == set(index["weight_map"].values())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors(tmp_path / "packed").values())
    assert all(sum(t.nbytes for t in load_file(file).values()) <= 20_000 for file in files)
    ck.decompress_folder(tmp_path / "packed", tmp_path / "back", max_shard_size="20KB")
    assert_same(tensors(tmp_path / "back"), tensors(dense))


def test_other_files_are_copied_and_pickles_are_not(dense: Path, tmp_path: Path) -> None:
    source = shutil.copytree(dense, tmp_path / "source")
    (source / "pytorch_model.bin").write_bytes(b"pickle")
    (source / "modeling_custom.py").write_text("raise SystemExit('executed')")
    (source / ".cache").mkdir()
    (source / ".cache/junk").write_text("junk")
    (source / "chat_templates").mkdir()
    (source / "chat_templates/tool.jinja").write_text("{{ x }}")
    pruning = {"method": "wanda", "sparsity": 0.6, "layers": {"many": "numbers"}}
    (source / "pruning.json").write_text(json.dumps(pruning))
    ck.compress_folder(source, tmp_path / "out")
    names = {str(file.relative_to(tmp_path / "out")) for file in (tmp_path / "out").rglob("*") if file.is_file()}
    assert names == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "modeling_custom.py",
        "pruning.json", "chat_templates/tool.jinja",
    }  # fmt: skip
    assert ck.read_folder(tmp_path / "out").pruning == {"method": "wanda", "sparsity": 0.6}


def test_inspect_counts_without_reading(dense: Path, packed: Path) -> None:
    before, after = ck.read_folder(dense), ck.read_folder(packed)
    assert not before.compressed
    assert after.compressed
    assert [layer.name for layer in before.layers] == [layer.name for layer in after.layers]
    weights = tensors(dense)
    for was, now in zip(before.layers, after.layers, strict=True):
        assert was.shape == now.shape == tuple(weights[f"{now.name}.weight"].shape)
        assert was.nnz == int(weights[f"{now.name}.weight"].count_nonzero())
        assert was.nbytes == was.dense_nbytes == now.dense_nbytes
        assert now.nnz == (was.nnz if now.packed else None)
        assert now.ratio < 0.85 if now.packed else now.reason
    assert after.nbytes == sum(t.nbytes for t in tensors(packed).values())
    assert after.dense_nbytes == before.nbytes == sum(t.nbytes for t in weights.values())
    assert json.loads(json.dumps(after.to_dict()))["totals"]["ratio"] == after.nbytes / after.dense_nbytes


def test_load_packed(dense: Path, packed: Path) -> None:
    name = "model.layers.1.mlp.down_proj"
    assert torch.equal(ck.load_packed(packed, name).to_dense(), tensors(dense)[f"{name}.weight"])
    with pytest.raises(KeyError, match="no packed layer 'lm_head'"):
        ck.load_packed(packed, "lm_head")


def test_dense_stays_dense_where_packing_would_not_pay(tmp_path: Path) -> None:
    source = pruned_folder(tmp_path / "dense")
    weights = load_file(source / "model.safetensors")
    full = "model.layers.0.self_attn.q_proj"
    weights[f"{full}.weight"][:] = 1
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    report = ck.compress_folder(source, tmp_path / "packed")
    assert "0.0% zeros" in report.skipped[full]
    assert "matches" in report.skipped["lm_head"]
    assert set(ck.read_folder(tmp_path / "packed").dense) == {full, "lm_head"}
    report = ck.compress_folder(source, tmp_path / "forced", min_sparsity=0, skip=())
    assert {full, "lm_head"} <= set(report.packed)
    with pytest.raises(ValueError, match=r"would gain by being packed .*zeros, less than 90%.*Prune the model first"):
        ck.compress_folder(source, tmp_path / "none", min_sparsity=0.9)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "forced", "packed"]


def test_why_no_layer_can_be_packed_is_said(tmp_path: Path) -> None:
    source = pruned_folder(tmp_path / "dense", "llama")
    with pytest.raises(ValueError, match=r"none of its layers can be packed .*its name matches '\.'"):
        ck.compress_folder(source, tmp_path / "packed", skip=".")


def test_weights_that_are_the_other_way_round_ask_for_a_newer_reader(tmp_path: Path) -> None:
    """GPT-2's: an older one would take a square weight as it is."""
    ck.compress_folder(pruned_folder(tmp_path / "dense", "gpt2"), tmp_path / "packed")
    record = json.loads((tmp_path / "packed/config.json").read_text())["quantization_config"]
    assert record["format_version"] == 4
    layer = record["layers"]["transformer.h.0.attn.c_attn"]
    assert (layer["shape"], layer["transposed"], layer["format_version"]) == ([144, 48], True, 1)
    assert ck.load_packed(tmp_path / "packed", "transformer.h.0.attn.c_attn").shape == (144, 48)


def test_a_tied_head_stays_dense_when_asked_for(tmp_path: Path) -> None:
    source = pruned_folder(tmp_path / "dense", "llama-tied")
    assert not any("lm_head" in name for name in ck.compress_folder(source, tmp_path / "packed", skip=()).packed)


def test_float32_becomes_bfloat16_and_says_so(tmp_path: Path) -> None:
    source = pruned_folder(tmp_path / "dense", dtype=torch.float32)
    with pytest.warns(UserWarning, match="converted to bfloat16"):
        report = ck.compress_folder(source, tmp_path / "packed")
    assert report.dtype == "bfloat16"
    assert json.loads((tmp_path / "packed/config.json").read_text())["dtype"] == "bfloat16"
    ck.decompress_folder(tmp_path / "packed", tmp_path / "back")
    assert_same(tensors(tmp_path / "back"), {k: v.bfloat16() for k, v in tensors(source).items()})
    assert ck.compress_folder(source, tmp_path / "half", dtype="float16").notes == []
    weights = load_file(source / "model.safetensors")
    weights["model.norm.weight"][0] = 1e6
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model.norm.weight has numbers too large"):
        ck.compress_folder(source, tmp_path / "overflow", dtype="float16")


def test_layers_that_transformers_fuses_stay_dense(tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    report = ck.compress_folder(tmp_path / "dense", tmp_path / "packed", min_sparsity=0)
    assert sorted(name.rpartition(".")[2] for name in report.packed) == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert any("fuses" in reason for reason in report.skipped.values())


def bad_inputs(tmp: Path) -> Iterator[tuple[str, type[Exception], str]]:
    """Folders that are refused: what it is, and with which error."""
    yield "missing", FileNotFoundError, "does not exist"
    (tmp / "empty").mkdir()
    yield "empty", CheckpointError, "no model folder: it has no config.json"
    (tmp / "no_weights").mkdir()
    shutil.copy(tmp / "dense/config.json", tmp / "no_weights")
    yield "no_weights", CheckpointError, "neither model.safetensors nor"
    shutil.copytree(tmp / "no_weights", tmp / "pickles")
    (tmp / "pickles/pytorch_model.bin").write_bytes(b"pickle")
    yield "pickles", CheckpointError, "only as pickles"
    shutil.copytree(tmp / "dense", tmp / "truncated")
    file = tmp / "truncated/model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    yield "truncated", CheckpointError, "truncated or damaged"
    shutil.copytree(tmp / "dense", tmp / "integers")
    weights = load_file(tmp / "dense/model.safetensors")
    integers = {k: v.to(torch.int8) if "proj" in k else v for k, v in weights.items()}
    save_file(integers, tmp / "integers/model.safetensors", metadata={"format": "pt"})
    yield "integers", TypeError, "is of torch.int8"
    shutil.copytree(tmp / "dense", tmp / "quantized")
    edit_config(tmp / "quantized", quantization_config={"quant_method": "gptq"})
    yield "quantized", CheckpointError, r"quantized \(gptq\)"
    shutil.copytree(tmp / "dense", tmp / "unknown")
    edit_config(tmp / "unknown", model_type="martian", architectures=["MartianForCausalLM"])
    yield "unknown", CheckpointError, "can build without custom code"
    shutil.copytree(tmp / "dense", tmp / "mismatch")
    edit_config(tmp / "mismatch", intermediate_size=111)
    yield "mismatch", CheckpointError, r"but config.json makes it"
    shutil.copytree(tmp / "dense", tmp / "lost_shard")
    (tmp / "lost_shard/model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (tmp / "lost_shard/model.safetensors.index.json").write_text(json.dumps(index))
    yield "lost_shard", FileNotFoundError, "model-00001-of-00002.safetensors is missing"
    from transformers import ResNetConfig, ResNetModel

    ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])).save_pretrained(tmp / "no_linear")
    yield "no_linear", ValueError, "no linear layers"


def test_bad_folders_are_refused_and_leave_nothing(dense: Path, tmp_path: Path) -> None:
    shutil.copytree(dense, tmp_path / "dense")
    for name, error, message in bad_inputs(tmp_path):
        before = sorted(tmp_path.iterdir())
        with pytest.raises(error, match=message):
            ck.compress_folder(tmp_path / name, tmp_path / "out")
        assert sorted(tmp_path.iterdir()) == before, name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype=int8"),
        ({"min_sparsity": 1.5}, "min_sparsity=1.5"),
        ({"skip": ["("]}, "no regular expression"),
        ({"max_shard_size": "5 apples"}, "max_shard_size='5 apples'"),
    ],
)
def test_bad_options_are_refused(dense: Path, tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ck.compress_folder(dense, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_output_folder(dense: Path, packed: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.txt").write_text("precious")
    for make, source in ((ck.compress_folder, dense), (ck.decompress_folder, packed)):
        with pytest.raises(FileExistsError, match="not an empty folder"):
            make(source, tmp_path / "full")
    assert [file.name for file in tmp_path.rglob("*")] == ["full", "thesis.txt"]
    (tmp_path / "empty").mkdir()
    ck.compress_folder(dense, tmp_path / "empty")
    assert ck.read_folder(tmp_path / "empty").compressed


def test_not_enough_disk_is_said_before_anything_is_written(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OSError, match="not enough disk"):
        ck.compress_folder(dense, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_interrupted_leaves_nothing(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    real, calls = ck.ShardWriter.add, []

    def add(self: ck.ShardWriter, name: str, tensor: torch.Tensor) -> None:
        calls.append(name)
        if len(calls) == 20:
            assert any(file.suffix == ".safetensors" for file in tmp_path.rglob("*"))
            raise error
        real(self, name, tensor)

    monkeypatch.setattr(ck.ShardWriter, "add", add)
    with pytest.raises(error):
        ck.compress_folder(dense, tmp_path / "out", max_shard_size="5KB")
    assert list(tmp_path.iterdir()) == []


def test_compressed_folders_are_not_compressed_twice(packed: Path, dense: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="compressed already"):
        ck.compress_folder(packed, tmp_path / "out")
    for refuse in (ck.verify_folder, lambda path: ck.decompress_folder(path, tmp_path / "out")):
        with pytest.raises(CheckpointError, match="is not compressed"):
            refuse(dense)


def test_a_newer_format_is_refused(packed: Path, tmp_path: Path) -> None:
    newer = shutil.copytree(packed, tmp_path / "newer")
    record = json.loads((newer / "config.json").read_text())["quantization_config"]
    edit_config(newer, quantization_config=record | {"format_version": 99})
    for read in (ck.read_folder, ck.verify_folder):
        with pytest.raises(FormatError, match=r"format version 99.*upgrade"):
            read(newer)


def test_the_index_is_verified(dense: Path, tmp_path: Path) -> None:
    ck.compress_folder(dense, tmp_path / "packed", max_shard_size="20KB")
    file = tmp_path / "packed/model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["model.norm.weight"] = next(iter(index["weight_map"].values()))
    file.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"agree on model.norm.weight"):
        ck.verify_folder(tmp_path / "packed")


def test_an_edited_config_is_refused_until_accepted(packed: Path, tmp_path: Path) -> None:
    edited = shutil.copytree(packed, tmp_path / "edited")
    edit_config(edited, transformers_version="9.9")  # says who wrote it, not what the model is
    ck.verify_folder(edited)
    edit_config(edited, rms_norm_eps=1e-3)
    with pytest.raises(CheckpointError, match=r"is not as it was written.*accept_config"):
        ck.verify_folder(edited)
    ck.accept_config(edited)
    ck.verify_folder(edited)


def test_digest_is_of_the_content() -> None:
    config = {"a": 1, "quantization_config": {"x": [1, 2], "config_digest": "d"}, "transformers_version": "5"}
    same = {"quantization_config": {"x": [1, 2]}, "a": 1}
    assert config_digest(config) == config_digest(same)
    assert config_digest(config) != config_digest(same | {"a": 2})
    assert config_digest(config) != config_digest(same | {"quantization_config": {"x": [2, 1]}})
