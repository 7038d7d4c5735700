# pyright: reportMissingImports=false
# The sibling folders join this package when it is installed (setup.py); by path pyright cannot see them from here.
"""What this machine has, what a run would use of it, and what is missing."""

from __future__ import annotations

import os
import platform
import shutil
from importlib import metadata
from typing import Any

NEEDED = (
    "torch",
    "numpy",
    "safetensors",
    "tokenizers",
    "gguf",
    "jinja2",
    "hnswlib",
    "bm25s",
    "rapidfuzz",
    "click",
    "rich",
)
NEEDED_TOO = ("PyYAML", "huggingface_hub", "matplotlib", "pyarrow", "defusedxml", "platformdirs", "psutil")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    flags: set[str] = set()
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as stream:
            for line in stream:
                if line.startswith("model name"):
                    name = line.split(":", 1)[1].strip()
                elif line.startswith("flags"):
                    flags = set(line.split(":", 1)[1].split())
                    break
    except OSError:
        pass
    from .engine.control_groups import cpu_quota, usable_cpus

    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    return {
        "name": name,
        "cores": usable_cpus(),
        "container_quota": cpu_quota(),
    } | {"instructions": [flag for flag in wanted if flag in flags]}


def examine() -> dict[str, Any]:
    """Findings by topic; ``problems`` lists what stands in the way, ``notes`` what could be better."""
    import torch

    from .engine.generator import choose_device, choose_dtype
    from .engine.memory import available_memory_bytes, total_memory_bytes
    from .fetch import PACKAGES, cache_dir

    problems: list[str] = []
    notes: list[str] = []
    packages = {name: _version(name) for name in (*NEEDED, *NEEDED_TOO)}
    problems += [
        f"package {name} is missing: pip install {name}" for name, version in packages.items() if version is None
    ]
    device = choose_device("auto")
    dtype = choose_dtype("auto", device)
    gpus = []
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        p = torch.cuda.get_device_properties(i)
        gpus.append(
            {"name": p.name, "memory_gib": round(p.total_memory / 2**30, 1), "capability": f"{p.major}.{p.minor}"}
        )
    if not gpus:
        notes.append("no CUDA device: the CPU will be used; models up to about a billion parameters are practical")
    compiler = (
        shutil.which(os.environ.get("CXX", "")) or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    )
    if compiler is None and device.type == "cpu":
        notes.append("no C++ compiler: the slower torch versions of the CPU kernels will be used; install g++")
    triton = _version("triton")
    if gpus and triton is None:
        problems.append("package triton is missing: the GPU kernels need it; pip install triton")
    cache = cache_dir()
    parent = next((p for p in (cache, *cache.parents) if p.exists()), cache)
    free = shutil.disk_usage(parent).free / 2**30
    if not os.access(parent, os.W_OK):
        problems.append(f"the cache folder {cache} cannot be written; set XDG_CACHE_HOME to a folder that can")
    if free < 2:
        notes.append(f"only {free:.1f} GiB are free at {parent}")
    fetched = [name for name in PACKAGES if (cache / "packages" / name).is_dir()]
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "specialize": _version("specialize"),
        "cpu": _cpu() | {"torch_threads": torch.get_num_threads()},
        "memory_gib": round(total_memory_bytes("cpu") / 2**30, 1),
        "memory_free_gib": round(available_memory_bytes("cpu") / 2**30, 1),
        "disk_free_gib": round(free, 1),
        "gpus": gpus,
        "cuda": torch.version.cuda,
        "triton": triton,
        "compiler": compiler,
        "will_use": {"device": str(device), "dtype": str(dtype).removeprefix("torch.")},
        "packages": packages,
        "optional": {"flash-attn": _version("flash-attn")},
        "cache": str(cache),
        "fetched": fetched,
        "problems": problems,
        "notes": notes,
    }


def format_findings(f: dict[str, Any]) -> str:
    """The findings as aligned lines, what is missing last."""
    cpu = f["cpu"]
    rows = [
        ("specialize", f"{f['specialize']}, Python {f['python']}, {f['system']}"),
        (
            "CPU",
            f"{cpu['name']}, {cpu['cores']} usable cores"
            + (f" (the container's quota is {cpu['container_quota']:g})" if cpu["container_quota"] else "")
            + f", {', '.join(cpu['instructions']) or 'no AVX2'}",
        ),
        ("memory", f"{f['memory_gib']} GiB, {f['memory_free_gib']} free"),
        ("disk", f"{f['disk_free_gib']} GiB free for the cache {f['cache']}"),
        (
            "GPU",
            "; ".join(f"{g['name']} {g['memory_gib']} GiB (sm_{g['capability'].replace('.', '')})" for g in f["gpus"])
            or "none",
        ),
        ("CUDA, Triton", f"{f['cuda'] or 'none'}, {f['triton'] or 'none'}"),
        ("C++ compiler", f["compiler"] or "none"),
        ("will use", f"{f['will_use']['device']}, {f['will_use']['dtype']}, {cpu['torch_threads']} CPU threads"),
        ("fetched", ", ".join(f["fetched"]) or "nothing yet"),
        ("torch", f["packages"]["torch"] or "missing"),
    ]
    lines = [f"{name:<14}{text}" for name, text in rows]
    lines += [f"{'missing':<14}{text}" for text in f["problems"]]
    lines += [f"{'note':<14}{text}" for text in f["notes"]]
    if not f["problems"]:
        lines.append(f"{'verdict':<14}ready")
    return "\n".join(lines)
