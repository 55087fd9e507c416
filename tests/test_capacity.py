"""The planner: its bytes against real packed models, its times against what was measured, and what it refuses."""

from __future__ import annotations

import importlib.util
import json
import re
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, BioGptConfig, LlamaConfig, LlamaForCausalLM, MixtralConfig
from typer.testing import CliRunner

from flash_llm.capacity import fit
from flash_llm.capacity.efficiency import efficiency
from flash_llm.capacity.gpus import GPUS, Machine, find_gpu, read_machine
from flash_llm.capacity.models import BUILT_IN, ModelShape, describe, load_model
from flash_llm.capacity.plan import Plan, Workload, allowed_gpus, make_plan, weights_bytes
from flash_llm.capacity.report import remarks
from flash_llm.capacity.roofline import Roofline, rates
from flash_llm.capacity.sizes import Format, expected_tile_words, formats, packed_nbytes, sparse_format
from flash_llm.checkpoint import compress_folder, read_folder
from flash_llm.cli import app
from flash_llm.errors import CheckpointError
from flash_llm.layers import is_linear
from flash_llm.prune.magnitude import Magnitude
from flash_llm.tensor import PackedWeight, ValueKind
from flash_llm.tensor.dummy import random_packed
from sparse_matrices import sparse
from tiny_models import CONFIGS

ROOT = Path(__file__).resolve().parent.parent
DENSE = Format("dense")
MACHINE = Machine("NVIDIA H100 80GB HBM3", "9.0", 85_000_000_000, 3.0e12, 6.0e14, 1.5, 132, 1.98e9)


@pytest.fixture(autouse=True)
def no_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever was measured on the computer that runs the tests stays out of them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def check() -> ModuleType:
    """examples/check_predictions.py."""
    spec = importlib.util.spec_from_file_location("check_predictions", ROOT / "examples" / "check_predictions.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def opt_66b() -> ModelShape:
    return load_model("opt-66b")


@pytest.fixture(scope="module")
def llama_8b() -> ModelShape:
    return load_model("llama-3-8b")


def planned(model: ModelShape, gpu: str = "h100-sxm", sparsities: tuple[float, ...] = (0.6,), **work: Any) -> Plan:
    return make_plan(model, rates(find_gpu(gpu)), formats(list(sparsities)), Workload(**work))


def run(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


# Bytes.


@pytest.mark.parametrize("sparsity", [0.5, 0.7, 0.95])
@pytest.mark.parametrize("shape", [(1024, 1024), (2048, 555), (100, 4096)])
def test_packed_bytes_of_random_matrices(shape: tuple[int, int], sparsity: float) -> None:
    packed = PackedWeight.from_dense(sparse(*shape, sparsity))
    assert packed_nbytes(*shape, sparsity) == pytest.approx(packed.nbytes, rel=0.02)


def test_packed_bytes_at_the_ends() -> None:
    for rows, columns in ((16, 64), (1, 1), (33, 200)):
        full = PackedWeight.from_dense(torch.ones(rows, columns, dtype=torch.float16))
        assert packed_nbytes(rows, columns, 0.0) == full.nbytes
        assert expected_tile_words(rows, columns, 0.0) == full.tile_words


@pytest.mark.parametrize("sparsity", [0.5, 0.6, 0.8])
@pytest.mark.parametrize("per_row", [True, False])
def test_packed_bytes_of_smollm2(smollm2: Path, sparsity: float, per_row: bool) -> None:
    """Two blocks of a real model and their share of its embedding, pruned by magnitude: to 2 %, each layer to 3 %.

    Compared within rows, as by Wanda, every layer is near. Compared within layers some rows are far denser than others,
    which asks for smaller tiles in small layers.
    """
    method = Magnitude(per_row=per_row)
    real = predicted = 0
    with safe_open(smollm2 / "model.safetensors", "pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118
            if not re.search(r"layers\.(5|25)\..*_proj\.weight$", name):
                continue
            pruned = method.prune(tensors.get_tensor(name).half(), None, sparsity)
            packed = PackedWeight.from_dense(pruned)
            expected = packed_nbytes(*packed.shape, packed.sparsity)
            assert expected == pytest.approx(packed.nbytes, rel=0.03 if per_row else 0.1)
            real, predicted = real + packed.nbytes, predicted + expected
    embedding = load_model("smollm2-135m").embedding * 2 // 15
    assert real > 3_000_000
    assert predicted + embedding == pytest.approx(real + embedding, rel=0.02)


@pytest.mark.parametrize(("sparsity", "tied"), [(0.6, True), (0.5, False), (0.1, False)])
def test_bytes_of_a_compressed_folder(tmp_path: Path, sparsity: float, tied: bool) -> None:
    """From config.json alone, what ``compress`` makes of the whole model; at 10 % it leaves all layers dense."""
    config = LlamaConfig(
        vocab_size=500,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        attention_bias=True,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).half()
    for module in model.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data.masked_fill_(torch.rand_like(module.weight.float()) < sparsity, 0)
    model.save_pretrained(tmp_path / "pruned")
    folder = tmp_path / "pruned"
    if sparsity > 0.25:
        folder = tmp_path / "small"
        compress_folder(tmp_path / "pruned", folder)
    form = Format("sparse", sparsity)
    assert weights_bytes(load_model(folder), form) == pytest.approx(read_folder(folder).nbytes, rel=0.02)


def test_bytes_of_quantised_layers() -> None:
    assert DENSE.nbytes(256, 512) == 2 * 256 * 512
    assert Format("fp8").nbytes(256, 512) == 256 * 512
    assert Format("int4").nbytes(256, 512) == 256 * 512 // 2 + 2 * 256 * 4
    assert Format("int4").nbytes(256, 500) == 256 * 500 // 2 + 2 * 256 * 4


@pytest.mark.parametrize("values", ["float8_e4m3", "int8"])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.6, 0.8])
@pytest.mark.parametrize("shape", [(576, 576), (1536, 4096), (300, 70)])
def test_bytes_of_8_bit_weights_are_those_of_random_ones(values: str, sparsity: float, shape: tuple[int, int]) -> None:
    weight = random_packed(*shape, sparsity, torch.float16, "cpu", torch.Generator().manual_seed(0), values=values)
    near = 0.02 if weight.dense_nbytes > 2_000_000 else 0.05  # chance may choose another tile size for a small one
    assert packed_nbytes(*shape, sparsity, ValueKind(values)) == pytest.approx(weight.nbytes, rel=near)


def test_sparse_formats_are_named_by_share_and_values() -> None:
    assert sparse_format("0.6+8bit").name == "sparse 60% + 8 bit"
    assert sparse_format(" 0.6 ").name == "sparse 60%"
    assert sparse_format("0.6+int8").nbytes(4096, 4096) < 0.62 * sparse_format("0.6").nbytes(4096, 4096)
    assert len(formats([0.5, "0.5", "0.5+fp8"])) == 5
    for text in ("0.6+int4", "0.6+", "1.0+fp8", "fp8", "+fp8"):
        with pytest.raises(ValueError, match=r"sparsity '.*\+fp8 or \+int8 or \+8bit behind it"):
            sparse_format(text)


# Models.


@pytest.mark.parametrize(
    ("name", "billions", "cache_bytes"),
    [
        ("opt-30b", 29.97, 2 * 2 * 48 * 7168),
        ("llama-3-8b", 8.03, 2 * 2 * 32 * 1024),
        ("qwen2.5-7b", 7.62, 2 * 2 * 28 * 512),
        ("mistral-7b", 7.25, 2 * 2 * 32 * 1024),
        ("smollm2-135m", 0.1345, 2 * 2 * 30 * 192),
    ],
)
def test_built_in_models_are_as_published(name: str, billions: float, cache_bytes: int) -> None:
    model = load_model(name)
    assert model.parameters / 1e9 == pytest.approx(billions, rel=1e-3)
    assert 2 * sum(cache.elements(1) for cache in model.caches) == cache_bytes


@pytest.mark.parametrize("kind", CONFIGS)
def test_any_decoder_is_read_from_its_modules(kind: str) -> None:
    """Fused or separate projections, tied embeddings, biases: all parameters are in one place each."""
    config = CONFIGS[kind]()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shape = describe(kind, model)
    linears = [module for module in model.base_model.modules() if is_linear(module)]
    assert sum(linear.weights for linear in shape.linears) == sum(module.weight.numel() for module in linears)
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    small = [key for key, value in model.named_parameters() if value.dim() == 1 or "position" in key or "wpe" in key]
    assert shape.other == sum(model.get_parameter(key).numel() for key in small)
    assert len(shape.caches) == 2


def test_a_decoder_that_looks_at_its_prompt_is_read_too() -> None:
    """BioGPT's quick attention looks whether the mask is all ones, which a prompt without values doesn't say."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(BioGptConfig(num_hidden_layers=2))
    padding, attention = model.config.pad_token_id, model.config._attn_implementation
    shape = describe("biogpt", model)
    assert [cache.elements(10) for cache in shape.caches] == 2 * [10 * 2 * model.config.hidden_size]
    assert (model.config.pad_token_id, model.config._attn_implementation) == (padding, attention)


def test_layers_with_the_same_input_are_multiplied_at_once(llama_8b: ModelShape) -> None:
    assert {linear.rows for linear in llama_8b.linears} == {(4096, 1024, 1024), (4096,), (14336, 14336)}


def test_a_window_bounds_the_cache(llama_8b: ModelShape) -> None:
    cache = replace(llama_8b.caches[0], window=100)
    assert cache.elements(1000) == cache.elements(100) == 100 * cache.elements(1)
    assert cache.elements(50, gpus=16) == 50 * cache.width  # eight heads over 16 GPUs: each keeps a whole one


def test_layers_that_cant_be_packed_stay_dense() -> None:
    """Special ones, of classes of their own: all formats weigh the same, and the plan says why."""

    class Special(torch.nn.Linear):
        pass

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIGS["gpt_neox"]())
        for layer in model.base_model.modules():
            for name, child in list(layer.named_children()):
                if isinstance(child, torch.nn.Linear):
                    setattr(layer, name, Special(child.in_features, child.out_features))
    plan = planned(describe("special", model), sparsities=(0.8,), input_len=100)
    assert plan.stay_dense == 8
    assert len({row.weights_bytes for row in plan.rows}) == 1
    assert any("8 linear layers" in line for line in remarks(plan))


# Plans.


def test_sparse_needs_fewer_gpus(opt_66b: ModelShape) -> None:
    """The point of it: a model on one GPU that dense needs two for, and room for more sequences on those two."""
    rows = {row.format: row for row in planned(opt_66b, sparsities=(0.6, 0.8)).rows}
    assert {name: row.gpus for name, row in rows.items()} == {
        "dense 16-bit": 2,
        "FP8": 1,
        "INT4, group 128": 1,
        "sparse 60%": 1,
        "sparse 80%": 1,
    }
    two = {row.format: row for row in planned(opt_66b, gpus=2).rows}
    assert all(row.gpus == 2 for row in two.values())
    assert (two["sparse 60%"].largest_batch or 0) > 4 * (two["dense 16-bit"].largest_batch or 0)
    # What is on two GPUs is all there is: norms, biases and the tables of packed tiles come twice, and weigh little.
    sparse = two["sparse 60%"]
    assert 2 * (sparse.weights_bytes_a_gpu or 0) == pytest.approx(sparse.weights_bytes, rel=0.01)


def test_the_largest_batch_fills_the_memory(llama_8b: ModelShape) -> None:
    plan = planned(llama_8b, "l40s", input_len=2000, output_len=48)
    for row in plan.rows:
        sequence = 2048 * (row.cache_bytes_a_token or 0)
        used = (row.weights_bytes_a_gpu or 0) + (row.largest_batch or 0) * sequence
        assert used < 0.9 * plan.rates.memory < used + sequence + 2.5 * 2**30


def test_numbers_of_gpus_divide_the_heads(opt_66b: ModelShape, llama_8b: ModelShape) -> None:
    assert allowed_gpus(opt_66b, 8) == [1, 2, 3, 4, 6, 8]  # 72 heads
    assert allowed_gpus(llama_8b, 16) == [1, 2, 4, 8, 16]  # 32 heads, and eight for keys and values
    assert allowed_gpus(load_model("qwen2.5-7b"), 8) == [1, 2, 4]  # 28 heads, but seven don't divide the MLP
    with pytest.raises(
        ValueError, match=r"5 GPUs can't share opt-66b's 72 heads and its layers equally: take one of 1, 2, 3, 4, 6, 8"
    ):
        planned(opt_66b, gpus=5)


@pytest.mark.parametrize("gpu", ["h100", "h100-pcie", "l40s"])
def test_no_time_is_below_the_bytes(gpu: str, llama_8b: ModelShape) -> None:
    line = Roofline(llama_8b, rates(find_gpu(gpu)), 1, efficiency())
    for form in [*formats([0.0, 0.5, 0.9]), sparse_format("0.5+int8")]:
        linears = sum(linear.count * form.nbytes(sum(linear.rows), linear.columns) for linear in llama_8b.linears)
        for batch in (1, 8, 64, 65, 300):
            floor = linears / (1.001 * line.rates.read) * 1e6
            operations = 2 * batch * sum(linear.weights for linear in llama_8b.linears) / line.rates.matrix * 1e6 / 2
            assert line.products_us(form, batch) > max(floor, operations)
            assert line.step_us(form, batch, 2000) > line.step_us(form, batch, 1000)


def test_prefill_costs_at_most_unpacking_beside_dense(llama_8b: ModelShape) -> None:
    line = Roofline(llama_8b, rates(find_gpu("h100")), 1, efficiency())
    dense, sparse = (line.prefill_us(form, 8, 1024) for form in (DENSE, Format("sparse", 0.7)))
    assert dense < sparse < 1.1 * dense


def test_sharing_a_model_is_quicker_but_not_for_free(opt_66b: ModelShape) -> None:
    nvlink, pcie = (
        [Roofline(opt_66b, rates(find_gpu(gpu)), gpus, efficiency()).step_us(DENSE, 8, 500) for gpus in (1, 2, 8)]
        for gpu in ("a100-80gb", "a10")
    )
    for one, two, eight in (nvlink, pcie):
        assert one / 2 < two < one
        assert eight < two
    assert nvlink[2] < nvlink[0] / 4


def test_a_gpu_without_fp8_says_so(llama_8b: ModelShape) -> None:
    rows = {row.format: row for row in planned(llama_8b, "a100").rows}
    assert "8-bit" in rows["FP8"].why
    assert rows["FP8"].speeds == ()
    assert rows["sparse 60%"].speeds


def test_what_fits_nowhere_says_so(opt_66b: ModelShape) -> None:
    rows = planned(opt_66b, "a10", max_gpus=2).rows
    assert [row.gpus for row in rows] == [None, None, 2, None]
    assert rows[0].why == "it and one sequence don't fit on 2 of these GPUs"


# Measurements.


def test_the_page_holds_what_the_command_prints(check: ModuleType) -> None:
    page = (ROOT / "docs" / "hardware.md").read_text(encoding="utf-8")
    number = r"[-+]?\d[\d,]*\.?\d*"
    for table in check.tables().split("\n\n"):
        title = table.splitlines()[0]
        found = next(part for part in page.split("\n\n") if part.splitlines()[:1] == [title])
        assert re.sub(number, "#", found.strip()) == re.sub(number, "#", table.strip())
        ours, theirs = (
            [float(match.replace(",", "")) for match in re.findall(number, text)] for text in (table, found)
        )
        assert ours == pytest.approx(theirs, rel=1e-3, abs=0.11)


def test_predictions_are_near_what_was_measured(check: ModuleType) -> None:
    kernels, engine = check.read("kernels-h100.json"), check.read("vllm-dense-h100.json")
    on = rates(find_gpu(kernels["environment"]["gpu"]))
    line = Roofline(ModelShape("", 0, (), (0, 0), 0, (), 1, 0, None), on, 1, efficiency())
    for row in kernels["results"]:
        form = Format("sparse", row["sparsity"])
        assert line.matrix_us(form, row["rows"], row["columns"], row["n"]) == pytest.approx(row["us"], rel=0.12)
        assert packed_nbytes(row["rows"], row["columns"], row["sparsity"]) == pytest.approx(
            check.real_bytes(row), rel=0.02
        )
    shapes = check.models(engine)
    for row in engine["results"]:
        assert check.step_ms(row, shapes, on, efficiency()) == pytest.approx(row["decode_step_ms"], rel=0.05)
        model, form = shapes[row["model"]], fit.FORMS[row["precision"]]
        assert weights_bytes(model, form, row["gpus"]) / 2**30 == pytest.approx(row["weights_gib_a_gpu"], rel=0.02)


def test_efficiencies_are_what_the_measurements_say(check: ModuleType) -> None:
    """Whoever measures anew must fit anew: ``python examples/check_predictions.py --fit``."""
    fitted, known = check.fitted(), efficiency()
    assert fitted.basis == known.basis
    assert (fitted.read_share, fitted.matrix_share) == (known.read_share, known.matrix_share)
    assert fitted.sparse.n == known.sparse.n
    assert max(fitted.sparse.read, fitted.sparse_8_bit.read) <= 1, "no kernel reads faster than was measured"
    assert vars(fitted.dense) == pytest.approx(vars(known.dense), rel=0.01)
    assert vars(fitted.engine) == pytest.approx(vars(known.engine), rel=0.01)
    assert fitted.sparse.launch_us == pytest.approx(known.sparse.launch_us, rel=0.02)


def test_a_fit_finds_what_made_its_data(llama_8b: ModelShape) -> None:
    truth = efficiency()
    on = rates(find_gpu("h100"))
    line = Roofline(llama_8b, on, 1, truth)
    rows: list[dict[str, Any]] = []
    for side in (4096, 8192, 16384):
        for sparsity in (0.5, 0.7, 0.9):
            nbytes = packed_nbytes(side, side, sparsity)
            for n in truth.sparse.n:
                us = line.matrix_us(Format("sparse", sparsity), side, side, n)
                row = {"rows": side, "columns": side, "sparsity": sparsity, "n": n, "us": us}
                rows.append(
                    row | {"bytes_an_element": nbytes / side**2, "dense_us": line.matrix_us(DENSE, side, side, n)}
                )
    assert vars(fit.fit_dense(rows, on.read)) == pytest.approx(vars(truth.dense), rel=1e-3)
    refit = replace(truth, sparse=fit.fit_sparse(rows, on.read))
    for row in rows:
        again = Roofline(llama_8b, on, 1, refit).matrix_us(
            Format("sparse", row["sparsity"]), row["rows"], row["rows"], row["n"]
        )
        assert again == pytest.approx(row["us"], rel=0.01)


def test_a_measured_machine_replaces_what_is_published(llama_8b: ModelShape) -> None:
    gpu = find_gpu(MACHINE.gpu)
    assert gpu is GPUS["h100-sxm"]
    on = rates(gpu, MACHINE)
    assert (on.read, on.matrix, on.memory, on.measured) == (3.0e12, 6.0e14, 85e9, True)
    assert on.fp8 == pytest.approx(gpu.fp8_rate * 6.0e14 / gpu.matrix_rate)  # type: ignore[operator]
    slower = rates(gpu, replace(MACHINE, read_bandwidth=1.5e12))
    fast, slow = (Roofline(llama_8b, each, 1, efficiency()).products_us(DENSE, 8) for each in (on, slower))
    assert slow > 1.8 * fast
    unknown = replace(MACHINE, gpu="Some New GPU").published()
    assert (unknown.name, unknown.bandwidth, unknown.fp8_rate) == ("Some New GPU", 3.0e12, None)


# The command.


def test_every_gpu_has_a_source_and_plausible_figures() -> None:
    page = (ROOT / "docs" / "hardware.md").read_text(encoding="utf-8")
    for gpu in GPUS.values():
        assert f"| {gpu.name} |" in page
        assert f"({gpu.source})" in page
        assert gpu.source.startswith("https://")
        assert 20 < gpu.matrix_rate / gpu.bandwidth < 500
        assert all(find_gpu(f"NVIDIA {name}".replace("NVIDIA NVIDIA", "NVIDIA")) is gpu for name in gpu.torch_names)


def test_the_command_prints_tables(tmp_path: Path) -> None:
    result = run("plan", "opt-125m", "--gpu", "H100", "--sparsity", "0.5,0.7", "--plot", tmp_path / "plan.png")
    assert result.exit_code == 0, result.output
    for words in ("dense 16-bit", "FP8", "INT4, group 128", "sparse 50%", "sparse 70%", "largest batch", "assumed"):
        assert words in result.stdout
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_prints_json() -> None:
    result = run("plan", "opt-125m", "--gpu", "a100", "--batch", "1,4", "--json")
    plan = json.loads(result.stdout)
    assert [row["format"] for row in plan["rows"]][:3] == ["dense 16-bit", "FP8", "INT4, group 128"]
    dense = plan["rows"][0]
    assert [speed["batch"] for speed in dense["speeds"]] == [1, 4, dense["largest_batch"]]
    assert plan["basis"]["matrix_share"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["opt-125m"], "which GPU"),
        (["opt-125m", "--gpu", "h900"], "GPU 'h900' is not in the table: take one of a100-40gb"),
        (["gpt-9", "--gpu", "h100"], "model 'gpt-9' is neither a folder nor a known name"),
        (["opt-125m", "--gpu", "h100", "--sparsity", "1.0"], "up to, not including, 1"),
        (["opt-125m", "--gpu", "h100", "--sparsity", "60"], "up to, not including, 1"),
        (["opt-125m", "--gpu", "h100", "--batch", "0"], "of at least 1"),
        (["opt-125m", "--gpu", "h100", "--input-len", "0"], "input len 0: it must be at least 1"),
        (["opt-125m", "--gpu", "h100", "--input-len", "4000"], "takes 2048 at most"),
        (["opt-125m", "--gpu", "h100", "--gpus", "5"], "5 GPUs can't share"),
        (["opt-125m", "--gpu", "h100", "--memory-share", "2"], "above 0 and at most 1"),
        (["opt-125m", "--machine", "none.json"], "none.json"),
    ],
)
def test_bad_requests_are_refused(words: list[str], message: str) -> None:
    result = run("plan", *words)
    assert result.exit_code == 1
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_configs_that_cant_be_planned_are_refused(tmp_path: Path) -> None:
    def folder(name: str, config: str) -> Path:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config)
        return tmp_path / name

    whole = LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=48, num_attention_heads=4).to_dict()
    for field in ("hidden_size", "num_hidden_layers", "intermediate_size"):
        lacking = {key: value for key, value in whole.items() if key != field}
        with pytest.raises(CheckpointError, match=f"lacks {field}"):
            load_model(folder(field, json.dumps(lacking)))
    with pytest.raises(CheckpointError, match="is no JSON"):
        load_model(folder("broken", "{"))
    with pytest.raises(CheckpointError, match="no model that transformers"):
        load_model(folder("strange", '{"model_type": "strange"}'))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        load_model(tmp_path / "empty")
    with torch.device("meta"):
        experts = AutoModelForCausalLM.from_config(
            MixtralConfig(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=1)
        )
    with pytest.raises(CheckpointError, match="not mixtures of experts"):
        describe("experts", experts)


def test_damaged_machine_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    good = vars(MACHINE)
    for content, message in (
        ("{", "is no JSON"),
        ("[]", "lacks gpu"),
        (json.dumps(good | {"capability": "new"}), "compute capability"),
        (json.dumps(good | {"read_bandwidth": -1}), "read_bandwidth = -1"),
        (json.dumps(good | {"memory": "80 GB"}), "memory = '80 GB'"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            read_machine(path)
    path.write_text(json.dumps(good))
    assert read_machine(path) == MACHINE
    refused = run("plan", "opt-125m", "--gpu", "l40s", "--machine", path)
    assert "not l40s" in refused.stderr


def test_all_built_in_configs_name_their_sizes() -> None:
    for fields in BUILT_IN.values():
        assert fields["hidden_size"] % fields["num_attention_heads"] == 0 or "head_dim" in fields
