"""Example batches: small real tensors that a model of a known task can be trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from tightfit.core import hfmodel
from tightfit.core.errors import SimulationError

_TASKS = {
    "ForSequenceClassification": "sequence",
    "ForTokenClassification": "token",
    "ForQuestionAnswering": "span",
    "ForMaskedLM": "lm",
    "ForCausalLM": "lm",
    "LMHeadModel": "lm",
    "ForConditionalGeneration": "seq2seq",
    "MTModel": "seq2seq",
    "ForImageClassification": "image",
    "ForMultipleChoice": "choice",
}


def task_of(model: nn.Module) -> str | None:
    """The task a transformers model is made for, read from its class name; None where it says nothing."""
    model = hfmodel.without_peft(model)
    for cls in type(model).__mro__:
        for ending, task in _TASKS.items():
            if cls.__name__.endswith(ending):
                return task
    return None


def example_batch(
    model: nn.Module,
    batch_size: int,
    length: int,
    *,
    padded: bool = True,
    long_rows: bool = False,
    target_length: int | None = None,
    tokens: Sequence[int] | None = None,
) -> dict[str, torch.Tensor]:
    """A batch with labels that fits the model's task; on the CPU, a few kilobytes but for images.

    Args:
        model: a transformers model (adapted by PEFT or by a recipe or not) with a task head.
        batch_size: rows.
        length: tokens per row; for images it is ignored, the size is the config's.
        padded: the last row is a quarter shorter, so the model builds its padding mask as for real text. False
            gives full rows with an all-ones mask.
        long_rows: they may be longer than the model has positions.
        target_length: tokens per target of an encoder-decoder that has them; default: as many.
        tokens: the ids that rows may hold; None: all of the vocabulary.

    Raises:
        SimulationError: sizes below 1, a target length for a model without targets, a length above the model's
            positions, or a model whose input does not follow from sizes.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> small = BertConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1, intermediate_size=8)
        >>> {k: tuple(v.shape) for k, v in example_batch(BertForSequenceClassification(small), 4, 16).items()}
        {'input_ids': (4, 16), 'attention_mask': (4, 16), 'labels': (4,)}
    """
    if batch_size < 1 or length < 1:
        raise SimulationError(f"batch: got ({batch_size}, {length}), both must be at least 1")
    inner = hfmodel.without_peft(model)
    task = task_of(model)
    if target_length is not None and (task != "seq2seq" or target_length < 1):
        takes = "a length of at least 1" if task == "seq2seq" else f"None: {type(inner).__name__} takes no targets"
        raise SimulationError(f"target_length: got {target_length}, accepted is {takes}")
    if _size(inner, task) is None:
        raise SimulationError(
            f"batch: no example batch is known for {type(inner).__name__}; give a dict of tensors with labels"
        )
    config: Any = inner.config
    if task == "image":
        size = _size(inner, task)
        side = size if isinstance(size, (tuple, list)) else [size] * 2
        channels = getattr(_vision(config), "num_channels", 3)
        pixels = torch.zeros(batch_size, channels, *side, dtype=_float_dtype(model))
        return {"pixel_values": pixels, "labels": _labels(config, (batch_size,))}
    if not long_rows:
        _check_length(config, length)
    rows = (batch_size, length)
    ids, mask = _tokens(config, rows, tokens), torch.ones(rows, dtype=torch.long)
    short = length - max(1, length // 4) if padded and length > 1 else length
    mask[-1, short:] = 0
    pad = getattr(config, "pad_token_id", None)
    if pad is not None:
        ids[-1, short:] = pad
    out = {"input_ids": ids, "attention_mask": mask}
    if task is None:  # a bare backbone: no labels, the step takes a loss of its outputs
        return out | ({"decoder_input_ids": ids} if config.is_encoder_decoder else {})
    if task == "sequence":
        out["labels"] = _labels(config, (batch_size,))
        eos = getattr(config, "eos_token_id", None)
        if config.is_encoder_decoder and isinstance(eos, int):
            ids[ids == eos] = max(0, eos - 1)
            ids[:, short - 1] = eos  # BART classifies at the end-of-sequence token
    elif task == "token":
        out["labels"] = torch.zeros(rows, dtype=torch.long)  # whatever the config's `problem_type`
    elif task == "span":
        out["start_positions"] = out["end_positions"] = torch.zeros(batch_size, dtype=torch.long)
    elif task == "choice":
        out = {key: value[:, None].expand(-1, 2, -1).contiguous() for key, value in out.items()}
        out["labels"] = torch.zeros(batch_size, dtype=torch.long)
    elif target_length is not None:
        out["labels"] = _tokens(config, (batch_size, target_length), tokens)
    else:
        out["labels"] = ids.masked_fill(mask == 0, -100)
    return out


def _size(model: nn.Module, task: str | None) -> Any:
    """Pixels of the model's images, or ids of its vocabulary; None where it takes something else, or does not say."""
    main, config = getattr(model, "main_input_name", None), getattr(model, "config", None)
    if task == "image":
        return getattr(_vision(config), "image_size", None) if main == "pixel_values" else None
    return _vocabulary(config) if main == "input_ids" else None


def _vision(config):
    return getattr(config, "vision_config", config)


def _vocabulary(config) -> Any:
    return getattr(config, "vocab_size", None) or getattr(config.get_text_config(), "vocab_size", None)


_USUALLY_SPECIAL = 10
_DIFFERENT = 1000


def _tokens(config, rows: tuple[int, int], among: Sequence[int] | None) -> torch.Tensor:
    """Ids that are no special tokens of the usual vocabularies, where there are enough others."""
    every = range(_vocabulary(config)) if among is None else among
    plain = [i for i in every[: _USUALLY_SPECIAL + _DIFFERENT] if i >= _USUALLY_SPECIAL] or every[-1:]
    return torch.tensor(plain)[torch.arange(rows[0] * rows[1]) % len(plain)].view(rows)


def _labels(config, shape: tuple[int, ...]) -> torch.Tensor:
    number = getattr(config, "num_labels", 2)
    problem = getattr(config, "problem_type", None)
    if problem == "regression" or (problem is None and number == 1):
        return torch.zeros(shape if number == 1 else (*shape, number))
    if problem == "multi_label_classification":
        return torch.zeros(*shape, number)
    return torch.zeros(shape, dtype=torch.long)


def _float_dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.dtype.is_floating_point), torch.float32)


def _check_length(config, length: int) -> None:
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    learned = getattr(text, "model_type", "") in ("bert", "roberta", "distilbert", "gpt2", "opt", "bart", "electra")
    if learned and limit is not None and length > limit:
        raise SimulationError(f"batch: length {length} is above the model's {limit} positions")
