"""Attention kernels for long sequences."""
