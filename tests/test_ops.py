"""The operators on a CPU: what a dense layer gives, under autograd and torch.compile too, and clear errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

import flash_llm
from flash_llm import PackedWeight, SlowPathWarning, ops
from sparse_matrices import DTYPES, bits, sparse

pytestmark = pytest.mark.filterwarnings("ignore::flash_llm.errors.SlowPathWarning")

ROWS, COLUMNS = 37, 200


def normal(*shape: int, dtype: torch.dtype = torch.float16, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture(params=DTYPES, ids=str)
def dense(request: pytest.FixtureRequest) -> Tensor:
    return sparse(ROWS, COLUMNS, 0.6, request.param)


@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3), (0,), (2, 0, 3), (1, 2, 3, 4)], ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_is_a_dense_layer(dense: Tensor, shape: tuple[int, ...], with_bias: bool) -> None:
    x = normal(*shape, COLUMNS, dtype=dense.dtype)
    bias = normal(ROWS, dtype=dense.dtype, seed=1) if with_bias else None
    y = flash_llm.linear(x, PackedWeight.from_dense(dense), bias)
    assert y.shape == (*shape, ROWS)
    assert y.dtype == dense.dtype
    torch.testing.assert_close(y, F.linear(x, dense, bias))


def test_x_may_lie_in_memory_in_any_way(dense: Tensor) -> None:
    weight = PackedWeight.from_dense(dense)
    for x in (
        normal(COLUMNS, 6, dtype=dense.dtype).T,
        normal(6, 2 * COLUMNS, dtype=dense.dtype)[:, ::2],
        normal(6, COLUMNS + 3, dtype=dense.dtype)[:, 3:],
        normal(1, COLUMNS, dtype=dense.dtype).expand(6, COLUMNS),
        normal(4, 3, COLUMNS, dtype=dense.dtype).transpose(0, 1),
    ):
        torch.testing.assert_close(flash_llm.linear(x, weight), F.linear(x, dense))


def test_unpack_is_the_dense_matrix(dense: Tensor) -> None:
    assert torch.equal(bits(ops.unpack(PackedWeight.from_dense(dense))), bits(dense))


@pytest.mark.parametrize("shape", [(3,), (2, 3)], ids=str)
def test_gradients_are_those_of_a_dense_layer(dense: Tensor, shape: tuple[int, ...]) -> None:
    grad = normal(*shape, ROWS, dtype=dense.dtype, seed=2)
    found, expected = [], []
    for results, layer in ((found, PackedWeight.from_dense(dense)), (expected, dense)):
        x = normal(*shape, COLUMNS, dtype=dense.dtype).requires_grad_()
        bias = normal(ROWS, dtype=dense.dtype, seed=1).requires_grad_()
        y = flash_llm.linear(x, layer, bias) if isinstance(layer, PackedWeight) else F.linear(x, layer, bias)
        results += torch.autograd.grad(y, (x, bias), grad)
    torch.testing.assert_close(found, expected)


def test_a_gradient_is_made_only_where_it_is_wanted() -> None:
    weight = PackedWeight.from_dense(sparse(ROWS, COLUMNS, 0.6))
    assert not flash_llm.linear(normal(2, COLUMNS), weight).requires_grad
    bias = normal(ROWS).requires_grad_()
    flash_llm.linear(normal(2, COLUMNS), weight, bias).sum().backward()
    assert bias.grad is not None
    torch.testing.assert_close(bias.grad, torch.full((ROWS,), 2.0).half())


@pytest.mark.parametrize("shape", [(5,), (2, 3), ()], ids=str)
def test_torch_finds_the_operators_well_defined(dense: Tensor, shape: tuple[int, ...]) -> None:
    """Schema, fake implementation, autograd registration, tracing with fixed and with symbolic shapes."""
    weight = ops._flat(PackedWeight.from_dense(dense))
    x, bias = normal(*shape, COLUMNS, dtype=dense.dtype), normal(ROWS, dtype=dense.dtype)
    for some_bias in (None, bias.requires_grad_()):
        torch.library.opcheck(torch.ops.flash_llm.linear.default, (x.requires_grad_(), some_bias, *weight))
    torch.library.opcheck(torch.ops.flash_llm.unpack.default, weight)


def test_it_compiles_as_one_graph_with_gradients() -> None:
    dense = sparse(ROWS, COLUMNS, 0.6)
    weight = PackedWeight.from_dense(dense)

    def layer(x: Tensor, bias: Tensor) -> Tensor:
        return F.relu(flash_llm.linear(x * 2, weight, bias))

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for n in (2, 5, 9):  # the second makes the size symbolic
        x, bias = normal(n, COLUMNS, seed=n).requires_grad_(), normal(ROWS, seed=1).requires_grad_()
        y, expected = compiled(x, bias), F.relu(F.linear(x * 2, dense, bias))
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(
            torch.autograd.grad(y.sum(), (x, bias)), torch.autograd.grad(expected.sum(), (x, bias))
        )


def test_it_says_that_it_is_slow_here() -> None:
    with pytest.warns(SlowPathWarning, match=r"CPU expands the weight at every call.*SparseLinear"):
        flash_llm.linear(normal(2, COLUMNS), PackedWeight.from_dense(sparse(ROWS, COLUMNS, 0.6)))


META = torch.empty(2, COLUMNS, dtype=torch.float16, device="meta")


@pytest.mark.parametrize(
    ("x", "bias", "error", "words"),
    [
        (normal(2, COLUMNS).float(), None, TypeError, r"x is torch.float32.*x\.to\(torch.float16\)"),
        (normal(2, COLUMNS).bfloat16(), None, TypeError, "x is torch.bfloat16"),
        (torch.ones(2, COLUMNS, dtype=torch.int64), None, TypeError, "x is torch.int64"),
        (normal(2, COLUMNS - 1), None, ValueError, rf"\(2, 199\).*{ROWS} x {COLUMNS}.*must be {COLUMNS}"),
        (normal(COLUMNS, 2), None, ValueError, "last dimension must be"),
        (normal(1)[0], None, ValueError, "last dimension must be"),
        (META, None, ValueError, "x is on meta but the weight is on cpu"),
        (normal(2, COLUMNS), normal(ROWS).float(), TypeError, "bias is torch.float32"),
        (normal(2, COLUMNS), normal(ROWS + 1), ValueError, r"bias of shape \(38,\).*it takes \(37,\)"),
        (normal(2, COLUMNS), normal(1, ROWS), ValueError, r"bias of shape \(1, 37\)"),
        (normal(2, COLUMNS), META[0, :ROWS], ValueError, "bias is on meta"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(
    x: Tensor, bias: Tensor | None, error: type[Exception], words: str
) -> None:
    weight = PackedWeight.from_dense(sparse(ROWS, COLUMNS, 0.6))
    with pytest.raises(error, match=words):
        flash_llm.linear(x, weight, bias)


def test_values_of_a_dtype_that_is_not_packed_are_refused() -> None:
    """float32 values have another size: a kernel would read them as something else."""
    weight = PackedWeight.from_dense(sparse(ROWS, COLUMNS, 0.6))
    wide = PackedWeight(
        weight.shape, weight.bitmap, weight.values.float(), weight.offsets, weight.tile_words, weight.max_packets
    )
    with pytest.raises(TypeError, match="holds float16 or bfloat16 values, not "):
        flash_llm.linear(normal(2, COLUMNS).float(), wide)


def test_the_operator_is_left_out_only_where_nobody_watches() -> None:
    """On a GPU a product is launched without torch's dispatcher, which is slow, unless something is to come of it."""
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.utils.flop_counter import FlopCounterMode

    x, bias = normal(2, COLUMNS), torch.nn.Parameter(normal(ROWS), requires_grad=False)
    seen: list[bool] = []

    def look(x: Tensor) -> Tensor:
        seen.append(ops._nobody_watches(x, bias))
        return x * 1

    look(x)
    seen.append(ops._nobody_watches(x, None))
    with torch.no_grad():
        look(x.clone().requires_grad_())
    with torch.inference_mode():
        look(x)
    assert seen == [True] * 4
    seen.clear()
    look(x.clone().requires_grad_())
    seen.append(ops._nobody_watches(x, normal(ROWS).requires_grad_()))
    look(torch.nn.Parameter(x, requires_grad=False))
    for mode in (FlopCounterMode(display=False), FakeTensorMode(allow_non_fake_inputs=True), torch.device("cpu")):
        with mode:
            look(x)
    make_fx(look)(x)
    torch.func.vmap(look)(x)
    torch.func.jvp(look, (x,), (x,))
    with forward_ad.dual_level():
        look(x)
    torch.jit.trace(look, (x,), check_trace=False)
    assert seen
    assert not any(seen)
