"""What the methods that change operators share: which modules have a fused form, and edits that put it on."""

from tightfit.methods.operators.edits import (
    coded_edit,
    estimator_edits,
    named_linears,
    operator_edits,
    padding_edit,
)

__all__ = ["coded_edit", "estimator_edits", "named_linears", "operator_edits", "padding_edit"]
