"""The runner, on a CPU with a meter that counts instead of measuring; and once on a GPU."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from flash_llm import ops
from flash_llm.bench import kernels, timing
from flash_llm.bench import report as reports
from flash_llm.bench.kernels import Settings, measure
from flash_llm.bench.shapes import N_SWEEP
from flash_llm.cli import app
from flash_llm.errors import KernelError
from flash_llm.kernels import choice

pytestmark = pytest.mark.filterwarnings("ignore::flash_llm.SlowPathWarning")

BANDWIDTH = 1e9


class CountingMeter:
    """Runs everything that is asked for once, and says that dense takes 30 us (linear) or 20 (mm), and sparse 10."""

    device = torch.device("cpu")

    def __init__(self, clocks: bool = False) -> None:
        self.launches: list[int] = []
        self.state: dict[str, float] = {}

    def read_bandwidth(self) -> float:
        return BANDWIDTH

    def graph(self, run: Callable[[int], object], launches: int) -> float:
        for i in range(launches):
            run(i)
        self.launches.append(launches)
        self.state = {"sm_mhz": 2000.0 - len(self.launches), "watts": 600.0}
        return (30.0, 20.0)[len(self.launches) - 1] if len(self.launches) <= 2 else 10.0

    def queued(self, run: Callable[[int], object], launches: int) -> float:
        run(0)
        return 40.0


@pytest.fixture(autouse=True)
def few_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "MAX_COPIES", 3)


def settings(shapes: str = "48x64", **changes: object) -> Settings:
    rows, columns = map(int, shapes.split("x"))
    return Settings([(rows, columns)], [0.5, 0.8], [4], **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("values", ["float8_e4m3", "int8"])
def test_8_bit_values_are_held_against_the_rounded_weight(values: str) -> None:
    row = measure(settings(values=values), CountingMeter())["results"][0]
    assert row["values"] == values
    assert row["relative_error"] < 2e-3  # of rounding to float16 alone
    assert row["bytes_an_element"] < 1
    with pytest.raises(ValueError, match="values='int3'"):
        settings(values="int3")


def test_a_row_holds_what_was_measured() -> None:
    report = measure(settings(), CountingMeter(), command="flash-llm bench kernels")
    row = report["results"][0]
    assert (row["rows"], row["columns"], row["sparsity"], row["n"], row["dtype"]) == (48, 64, 0.5, 4, "float16")
    assert (row["us"], row["dense_us"], row["dense_linear_us"], row["dense_mm_us"]) == (10.0, 20.0, 30.0, 20.0)
    assert row["speedup"] == 2.0
    assert (row["sm_mhz"], row["dense_sm_mhz"], row["watts"]) == (1997.0, 1998.0, 600.0), "while each was timed"
    packed_bytes = row["bytes_an_element"] * 48 * 64
    assert row["bytes_moved"] == pytest.approx(packed_bytes + 2 * 4 * (48 + 64))
    assert row["gigabytes_a_second"] == pytest.approx(row["bytes_moved"] / 10e-6 * 1e-9)
    assert row["bandwidth_share"] == pytest.approx(row["bytes_moved"] / 10e-6 / BANDWIDTH)
    assert row["rotated_bytes"] == pytest.approx(3 * packed_bytes)
    assert 0 < row["relative_error"] < 1e-3
    assert [mean["sparsity"] for mean in report["means"]] == [0.5, 0.8]
    assert report["environment"]["command"] == "flash-llm bench kernels"
    assert report["not_measured"] == []
    json.dumps(report, allow_nan=False)


def test_the_kernel_that_is_asked_for_is_in_use_while_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    used, right = set(), ops.linear
    monkeypatch.setattr(kernels.ops, "linear", lambda *given: used.add(choice.kernel()) or right(*given))
    report = measure(settings(kernel="portable"), CountingMeter())
    assert used == {"portable"}
    assert choice.kernel() == "auto"
    assert report["environment"]["kernel"] == "portable"
    assert report["results"][0]["kernel"] == "reference"  # on a CPU


def test_every_copy_has_its_turn() -> None:
    assert timing.copies(100_000_000) == 3  # as patched: 4 without
    assert timing.launches(3) == 32
    assert timing.launches(40) == 40
    meter = CountingMeter()
    measure(settings(), meter)
    assert set(meter.launches) == {32}


@pytest.mark.parametrize(
    ("launches", "seconds", "expected"),
    [
        (8, 0.008, (8, 15)),  # a millisecond a launch: all of them
        (1024, 0.003, (1024, 15)),
        (8, 0.040, (2, 15)),  # 5 ms each
        (8, 0.160, (1, 7)),  # 20 ms each
        (8, 8.0, (1, 3)),  # 1 s each: a median all the same
    ],
)
def test_long_launches_are_timed_less_often(launches: int, seconds: float, expected: tuple[int, int]) -> None:
    count, replays = timing.fitting(launches, seconds)
    assert (count, replays) == expected
    if seconds / launches < 0.03:
        assert count * (replays + 3) * seconds / launches <= timing.CASE_SECONDS * 1.01


def test_the_error_is_that_of_the_whole_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_CHECKED_ROWS", 4)
    x, weight = torch.randn(10, 8), torch.randn(6, 8)
    y = x @ weight.t()
    assert kernels.relative_error(y, x, weight) < 1e-6
    y[9] = 0  # a row of the last piece, which is shorter
    expected = float((x @ weight.t())[9].norm() / (x @ weight.t()).norm())
    assert kernels.relative_error(y, x, weight) == pytest.approx(expected, rel=1e-4)
    y[0, 0] = math.nan
    assert math.isnan(kernels.relative_error(y, x, weight))
    assert kernels.relative_error(torch.ones(4, 6), torch.zeros(4, 8), weight) == pytest.approx(24**0.5)


def test_a_sweep_measures_every_n(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "CudaMeter", CountingMeter)
    words = ["--n-sweep", "--shapes", "32x64", "--sparsity", "0.5", "--no-plot", "--out", str(tmp_path / "out")]
    assert CliRunner().invoke(app, ["bench", "kernels", *words]).exit_code == 0
    report = json.loads((tmp_path / "out" / "kernels.json").read_text())
    assert [row["n"] for row in report["results"]] == list(N_SWEEP)


def test_unchecked_results_say_so() -> None:
    assert measure(settings(check=False), CountingMeter())["results"][0]["relative_error"] is None


def test_a_wrong_kernel_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.linear
    monkeypatch.setattr(kernels.ops, "linear", lambda x, weight: right(x, weight) * math.nan)
    with pytest.raises(KernelError, match=r"48x64, n=4.* is wrong"):
        measure(settings(), CountingMeter())


def test_out_of_time_keeps_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([0.0, 1.0, 2.0, 11.0, 12.0])
    monkeypatch.setattr(kernels.time, "monotonic", lambda: next(seconds))
    report = measure(settings(time_limit=10), CountingMeter())
    assert [row["sparsity"] for row in report["results"]] == [0.5]
    assert report["not_measured"] == [{"rows": 48, "columns": 64, "sparsity": 0.8, "why": "the time limit of 10 s"}]


def test_every_weight_is_on_disk_as_soon_as_it_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is killed loses nothing but the weight that it was at, and its report says what is missing."""

    class Killed(BaseException):
        pass

    class MeterUntilKilled(CountingMeter):
        def graph(self, run: Callable[[int], object], launches: int) -> float:
            if len(self.launches) == 4:  # dense twice, and two weights
                raise Killed
            return super().graph(run, launches)

    monkeypatch.setattr(timing, "CudaMeter", MeterUntilKilled)
    words = ["--shapes", "48x64", "--sparsity", "0.5,0.7,0.9", "--n", "4", "--no-plot", "--out", str(tmp_path / "out")]
    with pytest.raises(Killed):
        CliRunner().invoke(app, ["bench", "kernels", *words])
    report = reports.read(tmp_path / "out" / "kernels.json")
    assert [row["sparsity"] for row in report["results"]] == [0.5, 0.7]
    assert [mean["sparsity"] for mean in report["means"]] == [0.5, 0.7]
    assert reports.remarks(report)[-1] == "Not measured: 48x64 at 90%, the run ended before."
    assert len((tmp_path / "out" / "kernels.csv").read_text().splitlines()) == 3


def test_out_of_memory_goes_on_with_the_next_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    real = kernels._dense

    def scarce(run: object, shape: tuple[int, int], *rest: object) -> object:
        if shape == (48, 64):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(run, shape, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(kernels, "_dense", scarce)
    report = measure(Settings([(48, 64), (64, 32)], [0.5], [1]), CountingMeter())
    assert [(row["rows"], row["columns"]) for row in report["results"]] == [(64, 32)]
    assert [case["why"] for case in report["not_measured"]] == ["out of GPU memory"]


def test_a_peer_that_refuses_is_noted_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fine:
        nbytes = 10**9

        def __init__(self, weight: torch.Tensor) -> None:
            self.weight = weight

        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(x, self.weight)

    def refuse(weight: torch.Tensor) -> Fine:
        raise RuntimeError("no such\nlayout")

    monkeypatch.setattr(kernels, "PEERS", {"fine": Fine, "none": refuse})
    report = measure(settings(peers=True), CountingMeter())
    assert len(report["results"]) == 2
    fine, refused = (report["results"][0]["peers"][name] for name in ("fine", "none"))
    assert (fine["us"], fine["speedup"]) == (40.0, 0.5)
    assert fine["relative_error"] < 1e-3
    assert refused == {"refused": "RuntimeError: no such layout"}
    assert report["means"][0]["peers"] == {"fine": {"shapes": 1, "speedup": pytest.approx(0.5)}}


def test_the_command_prints_and_writes_what_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "CudaMeter", CountingMeter)
    words = ["--shapes", "32x64,48x64", "--sparsity", "0.5,0.75", "--n", "1,4", "--peers", "--no-plot"]
    result = CliRunner().invoke(app, ["bench", "kernels", *words, "--out", str(tmp_path / "new" / "out")])
    assert result.exit_code == 0, result.output
    assert "48x64, 4" in result.stdout
    assert "2:4 and CSR refused 8 of 8" in result.stdout  # there is none on a CPU
    report = json.loads((tmp_path / "new" / "out" / "kernels.json").read_text())
    assert len(report["results"]) == 8
    assert sorted(path.name for path in (tmp_path / "new" / "out").iterdir()) == ["kernels.csv", "kernels.json"]


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"float32.*float16 or torch.bfloat16"):
        settings(dtype=torch.float32)
    for limit in (0, -1, math.nan):
        with pytest.raises(ValueError, match="more than 0"):
            settings(time_limit=limit)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "kernel"), [("float16", "auto"), ("bfloat16", "portable")])
def test_the_command_on_a_gpu(tmp_path: Path, dtype: str, kernel: str) -> None:
    words = ["bench", "kernels", "--shapes", "1024x2048", "--sparsity", "0.6", "--n", "1,16", "--peers"]
    options = ["--dtype", dtype, "--kernel", kernel, "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*words, *options])
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out" / "kernels.json").read_text())
    assert [row["n"] for row in report["results"]] == [1, 16]
    assert all(row["us"] > 0 and row["dense_us"] > 0 and set(row["peers"]) for row in report["results"])
    assert report["environment"]["gpu"] == torch.cuda.get_device_name()
    measured = {row["kernel"] for row in report["results"]}
    assert len(measured) == 1
    assert kernel == "auto" or measured == {"spmm_sm80.cu"}


@pytest.mark.gpu
def test_long_launches_on_a_gpu_are_few() -> None:
    """512 products of 140 billion operations, replayed 18 times, would take seconds."""
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.float16)
    calls: list[int] = []
    us = timing.CudaMeter().graph(lambda i: (calls.append(i), torch.mm(a, a)), 512)
    few = len(calls) - 1 - 512
    assert 0 < few < 512, "one ahead, all of them once, and then as few as fit"
    assert few * us * 1e-6 * (timing.REPLAYS + 3) < 1.5 * timing.CASE_SECONDS
