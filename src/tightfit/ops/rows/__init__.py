"""Weight gradients from a sample of the rows."""

from tightfit.ops.rows.torch import MODES, Sample, kept_rows, row_norms, sample_rows, weight_grad

__all__ = ["MODES", "Sample", "kept_rows", "row_norms", "sample_rows", "weight_grad"]
