"""SparseLinear and compress: a model's linear layers replaced in place, and all that one does with a torch module."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flash_llm import PackedWeight, SlowPathWarning, SparseLinear, compress
from flash_llm.nn import expand_on_cpu, replace_module, sparse_layers
from sparse_matrices import DTYPES, bits, sparse
from tiny_models import logits, pruned_model

quietly = pytest.mark.filterwarnings("ignore::flash_llm.errors.SlowPathWarning")

ROWS, COLUMNS = 37, 200


def dense_layer(dtype: torch.dtype = torch.float16, bias: bool = True, seed: int = 0) -> nn.Linear:
    layer = nn.Linear(COLUMNS, ROWS, bias=bias, dtype=dtype)
    layer.weight.data = sparse(ROWS, COLUMNS, 0.6, dtype, seed)
    return layer


def normal(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3)).to(dtype)


@quietly
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_it_gives_what_the_dense_layer_gives(dtype: torch.dtype, bias: bool) -> None:
    dense = dense_layer(dtype, bias)
    layer = SparseLinear.from_linear(dense)
    x = normal(2, 3, COLUMNS, dtype=dtype)
    assert torch.equal(layer(x), dense(x))
    assert torch.equal(bits(layer.packed.to_dense()), bits(dense.weight.detach()))
    assert repr(layer) == f"SparseLinear(in_features={COLUMNS}, out_features={ROWS}, bias={bias})"
    assert layer(normal(0, COLUMNS, dtype=dtype)).shape == (0, ROWS)


@quietly
def test_it_compiles_as_one_graph() -> None:
    dense = dense_layer()
    layer, x = SparseLinear.from_linear(dense), normal(2, COLUMNS)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), dense(x))
    layer.expand()
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), dense(x))


def test_on_a_cpu_it_expands_once_and_says_so_once() -> None:
    layer = SparseLinear.from_linear(dense_layer())
    with pytest.warns(SlowPathWarning, match="expanded to dense"):
        layer(normal(2, COLUMNS))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(normal(2, COLUMNS))


def test_a_model_says_once_that_its_layers_are_expanded() -> None:
    model = nn.Sequential(*(SparseLinear.from_linear(dense_layer()) for _ in range(3)))
    with pytest.warns(SlowPathWarning, match=r"^3 compressed layer\(s\) expanded") as said:
        assert expand_on_cpu(model) == 3
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model[0](normal(2, COLUMNS))
        assert expand_on_cpu(nn.Linear(2, 2)) == 0


def test_it_has_no_dense_weight_in_its_state() -> None:
    layer = SparseLinear.from_linear(dense_layer())
    layer.expand()
    assert set(layer.state_dict()) == {"weight_bitmap", "weight_values", "weight_offsets", "bias"}
    assert not any(parameter.requires_grad for parameter in layer.parameters())


@quietly
@pytest.mark.parametrize("assign", [False, True])
def test_its_state_goes_through_a_file(assign: bool, tmp_path: Path) -> None:
    dense = dense_layer()
    layer = SparseLinear.from_linear(dense)
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    empty = SparseLinear(layer.packed.metadata(), bias=torch.empty(ROWS, dtype=torch.float16, device="meta"))
    assert {tensor.device.type for tensor in empty.state_dict().values()} == {"meta"}
    loaded = empty if assign else empty.to_empty(device="cpu")
    loaded.load_state_dict(load_file(tmp_path / "layer.safetensors"), assign=assign)
    assert torch.equal(loaded(normal(2, COLUMNS)), dense(normal(2, COLUMNS)))


@quietly
def test_a_state_that_is_loaded_takes_the_place_of_the_expanded_weight() -> None:
    first = SparseLinear.from_linear(dense_layer(seed=0))
    first(normal(2, COLUMNS))
    changed = {name: tensor * 2 if name == "weight_values" else tensor for name, tensor in first.state_dict().items()}
    first.load_state_dict(changed)
    torch.testing.assert_close(first(normal(2, COLUMNS)) - first.bias, 2 * normal(2, COLUMNS) @ dense_layer().weight.T)


def test_a_state_of_another_size_is_refused() -> None:
    layer = SparseLinear.from_linear(dense_layer())
    denser = dense_layer()
    denser.weight.data = sparse(ROWS, COLUMNS, 0.1)
    with pytest.raises(RuntimeError, match="size mismatch for weight_values"):
        layer.load_state_dict(SparseLinear.from_linear(denser).state_dict())


@quietly
@pytest.mark.parametrize("path", ["half", "bfloat16", "float", "float half", "bfloat16 float bfloat16", "float float"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_casting_it_casts_the_weight(dtype: torch.dtype, path: str) -> None:
    """As torch's own layers, in the same steps, whether it was expanded before or not."""
    dense = dense_layer(dtype)
    dense.weight.data[0, 0] = torch.finfo(torch.float16).max  # which bfloat16 rounds beyond float16's range
    layer = SparseLinear.from_linear(dense)
    layer(normal(1, COLUMNS, dtype=dtype))
    for cast in path.split():
        dense, layer = getattr(dense, cast)(), getattr(layer, cast)()
    x = normal(2, COLUMNS, dtype=dense.weight.dtype)
    assert layer(x).dtype == dense.weight.dtype
    assert torch.equal(layer(x), dense(x))


@quietly
def test_copies_and_pickles_are_independent() -> None:
    layer = SparseLinear.from_linear(dense_layer())
    x = normal(2, COLUMNS)
    expected = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), expected)
        other.weight_values.zero_()
        assert torch.equal(layer.packed.to_dense(), dense_layer().weight)


@quietly
@pytest.mark.parametrize("kind", ["llama", "llama-tied", "opt", "qwen2", "gpt_neox"])
def test_compress_replaces_a_models_linear_layers(kind: str) -> None:
    model = pruned_model(kind)
    expected = logits(model)
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    report = compress(model)
    assert set(report.packed) | set(report.skipped) == linears
    assert set(sparse_layers(model)) == set(report.packed)
    assert all(name in ("lm_head", "embed_out") for name in report.skipped)
    torch.testing.assert_close(logits(model), expected)


@pytest.mark.parametrize("padding", [False, True])
def test_torchs_encoder_layers_go_through_packed_ones(padding: bool) -> None:
    """Without gradients they would take the quick way, which reads linear layers' weights by itself."""
    layer = nn.TransformerEncoderLayer(64, 4, dim_feedforward=128, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2)).half().eval()
    x = torch.randn(2, 5, 64).half()
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if padding else None
    expected = model[0](x, src_key_padding_mask=mask)  # with gradients: the usual way
    assert len(compress(model).packed) == 4
    with torch.no_grad(), pytest.warns(SlowPathWarning):
        got = model[0](x, src_key_padding_mask=mask)
    real = x.new_ones(2, 5, dtype=torch.bool) if mask is None else ~mask
    torch.testing.assert_close(got[real], expected[real], rtol=2e-2, atol=2e-2)


@quietly
def test_a_layer_whose_weight_is_taken_out_of_it_stays_dense() -> None:
    """``nn.MultiheadAttention`` does that with its output layer, of a class that has ``nn.Linear``'s own forward."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(64, 4, batch_first=True).half().eval()
    model = nn.ModuleDict({"attention": attention, "other": dense_layer()})
    x = normal(1, 5, 64)
    with torch.no_grad():
        expected = attention(x, x, x)[0]
        assert compress(model).packed == ["other"]
        assert torch.equal(attention(x, x, x)[0], expected)


def test_skip_takes_regular_expressions() -> None:
    model = pruned_model("llama")
    report = compress(model, skip=[r"layers\.0\.", "down_proj$"])
    assert report.packed
    for name in report.packed:
        assert "layers.0." not in name
        assert not name.endswith("down_proj")
    assert report.skipped["model.layers.1.mlp.down_proj"] == "its name matches 'down_proj$'"
    assert isinstance(model.lm_head, SparseLinear)


def test_a_model_that_cannot_be_compressed_stays_as_it_was() -> None:
    integer = nn.Linear(8, 8)
    integer.weight = nn.Parameter(torch.ones(8, 8, dtype=torch.int8), requires_grad=False)
    model = nn.Sequential(dense_layer(), nn.Sequential(integer))
    with pytest.raises(TypeError, match=r"^1\.0 has weights of torch.int8.*float16 or bfloat16"):
        compress(model)
    assert not sparse_layers(model)
    assert compress(model, skip=[r"^1\.0$"]).packed == ["0"]


@pytest.mark.parametrize(
    ("model", "error", "words"),
    [
        (nn.Sequential(nn.ReLU()), ValueError, "Sequential has no linear layers to compress"),
        (dense_layer(), ValueError, "itself a linear layer.*SparseLinear.from_linear"),
        (nn.Sequential(nn.Linear(4, 4)), TypeError, "0 has weights of torch.float32"),
        (nn.Sequential(nn.Linear(4, 4, device="meta", dtype=torch.float16)), ValueError, "meta.*load the weights"),
    ],
    ids=["no-linear", "linear", "float32", "meta"],
)
def test_compress_refuses_in_words(model: nn.Module, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        compress(model)


def test_replace_module_reaches_into_lists() -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ReLU(), nn.ReLU()])})
    new = nn.GELU()
    replace_module(model, "layers.1", new)
    assert model["layers"][1] is new  # type: ignore[index]


def test_from_packed_shares_memory() -> None:
    weight = PackedWeight.from_dense(sparse(ROWS, COLUMNS, 0.6))
    layer = SparseLinear.from_packed(weight)
    assert layer.weight_values.data_ptr() == weight.values.data_ptr() == layer.packed.values.data_ptr()
