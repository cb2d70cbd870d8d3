"""Exact softmax attention, block by block."""
