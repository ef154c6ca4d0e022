"""Which channels of a stack a side net takes over, and how its tensors are cut out of the stack's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tightfit.core import hfmodel
from tightfit.core.errors import UnsupportedModelError

Scores = Mapping[int, Tensor]
"""Importance of the outputs of linear layers, by the id of the layer."""

FUSED = 3
"""Queries, keys and values: so many layers, or one of so many times the outputs, open an attention."""


@dataclasses.dataclass(frozen=True)
class Group:
    """Linear layers around one inner width: those that make it from the states, and the one that reads it.

    Attributes:
        makers: names of the first.
        reader: name of the second.
        inner: the width that the reader reads.
        unit: width that shares one choice: that of a head, or of the whole MLP.
        attention: it is an attention.
    """

    makers: tuple[str, ...]
    reader: str
    inner: int
    unit: int
    attention: bool


@dataclasses.dataclass(frozen=True)
class Choice:
    """Channels that a side net takes over.

    Attributes:
        states: of the states, the same in every block.
        groups: for each block the ones inside a head, or inside an MLP, for each of its groups.
    """

    states: tuple[int, ...]
    groups: tuple[tuple[tuple[int, ...], ...], ...]


def sizes(layer: Any) -> tuple[int, int]:
    """(inputs, outputs) of a linear layer, quantised or transposed."""
    return tuple(layer.weight.shape) if hfmodel.is_conv1d(layer) else (layer.in_features, layer.out_features)


def linears(block: nn.Module) -> list[tuple[str, Any]]:
    """The linear layers of a block, in its order."""
    return [
        (name.removesuffix(".base_layer"), module)
        for name, module in hfmodel.stock_modules(block)
        if hfmodel.is_linear(module)
    ]


def groups_of(block: nn.Module, width: int, head_dim: int) -> list[Group]:
    """The groups of a block, from the order and the sizes of its linear layers; none for what is built otherwise."""
    found: list[Group] = []
    makers: list[tuple[str, int]] = []
    for name, layer in linears(block):
        given, made = sizes(layer)
        many = len(makers) >= FUSED or any(out == FUSED * given for _, out in makers)
        if makers and made == width and (given != width or many):
            attention = len(makers) >= FUSED or makers[0][1] == FUSED * given
            unit = head_dim if attention else given
            if all(out % unit == 0 for _, out in makers) and given % unit == 0:
                found.append(Group(tuple(n for n, _ in makers), name, given, unit, attention))
            makers = []
        elif given == width:
            makers.append((name, made))
        else:
            makers = []
    return found


def dense(layer: Any) -> Tensor:
    """The weight as numbers, (outputs, inputs), also of a quantised or transposed layer.

    Raises:
        UnsupportedModelError: it is packed in a form that is not known here.
    """
    weight = layer.weight.detach()
    if getattr(layer.weight, "quant_state", None) is not None:
        import bitsandbytes.functional as packed

        return packed.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    if getattr(layer.weight, "SCB", None) is not None:
        return weight.float() * (layer.weight.SCB[:, None] / 127.0)
    if type(layer.weight.data) is not Tensor and hasattr(weight, "dequantize"):
        return weight.dequantize().float()
    if not weight.is_floating_point():
        raise UnsupportedModelError(
            f"LadderSide(init='magnitude'): a {type(layer).__name__} holds its weight as {weight.dtype} in an unknown "
            f"form; use init='random'"
        )
    return weight.T if hfmodel.is_conv1d(layer) else weight


def magnitude(blocks: Sequence[nn.Module]) -> dict[int, Tensor]:
    """Row sums of the absolute weights, layer by layer."""
    return {id(layer): dense(layer).abs().sum(1).float().cpu() for block in blocks for _, layer in linears(block)}


def evenly(size: int, reduction: int, together: int = 1) -> tuple[int, ...]:
    """Every `reduction`-th channel, or every `reduction`-th run of so many, where the runs come out even.

    >>> evenly(8, 2), evenly(8, 2, together=2)
    ((0, 2, 4, 6), (0, 1, 4, 5))
    """
    run = together if size % (reduction * together) == 0 else 1
    return tuple(start + i for start in range(0, size, reduction * run) for i in range(run))


def choose(
    blocks: Sequence[nn.Module], width: int, head_dim: int, reduction: int, scores: Scores, *, rotary: int
) -> Choice:
    """The most important channels: of the states once, inside heads and MLPs for each block.

    Args:
        blocks: the blocks that get a side block.
        width: of the states.
        head_dim: of one head.
        reduction: by how much a width shrinks.
        scores: importance of the outputs of every linear layer.
        rotary: where heads turn by position, how many neighbours turn together (1 where they stand half a head apart);
            their channels are taken evenly, which keeps the frequencies. 0: they do not turn.
    """
    total = torch.zeros(width, dtype=torch.float64)
    picked: list[tuple[tuple[int, ...], ...]] = []
    for block in blocks:
        layers = dict(linears(block))
        own: list[tuple[int, ...]] = []
        for group in groups_of(block, width, head_dim):
            written = scores[id(layers[group.reader])].double()
            total += written / written.sum().clamp_min(1e-30)
            if group.attention and rotary:
                own.append(evenly(group.unit, reduction, rotary))
                continue
            made = torch.zeros(group.unit, dtype=torch.float64)
            for name in group.makers:
                made += scores[id(layers[name])].double().reshape(-1, group.unit).sum(0)
            own.append(_largest(made, group.unit // reduction))
        picked.append(tuple(own))
    states = _largest(total, width // reduction) if total.any() else evenly(width, reduction)
    return Choice(states, tuple(picked))


def _largest(scores: Tensor, count: int) -> tuple[int, ...]:
    """Indices of the largest ones, in order; the first of equal ones."""
    return tuple(sorted(torch.sort(scores, descending=True, stable=True).indices[:count].tolist()))


def cut(side: nn.Module, block: nn.Module, groups: Sequence[Group], states: Sequence[int], picks: Sequence) -> None:
    """Fill a side block with the chosen rows and columns of a block's tensors.

    What no group explains (norms inside heads, mixtures of experts) is taken evenly, or as it is where it has the size.
    """
    rows: dict[str, Tensor] = {}
    columns: dict[str, Tensor] = {}
    layers = dict(linears(block))
    channels = torch.tensor(states)
    for group, pick in zip(groups, picks):
        for name in (*group.makers, group.reader):
            given, made = sizes(layers[name])
            if name == group.reader:
                columns[name], rows[name] = _in_units(pick, group.unit, given // group.unit), channels
            else:
                columns[name], rows[name] = channels, _in_units(pick, group.unit, made // group.unit)
    own = dict(linears(side))
    with torch.no_grad():
        for name, layer in layers.items():
            taken = dense(layer).cpu()
            target: Any = own[name]
            weight = target.weight.T if hfmodel.is_conv1d(target) else target.weight
            weight.copy_(_take(taken, weight.shape, (rows.get(name), columns.get(name))))
            if target.bias is not None and layer.bias is not None:
                target.bias.copy_(_take(layer.bias.detach().cpu(), target.bias.shape, (rows.get(name),)))
        done = {f"{name}.{key}" for name in layers for key in ("weight", "bias")}
        stock = dict(block.named_parameters())
        for name, parameter in side.named_parameters():
            if name in done or name not in stock or not stock[name].is_floating_point():
                continue
            full = stock[name].detach().cpu()
            shapes = zip(parameter.shape, full.shape)
            whole = [channels if size == len(states) != was else None for size, was in shapes]
            parameter.copy_(_take(full, parameter.shape, whole))


def cut_norm(side: nn.Module, norm: nn.Module, states: Sequence[int]) -> None:
    """The same for the norm behind the stack."""
    stock = dict(norm.named_parameters())
    with torch.no_grad():
        for name, parameter in side.named_parameters():
            parameter.copy_(stock[name].detach().cpu()[list(states)])


def _in_units(pick: Sequence[int], unit: int, count: int) -> Tensor:
    return torch.tensor([start * unit + offset for start in range(count) for offset in pick])


def _take(full: Tensor, shape: Sequence[int], picks: Sequence[Tensor | None]) -> Tensor:
    for dim, (size, pick) in enumerate(zip(shape, picks)):
        if full.shape[dim] != size:
            even = torch.arange(size) * (full.shape[dim] // size)
            full = full.index_select(dim, even if pick is None or len(pick) != size else pick)
    return full


def fisher(
    model: nn.Module, blocks: Sequence[nn.Module], rows: Iterable[Mapping[str, Any]], run: Callable[..., Tensor]
) -> dict[int, Tensor]:
    """Row sums of squared gradients, one example at a time; gradients are let go of as they come.

    Args:
        model: the whole model, in evaluation mode.
        blocks: whose linear layers are scored.
        rows: one batch for each example.
        run: (model, batch) -> loss.
    """
    layers = {id(layer): layer for block in blocks for _, layer in linears(block)}
    scores = {key: torch.zeros(sizes(layer)[1]) for key, layer in layers.items()}
    flags = [(p, p.requires_grad) for p in model.parameters()]
    grads = [(layer.weight, layer.weight.grad) for layer in layers.values()]
    hooks = []

    def add(key: int, turned: bool) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            grad = parameter.grad
            parameter.grad = None
            if grad is not None:
                scores[key] += grad.square().sum(0 if turned else 1).float().cpu()

        return hook

    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        for key, layer in layers.items():
            layer.weight.requires_grad_(True)
            layer.weight.grad = None
            hooks.append(layer.weight.register_post_accumulate_grad_hook(add(key, hfmodel.is_conv1d(layer))))
        for row in rows:
            run(model, row).backward()
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for weight, grad in grads:
            weight.grad = grad
    return scores
