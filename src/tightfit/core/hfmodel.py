"""What a stock Hugging Face model is made of, found by structure and identity, never by model name."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from tightfit.core.errors import UnsupportedModelError
from tightfit.core.model_code import children_read


def check_module(model: Any, verb: str) -> None:
    """Raise TypeError for what is no module, such as a model's name."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{verb}(model, ...): got {type(model).__name__}, accepted is a torch.nn.Module")


def without_peft(model: Any) -> Any:
    """The Hugging Face model, out of what PEFT may have put around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def backbone(model: nn.Module) -> tuple[str, nn.Module]:
    """The headless model inside `model` with its module name ("" when the model is its own backbone)."""
    inner = without_peft(model)
    base = getattr(inner, "base_model", inner)
    if base is model or not isinstance(base, nn.Module):
        return "", model
    return next(((name, module) for name, module in model.named_modules() if module is base), ("", model))


def stock_module(model: nn.Module, name: str) -> nn.Module:
    """The module of that stock name, looking through adapter layers that have taken its place since."""
    module = model
    for part in filter(None, name.split(".")):
        module = (module if part in module._modules else unwrapped(module)).get_submodule(part)
    return unwrapped(module)


def unwrapped(module: nn.Module) -> nn.Module:
    """The stock module behind an adapter layer (PEFT's `base_layer`), or the module itself."""
    return module.get_base_layer() if is_adapter(module) else module  # type: ignore[operator]


def is_hooked(module: object) -> bool:
    """Whether somebody has put hooks on the call of a module; what is no module has none."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind, None) for kind in kinds)


def is_adapter(module: nn.Module) -> bool:
    """Whether the module is an adapter layer around a stock one, as PEFT makes them."""
    return "base_layer" in module._modules and hasattr(module, "get_base_layer")


def stock_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules with their names, without what adapter layers have added.

    An adapter layer's stock module comes under its real name, which ends in `base_layer`.
    """
    adapters: list[tuple[str, str]] = []
    for name, module in model.named_modules():
        inside = next((stock for prefix, stock in adapters if name.startswith(prefix)), None)
        if inside is None and is_adapter(module):
            adapters.append((f"{name}.", f"{name}.base_layer"))
        elif inside is None or name == inside or name.startswith(f"{inside}."):
            yield name, module


def stacks(model: nn.Module) -> list[list[str]]:
    """The stacks of blocks: for each outermost ModuleList of modules of one kind, the names of its blocks.

    One kind is one class, or layers of several sorts (Jamba's, with attention and with Mamba). Encoder-decoders give
    two. Stacks of one block count only when there is no longer one.
    """
    found: list[list[str]] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) == 0:
            continue
        classes = {type(child).__name__ for child in module}
        kin = len(classes) == 1 or all(cls.endswith(("DecoderLayer", "EncoderLayer")) for cls in classes)
        if not kin or not any(True for _ in module.parameters()):
            continue
        if any(name.startswith(f"{block}.") for stack in found for block in stack):
            continue
        found.append([f"{name}.{i}" for i in range(len(module))])
    longest = max((len(stack) for stack in found), default=0)
    return [stack for stack in found if len(stack) > 1 or longest == 1]


def reader(model: nn.Module) -> tuple[str, nn.Module]:
    """The innermost module that takes a model's inputs, with its name; heads may call it past the backbone (OPT)."""
    name, module = backbone(model)
    stack = next((s[0] for s in stacks(model) if s[0].startswith(f"{name}." if name else "")), None)
    parts = (stack or "").split(".")
    for end in range(len(name.split(".")) if name else 1, len(parts) - 1):
        inner = model.get_submodule(".".join(parts[:end]))
        if {"input_ids", "pixel_values"} & set(inspect.signature(inner.forward).parameters):
            name, module = ".".join(parts[:end]), inner
    return name, module


def runner(model: nn.Module) -> tuple[str, nn.Module]:
    """What every call of the blocks goes through, with its name: the backbone, or the part of it that heads call."""
    # of an encoder-decoder the reader is one half only
    return backbone(model) if len(stacks(model)) > 1 else reader(model)


def is_linear(module: nn.Module) -> bool:
    """nn.Linear and its subclasses (quantised ones too), and GPT-2's transposed Conv1D."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' Conv1D: a linear layer with a transposed weight."""
    return type(module).__name__.endswith("Conv1D") and hasattr(module, "nf") and hasattr(module, "weight")


def block_linears(model: nn.Module) -> list[str]:
    """Names of all linear layers inside the stacks of blocks, in model order."""
    blocks = tuple(f"{block}." for stack in stacks(model) for block in stack)
    return [name for name, module in stock_modules(model) if name.startswith(blocks) and is_linear(module)]


def adaptable_linears(model: nn.Module) -> list[str]:
    """Those of `block_linears` whose output an adapter can add to, and where it always trains.

    Left out are routers that give more than a tensor (Llama 4), layers that do not map rows one by one (DeepSeek V4),
    and layers of state-space mixers whose weight the mixer also reads past the layer (Mamba's `out_proj`, Jamba's
    `dt_proj`): an adapter there would not take part.
    """
    read = {
        f"{name}.{child}" if name else child
        for name, module in stock_modules(model)
        if "A_log" in module._parameters
        for cls in type(module).__mro__
        for child in children_read(cls)
    }
    linears = (name for name in block_linears(model) if name not in read)
    return [name for name in linears if _gives_tensor(stock_module(model, name))]


def _gives_tensor(linear: Any) -> bool:
    ours = type(linear).__module__.partition(".")[0] == "transformers"
    if not ours or is_conv1d(linear) or type(linear).forward is nn.Linear.forward:
        return True
    rows = torch.zeros(2, linear.weight.shape[-1], dtype=linear.weight.dtype, device=linear.weight.device)
    try:
        with torch.no_grad():
            return torch.is_tensor(linear(rows))
    except (RuntimeError, TypeError):
        return False


def has_lm_head(model: nn.Module) -> bool:
    """Whether the model predicts tokens: it has output embeddings."""
    getter = getattr(model, "get_output_embeddings", None)
    try:
        return getter is not None and getter() is not None
    except (NotImplementedError, AttributeError):
        return False


def lm_head(model: nn.Module) -> list[str]:
    """The name of the linear layer that predicts tokens, as a list; empty where there is none."""
    if not has_lm_head(model):
        return []
    head = unwrapped(model.get_output_embeddings())  # type: ignore[operator]
    return [name for name, module in stock_modules(model) if module is head and is_linear(module)]


def head_parameters(model: nn.Module) -> list[str]:
    """Names of the task head's parameters: those outside the backbone of a model that predicts no tokens.

    A language-model head came with the checkpoint, so it is not one of them; a classifier is new and must be
    trained even where the rest is frozen.
    """
    base_name, base = backbone(model)
    if base is model or has_lm_head(model):
        return []
    return [name for name, _ in model.named_parameters() if not name.startswith(f"{base_name}.")]


def prompt_learning(model: nn.Module) -> list[str]:
    """Kinds of PEFT's prompt learning that the model carries: trained tokens, or keys and values, before each row's."""
    configs = getattr(model, "peft_config", None) or {}
    return [str(config.peft_type.value) for config in configs.values() if config.is_prompt_learning]  # type: ignore[operator, union-attr]


def refuse_prompts(method: str, model: nn.Module) -> None:
    """Raise UnsupportedModelError where PEFT puts prompts before the tokens, for a method that works on the tokens."""
    if prompt_learning(model):
        raise UnsupportedModelError(
            f"{method}: {type(model).__name__} is not supported: PEFT puts prompts before the tokens, behind the call; "
            "apply the recipe first, then get_peft_model"
        )


def adapter_parameters(model: nn.Module) -> list[str]:
    """Names of what the user's own adapters, trainable copies or prompts have added and that trains."""
    trains = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    apart = [f"{name}.modules_to_save." for name, m in model.named_modules() if "original_module" in m._modules]
    if prompt_learning(model):
        apart.append("prompt_encoder.")
    added = [name for name, _ in trains if name.startswith(tuple(apart))]
    if not any(is_adapter(module) for module in model.modules()):
        return added
    stock = {id(parameter) for _, module in stock_modules(model) for parameter in module._parameters.values()}
    return [name for name, p in trains if id(p) not in stock or name in added]


def adapted_layers(model: nn.Module) -> list[str]:
    """Real names of the stock layers whose graph the user's own adapters need: those inside them, where these train.

    The gradient of prompts goes through all layers of the blocks.
    """
    added = adapter_parameters(model)
    layers = [name for name, module in model.named_modules() if is_adapter(module)]
    inside = [f"{layer}.base_layer" for layer in layers if any(name.startswith(f"{layer}.") for name in added)]
    through = block_linears(model) if any(name.startswith("prompt_encoder.") for name in added) else []
    return list(dict.fromkeys((*inside, *through)))


def body_parameters(model: nn.Module) -> Iterator[str]:
    """Names of all other parameters: those that came with the checkpoint."""
    others = {*head_parameters(model), *adapter_parameters(model)}
    return (name for name, _ in model.named_parameters() if name not in others)


def norms_behind(model: nn.Module, block: str) -> Iterator[tuple[str, nn.Module]]:
    """Norms beside the stack that `block` is of, or further out in its backbone, with their names; nearest first."""
    parts = block.split(".")[:-2]
    inside = [part for part in backbone(model)[0].split(".") if part]
    while True:
        for name, child in model.get_submodule(".".join(parts)).named_children():
            if "norm" in type(child).__name__.lower() and "emb" not in name:
                yield ".".join((*parts, name)), child
        if not parts or parts == inside:
            return
        parts = parts[:-1]


def text_config(model: nn.Module) -> Any:
    """The config of the part of the model that reads text, or the only one."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def embeds_in_blocks(config: Any) -> bool:
    """Whether every block reads an embedding of its own, made of the ids (Gemma 3n, Gemma 4)."""
    return bool(getattr(config, "hidden_size_per_layer_input", None))


def embeddings_with_mask(reader: Any) -> nn.Module | None:
    """The module that makes the embeddings, where it reads the padding mask too (ESM)."""
    made = getattr(reader, "embeddings", None)
    reads = isinstance(made, nn.Module) and "attention_mask" in inspect.signature(made.forward).parameters
    return made if reads else None


def shifts_labels(model: nn.Module) -> bool:
    """Whether a causal language model compares each token with the next one's label.

    The decoders of encoder-decoders, by themselves (BartForCausalLM), take labels that are shifted already.
    """
    return not getattr(type(text_config(model)), "is_encoder_decoder", False)


@dataclasses.dataclass(frozen=True)
class Alias:
    """One place where a tensor hangs in the module tree."""

    module_name: str
    attribute: str

    @property
    def name(self) -> str:
        return f"{self.module_name}.{self.attribute}" if self.module_name else self.attribute


def aliases(model: nn.Module, tensor: torch.Tensor) -> list[Alias]:
    """Every place of the model that holds this very tensor object, as a parameter or a buffer."""
    places = []
    for module_name, module in model.named_modules():
        for table in (module._parameters, module._buffers):
            places += [Alias(module_name, key) for key, value in table.items() if value is tensor]
    return places


def named_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers, each tensor object once, under its first name."""
    seen: set[int] = set()
    for iterator in (model.named_parameters(), model.named_buffers()):
        for name, tensor in iterator:
            if id(tensor) not in seen:
                seen.add(id(tensor))
                yield name, tensor


def storage_key(tensor: torch.Tensor) -> int:
    """Identity of the storage behind a tensor, equal for views of one memory; meta and fake tensors too."""
    return tensor.untyped_storage()._cdata


def with_storage(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensors whose memory a tensor is: itself, or those inside a wrapper (a packed weight of torchao, a DTensor).

    A wrapper's own storage holds nothing, though it gives the size of the tensor that it stands for.
    """
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    return [part for name in names for part in with_storage(getattr(tensor, name))]


def storage_keys(tensors: Iterable[torch.Tensor | None]) -> set[int]:
    """The keys of the storages behind dense tensors, those inside wrappers included; None is passed over."""
    held = (part for tensor in tensors if tensor is not None for part in with_storage(tensor))
    return {storage_key(part) for part in held if part.layout == torch.strided}


def unique_storage_bytes(tensors) -> int:
    """Bytes of the distinct storages behind `tensors`."""
    storages = {storage_key(p): p.untyped_storage().nbytes() for t in tensors for p in with_storage(t)}
    return sum(storages.values())


def has_values(tensor: torch.Tensor) -> bool:
    """Whether values can be looked at now: not on meta, not fake, not inside a compiled graph."""
    return not (torch.compiler.is_compiling() or tensor.is_meta or type(tensor).__name__ == "FakeTensor")


def refuse_wrapped(model: nn.Module) -> str | None:
    """Why a recipe cannot be applied to this model now (wrapped, compiled or sharded), or None."""
    if hasattr(model, "_orig_mod"):
        return "the model is compiled (torch.compile returned a wrapper around it)"
    if type(model).__name__ in ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel"):
        return f"the model is wrapped in {type(model).__name__}"
    for name, parameter in model.named_parameters():
        if type(parameter).__name__ == "DTensor" or type(parameter.data).__name__ == "DTensor":
            return f"parameter {name} is sharded (DTensor)"
        if type(parameter).__name__ == "FlatParameter" or hasattr(parameter, "ds_id"):
            return f"parameter {name} is flattened or partitioned (FSDP1 or ZeRO-3)"
    return None
