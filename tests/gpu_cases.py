"""Multiplications of every kind for the GPU tests, and a way to compile all that they need side by side."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from multiprocessing import get_context

import torch
from torch import Tensor

from flash_llm import PackedWeight
from flash_llm.kernels import build, choice, cuda, plan
from flash_llm.kernels.ahead import Configuration
from flash_llm.tensor import ValueKind
from sparse_matrices import DTYPES, PATTERNS, sparse

SIZES = (1, 2, 15, 16, 17, 63, 64, 65, 576, 1000, 1536, 4096, 11008)
ROWS_OF_X = (
    1,
    2,
    7,
    8,
    9,
    15,
    16,
    17,
    31,
    32,
    33,
    48,
    49,
    64,
    65,
    80,
    100,
    128,
    129,
    160,
    192,
    193,
    224,
    256,
    257,
    300,
    700,
)
SPARSITIES = (0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99, 1.0)
X_LAYOUTS = ("plain", "wide rows", "odd rows", "odd start", "transposed", "repeated", "overlapping")
BIASES = ("none", "plain", "strided", "repeated")


@contextmanager
def using(kernel: str, split: bool) -> Iterator[None]:
    """A kernel of ``choice.KERNELS``; ``split``: 8-bit values are multiplied as they are in weights of any size."""
    before = plan._X8_WORDS
    plan._X8_WORDS = 0 if split else before
    cuda.forget_plans()
    try:
        with choice.using(kernel):
            yield
    finally:
        plan._X8_WORDS = before
        cuda.forget_plans()


@dataclass(frozen=True)
class Case:
    """One multiplication by a kernel of ``choice.KERNELS``."""

    kernel: str
    rows: int
    columns: int
    n: int
    sparsity: float
    dtype: torch.dtype
    pattern: str
    x_layout: str
    bias: str
    seed: int
    values: ValueKind = ValueKind.BITS16
    split: bool = False

    def using(self) -> AbstractContextManager[None]:
        """Where the case's kernel is in use."""
        return using(self.kernel, self.split)

    def __str__(self) -> str:
        size = f"{self.rows}x{self.columns}x{self.n}-{self.sparsity:g}-{str(self.dtype).removeprefix('torch.')}"
        size += "" if self.values is ValueKind.BITS16 else f"-{self.values.value}" + "-split" * self.split
        return "-".join([self.kernel, size, self.pattern, self.x_layout, f"bias {self.bias}"]).replace(" ", "_")

    def weight(self) -> Tensor:
        return sparse(self.rows, self.columns, self.sparsity, self.dtype, self.seed, self.pattern, "cuda")

    def whole_weight(self) -> Tensor:
        """The same zeros, and small whole numbers elsewhere: their sums are exact in float32, in any order."""
        weight = self.weight()
        numbers = (weight.float() * 2).round().clamp(-4, 4)
        return torch.where((numbers == 0) & (weight != 0), 1.0, numbers).to(self.dtype)

    def packed(self, whole: bool = False) -> PackedWeight:
        """Of whole numbers it has scales that leave them whole, different ones for neighbouring rows."""
        dense, scales = self.whole_weight() if whole else self.weight(), None
        if whole and self.values is not ValueKind.BITS16:
            scales = 2.0 ** -torch.arange(self.rows, device="cuda").remainder(3).float()
        return PackedWeight.from_dense(dense, values=self.values, scales=scales)

    def multiplied(self, weight: PackedWeight) -> Tensor:
        """What x is multiplied by: 8-bit values and scales unrounded, but where the weight is expanded."""
        with self.using():
            expanded = self.n >= cuda.unpacks_from(0)
        return weight.to_dense(None if expanded else torch.float32)

    def x(self, whole: bool = False) -> Tensor:
        """[n, columns], with NaN in memory all around it."""
        n, k = self.n, self.columns
        values = self._random(n, k, whole)
        if self.x_layout == "repeated":
            return values[:1].expand(n, k)
        if self.x_layout == "overlapping":
            return self._random(1, k + 8 * n, whole).view(-1).as_strided((n, k), (8, 1))
        if self.x_layout == "transposed":
            return values.T.contiguous().T
        if self.x_layout == "plain":
            return values
        places = {"wide rows": (8, -(-k // 8) * 8 + 16), "odd rows": (0, k // 8 * 8 + 11), "odd start": (3, k + 8)}
        start, pitch = places[self.x_layout]
        memory = torch.full((n * pitch + 16,), float("nan"), dtype=self.dtype, device="cuda")
        x = memory.as_strided((n, k), (pitch, 1), start)
        return x.copy_(values)

    def bias_vector(self, whole: bool = False) -> Tensor | None:
        """[rows]."""
        if self.bias == "none":
            return None
        values = self._random(2, self.rows, whole).view(-1)
        if self.bias == "repeated":
            return values[:1].expand(self.rows)
        return values[::2] if self.bias == "strided" else values[: self.rows]

    def _random(self, rows: int, columns: int, whole: bool) -> Tensor:
        generator = torch.Generator("cuda").manual_seed(self.seed + 1)
        if whole:
            return torch.randint(-3, 4, (rows, columns), generator=generator, device="cuda").to(self.dtype)
        return torch.randn(rows, columns, generator=generator, device="cuda").to(self.dtype)


def random_cases(
    count: int, kernel: str, seed: int = 0, values: Sequence[ValueKind] = (ValueKind.BITS16,)
) -> list[Case]:
    """Cases of all shapes, sparsities, patterns and layouts; every second shape is of sizes known for their edges."""
    rng = random.Random(seed)
    cases = []
    for number in range(count):
        rows, columns = (rng.choice(SIZES) if number % 2 else int(2 ** rng.uniform(0, 12.5)) for _ in range(2))
        cases.append(
            Case(
                kernel,
                rows,
                columns,
                rng.choice(ROWS_OF_X) if number % 3 else rng.randint(1, 300),
                rng.choice(SPARSITIES),
                rng.choice(DTYPES),
                rng.choice(PATTERNS) if number % 4 == 0 else "even",
                rng.choice(X_LAYOUTS) if number % 2 == 0 else "plain",
                rng.choice(BIASES),
                number,
                values[number % len(values)],
                number % 4 != 0,
            )
        )
    return cases


def compile_all(cases: Iterable[Case]) -> None:
    """Compiles the kernels that cases take, on all CPU cores, so that the tests find them in the cache."""
    wanted: set[Configuration] = set()
    for case in cases:
        weight = case.packed()
        with case.using():
            wanted |= set(cuda.configurations(weight, case.n))
    compile_side_by_side(wanted)


def splits_x(weight: PackedWeight, n: int) -> bool:
    """Whether x goes to the tensor cores as two parts of 8 bits, with the kernel that is in use."""
    return n < cuda.unpacks_from(weight.device.index) and cuda.plan_for(weight, n).splits_x


def compile_side_by_side(wanted: Iterable[Configuration]) -> None:
    """``build.compile_kernel`` of many configurations, in as many processes as there are CPU cores."""
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as processes:
        for future in [processes.submit(build.compile_kernel, *configuration) for configuration in wanted]:
            future.result()
