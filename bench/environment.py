"""What a measurement was taken on: device, versions, commit, and the device's measured ceilings."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ..kernels.tuning import device_key


def commit() -> str | None:
    """The checked-out commit of the source, "+" where files differ from it.

    In a copy of the tree without its repository, what the file ``.commit`` at its root says; None without one.
    """
    folder = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "..", ":!../bench/results")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        noted = folder.parent / ".commit"
        return noted.read_text().strip() or None if noted.is_file() else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


@lru_cache(maxsize=1)
def environment() -> dict[str, Any]:
    """Device, versions and commit, as every row of results carries them."""
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else f"{_cpu_name()} ({len(os.sched_getaffinity(0))} CPUs)",
        "device_key": device_key(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda if cuda else None,
        "commit": commit(),
    }


def _median_ms(run, repetitions: int = 20) -> float:
    """Median device time of ``run``, warmed up."""
    for _ in range(3):
        run()
    times = []
    for _ in range(repetitions):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return sorted(times)[len(times) // 2]


@lru_cache(maxsize=1)
def ceilings() -> dict[str, float]:
    """Measured on the current CUDA device: ``copy_gb_s`` (bytes read plus written) and ``gemm_tflop_s`` (bf16, 8192³).

    Random operands: products of zeros run faster.
    """
    size_bytes = 1 << 30
    source = torch.randint(0, 255, (size_bytes,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy_ms = _median_ms(lambda: target.copy_(source))
    n = 8192
    a, b = torch.randn(2, n, n, device="cuda", dtype=torch.bfloat16)
    out = torch.empty_like(a)
    gemm_ms = _median_ms(lambda: torch.mm(a, b, out=out))
    return {"copy_gb_s": 2 * size_bytes / copy_ms / 1e6, "gemm_tflop_s": 2 * n**3 / gemm_ms / 1e9}


def write_environment(folder: Path) -> dict[str, Any]:
    """Writes ``environment.json`` into ``folder`` and returns its content."""
    body = environment() | ({"ceilings": ceilings()} if torch.cuda.is_available() else {})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "environment.json").write_text(json.dumps(body, indent=1) + "\n")
    return body
