"""Batches are checked against the model before anything is simulated."""

import models
import pytest
import torch
import transformers as hf

import tightfit
from tightfit.core.batch import check_batch, cut, positions, rows_of
from tightfit.core.errors import DataError
from tightfit.core.simulate import example_batch


def batch(rows=4, length=8, **more):
    ids = torch.ones(rows, length, dtype=torch.long)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **more}


@pytest.mark.parametrize(
    ("make", "limit"),
    [("bert", 64), ("roberta", 64), ("gpt2", 64), ("llama", None), ("t5", None), ("bart", 64)],
)
def test_positions(make, limit):
    assert positions(getattr(models, make)()) == limit


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((4, 65), ["length 65", "64 positions", "Bert"]),
        ((0, 8), ["batch_size is 0"]),
        ((4, True), ["length is True"]),
        ((4,), ["(4,)", "batch_size, length"]),
        (7, ["7"]),
        ([4, 8, 1], ["[4, 8, 1]", "a dict of tensors or (batch_size, length)"]),
        ({"input_ids": [[1, 2]]}, ["input_ids", "a list", "a tensor"]),
        ({"input_ids": torch.ones(2, 4)}, ["input_ids", "torch.float32", "whole numbers"]),
        (batch(length=65), ["input_ids", "65 tokens", "64"]),
        (batch(inputs=torch.ones(4, 8)), ["'inputs'", "takes no such input", "input_ids"]),
        ({"attention_mask": torch.ones(4, 8)}, ["'input_ids' is missing", "attention_mask"]),
        (batch(labels=torch.zeros(3, dtype=torch.long)), ["input_ids 4", "labels 3"]),
        ({"input_ids": torch.full((2, 4), 120)}, ["id 120", "vocabulary of 120"]),
        ({"input_ids": torch.full((2, 4), -1)}, ["id -1"]),
    ],
)
def test_a_batch_that_does_not_fit_the_model_is_named(given, words):
    with pytest.raises(DataError) as caught:
        tightfit.plan(models.bert(), batch=given)
    assert all(word in str(caught.value) for word in words), caught.value


def test_sizes_may_stand_in_a_list():
    model = models.bert()
    assert tightfit.plan(model, batch=[2, 8]).peak_bytes == tightfit.plan(model, batch=(2, 8)).peak_bytes
    assert tightfit.plan(model, batch=[2, 8]).verify().peak_bytes > 0
    choices = tightfit.recommend(
        model, batch=[2, 8], budget="1GiB", methods=[tightfit.Checkpointing], effective_batch=4
    )
    assert choices[0].batch_size == 4


@pytest.mark.parametrize(
    ("verb", "options"),
    [("plan", {"batch": (2, 8)}), ("recommend", {"batch": (2, 8), "budget": "1GiB"})],
)
def test_a_name_is_no_model(verb, options):
    with pytest.raises(TypeError, match=rf"{verb}\(model, ...\): got str, accepted is a torch.nn.Module"):
        getattr(tightfit, verb)("bert", **options)


def test_a_translation_model_is_planned_from_sizes():
    sizes = {f"{part}_{name}": value for part in ("encoder", "decoder")
             for name, value in (("layers", 1), ("ffn_dim", 32), ("attention_heads", 2))}  # fmt: skip
    config = hf.MarianConfig(d_model=16, vocab_size=50, pad_token_id=0, decoder_start_token_id=0, **sizes)
    batch = example_batch(hf.MarianMTModel(config), 2, 8)
    assert batch["labels"].shape == (2, 8)
    assert tightfit.plan(hf.MarianMTModel(config), batch=(2, 8)).peak_bytes > 0


def test_batches_that_fit():
    ids = torch.ones(2, 200, dtype=torch.long)
    check_batch(models.llama(), {"input_ids": ids, "labels": ids})  # rotary positions have no end
    check_batch(models.bert(), {"inputs_embeds": torch.zeros(2, 8, 32), "labels": torch.zeros(2, dtype=torch.long)})
    check_batch(models.gpt2(), (1, 64))


def test_tensors_beside_the_tokens_need_not_go_by_rows():
    positions = torch.arange(8)[None]
    given = batch(position_ids=positions, labels=torch.ones(4, 8, dtype=torch.long))
    assert rows_of(given) == 4 and cut(given, 2)["position_ids"] is positions
    packed = {key: value[:1] for key, value in given.items() if key != "attention_mask"}
    packed |= {"cu_seq_lens_q": torch.tensor([0, 3, 8]), "cu_seq_lens_k": torch.tensor([0, 3, 8])}
    for fits in (given, packed):
        assert tightfit.plan(models.llama(), batch=fits).peak_bytes > 0


def test_a_part_of_a_batch_is_its_longest_rows_and_keeps_a_padded_one():
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 0]])
    given = {"input_ids": torch.arange(16).view(4, 4), "attention_mask": mask, "scale": 2.0}
    assert cut(given, 1)["input_ids"][:, 0].tolist() == [4]
    assert cut(given, 2)["input_ids"][:, 0].tolist() == [4, 8]
    assert cut(given, 3)["input_ids"][:, 0].tolist() == [4, 12, 8]
    assert cut(given, 4) is given and cut(given, 2)["scale"] == 2.0
    assert rows_of(cut(given, 3)) == 3


# Examples made from sizes

VISION = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def test_the_size_of_images_may_be_in_the_vision_config():
    vision = {**VISION, "image_size": 12, "patch_size": 4}
    model = hf.SiglipForImageClassification(hf.SiglipConfig(vision_config=vision))
    assert example_batch(model, 2, 1)["pixel_values"].shape == (2, 3, 12, 12)


@pytest.mark.parametrize(
    "make",
    [
        lambda: hf.ResNetForImageClassification(hf.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])),
        lambda: hf.CanineForSequenceClassification(hf.CanineConfig(**VISION)),
        lambda: hf.WhisperForAudioClassification(hf.WhisperConfig()),
        lambda: torch.nn.Linear(2, 2),
    ],
)
def test_a_model_whose_input_does_not_follow_from_sizes_is_named(make):
    with torch.device("meta"):
        model = make()
    with pytest.raises(tightfit.SimulationError, match=f"no example batch is known for {type(model).__name__}; give"):
        tightfit.plan(model, batch=(2, 8))


def test_tokens_have_whole_labels_whatever_the_number_of_classes():
    assert tightfit.plan(models.bert("TokenClassification", num_labels=1), batch=(2, 8)).peak_bytes > 0
