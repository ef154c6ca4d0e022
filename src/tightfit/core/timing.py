"""Step time from the operators of a simulated step and what a machine takes for each.

A simulated step lists its operators with their shapes. Each is priced from tables that `calibrate` measured on this
machine: matrix products by their three dimensions, everything else by its kind and number of elements, plus what
every operator costs before it computes anything, which differs between forward (Python runs the modules), backward
(the engine runs) and optimizer. Outputs so large that the allocator fetches them fresh from the system each time pay
for their pages. Only ratios between two steps are promised: a busy machine is slow for both.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tightfit.core.simulate import Simulation

Shape = tuple[int, ...]

FRESH_BYTES = 32 << 20
"""glibc hands blocks above this size back to the system when they are freed, so each new one is faulted in again."""

MEDIAN_ERROR, WORST_ERROR = 0.05, 0.15
"""What the ratio of two step times is promised to be off by; benchmarks/scenarios/time_model.py measures it."""

_KINDS = {
    "add": "add sub mul maximum minimum where masked_fill logical_and bitwise_and bitwise_or le lt ge gt eq ne "
    "add_bias rsub atan2 threshold_backward addcmul lerp",
    "scale": "neg abs pow reciprocal relu clamp clamp_min clamp_max round floor ceil sign logical_not bitwise_not "
    "isnan isinf threshold hardtanh leaky_relu triu tril",
    "add_": "add_ sub_ mul_ div_ masked_fill_ copy_ where_ neg_ clamp_ index_add_ scatter_add_ "
    "scatter_ index_put_ index_copy_ round_ abs_",
    "lerp_": "lerp_",
    "addcmul_": "addcmul_",
    "addcdiv_": "addcdiv_",
    "div": "div addcdiv remainder fmod floor_divide",
    "sqrt": "sqrt rsqrt sqrt_",
    "fill": "zeros_like ones_like full_like full zeros ones zero_ fill_ new_zeros new_ones new_full scalar_tensor "
    "arange",
    "copy": "clone cat stack _to_copy contiguous embedding index_select gather index repeat roll flip unfold "
    "slice_scatter select_scatter index_put scatter scatter_add index_add constant_pad_nd slice_backward "
    "select_backward embedding_dense_backward repeat_interleave _unsafe_index im2col col2im",
    "exp": "exp exp_ log log_ log1p sigmoid sigmoid_backward sin cos softplus logit",
    "tanh": "tanh tanh_backward",
    "gelu": "gelu erf",
    "gelu_backward": "gelu_backward",
    "silu": "silu",
    "silu_backward": "silu_backward",
    "softmax": "_softmax _safe_softmax _log_softmax softmax log_softmax logsumexp",
    "softmax_backward": "_softmax_backward_data _log_softmax_backward_data",
    "layer_norm": "native_layer_norm _fused_rms_norm native_group_norm native_batch_norm",
    "layer_norm_backward": "native_layer_norm_backward _fused_rms_norm_backward native_group_norm_backward",
    "sum": "sum mean norm linalg_vector_norm amax amin max min argmax argmin var std any all cumsum prod",
    "bernoulli_": "bernoulli_ native_dropout rand rand_like uniform_ bernoulli random_ randint",
    "normal_": "normal_ randn randn_like exponential_ multinomial randperm",
    "sort": "sort topk argsort",
}
KIND = {name: kind for kind, names in _KINDS.items() for name in names.split()}
_NOTHING = {
    *("_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias"),
    *("_local_scalar_dense", "nll_loss_forward", "lift_fresh", "set_", "resize_", "is_same_size", "external"),
}
_BY_OUTPUT = {"embedding", "index_select", "gather", "index", "nll_loss_backward", "fill", "expand"}
_FILLED = {"embedding_dense_backward", "slice_backward", "select_backward", "constant_pad_nd", "index_put"}
_PRODUCTS = {"mm": 0, "addmm": 1, "bmm": 0, "baddbmm": 1, "linear": 0, "addmv": 1, "mv": 0}
_ATTENTION = "_scaled_dot_product"


@dataclasses.dataclass(frozen=True)
class Coefficients:
    """What one machine takes for each kind of operator; made by `calibrate`.

    Attributes:
        machine: device, torch version and thread count they hold for.
        kinds: element type -> kind -> [(elements, seconds)], the dispatch of a tiny call taken off.
        products: element type -> "single" or "batched" -> dimensions -> seconds of one product.
        attention: element type -> "forward" or "backward" -> [(length, seconds per head, query, key and channel)].
        dispatch: phase -> seconds per operator.
        fresh: seconds per byte of memory that the system hands out fresh.
        measured: False for the built-in coefficients of another machine.
    """

    machine: dict[str, Any]
    kinds: dict[str, dict[str, list[tuple[int, float]]]]
    products: dict[str, dict[str, dict[tuple[int, int, int], float]]]
    attention: dict[str, dict[str, list[tuple[int, float]]]]
    dispatch: dict[str, float]
    fresh: float
    measured: bool = True

    def note(self) -> str:
        """One line on where the figures come from and how far off they may be."""
        error = f"median {MEDIAN_ERROR:.0%}, at worst {WORST_ERROR:.0%}"
        if self.measured:
            return f"relative step time is predicted from this machine's calibration; expected error {error}"
        known = self.machine.get("device", "another machine")
        return (
            f"relative step time is predicted with built-in coefficients ({known}); run tightfit.calibrate() for this "
            f"machine's own (then: expected error {error})"
        )

    def to_json(self) -> dict[str, Any]:
        """The coefficients as JSON values."""
        products = {
            dtype: {how: [[*dims, t] for dims, t in table.items()] for how, table in tables.items()}
            for dtype, tables in self.products.items()
        }
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "measured"}
        return fields | {"products": products}

    @classmethod
    def from_json(cls, data: dict[str, Any], *, measured: bool = True) -> Coefficients:
        """The inverse of `to_json`."""
        products = {
            dtype: {how: {(m, n, k): t for m, n, k, t in rows} for how, rows in tables.items()}
            for dtype, tables in data["products"].items()
        }
        return cls(**{**data, "products": products}, measured=measured)


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Predicted seconds of one step; only ratios between two of them mean anything.

    Attributes:
        phases: forward, backward, recompute, clip, optimizer, zero_grad -> seconds.
        by_kind: kind of operator -> seconds.
        unpriced: operators no table knows, priced as copies of their bytes.
    """

    phases: dict[str, float]
    by_kind: dict[str, float]
    unpriced: frozenset[str] = frozenset()

    @property
    def seconds(self) -> float:
        return sum(self.phases.values())


def relative_step_time(
    step: Simulation, stock: Simulation, coefficients: Coefficients, *, repeat: int = 1, stock_repeat: int = 1
) -> float:
    """Predicted time of one simulated step as a ratio to another.

    Args:
        step, stock: two simulated steps.
        coefficients: from `tightfit.core.calibrate.coefficients()`.
        repeat, stock_repeat: micro-batches that make up each optimizer step (accumulation).

    Example:
        >>> from tightfit.core.calibrate import coefficients
        >>> from tightfit import Checkpointing, plan, skeleton
        >>> from transformers import BertConfig
        >>> model = skeleton(BertConfig(num_hidden_layers=2), task="sequence-classification")
        >>> stock, slow = (plan(model, recipe, batch=(4, 32)).simulation for recipe in (None, Checkpointing()))
        >>> relative_step_time(slow, stock, coefficients(measure=False)) > 1
        True
    """
    reference = accumulated(step_time(stock, coefficients), stock_repeat)
    return accumulated(step_time(step, coefficients), repeat) / reference


def accumulated(time: StepTime, repeat: int) -> float:
    """Seconds of an optimizer step over `repeat` micro-batches like the one that was simulated."""
    once = sum(time.phases.get(name, 0.0) for name in ("clip", "optimizer", "zero_grad"))
    return repeat * (time.seconds - once) + once


def step_time(simulation: Simulation, coefficients: Coefficients) -> StepTime:
    """Price every operator of a simulated step."""
    phases: dict[str, float] = {}
    kinds: dict[str, float] = {}
    unpriced = set()
    for phase, size in fresh_bytes(simulation).items():
        phases[phase] = size * coefficients.fresh
    kinds["fresh"] = sum(phases.values())
    for (phase, operator, dtype, inputs, outputs), number in simulation.calls.items():
        name = base_name(operator)
        kind, seconds = _price(name, dtype, inputs, outputs, coefficients)
        if kind == "unknown":
            unpriced.add(operator)
        seconds += coefficients.dispatch.get(phase, coefficients.dispatch["forward"])
        phases[phase] = phases.get(phase, 0.0) + number * seconds
        kinds[kind] = kinds.get(kind, 0.0) + number * seconds
    return StepTime(phases, kinds, frozenset(unpriced))


def fresh_bytes(simulation: Simulation) -> dict[str, float]:
    """Bytes per phase that a step's allocations fault in anew, the way glibc's allocator keeps and returns memory.

    Blocks above `FRESH_BYTES` always come from the system. The rest comes from a heap that keeps what was freed at
    its top until that is twice the largest block freed so far, and then returns it.
    """
    out: dict[str, float] = {}
    largest = 0
    for (phase, operator, dtype, _, outputs), number in simulation.calls.items():
        if base_name(operator).endswith("_") or base_name(operator) in _NOTHING:
            continue
        width = 2 if "16" in dtype else 4
        for shape in outputs:
            size = width * math.prod(shape)
            if size > FRESH_BYTES:
                out[phase] = out.get(phase, 0.0) + number * size
                largest = FRESH_BYTES
            largest = max(largest, min(size, FRESH_BYTES))
    levels = simulation.timeline.levels
    high = before = simulation.static_bytes
    for turn in (0, 1):  # a step begins with the heap as the step before left it
        for phase, level in zip(simulation.timeline.phases, levels):
            change, before = level - before, level
            if abs(change) > FRESH_BYTES:
                high += change
            if level > high:
                if turn:
                    out[phase] = out.get(phase, 0.0) + level - high
                high = level
            elif high - level > 1.9 * largest:
                high = level
    return out


def base_name(operator: str) -> str:
    """The operator without namespace and overload.

    >>> base_name("aten.add_.Tensor")
    'add_'
    """
    return operator.split(".")[1] if "." in operator else operator


def _price(name: str, dtype: str, inputs, outputs, c: Coefficients) -> tuple[str, float]:
    if name in _NOTHING:
        return "nothing", 0.0
    if name in _PRODUCTS:
        return "product", _product(name, inputs[_PRODUCTS[name] :], _of(c.products, dtype))
    if name.startswith(_ATTENTION):
        return "attention", _attention(name, inputs, outputs, _of(c.attention, dtype))
    tables = _of(c.kinds, dtype)
    if name.startswith(("_foreach", "_fused", "_amp_foreach")):
        return "foreach", _lists(name, inputs, tables)
    kind = KIND.get(name)
    if name in _FILLED:
        moved = math.prod(inputs[0]) if inputs else 0
        return "copy", along(tables["fill"], _elements(outputs)) + along(tables["copy"], moved)
    by_output = name in _BY_OUTPUT or kind == "fill"
    size = _elements(outputs) if by_output else max(_largest(inputs), _largest(outputs))
    if kind is None:
        return "unknown", along(tables["copy"], size)
    return kind, along(tables[kind], size)


def _of(tables: dict[str, Any], dtype: str) -> Any:
    """The tables of an element type; those of float32 stand in for one that was not measured."""
    return tables.get(dtype.removeprefix("torch.")) or tables["float32"]


def _elements(shapes) -> int:
    return sum(math.prod(shape) for shape in shapes)


def _largest(shapes) -> int:
    return max((math.prod(shape) for shape in shapes), default=0)


def _lists(name: str, inputs, tables) -> float:
    """One operator over lists of tensors: it touches all of them once, tensor by tensor."""
    if name.startswith("_fused"):
        return 0.6 * along(tables["add_"], _elements(inputs))
    return sum(along(tables["add_"], math.prod(shape)) for shape in inputs) / 2


def _product(name: str, operands, tables) -> float:
    if len(operands) < 2 or not operands[0]:
        return 0.0
    left, right = operands[0], operands[1]
    k = left[-1]
    if name == "linear":
        right = right[::-1]
    n = right[-1] if len(right) > 1 else 1
    if len(left) == 3 and name != "linear":
        return left[0] * product_seconds(tables["batched"], left[1], n, k)
    return product_seconds(tables["single"], math.prod(left[:-1]), n, k)


def product_seconds(table: dict[tuple[int, int, int], float], m: int, n: int, k: int) -> float:
    """Seconds of an (m, k) by (k, n) product, interpolated on the logarithms; beyond the table it grows linearly."""
    grid = sorted({dims[0] for dims in table})
    scale, corners = 1.0, []
    for size in (m, n, k):
        size = max(1, size)
        inside = min(max(size, grid[0]), grid[-1])
        scale *= max(1.0, size / grid[-1])
        upper = min(max(1, bisect.bisect_left(grid, inside)), len(grid) - 1)
        low, high = grid[upper - 1], grid[upper]
        weight = math.log(inside / low) / math.log(high / low)
        corners.append(((low, 1 - weight), (high, weight)))
    total = 0.0
    for a, wa in corners[0]:
        for b, wb in corners[1]:
            for c, wc in corners[2]:
                if wa * wb * wc:
                    total += wa * wb * wc * math.log(table[a, b, c])
    return scale * math.exp(total)


def _attention(name: str, inputs, outputs, tables) -> float:
    backward = "backward" in name
    query, key = (inputs[1], inputs[2]) if backward else (inputs[0], inputs[1])
    heads = math.prod(query[:-2])
    work = heads * query[-2] * key[-2] * query[-1]
    return work * along_rate(tables["backward" if backward else "forward"], key[-2])


def along(points: list[tuple[int, float]], size: float) -> float:
    """Seconds at `size` elements: straight lines between the points, from zero and beyond the last."""
    if size <= points[0][0]:
        return points[0][1] * size / points[0][0]
    position = min(bisect.bisect_left([p[0] for p in points], size), len(points) - 1)
    (low, first), (high, last) = points[position - 1], points[position]
    if size >= high:
        return last * size / high
    return first + (last - first) * (size - low) / (high - low)


def along_rate(points: list[tuple[int, float]], size: float) -> float:
    """A rate at `size`, interpolated on the logarithm of the size and constant outside."""
    if size <= points[0][0]:
        return points[0][1]
    for (low, first), (high, last) in itertools.pairwise(points):
        if size <= high:
            return first + (last - first) * math.log(size / low) / math.log(high / low)
    return points[-1][1]
