import subprocess
import sys

import pytest
import torch
from specialize.kernels import dispatch
from specialize.kernels.dispatch import bad_argument, choose_backend


def test_the_backend_asked_for_wins():
    x = torch.ones(1)
    assert choose_backend("op", x, None, ("torch", "triton")) == "torch"
    assert choose_backend("op", x, None, ("torch", "cpp"), "cpp") == "cpp"
    assert choose_backend("op", x, "triton", ("torch", "triton")) == "triton"


def test_what_cannot_run_raises(monkeypatch):
    x = torch.ones(1)
    with pytest.raises(ValueError, match="op: backend 'flash' is not available; allowed: torch, triton"):
        choose_backend("op", x, "flash", ("torch", "triton"))
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    with pytest.raises(ValueError, match="needs the triton package"):
        choose_backend("op", x, "triton", ("torch", "triton"))


def test_one_wording():
    assert str(bad_argument("rope", "x", "of shape (1,)", "[T, H, D]")) == (
        "rope: argument x is of shape (1,); allowed: [T, H, D]"
    )


def test_every_op_imports_and_runs_without_triton():
    code = """
import importlib, sys
sys.modules["triton"] = None
import torch
from specialize import kernels
from specialize.kernels import dispatch
from pathlib import Path
ops = [p.stem for p in Path(kernels.__path__[0]).glob("*.py") if "KernelSpec(" in p.read_text() and p.stem != "spec"]
assert "rope" in ops
for name in ops:
    importlib.import_module("specialize.kernels." + name)
assert not dispatch.HAS_TRITON
from specialize.kernels.rmsnorm import rmsnorm
assert rmsnorm(torch.ones(2, 4), torch.ones(4), 0.0).eq(1).all()
try:
    rmsnorm(torch.ones(2, 4), torch.ones(4), 0.0, backend="triton")
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "needs the triton package" in done.stdout
