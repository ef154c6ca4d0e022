"""Reversible on quantised bases (bitsandbytes), under other adapters, and in TRL's preference training."""

import copy
import importlib.util

import models
import pytest
import torch
from checks.state import gradients
from reversible_cases import close, straight, two_step

import tightfit
from tightfit import FusedOps, Lora, Mesa, Reversible

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
needs_trl = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed")


def bits_of(applied):
    return applied.report()["methods"]["Reversible"]["bits_behind_the_point"]


@needs_bitsandbytes
@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_adapters_on_a_quantised_base(bits, tmp_path):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    models.build("llama").save_pretrained(tmp_path)
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
    config = BitsAndBytesConfig(**(four if bits == 4 else {"load_in_8bit": True}))
    pair = [
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map={"": "cpu"}).train()
        for _ in range(2)
    ]
    torch.manual_seed(2)
    applied = tightfit.apply(pair[0], [Lora(rank=4), Reversible()])
    assert not applied.report()["methods"]["Reversible"]["kept_blocks"]
    torch.manual_seed(2)
    tightfit.apply(pair[1], Lora(rank=4))
    straight(pair[1], bits_of(applied), two_step(4))
    for model in pair:
        torch.manual_seed(3)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.05)
    batch = models.batch(pair[0])
    (loss, found), (slow_loss, wanted) = (gradients(model, batch) for model in pair)
    assert torch.equal(loss, slow_loss)
    close(found, wanted, 1e-5)


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
@pytest.mark.parametrize("others", [[FusedOps()], [FusedOps(), Lora(rank=2, dropout=0.1)]], ids=str)
def test_fused_operators_inside(family, others):
    model, slow = models.build(family), models.build(family)
    torch.manual_seed(2)
    applied = tightfit.apply(model, [*others, Reversible()])
    torch.manual_seed(2)
    tightfit.apply(slow, others)
    straight(slow, bits_of(applied), two_step(4))
    batch = models.batch(model)
    (loss, found), (slow_loss, wanted) = gradients(model, batch), gradients(slow, batch)
    assert torch.equal(loss, slow_loss)
    close(found, wanted, 1e-5)


def test_codes_inside_are_the_codes_of_the_second_run():
    model, slow = models.build("llama"), models.build("llama")
    applied = tightfit.apply(model, [Mesa(attention=True), Reversible()])
    tightfit.apply(slow, Mesa(attention=True))
    straight(slow, bits_of(applied), two_step(4))
    batch = models.batch(model)
    close(gradients(model, batch)[1], gradients(slow, batch)[1], 1e-4)


@needs_trl
@pytest.mark.slow
def test_preference_training_with_trl(tmp_path):
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    inner = Tokenizer(WordLevel({f"w{i}": i for i in range(120)}, unk_token="w119"))
    inner.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="w0", eos_token="w2", unk_token="w119")
    text = [[" ".join(f"w{3 + (i * k + j) % 37}" for k in range(6)) for i in range(16)] for j in range(3)]
    rows = Dataset.from_dict(dict(zip(("prompt", "chosen", "rejected"), text)))
    losses = []
    for slow in (False, True):
        model = models.build("llama", dropout=0.0)
        reference = copy.deepcopy(model)
        if slow:
            straight(model, losses[0][1], two_step(4))
        else:
            applied = tightfit.apply(model, Reversible())
        steps = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "seed": 1}
        quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "logging_steps": 1}
        settings = DPOConfig(str(tmp_path / str(slow)), bf16=False, gradient_checkpointing=False, **steps, **quiet)
        trainer = DPOTrainer(model, reference, args=settings, train_dataset=rows, processing_class=tokenizer)
        trainer.train()
        found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        losses.append((found, None if slow else bits_of(applied)))
    assert len(losses[0][0]) == 3
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-3)
