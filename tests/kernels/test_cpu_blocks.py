"""Products in few row counts against fp64, how few, and that a long run's memory does not follow its shapes."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from specialize.kernels import cpu_blocks

ROWS = (0, 1, 2, 3, 15, 16, 17, 33, 100, 255, 256, 257, 272, 511, 512, 600)


def operands(rows, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"x": (rows, 70), "weight": (50, 70), "bias": (50,), "y": (rows, 50)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def worst_row(got, truth):
    return ((got.double() - truth).norm(dim=1) / truth.norm(dim=1)).max().item() if len(truth) else 0.0


@torch.no_grad()
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_linear_equals_torch(dtype, with_bias):
    for rows in ROWS:
        made = operands(rows, dtype)
        arguments = made["x"], made["weight"], made["bias"] if with_bias else None
        truth = F.linear(*(None if a is None else a.double() for a in arguments))
        reference = worst_row(F.linear(*arguments), truth)
        assert worst_row(cpu_blocks.linear(*arguments), truth) <= 2 * reference + torch.finfo(dtype).eps


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_added_product_equals_torch(dtype):
    for rows in ROWS:
        made = operands(rows, dtype)
        truth = made["y"].double() + 1.5 * F.linear(made["x"].double(), made["weight"].double())
        reference = worst_row(made["y"].clone().addmm_(made["x"], made["weight"].t(), alpha=1.5), truth)
        y = made["y"]
        assert cpu_blocks.add_product_(y, made["x"], made["weight"], 1.5) is y
        assert worst_row(y, truth) <= 2 * reference + torch.finfo(dtype).eps


@torch.no_grad()
def test_the_rest_is_given_away_whole():
    made, taken = operands(600, torch.bfloat16), []

    def rest(x, out):
        taken.append(x.shape[0])
        out.zero_()

    out = cpu_blocks.linear(made["x"], made["weight"], rest=rest)
    assert taken == [600 - 512] and not out[512:].any() and out[:512].any()


def test_sizes_are_few():
    sizes = {cpu_blocks.filled_rows(rows) for rows in range(cpu_blocks.BLOCK)}
    assert len(sizes) == 21 and all(rows <= cpu_blocks.filled_rows(rows) < 2 * rows or rows <= 1 for rows in range(257))
    x = torch.ones(37, 3)
    assert cpu_blocks.fill(x).shape == (48, 3) and cpu_blocks.fill(x).sum() == x.sum()


_GROWTH = """
import sys, psutil, torch
from specialize.kernels import cpu_blocks, cpu
cpu.keep_freed_memory()
torch.set_grad_enabled(False)
torch.set_num_threads(1)
weight, x = torch.randn(576, 576).bfloat16(), torch.randn(1024, 576).bfloat16()
product = {"blocks": cpu_blocks.linear, "torch": torch.nn.functional.linear}[sys.argv[1]]
def held(first, last, step):
    for rows in range(first, last, step):
        product(x[:rows], weight)
    return psutil.Process().memory_info().rss
few = held(1, 1024, 31)
print(held(1, 1024, 4) - few)
"""


@pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()),
    reason="needs oneDNN with bf16",
)
def test_memory_does_not_follow_the_shapes():
    """A new process: what oneDNN keeps lives as long as the process."""
    done = subprocess.run([sys.executable, "-c", _GROWTH, "blocks"], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 16 << 20
