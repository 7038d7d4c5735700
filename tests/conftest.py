"""Shared fixtures. On a machine without CUDA, Triton kernels run under its interpreter, which must be chosen before
any kernel module is imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(1)
