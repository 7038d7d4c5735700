"""A command in a process that may take little memory: it works, or says before the work that it cannot."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from domain import write_model

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="address-space limits are counted on Linux only")


def limited_generate(model, limit_kib) -> subprocess.CompletedProcess[str]:
    """`specialize generate` in a child whose address space is limited, as `ulimit -v` does it."""
    command = [sys.executable, "-m", "specialize", "generate", "--model", str(model), "The heart is"]
    command += ["--max-tokens", "8", "--threads", "1", "--debug"]
    limited = ["bash", "-c", f'ulimit -v {limit_kib}; exec "$@"', "limited", *command]
    return subprocess.run(limited, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def check_generates_or_refuses(done: subprocess.CompletedProcess[str]) -> bool:
    """Whether it generated. A refusal comes from the plan made before weights are read: --debug shows the caller."""
    if done.returncode == 0:
        assert done.stdout.strip()
        return True
    assert "InputError" in done.stderr, done.stderr
    assert re.search(r"does not fit in .* process .* weights .* leave no room for the KV cache", done.stderr)
    assert "in from_pretrained" in done.stderr and "in __init__" not in done.stderr
    return False


def test_limited_child_generates_or_refuses_before_loading(tmp_path):
    write_model(tmp_path / "model", "the heart is in the chest and the lungs are beside it")
    assert check_generates_or_refuses(limited_generate(tmp_path / "model", 2 << 20))
    assert not check_generates_or_refuses(limited_generate(tmp_path / "model", 1 << 20))


@pytest.mark.slow
def test_demo_model_in_two_gigabytes(smollm2):
    """Generates under 2 GiB; wherever the border lies, there is nothing between generating and refusing."""
    outcomes = [
        check_generates_or_refuses(limited_generate(smollm2, kib)) for kib in range(2 << 20, 1_400_000, -60_000)
    ]
    assert outcomes == sorted(outcomes, reverse=True)
    assert outcomes[0] and not outcomes[-1]
