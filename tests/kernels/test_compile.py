"""Every kernel compiles for every architecture, and no thread's registers overflow to memory. No GPU is needed."""

from __future__ import annotations

import ctypes
import functools
import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import pytest
import waits

import devices
from flash_llm.kernels import build, cuda, plan
from flash_llm.tensor.layout import LANE_CAPACITY, LANES, TILE_WORDS, WORD_BITS, ValueKind

pytest.importorskip("cuda.core", reason="cuda-core isn't installed: pip install 'flash-llm[cuda]'")
pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings isn't installed: pip install 'flash-llm[cuda]'")

Configuration = tuple[str, tuple[tuple[str, int], ...], str]

NAMES = {"sm_80": "A100", "sm_86": "A10", "sm_89": "L40S", "sm_90a": "H100", "sm_100a": "B200", "sm_120a": "RTX 5090"}
DEVICES = {arch: devices.DEVICES[name] for arch, name in NAMES.items()}
LARGE, SMALL = 14336, 4096
ROWS_OF_X = (8, 16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256)
KINDS = [*product((False, True), (ValueKind.E4M3, ValueKind.INT8))]  # bf16 or not, and how values of 8 bits are stored


def unpack(
    arch: str,
    tile_words: int,
    bf16: bool = False,
    values: ValueKind = ValueKind.BITS16,
    columns: int = LARGE,
) -> Configuration:
    most = LANE_CAPACITY // values.packet_values
    chosen = plan.unpack_plan(DEVICES[arch], LARGE, columns, most, tile_words, bf16, values)
    return "unpack.cu", chosen.defines, arch


def spmm(
    arch: str,
    tile_words: int,
    n: int,
    bf16: bool = False,
    rows: int = LARGE,
    columns: int = LARGE,
    values: ValueKind = ValueKind.BITS16,
) -> Configuration:
    """As it is planned for the sparsity at which that tile size is chosen: with full tiles of fullest lanes."""
    words, strips = -(-columns // 64), -(-rows // 16)
    nonzeros = min(WORD_BITS * tile_words, LANE_CAPACITY - 20)  # a lane's mean; the fullest lanes have some 20 more
    per_packet = values.packet_values
    most = min(-(-(nonzeros + 20) // per_packet), LANE_CAPACITY // per_packet, WORD_BITS * tile_words // per_packet)
    packets = int(strips * -(-words // tile_words) * LANES * (nonzeros / per_packet + 0.5))
    chosen = plan.spmm_plan(DEVICES[arch], rows, columns, packets, most, tile_words, n, bf16, values=values)
    return chosen.source, chosen.defines, arch


def random_zeros(
    size: tuple[int, int], sparsity: float, tile_words: int, n: int, values: ValueKind = ValueKind.BITS16
) -> Configuration:
    """As it is planned for zeros at random, which a lane's packets follow from."""
    chosen = waits.chosen(size, sparsity, tile_words, n, values)
    return chosen.source, chosen.defines, "sm_90a"


def split_x(tile_words: int, bf16: bool, values: ValueKind) -> Configuration:
    return "split_x.cu", plan.split_plan(16, 100, tile_words, bf16, values).defines, "sm_90a"


QUICK = [
    *(spmm("sm_90a", tile_words, n) for tile_words, n in product((1, 3, 5, 7, 10, 12, 16), (8, 64, 96, 128, 256))),
    *(spmm("sm_90a", tile_words, n) for tile_words, n in product((4, 7, 12), (48, 80, 112, 160, 224))),
    *(spmm("sm_90a", tile_words, n, bf16=True) for tile_words, n in ((6, 16), (8, 32))),
    *(spmm("sm_90a", *rest, rows=SMALL, columns=SMALL) for rest in product((2, 6, 12), (8, 16, 32))),
    *(spmm("sm_80", tile_words, n) for tile_words, n in product((1, 5, 16), (8, 64))),
    spmm("sm_80", 7, 32, bf16=True),
    *(spmm(arch, 5, 16, columns=14400) for arch in DEVICES if arch != "sm_80"),  # 225 words: whole tiles of 5
    *(unpack(arch, 5) for arch in DEVICES),
    *(unpack("sm_90a", tile_words, bf16=True) for tile_words in (1, 16)),
    unpack("sm_90a", 8, columns=LARGE + 1),
    *(
        spmm("sm_90a", tile_words, n, bf16, values=values)
        for tile_words, n, (bf16, values) in zip(
            (1, 4, 5, 6, 8, 16, 4, 8), (16, 8, 64, 32, 8, 64, 256, 192), 2 * KINDS, strict=True
        )
    ),
    *(
        spmm(arch, 5, 16, bf16, values=values)
        for arch in DEVICES
        for bf16, values in KINDS[:: 2 if arch > "sm_9" else 1]
    ),
    *(unpack(arch, 4, bf16, values) for arch in ("sm_80", "sm_90a") for bf16, values in KINDS),
    unpack("sm_90a", 7, values=ValueKind.INT8, columns=LARGE + 1),
    *(
        spmm("sm_90a", tile_words, n, bf16, size, size, values)
        for (tile_words, n, size), (bf16, values) in zip(
            product((4, 6, 10), (8, 16), (LARGE, SMALL)), 3 * KINDS, strict=True
        )
    ),
    *(
        random_zeros((36864, 9216), sparsity, tile_words, n)
        for (sparsity, tile_words), n in product(((0.6, 4), (0.7, 6), (0.8, 8), (0.9, 12)), (8, 32, 48, 80, 128, 256))
    ),
    *(random_zeros((size, size), 0.8, 8, n) for size, n in product((4096, 7168), (8, 16, 64))),
    *(
        random_zeros((rows, columns), sparsity, tile_words, n, ValueKind.E4M3)
        for (rows, columns), (sparsity, tile_words), n in product(
            ((36864, 9216), (7168, 7168)), ((0.6, 4), (0.8, 8), (0.8, 10), (0.9, 16)), (8, 16)
        )
    ),
    *(split_x(tile_words, bf16, values) for tile_words, (bf16, values) in zip((1, 6, 10, 16), KINDS, strict=True)),
]


def name(configuration: Configuration) -> str:
    source, defines, arch = configuration
    shown = {
        "TILE_WORDS": "tile",
        "N_BLOCKS": "blocks",
        "BF16": "bf16",
        "VALUES": "values",
        "RAGGED": "ragged",
        "WARPS": "warps",
    }
    return "-".join([source.removesuffix(".cu"), arch, *(f"{shown[k]}{v}" for k, v in defines if k in shown)])


def compilers(nice: int = 0) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(
        os.cpu_count() or 2, mp_context=get_context("spawn"), initializer=os.nice, initargs=(nice,)
    )


def compile_log(configuration: Configuration) -> str:
    binary, log = build.compile_cubin(*configuration)
    assert binary[:4] == b"\x7fELF"
    return log


@pytest.fixture(scope="module")
def log_of(request: pytest.FixtureRequest) -> Iterator[Callable[[Configuration], str]]:
    """What the compiler says of a configuration. All that were selected are compiled side by side from the start."""
    items = [item for item in request.session.items if item.module is request.module]  # type: ignore[attr-defined]
    calls = [item.callspec.params for item in items if hasattr(item, "callspec")]
    wanted = {call["configuration"] for call in calls if "configuration" in call}
    with compilers() as processes:
        logs: dict[Configuration, Future[str]] = {c: processes.submit(compile_log, c) for c in wanted}
        yield lambda configuration: logs[configuration].result()
        processes.shutdown(cancel_futures=True)


def check(log: str) -> None:
    """That every kernel keeps all in registers."""
    assert "Compiling entry function" in log
    for kind in ("stack frame", "spill stores", "spill loads"):
        assert set(re.findall(rf"(\d+) bytes {kind}", log)) == {"0"}, log
    assert not re.search(r"bytes lmem|warning", log), log


@pytest.mark.parametrize("configuration", QUICK, ids=name)
def test_it_compiles_and_nothing_spills(configuration: Configuration, log_of: Callable[[Configuration], str]) -> None:
    check(log_of(configuration))


ARGUMENTS = {
    "UnpackParams": (unpack("sm_90a", 8), cuda._UnpackParams),
    "SplitParams": (split_x(8, False, ValueKind.E4M3), cuda._SplitParams),
    "SpmmParams": (spmm("sm_80", 8, 16), cuda._PlainArgument),
    "Params": (spmm("sm_90a", 8, 16), cuda._HopperArgument),
}


@pytest.mark.parametrize("struct", ARGUMENTS)
def test_an_argument_has_all_the_bytes_that_its_kernel_has(
    struct: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The driver copies so many. From a shorter one it copies what lies behind it, too, which now and then is no memory
    of the process: a crash."""
    (source, defines, arch), argument = ARGUMENTS[struct]
    shutil.copytree(build.source_dir(), tmp_path, dirs_exist_ok=True)
    with (tmp_path / source).open("a") as file:
        file.write(f"static_assert(sizeof({struct}) == {ctypes.sizeof(argument)});")
    monkeypatch.setattr(build, "source_dir", lambda: tmp_path)
    build.compile_cubin(source, defines, arch)


def every_kernel(arch: str) -> list[Configuration]:
    every = [unpack(arch, *rest) for rest in product(TILE_WORDS, (False, True), ValueKind)]
    every += [split_x(tile_words, *kind) for tile_words, kind in product(TILE_WORDS, KINDS) if arch == "sm_90a"]
    every += [
        spmm(arch, tile_words, n, bf16, size, size, values)
        for tile_words, n, bf16, values in product(TILE_WORDS, ROWS_OF_X, (False, True), ValueKind)
        for size in (LARGE, SMALL)
    ]
    return list(dict.fromkeys(every))


_logs: dict[str, Iterator[str]] = {}


def begin_every_kernel(arch: str) -> Callable[[], None]:
    """Compiles in the background, for what the other tests leave of the CPU. Returns how to end it."""
    if arch not in os.environ.get("FLASH_LLM_ALL_KERNELS", "").split(","):
        return lambda: None
    processes = compilers(nice=19)
    _logs[arch] = processes.map(compile_log, every_kernel(arch))
    return functools.partial(processes.shutdown, cancel_futures=True)


@pytest.mark.slow
@pytest.mark.early(begin=begin_every_kernel)
@pytest.mark.parametrize("arch", DEVICES)
def test_every_kernel_compiles_and_nothing_spills(arch: str) -> None:
    """FLASH_LLM_ALL_KERNELS names the architectures. Hopper's 1,400 take two cores eight minutes, others' 354 1.5."""
    if arch not in _logs:
        pytest.skip(f"minutes of compiling: FLASH_LLM_ALL_KERNELS={arch} asks for it")
    for log in _logs[arch]:
        check(log)
