"""Error of sampled weight gradients against stock, one draw.

On models of three blocks with random weights, and on MiniLM after `STOCK_STEPS` stock steps on SST-2: a batch a draw,
of rows of about one length, beside the noise that the choice of the batch makes. MiniLM needs the data folder beside
the project; without it its rows are left out.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import record
import torch
from tasks import SST2, recipe_file

NAME = "sampling_error"
QUICK = True
STEPS, LEARNING = 8, 3
STOCK_STEPS, ROWS, REAL_STEPS = 100, 32, 16
RECIPES: dict[str, list[dict[str, Any]]] = {
    "WtaCrs()": [{"WtaCrs": {}}],
    'WtaCrs(mode="wta")': [{"WtaCrs": {"mode": "wta"}}],
    'WtaCrs(scores="running")': [{"WtaCrs": {"scores": "running"}}],
    "FusedOps(), WtaCrs(budget=0.1)": [{"FusedOps": {}}, {"WtaCrs": {"budget": 0.1}}],
    "FusedOps(), WtaCrs()": [{"FusedOps": {}}, {"WtaCrs": {}}],
    "FusedOps(), WtaCrs(budget=0.5)": [{"FusedOps": {}}, {"WtaCrs": {"budget": 0.5}}],
    "FusedOps(), Mesa(), WtaCrs()": [{"FusedOps": {}}, {"Mesa": {}}, {"WtaCrs": {}}],
}


def models() -> Iterator[tuple[str, Any, list[dict[str, torch.Tensor]]]]:
    """(name, model, the batch of every draw)"""
    import transformers as hf

    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    torch.manual_seed(0)
    bert = hf.BertForSequenceClassification(hf.BertConfig(num_hidden_layers=3, vocab_size=1000, **rates))
    ids = torch.randint(5, 1000, (16, 64))
    batch = {"input_ids": ids, "labels": torch.randint(0, 2, (16,))}
    yield "BERT-base width, 16 x 64, classification", bert, [batch] * STEPS
    size = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 3, "num_attention_heads": 8}
    llama = hf.LlamaForCausalLM(hf.LlamaConfig(**size, vocab_size=1000))
    ids = torch.randint(5, 1000, (4, 256))
    yield "Llama of width 512, 4 x 256, every token a target", llama, [{"input_ids": ids, "labels": ids}] * STEPS
    if (record.SHARED / "data").exists():
        yield f"MiniLM on SST-2, {ROWS} rows a step", *in_training()


def in_training() -> tuple[Any, list[dict[str, torch.Tensor]]]:
    """MiniLM after some stock steps, and batches of other rows; dropout is off from then on."""
    from tightfit.train.run import prepare
    from tightfit.train.tasks import build_model

    train = {"batch_size": ROWS, "max_length": 128, "seed": 0}
    with tempfile.TemporaryDirectory() as folder:
        file = recipe_file({**SST2, "rows": ROWS * (STOCK_STEPS + REAL_STEPS)}, [], train, Path(folder) / "run")
        data = prepare(file).data
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([len(ids) for ids in data.train["input_ids"]])
    order = sizes.argsort().view(-1, ROWS)[torch.randperm(STOCK_STEPS + REAL_STEPS, generator=generator)]
    batches = [dict(data.collator([data.train[int(row)] for row in rows])) for rows in order]
    model = build_model(file, data).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for batch in batches[:STOCK_STEPS]:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.config.attention_probs_dropout_prob = 0.0
    return model, batches[STOCK_STEPS:]


def gradients(model: Any, batch: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """Those of the weight matrices of the blocks."""
    torch.manual_seed(seed)
    model.zero_grad()
    model(**batch).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if "layer" in n and p.dim() == 2}


def squared(tensors: dict[str, torch.Tensor]) -> float:
    return float(sum(t.square().sum() for t in tensors.values()))


def between(batches: list[dict[str, torch.Tensor]]) -> float:
    """How far the gradient of a batch is from the mean over all, relative to its own norm."""
    mean = {name: sum(g[name] for g in batches) / len(batches) for name in batches[0]}
    norms = sum(map(squared, batches)) / len(batches)
    unbiased = len(batches) / (len(batches) - 1)
    return ((norms - squared(mean)) * unbiased / norms) ** 0.5


def run() -> list[dict[str, Any]]:
    """One row per model and recipe: the mean over the draws after the first `LEARNING`."""
    import tightfit

    rows: list[dict[str, Any]] = []
    for name, model, batches in models():
        model.train()
        same = all(batch is batches[0] for batch in batches)
        wanted = [gradients(model, batch, 0) for batch in batches[: 1 if same else None]]
        for recipe, methods in RECIPES.items():
            twin = tightfit.apply(copy.deepcopy(model), tightfit.Recipe.from_list(methods)).model
            errors = []
            for seed, batch in enumerate(batches):
                exact, found = wanted[0 if same else seed], gradients(twin, batch, seed)
                errors.append((squared({n: found[n] - g for n, g in exact.items()}) / squared(exact)) ** 0.5)
            late = errors[LEARNING:]
            rows.append({"model": name, "recipe": recipe, "error": sum(late) / len(late)})
            print(rows[-1], flush=True)
        if not same:
            rows.append({"model": name, "recipe": "stock: another batch", "error": between(wanted)})
    record.write(NAME, {"steps": STEPS, "learning": LEARNING, "real": [STOCK_STEPS, ROWS], "recipes": RECIPES}, rows)
    return rows
