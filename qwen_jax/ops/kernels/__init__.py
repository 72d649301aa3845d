"""Kernels written for one kind of accelerator, behind the contract of ops.attention."""
