"""What the methods that change operators share: which modules have a fused form, and edits that put it on."""

from tightfit.methods.operators.edits import KINDS, Chosen, chosen_by, estimator_edits, found, mark_edit, operator_edits

__all__ = ["KINDS", "Chosen", "chosen_by", "estimator_edits", "found", "mark_edit", "operator_edits"]
