import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import bytes_bpe, wordpiece

from tightfit.core.errors import DataError, RecipeError
from tightfit.train.data import load_data, longest_batch
from tightfit.train.images import ImageProcessor
from tightfit.train.question_answering import read_squad
from tightfit.train.recipe_file import RecipeFile, TrainSection
from tightfit.train.rows import Rows
from tightfit.train.sources import split_off, split_tail

LABELS = "sequence-classification"


def recipe(task=LABELS, settings=None, **data):
    return RecipeFile(model="unused", task=task, data=data, train=settings or {}, output="out")


def write(path, content):
    path.write_text(content, encoding="utf-8")
    return str(path)


def tsv(path, *rows, head="text\tlabel"):
    return write(path, "\n".join([head, *rows]) + "\n")


def refused(file, tokenizer=None, kind=DataError):
    with pytest.raises(kind) as caught:
        load_data(file, tokenizer or wordpiece())
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def sentiment(tmp_path):
    train = tsv(tmp_path / "train.tsv", "good film\t1", "bad film\t0", "a very fine plot\t1")
    dev = tsv(tmp_path / "dev.tsv", "a good plot\t1")
    return {"train": train, "eval": dev, "text": ["text"], "label": "label"}


# Sequence classification


def test_sequences_are_tokenised_labelled_and_padded(sentiment):
    tokenizer = wordpiece()
    data = load_data(recipe(**sentiment), tokenizer)
    assert data.label_names == ("0", "1") and data.num_labels == 2
    assert data.problem_type == "single_label_classification"
    assert data.train["labels"][:] == [1, 0, 1] and data.eval["labels"][:] == [1]
    assert data.train[0]["input_ids"] == tokenizer("good film")["input_ids"]
    batch = data.collator([data.train[0], data.eval[0]])
    assert batch["input_ids"].shape == (2, 5) and int(batch["attention_mask"].sum()) == 9
    assert data.train_texts == ["good film", "bad film", "a very fine plot"] and data.notes == ()


def test_pairs_use_both_texts(tmp_path):
    path = tsv(tmp_path / "p.tsv", "good\tfilm\t0", "bad\tplot\t1", head="a\tb\ty")
    tokenizer = wordpiece()
    data = load_data(recipe(train=path, eval=path, text=["a", "b"], label="y"), tokenizer)
    assert data.train[0]["input_ids"] == tokenizer("good", "film")["input_ids"]
    assert data.train[0]["token_type_ids"] == [0, 0, 0, 1, 1]
    assert data.train_texts[1] == ("bad", "plot")


def test_longer_rows_are_cut_and_counted(sentiment):
    data = load_data(recipe(settings={"max_length": 4}, **sentiment), wordpiece())
    assert max(map(len, data.train["input_ids"][:])) == 4
    assert data.notes == (
        "1 of 3 train rows are longer than train.max_length 4 tokens and were cut",
        "1 of 1 eval rows are longer than train.max_length 4 tokens and were cut",
    )


def test_a_length_that_special_tokens_fill_is_refused(sentiment, tmp_path):
    message = refused(recipe(settings={"max_length": 2}, **sentiment), kind=RecipeError)
    assert "train.max_length: got 2, accepted is more than the 2 tokens" in message
    path = tsv(tmp_path / "p.tsv", "good\tfilm\t0", "bad\tplot\t1", head="a\tb\ty")
    pairs = recipe(settings={"max_length": 3}, train=path, eval=path, text=["a", "b"], label="y")
    assert "than the 3 tokens" in refused(pairs, kind=RecipeError)
    words = recipe("token-classification", {"max_length": 1}, train="unread.conll")
    assert "train.max_length: got 1" in refused(words, kind=RecipeError)
    texts = recipe("seq2seq-lm", {"max_target_length": 1}, train=path, eval=path, text="a", target="b")
    assert "train.max_target_length: got 1" in refused(texts, kind=RecipeError)


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["10", "9", "-1"], ("-1", "9", "10")),
        (["b", "a", "10"], ("10", "a", "b")),
        (["3", "4", "x.5"], ("3", "4", "x.5")),
    ],
)
def test_classes_are_sorted_numbers_by_value(tmp_path, labels, names):
    path = tsv(tmp_path / "a.tsv", *(f"film\t{label}" for label in labels))
    data = load_data(recipe(train=path, eval=path, text="text", label="label"), wordpiece())
    assert data.label_names == names
    assert [names[i] for i in data.train["labels"][:]] == labels


@pytest.mark.parametrize(
    ("values", "names"),
    [([1, 0], ("0", "1")), ([True, False], ("false", "true")), (["x", 3], ("3", "x"))],
)
def test_typed_labels(tmp_path, values, names):
    path = write(tmp_path / "a.jsonl", "\n".join(json.dumps({"text": "film", "label": v}) for v in values))
    data = load_data(recipe(train=path, eval=path, text="text", label="label"), wordpiece())
    assert data.label_names == names


@pytest.mark.parametrize("label", ["NaN", "Infinity"])
def test_a_label_that_is_no_finite_number_is_no_class(tmp_path, label):
    rows = (f'{{"text": "film", "label": {value}}}' for value in ('"x"', '"y"', label))
    path = write(tmp_path / "a.jsonl", "\n".join(rows))
    message = refused(recipe(train=path, eval=path, text="text", label="label"))
    assert "a.jsonl, line 3, column 'label'" in message and "accepted is a text or a number" in message


def test_decimal_labels_mean_regression(tmp_path):
    path = tsv(tmp_path / "a.tsv", "good\t4.5", "bad\t0.0", "fine\t3.75")
    data = load_data(recipe(train=path, eval=path, text="text", label="label"), wordpiece())
    assert (data.problem_type, data.num_labels, data.label_names) == ("regression", 1, None)
    assert any("data.regression: false" in note for note in data.notes)
    batch = data.collator([data.train[i] for i in range(3)])
    assert batch["labels"].dtype == torch.float32 and batch["labels"].tolist() == [4.5, 0.0, 3.75]
    as_classes = load_data(recipe(train=path, eval=path, text="text", label="label", regression=False), wordpiece())
    assert as_classes.label_names == ("0.0", "3.75", "4.5")


def test_whole_numbers_are_regression_only_when_asked(sentiment):
    data = load_data(recipe(regression=True, **sentiment), wordpiece())
    assert data.problem_type == "regression" and data.train["labels"][:] == [1.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("rows", "change", "words"),
    [
        (
            ["good\t1", "bad\t2"],
            {},
            ["dev.tsv, line 3, column 'label'", "'2' occurs only in the eval rows", "'0', '1'"],
        ),
        (["good\t1", " \t0"], {}, ["dev.tsv, line 3, column 'text'", "empty"]),
        (["good\t1", "bad\t"], {}, ["dev.tsv, line 3, column 'label'", "label is empty"]),
        (["good\t1"], {"label": "lable"}, ["no column 'lable'", "'text', 'label'", "did you mean 'label'"]),
        (["good\t1"], {"text": ["sentence"]}, ["train.tsv: no column 'sentence'"]),
        (["good\t1.5", "bad\tx"], {"regression": True}, ["dev.tsv, line 3", "'x'", "a number"]),
        (["good\t1e999"], {"regression": True}, ["dev.tsv, line 2", "finite"]),
        (["good\tnan"], {"regression": True}, ["dev.tsv, line 2", "'nan'", "a number"]),
    ],
)
def test_bad_rows_and_columns(sentiment, tmp_path, rows, change, words):
    tsv(tmp_path / "dev.tsv", *rows)
    message = refused(recipe(**{**sentiment, **change}))
    for word in words:
        assert word in message, message


def test_one_class_is_no_classification(tmp_path):
    path = tsv(tmp_path / "a.tsv", "good\t1", "bad\t1")
    assert "all 2 rows have the label '1'" in refused(recipe(train=path, eval=path, text="text", label="label"))


def test_a_missing_key_of_the_data_section_lists_the_columns(sentiment):
    for key in ("text", "label"):
        message = refused(recipe(**{k: v for k, v in sentiment.items() if k != key}), kind=RecipeError)
        assert f"data.{key}: task sequence-classification needs it" in message and "'text', 'label'" in message


def test_fingerprint_follows_rows_and_not_the_tokenizer(sentiment, tmp_path):
    first = load_data(recipe(**sentiment), wordpiece()).fingerprint
    assert load_data(recipe(settings={"max_length": 4}, **sentiment), bytes_bpe(pad_token="<pad>")).fingerprint == first
    tsv(tmp_path / "dev.tsv", "a good plot\t0")
    assert load_data(recipe(**sentiment), wordpiece()).fingerprint != first


def test_rows_limits_take_the_first(sentiment):
    data = load_data(recipe(rows=2, eval_rows=1, **sentiment), wordpiece())
    assert data.train_texts == ["good film", "bad film"]


# Holding rows out


ROWS = st.lists(st.sampled_from("abc"), min_size=2, max_size=40)


@given(ROWS, st.floats(0.01, 0.99), st.booleans())
def test_split_off_loses_no_row_and_no_class(classes, fraction, stratified):
    rows = Rows("x", {"n": list(range(len(classes))), "label": classes}, range(1, len(classes) + 1))
    if stratified and len(set(classes)) == len(classes):
        with pytest.raises(DataError, match="no label occurs twice"):
            split_off(rows, fraction, strata=classes)
        return
    train, held, _ = split_off(rows, fraction, strata=classes if stratified else None)
    assert sorted(train.columns["n"] + held.columns["n"]) == list(range(len(classes)))
    assert len(train) > 0 and len(held) > 0 and train.lines == [n + 1 for n in train.columns["n"]]
    if stratified:
        assert set(train.columns["label"]) == set(classes)


def test_split_keeps_class_shares_and_is_the_same_every_time():
    classes = ["a"] * 80 + ["b"] * 20
    rows = Rows("x", {"label": classes, "n": list(range(100))}, range(1, 101))
    _, held, note = split_off(rows, 0.2, strata=classes)
    assert held.columns["label"].count("a") == 16 and held.columns["label"].count("b") == 4
    assert split_off(rows, 0.2, strata=classes)[1].columns == held.columns and "20 of 100" in note
    assert len(split_off(rows, 0.2, limit=5)[1]) == 5


def test_running_text_is_split_at_its_end():
    rows = Rows("x", {"text": list("abcdefghij")}, range(1, 11), running=True)
    train, held, _ = split_tail(rows, 0.25)
    assert train.columns["text"] == list("abcdefgh") and held.columns["text"] == ["i", "j"]


# Token classification


def test_only_first_pieces_carry_tags(tmp_path):
    path = write(tmp_path / "a.conll", "good\tO\nzz\tB-X\nfilm\tI-X\n\nbad\tO\n")
    tokenizer = wordpiece()
    data = load_data(recipe("token-classification", train=path, eval=path), tokenizer)
    assert data.label_names == ("O", "B-X", "I-X")
    assert tokenizer.convert_ids_to_tokens(data.train[0]["input_ids"]) == ["[CLS]", "good", "z", "##z", "film", "[SEP]"]
    assert data.train[0]["labels"] == [-100, 0, 1, -100, 2, -100]
    batch = data.collator([data.train[0], data.train[1]])
    assert batch["labels"][1].tolist() == [-100, 0, -100, -100, -100, -100]


def test_tags_from_columns_and_words_that_get_lost(tmp_path):
    path = write(tmp_path / "a.jsonl", json.dumps({"w": ["good", "\u200b", "bad", "film"], "t": ["A", "B", "A", "B"]}))
    data = load_data(
        recipe("token-classification", {"max_length": 4}, train=path, eval=path, text="w", tags="t"), wordpiece()
    )
    assert data.train[0]["labels"] == [-100, 0, 0, -100]
    assert "1 of 1 train rows" in data.notes[0] and "2 train words" in data.notes[1]


def test_a_rare_tag_may_fall_to_the_rows_that_are_held_out(tmp_path):
    path = write(tmp_path / "a.conll", "".join(f"film\tB-{i}\n\n" for i in range(10)))
    data = load_data(recipe("token-classification", train=path), wordpiece())
    assert len(data.train) == 9 and data.label_names == tuple(f"B-{i}" for i in range(10))


@pytest.mark.parametrize(
    ("dev", "words"),
    [
        ({"w": ["good"], "t": ["A", "B"]}, ["line 1, column 't'", "2 tags for 1 tokens"]),
        ({"w": ["good"], "t": ["C"]}, ["line 1, column 't'", "'C' occurs only in the eval rows"]),
        ({"w": "good", "t": ["A"]}, ["column 'w'", "got str", "list of texts"]),
        ({"w": [], "t": []}, ["column 'w'", "the list is empty"]),
    ],
)
def test_bad_tags(tmp_path, dev, words):
    train = write(tmp_path / "a.jsonl", json.dumps({"w": ["good", "bad"], "t": ["A", "B"]}))
    other = write(tmp_path / "b.jsonl", json.dumps(dev))
    message = refused(recipe("token-classification", train=train, eval=other, text="w", tags="t"))
    assert all(word in message for word in words), message


# Language models


def test_running_text_is_packed_without_loss(tmp_path):
    text = "".join(f"the quick brown fox {i}\n" for i in range(50))
    path = write(tmp_path / "a.txt", text)
    tokenizer = bytes_bpe(eos_token="<end>", pad_token="<pad>")
    data = load_data(recipe("causal-lm", {"max_length": 16}, train=path, eval=path), tokenizer)
    blocks = data.train["input_ids"][:]
    assert {len(b) for b in blocks[:-1]} == {16} and len(blocks[-1]) <= 16
    assert tokenizer.decode(list(itertools.chain(*blocks))) == text
    assert data.train["labels"][:] == blocks


def test_a_text_without_a_token_is_refused(tmp_path):
    path = write(tmp_path / "a.txt", "\x00")
    message = refused(recipe("causal-lm", train=path, eval=path))
    assert str(path) in message and "no token of the train text" in message


@pytest.mark.parametrize("data", [{"text": "t"}, {"text": "t", "packed": True}])
def test_a_length_that_leaves_nothing_to_learn(tmp_path, data):
    path = write(tmp_path / "a.jsonl", json.dumps({"t": "good film"}))
    with_more = recipe("causal-lm", {"max_length": 2}, train=path, eval=path, **data)
    assert len(load_data(with_more, wordpiece()).train)
    message = refused(recipe("causal-lm", {"max_length": 1}, train=path, eval=path, **data))
    assert "train.max_length: 1 leaves no token with a label in the train rows" in message


def test_rows_end_and_packed_rows_are_joined(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"t": "good film"}\n{"t": "bad"}\n')
    tokenizer = bytes_bpe(eos_token="<end>", pad_token="<pad>")
    options = {"train": path, "eval": path, "text": "t"}
    rows = load_data(recipe("causal-lm", **options), tokenizer).train["input_ids"][:]
    assert [tokenizer.decode(r) for r in rows] == ["good film<end>", "bad<end>"]
    packed = load_data(recipe("causal-lm", {"max_length": 4}, packed=True, **options), tokenizer).train["input_ids"][:]
    assert list(itertools.chain(*packed)) == list(itertools.chain(*rows))


def test_running_text_and_documents_beside_each_other(tmp_path):
    running = write(tmp_path / "a.txt", "good film\nbad\n")
    rows = write(tmp_path / "a.jsonl", '{"text": "good film"}\n{"text": "bad"}\n')
    tokenizer = bytes_bpe(eos_token="<end>", pad_token="<pad>")
    for train, held_out in ((running, rows), (rows, running)):
        file = recipe("causal-lm", {"max_length": 64}, train=train, eval=held_out, text="text", packed=True)
        data = load_data(file, tokenizer)
        read = {
            path: tokenizer.decode(part[0]["input_ids"]) for path, part in ((train, data.train), (held_out, data.eval))
        }
        assert read == {running: "good film\nbad\n", rows: "good film<end>bad<end>"}


def test_loss_is_on_the_target_only(tmp_path):
    path = write(tmp_path / "a.jsonl", json.dumps({"q": "the quick brown fox", "a": "good"}))
    tokenizer = bytes_bpe(eos_token="<end>", pad_token="<pad>")
    options = {"train": path, "eval": path, "text": "q", "target": "a"}
    row = load_data(recipe("causal-lm", **options), tokenizer).train[0]
    assert tokenizer.decode(row["input_ids"]) == "the quick brown fox\ngood<end>"
    kept = [i for i in row["labels"] if i != -100]
    assert tokenizer.decode(kept) == "good<end>" and row["input_ids"][-len(kept) :] == kept
    data = load_data(recipe("causal-lm", {"max_length": len(kept) + 2}, **options), tokenizer)
    assert data.train[0]["input_ids"] == row["input_ids"][-len(kept) - 2 :] and "1 of 1 train rows" in data.notes[0]
    assert "packed" in refused(recipe("causal-lm", packed=True, **options), tokenizer, RecipeError)


def test_sources_and_targets(tmp_path):
    path = tsv(tmp_path / "a.tsv", "good film\tbad", "fox\tthe lazy dog", head="in\tout")
    tokenizer = bytes_bpe(eos_token="<end>", pad_token="<pad>")
    file = recipe("seq2seq-lm", {"max_target_length": 3}, train=path, eval=path, text="in", target="out")
    data = load_data(file, tokenizer)
    assert tokenizer.decode(data.train[0]["input_ids"]) == "good film"
    assert len(data.train[1]["labels"]) == 3 and any("target rows are longer" in note for note in data.notes)
    batch = data.collator([data.train[0], data.train[1]])
    assert (batch["labels"] == -100).any() and batch["labels"].shape[1] == max(map(len, data.train["labels"][:]))


# Data sets of the datasets library


def test_saved_folders_keep_their_class_order(tmp_path):
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["pos", "neg"])})
    train = Dataset.from_dict({"text": ["good", "bad"], "label": [0, 1]}, features=features)
    test = Dataset.from_dict({"text": ["fine"], "label": [0]}, features=features)
    DatasetDict({"train": train, "test": test}).save_to_disk(tmp_path / "saved")
    data = load_data(recipe(train=str(tmp_path / "saved"), text="text", label="label"), wordpiece())
    assert data.label_names == ("pos", "neg") and data.eval_texts == ["fine"] and "split 'test'" in data.notes[0]
    named = load_data(
        recipe(train=f"{tmp_path / 'saved'}:train", eval=f"{tmp_path / 'saved'}:test", text="text", label="label"),
        wordpiece(),
    )
    assert named.fingerprint == data.fingerprint
    message = refused(recipe(train=f"{tmp_path / 'saved'}:trian", text="text", label="label"))
    assert "no split 'trian'; it has train, test; did you mean 'train'?" in message
    unlabelled = Dataset.from_dict({"text": ["a"], "label": [-1]}, features=features)
    unlabelled.save_to_disk(tmp_path / "test")
    assert "unlabelled split" in refused(recipe(train=str(tmp_path / "test"), text="text", label="label"))


def test_spaces_around_declared_class_names_do_not_count(tmp_path):
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["pos ", " neg"])})
    Dataset.from_dict({"text": ["good", "bad"], "label": [0, 1]}, features=features).save_to_disk(tmp_path / "saved")
    saved = str(tmp_path / "saved")
    data = load_data(recipe(train=saved, eval=saved, text="text", label="label"), wordpiece())
    assert data.label_names == ("pos", "neg") and data.train["labels"][:] == [0, 1]


def test_a_folder_of_files(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "train.csv").write_text("text,label\ngood,1\nbad,0\n")
    (folder / "test.csv").write_text("text,label\nfine,1\n")
    data = load_data(recipe(train=str(folder), text="text", label="label"), wordpiece())
    assert len(data.train) == 2 and data.eval_texts == ["fine"]


def test_no_such_data_set():
    message = refused(recipe(train="nobody/nothing-of-this-name", text="text", label="label"))
    assert "data.train: 'nobody/nothing-of-this-name'" in message


# The batch of the peak


def test_longest_batch_takes_the_longest_rows(sentiment):
    data = load_data(recipe(**sentiment), wordpiece())
    batch = longest_batch(data, 2)
    assert batch["input_ids"].shape == (2, 6) and batch["labels"].tolist() == [1, 1]
    assert longest_batch(data, 10)["input_ids"].shape[0] == 3


def test_longest_batch_has_padding_where_a_batch_can(sentiment):
    cut = tsv(Path(sentiment["eval"]).parent / "cut.tsv", "good\t1", *(["a very fine plot\t0"] * 3))
    data = load_data(recipe(settings={"max_length": 5}, **sentiment | {"train": cut}), wordpiece())
    batch = longest_batch(data, 2)
    assert batch["attention_mask"].sum(1).tolist() == [5, 3] and batch["labels"].tolist() == [0, 1]
    assert longest_batch(data, 1)["input_ids"].shape == (1, 5)


def test_longest_batch_is_as_wide_as_the_longest_source_and_target(tmp_path):
    middle = ["good film good film\tgood film good film"] * 4
    path = tsv(tmp_path / "a.tsv", *middle, "a very very fine plot\tbad", "fox\ta very very fine plot", head="in\tout")
    data = load_data(
        recipe("seq2seq-lm", train=path, eval=path, text="in", target="out"),
        bytes_bpe(eos_token="<end>", pad_token="<pad>"),
    )
    for name in ("input_ids", "labels"):
        longest = max(map(len, data.train[name][:]))
        assert longest > len(data.train[name][0])
        for size in (2, 3):
            assert longest_batch(data, size)[name].shape == (size, longest)


# Images and questions


def test_images_from_npz(tmp_path):
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    path = tmp_path / "a.npz"
    labels = np.array([0, 1, 0, 1])
    np.savez(
        path,
        train_images=images,
        train_labels=labels,
        test_images=images[:2],
        test_labels=labels[:2],
        class_names=np.array(["cat", "dog"]),
    )
    data = load_data(recipe("image-classification", train=str(path)), ImageProcessor(16, 16))
    assert (
        data.label_names == ("cat", "dog") and len(data.eval) == 2 and data.train["labels"][:].tolist() == [0, 1, 0, 1]
    )
    batch = longest_batch(data, 3)
    assert batch["pixel_values"].shape == (3, 3, 16, 16) and batch["labels"].tolist() == [0, 1, 0]
    same = ImageProcessor(8, 8)(images[:1])
    assert torch.equal(same, (torch.from_numpy(images[:1]).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5)


@pytest.mark.parametrize(
    ("shape", "labels", "words"),
    [
        ((4, 3, 8, 8), [0, 1, 0, 1], "images of shape (3, 8, 8) have 8 channels"),
        ((4, 8, 8, 4), [0, 1, 0, 1], "have 4 channels (the last dimension), the model takes 3"),
        ((4, 8, 8, 3), [0.0, 1.0, 0.0, 1.0], "got labels of float64"),
        ((4, 8, 8, 3), ["cat", "dog", "cat", "dog"], "accepted are whole numbers"),
        ((4, 8, 8, 3), [[0], [1], [0], [1]], "labels (4, 1)"),
        ((4, 0, 8, 3), [0, 1, 0, 1], "got images uint8 (4, 0, 8, 3)"),
    ],
)
def test_bad_arrays(tmp_path, shape, labels, words):
    names = np.array(["cat", "dog"])
    np.savez(tmp_path / "a.npz", images=np.zeros(shape, np.uint8), labels=np.array(labels), class_names=names)
    assert words in refused(recipe("image-classification", train=str(tmp_path / "a.npz")), ImageProcessor(8, 8))


def test_images_from_idx(tmp_path):
    images = np.arange(3 * 4 * 4, dtype=np.uint8).reshape(3, 4, 4)
    (tmp_path / "t-images-idx3-ubyte").write_bytes(
        bytes([0, 0, 8, 3]) + np.array([3, 4, 4], ">u4").tobytes() + images.tobytes()
    )
    (tmp_path / "t-labels-idx1-ubyte").write_bytes(
        bytes([0, 0, 8, 1]) + np.array([3], ">u4").tobytes() + bytes([7, 2, 7])
    )
    file = recipe("image-classification", train=str(tmp_path / "t-images-idx3-ubyte"))
    data = load_data(file, ImageProcessor(4, 4))
    assert data.label_names == ("2", "7") and len(data.train) == 2 and len(data.eval) == 1
    assert longest_batch(data, 1)["pixel_values"].shape == (1, 3, 4, 4)
    (tmp_path / "t-labels-idx1-ubyte").write_bytes(b"no idx file")
    assert "not an IDX file" in refused(file, ImageProcessor(4, 4))
    (tmp_path / "t-labels-idx1-ubyte").unlink()
    assert "no labels beside it, looked for t-labels-idx1-ubyte" in refused(file, ImageProcessor(4, 4))


def squad(path, answer="fox", start=16, context="the quick brown fox over the lazy dog", question="good film"):
    item = {"id": "q1", "question": question, "answers": [{"text": answer, "answer_start": start}]}
    paragraphs = [{"context": context, "qas": [item]}]
    return write(path, json.dumps({"data": [{"title": "t", "paragraphs": paragraphs}]}))


def test_questions_behind_a_byte_order_mark(tmp_path):
    path = squad(tmp_path / "a.json")
    plain = read_squad(path)
    Path(path).write_bytes(b"\xef\xbb\xbf" + Path(path).read_bytes())
    assert read_squad(path) == plain


def test_questions_are_windowed_and_answers_found(tmp_path):
    path = squad(tmp_path / "a.json")
    tokenizer = wordpiece()
    data = load_data(recipe("question-answering", {"max_length": 12}, train=path, eval=path), tokenizer)
    spans = {
        tokenizer.decode(row["input_ids"][row["start_positions"] : row["end_positions"] + 1]) for row in data.train
    }
    assert "fox" in spans and spans <= {"fox", "[CLS]"}
    assert len(data.train) > 1 and "1 train questions make" in data.notes[0]
    for start in (3, -21):
        assert f"the answer 'fox' is not at character {start}" in refused(
            recipe("question-answering", train=squad(tmp_path / "b.json", start=start), eval=path)
        )


def test_questions_are_held_out_by_context_whatever_the_file(tmp_path):
    contexts = ["good film", "a bad film", "the quick fox", "lazy dog"]
    asked = [(c, q) for c in contexts for q in ("which", "what", "who")]
    rows = [{"question": q, "context": c, "answers": {"text": [c], "answer_start": [0]}} for c, q in asked]
    items = [{"id": q + c, "question": q, "answers": [{"text": c, "answer_start": 0}], "context": c} for c, q in asked]
    table = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    nested = {"data": [{"paragraphs": [{"context": i.pop("context"), "qas": [i]} for i in items]}]}
    splits = []
    for path in (table, write(tmp_path / "a.json", json.dumps(nested))):
        data = load_data(recipe("question-answering", train=path, eval_fraction=0.25), wordpiece())
        assert "the questions of 1 of 4 contexts" in data.notes[0] and len(data.eval_texts) == 3
        assert not {c for _, c in data.train_texts} & {c for _, c in data.eval_texts}
        splits.append(data.eval_texts)
    assert splits[0] == splits[1]


@pytest.mark.parametrize("answer", ["fo\u0307x\u0307", "\u200bfox "])
def test_an_answer_may_end_in_characters_without_a_token(tmp_path, answer):
    path = squad(tmp_path / "a.json", answer, 10, f"the quick {answer}over the lazy dog")
    tokenizer = wordpiece()
    data = load_data(recipe("question-answering", train=path, eval=path), tokenizer)
    row = data.train[0]
    assert tokenizer.decode(row["input_ids"][row["start_positions"] : row["end_positions"] + 1]) == "fox"


def test_answers_keep_their_places_beside_padding(tmp_path):
    path = squad(tmp_path / "a.json")
    tokenizer = wordpiece()
    tokenizer.padding_side = "left"
    data = load_data(recipe("question-answering", {"max_length": 12}, train=path, eval=path), tokenizer)
    batch = data.collator([data.train[i] for i in range(len(data.train))])
    for row, ids in enumerate(batch["input_ids"]):
        assert ids[batch["start_positions"][row]] == data.train[row]["input_ids"][data.train[row]["start_positions"]]
    assert int(batch["attention_mask"].min()) == 0 and tokenizer.padding_side == "left"


@pytest.mark.parametrize("words", [14, 20, 30])
def test_a_question_must_leave_room_for_its_context(tmp_path, words):
    path = squad(tmp_path / "a.json", question=" ".join(["film"] * words), context="the quick brown fox " * 5)
    file = recipe("question-answering", {"max_length": 20}, train=path, eval=path)
    message = refused(file)
    assert f"question 'q1' has {words} tokens" in message and "train.max_length 20" in message
    assert len(load_data(file.model_copy(update={"train": TrainSection(max_length=60)}), wordpiece()).train) == 1
