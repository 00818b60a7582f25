"""PanGu-Σ on MindSpore: the language model and every job on it."""

from pangu_sigma.version import VERSION as __version__

__all__ = ["__version__"]
