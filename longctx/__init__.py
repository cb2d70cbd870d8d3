"""Layers and distribution for transformers over long sequences."""

from longctx._version import __version__ as __version__
