"""Quantised bases (bitsandbytes) and TRL's trainers with a reduced vocabulary, beside the same without it."""

import copy
import importlib.util

import models
import pytest
import torch
from partial_embedding_cases import own_loss, train

import tightfit
from tightfit import Lora, PartialEmbedding
from tightfit.core.errors import StateError

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
needs_trl = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed")


def quantised(folder, bits):
    """The tiny Llama of `folder`, loaded in 4 or 8 bits."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
    config = BitsAndBytesConfig(**(four if bits == 4 else {"load_in_8bit": True}))
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map={"": "cpu"})


@needs_bitsandbytes
@pytest.mark.parametrize("order", ["recipe", "adapters first", "adapters last"])
@pytest.mark.parametrize("bits", [4, 8])
def test_adapters_on_a_quantised_base(bits, order, tmp_path):
    import peft

    models.build("llama", dropout=0.0).save_pretrained(tmp_path / "base")
    stock, reduced = (quantised(tmp_path / "base", bits) for _ in range(2))
    assert type(reduced.model.layers[0].mlp.up_proj).__name__ == {4: "Linear4bit", 8: "Linear8bitLt"}[bits]
    part = PartialEmbedding(ids=models.kept_ids(stock), head="split", force=True)
    config = peft.LoraConfig(r=4, target_modules="all-linear")
    torch.manual_seed(2)
    if order == "recipe":
        plain = tightfit.apply(stock, Lora(rank=4)).model
        torch.manual_seed(2)
        ours = tightfit.apply(reduced, [part, Lora(rank=4)]).model
    else:
        plain = peft.get_peft_model(stock, copy.deepcopy(config))
        torch.manual_seed(2)
        if order == "adapters first":
            ours = peft.get_peft_model(reduced, copy.deepcopy(config))
            tightfit.apply(ours, part)
        else:
            tightfit.apply(reduced, part)
            ours = peft.get_peft_model(reduced, copy.deepcopy(config))
    batches = [models.batch(stock, seed=s) for s in range(3)]
    make = lambda m: torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2)  # noqa: E731
    expected = train(plain, batches, make(plain), loss=own_loss)
    assert train(ours, batches, make(ours), loss=own_loss) == pytest.approx(expected, rel=1e-5)
    assert len(ours.get_input_embeddings().weight) == 62
    adapters = {n: p for n, p in plain.named_parameters() if "lora_" in n}
    own = {n: p for n, p in ours.named_parameters() if "lora_" in n}
    assert adapters.keys() == own.keys() and adapters
    for name, value in adapters.items():
        torch.testing.assert_close(own[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def fine_tune(recipe, folder):
    """Losses of three steps of TRL's SFTTrainer on a tiny Llama under the recipe, and the model."""
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    inner = Tokenizer(WordLevel({f"w{i}": i for i in range(120)}, unk_token="w119"))
    inner.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="w0", eos_token="w2", unk_token="w119")
    rows = Dataset.from_dict({"text": [" ".join(f"w{3 + (i * k) % 37}" for k in range(12)) for i in range(16)]})
    torch.manual_seed(3)
    applied = tightfit.apply(models.build("llama", dropout=0.0), recipe)
    steps = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "weight_decay": 0.0, "seed": 1}
    quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "logging_steps": 1}
    settings = SFTConfig(folder, max_length=16, bf16=False, **steps, **quiet)
    trainer = SFTTrainer(
        applied.model, settings, train_dataset=rows, processing_class=tokenizer, callbacks=[applied.callback()]
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], applied.model


SEEN = sorted({0, 1, 2, 119, *range(3, 40)})


@needs_trl
@pytest.mark.parametrize("lora", [False, True])
def test_supervised_fine_tuning_with_trl(lora, tmp_path):
    recipe = [Lora(rank=4)] if lora else []
    expected, _ = fine_tune(recipe, tmp_path / "stock")
    found, model = fine_tune([*recipe, PartialEmbedding(ids=SEEN, head="full", force=True)], tmp_path / "ours")
    assert len(expected) == 3 and expected[2] < expected[0]
    assert found == pytest.approx(expected, rel=1e-4)
    assert len(model.get_input_embeddings().weight) == len(SEEN)


@needs_trl
def test_a_reduced_head_under_the_fused_loss_of_trl_is_refused(tmp_path):
    with pytest.raises(StateError, match=r"head='split'.*lm_head.weight, which holds 41 of 120 rows; use head='full'"):
        fine_tune([Lora(rank=4), PartialEmbedding(ids=SEEN, force=True)], tmp_path)
