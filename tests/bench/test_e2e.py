"""The runner of whole models: its settings, configs, arithmetic and files. vLLM is in tests/serving."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from flash_llm.bench import e2e, e2e_inside, e2e_report, e2e_worker
from flash_llm.bench.e2e import Settings, engine_options, measure, model_config
from flash_llm.cli import app


def settings(**changes: Any) -> Settings:
    given: dict[str, Any] = {
        "model": "opt-30b",
        "weights": ["dense", "int4", "0.8"],
        "batches": ["8", "max"],
        "input_lens": [64],
        "output_len": 512,
    }
    return Settings(**given | changes)


def row(weights: str, batch: int, **changes: Any) -> dict[str, Any]:
    made = {"weights": weights, "sparsity": e2e.sparsity(weights), "gpus": 1, "batch": batch, "input_len": 64}
    made |= {"output_len": 512, "tokens_per_second": 300.0, "tokens_per_gpu_second": 300.0, "largest_batch": 20}
    made |= {"time_to_first_token_ms": 40.0, "time_per_output_token_ms": 25.0, "weight_bytes": 1 << 30}
    return made | {"kv_cache_tokens": 13504, "start_s": 50.0} | changes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "opt-31b"}, "opt-31b.*none of opt-125m"),
        ({"weights": ["1.0"]}, "share of zeros such as 0.8"),
        ({"batches": ["0"]}, "at least 1, or 'max'"),
        ({"output_len": 1}, "output length 1: it takes at least 2"),
        ({"input_lens": [64, 0]}, "input length 0"),
        ({"memory_share": 1.0}, "memory share 1.0"),
        ({"time_limit": 0}, "time limit 0"),
        ({"engine": {"dtype": "float32"}}, "'dtype' is what the benchmark sets itself"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        settings(**changes)


def test_a_config_says_what_the_weights_are() -> None:
    dense, int4, sparse = (model_config(settings(), kind) for kind in ("dense", "int4", "0.8"))
    assert (dense["hidden_size"], dense["architectures"]) == (7168, ["OPTForCausalLM"])
    assert "quantization_config" not in dense
    assert int4["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] == 4
    assert sparse["quantization_config"] == {"quant_method": "flash_llm", "dummy_sparsity": 0.8}
    of_8_bits = model_config(settings(), "0.5+fp8")["quantization_config"]
    assert of_8_bits == {"quant_method": "flash_llm", "dummy_sparsity": 0.5, "dummy_values": "float8_e4m3"}
    assert (e2e.sparsity("0.5+int8"), e2e.sparsity("fp8"), e2e.sparsity("0.5+int4")) == (0.5, None, None)


def test_the_engine_is_the_same_for_all_weights_but_for_the_weights() -> None:
    dense, fp8 = (engine_options(settings(), kind, "/folder") for kind in ("dense", "fp8"))
    assert fp8 == dense | {"quantization": "fp8"}
    assert (dense["max_model_len"], dense["max_num_seqs"], dense["load_format"]) == (592, 256, "dummy")
    assert engine_options(settings(batches=["8", "16"]), "dense", "/folder")["max_num_seqs"] == 16
    more = settings(engine={"kv_cache_dtype": "fp8"})
    assert engine_options(more, "dense", "/folder") == dense | {"kv_cache_dtype": "fp8"}


@pytest.mark.parametrize(("text", "words"), [("{", "are no JSON"), ("[1]", "it takes a JSON object")])
def test_engine_options_that_are_no_json_object(text: str, words: str) -> None:
    result = CliRunner().invoke(app, ["bench", "e2e", "--model", "opt-30b", "--engine", text])
    assert result.exit_code == 1
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_figures_of_a_row() -> None:
    """A prompt takes 0.1 s and each further step 0.02 s."""
    figures = e2e_worker.timed(lambda batch, i, o: 0.1 + 0.02 * (o - 1), batch=8, input_len=64, output_len=101, gpus=2)
    assert figures["tokens_per_second"] == pytest.approx(8 * 101 / 2.1)
    assert figures["tokens_per_gpu_second"] == pytest.approx(4 * 101 / 2.1)
    assert figures["time_to_first_token_ms"] == pytest.approx(100)
    assert figures["time_per_output_token_ms"] == pytest.approx(20)


def test_how_long_loading_took_is_taken_from_the_log(tmp_path: Path) -> None:
    """Of two kinds of lines the later one, which is of all of it; of several processes the slowest."""
    log, folder = tmp_path / "log", tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(bytes(3_000_000))
    log.write_text("starting\n")
    assert e2e.loading(log, folder) == {"load_s": None, "load_gigabytes_a_second": None}
    log.write_text(
        "(Worker 0) INFO Loading weights took 9.50 seconds\n"
        "(Worker 0) INFO Model loading took 1.25 GiB memory and 1.500000 seconds\n"
        "(Worker 1) INFO Model loading took 1.25 GiB memory and 1.400000 seconds\n"
    )
    assert e2e.loading(log, folder) == {"load_s": 1.5, "load_gigabytes_a_second": pytest.approx(0.002)}
    assert e2e.loading(log, None) == {"load_s": 1.5, "load_gigabytes_a_second": None}


def test_max_is_the_largest_batch_that_fits() -> None:
    assert e2e_worker.sizes(["64", "8", "max"], 23) == [8, 23, 64]
    assert e2e_worker.sizes(["8", "max"], 0) == [8]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("spmm", "linear"),
        ("nvjet_hsh_64x8_64x16_4x1_v_bz_TNT", "linear"),
        ("void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwdSm90>>", "attention"),
        ("vllm::reshape_and_cache_flash_kernel", "attention"),
        ("ncclDevKernel_AllReduce_Sum_f16_RING_LL", "communication"),
        ("void vllm::cross_device_reduce_1stage<half, 2>", "communication"),
        ("triton_red_fused_add_native_layer_norm_0", "other"),
    ],
)
def test_kernels_are_told_apart_by_their_names(name: str, kind: str) -> None:
    assert e2e_inside.kernel_kind(name) == kind


def fake_run(lines: dict[str, list[dict[str, Any]]], why: dict[str, str]) -> Callable[..., str | None]:
    def run(settings: Settings, kind: str, scratch: Path, logs: Any, seconds: float, take: Any) -> str | None:
        for line in lines.get(kind, []):
            take(dict(line))
        return why.get(kind)

    return run


def measured(**changes: Any) -> dict[str, Any]:
    lines = {
        "dense": [{"kind": "environment", "gpu": "H100"}, {"kind": "results", **row("dense", 8)}],
        "0.8": [{"kind": "results", **row("0.8", 8, breakdown_us={"linear": 9000.0, "other": 1000.0})}],
    }
    return measure(settings(**changes), command="flash-llm bench e2e", run=fake_run(lines, {"int4": "out of memory"}))


def test_what_fails_is_noted_and_the_rest_goes_on(tmp_path: Path) -> None:
    report = measured()
    assert [r["weights"] for r in report["results"]] == ["dense", "0.8"]
    assert report["not_measured"] == [{"weights": "int4", "why": "out of memory"}]
    assert report["environment"] == {"command": "flash-llm bench e2e", "gpu": "H100"}
    assert "Not measured: int4: out of memory." in e2e_report.markdown(report)
    assert "| 80% zeros | 1 | 8 | 64 | 512 | 300 | 300 | 40 | 25.00 | 1.0 | 13,504 | 20 |" in e2e_report.markdown(
        report
    )
    e2e_report.write(report, tmp_path)
    assert json.loads((tmp_path / "e2e.json").read_text()) == report
    rows = list(csv.DictReader((tmp_path / "e2e.csv").read_text().splitlines()))
    assert [(r["weights"], r["linear_us"]) for r in rows] == [("dense", ""), ("0.8", "9000.0")]


def test_no_further_weights_are_begun_when_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([0.0, 1.0, 590.0, 599.0])
    monkeypatch.setattr(e2e.time, "monotonic", lambda: next(seconds))
    report = measured(time_limit=600)
    assert [r["weights"] for r in report["results"]] == ["dense"]
    assert report["not_measured"] == [{"weights": k, "why": "the time limit of 600 s"} for k in ("int4", "0.8")]


def test_a_process_is_ended_at_the_time_limit_and_keeps_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = (
        "import json, sys, time; task = json.load(open(sys.argv[-1])); "
        "open(task['lines'], 'a').write(json.dumps({'kind': 'results', 'batch': 8}) + chr(10)); time.sleep(60)"
    )
    real = e2e.subprocess.Popen
    monkeypatch.setattr(
        e2e.subprocess, "Popen", lambda command, **o: real([command[0], "-c", script, command[-1]], **o)
    )
    taken: list[dict[str, Any]] = []
    why = e2e.run_worker(settings(time_limit=3), "dense", tmp_path, None, 3, taken.append)
    assert why == "the time limit of 3 s"
    assert taken == [{"kind": "results", "batch": 8, "load_s": None, "load_gigabytes_a_second": None}]


_NO_MEMORY = "ValueError: no memory for the KV cache"


@pytest.mark.parametrize(
    ("why", "script"),
    [
        (_NO_MEMORY, "print('loading'); raise ValueError('no memory for the KV cache')"),
        (
            _NO_MEMORY,
            """print('loading')
print('(EngineCore pid=7) ERROR 11-26 22:50:29 [core.py:1510] ValueError: no memory for the KV cache')
raise RuntimeError('Engine core initialization failed. See root cause above.')""",
        ),
        (
            "Fatal Python error: Segmentation fault",
            """print('loading')
print('(EngineCore pid=7) WARNING 11-26 22:50:29 [import_utils.py:408] ImportError: cannot import name _C')
print('(EngineCore pid=7) Capturing: 2%| | 1/51 [00:00<00:06, 8.13it/s]', end=chr(13))
print('Capturing: 69%|###### | 35/51 [00:03<00:01, 11.24it/s]Fatal Python error: Segmentation fault')
print('    raise RuntimeError(')
print('RuntimeError: Engine core initialization failed. See root cause above.')
raise SystemExit(1)""",
        ),
    ],
    ids=["of its own", "of another process", "of another process that crashed"],
)
def test_a_process_that_fails_gives_its_last_error(
    why: str, script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = e2e.subprocess.Popen
    monkeypatch.setattr(e2e.subprocess, "Popen", lambda command, **o: real([command[0], "-c", script], **o))
    assert e2e.run_worker(settings(), "0.8", tmp_path, tmp_path, math.inf, lambda line: None) == why
    assert "loading" in (tmp_path / "e2e-0.8.log").read_text()


def bench_report(*words: object) -> Any:
    return CliRunner().invoke(app, ["bench", "report", *map(str, words)])


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """Reports of the same model on the same GPU."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        e2e_report.write(measured(), tmp_path / name)
    return tmp_path / "one" / "e2e.json", tmp_path / "two" / "e2e.json"


def test_reports_of_one_model_are_shown_together(files: tuple[Path, Path], tmp_path: Path) -> None:
    one, both = (bench_report(*some, "--markdown").stdout for some in (files[:1], files))
    rows = [line for line in one.splitlines() if line.startswith(("| dense |", "| 80% zeros |"))]
    assert [line for line in both.splitlines() if line in rows] == rows + rows
    assert both.count("Not measured: int4: out of memory.") == 2
    assert bench_report(*files, "--csv", tmp_path / "both.csv").exit_code == 0
    assert len((tmp_path / "both.csv").read_text().splitlines()) == 1 + 2 * len(rows)


@pytest.mark.parametrize(
    ("noted", "asked", "rows", "left"),
    [
        ({"batch": 16, "input_len": 64}, ["8", "16"], [row("int4", 16)], 0),
        ({"batch": 16, "input_len": 64}, ["8", "16"], [row("int4", 8), row("dense", 16), row("int4", 16, gpus=2)], 1),
        ({}, ["8", "max"], [row("int4", 8), row("int4", 20)], 0),
        ({}, ["8", "max"], [row("int4", 8), row("int4", 16)], 1),
    ],
)
def test_what_another_report_measured_is_not_said_to_be_missing(
    noted: dict[str, Any], asked: list[str], rows: list[dict[str, Any]], left: int, files: tuple[Path, Path]
) -> None:
    one, two = (json.loads(file.read_text()) for file in files)
    one["not_measured"] = [{"weights": "int4", "why": "time ran out"} | noted]
    one["settings"]["batches"] = asked
    two |= {"not_measured": [], "results": rows}
    for file, report in zip(files, (one, two), strict=True):
        file.write_text(json.dumps(report))
    assert bench_report(*files, "--markdown").stdout.count("Not measured: int4") == left


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        ("environment", {"gpu": "H200"}, "has gpu 'H200', and .*'H100': show them one by one"),
        ("settings", {"model": "opt-66b"}, "has model 'opt-66b'"),
        ("settings", {"model": None}, "has model None"),
    ],
)
def test_reports_that_do_not_belong_together_are_refused(
    part: str, change: dict[str, Any], words: str, files: tuple[Path, Path]
) -> None:
    report = json.loads(files[1].read_text())
    report[part] |= change
    files[1].write_text(json.dumps(report))
    refused = bench_report(*files)
    assert refused.exit_code == 1
    assert re.search(words, refused.stderr)


def test_a_report_of_another_kind_is_refused_beside_them(files: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "kernels.json").write_text("{}")
    assert "kernels.json is no e2e.json" in bench_report(files[0], tmp_path / "kernels.json").stderr
    assert "give one" in bench_report(tmp_path / "kernels.json", files[0]).stderr
    assert "--plot-n is for kernels.json" in bench_report(files[0], "--plot-n", tmp_path / "n.png").stderr


def test_the_breakdown_is_of_the_middle_of_the_output() -> None:
    """Kernel time of 16 steps: a run of 17 tokens less one of one, after the prompt and half of the output."""
    asked: list[tuple[int, int, int]] = []

    class Profiled:
        def collective_rpc(self, function: Callable[..., Any]) -> list[dict[str, float]]:
            tokens = asked[-1][2] if asked else 0
            return [{"linear": 100.0 * tokens, "other": 5.0}]

    def seconds(*what: int) -> float:
        asked.append(what)  # type: ignore[arg-type]
        return 1.0

    found = e2e_worker._breakdown(Profiled(), seconds, 8, 64 + 256)
    assert asked == [(8, 320, 17), (8, 320, 1)]
    assert found == {"linear": 100.0, "other": 0.0}


def test_the_plot_is_a_picture() -> None:
    pytest.importorskip("matplotlib")
    assert e2e_report.plot(measured()).startswith(b"\x89PNG")
