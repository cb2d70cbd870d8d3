"""Layers and distribution for transformers over long sequences."""
