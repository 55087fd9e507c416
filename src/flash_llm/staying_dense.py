"""Which linear layers of a model can't be packed, and why."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import nn

from flash_llm.layers import is_linear

_TELLS_LITTLE = ("dtype", "device")  # of a weight: a packed layer's placeholder has these right
_NOT_HERE = ("training", "pretraining_tp", "slow_but_exact")  # conditions under which nobody runs a packed model


def staying_dense(model: nn.Module) -> dict[str, str]:
    """Names of a model's linear layers whose weight others need as a tensor, and what for.

    That is a weight that other modules share, and one that the module which holds the layer computes with itself, as
    Mamba does with ``dt_proj`` and LongCat's router with ``classifier``: it would find a packed layer's placeholder.
    """
    shared = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    found = {}
    for name, module in model.named_modules():
        if not is_linear(module):
            continue
        holder, _, attribute = name.rpartition(".")
        kind = type(model.get_submodule(holder))
        if shared[id(module.get_parameter("weight"))] > 1:
            found[name] = "its weight is shared with another layer"
        elif attribute in computed_with(kind):  # type: ignore[arg-type]  # a class has a hash
            found[name] = f"{kind.__name__} computes with its weight itself"
    return found


@functools.cache
def computed_with(kind: type[nn.Module]) -> frozenset[str]:
    """NAMEs of a module's layers for which its class has ``self.NAME.weight`` in some computation.

    Read off the source code; where there is none, nothing is found. Torch's own classes are known to
    :func:`flash_llm.nn.replace_module`.
    """
    found: set[str] = set()
    for base in kind.__mro__:
        if not issubclass(base, nn.Module) or base.__module__.startswith("torch."):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError):
            continue
        for method in ast.walk(tree):
            if isinstance(method, ast.FunctionDef) and "init" not in method.name:
                found.update(_weights(method))
    return frozenset(found)


def _weights(node: ast.AST) -> Iterator[str]:
    """Layers whose weight is read in a piece of code, but for its dtype or device."""
    if isinstance(node, ast.Attribute) and node.attr in _TELLS_LITTLE:
        return
    if isinstance(node, ast.If) and _is_never_taken(ast.unparse(node.test)):
        for other in node.orelse:
            yield from _weights(other)
        return
    match node:
        case ast.Attribute(attr="weight", value=ast.Attribute(attr=name, value=ast.Name(id="self"))):
            yield name
    for child in ast.iter_child_nodes(node):
        yield from _weights(child)


def _is_never_taken(condition: str) -> bool:
    return any(name in condition and f"not self.{name}" not in condition for name in _NOT_HERE)


def output_layer(model: Any) -> str | None:
    """The name of a language model's output layer, if it has one."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return next((name for name, module in model.named_modules() if head is not None and module is head), None)
