"""Lora: low-rank adapters by PEFT, as a transform (arXiv 2106.09685)."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import enum
import functools
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import nn

from tightfit.core import hfmodel
from tightfit.core.edits import Claim, Edit, Handle, Part, is_planning
from tightfit.core.errors import StateError, UnsupportedModelError, shorten
from tightfit.core.fields import check_bool, check_float, check_int, check_selector, near
from tightfit.core.host import to_host
from tightfit.core.later import Later
from tightfit.core.new_modules import own_random
from tightfit.core.parameter import has_sharded, is_sharded, whole
from tightfit.core.quantised import is_quantised
from tightfit.core.select import select
from tightfit.core.transform import Context, Slot, Transform

ADAPTER = "default"
_PATTERNS = ("target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern", "modules_to_save")
"""Fields of a PEFT config that are, or hold, regular expressions."""
_REPEATED_GROUP = re.compile(r"\)[*+{]")
_REPEAT = re.compile(r"(?<!\\)[*+{]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lora(Transform):
    """Train low-rank adapters on frozen linear layers; PEFT does the work.

    Saves the gradients and optimizer state of the frozen weights; saved activations stay as large as without it
    (pair it with `Checkpointing`). The task head of a classifier stays trainable; a language-model head does not.

    Fields:
        rank: inner dimension of the adapters.
        alpha: scale; the adapters' output is multiplied by alpha / rank.
        dropout: on the adapters' input.
        where: which linear layers; default: those inside the blocks, but for routers that give more than a tensor
            and layers whose weight a state-space mixer reads past the layer: an adapter there would take no part.
        train_head: keep a task head (a classifier) trainable.
        config: any `peft` config instead (a `PeftConfig` or its dict); then the fields above, save `train_head`,
            must keep their defaults.

    Raises:
        ValueError, TypeError: a field is out of range, or `config` is mixed with other fields.
        SelectorError: a pattern of `where` matches no linear layer (when the recipe is planned or applied).

    Example:
        >>> import tightfit
        >>> tightfit.chain(tightfit.Lora(rank=16, where="query|value"), tightfit.Checkpointing())
        chain(Lora(rank=16, where='query|value'), Checkpointing())

    Source: LoRA, arXiv 2106.09685, section 4.1, through PEFT. Stock names gain PEFT's `base_layer` while it is
    applied; `merge` and `export` give stock names back. Adapters that begin with a part of the weights (a `config`
    with init_lora_weights="pissa", say) keep a copy of these in host memory, for `remove`.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    where: str | None = None
    train_head: bool = True
    config: Any = dataclasses.field(default=None, hash=False)

    name: ClassVar[str] = "lora"
    paper: ClassVar[str] = "2106.09685"
    touches: ClassVar[frozenset[Slot]] = frozenset({Slot.NEW_PARAMETERS})
    exact: ClassVar[bool] = False
    reversible: ClassVar[bool] = True
    summary: ClassVar[str] = "low-rank adapters on frozen linear layers (PEFT)"

    def __post_init__(self) -> None:
        check_int(self, "rank", 1)
        check_float(self, "alpha", 0, open_low=True)
        check_float(self, "dropout", 0, 1, open_high=True)
        check_selector(self, "where", optional=True)
        check_bool(self, "train_head")
        if self.config is None:
            return
        object.__setattr__(self, "config", _checked_config(self.config))
        mixed = [
            f
            for f, default in (("rank", 8), ("alpha", 16.0), ("dropout", 0.0), ("where", None))
            if getattr(self, f) != default
        ]
        if mixed:
            raise ValueError(f"Lora({mixed[0]}=..., config=...): give either the fields or a peft config, not both")

    @classmethod
    def candidates(cls, model: nn.Module) -> Iterator[Lora]:
        if hfmodel.adaptable_linears(model):
            yield from (cls(rank=16), cls(rank=4))

    def freezes(self, model: nn.Module) -> Iterator[str]:
        head = set(hfmodel.head_parameters(model)) if self.train_head else set()
        return (name for name, _ in model.named_parameters() if name not in head)

    def edits(self, model: nn.Module, context: Context) -> Iterator[Edit]:
        held = [name for name, module in model.named_modules() if hfmodel.is_adapter(module)]
        if held or "peft_config" in vars(model):
            raise StateError(
                f"Lora: {type(model).__name__} already carries PEFT adapters (at {shorten(held, 3) or 'the model'}); "
                f"merge them first, or leave Lora out of the recipe"
            )
        targets = self._targets(model)
        head = tuple(hfmodel.head_parameters(model)) if self.train_head else ()
        note = (
            f"rank {self.rank} on {len(targets)} linear layers"
            if self.config is None
            else str(self.config["peft_type"])
        )
        config = self._peft_config(model, targets)
        # a peft config chooses its layers itself, so any in the blocks may be among them
        may = tuple(targets or hfmodel.block_linears(model))
        part = Copies() if _takes_from_base(config) else None
        yield AdapterEdit(targets=tuple(targets), may_touch=may, config=config, head=head, note=note, part=part)

    def _targets(self, model: nn.Module) -> list[str]:
        if self.config is not None:
            return []
        if self.where is not None:
            return select(model, self.where, kind=hfmodel.is_linear, method="Lora")
        targets = hfmodel.adaptable_linears(model)
        if not targets:
            raise UnsupportedModelError(
                f"Lora: {type(model).__name__} has no stack of blocks with linear layers; name the layers with where="
            )
        return targets

    def _peft_config(self, model: nn.Module, targets: list[str]):
        import peft

        if self.config is not None:
            fields = {k: v for k, v in self.config.items() if k != "peft_type"}
            return peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(self.config["peft_type"])](**fields)
        return peft.LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            target_modules=targets,
            fan_in_fan_out=all(hfmodel.is_conv1d(hfmodel.stock_module(model, t)) for t in targets),
        )


def _checked_config(config: Any) -> dict[str, Any]:
    """A peft config as JSON values, refused where PEFT cannot inject it into a model in place."""
    import peft

    if not isinstance(config, dict):
        if not hasattr(config, "to_dict") or not hasattr(config, "peft_type"):
            raise TypeError(f"Lora(config=...): got {config!r}, accepted is a peft config or its dict")
        config = config.to_dict()
    if "peft_type" not in config:
        raise ValueError("Lora(config=...): the dict has no 'peft_type', accepted is PeftConfig.to_dict()")
    config = {key: _plain(value) for key, value in config.items()}
    known = [str(kind.value) for kind in peft.PeftType]
    kind = config["peft_type"]
    if kind not in known:
        raise ValueError(f"Lora(config=...): unknown peft_type {kind!r}{near(kind, known)}")
    tuner = peft.PEFT_TYPE_TO_TUNER_MAPPING.get(peft.PeftType(kind))  # type: ignore[attr-defined]
    if tuner is None or not issubclass(tuner, peft.tuners.tuners_utils.BaseTuner):
        raise ValueError(
            f"Lora(config=...): {kind} does not put adapters into layers, accepted are the kinds that do (LORA, IA3, "
            f"OFT, ...); use peft.get_peft_model for {kind}"
        )
    if kind == "ADALORA":
        raise ValueError(
            f"Lora(config=...): {kind} adds to the loss, and shares out its ranks when the script calls "
            f"update_and_allocate() of PEFT's own model, which a recipe does not have; use peft.get_peft_model for it"
        )
    if kind == "SHIRA":
        raise ValueError(
            f"Lora(config=...): {kind} draws the places of the weights that it trains and keeps them in no tensor of "
            f"the model, so its result could not be loaded; use peft.get_peft_model for it"
        )
    config.pop("peft_version", None)
    fields = {f.name: f for f in dataclasses.fields(peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind)])}
    unknown = sorted(set(config) - set(fields))
    if unknown:
        raise ValueError(f"Lora(config=...): {kind} has no field {unknown[0]!r}{near(unknown[0], sorted(fields))}")
    config = {key: value for key, value in config.items() if key == "peft_type" or value != _default(fields[key])}
    for field in _PATTERNS:
        _check_patterns(field, config.get(field))
    for field in ("megatron_config", "adapters"):
        if config.get(field):
            raise ValueError(
                f"Lora(config=...): {field} imports or fetches what a recipe only names; use peft.get_peft_model for it"
            )
    for field in ("trainable_token_indices", "target_parameters"):
        if config.get(field):
            raise ValueError(
                f"Lora(config=...): {field} changes parameters that are no linear layer's, which this transform cannot "
                f"undo or merge; use peft.get_peft_model for it"
            )
    return config


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _check_patterns(field: str, value: Any) -> None:
    """A search with a regular expression has no end where one repeats what is repeated already."""
    for text in [value] if isinstance(value, str) else value or ():
        if isinstance(text, str) and (_REPEATED_GROUP.search(text) or len(_REPEAT.findall(text)) > 4):
            raise ValueError(
                f"Lora(config=...): {field} has the expression {text!r}, accepted are expressions without repeated "
                f"groups and with at most 4 repeats; give a list of layer names"
            )


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return {k: _plain(v) for k, v in value.items()} if isinstance(value, dict) else value


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class AdapterEdit(Edit):
    """Let PEFT inject its adapters in place."""

    slot: Slot = Slot.NEW_PARAMETERS
    targets: tuple[str, ...]
    may_touch: tuple[str, ...]
    config: Any
    head: tuple[str, ...]
    part: Copies | None = None

    @property
    def target(self) -> str:
        return f"{len(self.targets)} linear layers" if self.targets else "as its config says"

    def claims(self) -> frozenset[Claim]:
        return frozenset((self.slot, name) for name in self.may_touch) or super().claims()

    def run(self, model: nn.Module) -> Handle:
        return _AdapterHandle(model, self)


class Copies(Part):
    """Weights as they were before adapters took a part of them, in host memory."""

    def __init__(self) -> None:
        self.weights: list[tuple[nn.Parameter, torch.Tensor]] = []

    def take(self, model: nn.Module) -> None:
        """Copy every weight; which ones the adapters will change PEFT alone knows."""
        self.weights = [(p, to_host(p)) for p in model.parameters()]

    def keep_changed(self, model: nn.Module) -> None:
        """Let go of what the adapters have left alone; a model without values shows only where they are."""
        under = {id(getattr(_stock_part(layer), "weight", None)) for _, layer in _adapters(model)}

        def changed(parameter: nn.Parameter, value: torch.Tensor) -> bool:
            return id(parameter) in under if value.is_meta else not torch.equal(parameter.detach().cpu(), value)

        self.weights = [(p, value) for p, value in self.weights if changed(p, value)]

    def put_back(self) -> None:
        """Give the weights their values again."""
        with torch.no_grad():
            for parameter, value in self.weights:
                if not value.is_meta:
                    parameter.copy_(value)

    def host_bytes(self) -> int:
        return sum(value.nbytes for _, value in self.weights)


_Swap = tuple[nn.Module, str, nn.Module | None, nn.Module | None]
"""A module, the name of a child, and what stood there before and after the adapters came."""


def _swaps(before: list[tuple[nn.Module, dict[str, nn.Module | None]]]) -> list[_Swap]:
    return [
        (parent, name, children.get(name), child)
        for parent, children in before
        for name, child in parent._modules.items()
        if children.get(name) is not child
    ]


class _AdapterHandle(Handle):
    def __init__(self, model: nn.Module, edit: AdapterEdit):
        import peft
        from peft.functional import cast_adapter_dtype

        self.swaps: list[_Swap] = []
        before = [(module, dict(module._modules)) for module in model.modules()]
        self.flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        head = {name: model.get_parameter(name).requires_grad for name in edit.head}
        self.copies = edit.part
        if self.copies is not None:
            self.copies.take(model)
        try:
            if is_planning():
                self._plan(model, edit.config)
                _in_dtype_of_base(model)
            else:
                with _repeatable(model) if self.copies is not None else contextlib.nullcontext():
                    peft.inject_adapter_in_model(edit.config, model, adapter_name=ADAPTER)
            cast_adapter_dtype(model, ADAPTER)
            self.swaps = _swaps(before)
        except BaseException:
            self.swaps = _swaps(before)
            self.undo(model)
            raise
        if self.copies is not None:
            self.copies.keep_changed(model)
        for name, parameter in model.named_parameters():
            if name in head:  # it has another name now where it got an adapter itself
                parameter.requires_grad_(head[name])

    def _plan(self, model: nn.Module, config: Any) -> None:
        """Inject adapters on meta, where they take no memory, and nothing from the random state."""
        import peft

        with contextlib.suppress(RuntimeError), torch.device("meta"):
            peft.inject_adapter_in_model(config, model, adapter_name=ADAPTER, low_cpu_mem_usage=True)
            return
        self._take_off(model)
        # some look at values as they begin (BOFT): these are made on the host, and moved to where the base is
        with torch.random.fork_rng(devices=[]):
            peft.inject_adapter_in_model(config, model, adapter_name=ADAPTER)

    def undo(self, model: nn.Module) -> None:
        self._take_off(model)
        if self.copies is not None:
            self.copies.put_back()

    def _take_off(self, model: nn.Module) -> None:
        for parent, name, stock, adapter in self.swaps:
            if parent._modules.get(name) is not adapter:
                continue  # somebody has put another one there since, as a resized table
            if stock is None:
                del parent._modules[name]
            else:
                parent._modules[name] = stock
        for parameter, flag in self.flags:
            parameter.requires_grad_(flag)
        vars(model).pop("peft_config", None)

    def before_merge(self, model: nn.Module, verb: str) -> None:
        if verb == "merge" and has_sharded(model):
            raise StateError(
                f"merge(): the parameters of this {type(model).__name__} are sharded, and adapters cannot be added to "
                f"parts of them; use export(folder), which gathers them"
            )
        layers = dict(_adapters(model))
        for name, layer in layers.items():
            _refuse_packed(verb, name, layer)
        if verb == "merge":
            _refuse_half_merged(model, layers)

    def merge(self, model: nn.Module) -> None:
        done: set[int] = set()  # layers that are tied, with adapters that are too, have one result
        with torch.no_grad():
            for _, layer in _adapters(model):
                merged = _merged(layer)
                for key, parameter in _stock_part(layer).named_parameters():
                    if id(parameter) not in done:
                        parameter.copy_(merged.get_parameter(key))
                        done.add(id(parameter))
        self._take_off(model)

    def stock_state(self, model: nn.Module, state: dict[str, torch.Tensor]) -> None:
        merged: dict[str, torch.Tensor] = {}
        layers = dict(_adapters(model))
        # one layer is merged at a time, when it is written; sharded ones now, where all processes take part
        waits = not has_sharded(model)
        last = _LastMerged()
        for name, layer in layers.items():
            found = _stock_part(layer).state_dict() if waits else _mergeable("export", name, layer).state_dict()
            for key, value in found.items():
                if waits:
                    value = Later(value, functools.partial(last.tensor, name, layer, key))
                merged[f"{name}.{key}"] = value
        stock: dict[str, torch.Tensor] = {}
        for key, value in state.items():
            owner = next((name for name in layers if key.startswith(f"{name}.")), None)
            if owner is None:
                stock[key] = value
                continue
            inner, _, rest = key.removeprefix(f"{owner}.").partition(".")
            if inner in ("base_layer", "original_module"):
                stock[f"{owner}.{rest}"] = merged[f"{owner}.{rest}"]
        state.clear()
        state.update(stock)


def _takes_from_base(config: Any) -> bool:
    """Whether the adapters begin with a part of the weights, which PEFT takes from these (PiSSA, OLoRA, ...)."""
    start = getattr(config, "init_lora_weights", True)
    return isinstance(start, str) and start.lower() not in ("gaussian", "orthogonal", "eva")


@contextlib.contextmanager
def _repeatable(model: nn.Module) -> Iterator[None]:
    """The same random numbers each time: what a factorisation leaves of the base must be found again when loading."""
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), own_random(0):
        for device in devices:
            torch.cuda.default_generators[device].manual_seed(0)
        yield


def _adapters(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """PEFT's layers around stock modules: adapters, and trainable copies (`modules_to_save`)."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer | ModulesToSaveWrapper):
            yield name, module


def _in_dtype_of_base(model: nn.Module) -> None:
    """What PEFT does with every new adapter that is not on meta."""
    for _, layer in _adapters(model):
        weight = getattr(_stock_part(layer), "weight", None)
        if weight is None or not weight.is_floating_point():
            continue
        for kind in getattr(layer, "adapter_layer_names", ()):
            held: Any = getattr(layer, kind, ())
            if ADAPTER in held:
                held[ADAPTER] = held[ADAPTER].to(weight.dtype)


def _stock_part(layer: Any) -> nn.Module:
    return layer.original_module if "original_module" in layer._modules else layer.get_base_layer()


class _LastMerged:
    """The result of one adapter, so that a layer's weight and bias are made once."""

    def __init__(self) -> None:
        self.layer: Any = None
        self.state: dict[str, torch.Tensor] = {}

    def tensor(self, name: str, layer: Any, key: str) -> torch.Tensor:
        if layer is not self.layer:
            self.layer, self.state = None, {}
            self.layer, self.state = layer, dict(_mergeable("export", name, layer).state_dict())
        value = self.state.pop(key, None)
        if value is None:
            value = dict(_merged(layer).state_dict())[key]
        # a trainable copy may be that of a tied layer too, and a file has no room for one tensor under two names
        return value.clone() if "modules_to_save" in layer._modules else value


def _mergeable(verb: str, name: str, layer: Any) -> nn.Module:
    """`_merged`, with the name of an adapter that has no such result. Raises: StateError."""
    try:
        return _merged(layer)
    except (RuntimeError, ValueError) as error:
        raise StateError(f"{verb}(): the adapter of {name} cannot be merged ({error}); save() it instead") from error


def _merged(layer: Any) -> nn.Module:
    """A copy of the layer's stock module with the adapter's result in it; the layer itself is not touched."""
    if "modules_to_save" in layer._modules:
        return layer.modules_to_save[ADAPTER]
    twin = _shallow(layer)
    _gather(twin)
    for parent in twin.modules():
        if parent._modules.get("base_layer") is not None:
            _own_parameters(parent._modules["base_layer"])
    twin.merge(safe_merge=True)
    return twin.get_base_layer()


def _shallow(module: nn.Module) -> Any:
    """Other module objects around the same tensors: what merging swaps, lists or caches stays in the copy."""
    twin = copy.copy(module)
    twin.__dict__ = {k: copy.copy(v) if isinstance(v, dict | list) else v for k, v in vars(module).items()}
    for key, child in module._modules.items():
        twin._modules[key] = None if child is None else _shallow(child)
    return twin


def _gather(module: nn.Module) -> None:
    """Sharded parameters in full: merging works on what lies in the memory of a tensor, which then is a part of it."""
    for part in module.modules():
        for key, parameter in part._parameters.items():
            if parameter is not None and is_sharded(parameter):
                part._parameters[key] = nn.Parameter(whole(parameter), requires_grad=False)


def _own_parameters(module: nn.Module) -> None:
    for part in module.modules():
        for key, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[key] = nn.Parameter(parameter.detach().clone(), requires_grad=False)


@torch.no_grad()
def _refuse_half_merged(model: nn.Module, layers: dict[str, Any]) -> None:
    """Try every adapter before the first one is merged.

    Raises:
        StateError: one cannot be merged, or it changes a tensor that has another place in the model, which would
            change there too.
    """
    held = Counter(id(p) for layer in layers.values() for p in _stock_part(layer).parameters())
    inside = {id(part) for layer in layers.values() for part in layer.modules()}
    elsewhere = {id(p) for m in model.modules() if id(m) not in inside for p in m._parameters.values()}
    changed: dict[int, tuple[str, torch.Tensor]] = {}
    for name, layer in layers.items():
        merged = _mergeable("merge", name, layer)
        for key, parameter in _stock_part(layer).named_parameters():
            at, value = id(parameter), merged.get_parameter(key)
            other = ("", parameter) if at in elsewhere else changed.get(at)
            if other is not None and not torch.equal(value, other[1]):
                raise StateError(
                    f"merge(): {name}.{key} is tied to {other[0] or _place(model, parameter, inside)}, and the adapter "
                    f"changes one of them alone; use export(folder), which writes both, or merge into an untied model"
                )
            if held[at] > 1:
                changed[at] = (f"{name}.{key}", value)


def _place(model: nn.Module, parameter: nn.Parameter, inside: set[int]) -> str:
    """The name of a parameter outside of these modules."""
    return next(
        f"{name}.{key}"
        for name, module in model.named_modules()
        if id(module) not in inside
        for key, own in module._parameters.items()
        if own is parameter
    )


def _refuse_packed(verb: str, name: str, layer: Any) -> None:
    weight = getattr(_stock_part(layer), "weight", None)
    if weight is None or not weight.is_floating_point() or is_quantised(_stock_part(layer)):
        kind = "no weight" if weight is None else f"a packed weight ({weight.dtype}, {tuple(weight.shape)})"
        raise UnsupportedModelError(
            f"{verb}: {name} holds {kind}, into which no adapter can be merged; save() the adapter, or load the base "
            f"model unquantised, load() the adapter and {verb} that"
        )
