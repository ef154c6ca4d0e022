"""Named recipes, each one visible chain.

`exact`, `balanced`, `fast` and `smallest` are places on the measured frontier of memory and time (docs/frontier.md):
full fine-tuning with the stock gradients in less memory; adapters in a fraction of it at about their own speed;
adapters trained through a fifth of the tokens, in a short step; and the fewest bytes of adapters inside the model.

A name stands for its chain on the command line too, with dashes: `tightfit compare recipe.yaml --methods
stock,lora,partial-embedding-checkpointing`.
"""

from __future__ import annotations

from tightfit.core.errors import RecipeError
from tightfit.core.fields import near
from tightfit.core.recipe import Recipe, chain, method_classes
from tightfit.methods import Checkpointing, FusedOps, Lora, Mesa, PartialEmbedding, Reversible, TokenTune

stock = chain()
checkpointing = chain(Checkpointing())
lora = chain(Lora())
lora_checkpointing = chain(Lora(), Checkpointing())
partial_embedding = chain(PartialEmbedding())
partial_embedding_checkpointing = chain(PartialEmbedding(), Checkpointing())
partial_embedding_lora = chain(PartialEmbedding(), Lora())
partial_embedding_lora_checkpointing = chain(PartialEmbedding(), Lora(), Checkpointing())
exact = chain(FusedOps())
balanced = chain(Lora(), FusedOps(), Mesa(attention=True))
fast = chain(Lora(), TokenTune(ratio=0.2))
smallest = chain(Lora(), FusedOps(), Reversible())


def presets() -> dict[str, Recipe]:
    """Every named recipe of this module.

    Example:
        >>> from tightfit.presets import presets
        >>> presets()["lora_checkpointing"]
        chain(Lora(), Checkpointing())
    """
    return {name: value for name, value in globals().items() if isinstance(value, Recipe)}


def named(text: str) -> Recipe:
    """The recipe a name stands for: a preset, a method's short name, or several of them joined by `+`.

    Raises:
        RecipeError: an unknown name, a method that needs fields, or a method named twice.

    Example:
        >>> from tightfit.presets import named
        >>> named("partial-embedding+checkpointing")
        chain(PartialEmbedding(), Checkpointing())
    """
    short = {cls.name: cls for cls in method_classes().values()}
    known = presets()
    recipe = chain()
    for part in text.split("+"):
        key = part.strip().lower()
        if key.replace("-", "_") in known:
            recipe = chain(recipe, known[key.replace("-", "_")])
        elif key in short:
            try:
                recipe = chain(recipe, short[key]())
            except (TypeError, ValueError) as error:  # a method that has no defaults
                raise RecipeError(
                    f"methods: {part.strip()!r} cannot be named alone, put it into a file: {error}"
                ) from error
        else:
            names = list(dict.fromkeys([*short, *(name.replace("_", "-") for name in known)]))
            raise RecipeError(f"methods: unknown name {part.strip()!r}{near(key, names)}; known are {', '.join(names)}")
    kinds = [type(transform).__name__ for transform in recipe]
    if len(set(kinds)) < len(kinds):
        raise RecipeError(f"methods: {text!r} names a method twice ({', '.join(kinds)})")
    return recipe
