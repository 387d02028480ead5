"""The calls of CUDA and NCCL that links between devices come down to. No GPU has run them yet."""
