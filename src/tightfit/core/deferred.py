"""Logits that are not computed until somebody looks at them, so that the loss never holds tokens x vocabulary.

A language-model head under `DeferredHead` returns `DeferredLogits`: a tensor in type and shape that only remembers
the hidden states. What models do between head and loss (upcast, scale, soft-cap, an added bias, slicing tokens,
flattening) is remembered too; `cross_entropy` then runs chunked, straight from the hidden states. Any other use
computes the real logits on the spot and goes on exactly as stock. So no model code is touched, and an unknown model
is at worst as large as before, never wrong.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tightfit.core.errors import StateError
from tightfit.core.marks import codec_of
from tightfit.core.tight import state_of
from tightfit.ops.autograd import autocast_dtype, version
from tightfit.ops.linear_cross_entropy import linear_cross_entropy


@dataclasses.dataclass(frozen=True)
class HeadRows:
    """The rows a head multiplies with, in the order of the loss's class numbers.

    Attributes:
        weight: (K, d) rows that take part in the gradient (as far as they require it).
        bias: (K,) or None.
        frozen_weight: (D, d) rows that take part in the log-sum-exp only, wherever they live; or None.
        frozen_bias: (D,) or None.
        position: (V,) where each vocabulary id stands among the K + D rows, -1 for an absent one; None: the identity.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    frozen_weight: torch.Tensor | None = None
    frozen_bias: torch.Tensor | None = None
    position: torch.Tensor | None = None


class HeadSource:
    """Where a head's rows come from; the plain one reads the module itself."""

    def rows(self, head: nn.Module) -> HeadRows:
        return HeadRows(head.weight, getattr(head, "bias", None))  # type: ignore[arg-type]

    def width(self, head: nn.Module) -> int:
        return head.weight.shape[0]  # type: ignore[index, return-value, union-attr]

    def logits(self, head: nn.Module, hidden: torch.Tensor, stock) -> torch.Tensor:
        """The real logits (..., V); `stock` is the head's own forward."""
        return stock(hidden)

    def finish(self, head: nn.Module, logits: torch.Tensor) -> torch.Tensor:
        """Last touch on real logits, after the model's own scaling and capping."""
        return logits

    def compiled(self, head: nn.Module, hidden: torch.Tensor, stock) -> torch.Tensor:
        """The real logits where nothing can be deferred, as in a compiled graph: the model goes on from here."""
        return self.finish(head, self.logits(head, hidden, stock))

    def targets(self, head: nn.Module, target: torch.Tensor, ignore_index: int) -> torch.Tensor:
        """Class numbers for vocabulary ids, in the order of `rows`."""
        return target

    def observe(self, head: nn.Module, hidden: torch.Tensor, target: torch.Tensor, scaling: Scaling) -> None:
        """Called before each chunked loss with (N, d) and (N,), for methods that keep figures."""


class DeferredHead:
    """Mixin for a linear head: returns `DeferredLogits` instead of logits."""

    def forward(self, hidden):
        source: HeadSource = state_of(self, DeferredHead)["source"]  # type: ignore[arg-type]
        hooked = self._backward_hooks or self._backward_pre_hooks  # type: ignore[attr-defined]
        if torch.compiler.is_compiling() or hooked:
            return source.compiled(self, hidden, super().forward)  # type: ignore[misc, arg-type]
        return DeferredLogits(hidden, self, super().forward, source)  # type: ignore[misc]


@dataclasses.dataclass(frozen=True)
class Scaling:
    """z -> cap * tanh(scale * (z + shift) / cap), or scale * (z + shift) without a cap."""

    scale: float = 1.0
    cap: float | None = None
    shift: torch.Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Call:
    """How things stood when the head was called: whatever is computed later is what it would have been then.

    Attributes:
        grad: gradients were enabled.
        cast: what autocast cast products to, or None.
        versions: the head's parameters, and how often they had been written to.
    """

    grad: bool
    cast: torch.dtype | None
    versions: tuple[tuple[torch.Tensor, int], ...]

    @staticmethod
    def of(head: nn.Module, kind: str) -> Call:
        versions = tuple((p, version(p)) for p in head.parameters())
        return Call(torch.is_grad_enabled(), autocast_dtype(kind), versions)

    def again(self, kind: str) -> contextlib.ExitStack:
        """A context with the same modes.

        Raises:
            StateError: the head's parameters have changed.
        """
        if any(version(p) != seen for p, seen in self.versions):
            raise StateError(
                "logits of a language model were read after the weights of its head had changed, and they are computed "
                "when they are read first; read them before the optimizer's step (logits.detach() is enough)"
            )
        modes = contextlib.ExitStack()
        modes.enter_context(torch.set_grad_enabled(self.grad))
        if torch.amp.is_autocast_available(kind):
            # a cast without gradients must not be remembered for those who want them
            casts = torch.autocast(kind, dtype=self.cast, enabled=self.cast is not None, cache_enabled=False)
            modes.enter_context(casts)
        return modes


class DeferredLogits(torch.Tensor):
    """A tensor in type, shape and dtype; its values are computed when something needs them.

    A slice or reshape remembers what it was taken from: once real, both share memory, as in stock.
    """

    _hidden: torch.Tensor
    _head: nn.Module
    _stock: Any
    _source: HeadSource
    _call: Call
    _steps: tuple
    _view: tuple[DeferredLogits, Any] | None
    _real: torch.Tensor | None
    _version_seen: int

    @staticmethod
    def __new__(cls, hidden, head, stock, source, steps=(), dtype=None, view=None, call=None):
        shape = (*hidden.shape[:-1], source.width(head))
        dtype = dtype or autocast_dtype(hidden.device.type) or hidden.dtype
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=hidden.device)
        self._hidden, self._head, self._stock, self._source = hidden, head, stock, source
        self._call = call or Call.of(head, hidden.device.type)
        self._steps, self._view, self._real, self._version_seen = steps, view, None, 0
        return self

    def __init__(self, *args, **kwargs):
        pass

    def materialise(self) -> torch.Tensor:
        """The real logits, computed once."""
        if self._real is None:
            if self._view is not None:
                parent, function = self._view
                whole = parent.materialise()
                with torch.set_grad_enabled(self._call.grad):
                    self._real = function(whole)
            else:
                with self._call.again(self._hidden.device.type):
                    out = self._source.logits(self._head, self._hidden, self._stock)
                    for function, args, kwargs in self._steps:
                        out = function(out, *args, **kwargs)
                    self._real = self._source.finish(self._head, out)
            self._version_seen = version(self._real)
        return self._real

    def _was_written_to(self) -> bool:
        """Whether somebody changed the real logits in place, so that the hidden states no longer tell them."""
        if self._real is not None:
            return self._real.is_inference() or self._real._version != self._version_seen
        return self._view is not None and self._view[0]._was_written_to()

    def _after(self, step, dtype=None) -> DeferredLogits:
        return self._made(self._hidden, (*self._steps, step), dtype or self._dtype())

    def _viewed(self, hidden, function) -> DeferredLogits:
        return self._made(hidden, self._steps, self._dtype(), (self, function))

    def _made(self, hidden, steps, dtype, view=None) -> DeferredLogits:
        call = dataclasses.replace(self._call, grad=self._call.grad and torch.is_grad_enabled())
        return DeferredLogits(hidden, self._head, self._stock, self._source, steps, dtype, view, call)

    def _dtype(self) -> torch.dtype:
        with torch._C.DisableTorchFunctionSubclass():
            return self.dtype

    def __repr__(self):  # type: ignore[override]
        return f"DeferredLogits(shape={tuple(self.shape)})"

    def __deepcopy__(self, memo):
        return self.materialise().detach().clone()

    def __reduce_ex__(self, protocol):
        return self.materialise().__reduce_ex__(protocol)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        handler = _HANDLERS.get(func)
        if handler is not None and not any(isinstance(a, DeferredLogits) and a._was_written_to() for a in args):
            out = handler(*args, **kwargs)
            if out is not NotImplemented:
                return out
        args, kwargs = _real(args), _real(kwargs)
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]
        return func(*_real(args), **_real(kwargs or {}))


def _real(value):
    if isinstance(value, DeferredLogits):
        return value.materialise()
    if isinstance(value, tuple | list):
        return type(value)(_real(v) for v in value)
    if isinstance(value, dict):
        return {k: _real(v) for k, v in value.items()}
    return value


# -- what may stay deferred -------------------------------------------------------------------------------------


def _float(logits):
    return logits._after((torch.Tensor.float, (), {}), dtype=torch.float32)


def _to(logits, *args, **kwargs):
    dtype = kwargs.get("dtype", args[0] if args else None)
    if len(args) + len(kwargs) == 1 and dtype is not None and isinstance(dtype, torch.dtype):
        return logits._after((torch.Tensor.to, (dtype,), {}), dtype=dtype)
    device = kwargs.get("device", args[0] if args else None)
    if len(args) + len(kwargs) == 1 and isinstance(device, torch.device) and device == logits.device:
        return logits
    return NotImplemented


def _contiguous(logits, **kwargs):
    return NotImplemented if kwargs else logits._viewed(logits._hidden, torch.Tensor.contiguous)


def _multiply(logits, factor):
    if isinstance(logits, DeferredLogits) and isinstance(factor, int | float):
        return logits._after((torch.mul, (factor,), {}))
    return NotImplemented


def _divide(logits, factor, **kwargs):
    if isinstance(logits, DeferredLogits) and isinstance(factor, int | float) and not kwargs:
        return logits._after((torch.div, (factor,), {}))
    return NotImplemented


def _tanh(logits):
    return logits._after((torch.tanh, (), {}))


def _add(logits, other, **kwargs):
    if not isinstance(logits, DeferredLogits) or not torch.is_tensor(other) or kwargs or other.requires_grad:
        return NotImplemented
    if isinstance(other, DeferredLogits) or other.numel() != logits.shape[-1] or other.shape[-1] != other.numel():
        return NotImplemented
    if not other.is_floating_point() or other.dim() > logits.dim():
        return NotImplemented
    return logits._after((torch.add, (other,), {}), dtype=torch.promote_types(logits._dtype(), other.dtype))


def _view(logits, *shape, **kwargs):
    sizes = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], tuple | list | torch.Size) else shape
    if kwargs or not all(isinstance(s, int) for s in sizes) or not sizes or sizes[-1] not in (logits.shape[-1], -1):
        return NotImplemented
    if sizes[-1] == -1 and any(s == -1 for s in sizes[:-1]):
        return NotImplemented
    leading = sizes[:-1]
    if sizes[-1] == -1 and _product(leading) != _product(logits.shape[:-1]):
        return NotImplemented
    hidden = logits._hidden.reshape(*leading, logits._hidden.shape[-1])
    return logits._viewed(hidden, lambda real: real.reshape(sizes))


def _flatten(logits, start_dim=0, end_dim=-1):
    last = logits.dim() - 1
    if end_dim % logits.dim() == last:
        return NotImplemented
    return logits._viewed(
        logits._hidden.flatten(start_dim, end_dim), lambda real: torch.flatten(real, start_dim, end_dim)
    )


def _item(logits, index):
    """Slices of the token dimensions; the vocabulary dimension must stay whole."""
    parts = index if isinstance(index, tuple) else (index,)
    if not all(p is Ellipsis or (isinstance(p, slice | int) and not isinstance(p, bool)) for p in parts):
        return NotImplemented
    given = [p for p in parts if p is not Ellipsis]
    if len(parts) - len(given) > 1 or len(given) > logits.dim():
        return NotImplemented
    reaches_last = given and (len(given) == logits.dim() or (len(given) < len(parts) and parts[-1] is not Ellipsis))
    if reaches_last and given[-1] != slice(None):
        return NotImplemented
    # the hidden states have the same dimensions, so the same index picks the same tokens
    return logits._viewed(logits._hidden[index], lambda real: real[index])


def _product(sizes) -> int:
    out = 1
    for size in sizes:
        out *= size
    return out


def _scaling(steps: tuple) -> Scaling | None:
    """The steps as one scaling, or None when they are something else."""
    scale, cap, shift = 1.0, None, None
    for function, args, _ in steps:
        if function in (torch.Tensor.float, torch.Tensor.to):
            continue
        if function in (torch.mul, torch.div):
            factor = args[0] if function is torch.mul else 1.0 / args[0]
            if cap is None:
                scale *= factor
            else:
                cap *= factor  # the factor behind tanh
        elif function is torch.tanh and cap is None:
            cap = 1.0
        elif function is torch.add and shift is None and scale == 1.0 and cap is None:
            shift = args[0].reshape(-1)
        else:
            return None
    # so far: cap * tanh(scale * z); the operator wants cap * tanh(scale' * z / cap)
    return Scaling(scale if cap is None else scale * cap, cap, shift)


def _cross_entropy(
    logits,
    target,
    weight=None,
    size_average=None,
    ignore_index=-100,
    reduce=None,
    reduction="mean",
    label_smoothing=0.0,
):
    if not isinstance(logits, DeferredLogits) or isinstance(target, DeferredLogits) or weight is not None:
        return NotImplemented
    if size_average is not None or reduce is not None or logits.dim() != 2 or target.dim() != 1:
        return NotImplemented
    scaling = _scaling(logits._steps)
    if scaling is None or target.is_floating_point():
        return NotImplemented
    source, head = logits._source, logits._head
    grad = torch.is_grad_enabled()
    with logits._call.again(logits.device.type), torch.set_grad_enabled(grad and logits._call.grad):
        rows = source.rows(head)
        source.observe(head, logits._hidden, target, scaling)
        bias, frozen_bias = _shifted(rows, scaling.shift)
        loss: Any = linear_cross_entropy(
            logits._hidden,
            rows.weight,
            source.targets(head, target, ignore_index),
            bias=bias,
            frozen_weight=rows.frozen_weight,
            frozen_bias=frozen_bias,
            scale=scaling.scale,
            softcap=scaling.cap,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            codec=codec_of(head),
        )
    # autocast runs cross_entropy in float32
    return loss.to(torch.float32 if autocast_dtype(logits.device.type) else logits.dtype)


def _shifted(rows: HeadRows, shift: torch.Tensor | None):
    """The biases with a vocabulary-wide constant added (BART's final_logits_bias)."""
    if shift is None:
        return rows.bias, rows.frozen_bias
    if rows.position is None:
        return (shift if rows.bias is None else rows.bias + shift), None
    kept = rows.weight.shape[0]
    in_order = shift.new_zeros(kept + (0 if rows.frozen_weight is None else rows.frozen_weight.shape[0]))
    present = rows.position >= 0
    in_order = in_order.index_put((rows.position.clamp_min(0),), torch.where(present, shift, 0), accumulate=True)
    bias = in_order[:kept] if rows.bias is None else rows.bias + in_order[:kept]
    if rows.frozen_weight is None:
        return bias, None
    frozen = in_order[kept:]
    return bias, frozen if rows.frozen_bias is None else rows.frozen_bias + frozen


_METADATA = {
    torch.Tensor.shape.__get__,  # type: ignore[attr-defined]
    torch.Tensor.dtype.__get__,  # type: ignore[attr-defined]
    torch.Tensor.device.__get__,  # type: ignore[attr-defined]
    torch.Tensor.layout.__get__,  # type: ignore[attr-defined]
    torch.Tensor.ndim.__get__,  # type: ignore[attr-defined]
    torch.Tensor.is_cuda.__get__,  # type: ignore[attr-defined]
    torch.Tensor.is_sparse.__get__,  # type: ignore[attr-defined]
    torch.Tensor.is_meta.__get__,  # type: ignore[attr-defined]
    torch.Tensor.dim,
    torch.Tensor.size,
    torch.Tensor.numel,
    torch.Tensor.__len__,
    torch.Tensor.is_floating_point,
    torch.Tensor.is_complex,
    torch.is_floating_point,
    torch.is_complex,
}

_HANDLERS: dict[Any, Any] = {
    torch.Tensor.float: _float,
    torch.Tensor.to: _to,
    torch.Tensor.contiguous: _contiguous,
    torch.Tensor.mul: _multiply,
    torch.Tensor.__mul__: _multiply,
    torch.Tensor.__rmul__: _multiply,
    torch.mul: _multiply,
    torch.Tensor.div: _divide,
    torch.Tensor.__truediv__: _divide,
    torch.div: _divide,
    torch.Tensor.tanh: _tanh,
    torch.tanh: _tanh,
    torch.Tensor.add: _add,
    torch.Tensor.__add__: _add,
    torch.add: _add,
    torch.Tensor.view: _view,
    torch.Tensor.reshape: _view,
    torch.Tensor.flatten: _flatten,
    torch.Tensor.__getitem__: _item,
    F.cross_entropy: _cross_entropy,
}
