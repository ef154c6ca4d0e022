"""Which modules of a model have a fused form, and those forms as mixins."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from tightfit.core import hfmodel
from tightfit.core.marks import codec_of
from tightfit.core.tight import is_tight, state_of
from tightfit.methods.operators import probe
from tightfit.ops.activation import activation, gated_activation, slope_of
from tightfit.ops.codec import forget_packed
from tightfit.ops.dropout import dropout
from tightfit.ops.linear import add_scaled, linear
from tightfit.ops.norm import layer_norm, rms_norm
from tightfit.ops.rows import attention_masks, sample_index
from tightfit.ops.source import cast, detach_source

Found = list[tuple[nn.Module, dict[str, Any]]]
Chosen = Callable[[str], bool]

GATED = (
    ("gate_proj", "up_proj", "down_proj", "act_fn"),
    ("gate_proj", "up_proj", "down_proj", "activation_fn"),
    ("wi_0", "wi_1", "wo", "act"),
)
"""Names that gated MLPs give to (gate, up, down, activation); what the module computes is tried."""


class FusedLinear:
    """A linear layer that keeps the source of its input."""

    def forward(self, x):
        if not self.weight.requires_grad:  # type: ignore[attr-defined]
            return super().forward(x)  # type: ignore[misc]
        state = state_of(self, FusedLinear)  # type: ignore[arg-type]
        weight, bias = self.weight, self.bias  # type: ignore[attr-defined]
        return linear(x, weight, bias, transposed=state["transposed"], sole=state["sole"], codec=codec_of(self))


class FusedLora:
    """PEFT's LoRA layer, which adds the adapter's output to the frozen layer's in place."""

    def forward(self, x, *args, **kwargs):
        layer: Any = self
        active = [name for name in layer.active_adapters if name in layer.lora_A]
        plain = not (args or kwargs or layer.disable_adapters or layer.merged) and len(active) == 1
        if not plain or active[0] in layer.lora_variant or torch.compiler.is_compiling():
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        name, result = active[0], layer.base_layer(x)
        down, up = layer.lora_A[name], layer.lora_B[name]
        if getattr(layer, "cast_input_dtype_enabled", True):
            x = cast(x, down.weight.dtype)
        update = up(down(layer.lora_dropout[name](x)))
        if update.dtype != result.dtype:
            return (result + update * layer.scaling[name]).to(result.dtype)
        return add_scaled(result, update, layer.scaling[name])


class FusedLayerNorm:
    """A layer norm whose output is rebuilt."""

    def forward(self, x):
        norm: Any = self
        return layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps, codec=codec_of(self))


class FusedRMSNorm:
    """A root-mean-square norm that keeps its input only."""

    def forward(self, x, *args, **kwargs):
        if args or kwargs:  # a gate, say, which the norm may take and does not need
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        state = state_of(self, FusedRMSNorm)  # type: ignore[arg-type]
        weight, stock = self.weight, super().forward  # type: ignore[attr-defined, misc]
        rebuild = functools.partial(_with_weight, self, stock)
        return rms_norm(x, weight, state["eps"], stock, offset=state["offset"], codec=codec_of(self), rebuild=rebuild)


def _with_weight(module: Any, stock: Callable[..., Any], weight: torch.Tensor, x: torch.Tensor) -> Any:
    """The module's forward with another weight, which it may not have itself now."""
    own = module._parameters["weight"]
    module._parameters["weight"] = weight
    try:
        return stock(x)
    finally:
        module._parameters["weight"] = own


class FusedActivation:
    """An activation whose output is rebuilt."""

    def forward(self, x):
        slope = state_of(self, FusedActivation)["slope"]  # type: ignore[arg-type]
        return activation(x, super().forward, slope, codec=codec_of(self))  # type: ignore[misc]


class FusedGate:
    """A gated MLP that keeps gate and up."""

    def forward(self, x):
        state = state_of(self, FusedGate)  # type: ignore[arg-type]
        gate, up, down, act = (getattr(self, name) for name in state["names"])
        kinds = [getattr(getattr(layer, "weight", None), "dtype", None) for layer in (gate, up, down)]
        # the module casts between them, T5 for one; and what hooks make of the activation has another slope
        if len(set(kinds)) > 1 or hfmodel.is_hooked(act):
            return super().forward(x)  # type: ignore[misc]
        product = gated_activation(gate(x), up(x), act, state["slope"], codec=codec_of(self))
        return down(product if state["dropout"] is None else getattr(self, state["dropout"])(product))


class FusedDropout:
    """Dropout that keeps bits."""

    def forward(self, x):
        if not self.training or self.inplace:  # type: ignore[attr-defined]
            return super().forward(x)  # type: ignore[misc]
        return dropout(x, self.p)  # type: ignore[attr-defined]


class FusedBlock:
    """A block that takes no source from outside while it is checkpointed.

    Its recomputation gets the block's input without one, and must keep as many tensors as the forward did.
    """

    def forward(self, *args, **kwargs):
        if not (self.training and getattr(self, "gradient_checkpointing", False)):  # type: ignore[attr-defined]
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        for value in given:
            detach_source(value)
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            # the checkpoint keeps these tensors, and with them what hangs on them
            for value in given:
                detach_source(value)
                forget_packed(value)


class NoCache:
    """A backbone that keeps no keys and values for generation while it trains, unless it is asked to.

    They would hold in full what attention keeps in code.
    """

    def forward(self, *args, **kwargs):
        if self.training and kwargs.get("past_key_values") is None and kwargs.get("use_cache") is None:  # type: ignore[attr-defined]
            kwargs["use_cache"] = False
        return super().forward(*args, **kwargs)  # type: ignore[misc]


class TellsRows:
    """A block that tells its layers which rows are padding."""

    def forward(self, *args, **kwargs):
        places = state_of(self, TellsRows)["places"]  # type: ignore[arg-type]
        found = [kwargs.get(name, args[at] if at < len(args) else None) for name, at in places.items()]
        with attention_masks(*found):
            return super().forward(*args, **kwargs)  # type: ignore[misc]


def mask_places(block: nn.Module) -> dict[str, int]:
    """Names of the masks that a block's call takes, each with its position."""
    names = list(inspect.signature(block.forward).parameters)
    return {name: at for at, name in enumerate(names) if name in ("attention_mask", "encoder_attention_mask")}


class TakesIndex:
    """A model whose batches say which examples of the data set they hold."""

    def forward(self, *args, **kwargs):
        index = kwargs.pop("sample_index", None)
        index = index if self.training else None  # type: ignore[attr-defined]
        if index is not None:
            examples = state_of(self, TakesIndex)["examples"]  # type: ignore[arg-type]
            _check_index(index, examples, [t.shape[0] for t in (*args, *kwargs.values()) if torch.is_tensor(t)])
        with sample_index(index):
            return super().forward(*args, **kwargs)  # type: ignore[misc]


def _check_index(index: Any, examples: int, rows: list[int]) -> None:
    """Raise ValueError where these are not the examples of a batch."""
    integers = torch.is_tensor(index) and not index.is_floating_point() and not index.is_complex()
    if not integers or index.dim() != 1 or index.shape[0] not in rows:
        given = f"shape {tuple(index.shape)} of {index.dtype}" if torch.is_tensor(index) else repr(index)
        raise ValueError(f"sample_index: got {given}, accepted is (B,) int64, one for each row of the batch")
    if hfmodel.has_values(index) and index.numel():
        low, high = int(index.min()), int(index.max())
        if low < 0 or high >= examples:
            raise ValueError(
                f"sample_index: got {low if low < 0 else high}, accepted is [0, {examples - 1}], the numbers of the "
                f"{examples} examples of WtaCrs(examples=...)"
            )


def takes_cache(backbone: nn.Module) -> bool:
    """Whether the backbone's call takes `use_cache`."""
    return "use_cache" in inspect.signature(type(backbone).forward).parameters


def fused(mixin: type, chosen: Chosen, state: dict[str, Any]) -> Callable[[nn.Module], Found]:
    """The modules that carry a fused form already, with the state of a mark to put on them."""
    return lambda model: [(m, dict(state)) for name, m in _matching(model, chosen) if is_tight(m, mixin)]


def blocks(
    chosen: Chosen, state: Callable[[nn.Module], dict[str, Any]] = lambda block: {}
) -> Callable[[nn.Module], Found]:
    """The blocks of every stack."""

    def find(model: nn.Module) -> Found:
        names = (name for stack in hfmodel.stacks(model) for name in stack)
        unique = {id(block): block for name in names if chosen(name) for block in [model.get_submodule(name)]}
        return [(block, state(block)) for block in unique.values()]

    return find


def linears(chosen: Chosen) -> Callable[[nn.Module], Found]:
    """Unquantised linear layers, the adapters' own included."""

    def find(model: nn.Module) -> Found:
        found = []
        adapted = [name for name, module in model.named_modules() if hfmodel.is_adapter(module)]
        for name, module in _matching(model, chosen):
            plain = type(module).forward is nn.Linear.forward or hfmodel.is_conv1d(module)
            weight = getattr(module, "weight", None)
            if plain and isinstance(weight, nn.Parameter) and weight.dtype.is_floating_point:
                sole = not any(name.startswith(f"{adapter}.") for adapter in adapted)
                found.append((module, {"transposed": hfmodel.is_conv1d(module), "sole": sole}))
        return found

    return find


def lora_layers(chosen: Chosen) -> Callable[[nn.Module], Found]:
    """PEFT's LoRA layers over plain linear ones."""

    def find(model: nn.Module) -> Found:
        if "peft.tuners.lora.layer" not in sys.modules:
            return []
        from peft.tuners.lora.layer import Linear

        stock = Linear.forward
        return [(m, {}) for name, m in _matching(model, chosen) if type(m).forward is stock]

    return find


def layer_norms(chosen: Chosen) -> Callable[[nn.Module], Found]:
    """Every nn.LayerNorm."""
    return lambda model: [(m, {}) for _, m in _matching(model, chosen) if type(m).forward is nn.LayerNorm.forward]


def rms_norms(chosen: Chosen) -> Callable[[nn.Module], Found]:
    """Modules that are tried to be root-mean-square norms over their last dimension."""

    def find(model: nn.Module) -> Found:
        found = []
        for _, module in _matching(model, chosen):
            settings = vars(module)
            eps = settings.get("variance_epsilon", settings.get("eps"))
            weight = module._parameters.get("weight")
            if (
                not isinstance(eps, float)
                or weight is None
                or weight.dim() != 1
                or len(module._parameters) != 1
                or module._modules
            ):
                continue
            offset = probe.rms_offset(module, eps)
            if offset is not None:
                found.append((module, {"eps": eps, "offset": offset}))
        return found

    return find


def activations(chosen: Chosen) -> Callable[[nn.Module], Found]:
    """Pointwise modules without parameters, but for those of gated MLPs and for ReLU, whose output is kept once."""

    def find(model: nn.Module) -> Found:
        inside = {id(getattr(module, state["names"][3])) for module, state in gates(chosen)(model)}
        found = []
        for _, module in _matching(model, chosen):
            name = type(module).__name__
            if next(module.parameters(), None) is not None or module._modules or id(module) in inside:
                continue
            if ("GELU" in name or "SiLU" in name or "Activation" in name) and probe.is_pointwise(module):
                found.append((module, {"slope": slope_of(module)}))
        return found

    return find


def gates(chosen: Chosen) -> Callable[[nn.Module], Found]:
    """Gated MLPs."""

    def find(model: nn.Module) -> Found:
        found = []
        for _, module in _matching(model, chosen):
            names = next((n for n in GATED if all(hasattr(module, part) for part in n)), None)
            if names is None:
                continue
            layers = tuple(f"{name}." for name in names[:3])
            if any(not name.startswith(layers) for name, _ in module.named_parameters()):
                continue  # a factor, say, that the form does not have, be it 1 now
            dropout = next((name for name, child in module.named_children() if isinstance(child, nn.Dropout)), None)
            if probe.is_gated(module, names, dropout):
                slope = slope_of(getattr(module, names[3]))
                found.append((module, {"names": names, "slope": slope, "dropout": dropout}))
        return found

    return find


def dropouts(chosen: Chosen) -> Callable[[nn.Module], Found]:
    """Every nn.Dropout that drops."""
    return lambda model: [(m, {}) for _, m in _matching(model, chosen) if type(m) is nn.Dropout and m.p > 0]


def _matching(model: nn.Module, chosen: Chosen) -> Iterator[tuple[str, nn.Module]]:
    """Modules below the model, each once, that `where` names by their stock name."""
    for name, module in model.named_modules():
        if name and not isinstance(module, (nn.ModuleList, torch.jit.ScriptModule)) and chosen(name):
            yield name, module
