"""Permanent trimming: the checkpoint that is written is a stock one, and says the same with fewer rows."""

import json

import pytest
import torch
import transformers as hf
from models import SIZE
from test_vocabulary_tokenizer import CORPUS, USED, bert, gpt2, llama2, mbart, seen, t5, xlm_roberta

import tightfit
from tightfit import ArtifactError, Lora, PartialEmbedding, StateError, UnsupportedModelError
from tightfit.methods.partial_embedding.tables import find_tables
from tightfit.methods.partial_embedding.trim import trim_model

SEQ2SEQ = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
BART = {f"{side}_{key}": n for side in ("encoder", "decoder") for key, n in (("layers", 2), ("ffn_dim", 64))} | {
    "d_model": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


def sized(tokenizer, extra=0):
    return {"vocab_size": len(tokenizer) + extra, "pad_token_id": tokenizer.pad_token_id}


def make_bert():
    tokenizer = bert()
    return hf.BertForMaskedLM(hf.BertConfig(**SIZE, **sized(tokenizer))), tokenizer


def make_classifier():
    tokenizer = bert()
    return hf.BertForSequenceClassification(hf.BertConfig(**SIZE, **sized(tokenizer), num_labels=3)), tokenizer


def make_gpt2():
    tokenizer = gpt2()
    end = tokenizer.eos_token_id
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
    return hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, **sized(tokenizer), bos_token_id=end, eos_token_id=end)), tokenizer


def make_llama(tied=False):
    tokenizer = llama2()
    config = hf.LlamaConfig(**SIZE, **sized(tokenizer, 6), num_key_value_heads=1, tie_word_embeddings=tied)
    return hf.LlamaForCausalLM(config), tokenizer


def make_tied_llama():
    return make_llama(tied=True)


def make_t5():
    tokenizer = t5()  # the table has more rows than the tokenizer has tokens
    return hf.T5ForConditionalGeneration(hf.T5Config(**SEQ2SEQ, **sized(tokenizer, 28), eos_token_id=1)), tokenizer


def make_mt5():
    """As mT5's checkpoints: the config ties, the checkpoint holds another head."""
    tokenizer = t5()
    model = hf.MT5ForConditionalGeneration(hf.MT5Config(**SEQ2SEQ, **sized(tokenizer), eos_token_id=1))
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    return model, tokenizer


def make_xlm_roberta():
    tokenizer = xlm_roberta()
    config = hf.XLMRobertaConfig(**SIZE, **sized(tokenizer), max_position_embeddings=64, bos_token_id=0, eos_token_id=2)
    return hf.XLMRobertaForMaskedLM(config), tokenizer


def make_bart():
    tokenizer = mbart()
    model = hf.BartForConditionalGeneration(
        hf.BartConfig(**BART, **sized(tokenizer), forced_bos_token_id=tokenizer.convert_tokens_to_ids("ro_RO"))
    )
    model.final_logits_bias.normal_()
    return model, tokenizer


MAKERS = [
    make_bert, make_classifier, make_gpt2, make_llama, make_tied_llama, make_t5, make_mt5, make_xlm_roberta, make_bart,
]  # fmt: skip


def trim(make, folder, *, dtype=torch.float32, texts=USED, **options):
    torch.manual_seed(1)
    model, tokenizer = make()
    for parameter in model.parameters():  # biases and norms start equal for all ids
        torch.nn.init.normal_(parameter, std=0.3)
    if hasattr(model.get_input_embeddings(), "padding_idx"):
        model.get_input_embeddings().weight.data[model.config.pad_token_id or 0] = 0.25
    model = model.to(dtype).eval()
    report = trim_model(model, tokenizer, seen(tokenizer, texts), folder, close=True, **options)
    return model, tokenizer, report


def encoded(tokenizer, texts):
    rows = tokenizer(texts, padding=False)["input_ids"]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else rows[0][0]
    width = max(len(row) for row in rows)
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def run(model, batch):
    if model.config.is_encoder_decoder:
        batch = batch | {"decoder_input_ids": batch["input_ids"]}
    with torch.no_grad():
        return model(**batch, output_hidden_states=True)


@pytest.mark.parametrize("make", MAKERS)
def test_the_trimmed_checkpoint_is_stock_and_says_the_same(make, tmp_path):
    model, tokenizer, report = trim(make, tmp_path / "small")
    small, info = type(model).from_pretrained(tmp_path / "small", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    new_tokenizer = hf.AutoTokenizer.from_pretrained(tmp_path / "small")
    ids = torch.tensor(report.ids)
    assert small.config.get_text_config().vocab_size == len(ids) < report.rows_before

    before, after = encoded(tokenizer, USED), encoded(new_tokenizer, USED)
    assert torch.equal(ids[after["input_ids"]], before["input_ids"])
    expected, found = run(model, before), run(small.eval(), after)
    for name in ("hidden_states", "encoder_hidden_states", "decoder_hidden_states"):
        for a, b in zip(getattr(expected, name, None) or (), getattr(found, name, None) or (), strict=True):
            assert torch.equal(a, b)
    logits = expected.logits if make is make_classifier else expected.logits[..., ids]
    torch.testing.assert_close(found.logits, logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", MAKERS)
def test_every_vocabulary_tensor_is_sliced_and_ties_stay(make, tmp_path):
    model, _, report = trim(make, tmp_path / "small")
    small = type(model).from_pretrained(tmp_path / "small")
    ids = torch.tensor(report.ids)
    vocabulary = {alias.name: t.dim for t in find_tables(model).all for alias in t.aliases}
    assert set(small.state_dict()) == set(model.state_dict())
    for name, value in model.state_dict().items():
        wanted = value.index_select(vocabulary[name], ids) if name in vocabulary else value
        assert torch.equal(small.state_dict()[name], wanted), name
    names = [[n for n, p in m.named_parameters()] for m in (model, small)]
    assert names[0] == names[1]
    assert (make is make_mt5) == ("lm_head.weight" in names[1] and "shared.weight" in names[1])
    embedding, old = small.get_input_embeddings(), model.get_input_embeddings()
    assert embedding.num_embeddings == len(ids)
    assert embedding.padding_idx == (None if old.padding_idx is None else report.ids.index(old.padding_idx))


@pytest.mark.parametrize("make", [make_bert, make_llama, make_t5, make_bart])
def test_dtypes_are_kept(make, tmp_path):
    model, _, _ = trim(make, tmp_path / "small", dtype=torch.bfloat16)
    small = type(model).from_pretrained(tmp_path / "small")
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    assert json.loads((tmp_path / "small" / "config.json").read_text())["dtype"] == "bfloat16"


def test_ids_in_the_configs_are_renumbered(tmp_path):
    model, tokenizer = make_bart()
    code = tokenizer.convert_tokens_to_ids("ro_RO")
    model.generation_config.update(suppress_tokens=[7], bad_words_ids=[[7, 9], [code]], forced_bos_token_id=code)
    model.generation_config.sequence_bias = [[[7, code], -2.0]]
    model.generation_config.lang_to_id = {"<|ro|>": code}
    model.config.forced_decoder_ids = [[1, code]]
    before = model.config.to_dict(), model.generation_config.to_dict()
    report = trim_model(model, tokenizer, seen(tokenizer, USED), tmp_path / "small")
    assert (model.config.to_dict(), model.generation_config.to_dict()) == before
    small = hf.BartForConditionalGeneration.from_pretrained(tmp_path / "small")
    new = report.ids.index
    assert small.config.pad_token_id == new(1) and small.config.decoder_start_token_id == new(2)
    assert small.generation_config.forced_bos_token_id == new(code) != code
    assert small.generation_config.suppress_tokens == [new(7)]
    assert small.generation_config.bad_words_ids == [[new(7), new(9)], [new(code)]]
    assert small.generation_config.sequence_bias == [[[new(7), new(code)], -2.0]]
    written = json.loads((tmp_path / "small" / "generation_config.json").read_text())
    assert written["lang_to_id"] == {"<|ro|>": new(code)}
    assert small.config.forced_decoder_ids == [[1, new(code)]]
    assert {7, 9} & set(report.added) or {7, 9} <= set(seen(tokenizer, USED))
    assert all(i in report.reasons for i in report.added)


def test_nested_configs_are_renumbered(tmp_path):
    tokenizer = llama2()
    text = {**SIZE, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": len(tokenizer), "pad_token_id": 0}
    vision = {**SIZE, "image_size": 28, "patch_size": 14}
    config = hf.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=len(tokenizer) - 3
    )
    model = hf.Gemma3ForConditionalGeneration(config).eval()
    report = trim_model(model, tokenizer, seen(tokenizer, USED), tmp_path / "small", close=True)
    small, info = hf.Gemma3ForConditionalGeneration.from_pretrained(tmp_path / "small", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert small.config.text_config.vocab_size == len(report.ids)
    assert report.ids[small.config.image_token_index] == len(tokenizer) - 3


def test_marians_second_size_of_the_vocabulary_follows(tmp_path):
    tokenizer = mbart()
    model = hf.MarianMTModel(hf.MarianConfig(**BART, **sized(tokenizer), decoder_start_token_id=1)).eval()
    report = trim_model(model, tokenizer, seen(tokenizer, USED), tmp_path / "small", close=True)
    small = hf.MarianMTModel.from_pretrained(tmp_path / "small").eval()
    ids = torch.tensor(report.ids)
    assert small.config.vocab_size == small.config.decoder_vocab_size == len(ids)
    batch = encoded(tokenizer, USED)
    renumbered = batch | {"input_ids": torch.searchsorted(ids, batch["input_ids"])}
    torch.testing.assert_close(run(small, renumbered).logits, run(model, batch).logits[..., ids])


def test_further_tensors_by_token_id_are_refused(tmp_path):
    tokenizer = bert()
    model = hf.IBertForMaskedLM(hf.IBertConfig(**SIZE, **sized(tokenizer)))
    with pytest.raises(UnsupportedModelError, match=r"further tensors by token id.*word_embeddings\.weight_integer"):
        trim_model(model, tokenizer, seen(tokenizer, USED), tmp_path / "small")
    assert not list(tmp_path.iterdir())


def test_the_source_stays_as_it_is(tmp_path):
    model, tokenizer = make_t5()
    state = {k: (v.data_ptr(), v.clone()) for k, v in model.state_dict().items()}
    config, vocab = model.config.to_dict(), tokenizer.get_vocab()
    trim_model(model, tokenizer, seen(tokenizer, USED), tmp_path / "small")
    assert model.config.to_dict() == config and tokenizer.get_vocab() == vocab
    assert all(v.data_ptr() == state[k][0] and torch.equal(v, state[k][1]) for k, v in model.state_dict().items())
    assert model.shared.weight is model.lm_head.weight and model.shared.num_embeddings == config["vocab_size"]


def test_the_report_counts(tmp_path):
    model, tokenizer, report = trim(make_llama, tmp_path / "small")
    fewer = len(tokenizer) + 6 - len(report.ids)
    assert report.rows_before - report.rows_after == fewer > 0
    assert report.parameters_before - report.parameters_after == fewer * 32 * 2
    assert report.bytes_before - report.bytes_after == fewer * 32 * 2 * 4
    assert report.parameters_before == sum(p.numel() for p in model.parameters())
    assert set(report.added).isdisjoint(seen(tokenizer, USED)) and set(report.reasons) == set(report.added)
    assert f"{report.rows_before:,} -> {report.rows_after:,}" in str(report)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["small"]  # no temporary folder is left


def test_a_trimmed_model_trains_trims_again_and_takes_a_recipe(tmp_path):
    _, _, report = trim(make_gpt2, tmp_path / "one", texts=CORPUS)
    model = hf.GPT2LMHeadModel.from_pretrained(tmp_path / "one")
    tokenizer = hf.AutoTokenizer.from_pretrained(tmp_path / "one")
    recipe = PartialEmbedding.scan(USED, tokenizer=tokenizer, model=model, progress=False, head="split", force=True)
    with tightfit.apply(model, recipe):
        batch = encoded(tokenizer, USED)
        model(**batch, labels=batch["input_ids"]).loss.backward()
    again = recipe.trim(model, tokenizer, tmp_path / "two", close=True)
    assert again.rows_before == report.rows_after > again.rows_after
    assert hf.GPT2LMHeadModel.from_pretrained(tmp_path / "two").config.vocab_size == again.rows_after


# -- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [make_gpt2, make_llama])
def test_missing_merge_parents_are_listed_and_nothing_is_written(make, tmp_path):
    model, tokenizer = make()
    with pytest.raises(
        ValueError, match=r"ids are merge parents of kept tokens.*Keep these ids too, or give close=True"
    ):
        trim_model(model, tokenizer, seen(tokenizer, USED), tmp_path / "small")
    assert not list(tmp_path.iterdir())


def test_a_pad_that_positions_are_counted_from_must_not_move(tmp_path):
    tokenizer = xlm_roberta()
    config = hf.RobertaConfig(**SIZE, vocab_size=len(tokenizer), pad_token_id=7, max_position_embeddings=80)
    model = hf.RobertaForMaskedLM(config)
    ids = [i for i in range(len(tokenizer)) if i not in (5, 6)]
    with pytest.raises(
        ValueError, match=r"position_embeddings counts positions from the pad id 7.*become 5.*range\(7\)"
    ):
        trim_model(model, tokenizer, ids, tmp_path / "small", close=True)
    trim_model(model, tokenizer, [*range(7), *ids[40:], 7], tmp_path / "small", close=True)


def test_what_cannot_be_trimmed(tmp_path):
    model, tokenizer = make_bert()
    ids, folder = seen(tokenizer, USED), tmp_path / "small"
    with pytest.raises(ValueError, match=r"ids -2, 9999 are outside the model's table of \d+ rows"):
        trim_model(model, tokenizer, [*ids, 9999, -2], folder)
    with pytest.raises(ValueError, match="no ids to keep"):
        trim_model(model, tokenizer, [], folder)
    with pytest.raises(ValueError, match="given more than once"):
        trim_model(model, tokenizer, [8, 8], folder)
    with pytest.raises(ValueError, match="ids are missing"):
        PartialEmbedding().trim(model, tokenizer, folder)
    with tightfit.apply(model, Lora(rank=2)), pytest.raises(StateError, match=r"carries a recipe|carries adapters"):
        trim_model(model, tokenizer, ids, folder)
    with torch.device("meta"):
        empty = hf.BertForMaskedLM(model.config)
    with pytest.raises(StateError, match="meta device"):
        trim_model(empty, tokenizer, ids, folder)
    with pytest.raises(UnsupportedModelError, match=r"Linear is no transformers model"):
        trim_model(torch.nn.Linear(2, 2), tokenizer, ids, folder)
    model.config.vocab_size += 1
    with pytest.raises(UnsupportedModelError, match=r"no config of BertForMaskedLM has vocab_size \d+"):
        trim_model(model, tokenizer, ids, folder)
    model.config.vocab_size -= 1
    tokenizer.add_special_tokens({"mask_token": "[NEW]"})
    with pytest.raises(
        ValueError, match=r"needs the ids \d+, but the model's table has \d+ rows.*resize_token_embeddings"
    ):
        trim_model(model, tokenizer, ids, folder)
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_refused(tmp_path):
    (tmp_path / "note").write_text("mine")
    model, tokenizer = make_bert()
    with pytest.raises(ArtifactError, match="exists and is not an empty folder; give a new folder"):
        trim_model(model, tokenizer, seen(tokenizer, USED), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["note"]
