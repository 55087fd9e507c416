"""Tables, CSV and plots from a run's JSON alone, and how the verbs fail."""

from __future__ import annotations

import csv
import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from flash_llm import plotting
from flash_llm.bench import plots
from flash_llm.bench import report as reports
from flash_llm.bench.shapes import N_SWEEP
from flash_llm.cli import app

PUBLISHED = Path(__file__).resolve().parents[2] / "docs" / "results"
SPEEDUPS = {(0.5, 1): (1.0, 4.0), (0.5, 8): (2.0, 2.0), (0.9, 1): (3.0, 3.0)}  # (sparsity, n): of each shape
SHAPES = ((256, 128), (64, 32))


def run(*words: object) -> Any:
    return CliRunner().invoke(app, ["bench", *map(str, words)])


def row(shape: tuple[int, int], sparsity: float, n: int, speedup: float) -> dict[str, Any]:
    figures = {"us": 10.0, "dense_us": 10 * speedup, "speedup": speedup, "bandwidth_share": 0.25}
    return {"rows": shape[0], "columns": shape[1], "sparsity": sparsity, "n": n, **figures, "relative_error": 2e-4}


@pytest.fixture
def report() -> dict[str, Any]:
    results = [row(SHAPES[i], *case, speedups[i]) for case, speedups in SPEEDUPS.items() for i in range(2)]
    results[0]["peers"] = {"csr": {"us": 40.0, "speedup": 0.25}, "two_of_four_csr": {"refused": "TypeError: no"}}
    return {
        "environment": {"gpu": "A GPU", "torch": "2.11"},
        "read_bandwidth": 3e12,
        "not_measured": [{"rows": 8, "columns": 8, "sparsity": 0.5, "why": "out of GPU memory"}],
        "means": reports.means(results),
        "results": results,
    }


def test_means_are_geometric(report: dict[str, Any]) -> None:
    means = {(mean["sparsity"], mean["n"]): mean for mean in report["means"]}
    assert set(means) == set(SPEEDUPS)
    assert means[0.5, 1]["speedup"] == pytest.approx(2.0)
    assert (means[0.5, 1]["shapes"], means[0.5, 1]["bandwidth_share"]) == (2, pytest.approx(0.25))
    assert means[0.5, 1]["peers"] == {"csr": {"shapes": 1, "speedup": pytest.approx(0.25)}}
    assert "peers" not in means[0.5, 8]


def test_the_table_says_which_kernel_was_measured(report: dict[str, Any]) -> None:
    assert "| geometric mean | 50% |" in reports.markdown(report)
    report["environment"]["kernel"] = "portable"
    for measured in report["results"]:
        measured["kernel"] = "spmm_sm80.cu"
    assert "| geometric mean, portable kernel | 50% |" in reports.markdown(report)
    assert reports.summary(report).endswith("portable kernel (spmm_sm80.cu)")
    report["environment"]["tuned_plans"] = 3
    assert reports.summary(report).endswith("portable kernel (spmm_sm80.cu), 3 tuned plans")


def test_markdown(report: dict[str, Any]) -> None:
    assert (
        reports.markdown(report)
        == """\
| geometric mean | 50% | 90% |
|---|---|---|
| N = 1 | 2.00 (25%) | 3.00 (25%) |
| N = 8 | 2.00 (25%) | - |

| CSR (cuSPARSE), geometric mean | 50% | 90% |
|---|---|---|
| N = 1 | 0.25 | - |
| N = 8 | - | - |

| rows x columns, N | 50% | 90% |
|---|---|---|
| 64x32, 1 | 4.00 (25%) | 3.00 (25%) |
| 64x32, 8 | 2.00 (25%) | - |
| 256x128, 1 | 1.00 (25%) | 3.00 (25%) |
| 256x128, 8 | 2.00 (25%) | - |

Measured on A GPU, torch 2.11, reads 3.00 TB/s.

Relative error against float32: 2.0e-04 at most.

2:4 and CSR refused 1 of 6: TypeError: no

Not measured: 8x8 at 50%, out of GPU memory.
"""
    )


def test_files_hold_the_whole_report(report: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    paths = reports.write(report, tmp_path, with_plots=True)
    assert [path.name for path in paths] == ["kernels.json", "kernels.csv", "kernels.png"]
    assert sorted(tmp_path.iterdir()) == sorted(paths)
    assert reports.read(paths[0]) == report
    lines = list(csv.DictReader(io.StringIO(paths[1].read_text())))
    assert len(lines) == len(report["results"])
    assert (lines[0]["csr_us"], lines[0]["two_of_four_csr_refused"], lines[1]["csr_us"]) == (
        "40.0",
        "TypeError: no",
        "",
    )
    assert paths[2].read_bytes().startswith(b"\x89PNG")


def test_many_ns_make_lines_and_few_make_bars(report: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report["results"] = [row(shape, 0.5, n, 3 / n) for shape in SHAPES for n in N_SWEEP]
    assert [path.name for path in reports.write(report, tmp_path, with_plots=True)][2:] == ["kernels-n.png"]
    report["results"] = [measured for measured in report["results"] if measured["n"] <= 4]
    assert [path.name for path in reports.write(report, tmp_path, with_plots=True)][2:] == [
        "kernels.png",
        "kernels-n.png",
    ]


def test_lines_over_n_are_what_was_measured(report: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """One line for dense and one a sparsity, above in microseconds and below as ratio to dense, in the order of n."""
    pytest.importorskip("matplotlib")
    drawn: list[Any] = []
    monkeypatch.setattr(plots, "png", lambda figure: drawn.append(figure) or b"")
    report["results"] = [row(shape, s, n, s * n) for shape in SHAPES for s in (0.5, 0.9) for n in (64, 1, 8)]
    plots.over_n(report)
    panels = drawn[0].axes
    assert len(panels) == 4
    assert [panels[0].get_xscale(), panels[0].get_yscale(), panels[2].get_xscale()] == ["log"] * 3
    lines = {line.get_label(): line for line in panels[0].lines}
    assert list(lines) == ["dense", "50% zeros", "90% zeros"]
    assert list(lines["90% zeros"].get_xdata()) == [1, 8, 64]
    assert list(lines["90% zeros"].get_ydata()) == [10.0] * 3
    ratios = {line.get_label(): list(line.get_ydata()) for line in panels[2].lines}
    assert ratios["50% zeros"] == pytest.approx([0.5, 4.0, 32.0])


def test_a_figure_that_is_no_number_is_never_written(report: dict[str, Any], tmp_path: Path) -> None:
    report["results"][0]["us"] = math.nan
    with pytest.raises(ValueError, match="JSON compliant"):
        reports.write(report, tmp_path, with_plots=False)
    assert not list(tmp_path.iterdir())


def test_nothing_measured_is_a_report_too(report: dict[str, Any], tmp_path: Path) -> None:
    report |= {"results": [], "means": []}
    assert "Not measured: 8x8" in reports.markdown(report)
    assert reports.csv_text(report) == "\n"
    assert len(reports.write(report, tmp_path, with_plots=True)) == 2
    if plotting.can_plot():
        with pytest.raises(ValueError, match="no results"):
            plots.speedups(report)


@pytest.mark.parametrize("path", sorted(PUBLISHED.glob("kernels-*.json")), ids=lambda path: path.name)
def test_published_means_follow_from_their_results(path: Path) -> None:
    published = reports.read(path)
    for mean, again in zip(published["means"], reports.means(published["results"]), strict=True):
        peers, again_peers = mean.pop("peers", {}), again.pop("peers", {})
        assert again == pytest.approx(mean)
        assert peers.keys() == again_peers.keys()
        assert all(again_peers[name] == pytest.approx(peers[name]) for name in peers)


@pytest.mark.parametrize(
    "names",
    [
        ("kernels-h100",),
        ("e2e-opt-30b-80-h100", "e2e-opt-30b-best-h100"),
        ("e2e-opt-30b-8-bit-h100",),
        ("e2e-opt-30b-h100", "e2e-opt-30b-second-h100", "e2e-opt-30b-50-h100", "e2e-opt-30b-before-h100"),
        ("e2e-opt-66b-dense-h100", "e2e-opt-66b-one-h100"),
        ("e2e-opt-66b-h100",),
        ("e2e-llama-3-8b-h100", "e2e-llama-3-8b-int4-h100", "e2e-llama-3-8b-int4-32-h100"),
        ("e2e-llama-3-8b-1024-h100",),
        ("e2e-llama-3-8b-files-h100",),
        (
            "e2e-llama-3-70b-h100",
            "e2e-llama-3-70b-int4-h100",
            "e2e-llama-3-70b-fp8-h100",
            "e2e-llama-3-70b-dense-h100",
            "e2e-llama-3-70b-dense-32-h100",
        ),
        ("e2e-opt-175b-h200",),
    ],
    ids=lambda names: names[0],
)
def test_published_tables_are_printed_and_not_typed(names: tuple[str, ...]) -> None:
    """docs/benchmarks.md holds what `flash-llm bench report docs/results/FILE --markdown` prints."""
    page = (PUBLISHED.parent / "benchmarks.md").read_text(encoding="utf-8")
    printed = run("report", *(PUBLISHED / f"{name}.json" for name in names), "--markdown").stdout
    assert printed.startswith(("| geometric mean |", "| weights |"))
    missing = [block for block in printed.strip().split("\n\n") if f"\n\n{block}\n\n" not in page]
    assert not missing, "docs/benchmarks.md lacks:\n\n" + "\n\n".join(missing)


def test_report_verb_prints_and_writes(report: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "kernels.json"
    file.write_text(json.dumps(report))
    assert run("report", file, "--markdown").stdout == reports.markdown(report)
    if plotting.can_plot():
        assert run("report", file, "--plot-n", tmp_path / "n.png").exit_code == 0
        assert (tmp_path / "n.png").read_bytes().startswith(b"\x89PNG")
    shown = run("report", file, "--csv", tmp_path / "again.csv").stdout
    assert "A GPU, torch 2.11, reads 3.00 TB/s" in shown
    assert "2.00 (25%)" in shown
    assert (tmp_path / "again.csv").read_text() == reports.csv_text(report)


@pytest.mark.parametrize(
    ("content", "words"),
    [("{", "is no JSON"), ("[]", "lacks environment"), ('{"environment": {}, "means": [], "results": [{}]}', "lacks")],
)
def test_report_of_something_else(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "file.json").write_text(content)
    result = run("report", tmp_path / "file.json")
    assert result.exit_code == 1
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_report_of_a_missing_file(tmp_path: Path) -> None:
    result = run("report", tmp_path / "none.json")
    assert (result.exit_code, result.stderr) == (1, f"error: No such file or directory: {tmp_path / 'none.json'}\n")


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--shapes", "opt-30b", "shape 'opt-30b'"),
        ("--sparsity", "1.5", "sparsity '1.5'"),
        ("--n", "0", "n '0'"),
        ("--time-limit", "0", "time limit 0"),
        ("--kernel", "fast", "kernel 'fast'"),
    ],
)
def test_bad_options_are_one_line(option: str, value: str, words: str) -> None:
    result = run("kernels", option, value)
    assert result.exit_code == 1
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_sweep_takes_no_other_ns() -> None:
    result = run("kernels", "--n-sweep", "--n", "8")
    assert (result.exit_code, result.stderr) == (1, "error: --n 8 and --n-sweep: give one of them\n")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_one_line_and_leaves_no_folder(tmp_path: Path) -> None:
    result = run("kernels", "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: kernels are measured on a CUDA GPU")
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_plot_needs_a_folder_and_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, report: dict[str, Any]
) -> None:
    assert "add --out DIR" in run("kernels", "--plot").stderr
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(plotting.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'flash-llm[bench]'" in run("kernels", "--plot", "--out", tmp_path / "out").stderr
    (tmp_path / "kernels.json").write_text(json.dumps(report))
    result = run("report", tmp_path / "kernels.json", "--plot", tmp_path / "plot.png")
    assert result.exit_code == 1
    assert "pip install 'flash-llm[bench]'" in result.stderr


def test_an_earlier_run_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flash_llm.bench import timing

    monkeypatch.setattr(timing, "CudaMeter", lambda clocks: object())
    (tmp_path / "kernels.json").write_text("{}")
    result = run("kernels", "--out", tmp_path)
    assert result.exit_code == 1
    assert "already holds kernels.json" in result.stderr
