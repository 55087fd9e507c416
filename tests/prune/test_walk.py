"""Pruning a folder: every architecture against a reference written from the paper, which runs the whole model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DbrxConfig,
    Gemma3Config,
    MixtralConfig,
    RwkvConfig,
    Zamba2Config,
)
from transformers.pytorch_utils import Conv1D

from flash_llm.errors import CheckpointError
from flash_llm.prune import CalibrationConfig, Magnitude, prune_folder
from flash_llm.prune.calibration import load_windows
from flash_llm.prune.skeleton import Skeleton
from flash_llm.prune.source import SourceFolder
from flash_llm.prune.statistics import Collector

from .conftest import BLOCKS, CONFIGS, save_tokenizer, tensors

Make = Callable[..., Path]


def windows_of(folder: Path, calibration: CalibrationConfig) -> Tensor:
    return load_windows(calibration, AutoTokenizer.from_pretrained(folder))


@torch.no_grad()
def wanda_reference(
    folder: Path, blocks: str, windows: Tensor, sparsity: float, *, head: bool = False
) -> dict[str, Tensor]:
    """Algorithm 1 of arXiv 2306.11695, block after block, with the whole model run anew for each."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    groups: list[nn.Module] = list(model.get_submodule(blocks))
    for group in [*groups, model.get_output_embeddings()] if head else groups:
        inputs: dict[nn.Module, list[Tensor]] = {}
        hooks = [
            module.register_forward_pre_hook(
                lambda module, args, inputs=inputs: inputs.setdefault(module, []).append(args[0].flatten(0, -2))
            )
            for module in group.modules()
            if isinstance(module, (nn.Linear, Conv1D))
        ]
        for window in windows:
            model(window[None])
        for hook in hooks:
            hook.remove()
        for module, seen in inputs.items():
            weight = module.weight.data.T.clone() if isinstance(module, Conv1D) else module.weight.data
            metric = weight.abs() * torch.cat(seen).norm(p=2, dim=0)
            columns = metric.sort(dim=1).indices[:, : int(weight.shape[1] * sparsity)]
            weight.scatter_(1, columns, 0.0)
            module.weight.data = weight.T.contiguous() if isinstance(module, Conv1D) else weight
    return {name: parameter.data for name, parameter in model.named_parameters(remove_duplicate=False)}


@pytest.mark.parametrize("architecture", CONFIGS)
def test_wanda_equals_the_paper(architecture: str, make_model: Make, text: Path, tmp_path: Path) -> None:
    source, out = make_model(architecture), tmp_path / "out"
    calibration = CalibrationConfig(str(text), samples=5, seqlen=24, seed=3)
    report = prune_folder(source, out, "wanda", 0.45, calibration=calibration, progress=False)

    windows = windows_of(source, calibration)
    expected = wanda_reference(source, BLOCKS.get(architecture, "model.layers"), windows, 0.45)
    before, got = tensors(source), tensors(out)
    assert got.keys() == before.keys()
    # GPT-NeoX stores its head, which is not pruned, under another name than the model has it.
    assert [name for name in got if not torch.equal(got[name], expected.get(name, before[name]))] == []
    changed = {name for name in got if not torch.equal(got[name], before[name])}
    assert changed == {layer.tensor for layer in report.layers.values()}
    # What the record says is so, and the folder is a model.
    record = json.loads((out / "pruning.json").read_text())
    for layer in record["layers"].values():
        assert layer["zeros"] == int((got[layer["tensor"]] == 0).sum())
    model = AutoModelForCausalLM.from_pretrained(out)
    assert torch.isfinite(model(windows[:1]).logits).all()
    assert AutoTokenizer.from_pretrained(out)("abc")["input_ids"]


def test_the_head_is_pruned_on_request(make_model: Make, text: Path, tmp_path: Path) -> None:
    source, out = make_model("llama"), tmp_path / "out"
    calibration = CalibrationConfig(str(text), samples=3, seqlen=16)
    report = prune_folder(source, out, "wanda", 0.5, calibration=calibration, include_lm_head=True, progress=False)
    expected = wanda_reference(source, "model.layers", windows_of(source, calibration), 0.5, head=True)
    got = tensors(out)
    assert "lm_head" in report.layers
    assert [name for name in got if not torch.equal(got[name], expected[name])] == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_keep_their_dtype_and_their_bits(
    dtype: torch.dtype, make_model: Make, text: Path, tmp_path: Path
) -> None:
    source, out = make_model("qwen3", dtype=dtype), tmp_path / "out"
    calibration = CalibrationConfig(str(text), samples=2, seqlen=16)
    prune_folder(source, out, "wanda", 0.5, calibration=calibration, dtype=torch.float32, progress=False)
    before, after = tensors(source), tensors(out)
    for name in before:
        assert after[name].dtype == dtype
        kept = after[name] != 0
        assert torch.equal(after[name][kept], before[name][kept])


def test_magnitude_needs_no_text_and_is_exact_per_tensor(make_model: Make, tmp_path: Path) -> None:
    source = make_model("opt")
    report = prune_folder(source, tmp_path / "out", "magnitude", 0.37, progress=False)
    for layer in report.layers.values():
        assert layer.zeros == int(torch.Size(layer.shape).numel() * 0.37)
    per_row = prune_folder(source, tmp_path / "rows", Magnitude(per_row=True), 0.37, progress=False)
    after = tensors(tmp_path / "rows")
    for layer in per_row.layers.values():
        assert ((after[layer.tensor] == 0).sum(dim=1) == int(layer.shape[1] * 0.37)).all()


def test_skipped_layers_stay_dense(make_model: Make, tmp_path: Path) -> None:
    source, out = make_model("llama"), tmp_path / "out"
    skip = [r"layers\.0\.", r"o_proj$"]
    report = prune_folder(source, out, "magnitude", 0.5, skip=skip, progress=False)
    assert sorted({name.split(".")[2] for name in report.layers}) == ["1", "2"]
    before, after = tensors(source), tensors(out)
    for name in before:
        assert torch.equal(before[name], after[name]) == (name.removesuffix(".weight") not in report.layers)


def test_a_skipped_block_is_walked_through(make_model: Make, text: Path, tmp_path: Path) -> None:
    """Its output, not its input, is what the next block sees."""
    source, out = make_model("llama", num_hidden_layers=2), tmp_path / "out"
    calibration = CalibrationConfig(str(text), samples=2, seqlen=16)
    prune_folder(source, out, "wanda", 0.5, calibration=calibration, skip=[r"layers\.0\."], progress=False)
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    layer = model.model.layers[1].mlp.down_proj
    seen: list[Tensor] = []
    layer.register_forward_pre_hook(lambda module, args: seen.append(args[0][0].detach()))
    for window in windows_of(source, calibration):
        model(window[None])
    metric = layer.weight.abs() * torch.cat(seen).norm(dim=0)
    zeros = metric.sort(dim=1).indices[:, :25]
    assert torch.equal(tensors(out)["model.layers.1.mlp.down_proj.weight"], layer.weight.data.scatter(1, zeros, 0.0))


def test_a_layer_without_data_is_pruned_by_magnitude_and_it_is_said(
    make_model: Make, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an expert of a mixture to which no token was sent."""
    never = "model.layers.1.mlp.up_proj"
    enter = Collector.__enter__

    def forget(self: Collector) -> Collector:
        self._layers = {name: layer for name, layer in self._layers.items() if name != never}
        return enter(self)

    monkeypatch.setattr(Collector, "__enter__", forget)
    calibration = CalibrationConfig(str(text), samples=2, seqlen=16)
    with pytest.warns(UserWarning, match=f"{never} saw no calibration data"):
        report = prune_folder(
            make_model("llama"), tmp_path / "out", "wanda", 0.5, calibration=calibration, progress=False
        )
    assert [name for name, layer in report.layers.items() if layer.method == "magnitude"] == [never]
    assert report.layers[never].sparsity == 0.5
    assert never in json.loads((tmp_path / "out" / "pruning.json").read_text())["warnings"][0]


def test_experts_that_stay_dense_are_spoken_of(tmp_path: Path) -> None:
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1}
    config = MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, num_local_experts=3)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    with pytest.warns(UserWarning, match=f"{3 * 3 * 40 * 32:,} weights of merged tensors, experts for"):
        report = prune_folder(tmp_path / "model", tmp_path / "out", "magnitude", 0.5, progress=False)
    assert report.weights == 2 * 32 * 32 + 2 * 16 * 32
    assert "merged tensors" in report.warnings[0]


@pytest.mark.filterwarnings("ignore:.*merged tensors")
def test_wanda_goes_through_experts_that_are_stored_one_by_one(text: Path, tmp_path: Path) -> None:
    """transformers merges them at load; they stay dense."""
    sizes = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3}
    config = MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, num_local_experts=3)
    source, out = tmp_path / "model", tmp_path / "out"
    AutoModelForCausalLM.from_config(config).save_pretrained(source)
    save_tokenizer(source)
    calibration = CalibrationConfig(str(text), samples=3, seqlen=16)
    report = prune_folder(source, out, "wanda", 0.5, calibration=calibration, progress=False)
    expected = wanda_reference(source, "model.layers", windows_of(source, calibration), 0.5)
    before, got = tensors(source), tensors(out)
    assert got.keys() == before.keys()
    assert [name for name in got if not torch.equal(got[name], expected.get(name, before[name]))] == []
    assert len(report.layers) == 3 * 4


def test_layers_that_the_folder_has_under_other_names_are_found(make_model: Make, text: Path, tmp_path: Path) -> None:
    """GPT-NeoX stores its head as embed_out, which later releases of transformers 5 call lm_head."""
    source = make_model("gpt_neox")
    calibration = CalibrationConfig(str(text), samples=3, seqlen=16)
    report = prune_folder(source, tmp_path / "out", calibration=calibration, include_lm_head=True, progress=False)
    head = next(name for name in report.layers if name in ("lm_head", "embed_out"))
    assert (tensors(tmp_path / "out")["embed_out.weight"] == 0).sum() == report.layers[head].zeros > 0


def test_experts_that_are_one_tall_matrix_are_spoken_of(tmp_path: Path) -> None:
    sizes = {"vocab_size": 50, "d_model": 32, "n_heads": 2, "n_layers": 1, "max_seq_len": 64}
    experts = {"hidden_size": 32, "ffn_hidden_size": 40, "moe_num_experts": 3, "moe_top_k": 1}
    config = DbrxConfig(**sizes, ffn_config=experts, attn_config={"kv_n_heads": 1, "rope_theta": 1e4})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    with pytest.warns(UserWarning, match=f"{3 * 3 * 40 * 32:,} weights of merged tensors"):
        prune_folder(tmp_path / "model", tmp_path / "out", "magnitude", 0.5, progress=False)


def test_a_linear_layer_that_is_stored_merged_stays_dense_and_it_is_said(
    make_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, name = make_model("llama"), "model.layers.1.mlp.up_proj"
    monkeypatch.setattr(Skeleton, "parts", lambda self, weight: ["merged"] if weight == f"{name}.weight" else [])
    with pytest.warns(UserWarning, match=f"1 linear layers stay as they are: .*{name}.weight for one, in merged"):
        report = prune_folder(source, tmp_path / "out", "magnitude", progress=False)
    assert len(report.layers) == 3 * 7 - 1
    assert name not in report.layers


def test_a_weight_that_blocks_share_is_pruned_once(text: Path, tmp_path: Path) -> None:
    """Zamba2's; there is no walk for it."""
    sizes = {"vocab_size": 256, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 40}
    mamba = {"mamba_d_state": 8, "mamba_headdim": 16, "n_mamba_heads": 4, "mamba_ngroups": 1, "num_mem_blocks": 1}
    kinds = {"num_hidden_layers": 3, "hybrid_layer_ids": [0, 2], "layers_block_type": ["hybrid", "mamba", "hybrid"]}
    source, out = tmp_path / "model", tmp_path / "out"
    AutoModelForCausalLM.from_config(Zamba2Config(**sizes, **mamba, **kinds)).save_pretrained(source)
    save_tokenizer(source)
    calibration = CalibrationConfig(str(text), samples=2, seqlen=16)
    with pytest.raises(CheckpointError, match="shares weights between its blocks"):
        prune_folder(source, out, calibration=calibration, progress=False)
    report = prune_folder(source, out, "magnitude", progress=False)
    assert len([name for name in report.layers if name.endswith("self_attn.q_proj")]) == 1
    pruned = AutoModelForCausalLM.from_pretrained(out).model.layers[2].shared_transformer.self_attn.q_proj.weight
    assert (pruned == 0).float().mean() == 0.5


def test_the_language_model_is_pruned_not_a_larger_vision_tower(tmp_path: Path) -> None:
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}
    text = heads | {"vocab_size": 50, "hidden_size": 32, "num_key_value_heads": 1, "head_dim": 16}
    vision = heads | {"num_hidden_layers": 4, "hidden_size": 128, "image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    report = prune_folder(tmp_path / "model", tmp_path / "out", "magnitude", 0.5, progress=False)
    assert len(report.layers) == 2 * 7
    assert all("language_model.layers" in name for name in report.layers)


def test_a_base_models_folder_can_be_pruned(make_model: Make, text: Path, tmp_path: Path) -> None:
    """GPT-2 and others are published without the prefix that the model with a head has."""
    source = make_model("gpt2")
    bare = tmp_path / "bare"
    AutoModelForCausalLM.from_pretrained(source).transformer.save_pretrained(bare)
    for file in source.glob("token*"):
        (bare / file.name).write_bytes(file.read_bytes())
    calibration = CalibrationConfig(str(text), samples=2, seqlen=16)
    prune_folder(source, tmp_path / "a", calibration=calibration, progress=False)
    prune_folder(bare, tmp_path / "b", calibration=calibration, progress=False)
    with_prefix, without = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    for name in without:
        assert torch.equal(without[name], with_prefix["transformer." + name])


def test_a_single_file_goes_before_stale_shards(make_model: Make, tmp_path: Path) -> None:
    """As in transformers: a model was saved anew into the folder of an older one."""
    source, new = make_model("llama"), make_model("llama", shard="1GB")
    (source / "model.safetensors").write_bytes((new / "model.safetensors").read_bytes())
    for shard in source.glob("model-*.safetensors"):
        shard.write_bytes(b"stale")
    prune_folder(source, tmp_path / "a", "magnitude", progress=False)
    prune_folder(new, tmp_path / "b", "magnitude", progress=False)
    assert all(torch.equal(tensor, tensors(tmp_path / "b")[name]) for name, tensor in tensors(tmp_path / "a").items())


def test_the_skeleton_holds_no_weights(make_model: Make) -> None:
    skeleton = Skeleton(SourceFolder(make_model("llama")), torch.float32, torch.device("cpu"))
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())
    with skeleton.loaded(skeleton.block_names[1]) as block:
        assert not any(parameter.is_meta for parameter in block.parameters())
        assert sum(not parameter.is_meta for parameter in skeleton.model.parameters()) == len(list(block.parameters()))
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())


def test_blocks_that_get_more_of_the_text_are_refused(
    make_model: Make, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaModel

    forward = LlamaModel.forward
    monkeypatch.setattr(
        LlamaModel, "forward", lambda self, input_ids, **kw: forward(self, input_ids, extra=input_ids.float(), **kw)
    )
    calibration = CalibrationConfig(str(text), samples=2, seqlen=16)
    with pytest.raises(CheckpointError, match="more of the text than the hidden states"):
        prune_folder(make_model("llama"), tmp_path / "out", calibration=calibration, progress=False)


def test_blocks_that_hand_on_more_than_hidden_states_are_refused(text: Path, tmp_path: Path) -> None:
    """RWKV's hand on their state; magnitude pruning has no need of them."""
    source = tmp_path / "model"
    config = RwkvConfig(vocab_size=256, hidden_size=32, num_hidden_layers=2, context_length=64)
    AutoModelForCausalLM.from_config(config).save_pretrained(source)
    save_tokenizer(source)
    calibration = CalibrationConfig(str(text), samples=2, seqlen=16)
    with pytest.raises(CheckpointError, match=r"RwkvForCausalLM can't go from block to block .*\"magnitude\" needs no"):
        prune_folder(source, tmp_path / "out", calibration=calibration, progress=False)
    prune_folder(source, tmp_path / "out", "magnitude", progress=False)


@pytest.mark.gpu
def test_the_gpu_prunes_like_the_cpu(make_model: Make, text: Path, tmp_path: Path) -> None:
    source = make_model("llama", dtype=torch.float16)
    for device in ("cpu", "cuda"):
        calibration = CalibrationConfig(str(text), samples=4, seqlen=32)
        prune_folder(
            source,
            tmp_path / device,
            calibration=calibration,
            device=device,
            dtype=torch.float32,
            progress=False,
        )
    cpu, cuda = tensors(tmp_path / "cpu"), tensors(tmp_path / "cuda")
    for name in cpu:
        # Norms differ in their last bits, so that two weights of nearly equal score may change places.
        assert (cpu[name] != cuda[name]).float().mean() < 0.01
