"""PartialEmbedding under the Trainer, with PEFT, collators, and several processes."""

import copy
import os
from pathlib import Path

import models
import pytest
import torch
from partial_embedding_cases import own_loss, pair, same_parameters, table, train
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

import tightfit
from tightfit import Lora, PartialEmbedding

FEW = (0, *range(9, 50), 102, 119)


class Rows(torch.utils.data.Dataset):
    def __init__(self, model, count=16, seed=0, ids=None):
        self.batch = models.batch(model, size=count, seed=seed, ids=ids)

    def __len__(self):
        return len(self.batch["input_ids"])

    def __getitem__(self, index):
        return {key: value[index] for key, value in self.batch.items()}


def trainer(model, folder, applied=None, **settings):
    arguments = TrainingArguments(
        output_dir=str(folder),
        **{
            "per_device_train_batch_size": 4,
            "num_train_epochs": 2,
            "learning_rate": 3e-3,
            "weight_decay": 0.0,
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            "logging_steps": 1,
            "save_strategy": "steps",
            "save_steps": 4,
            "eval_strategy": "steps",
            "eval_steps": 4,
            "seed": 3,
            **settings,
        },
    )
    callbacks = [applied.callback()] if applied is not None else []
    data = {"train_dataset": Rows(model), "eval_dataset": Rows(model, 8, seed=1)}
    return Trainer(model, arguments, callbacks=callbacks, **data)


def losses(trained):
    return [entry.get("loss", entry.get("eval_loss")) for entry in trained.state.log_history[:-1]]


def test_the_trainer_trains_evaluates_saves_and_resumes_as_stock(tmp_path):
    stock, applied = pair("bert", dropout=0.1)
    fresh = copy.deepcopy(stock)
    expected = trainer(stock, tmp_path / "stock")
    expected.train()
    found = trainer(applied.model, tmp_path / "ours", applied)
    found.train()
    assert losses(found) == losses(expected)
    assert len(losses(found)) == 10
    same_parameters(stock, applied)
    predictions = [t.predict(Rows(stock, 8, seed=2)).predictions for t in (expected, found)]
    assert (predictions[0] == predictions[1]).all()
    # the checkpoints are stock ones
    for step in (4, 8):
        paths = [tmp_path / run / f"checkpoint-{step}" / "model.safetensors" for run in ("stock", "ours")]
        assert paths[0].read_bytes() == paths[1].read_bytes()
    # resumed in the middle: the same end
    again = tightfit.apply(fresh, PartialEmbedding(ids=models.kept_ids(stock)))
    resumed = trainer(fresh, tmp_path / "ours", again)
    resumed.train(resume_from_checkpoint=str(tmp_path / "ours" / "checkpoint-4"))
    same_parameters(stock, again)


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    stock, applied = pair("bert", dropout=0.1)
    settings = {"load_best_model_at_end": True, "learning_rate": 0.05, "save_total_limit": 3}
    expected = trainer(stock, tmp_path / "stock", **settings)
    expected.train()
    found = trainer(applied.model, tmp_path / "ours", applied, **settings)
    found.train()
    assert found.state.best_global_step == expected.state.best_global_step
    same_parameters(stock, applied)
    assert torch.equal(applied.remove().get_input_embeddings().weight, table(stock))


SETTINGS = [("llama", {}), ("bart", {"label_smoothing_factor": 0.1}), ("gpt2", {"bf16": True})]


@pytest.mark.parametrize(("family", "settings"), SETTINGS, ids=["plain", "smooth", "bf16"])
def test_the_trainer_on_a_language_model(family, settings, tmp_path):
    settings = {"num_train_epochs": 1, "save_strategy": "no", "gradient_accumulation_steps": 2} | settings
    stock, applied = pair(family, dropout=0.0, head="full")
    expected, found = trainer(stock, tmp_path, **settings), trainer(applied.model, tmp_path, applied, **settings)
    expected.train(), found.train()
    assert losses(found) == pytest.approx(losses(expected), rel=2e-2 if "bf16" in settings else 1e-4)


def test_growth_under_the_trainer(tmp_path):
    stock, applied = pair("bert", dropout=0.1, ids=FEW, unknown="grow")
    settings = {"save_strategy": "no", "eval_strategy": "no"}
    expected = trainer(stock, tmp_path, **settings)
    expected.train()  # making a trainer sets the seed
    found = trainer(applied.model, tmp_path, applied, **settings)
    found.train()
    assert losses(found) == losses(expected)
    assert len(table(applied.model)) > 44


@pytest.mark.parametrize("fields", [{"unknown": "grow", "ids": FEW}, {"decay_dropped": True}], ids=str)
def test_rows_that_joined_or_shrank_are_resumed(fields, tmp_path):
    ends = []
    for resume in (None, tmp_path / "checkpoint-4"):
        _, applied = pair("bert", dropout=0.1, **fields)
        trainer(applied.model, tmp_path, applied, weight_decay=0.1).train(resume_from_checkpoint=resume)
        ends.append({**applied.model.state_dict(), "kept": PartialEmbedding.of(applied).ids})
    assert len(ends[0]["kept"]) > len(FEW)
    for name, value in ends[0].items():
        # shrunk rows are rounded once more where they come from a checkpoint
        torch.testing.assert_close(ends[1][name], value, rtol=1e-6 if "decay_dropped" in fields else 0, atol=0)


def test_a_mask_inserted_by_the_collator_is_its_own_row():
    """The data never shows [MASK]; the row that is read must still be the row of [MASK]."""

    class Tokenizer:
        mask_token, mask_token_id, pad_token, pad_token_id, padding_side = "[MASK]", 103, "[PAD]", 0, "right"
        all_special_ids, all_special_tokens = (0, 103), ("[PAD]", "[MASK]")
        backend_tokenizer = None

        def get_special_tokens_mask(self, ids, already_has_special_tokens=True):
            return [int(i in self.all_special_ids) for i in ids]

        def convert_tokens_to_ids(self, token):
            return self.mask_token_id

        def convert_ids_to_tokens(self, token_id):
            return f"token-{token_id}"

        def pad(self, features, return_tensors, **kwargs):
            return {"input_ids": torch.stack([torch.as_tensor(f["input_ids"]) for f in features])}

        def get_vocab(self):
            return {f"token-{i}": i for i in range(120)}

        def __len__(self):
            return 120

    tokenizer, stock = Tokenizer(), models.build("bert-mlm", dropout=0.0)
    texts = [{"input_ids": list(range(start, start + 12))} for start in (5, 20, 33)]
    model = copy.deepcopy(stock)
    scanned = PartialEmbedding.scan(texts, tokenizer=tokenizer, model=model, progress=False, head="split")
    assert 103 in scanned.ids
    tightfit.apply(model, scanned)
    collate = DataCollatorForLanguageModeling(
        tokenizer, mlm_probability=0.5, mask_replace_prob=1.0, random_replace_prob=0.0
    )
    for _ in range(3):
        batch = collate(texts)
        assert (batch["input_ids"] == 103).any()
        expected, found = (m(**batch, output_hidden_states=True) for m in (stock, model))
        assert torch.equal(expected.hidden_states[-1], found.hidden_states[-1])
        torch.testing.assert_close(found.loss, expected.loss, rtol=1e-6, atol=0)
    # left out of the kept set by hand, it is refused by name instead of read from another row
    with pytest.raises(ValueError, match=r"are missing: 103 \(special token '\[MASK\]'\)"):
        tightfit.apply(
            copy.deepcopy(stock), PartialEmbedding(ids=set(scanned.ids) - {103}, tokenizer=tokenizer, head="split")
        )


# -- adapters ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "llama-tied", "t5", "bart"])
def test_lora_in_the_same_recipe_equals_lora_alone(family, tmp_path):
    stock = models.build(family, dropout=0.1)
    reduced = copy.deepcopy(stock)
    lora = Lora(rank=4)
    runs = []
    for model, recipe in ((stock, [lora]), (reduced, [lora, PartialEmbedding(ids=models.kept_ids(stock), force=True)])):
        torch.manual_seed(5)
        applied = tightfit.apply(model, recipe)
        optimizer = applied.optimizer(lr=1e-2, weight_decay=0.0)
        batches = [models.batch(stock, seed=s) for s in range(3)]
        runs.append((applied, train(model, batches, optimizer, loss=own_loss)))
    (plain, expected), (ours, found) = runs
    assert PartialEmbedding.of(ours).head == ("none" if family == "bert" else "split")
    assert found == (expected if family == "bert" else pytest.approx(expected, rel=1e-6))
    assert len(table(reduced)) == 62
    states = [applied.stock_state_dict() for applied in (plain, ours)]
    assert list(states[0]) == list(states[1])
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=1e-4, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")
    for applied, folder in ((plain, "plain"), (ours, "ours")):
        applied.export(tmp_path / folder)
    loaded, info = type(stock).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert all(torch.equal(states[1][k], v) for k, v in loaded.state_dict().items())


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
@pytest.mark.parametrize("order", ["adapters first", "adapters last"])
def test_adapters_attached_by_peft_itself(family, order, tmp_path):
    import peft

    stock = models.build(family, dropout=0.0)
    reduced = copy.deepcopy(stock)
    config = peft.LoraConfig(r=4, target_modules="all-linear")
    recipe = PartialEmbedding(ids=models.kept_ids(stock), head="split", force=True)
    torch.manual_seed(2)
    plain = peft.get_peft_model(stock, copy.deepcopy(config))
    torch.manual_seed(2)
    if order == "adapters first":
        ours = peft.get_peft_model(reduced, copy.deepcopy(config))
        applied = tightfit.apply(ours, recipe)
    else:
        applied = tightfit.apply(reduced, recipe)
        ours = peft.get_peft_model(reduced, copy.deepcopy(config))
    batches = [models.batch(stock, seed=s) for s in range(3)]
    make = lambda m: torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2)  # noqa: E731
    expected = train(plain, batches, make(plain), loss=own_loss)
    assert train(ours, batches, make(ours), loss=own_loss) == pytest.approx(expected, rel=1e-5)
    assert len(ours.get_input_embeddings().weight) == 62
    ours.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(models.build(family, dropout=0.0), tmp_path).eval()
    torch.testing.assert_close(own_loss(again, batches[0]), own_loss(ours.eval(), batches[0]), rtol=1e-5, atol=0)
    merged = [m.merge_and_unload() for m in (plain, ours)]
    if order == "adapters last":
        applied.remove()
    for (name, a), b in zip(merged[0].state_dict().items(), merged[1].state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


# -- several processes ------------------------------------------------------------------------------------------


def ddp_worker(rank, folder):
    import torch.distributed as dist

    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="0", GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    out = {}
    for name in ("stock", "reduced"):
        model = models.build("bert", dropout=0.0)
        own = [
            models.batch(model, seed=10 * s + rank, ids=range(4, 40) if rank == 0 else range(30, 70)) for s in range(4)
        ]
        if name == "reduced":
            found = PartialEmbedding.scan(own, model=model, progress=False)
            applied = tightfit.apply(model, found)
            out |= {"ids": found.ids, "seen": {int(i) for b in own for i in b["input_ids"].flatten()}}
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
        out[f"{name} losses"] = train(wrapped, own, optimizer, loss=own_loss)
        if name == "reduced":
            applied.remove()
        out[name] = model.state_dict()
    torch.save(out, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_with_different_ids_agree_on_their_union(tmp_path):
    torch.multiprocessing.spawn(ddp_worker, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first["ids"] == second["ids"] == tuple(sorted(first["ids"]))
    assert first["seen"] | second["seen"] <= set(first["ids"])
    assert first["seen"] - second["seen"] and second["seen"] - first["seen"] and 100 not in first["ids"]
    for result in (first, second):
        assert result["stock losses"] == result["reduced losses"]
        assert all(torch.equal(result["reduced"][k], v) for k, v in first["stock"].items())
