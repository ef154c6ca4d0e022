"""Weight gradients from a sample of the rows."""

from tightfit.ops.rows.codec import Rows
from tightfit.ops.rows.scores import Cached, Running, Scores, sample_index
from tightfit.ops.rows.torch import MODES, Sample, kept_rows, row_norms, sample_rows, weight_grad
from tightfit.ops.rows.valid import FLOOR, attention_masks, masked_rows, row_factor

__all__ = [
    "FLOOR",
    "MODES",
    "Cached",
    "Rows",
    "Running",
    "Sample",
    "Scores",
    "attention_masks",
    "kept_rows",
    "masked_rows",
    "row_factor",
    "row_norms",
    "sample_index",
    "sample_rows",
    "weight_grad",
]
