"""Kernels for one kind of accelerator, behind the contracts of ops.attention and ops.experts."""
