"""What runs in place of torch's operators: Triton on CUDA, C on CPUs. Each has a slow loop it must agree with."""

import importlib.util

import torch


def run_kernels_on(device: torch.device) -> bool:
    """Whether they are what runs there."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None
