"""Builds and loads the C++ twins of the kernels for CPUs where eager torch is too slow.

Each file in ``kernels/cpp`` is compiled once per machine into the user's cache folder, named by a hash of the sources,
the compiler, the CPU's features and the OpenMP runtime, and loaded with ctypes: a plain C interface, no torch headers.
The library is linked against the OpenMP runtime that torch itself uses; a second one would keep a second set of threads
spinning on the same cores.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
import warnings
from pathlib import Path

import platformdirs
import torch

SOURCES = Path(__file__).parent / "cpp"
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi")
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class CpuBuildError(ValueError):
    """A C++ twin cannot be built here; the message says why."""


@functools.cache
def find_compiler() -> str | None:
    """Path of a C++ compiler, or None."""
    return next((path for name in ("g++", "c++", "clang++") if (path := shutil.which(name))), None)


@functools.cache
def load(name: str) -> ctypes.CDLL:
    """The library of ``kernels/cpp/<name>.cpp``, compiled if this machine has not done so yet.

    Raises CpuBuildError where no compiler is found or it fails.
    """
    path = _library_path(name)
    if not path.exists():
        _compile(name, path)
    return ctypes.CDLL(str(path))


@functools.cache
def default_backend(name: str) -> str:
    """ "cpp" where the twin in ``<name>.cpp`` builds, else "torch"; a compiler's failure is told once, as a warning."""
    if find_compiler() is None or platform.system() != "Linux":
        return "torch"
    try:
        load(name)
    except (CpuBuildError, OSError) as error:
        warnings.warn(f"CPU kernels: {error}; using torch instead, which is slower", RuntimeWarning, stacklevel=2)
        return "torch"
    return "cpp"


@functools.cache
def keep_freed_memory() -> None:
    """Tells glibc to keep freed blocks of up to 32 MiB for the next use instead of handing them back to the kernel.

    Activations are freed and asked for again at every step; a fresh block costs a page fault per 4 KiB, which takes
    longer than filling it. Once per process; does nothing under another C library.
    """
    m_trim_threshold, m_mmap_threshold = -1, -3
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    mallopt(m_mmap_threshold, 32 << 20)
    mallopt(m_trim_threshold, 1 << 30)


def num_threads() -> int:
    """Threads a call may use: torch's own setting."""
    return torch.get_num_threads()


@functools.cache
def _library_path(name: str) -> Path:
    compiler = find_compiler()
    if compiler is None:
        raise CpuBuildError("no C++ compiler (g++ or clang++) is on the PATH; install one or use backend='torch'")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    digest = hashlib.sha256()
    for source in [SOURCES / f"{name}.cpp", *sorted(SOURCES.glob("*.h"))]:
        digest.update(source.read_bytes())
    for part in (version, _cpu_features(), repr(FLAGS), _openmp_library() or ""):
        digest.update(part.encode())
    folder = platformdirs.user_cache_path("specialize") / "cpu-kernels"
    return folder / f"{name}-{digest.hexdigest()[:20]}.so"


def _cpu_features() -> str:
    """What -march=native depends on."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.machine() + platform.processor()
    lines = re.findall(r"^(?:flags|Features|model name|CPU part)\s*:.*$", text, re.MULTILINE)
    return platform.machine() + "\n".join(sorted(set(lines)))


@functools.cache
def _openmp_library() -> str | None:
    """The OpenMP runtime loaded with torch, None where it cannot be told."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    paths = sorted(set(re.findall(r"(/\S*lib(?:gomp|iomp5|omp)[^/\s]*\.so\S*)", maps)))
    beside_torch = [path for path in paths if path.startswith(str(Path(torch.__file__).parent.parent))]
    return next(iter(beside_torch or paths), None)


def _compile(name: str, path: Path) -> None:
    """Into a temporary folder beside the target, then renamed: parallel builds and interruptions leave whole files."""
    compiler = find_compiler()
    assert compiler is not None
    path.parent.mkdir(parents=True, exist_ok=True)
    source = SOURCES / f"{name}.cpp"
    for left in path.parent.glob(".build-*"):  # by a process that was killed; none compiles for an hour
        with contextlib.suppress(FileNotFoundError):  # or by one that is done meanwhile
            if time.time() - left.stat().st_mtime > 3600:
                shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".build-") as folder:
        made, library = Path(folder) / f"{name}.o", Path(folder) / f"{name}.so"
        openmp = _openmp_library()
        link = [openmp] if openmp else ["-fopenmp"]
        for command in (
            [compiler, *FLAGS, "-fopenmp", "-c", str(source), "-o", str(made)],
            [compiler, "-shared", str(made), *link, "-o", str(library)],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
                raise CpuBuildError(f"{compiler} cannot build {source.name}: {lines[0] if lines else 'no message'}")
        os.replace(library, path)
