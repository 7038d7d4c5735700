"""Shared fixtures. On a machine without CUDA, Triton kernels run under its interpreter, which must be chosen before
any kernel module is imported."""

import os
from pathlib import Path

import pytest
import torch

from specialize.fetch import fetch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct, fetched once into the user's cache."""
    return fetch("smollm2-135m-instruct")


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The model folder of the sentence encoder all-MiniLM-L6-v2, fetched once into the user's cache."""
    return fetch("all-minilm-l6-v2")
