"""Triton kernels and their plain-torch twins; the only part that has `@triton.jit`.

Import its modules where a GPU is asked for, not at the top: they need Triton.
"""
