"""Permanent trimming of a fast tokenizer: the same text, the same tokens, fewer rows.

A trimmed tokenizer holds the kept tokens only, renumbered by rank. What makes it exact on the texts that the kept
ids come from, model by model: WordPiece takes the longest match, and the match it took is still there. Unigram takes
the best path, and every rival path is one it had before, as long as the price of an unknown character (the lowest
score of the vocabulary less ten) is unchanged: so the token with the lowest score stays. BPE replays its merges in
order, and needs every merge inside a kept token: so the parents of kept tokens stay. On other texts WordPiece turns
words into the unknown token and Unigram cuts them up in another way, both without a word: `retokenisation_report`
counts them. One exception: a word that WordPiece did not know may become spellable once a longer first match is gone.
"""

from __future__ import annotations

import copy
import itertools
import json
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tightfit.core.errors import TightfitError, UnsupportedModelError, shorten

from .scan import kept_tokenizer_state, required_ids

_MODELS = ("BPE", "Unigram", "WordLevel", "WordPiece")


class TrimError(TightfitError, ValueError):
    """A set of kept ids from which no tokenizer can be built; the message lists the ids at fault."""


@dataclass(frozen=True, kw_only=True)
class TrimmedTokenizer:
    """A tokenizer of the kept tokens. New id `n` is the original id `ids[n]`.

    `added` are the original ids kept beyond those asked for, `reasons` says why for each. `unreachable` are kept
    ids that no text gives, because no chain of merges or no best path ends in them (in the original neither). Ids
    asked for beyond the last token (padding rows of the table) end `ids`; the tokenizer does not know them.
    """

    tokenizer: Any
    ids: tuple[int, ...]
    added: tuple[int, ...] = ()
    reasons: Mapping[int, str] = field(default_factory=dict)
    unreachable: tuple[int, ...] = ()


def trim_tokenizer(tokenizer: Any, ids: Iterable[int], *, close: bool = False) -> TrimmedTokenizer:
    """A new tokenizer that knows the tokens `ids` only, numbered by rank; `tokenizer` stays as it is.

    Special tokens, byte symbols, the tokens of the template and, for Unigram, the token with the lowest score are
    always kept. Works for WordPiece, WordLevel, BPE (byte-level or with byte fallback) and Unigram. The class of
    the tokenizer is kept where it survives saving and loading unchanged; else it becomes PreTrainedTokenizerFast.

    Args:
        tokenizer: a fast tokenizer of transformers.
        ids: original ids to keep, in any order.
        close: add the merge parents that kept BPE tokens need, instead of raising.

    Raises:
        TrimError: (a ValueError) ids that are not integers, negative, doubled, none at all, or without a token; BPE
            parents missing while `close` is False.
        UnsupportedModelError: a slow tokenizer, or a kind of tokenizer model that is not known.

    >>> from tokenizers import Tokenizer, models
    >>> from transformers import PreTrainedTokenizerFast
    >>> words = models.WordLevel({"<unk>": 0, "sea": 1, "sky": 2}, unk_token="<unk>")
    >>> whole = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), unk_token="<unk>")
    >>> trimmed = trim_tokenizer(whole, [2])
    >>> trimmed.ids, trimmed.added, trimmed.tokenizer("sky")["input_ids"]
    ((0, 2), (0,), [1])
    """
    spec = _backend_spec(tokenizer)
    vocab = _model_vocab(spec["model"])
    added_tokens = {entry["id"]: entry["content"] for entry in spec["added_tokens"]}
    token_of = {i: token for token, i in vocab.items()} | added_tokens
    asked = _checked_ids(ids, token_of)
    reasons = {i: why for i, why in _required(tokenizer, spec, vocab, asked).items() if i not in asked}
    kept = asked | set(reasons)

    unreachable: set[int] = set()
    if spec["model"]["type"] == "BPE":
        texts = {i: token_of[i] for i in kept if token_of.get(i) in vocab}  # merges may give an added token too
        parents, unreachable = _bpe_closure(spec["model"], vocab, texts)
        unreachable -= set(added_tokens)
        missing = {vocab[part]: token for part, token in parents.items() if vocab[part] not in kept}
        if missing and not close:
            needed = (f"{i} ({token_of[i]!r}, for {token!r})" for i, token in sorted(missing.items()))
            raise TrimError(
                f"{len(missing)} ids are merge parents of kept tokens and are not kept themselves, so those tokens "
                f"could not be reached: {shorten(needed, limit=50)}. Keep these ids too, or give close=True"
            )
        reasons |= {i: f"merge parent of {token!r}" for i, token in missing.items()}
        kept |= set(missing)

    order = sorted(kept)
    rank = {original: new for new, original in enumerate(order)}
    backend = _build(_trimmed_spec(spec, vocab, rank), {t: rank[i] for i, t in token_of.items() if i in rank})
    if spec["model"]["type"] == "Unigram":
        unreachable = {
            i
            for i in kept.intersection(token_of).difference(added_tokens, [spec["model"]["unk_id"]])
            if [piece.id for piece in backend.model.tokenize(token_of[i])] != [rank[i]]
        }
    return TrimmedTokenizer(
        tokenizer=_wrap(tokenizer, backend),
        ids=tuple(order),
        added=tuple(sorted(reasons)),
        reasons=dict(sorted(reasons.items())),
        unreachable=tuple(sorted(unreachable)),
    )


def retokenisation_report(old: Any, trimmed: TrimmedTokenizer, texts: Iterable[str]) -> dict[str, int]:
    """How a trimmed tokenizer reads texts it was not made from, in counts.

    `texts`, `tokens_before`, `tokens_after`; `texts_changed` read in another way, of which `texts_with_new_unknown`
    have more unknown tokens than before and `texts_resegmented` do not; `unknown_before`, `unknown_after`,
    `new_unknown` tokens.
    """
    texts = list(texts)
    names = ("tokens_before", "tokens_after", "texts_changed", "texts_with_new_unknown", "texts_resegmented")
    counts = dict.fromkeys(("texts", *names, "unknown_before", "unknown_after", "new_unknown"), 0)
    counts["texts"] = len(texts)
    unk_old, unk_new = old.unk_token_id, trimmed.tokenizer.unk_token_id
    for start in range(0, len(texts), 1000):
        chunk = texts[start : start + 1000]
        for before, after in zip(_encode(old, chunk), _encode(trimmed.tokenizer, chunk), strict=True):
            unknown_before = before.count(unk_old) if unk_old is not None else 0
            unknown_after = after.count(unk_new) if unk_new is not None else 0
            changed = [trimmed.ids[i] for i in after] != before
            counts["tokens_before"] += len(before)
            counts["tokens_after"] += len(after)
            counts["unknown_before"] += unknown_before
            counts["unknown_after"] += unknown_after
            counts["new_unknown"] += max(0, unknown_after - unknown_before)
            counts["texts_changed"] += changed
            counts["texts_with_new_unknown"] += unknown_after > unknown_before
            counts["texts_resegmented"] += changed and unknown_after <= unknown_before
    return counts


def _encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    with kept_tokenizer_state(tokenizer):
        return tokenizer(texts, padding=False, truncation=False, verbose=False)["input_ids"]


def _backend_spec(tokenizer: Any) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UnsupportedModelError(
            f"{type(tokenizer).__name__} is not a fast tokenizer of transformers, so its vocabulary cannot be trimmed; "
            "load the fast one (AutoTokenizer gives it where there is one), or wrap a tokenizers.Tokenizer in "
            "PreTrainedTokenizerFast(tokenizer_object=...)"
        )
    spec = json.loads(backend.to_str())
    if spec["model"].get("type") not in _MODELS:
        raise UnsupportedModelError(
            f"{type(tokenizer).__name__} has a model of type {spec['model'].get('type')!r}; "
            f"{', '.join(_MODELS)} can be trimmed"
        )
    return spec


def _model_vocab(model: Mapping[str, Any]) -> dict[str, int]:
    if model["type"] == "Unigram":
        return {token: i for i, (token, _) in enumerate(model["vocab"])}
    return model["vocab"]


def _checked_ids(ids: Iterable[int], token_of: Mapping[int, str]) -> set[int]:
    given = np.asarray(ids.tolist() if hasattr(ids, "tolist") else list(ids))
    if not given.size:
        raise TrimError("no ids to keep; give the ids a run uses (count_ids finds them)")
    if given.ndim != 1 or given.dtype.kind not in "iu":
        raise TrimError(f"ids must be a flat sequence of integers; got {str(ids)[:60]}")
    values, times = np.unique(given, return_counts=True)
    if (times > 1).any():
        raise TrimError(f"ids given more than once: {shorten(values[times > 1])}")
    last = max(token_of)
    asked = set(values.tolist())
    if bad := sorted(i for i in asked if i < 0 or (i <= last and i not in token_of)):
        raise TrimError(f"no token has the ids {shorten(bad)}; leave them out (tokens have ids 0..{last})")
    return asked


def _required(tokenizer: Any, spec: Mapping[str, Any], vocab: Mapping[str, int], asked: set[int]) -> dict[int, str]:
    """Ids the trimmed tokenizer cannot do without, and why."""
    reasons = dict(required_ids(tokenizer)[1])
    model = spec["model"]
    unk = model.get("unk_id") if model["type"] == "Unigram" else tokenizer.get_vocab().get(model.get("unk_token"))
    if unk is not None:
        reasons.setdefault(unk, "the unknown token")
    if spec["padding"]:
        reasons.setdefault(spec["padding"]["pad_id"], "the padding token")
    for i in _map_processor_ids(copy.deepcopy(spec["post_processor"]), lambda i: i):
        reasons.setdefault(i, "a token of the post-processor")
    if model["type"] == "Unigram":
        scores = np.array([score for _, score in model["vocab"]])
        lowest = np.flatnonzero(scores == scores.min()).tolist()
        if not any(i in asked or i in reasons for i in lowest):
            reasons[lowest[0]] = "the lowest score, which prices unknown characters"
    return reasons


def _map_processor_ids(processor: Any, new_id: Any) -> list[int]:
    """Replace every id in a post-processor's description, in place; returns the ids that were there."""
    found: list[int] = []
    if processor is None:
        return found
    for inner in processor.get("processors", ()):
        found += _map_processor_ids(inner, new_id)
    specials = processor.get("special_tokens")
    for entry in specials.values() if isinstance(specials, dict) else ():
        found += entry["ids"]
        entry["ids"] = [new_id(i) for i in entry["ids"]]
    for name in ("cls", "sep"):
        if name in processor:
            found.append(processor[name][1])
            processor[name][1] = new_id(processor[name][1])
    return found


# -- BPE


def _merges(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    return [(first, second) for first, second in pairs]


def _joined(first: str, second: str, model: Mapping[str, Any]) -> str:
    return first + second[len(model["continuing_subword_prefix"] or "") :]


def _bpe_closure(
    model: Mapping[str, Any], vocab: Mapping[str, int], kept: Mapping[int, str]
) -> tuple[dict[str, str], set[int]]:
    """Parents of the kept tokens (parent -> one token that needs it), and the kept ids that merging never gives.

    The merges inside a token are the same wherever it stands in a word: no merge crosses its ends, or it would not
    be a token. So the merges of the token alone are all it ever needs, and none is needed where these end elsewhere.
    """
    ranks = {pair: i for i, pair in reversed(list(enumerate(_merges(model))))}
    byte_tokens = {f"<0x{byte:02X}>" for byte in range(256)} if model["byte_fallback"] else set()
    parents: dict[str, str] = {}
    unreachable: set[int] = set()
    for i, token in sorted(kept.items()):
        if token in byte_tokens or token == model["unk_token"]:
            continue
        symbols = _initial_symbols(token, model)
        used = set(symbols)
        while len(symbols) > 1:
            known = (ranks.get(pair, len(ranks)) for pair in itertools.pairwise(symbols))
            lowest, at = min((r, k) for k, r in enumerate(known))
            if lowest == len(ranks):
                break
            symbols[at : at + 2] = [_joined(symbols[at], symbols[at + 1], model)]
            used.add(symbols[at])
        if symbols == [token] and used.issubset(vocab):
            for part in used - {token}:
                parents.setdefault(part, token)
        elif not model["ignore_merges"]:  # else a token that is a whole word needs no merge
            unreachable.add(i)
    return parents, unreachable


def _initial_symbols(token: str, model: Mapping[str, Any]) -> list[str]:
    prefix, suffix = model["continuing_subword_prefix"] or "", model["end_of_word_suffix"] or ""
    inside = bool(prefix) and token.startswith(prefix) and token != prefix
    ends = bool(suffix) and token.endswith(suffix) and token != suffix
    stem = token[len(prefix) if inside else 0 : len(token) - (len(suffix) if ends else 0)]
    symbols = [(prefix if inside or k else "") + char for k, char in enumerate(stem)]
    if ends:
        symbols[-1] += suffix
    return symbols


# -- building


def _trimmed_spec(spec: Mapping[str, Any], vocab: Mapping[str, int], rank: Mapping[int, int]) -> dict[str, Any]:
    """The tokenizer's description with the kept tokens only, every id replaced by its rank."""
    new = dict(spec)
    model = dict(spec["model"])
    if model["type"] == "Unigram":
        model["vocab"] = [entry for i, entry in enumerate(model["vocab"]) if i in rank]
        model["unk_id"] = rank[model["unk_id"]] if model["unk_id"] is not None else None
    else:
        model["vocab"] = {token: rank[i] for token, i in vocab.items() if i in rank}
    if model["type"] == "BPE":
        words = model["vocab"]
        model["merges"] = [
            [a, b] for a, b in _merges(model) if a in words and b in words and _joined(a, b, model) in words
        ]
    new["model"] = model
    added = (entry | {"id": rank[entry["id"]]} for entry in spec["added_tokens"] if entry["id"] in rank)
    new["added_tokens"] = sorted(added, key=lambda entry: entry["id"])
    new["post_processor"] = copy.deepcopy(spec["post_processor"])
    _map_processor_ids(new["post_processor"], rank.__getitem__)
    if spec["padding"]:
        new["padding"] = spec["padding"] | {"pad_id": rank[spec["padding"]["pad_id"]]}
    return new


def _build(spec: Mapping[str, Any], expected: Mapping[str, int]) -> Any:
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(json.dumps(spec))
    found = backend.get_vocab(with_added_tokens=True)
    if found != expected:
        wrong = [f"{token!r} {found.get(token)} for {i}" for token, i in expected.items() if found.get(token) != i]
        raise UnsupportedModelError(
            "an added token stands between the tokens of the model, and the tokenizers library numbers added tokens "
            f"last, so the trimmed ids would not be ranks: {shorten(wrong)}"
        )
    return backend


def _wrap(tokenizer: Any, backend: Any) -> Any:
    """The backend in the class of `tokenizer`, loaded as a user will load it; generic where the class alters it."""
    from transformers import PreTrainedTokenizerFast

    shell = copy.copy(tokenizer)
    shell._tokenizer = backend
    for kind in (type(tokenizer), PreTrainedTokenizerFast):
        with tempfile.TemporaryDirectory() as folder:
            shell.save_pretrained(folder)
            loaded = kind.from_pretrained(folder)
            for name, value in list(loaded.init_kwargs.items()):
                if isinstance(value, str) and value.startswith(folder):
                    del loaded.init_kwargs[name]
        loaded.name_or_path = tokenizer.name_or_path
        if _reads_like(loaded, backend):
            return loaded
    raise UnsupportedModelError(
        f"{type(tokenizer).__name__} changes when it is saved and loaded, so its trimmed version could not be kept"
    )


def _reads_like(tokenizer: Any, backend: Any) -> bool:
    """Whether a loaded tokenizer does the same as the backend it was saved from."""
    ours, theirs = json.loads(backend.to_str()), json.loads(tokenizer.backend_tokenizer.to_str())
    if any(ours[part] != theirs[part] for part in ("model", "added_tokens", "normalizer", "pre_tokenizer", "decoder")):
        return False
    plain = type(backend).from_str(backend.to_str())
    plain.no_truncation()
    plain.no_padding()
    tokens = sorted(plain.get_vocab(with_added_tokens=True).values())
    probes = [plain.decode(tokens[k : k + 50], skip_special_tokens=True) for k in range(0, len(tokens), 50)][:20]
    return _encode(tokenizer, probes) == [encoding.ids for encoding in plain.encode_batch(probes)]
