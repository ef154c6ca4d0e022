"""Extractive question answering: SQuAD-shaped data, windows over long contexts, exact match and F1.

Answers are scored as the SQuAD v1.1 evaluation does (arXiv 1606.05250, section 6.1): lower case, without
punctuation and English articles, the best over the given answers; for languages without spaces F1 is coarse.
"""

from __future__ import annotations

import copy
import re
import string
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tightfit.core.documents import is_text, parse_json
from tightfit.core.errors import DataError
from tightfit.train.encode import build_dataset, check_fast, fingerprint
from tightfit.train.recipe_file import is_local
from tightfit.train.rows import Rows, opened
from tightfit.train.sources import read_sources

if TYPE_CHECKING:
    from tightfit.train.data import TaskData
    from tightfit.train.recipe_file import RecipeFile

BEST_ENDS = 20
LONGEST_ANSWER_TOKENS = 30
_OVERLAP = 4  # windows share a quarter of their length


class Question(NamedTuple):
    """One question with its context, the accepted answers, and where they start in the context (characters)."""

    key: str
    question: str
    context: str
    answers: tuple[str, ...]
    starts: tuple[int, ...]


def load_questions(file: RecipeFile, tokenizer: Any) -> TaskData:
    """Rows of question-answering: SQuAD JSON, or columns `question`, `context`, `answers`.

    Contexts longer than `train.max_length` become several overlapping windows; a window without the answer
    points at its first token. Without eval data whole contexts are held out.

    Raises:
        DataError: a question whose answer is not in its context where it says, or that leaves too few tokens for it.
    """
    from transformers import DataCollatorWithPadding

    from tightfit.train.data import TaskData

    check_fast(tokenizer, file.task)
    right = copy.copy(tokenizer)  # answers are positions from the left, whatever side the tokenizer pads
    right.padding_side = "right"
    train, held_out, notes = _questions(file)
    questions = {"train": train, "eval": held_out}
    mark = fingerprint(file.task, train, held_out)
    sets: dict[str, Any] = {}
    windows: dict[str, list] = {"train": [], "eval": []}
    for split, rows in questions.items():

        def encode(batch: range, split: str = split, rows: list[Question] = rows) -> dict[str, list]:
            return _encode(tokenizer, rows, batch, file.train.max_length, windows[split])

        sets[split] = build_dataset(len(rows), encode, f"tokenising {split} questions", mark)
        if len(sets[split]) > len(rows):
            notes.append(
                f"{len(rows)} {split} questions make {len(sets[split])} windows of {file.train.max_length} tokens"
            )
    return TaskData(
        task=file.task,
        train=sets["train"],
        eval=sets["eval"],
        collator=DataCollatorWithPadding(right),
        fingerprint=mark,
        train_texts=[(q.question, q.context) for q in train],
        eval_texts=[(q.question, q.context) for q in held_out],
        notes=tuple(notes),
        extra={"questions": held_out, "windows": windows["eval"]},
    )


def answer_metrics(data: TaskData) -> Callable[[Any], dict[str, float]]:
    """`compute_metrics` of question-answering: exact match and F1 (0 to 1) of the best span of each question."""
    questions: list[Question] = data.extra["questions"]
    windows: list[tuple[int, list]] = data.extra["windows"]

    def compute(prediction: Any) -> dict[str, float]:
        starts, ends = prediction.predictions[:2]
        answers = best_answers(questions, windows, starts, ends)
        scores = [score(answer, question.answers or ("",)) for answer, question in zip(answers, questions, strict=True)]
        exact, overlap = np.mean(np.array(scores, dtype=np.float64), axis=0)
        return {"exact_match": float(exact), "f1": float(overlap)}

    return compute


def best_answers(questions: list[Question], windows: list, starts: np.ndarray, ends: np.ndarray) -> list[str]:
    """The highest-scoring span of each question over all its windows; "" where no answer scores higher.

    No answer is considered only when some question of the data has none.
    """
    best: list[tuple[float, str]] = [(-np.inf, "")] * len(questions)
    null = [np.inf] * len(questions)
    for row, (index, offsets) in enumerate(windows):
        start, end = starts[row][: len(offsets)], ends[row][: len(offsets)]
        null[index] = min(null[index], float(start[0] + end[0]))
        for s in np.argsort(-start)[:BEST_ENDS]:
            for e in np.argsort(-end)[:BEST_ENDS]:
                if e < s or e - s >= LONGEST_ANSWER_TOKENS or offsets[s] is None or offsets[e] is None:
                    continue
                value = float(start[s] + end[e])
                if value > best[index][0]:
                    best[index] = (value, questions[index].context[offsets[s][0] : offsets[e][1]])
    optional = any(not question.answers for question in questions)
    return ["" if optional and null[i] > value else text for i, (value, text) in enumerate(best)]


def score(answer: str, accepted: tuple[str, ...]) -> tuple[float, float]:
    """Exact match and word F1 against the best of the accepted answers.

    >>> score("the Eiffel tower", ("Eiffel Tower", "a tower"))
    (1.0, 1.0)
    """

    def words(text: str) -> list[str]:
        text = "".join(c for c in text.lower() if c not in string.punctuation)
        return re.sub(r"\b(a|an|the)\b", " ", text).split()

    said, pairs = words(answer), []
    for wanted in map(words, accepted):
        common = sum((Counter(said) & Counter(wanted)).values())
        f1 = float(said == wanted) if not said or not wanted else 2 * common / (len(said) + len(wanted))
        pairs.append((float(said == wanted), f1))
    return max(p[0] for p in pairs), max(p[1] for p in pairs)


def _encode(tokenizer: Any, rows: list[Question], batch: range, length: int, windows: list) -> dict[str, list]:
    _check_room(tokenizer, [rows[i] for i in batch], length)
    encoded = tokenizer(
        [rows[i].question.strip() for i in batch],
        [rows[i].context for i in batch],
        truncation="only_second",
        max_length=length,
        stride=length // _OVERLAP,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    before = len(windows)
    for row, position in enumerate(encoded["overflow_to_sample_mapping"]):
        in_context = encoded.sequence_ids(row)
        offsets = [tuple(o) if s == 1 else None for o, s in zip(encoded["offset_mapping"][row], in_context)]
        windows.append((batch[position], offsets))
    found = [(index, offsets, _inside(rows[index], offsets)) for index, offsets in windows[before:]]
    answers: dict[int, set] = {}
    for index, offsets, inside in found:
        answers.setdefault(index, set()).update(offsets[i] for i in inside)
    spans = [_span(inside, offsets, answers[index]) for index, offsets, inside in found]
    kept = {k: v for k, v in encoded.items() if k not in ("overflow_to_sample_mapping", "offset_mapping")}
    return {**kept, "start_positions": [s for s, _ in spans], "end_positions": [e for _, e in spans]}


def _check_room(tokenizer: Any, questions: list[Question], length: int) -> None:
    """Raise DataError for a question that leaves no room for windows over its context."""
    room = length - tokenizer.num_special_tokens_to_add(pair=True)
    asked = tokenizer([q.question.strip() for q in questions], add_special_tokens=False, verbose=False)["input_ids"]
    for question, ids in zip(questions, asked):
        if room - len(ids) > length // _OVERLAP:
            continue
        context = tokenizer(question.context, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) + len(context) > room:
            raise DataError(
                f"question {question.key!r} has {len(ids)} tokens, which leaves {max(0, room - len(ids))} of "
                f"train.max_length {length} for its context, needed are more than {length // _OVERLAP}"
            )


def _span(inside: list[int], offsets: list, answer: set) -> tuple[int, int]:
    """First and last of the answer's tokens in a window; (0, 0) where it lacks one of them."""
    return (inside[0], inside[-1]) if inside and {offsets[i] for i in inside} == answer else (0, 0)


def _inside(question: Question, offsets: list) -> list[int]:
    """The answer's tokens in a window; its ends may have none, as accents that a tokenizer drops."""
    if not question.answers:
        return []
    begin = question.starts[0]
    end = begin + len(question.answers[0])
    return [i for i, o in enumerate(offsets) if o is not None and o[0] < end and o[1] > begin]


def _questions(file: RecipeFile) -> tuple[list[Question], list[Question], list[str]]:
    section = file.data
    notes: list[str] = []
    held: list[Question] | None = None
    if is_squad(section.train):
        train = read_squad(section.train)[: section.rows]
        if section.eval is not None:
            held = read_squad(section.eval)[: section.eval_rows]
    else:
        rows, other, notes = read_sources(section)
        train = _from_rows(rows)
        if other is not None:
            held = _from_rows(other)
    if held is not None:
        return train, held, notes
    contexts = list(dict.fromkeys(q.context for q in train))
    if len(contexts) < 2:
        raise DataError(f"{section.train}: one context cannot be split into train and eval; give data.eval")
    random = np.random.default_rng(0)
    count = min(len(contexts) - 1, max(1, round(section.eval_fraction * len(contexts))))
    chosen = {contexts[i] for i in random.permutation(len(contexts))[:count]}
    held = [q for q in train if q.context in chosen][: section.eval_rows]
    note = f"no eval data: the questions of {count} of {len(contexts)} contexts are held out"
    return [q for q in train if q.context not in chosen], held, [*notes, note]


def is_squad(name: str) -> bool:
    """Whether a local JSON file has the nested SQuAD shape."""
    if not is_local(name) or not re.search(r"\.json(\.gz)?$", name) or not Path(name).expanduser().is_file():
        return False
    try:
        with opened(Path(name).expanduser()) as file:
            return bool(re.match(rb"\s*\{", file.read(64)))
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"{name}: cannot be read: {error}") from None


def read_squad(name: str) -> list[Question]:
    """Read SQuAD v1.1 or v2.0 JSON, every answer checked against its context. Raises: DataError."""
    try:
        with opened(Path(name).expanduser()) as file:
            content = parse_json(file.read().decode("utf-8-sig"))
    except FileNotFoundError:
        raise DataError(f"{name}: no such data file") from None
    except DataError:
        raise
    except (ValueError, EOFError, OSError, zlib.error) as error:
        raise DataError(f"{name}: not a readable SQuAD JSON file: {error}") from None
    found: list[Question] = []
    try:
        for article in content["data"]:
            for paragraph in article["paragraphs"]:
                for item in paragraph["qas"]:
                    answers = [] if item.get("is_impossible") else item["answers"]
                    texts = tuple(a["text"] for a in answers)
                    starts = tuple(a["answer_start"] for a in answers)
                    question = Question(str(item["id"]), item["question"], paragraph["context"], texts, starts)
                    found.append(_checked(question, f"{name}, question {item['id']!r}"))
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{name}: not in the SQuAD shape data / paragraphs / context, qas: {error} missing") from None
    if not found:
        raise DataError(f"{name}: the file holds no questions")
    return found


def _from_rows(rows: Rows) -> list[Question]:
    questions, contexts, answers = rows.texts("question"), rows.texts("context"), rows.column("answers")
    found = []
    for row, answer in enumerate(answers):
        place = rows.place(row, "answers")
        if not isinstance(answer, dict) or {"text", "answer_start"} - set(answer):
            raise DataError(f"{place}: got {type(answer).__name__}, accepted is an object with text and answer_start")
        texts, starts = answer["text"], answer["answer_start"]
        if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
            raise DataError(f"{place}: text and answer_start must be lists of one length")
        found.append(_checked(Question(str(row), questions[row], contexts[row], tuple(texts), tuple(starts)), place))
    return found


def _checked(question: Question, place: str) -> Question:
    for field in (question.question, question.context, *question.answers):
        if not is_text(field):
            raise DataError(f"{place}: got {field!r}, accepted is text")
    for text, start in zip(question.answers, question.starts, strict=True):
        if isinstance(start, bool) or not isinstance(start, int):
            raise DataError(f"{place}: answer_start is {start!r}, accepted is a whole number")
        there = question.context[start : start + len(text)] if start >= 0 else ""
        if there != text or not text:
            raise DataError(f"{place}: the answer {text!r} is not at character {start} of the context, {there!r} is")
    return question
