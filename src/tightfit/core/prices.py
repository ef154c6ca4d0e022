"""What one operator of a simulated step takes, from tables of what operators take on a machine.

Matrix products are priced by their three dimensions, fused attention by its work and length, all else by its kind and
number of elements: kinds differ in the memory they touch and the arithmetic they do. What every operator costs before
it computes anything is not part of the price.
"""

from __future__ import annotations

import bisect
import itertools
import math
from typing import Any

Shape = tuple[int, ...]
Shapes = tuple[Shape, ...]

_KINDS = {
    "add": "add sub mul maximum minimum where masked_fill logical_and bitwise_and bitwise_or le lt ge gt eq ne "
    "rsub atan2 threshold_backward addcmul lerp",
    "scale": "neg abs pow reciprocal relu clamp clamp_min clamp_max round floor ceil sign logical_not bitwise_not "
    "isnan isinf threshold hardtanh leaky_relu triu tril _to_copy",
    "add_": "add_ sub_ mul_ masked_fill_ where_ index_add_ scatter_add_ scatter_ index_put_ index_copy_",
    "scale_": "neg_ clamp_ clamp_min_ clamp_max_ round_ abs_ div_ sqrt_ reciprocal_ relu_",
    "lerp_": "lerp_",
    "addcmul_": "addcmul_",
    "addcdiv_": "addcdiv_",
    "div": "div addcdiv remainder fmod floor_divide",
    "sqrt": "sqrt rsqrt",
    "fill": "zeros_like ones_like full_like full zeros ones zero_ fill_ new_zeros new_ones new_full scalar_tensor "
    "arange nll_loss_backward nll_loss2d_backward",
    "copy": "clone copy_ contiguous embedding index_select gather index repeat roll flip slice_scatter select_scatter "
    "index_put scatter scatter_add index_add constant_pad_nd slice_backward select_backward "
    "embedding_dense_backward repeat_interleave _unsafe_index im2col col2im",
    "permuted": "cat stack unfold unfold_backward",
    "exp": "exp exp_ log log_ log1p sigmoid sigmoid_backward sin cos softplus logit",
    "tanh": "tanh tanh_backward",
    "gelu": "gelu erf",
    "gelu_backward": "gelu_backward",
    "silu": "silu",
    "silu_backward": "silu_backward",
    "softmax": "_softmax _log_softmax softmax log_softmax logsumexp",
    "safe_softmax": "_safe_softmax",
    "softmax_backward": "_softmax_backward_data _log_softmax_backward_data",
    "layer_norm": "native_layer_norm _fused_rms_norm native_group_norm native_batch_norm",
    "layer_norm_backward": "native_layer_norm_backward _fused_rms_norm_backward native_group_norm_backward",
    "sum": "sum mean norm linalg_vector_norm amax amin max min argmax argmin var std any all cumsum prod",
    "bernoulli_": "bernoulli_ native_dropout rand rand_like uniform_ bernoulli random_ randint",
    "normal_": "normal_ randn randn_like exponential_ multinomial randperm",
    "sort": "sort topk argsort",
}
KIND = {name: kind for kind, names in _KINDS.items() for name in names.split()}
NOTHING = {
    *("_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias"),
    *("_local_scalar_dense", "nll_loss_forward", "lift_fresh", "set_", "resize_", "is_same_size", "external"),
}
_BY_OUTPUT = {"embedding", "index_select", "gather", "index", "expand"}
_FILLED = {"embedding_dense_backward", "slice_backward", "select_backward", "constant_pad_nd", "index_put"}
_PRODUCTS = {"mm": 0, "addmm": 1, "bmm": 0, "baddbmm": 1, "linear": 0, "addmv": 1, "mv": 0}
_ALONE = {"add": "scale", "add_": "scale_"}
_LONG_ROW = 1 << 11


def base_name(operator: str) -> str:
    """The operator without namespace and overload.

    >>> base_name("aten.add_.Tensor"), base_name("aten.clone.default/permuted")
    ('add_', 'clone')
    """
    return operator.split(".")[1] if "." in operator else operator


def price(operator: str, inputs: Shapes, outputs: Shapes, tables: dict[str, Any]) -> tuple[str, float]:
    """(kind, seconds) of one call.

    Args:
        operator: its name, with "/permuted" or "/transposed" where it reads another layout than it writes.
        inputs, outputs: shapes of its tensors.
        tables: "kinds", "products" and "attention" of the call's element type.
    """
    name = base_name(operator)
    kinds = tables["kinds"]
    if name in NOTHING:
        return "nothing", 0.0
    if name in _PRODUCTS:
        return "product", _product(name, inputs[_PRODUCTS[name] :], tables["products"])
    if "convolution" in name:
        return "product", _convolution(name, inputs, outputs, tables["products"]["single"])
    if name.startswith("_scaled_dot_product"):
        return "attention", _attention(name, inputs, tables["attention"])
    if name.startswith("_fused_rms_norm"):
        pass
    elif name.startswith("_fused"):
        return "optimizer", along(kinds["fused"], _elements(inputs) / 4)
    if name.startswith(("_foreach", "_amp_foreach")):
        return "optimizer", _lists(operator, inputs, kinds)
    if name in _FILLED:
        moved = math.prod(inputs[-1 if name == "index_put" else 0]) if inputs else 0
        return "copy", along(kinds["fill"], _elements(outputs)) + along(kinds["permuted"], moved)
    kind = _kind(name, inputs, outputs) or (name if name in kinds else None)
    by_output = name in _BY_OUTPUT or kind == "fill"
    size = _elements(outputs) if by_output else max(_largest(inputs), _largest(outputs))
    if kind is None:
        return "unknown", along(kinds["copy"], size)
    layout = operator.partition("/")[2]
    extra = max(0.0, along(kinds[layout], size) - along(kinds["copy"], size)) if layout else 0.0
    return kind, along(kinds[kind], size) + extra


def _kind(name: str, inputs: Shapes, outputs: Shapes) -> str | None:
    kind = KIND.get(name)
    if kind in _ALONE and sum(math.prod(shape) > 1 for shape in inputs) < 2:
        return _ALONE[kind]
    if kind == "sum" and inputs and inputs[0] and not (outputs and outputs[0] and outputs[0][-1] == inputs[0][-1]):
        return "mean"
    if kind in ("softmax", "softmax_backward") and inputs[0] and inputs[0][-1] >= _LONG_ROW:
        return f"log_{kind}"
    return kind


def _elements(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes)


def _largest(shapes: Shapes) -> int:
    return max((math.prod(shape) for shape in shapes), default=0)


def _lists(operator: str, inputs: Shapes, kinds) -> float:
    """One operator over lists of tensors works through them tensor by tensor."""
    name = base_name(operator).removeprefix("_amp").removeprefix("_foreach_")
    kind = KIND.get(name, "add_")
    lists = {"lerp_": 2, "addcmul_": 3, "addcdiv_": 3}.get(kind, 2 if operator.endswith(".List") else 1)
    if lists == 1:
        kind = _ALONE.get(kind, kind)
    sizes = [math.prod(shape) for shape in inputs]
    return sum(along(kinds[kind], size) for size in sizes if size) / lists


# -- products and attention -------------------------------------------------------------------------------------------


def _product(name: str, operands: Shapes, tables) -> float:
    if len(operands) < 2 or not operands[0]:
        return 0.0
    left, right = operands[0], operands[1]
    if name == "linear":
        right = right[::-1]
    n = right[-1] if len(right) > 1 else 1
    if len(left) == 3 and name != "linear":
        return left[0] * product_seconds(tables["batched"], left[1], n, left[-1])
    return product_seconds(tables["single"], math.prod(left[:-1]), n, left[-1])


def _convolution(name: str, inputs: Shapes, outputs: Shapes, table) -> float:
    """As the product of the unfolded images with the kernels; its backward is two such products."""
    backward = "backward" in name
    made, kernels = (inputs[0], inputs[2]) if backward else (outputs[0], inputs[1])
    positions = made[0] * math.prod(made[2:])
    return (1 + backward) * product_seconds(table, positions, kernels[0], math.prod(kernels[1:]))


def product_seconds(table: dict[tuple[int, int, int], float], m: int, n: int, k: int) -> float:
    """Seconds of an (m, k) by (k, n) product, interpolated on the logarithms; beyond the table it grows linearly.

    >>> table = {(m, n, k): 1e-9 * m * n * k for m in (8, 32) for n in (8, 32) for k in (8, 32)}
    >>> round(product_seconds(table, 16, 16, 64) * 1e9)
    16384
    """
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


def _attention(name: str, inputs: Shapes, tables) -> float:
    backward = "backward" in name
    query, key = (inputs[1], inputs[2]) if backward else (inputs[0], inputs[1])
    work = math.prod(query[:-2]) * query[-2] * key[-2] * query[-1]
    return work * along_rate(tables["backward" if backward else "forward"], key[-2])


# -- curves -----------------------------------------------------------------------------------------------------------


def along(points: list[tuple[int, float]], size: float) -> float:
    """Seconds at `size` elements: straight lines between the points, from zero and beyond the last.

    >>> along([(10, 1.0), (20, 3.0)], 5), along([(10, 1.0), (20, 3.0)], 15), along([(10, 1.0), (20, 3.0)], 40)
    (0.5, 2.0, 6.0)
    """
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
