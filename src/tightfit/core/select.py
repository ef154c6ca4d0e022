"""Selectors: glob patterns over the base model's module names, resolved before any edit."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable

from torch import nn

from tightfit.core import hfmodel
from tightfit.core.errors import SelectorError
from tightfit.core.fields import near


def select(
    model: nn.Module,
    where: str,
    *,
    kind: Callable[[nn.Module], bool] | None = None,
    method: str = "recipe",
) -> list[str]:
    """Names of the modules that match `where`, in model order.

    `where` is one or more shell-style patterns joined by `|`, matched against the full dotted module name or
    any dotted ending of it: `"query|value"`, `"*.layer.0.*.dense"`, `"model.layers.[0-3].*"`. Every pattern
    must match something of the right `kind`: one misspelt target of two is an error, not a smaller recipe.

    Raises:
        SelectorError: a pattern matches nothing; names it and the nearest module endings.

    Example:
        >>> from tightfit import skeleton
        >>> from transformers import BertConfig
        >>> select(skeleton(BertConfig(num_hidden_layers=2)), "query|layer.1.*.dense")[:2]
        ['encoder.layer.0.attention.self.query', 'encoder.layer.1.attention.self.query']
    """
    found = [(name, m) for name, m in hfmodel.stock_modules(model) if name and (kind is None or kind(m))]
    # patterns are written for the stock model: an adapter layer's stock module is called as before
    names = {name: name.removesuffix(".base_layer") for name, _ in found}
    chosen: set[str] = set()
    for pattern in (part.strip() for part in where.split("|")):
        hits = [name for name, stock_name in names.items() if _matches(stock_name, pattern)]
        if not hits:
            endings = sorted({name.rsplit(".", 1)[-1] for name in names.values()})
            shown = ", ".join(endings[:12]) or "(none)"
            raise SelectorError(
                f"{method}: where={where!r}: pattern {pattern!r} matches no suitable module of "
                f"{type(model).__name__}{near(pattern.rsplit('.', 1)[-1], endings)}; suitable modules end in: {shown}"
            )
        chosen.update(hits)
    return [name for name in names if name in chosen]


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"*.{pattern}")
