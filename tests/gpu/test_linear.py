"""Multiplying on the GPU, element by element, against float64: every shape, sparsity, layout of x and kernel."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

import flash_llm
from flash_llm import PackedWeight
from flash_llm.kernels import choice, counters, launch, plan
from flash_llm.tensor import ValueKind
from flash_llm.tensor.layout import TILE_WORDS
from gpu_cases import BIASES, X_LAYOUTS, Case, compile_all, random_cases, splits_x, using
from sparse_matrices import DTYPES, sparse

pytestmark = pytest.mark.gpu

KERNELS = (choice.AUTO, choice.PORTABLE_SMALL)
QUANTISED = (ValueKind.E4M3, ValueKind.INT8)
EDGES = [
    *((rows, columns, 16) for rows in (1, 63, 576, 11008) for columns in (1, 63, 576, 11008)),
    *((576, 1536, n) for n in (1, 8, 9, 64, 65, 128, 129, 192, 256, 257, 300, 600)),
]
CASES = [
    *(Case(choice.AUTO, *shape, 0.7, torch.float16, "even", "plain", "plain", 0) for shape in EDGES),
    *(
        Case(kernel, 576, columns, 12, 0.6, torch.float16, "even", x_layout, "none", 1)
        for kernel, x_layout, columns in product(KERNELS, X_LAYOUTS, (576, 579))
    ),
    *(
        Case(kernel, 99, 576, 5, 0.6, torch.bfloat16, "even", "plain", bias, 2)
        for kernel, bias in product(KERNELS, BIASES)
    ),
    *random_cases(260, choice.AUTO),
    *random_cases(60, choice.PORTABLE_SMALL, seed=1),
    *random_cases(60, choice.PORTABLE, seed=2),
    *random_cases(150, choice.AUTO, seed=3, values=QUANTISED),
    *(
        Case(choice.AUTO, 11008, 11008, n, sparsity, torch.float16, "even", "plain", "plain", n, values)
        for n, (sparsity, values) in zip((8, 16, 32, 64), product((0.6, 0.8), QUANTISED), strict=True)
    ),
    *random_cases(90, choice.PORTABLE_SMALL, seed=4, values=QUANTISED),
]


@pytest.fixture(scope="module", autouse=True)
def kernels(request: pytest.FixtureRequest) -> None:
    """All kernels that the selected cases need, compiled side by side."""
    items = [item for item in request.session.items if getattr(item, "module", None) is request.module]
    calls = [item.callspec.params for item in items if hasattr(item, "callspec")]
    compile_all({call["case"] for call in calls if "case" in call})


@pytest.fixture(autouse=True)
def full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense products add up in float32, as ours do."""
    for name in ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction", "allow_tf32"):
        monkeypatch.setattr(torch.backends.cuda.matmul, name, False)


def exact(x: Tensor, dense: Tensor, bias: Tensor | None) -> Tensor:
    y = x.double() @ dense.double().T
    return y if bias is None else y + bias.double()


def split_error(x: Tensor, dense: Tensor, kind: ValueKind) -> Tensor:
    """The most by which x in two parts may change x W^T.

    int8: half a step of 1 / 16256 of a row's largest. float8: 2^-8 of each number, or 2^-21 of the row's largest; and
    the tensor cores' sums of a tile, of some 14 bits, are taken to lose no more than 2^-11 of what they add up.
    """
    x, dense = x.double().abs(), dense.double().abs()
    largest = x.amax(1, keepdim=True)
    if kind is ValueKind.INT8:
        return (largest / (2 * 16256)).expand_as(x) @ dense.T
    return (x / 2**8).maximum(largest / 2**21) @ dense.T + x @ dense.T / 2**11


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_element_is_within_rounding(case: Case) -> None:
    """|y - ref| <= u |ref| + 2 K u32 |x| |w|^T: one rounding at the end, and K float32 additions, truncated. Where x is
    split into two 8-bit parts, besides what they lack, and what float8 sums lose: see ``split_error``."""
    weight, x, bias = case.packed(), case.x(), case.bias_vector()
    dense = case.multiplied(weight)
    with case.using():
        y = flash_llm.linear(x, weight, bias)
        splits = splits_x(weight, case.n)
    assert y.shape == (case.n, case.rows)
    assert y.dtype == case.dtype
    expected = exact(x, dense, bias)
    magnitude = exact(x.abs(), dense.abs(), None if bias is None else bias.abs())
    info, info32 = torch.finfo(case.dtype), torch.finfo(torch.float32)
    bound = info.eps * expected.abs() + info32.eps * (case.columns + 2) * magnitude + info.smallest_normal * info.eps
    if splits:
        bound += split_error(x, dense, weight.kind)
    error = (y.double() - expected).abs()
    worst = int((error - bound).argmax()) if error.numel() else 0
    row, column = divmod(worst, case.rows)
    assert bool((error <= bound).all()), f"y[{row}, {column}] is {y[row, column]}, not {expected[row, column]}"


@pytest.mark.parametrize("case", [case for case in CASES if case.n < 257], ids=str)
def test_whole_numbers_are_exact(case: Case) -> None:
    """Sums of small whole numbers are exact in any order: an element that is lost or taken twice shows at any K."""
    weight, x, bias = case.packed(whole=True), case.x(whole=True), case.bias_vector(whole=True)
    dense = case.whole_weight()
    with case.using():
        y = flash_llm.linear(x, weight, bias)
    expected = exact(x, dense, bias).float().to(case.dtype)
    wrong = (y != expected).nonzero()
    assert not len(wrong), f"{len(wrong)} of {y.numel()} are wrong, first {wrong[0].tolist()}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_relu_is_that_of_the_result(case: Case) -> None:
    weight, x, bias = case.packed(), case.x(), case.bias_vector()
    with case.using():
        y = flash_llm.linear(x, weight, bias)
        assert torch.equal(flash_llm.linear(x, weight, bias, relu=True), y.relu())


@pytest.mark.parametrize("n", [1, 16, 32, 48, 64])
@pytest.mark.parametrize("strips", [1, 3, 4])
def test_a_last_row_block_with_few_rows(strips: int, n: int) -> None:
    """Its tiles count less where work is dealt out, and warps without rows have nothing to do."""
    rows, columns = (36 * 12 + strips) * 16 - 5, 28672
    dense = torch.randint(-4, 5, (rows, columns), device="cuda", dtype=torch.int8).half()
    dense.masked_fill_(torch.rand(rows, columns, device="cuda") < 0.8, 0)
    x = torch.randint(-3, 4, (n, columns), device="cuda").half()
    weight = PackedWeight.from_dense(dense, tile_words=8)
    expected = (x.double() @ dense.double().T).half()
    for _ in range(20):
        assert torch.equal(flash_llm.linear(x, weight), expected)


@pytest.mark.parametrize("values", ValueKind, ids=lambda kind: kind.value)
@pytest.mark.parametrize("n", [8, 16, 32, 64, 96, 128, 192, 256])
@pytest.mark.parametrize("tile_words", TILE_WORDS)
def test_every_tile_size(tile_words: int, n: int, values: ValueKind) -> None:
    """Also those that wouldn't be chosen: 47 words are whole tiles of none but 1. 8-bit values: as they are."""
    dense = torch.randint(-4, 5, (600, 3000), device="cuda").half()
    dense.masked_fill_(torch.rand(600, 3000, device="cuda") < 0.93, 0)
    x = torch.randint(-3, 4, (n, 3000), device="cuda").half()
    scales = None if values is ValueKind.BITS16 else torch.full((600,), 0.5, device="cuda")
    weight = PackedWeight.from_dense(dense, tile_words=tile_words, values=values, scales=scales)
    with using(choice.AUTO, split=True):
        assert torch.equal(flash_llm.linear(x, weight), exact(x, dense, None).half())


@pytest.mark.parametrize(
    ("kernel", "split"), [(choice.AUTO, True), (choice.AUTO, False), (choice.PORTABLE_SMALL, False)]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("values", QUANTISED, ids=lambda kind: kind.value)
def test_every_8_bit_number_is_multiplied_exactly(
    values: ValueKind, dtype: torch.dtype, kernel: str, split: bool
) -> None:
    """All of them, by rows of x that pick out a column each; and scales far from 1."""
    numbers = torch.arange(256, dtype=torch.uint8).view(values.dtype).float().nan_to_num(0.0).clamp(-values.largest)
    scales = 2.0 ** torch.tensor([-20.0, -6.0, 0.0, 3.0]).repeat(8)
    dense = (numbers.repeat(32, 1) * scales[:, None]).cuda()
    stored = (numbers.repeat(32, 1)).to(dtype).cuda()  # in bfloat16 and float16 exactly
    weight = PackedWeight.from_dense(stored, values=values, scales=torch.ones(32, device="cuda"))
    weight = replace(weight, scales=scales.cuda(), checksum=None)
    for columns in torch.arange(256).split(64):
        x = torch.nn.functional.one_hot(columns, 256).to(dtype).cuda()
        with using(kernel, split):
            y = flash_llm.linear(x, weight)
        assert torch.equal(y, dense.T[columns].to(dtype))


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("values", QUANTISED, ids=lambda kind: kind.value)
def test_8_bit_values_give_the_same_bits_every_time(values: ValueKind, split: bool) -> None:
    weight = PackedWeight.from_dense(sparse(3000, 4096, 0.6, device="cuda"), values=values)
    x = torch.randn(16, 4096, device="cuda").half()
    with using(choice.AUTO, split):
        first = flash_llm.linear(x, weight)
        assert all(torch.equal(flash_llm.linear(x, weight), first) for _ in range(20))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("values", QUANTISED, ids=lambda kind: kind.value)
def test_rows_of_x_of_all_sizes_are_split(values: ValueKind, dtype: torch.dtype) -> None:
    """Rows that are tiny, huge, or zero beside others, and one that isn't finite, which spoils itself alone."""
    weight = PackedWeight.from_dense(sparse(200, 1000, 0.6, dtype, device="cuda"), values=values)
    dense = weight.to_dense(torch.float32)
    x = torch.randn(9, 1000, device="cuda").to(dtype)
    factors = torch.tensor([1, 1e-4, 1e2, 0, 1e-7, 1, 1, 1, 1], device="cuda")[:, None]
    x = (x.float() * factors).to(dtype)
    x[5, 300] = float("inf")
    x[6, 999] = float("nan")
    x[7, ::64] *= 60  # outliers, one in each word
    with using(choice.AUTO, split=True):
        assert splits_x(weight, 9)
        y = flash_llm.linear(x, weight).double()
    assert bool(y[5:7].isnan().all())
    rest = [0, 1, 2, 3, 4, 7, 8]
    bound = split_error(x, dense, values)[rest] + torch.finfo(dtype).eps * exact(x, dense, None)[rest].abs()
    bound += torch.finfo(dtype).smallest_normal  # the smallest steps of the results
    assert bool(((y - exact(x, dense, None)).abs()[rest] <= bound).all())


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_not_a_number_and_infinity_stay_where_they_belong(kernel: str, dtype: torch.dtype) -> None:
    with choice.using(kernel):
        dense = sparse(100, 200, 0.6, dtype, device="cuda")
        dense[3, 7], dense[50, 199], dense[99, 0] = float("nan"), float("inf"), float("-inf")
        x = torch.randn(5, 200, device="cuda").to(dtype)
        for columns in (200, 197):
            y = flash_llm.linear(x[:, :columns], PackedWeight.from_dense(dense[:, :columns]))
            expected = exact(x[:, :columns], dense[:, :columns], None)
            assert torch.equal(y.isnan(), expected.isnan())
            assert torch.equal(y.isinf(), expected.isinf())
        x[2, 5] = float("inf")  # times a zero, dropped or not, it is not a number
        expected = exact(x, dense, None)
        y = flash_llm.linear(x, PackedWeight.from_dense(dense))
        assert torch.equal(y.isnan(), expected.isnan())
        assert torch.equal(y[expected.isinf()].double(), expected[expected.isinf()])


@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 3), (2, 0, 3), (5, 4, 30)], ids=str)
def test_x_has_any_number_of_dimensions(shape: tuple[int, ...]) -> None:
    dense = sparse(99, 136, 0.6, device="cuda")
    x = torch.randn(*shape, 136, device="cuda").half()
    y = flash_llm.linear(x, PackedWeight.from_dense(dense))
    assert y.shape == (*shape, 99)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, dense), rtol=2e-3, atol=2e-2)


@pytest.mark.parametrize("values", ValueKind)
@pytest.mark.parametrize("rows", [2048, 2999])
def test_a_large_weight_is_expanded_in_parts(rows: int, values: ValueKind, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many rows of x are multiplied by torch, by so much of the weight at a time as a workspace holds."""
    monkeypatch.setattr(plan, "_WORKSPACE_BYTES", 1 << 20)
    weight = PackedWeight.from_dense(sparse(rows, 500, 0.7, device="cuda"), values=values)
    x, bias = torch.randn(2, 1100, 500, device="cuda").half(), torch.randn(rows, device="cuda").half()
    assert plan.rows_unpacked(rows, 500) < rows
    for some in (None, bias):
        y = flash_llm.linear(x, weight, some)
        torch.testing.assert_close(y, torch.nn.functional.linear(x, weight.to_dense(), some), rtol=1e-3, atol=1e-2)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    flash_llm.linear(x, weight, bias)
    assert torch.cuda.max_memory_allocated() - before < y.nbytes + rows * 500 * 2, "not all at once"


def test_a_weight_that_comes_to_lie_where_another_was() -> None:
    """What is kept of a launch is found by addresses, and by all else that it depends on."""
    x = torch.randn(8, 512, device="cuda").half()
    for sparsity, rows in product((0.5, 0.6, 0.9), (512, 640)):
        dense = sparse(rows, 512, sparsity, device="cuda")
        weight = PackedWeight.from_dense(dense)
        torch.testing.assert_close(
            flash_llm.linear(x, weight), torch.nn.functional.linear(x, dense), rtol=2e-3, atol=2e-2
        )
        del dense, weight


def test_the_counters_are_zero_after_every_kernel() -> None:
    """Row blocks that are shared by several blocks of threads are counted, and the last one clears the count."""
    weight = PackedWeight.from_dense(sparse(2048, 4096, 0.7, device="cuda"))
    for n in (1, 16, 64, 200):
        flash_llm.linear(torch.randn(n, 4096, device="cuda").half(), weight)
    torch.cuda.synchronize()
    found = [words(*place) for (_, _, capture), place in counters._sets.items() if capture == 0]
    assert found
    assert not any(any(words) for words in found)


def words(address: int, count: int) -> ctypes.Array[ctypes.c_uint32]:
    """GPU memory."""
    memory = (ctypes.c_uint32 * count)()
    launch.check(launch.driver().cuMemcpyDtoH(memory, address, ctypes.sizeof(memory))[0], "reading")
    return memory


def test_what_does_not_fit_is_refused_in_words() -> None:
    weight = PackedWeight.from_dense(sparse(64, 64, 0.5, device="cuda"))
    x = torch.ones(2, 64, dtype=torch.float16)
    with pytest.raises(ValueError, match="x is on cpu but the weight is on cuda:0"):
        flash_llm.linear(x, weight)
    with pytest.raises(ValueError, match="bias is on cpu"):
        flash_llm.linear(x.cuda(), weight, torch.ones(64).half())
    with pytest.raises(TypeError, match="x is torch.float32"):  # noqa: RUF043
        flash_llm.linear(x.cuda().float(), weight)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU only")
def test_two_gpus_in_one_process() -> None:
    dense = sparse(300, 400, 0.7)
    x = torch.randn(9, 400).half()
    weight = PackedWeight.from_dense(dense)
    first = flash_llm.linear(x.to("cuda:0"), weight.to("cuda:0"))
    with torch.cuda.device(0):
        second = flash_llm.linear(x.to("cuda:1"), weight.to("cuda:1"))
    assert second.device == torch.device("cuda:1")
    assert torch.equal(first.cpu(), second.cpu())
    assert torch.equal(flash_llm.ops.unpack(weight.to("cuda:1")).cpu(), dense)
