"""A very wide ReLU layer of which each token uses few rows: selection, forward and backward, row-wise AdamW."""

from tightfit.ops.sparse_rows.adamw import AdamW, row_adamw
from tightfit.ops.sparse_rows.select import Resident, Workspace, group_scores, resident, top_rows, top_rows_of_groups
from tightfit.ops.sparse_rows.torch import sparse_rows

__all__ = [
    "AdamW",
    "Resident",
    "Workspace",
    "group_scores",
    "resident",
    "row_adamw",
    "sparse_rows",
    "top_rows",
    "top_rows_of_groups",
]
