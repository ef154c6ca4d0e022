"""Models without weights: built from a config on the meta device, or copied from a real model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tightfit.core.errors import UnsupportedModelError
from tightfit.core.fields import near
from tightfit.core.quantised import is_quantised, plan_as_plain

TASKS = {
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "causal-lm": "AutoModelForCausalLM",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
    "masked-lm": "AutoModelForMaskedLM",
    "image-classification": "AutoModelForImageClassification",
}


def skeleton(
    config_or_name: Any, *, task: str | None = None, dtype: torch.dtype | None = None, **overrides: Any
) -> nn.Module:
    """A model without weights, to plan with: all shapes, no memory.

    Args:
        config_or_name: a transformers config, a local folder, or a hub id (only its config is read).
        task: "sequence-classification", "causal-lm", ... ; default: the architecture the config names, or the
            bare backbone.
        dtype: parameter dtype; default: the config's, else float32.
        **overrides: config fields to change, such as `num_labels=3`.

    Raises:
        ValueError: an unknown task or config field.
        UnsupportedModelError: no config can be read from what was given, its weights are packed by another library, or
            its family has no model for the task.

    Example:
        >>> import tightfit
        >>> from transformers import BertConfig
        >>> model = tightfit.skeleton(BertConfig(), task="sequence-classification")
        >>> sum(p.numel() for p in model.parameters())
        109483778
    """
    import transformers

    if task is not None and task not in TASKS:
        raise ValueError(
            f"skeleton(task=...): got {task!r}, accepted is one of {', '.join(TASKS)}{near(task, list(TASKS))}"
        )
    config = read_config(config_or_name)
    for key, value in overrides.items():
        if not hasattr(config, key):
            raise ValueError(
                f"skeleton({key}=...): {type(config).__name__} has no such field{near(key, sorted(config.to_dict()))}"
            )
        setattr(config, key, value)
    if is_packed(config):
        raise UnsupportedModelError(
            f"skeleton(): the weights of this {type(config).__name__} are packed (quantization_config), and how much "
            f"they take cannot be told without them; load the model and plan that, or give quantization_config=None to "
            f"plan it unpacked"
        )
    architectures = getattr(config, "architectures", None) or []
    if task is not None:
        factory = getattr(transformers, TASKS[task]).from_config
    elif architectures and hasattr(transformers, architectures[0]):
        factory = getattr(transformers, architectures[0])._from_config
    else:
        factory = transformers.AutoModel.from_config
    dtype = dtype or getattr(config, "dtype", None) or torch.float32
    try:
        with torch.device("meta"):
            model = factory(config, dtype=dtype)
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        raise UnsupportedModelError(
            f"skeleton(task={task!r}): transformers has no such model for a {type(config).__name__}"
        ) from error
    return model.train()


def is_packed(config: Any) -> bool:
    """Whether a config is that of a checkpoint whose weights another library has packed.

    >>> from transformers import BertConfig
    >>> is_packed(BertConfig())
    False
    """
    return bool(getattr(config, "quantization_config", None))


def read_config(config_or_name: Any) -> Any:
    """A copy of a transformers config, or the config of a folder or hub id. Raises: UnsupportedModelError."""
    import transformers

    if isinstance(config_or_name, transformers.PretrainedConfig):
        return copy.deepcopy(config_or_name)
    if not isinstance(config_or_name, str | Path):
        raise UnsupportedModelError(
            f"skeleton(): got {type(config_or_name).__name__}, accepted is a transformers config, a folder or a hub id"
        )
    try:
        return transformers.AutoConfig.from_pretrained(config_or_name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UnsupportedModelError(f"skeleton({str(config_or_name)!r}): no config could be read: {reason}") from error


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy of the model with every tensor on the meta device; ties, flags and edits survive, memory does not."""
    memo: dict[int, Any] = {}
    packed = [(name, module) for name, module in model.named_modules() if is_quantised(module)]
    for module in model.modules():
        for tensor in _tensors_of(module):
            if id(tensor) not in memo:
                memo[id(tensor)] = _on_meta(tensor)
    for _, module in packed:  # other libraries' records of a weight, which a copy on meta has no use for
        for key in ("state", "quant_state"):
            if key in vars(module):
                memo[id(vars(module)[key])] = None
    twin = copy.deepcopy(model, memo)
    for name, module in packed:
        plan_as_plain(twin.get_submodule(name), module)
    return twin


def _tensors_of(module: nn.Module):
    yield from (p for p in module._parameters.values() if p is not None)
    yield from (b for b in module._buffers.values() if b is not None)
    yield from (v for v in vars(module).values() if isinstance(v, torch.Tensor))


def _on_meta(tensor: torch.Tensor) -> torch.Tensor:
    twin = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    if isinstance(tensor, nn.Parameter):
        twin = nn.Parameter(twin, requires_grad=tensor.requires_grad)
    return twin
