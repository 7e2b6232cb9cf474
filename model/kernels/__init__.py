"""Triton kernels: what CUDA runs in place of torch's operators, each with a slow loop it must agree with."""
