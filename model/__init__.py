"""Masked video autoencoders. Knows tensors only: no files, no argv, no randomness of masks."""
