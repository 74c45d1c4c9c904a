"""Triton kernels for the hot paths, each beside a plain torch version that runs everywhere."""
