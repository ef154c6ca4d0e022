"""The demo: a real model on real text, stock and with four recipes, on a machine without a GPU or a network."""

from __future__ import annotations

from pathlib import Path

from tightfit.cli.commands import check_new, quiet, say, show_comparison

ROWS, EVAL_ROWS = 1280, 400
RECIPES = ("stock", "partial-embedding", "checkpointing", "partial-embedding+checkpointing", "lora")
LORA_RATE = 3e-3  # adapters start at zero and need a higher rate than the weights themselves

NEXT = """\
PartialEmbedding trains only the rows of the embedding table that the data uses; its weights after training are
those of the stock run, bit for bit.

Next, on a model and data of your own: write recipe.yaml

    model: path-or-hub-id
    task: sequence-classification
    data: {train: data.tsv, eval: dev.tsv, text: [sentence], label: label}
    methods:
      - PartialEmbedding: {}
    output: runs/my-run

and run

    tightfit compare recipe.yaml --methods stock,partial-embedding,lora
"""


def run_demo(output: Path, quick: bool) -> None:
    """Train and compare the demo's recipes.

    Raises:
        RecipeError: the embedded model's package is missing, or `output` is in use.
    """
    check_new(output, resume=False)
    from tightfit.train.tasks import DEMO_MODEL, model_path

    quiet()
    model_path(DEMO_MODEL)
    from tightfit.presets import named
    from tightfit.train.bench import compare
    from tightfit.train.recipe_file import RecipeFile

    share = 10 if quick else 1
    files = []
    for name in RECIPES:
        train = {"epochs": 1, "batch_size": 16, "learning_rate": 3e-4, "warmup_ratio": 0.1, "max_length": 32}
        if name == "lora":
            train["learning_rate"] = LORA_RATE
        files.append(
            RecipeFile.model_validate(
                {
                    "model": DEMO_MODEL,
                    "task": "sequence-classification",
                    "data": {"train": "demo:stdlib", "rows": ROWS // share, "eval_rows": EVAL_ROWS // share},
                    "methods": named(name).to_list(),
                    "train": train,
                    "output": str(output),
                }
            )
        )
    say("fine-tuning all-MiniLM-L6-v2 to tell which package a docstring of your Python's standard library is from")
    names = [str(file.recipe) for file in files]
    found = compare(files, output=output, names=names, echo=say)
    show_comparison(found, output)
    print()
    print(NEXT)
