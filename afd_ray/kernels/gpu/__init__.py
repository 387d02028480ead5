"""Triton kernels for NVIDIA GPUs from Hopper on, each with a launcher that checks what it is given, and the model's halves made of them.

But for `engine/gpu` nothing else of the package imports Triton. They are interpreted on a CPU and compiled for sm_90 by the tests; no GPU has
run them yet (docs/gpu.md).
"""
