"""What the side tests share: models of four blocks, and what autograd keeps of a step."""

import models
import torch
import transformers as hf

SIZE = {**models.SIZE, "num_hidden_layers": 4, "vocab_size": models.VOCABULARY}
WIDE = {"d_model": 32, "vocab_size": models.VOCABULARY}
T5 = {"d_kv": 16, "d_ff": 64, "num_layers": 4, "num_heads": 2, "decoder_start_token_id": 0}
BART = {f"{part}_{name}": value for part in ("encoder", "decoder")
        for name, value in (("layers", 4), ("ffn_dim", 64), ("attention_heads", 2))}  # fmt: skip
FOUR = {
    "bert": lambda: hf.BertForSequenceClassification(hf.BertConfig(**SIZE)),
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZE, num_key_value_heads=1)),
    "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**WIDE, **T5)),
    "bart": lambda: hf.BartForConditionalGeneration(hf.BartConfig(**WIDE, **BART, max_position_embeddings=64)),
}

OPT = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
XGLM = {"d_model": 32, "ffn_dim": 64, "num_layers": 4, "attention_heads": 2}
DROPS_APART = {
    "opt": lambda **kw: hf.OPTForCausalLM(hf.OPTConfig(**OPT, **kw)),
    "bart decoder": lambda **kw: hf.BartForCausalLM(hf.BartConfig(**BART, d_model=32, **kw)),
    "xglm": lambda **kw: hf.XGLMForCausalLM(hf.XGLMConfig(**XGLM, **kw)),
}
"""Language models whose head calls the decoder past the backbone, or whose decoder drops in its own forward."""


def drops_apart(family):
    """A seeded model of four blocks with dropout, in training mode."""
    kw = {"vocab_size": models.VOCABULARY, "max_position_embeddings": 64, "pad_token_id": 1}
    return models._seeded(lambda: DROPS_APART[family](**kw), 0.3)


def four(family, dropout=None):
    """A seeded model of four blocks a stack, in training mode."""
    return models._seeded(FOUR[family], dropout)


def side_nets(model):
    """The modules that were added."""
    return [module for name, module in model.named_modules() if name.endswith("tight_side")]


def shaken(model, std=0.3):
    """Side nets that do something: their last layers begin at zero."""
    torch.manual_seed(5)
    with torch.no_grad():
        for net in side_nets(model):
            for parameter in net.parameters():
                if not parameter.any():
                    parameter.normal_(std=std)
    return model


def made_inside(model, blocks, batch):
    """(storages made inside the named blocks, those that autograd keeps beside parameters)."""
    made, kept, alive, handles = set(), set(), [], []

    def note(module, args, out):
        for value in out if isinstance(out, tuple) else (out,):
            if torch.is_tensor(value):
                alive.append(value)  # so that no other tensor gets its place
                made.add(value.untyped_storage()._cdata)

    for name in blocks:
        for inner in list(model.get_submodule(name).modules())[1:]:
            handles.append(inner.register_forward_hook(note))

    def pack(tensor):
        alive.append(tensor)
        kept.add(tensor.untyped_storage()._cdata)
        return tensor

    own = {p.untyped_storage()._cdata for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**batch)
    for handle in handles:
        handle.remove()
    alive.clear()  # the graph holds `pack`, which holds them
    return made, kept - own
