"""What a model must be like for token selection, and how its tokens are placed; decided by structure."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from torch import nn

from tightfit.core import hfmodel
from tightfit.core.errors import UnsupportedModelError
from tightfit.core.model_code import asks_for_sdpa
from tightfit.core.simulate.batches import task_of

IMPLEMENTATIONS = ("sdpa", "eager")


@dataclasses.dataclass(frozen=True)
class Facts:
    """How a model takes its tokens.

    Attributes:
        runner: name of the module that is run twice: the backbone, or the decoder of an encoder-decoder.
        blocks: names of its blocks.
        head: "causal", "masked", "token", "seq2seq" (a loss for each token), "span", "pooled".
        causal: tokens look at earlier ones only.
        rule: where positions come from if the call gives none: "count", "ids" (from the padding id on), "mask"
            (counts the attention mask), "table" (see `table`), "image" (see `embeddings`).
        table: name of the position table, where the runner takes no positions.
        embeddings: name of the module that makes the tokens, where the runner takes no ids.
        generates: the runner takes `use_cache`.
        several: the runner is an encoder-decoder's decoder.
        padding: the row of the position table that stands for padding (rule "ids").
        shifts: the target of a token is the next one's label.
    """

    runner: str
    blocks: tuple[str, ...]
    head: str
    causal: bool
    rule: str
    table: str | None
    embeddings: str | None
    generates: bool
    several: bool
    padding: int = 0
    shifts: bool = False

    @property
    def per_token(self) -> bool:
        """Whether the head has a target for each token."""
        return self.head in ("causal", "masked", "token", "seq2seq")

    @property
    def least(self) -> int:
        """Size of the keep set: the first token, of a decoder the last, of an answer both ends."""
        return 2 if self.causal else 3 if self.head == "span" else 1


def facts_of(model: nn.Module) -> Facts:
    """Find out, or refuse.

    Raises:
        UnsupportedModelError: the model mixes tokens outside of attention, takes its attention from somewhere else, or
            has a task for which selection is not defined. Names the reason.
    """
    hfmodel.refuse_prompts("TokenTune", model)
    base_name, base = hfmodel.backbone(model)
    config: Any = getattr(base, "config", None)
    task = task_of(model)
    several = bool(getattr(config, "is_encoder_decoder", False))
    runner, name = base, base_name
    if several:
        decoder = base.get_decoder() if hasattr(base, "get_decoder") else None  # type: ignore[operator]
        found = next((n for n, m in base.named_modules() if m is decoder and n), None)
        if found is None or task != "seq2seq":
            raise _refused(model, "of an encoder-decoder only the decoder side of a language model is supported")
        assert decoder is not None
        runner, name = decoder, f"{base_name}.{found}" if base_name else found
    else:
        name, runner = hfmodel.reader(model)
    blocks = tuple(b for stack in hfmodel.stacks(model) for b in stack if b.startswith(f"{name}." if name else ""))
    _refuse_structure(model, runner, config, blocks)
    parameters = inspect.signature(runner.forward).parameters
    ids = "input_ids" in parameters
    if ids and "pixel_values" in parameters:
        raise _refused(model, "it takes images beside tokens, whose places in the sequence are not known here")
    table = embeddings = None
    rule, padding = "count", 0
    if not ids:
        if not isinstance(getattr(runner, "embeddings", None), nn.Module):
            raise _refused(model, "it takes no input_ids and has no `embeddings` module")
        rule, embeddings = "image", f"{name}.embeddings" if name else "embeddings"
    elif "position_ids" not in parameters:
        table = next((n for n, m in runner.named_modules() if _is_position_table(m)), None)
        if table is None:
            raise _refused(model, f"{type(runner).__name__} takes no position_ids, so its tokens cannot be run apart")
        rule, table = "table", f"{name}.{table}" if name else table
    elif owner := next((m for m in runner.modules() if hasattr(m, "create_position_ids_from_input_ids")), None):
        rule, padding = "ids", int(owner.padding_idx)  # type: ignore[arg-type]
    elif any("attention_mask" in inspect.signature(m.forward).parameters for m in _embeddings(runner)):
        rule = "mask"
    causal = any(getattr(m, "is_causal", False) is True for m in runner.modules())
    return Facts(
        runner=name,
        blocks=blocks,
        head=_head(model, task),
        causal=causal,
        rule=rule,
        table=table,
        embeddings=embeddings,
        generates="use_cache" in parameters,
        several=several,
        padding=padding,
        shifts=_head(model, task) == "causal" and hfmodel.shifts_labels(model),
    )


def _head(model: nn.Module, task: str | None) -> str:
    if task == "lm":
        inner = hfmodel.without_peft(model)
        masked = any(cls.__name__.endswith("ForMaskedLM") for cls in type(inner).__mro__)
        return "masked" if masked else "causal"
    return {"token": "token", "seq2seq": "seq2seq", "span": "span"}.get(task or "", "pooled")


def _embeddings(runner: nn.Module) -> list[nn.Module]:
    return [m for m in runner.modules() if isinstance(m, nn.Embedding)]


def _is_position_table(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding) and "position_ids" in inspect.signature(module.forward).parameters


def _refuse_structure(model: nn.Module, runner: nn.Module, config: Any, blocks: tuple[str, ...]) -> None:
    if not blocks:
        raise _refused(model, "no stack of blocks was found in it")
    inside = [(n, m) for n, m in hfmodel.stock_modules(model) if n.startswith(tuple(f"{b}." for b in blocks))]
    whole = [m for _, m in inside] + [model.get_submodule(b) for b in blocks]
    if len({id(model.get_submodule(b)) for b in blocks}) != len(blocks):
        raise _refused(model, "its blocks are one module with shared weights, whose runs cannot be told apart")
    layers = getattr(config, "num_hidden_layers", None)
    if isinstance(layers, int) and len(blocks) < layers and not getattr(config, "is_encoder_decoder", False):
        raise _refused(
            model, f"its {layers} layers are runs of {len(blocks)} with shared weights, which cannot be told apart"
        )
    if getattr(config, "alibi", False) is True or any(_takes(m, "alibi") for m in whole):
        raise _refused(model, "its attention adds ALiBi, a bias by distance that the selected rows would not have")
    if hfmodel.embeds_in_blocks(config):
        raise _refused(model, "every block of it reads an embedding of its own, which the selected rows would not have")
    if (made := hfmodel.embeddings_with_mask(runner)) is not None:
        raise _refused(model, f"its {type(made).__name__} look at the padding of whole rows, so no tokens stand apart")
    if any("relative_attention_bias" in n for n, _ in inside):
        raise _refused(
            model, "its attention adds a learned relative position bias, made for whole sequences (as in T5)"
        )
    for n, m in inside:
        if isinstance(m, nn.Conv1d | nn.Conv2d) and any(k > 1 for k in m.kernel_size):
            raise _refused(model, f"{n} is a convolution, which mixes tokens outside of attention")
        if isinstance(m, nn.RNNBase) or {"A_log", "dt_bias"} & set(m._parameters):
            raise _refused(model, f"{n} is a recurrent or state-space layer, which mixes tokens outside of attention")
    kinds = {str(k) for k in getattr(config, "layer_types", None) or ()}
    odd = sorted(k for k in kinds if "attention" not in k or "linear" in k)
    if odd:
        raise _refused(model, f"its config has layers of type {', '.join(odd)}, which mix tokens outside of attention")
    now = getattr(config, "_attn_implementation", None)
    backend = getattr(model, "_supports_attention_backend", False) or getattr(model, "_supports_sdpa", False)
    if not backend:
        raise _refused(model, "it does not take its attention from transformers' attention registry")
    if (cls := asks_for_sdpa(whole)) is not None:
        raise _refused(model, f"its {cls} goes by the name of the attention, which is another one under this method")
    if now not in IMPLEMENTATIONS:
        raise _refused(model, f"its attention is {now!r}; load it with attn_implementation='sdpa' (or 'eager')")


def _takes(module: nn.Module, parameter: str) -> bool:
    return parameter in inspect.signature(module.forward).parameters


def _refused(model: nn.Module, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"TokenTune: {type(model).__name__} is not supported: {reason}")
