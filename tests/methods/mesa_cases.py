"""Models and measures of the Mesa tests."""

import copy
import gc

import models
import torch
import transformers as hf
from checks.state import gradients

import tightfit
from tightfit.core.memory import saved_bytes
from tightfit.core.simulate import example_batch

SIZE = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 128}
WORDS = {"vocab_size": models.VOCABULARY, "max_position_embeddings": 66}
DECODER = {**SIZE, **WORDS, "num_key_value_heads": 1}


def no_dropout():
    return {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


FAMILIES = {
    "bert": lambda: hf.BertForSequenceClassification(hf.BertConfig(**SIZE, **WORDS)),
    "roberta": lambda: hf.RobertaForMaskedLM(hf.RobertaConfig(**SIZE, **WORDS, pad_token_id=1)),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(n_embd=64, n_layer=2, n_head=2, n_positions=66, vocab_size=120, eos_token_id=2)
    ),
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER)),
    "t5": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(d_model=64, d_kv=32, d_ff=128, num_layers=2, num_heads=2, vocab_size=120, decoder_start_token_id=0)
    ),
    "t5 gated": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(
            d_model=64,
            d_kv=32,
            d_ff=128,
            num_layers=2,
            num_heads=2,
            vocab_size=120,
            decoder_start_token_id=0,
            feed_forward_proj="gated-gelu",
        )
    ),
    "vit": lambda: hf.ViTForImageClassification(hf.ViTConfig(**SIZE, image_size=32, patch_size=8, num_labels=3)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**DECODER)),
    "gemma": lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**DECODER, head_dim=32, pad_token_id=0)),
}
WITHOUT_DROPOUT = {
    "bert": lambda: hf.BertForSequenceClassification(hf.BertConfig(**SIZE, **WORDS, **no_dropout())),
    "llama": FAMILIES["llama"],
}


def build(family, dtype=torch.float32, table=FAMILIES):
    torch.manual_seed(0)
    return table[family]().to(dtype).train()


def batch_of(model, **options):
    if isinstance(model, hf.ViTForImageClassification):
        batch = example_batch(model, 2, 8)
        return {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in batch.items()}
    return models.batch(model, **options)


def kept_bytes(step):
    """Saved bytes of a step, in which no model of an earlier test is collected."""
    gc.collect()
    return saved_bytes(step)


def twin(model, *recipe, seed=3):
    """A copy of the model with the recipe applied."""
    made = copy.deepcopy(model)
    torch.manual_seed(seed)
    tightfit.apply(made, list(recipe))
    return made


def error(found, wanted):
    """Relative norm of the difference over all gradients."""
    assert set(found) == set(wanted) and wanted
    off = sum((found[name] - grad).double().square().sum() for name, grad in wanted.items())
    return float((off / sum(grad.double().square().sum() for grad in wanted.values())).sqrt())


def gradient_error(stock, coded, batch, **options):
    (loss, found), (wanted_loss, wanted) = gradients(coded, batch, **options), gradients(stock, batch, **options)
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-5, atol=1e-6)
    return error(found, wanted)


def wide(family, layers):
    """Models whose widths are whole groups."""
    size = {**SIZE, "hidden_size": 256, "intermediate_size": 640, "num_attention_heads": 4, "num_hidden_layers": layers}
    torch.manual_seed(0)
    if family == "bert":
        return hf.BertForSequenceClassification(hf.BertConfig(**size, **WORDS, **no_dropout())).train()
    return hf.LlamaForCausalLM(hf.LlamaConfig(**size, **WORDS, num_key_value_heads=2)).train()


def assert_equal_gradients(found, wanted, **tolerance):
    assert set(found) == set(wanted) and wanted
    for name, grad in wanted.items():
        torch.testing.assert_close(found[name], grad, msg=lambda m, n=name: f"{n}: {m}", **tolerance)
