"""Fine-tune the transformer you want in the memory you have."""

from tightfit._version import __version__

__all__ = ["__version__"]
