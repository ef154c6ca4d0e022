"""Lora: low-rank adapters by PEFT, as a transform (arXiv 2106.09685)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import nn

from tightfit.core import hfmodel
from tightfit.core.edits import Edit, Handle
from tightfit.core.errors import StateError, UnsupportedModelError
from tightfit.core.fields import check_bool, check_float, check_int, check_selector
from tightfit.core.select import select
from tightfit.core.transform import Context, Slot, Transform

ADAPTER = "default"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lora(Transform):
    """Train low-rank adapters on frozen linear layers; PEFT does the work.

    Saves the gradients and optimizer state of the frozen weights; saved activations stay as large as without it
    (pair it with `Checkpointing`). The task head of a classifier stays trainable; a language-model head does not.

    Fields:
        rank: inner dimension of the adapters.
        alpha: scale; the adapters' output is multiplied by alpha / rank.
        dropout: on the adapters' input.
        where: which linear layers; default: all linear layers inside the blocks.
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
    applied; `merge` and `export` give stock names back.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    where: str | None = None
    train_head: bool = True
    config: Any = None

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
        if not isinstance(self.config, dict):
            if not hasattr(self.config, "to_dict") or not hasattr(self.config, "peft_type"):
                raise TypeError(f"Lora(config=...): got {self.config!r}, accepted is a peft config or its dict")
            object.__setattr__(self, "config", _config_fields(self.config))
        if "peft_type" not in self.config:
            raise ValueError("Lora(config=...): the dict has no 'peft_type', accepted is PeftConfig.to_dict()")
        mixed = [
            f
            for f, default in (("rank", 8), ("alpha", 16.0), ("dropout", 0.0), ("where", None))
            if getattr(self, f) != default
        ]
        if mixed:
            raise ValueError(f"Lora({mixed[0]}=..., config=...): give either the fields or a peft config, not both")

    def freezes(self, model: nn.Module) -> Iterator[str]:
        head = set(hfmodel.head_parameters(model)) if self.train_head else set()
        return (name for name, _ in model.named_parameters() if name not in head)

    def edits(self, model: nn.Module, context: Context) -> Iterator[Edit]:
        for name, module in model.named_modules():
            if hasattr(module, "base_layer") and hasattr(module, "active_adapters"):
                raise StateError(
                    f"Lora: {type(model).__name__} already carries PEFT adapters (at {name}); merge them first, or "
                    f"leave Lora out of the recipe"
                )
        targets = self._targets(model)
        head = tuple(hfmodel.head_parameters(model)) if self.train_head else ()
        note = (
            f"rank {self.rank} on {len(targets)} linear layers"
            if self.config is None
            else str(self.config["peft_type"])
        )
        yield AdapterEdit(targets=tuple(targets), config=self._peft_config(model, targets), head=head, note=note)

    def _targets(self, model: nn.Module) -> list[str]:
        if self.config is not None:
            return []
        if self.where is not None:
            return select(model, self.where, kind=hfmodel.is_linear, method="Lora")
        targets = hfmodel.block_linears(model)
        if not targets:
            raise UnsupportedModelError(
                f"Lora: {type(model).__name__} has no stack of blocks with linear layers; name the layers with where="
            )
        return targets

    def _peft_config(self, model: nn.Module, targets: list[str]):
        import peft

        if self.config is not None:
            kind = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(self.config["peft_type"])]
            return kind(**{k: v for k, v in self.config.items() if k not in ("peft_type", "peft_version")})
        transposed = all(hfmodel.is_conv1d(model.get_submodule(t)) for t in targets)
        return peft.LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            target_modules=targets,
            fan_in_fan_out=transposed,
        )


def _config_fields(config: Any) -> dict[str, Any]:
    """A peft config as JSON values."""
    import enum

    def plain(value: Any) -> Any:
        if isinstance(value, enum.Enum):
            return value.value
        if isinstance(value, set | frozenset):
            return sorted(value)
        return {k: plain(v) for k, v in value.items()} if isinstance(value, dict) else value

    default = type(config)().to_dict()
    return {k: plain(v) for k, v in config.to_dict().items() if k == "peft_type" or v != default.get(k)}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class AdapterEdit(Edit):
    """Let PEFT inject its adapters in place."""

    slot: Slot = Slot.NEW_PARAMETERS
    targets: tuple[str, ...]
    config: Any
    head: tuple[str, ...]

    @property
    def target(self) -> str:
        return f"{len(self.targets)} linear layers" if self.targets else "as its config says"

    def claims(self):
        return frozenset((self.slot, name) for name in self.targets) or super().claims()

    def run(self, model: nn.Module) -> Handle:
        return _AdapterHandle(model, self)


class _AdapterHandle(Handle):
    def __init__(self, model: nn.Module, edit: AdapterEdit):
        import peft

        flags = {id(p): p.requires_grad for p in model.parameters()}
        had_config = "peft_config" in vars(model)
        assert not had_config, "refused when the edits were made"
        self.flags = [(p, flags[id(p)]) for p in model.parameters()]
        peft.inject_adapter_in_model(edit.config, model, adapter_name=ADAPTER)
        for name in edit.head:
            model.get_parameter(name).requires_grad_(True)

    def undo(self, model: nn.Module) -> None:
        self._leave(model, merge=False)

    def merge(self, model: nn.Module) -> None:
        self._leave(model, merge=True)

    def _leave(self, model: nn.Module, merge: bool) -> None:
        for name, layer in _adapter_layers(model):
            if merge:
                layer.merge(safe_merge=True)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.get_base_layer())
        for parameter, flag in self.flags:
            parameter.requires_grad_(flag)
        vars(model).pop("peft_config", None)

    def stock_state(self, model: nn.Module, state: dict[str, torch.Tensor]) -> None:
        for name, layer in _adapter_layers(model):
            delta = layer.get_delta_weight(ADAPTER).detach()
            key = f"{name}.base_layer.weight"
            if layer.get_base_layer().weight.shape != delta.shape:
                raise UnsupportedModelError(
                    f"export: {name} holds a packed weight {tuple(layer.get_base_layer().weight.shape)}; "
                    f"dequantise the base model before exporting a merged checkpoint"
                )
            state[key] = (state[key] + delta.to(state[key])).contiguous()
        for key in list(state):
            if ".base_layer." in key:
                state[key.replace(".base_layer.", ".")] = state.pop(key)
            elif f".{ADAPTER}." in key or key.endswith(f".{ADAPTER}"):
                del state[key]


def _adapter_layers(model: nn.Module) -> list[tuple[str, Any]]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
