"""Metrics in numpy: classification, regression, entities, language models, extractive answers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

IGNORED = -100
_PREFIXES = ("B", "I", "E", "L", "S", "U")  # of BIO, BIOES and BILOU tags


def is_score(key: str) -> bool:
    """Whether a Trainer's figure tells of the model, not of how fast it was evaluated."""
    return key.startswith("eval_") and not key.endswith(("_runtime", "_per_second", "_preparation_time"))


def accuracy(predicted: np.ndarray, wanted: np.ndarray) -> float:
    """Share of equal entries.

    >>> accuracy(np.array([1, 0, 1]), np.array([1, 1, 1])) == 2 / 3
    True
    """
    return float(np.mean(predicted == wanted))


def f1(predicted: np.ndarray, wanted: np.ndarray, classes: int) -> float:
    """F1 of class 1 for two classes, the plain mean over classes for more; an absent class counts 0."""
    scores = []
    for c in [1] if classes == 2 else range(classes):
        hits = np.sum((predicted == c) & (wanted == c))
        total = np.sum(predicted == c) + np.sum(wanted == c)
        scores.append(2 * hits / total if total else 0.0)
    return float(np.mean(scores))


def matthews(predicted: np.ndarray, wanted: np.ndarray, classes: int) -> float:
    """Matthews correlation for any number of classes; 0 when one side is constant."""
    confusion = np.zeros((classes, classes), dtype=np.float64)
    np.add.at(confusion, (wanted, predicted), 1)
    total, hits = confusion.sum(), np.trace(confusion)
    true, said = confusion.sum(axis=1), confusion.sum(axis=0)
    spread = math.sqrt(max(total**2 - said @ said, 0)) * math.sqrt(max(total**2 - true @ true, 0))
    return float((hits * total - true @ said) / spread) if spread else 0.0


def pearson(a: np.ndarray, b: np.ndarray) -> float:
    """Linear correlation; 0 when one side is constant."""
    if not np.ptp(a) or not np.ptp(b):  # the mean of equal numbers may differ from them by rounding
        return 0.0
    a, b = np.asarray(a, dtype=np.float64) - np.mean(a), np.asarray(b, dtype=np.float64) - np.mean(b)
    scale = math.sqrt(float(a @ a)) * math.sqrt(float(b @ b))
    return float(a @ b / scale) if scale else 0.0


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation of ranks, ties at their mean rank."""
    return pearson(_ranks(np.asarray(a)), _ranks(np.asarray(b)))


def _ranks(values: np.ndarray) -> np.ndarray:
    _, where, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return ((ends - counts + ends - 1) / 2.0)[where]


def spans(tags: Sequence[str]) -> set[tuple[int, int, str]]:
    """Entities of a BIO (IOB1, IOB2, BIOES) tag sequence as (start, end, type), end exclusive.

    As the CoNLL scorer does, an `I-` tag after `O` or after another type opens an entity too. A tag without such
    a prefix is a type: parts of speech are read as if each had `I-` before it.

    >>> sorted(spans(["B-PER", "I-PER", "O", "I-LOC", "B-LOC"]))
    [(0, 2, 'PER'), (3, 4, 'LOC'), (4, 5, 'LOC')]
    """
    found: set[tuple[int, int, str]] = set()
    start, kind, closed = 0, None, False
    for position, tag in enumerate([*tags, "O"]):
        prefix, _, name = tag.partition("-")
        outside = prefix == "O"
        if prefix not in _PREFIXES:
            prefix, name = "I", tag
        if kind is not None and (outside or prefix in ("B", "S", "U") or name != kind or closed):
            found.add((start, position, kind))
            kind = None
        if not outside and kind is None:
            start, kind = position, name
        closed = prefix in ("E", "L", "S", "U")
    return found


def entity_scores(predicted: Sequence[Sequence[str]], wanted: Sequence[Sequence[str]]) -> dict[str, float]:
    """Precision, recall and F1 over whole entities (type and both ends right)."""
    hits = said = true = 0
    for predicted_tags, wanted_tags in zip(predicted, wanted, strict=True):
        p, w = spans(predicted_tags), spans(wanted_tags)
        hits, said, true = hits + len(p & w), said + len(p), true + len(w)
    precision, recall = hits / said if said else 0.0, hits / true if true else 0.0
    both = said + true
    return {"precision": precision, "recall": recall, "f1": 2 * hits / both if both else 0.0}


def language_scores(sums: np.ndarray) -> dict[str, float]:
    """Perplexity and token accuracy from per-row sums.

    Args:
        sums: (rows, 4): negative log-likelihood in nats, tokens right, tokens counted, whole row right.
    """
    nll, right, count, _ = np.asarray(sums, dtype=np.float64).sum(axis=0)
    if not count:
        return {"perplexity": math.nan, "token_accuracy": math.nan}
    mean = nll / count
    return {"perplexity": math.exp(mean) if mean < 700 else math.inf, "token_accuracy": float(right / count)}
