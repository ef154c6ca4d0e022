"""Modules that are added to blocks."""

TRAINED = "Reversible trained beside the blocks (adapters, a merge)"

PARALLEL = "tight_parallel"
"""The adapter beside the MLP."""

LAGGED = "tight_lagged"
"""The adapter of the lagging stream, or on the output of an attention."""

MERGE = "tight_merge"
"""The map from both streams to one state, in the last block."""
