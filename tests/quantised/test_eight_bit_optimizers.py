"""AdamW with 8-bit moments: of bitsandbytes and torchao, under the Trainer, by hand, and by the command."""

from __future__ import annotations

import builtins
import contextlib
import gc
import itertools
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf

import tightfit
from tightfit import Checkpointing, FusedOps, Lora, PartialEmbedding, chain
from tightfit.core.errors import RecipeError, SimulationError, StateError
from tightfit.core.memory import live_bytes
from tightfit.core.simulate.cuda import CUBLAS_WORKSPACE_BYTES
from tightfit.core.simulate.eight_bit import adamw_8bit, embedding_tables
from tightfit.core.verify import run_step

bnb = pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

sys.path.append(str(Path(__file__).parents[1] / "train"))

VOCABULARY, KEPT = 600, 200
RECIPES = {
    "none": chain(),
    "Lora": Lora(rank=32),
    "FusedOps": chain(FusedOps(), Checkpointing()),
    "PartialEmbedding": PartialEmbedding(ids=range(KEPT), force=True),
    "PartialEmbedding + Lora": chain(PartialEmbedding(ids=range(KEPT), force=True), Lora(rank=32)),
}


def llama(dtype=torch.float32):
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=192,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
    )
    return hf.LlamaForCausalLM(config).to(dtype)


def batch(rows=4, length=16):
    ids = torch.randint(KEPT, (rows, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.clone()}


def by_hand(parameters):
    return bnb.optim.AdamW8bit(list(parameters), lr=1e-3)


def packed(optimizer):
    """How many parameters have moments of one byte, and how many of four."""
    found = [next(v for v in s.values() if torch.is_tensor(v) and v.dim()) for s in optimizer.state.values()]
    small = [v for v in found if v.dtype == torch.uint8 or type(v).__name__ == "OptimState8bit"]
    return len(small), len(found) - len(small)


# -- plans ---------------------------------------------------------------------------------------------------------


QUICK = {("Lora", torch.float32, by_hand)}
GRID = [
    pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow)
    for case in itertools.product(RECIPES, (torch.float32, torch.bfloat16), ("adamw-8bit", by_hand))
]


@pytest.mark.parametrize(("recipe", "dtype", "optimizer"), GRID)
def test_the_planned_step_is_the_real_one(recipe, dtype, optimizer):
    planned = tightfit.plan(llama(dtype), RECIPES[recipe], batch=batch(), optimizer=optimizer)
    real = run_step(llama(dtype), planned.recipe, batch(), optimizer=optimizer)
    assert planned.by_category["optimizer"] == real.by_category["optimizer"]
    assert planned.peak_bytes == pytest.approx(real.peak_bytes, rel=1e-3)
    assert planned.simulation.phases["optimizer"] == pytest.approx(real.phases["optimizer"], rel=1e-3)


def test_where_little_is_kept_for_backward_the_update_is_the_peak():
    """The CPU update unpacks the moments of a parameter; a plan that left this out would be too low."""
    planned = tightfit.plan(llama(), RECIPES["FusedOps"], batch=batch(1, 8), optimizer="adamw-8bit")
    assert planned.simulation.peak_phase == "optimizer"
    assert planned.verify(llama()).peak_error == pytest.approx(0, abs=1e-3)


def test_a_planned_gpu_takes_nothing_for_the_update():
    planned = tightfit.plan(llama(), chain(), batch=batch(), optimizer="adamw-8bit", device="cuda")
    phases = planned.simulation.phases
    assert phases["optimizer"] - phases["zero_grad"] == CUBLAS_WORKSPACE_BYTES


def test_optimizers_that_no_simulation_can_see_into_are_refused_by_name():
    for made in (bnb.optim.Lion8bit, bnb.optim.AdamW32bit):
        with pytest.raises(SimulationError, match=f"{made.__name__} cannot be simulated.*AdamW8bit"):
            tightfit.plan(llama(), chain(), batch=batch(), optimizer=lambda p, made=made: made(p))


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_planned_step_on_a_gpu(recipe):
    planned = tightfit.plan(llama(), RECIPES[recipe], batch=batch(), optimizer="adamw-8bit", device="cuda")
    assert planned.verify(llama()).peak_error == pytest.approx(0, abs=0.05)


# -- by hand -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["Lora", "PartialEmbedding"])
def test_a_loop_of_ones_own(recipe):
    model = llama()
    applied = tightfit.apply(model, RECIPES[recipe])
    optimizer = applied.optimizer(bnb.optim.AdamW8bit, lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(**batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3 and packed(optimizer)[0] >= 6


def test_a_table_with_8_bit_moments_does_not_grow():
    model = llama()
    applied = tightfit.apply(model, PartialEmbedding(ids=range(KEPT), unknown="grow", force=True))
    optimizer = applied.optimizer(bnb.optim.AdamW8bit, lr=1e-2)
    model(**batch()).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    more = batch()
    more["input_ids"][0, 0] = KEPT + 5
    with pytest.raises(StateError, match=r"cannot grow: AdamW8bit keeps .* scan all data first, or use AdamW"):
        model(**more)


def test_a_table_with_32_bit_moments_does():
    model = llama()
    applied = tightfit.apply(model, PartialEmbedding(ids=range(KEPT), unknown="grow", force=True))
    optimizer = applied.optimizer(adamw_8bit(), lr=1e-2, tables=embedding_tables(model))
    more = batch()
    more["input_ids"][0, 0] = KEPT + 5
    for inputs in (batch(), more):
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    table = model.model.embed_tokens.weight
    assert len(table) == KEPT + 1 and optimizer.state[table]["state1"].shape == table.shape
    assert optimizer.state[table]["state1"].dtype == torch.float32


def test_tables_keep_32_bits_whatever_another_optimizer_has_registered(monkeypatch):
    model = llama()
    manager = bnb.optim.GlobalOptimManager.get_instance()
    monkeypatch.setitem(manager.index2config, (0, 1), {"optim_bits": 32})  # what a Trainer of this process leaves
    optimizer = adamw_8bit()(model.parameters(), tables=embedding_tables(model), lr=1e-3)
    model(**batch()).loss.backward()
    optimizer.step()
    bits = {n: optimizer.state[p]["state1"].element_size() * 8 for n, p in model.named_parameters()}
    assert bits["model.embed_tokens.weight"] == 32
    assert bits["model.layers.0.self_attn.q_proj.weight"] == bits["lm_head.weight"] == 8


# -- under the Trainer ---------------------------------------------------------------------------------------------


class Stopped(Exception):
    pass


class StopAt(hf.TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise Stopped


def trained(optim, recipe, folder, *extra, resume=False):
    from datasets import Dataset

    rows = batch(16)
    data = Dataset.from_dict({key: value.tolist() for key, value in rows.items()})
    model = llama()
    applied = tightfit.apply(model, RECIPES[recipe])
    arguments = hf.TrainingArguments(
        output_dir=str(folder),
        optim=optim,
        max_steps=4,
        per_device_train_batch_size=4,
        save_steps=2,
        learning_rate=1e-2,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = hf.Trainer(model=model, args=arguments, train_dataset=data, callbacks=[applied.callback(), *extra])
    with contextlib.suppress(Stopped):
        trainer.train(resume_from_checkpoint=resume)
    return model, trainer


OPTIMS = ["adamw_8bit", "adamw_bnb_8bit", "adamw_torch_8bit"]
UNDER_THE_TRAINER = [
    pytest.param(optim, recipe, marks=[] if (optim, recipe) == ("adamw_8bit", "Lora") else pytest.mark.slow)
    for optim in OPTIMS
    for recipe in RECIPES
]


@pytest.mark.parametrize(("optim", "recipe"), UNDER_THE_TRAINER)
def test_a_resumed_trainer_ends_on_the_same_bits(optim, recipe, tmp_path, monkeypatch):
    if optim == "adamw_torch_8bit":
        pytest.importorskip("torchao")
        if shutil.which("g++") is None:
            pytest.skip("torchao compiles its optimizer, which needs a C++ compiler")
    monkeypatch.setattr(bnb.optim.GlobalOptimManager, "_instance", None)
    whole, trainer = trained(optim, recipe, tmp_path / "whole")
    trained(optim, recipe, tmp_path / "cut", StopAt())
    torch.manual_seed(9)
    cut, _ = trained(optim, recipe, tmp_path / "cut", resume=True)
    one, other = dict(whole.named_parameters()), dict(cut.named_parameters())
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    stock = dict(tightfit_model(recipe).named_parameters())
    assert any(not torch.equal(one[name], stock[name]) for name in one)
    small, large = packed(trainer.optimizer)
    assert small >= 6 and large >= 1


def tightfit_model(recipe):
    model = llama()
    tightfit.apply(model, RECIPES[recipe])
    return model


# -- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A tiny project whose model has parameters large enough to be packed."""
    from runs import rows
    from tiny_models import save, wordpiece

    folder = tmp_path_factory.mktemp("project")
    tokenizer = wordpiece()
    torch.manual_seed(0)
    config = hf.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=96,
        max_position_embeddings=32,
    )
    save(folder / "model", hf.BertForSequenceClassification(config), tokenizer)
    (folder / "train.tsv").write_text(rows(40))
    (folder / "dev.tsv").write_text(rows(16, seed=1))
    return folder


def file_of(project, methods, output, **settings):
    from runs import recipe_file

    return recipe_file(project, methods, output, optimizer="adamw-8bit", save_every=3, **settings)


@pytest.mark.parametrize(
    "methods",
    [
        [{"Lora": {"rank": 64, "dropout": 0.1}}],
        pytest.param([], marks=pytest.mark.slow),
        pytest.param([{"FusedOps": {}}], marks=pytest.mark.slow),
        pytest.param([{"PartialEmbedding": {}}], marks=pytest.mark.slow),
    ],
    ids=["Lora", "none", "FusedOps", "PartialEmbedding"],
)
def test_a_resumed_run_of_the_command_ends_on_the_same_bits(project, methods, tmp_path, monkeypatch):
    from runs import only_train
    from safetensors.torch import load_file

    from tightfit.train import trainer
    from tightfit.train.run import train

    only_train(monkeypatch)
    real, states = trainer.RunTrainer.training_step, []

    def step(self, *args, **kwargs):
        if states and self.state.global_step == 7:
            raise Stopped
        return real(self, *args, **kwargs)

    train(file_of(project, methods, tmp_path / "whole"))
    monkeypatch.setattr(trainer.RunTrainer, "training_step", step)
    states.append("stop")
    with pytest.raises(Stopped):
        train(file_of(project, methods, tmp_path / "cut"))
    states.clear()
    saved = load_file(tmp_path / "cut" / "checkpoints" / "checkpoint-6" / "optimizer.safetensors")
    assert torch.uint8 in {tensor.dtype for tensor in saved.values()}
    torch.manual_seed(99)
    train(file_of(project, methods, tmp_path / "cut"), resume=True)
    one, other = (load_file(tmp_path / name / "tightfit.safetensors") for name in ("whole", "cut"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    gc.unfreeze()


@pytest.mark.slow
def test_the_command_measures_the_step_that_it_planned(project, tmp_path):
    from tightfit.train.bench import measure_recipe

    gc.collect()
    left = live_bytes()  # by other tests
    found = measure_recipe(file_of(project, [{"Checkpointing": {}}], tmp_path / "run"))
    assert found["predicted_peak_bytes"] == pytest.approx(found["peak_bytes"] - left, rel=0.03)


def test_a_plan_of_a_recipe_file_prices_it(project, tmp_path, capsys):
    from tightfit.cli import main
    from tightfit.train.recipe_file import write_recipe_file

    sizes = {}
    for name in ("adamw", "adamw-8bit"):
        write_recipe_file(file_of(project, [], tmp_path / "run"), tmp_path / "recipe.yaml")
        with pytest.raises(SystemExit, match=r"^0$"):
            main(["plan", str(tmp_path / "recipe.yaml"), f"train.optimizer={name}", "--json"])
        found = json.loads(capsys.readouterr().out)
        assert found["optimizer"] == name
        sizes[name] = found["by_category"]["optimizer"]
    assert 0.25 < sizes["adamw-8bit"] / sizes["adamw"] < 0.6


def test_without_bitsandbytes_a_run_is_refused_and_a_plan_is_not(project, tmp_path, monkeypatch):
    from tightfit.train import recipe_file
    from tightfit.train.run import build_skeleton, plan_run, prepare, train

    stock = builtins.__import__

    def no_bitsandbytes(name, *args, **kwargs):
        if name.split(".")[0] == "bitsandbytes":
            raise ImportError(name)
        return stock(name, *args, **kwargs)

    find = recipe_file.importlib.util.find_spec
    monkeypatch.setattr(recipe_file.importlib.util, "find_spec", lambda n, *a: None if n == "bitsandbytes" else find(n))
    monkeypatch.setattr(builtins, "__import__", no_bitsandbytes)
    file = file_of(project, [{"Lora": {"rank": 2}}], tmp_path / "run")
    with pytest.raises(RecipeError, match="adamw-8bit needs bitsandbytes: pip install bitsandbytes"):
        train(file)
    assert not (tmp_path / "run").exists()
    prepared = prepare(file)
    assert plan_run(file, prepared, file.recipe, build_skeleton(file, prepared.data)).peak_bytes > 0


def test_packed_moments_of_a_stock_table_are_not_adopted():
    model = llama()
    early = bnb.optim.AdamW8bit(model.parameters(), lr=1e-3, min_8bit_size=1)
    model(**batch()).loss.backward()
    early.step()
    early.zero_grad()
    applied = tightfit.apply(model, RECIPES["PartialEmbedding"])
    with pytest.raises(StateError, match=r"AdamW8bit keeps 'state1' of .*embed_tokens.* packed .*applied.optimizer"):
        applied.adopt(early)
