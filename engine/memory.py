"""How much memory there is: of a CUDA device, of the machine, of the container, and what this process holds of it."""

from __future__ import annotations

import gc
import re
import sys
from pathlib import Path

import psutil
import torch

from specialize.errors import InputError

from .control_groups import groups

try:
    import resource
except ImportError:  # Windows has no such limits
    resource = None

# CUDA's context, the libraries' workspaces and the kernels' code: not in torch's own count.
CUDA_CONTEXT_BYTES = 800 << 20
# Addresses are taken that hold nothing: maps of checkpoints, thread arenas, stacks, room that an allocator keeps. Of a
# limit on the address space this share is left to them (measured: SmolLM2-135M under 1 to 3 GiB).
ADDRESS_SHARE = 0.25
# What torch reports as a card's total memory, in GiB (nvidia-smi shows a little more).
CARDS = {
    "t4": 14.6, "l4": 22.0, "a10g": 22.0, "rtx-3090": 23.6, "rtx-4090": 23.5, "l40s": 44.4, "a100-40gb": 39.4,
    "a100-80gb": 79.1, "h100-80gb": 79.1, "h200": 139.7, "b200": 178.3,
}  # fmt: skip
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
# Of a control group, by version: names of its limit, its usage, and the page cache that can be dropped.
_GROUP_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}


def parse_bytes(text: str) -> int:
    """ "24GB" (10^9), "24GiB" (2^30), "500MB" or a plain number of bytes. Raises InputError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if match is None or (match[3] and not match[2]):
        raise InputError(f"memory {text!r}: write a number with a unit, such as 24GB, 22.5GiB or 800MB")
    number, unit = float(match[1]), match[2].upper()
    size = int(number * (_BINARY[unit] if match[3] else _UNITS[unit]))
    if size < 1:
        raise InputError(f"memory {text!r}: must be above 0")
    return size


def capacity_bytes(text: str) -> int:
    """A device's memory from a size (`parse_bytes`) or from the name of a card in ``CARDS``."""
    if text.lower() in CARDS:
        return int(CARDS[text.lower()] * 2**30)
    try:
        return parse_bytes(text)
    except InputError:
        raise InputError(
            f"device memory {text!r}: give a size such as 80GB, or a card: {', '.join(sorted(CARDS))}"
        ) from None


def total_memory_bytes(device: torch.device | str) -> int:
    """All memory of the device; of a CPU the machine's or the container's, whichever is less."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return min([psutil.virtual_memory().total, *(limit for limit, _ in _container_limits())])


def available_memory_bytes(device: torch.device | str) -> int:
    """What can still be allocated on the device; on a CPU within the container's limit."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min([psutil.virtual_memory().available, *(max(limit - used, 0) for limit, used in _container_limits())])


def free_unused(device: torch.device | str) -> None:
    """Gives a CUDA device back what torch's pool keeps of tensors that are gone, those in cycles, too: a generator's
    KV cache would else count as held long after the generator."""
    device = torch.device(device)
    if device.type == "cuda":
        gc.collect()
        with torch.cuda.device(device):
            torch.cuda.empty_cache()


def process_bytes(device: torch.device | str) -> int:
    """What this process holds of the device: on a CPU its resident set, on CUDA torch's pool and the context."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device) + CUDA_CONTEXT_BYTES
    return psutil.Process().memory_info().rss


def _container_limits() -> list[tuple[int, int]]:
    """(limit, bytes used that cannot be dropped) of each control group above this process, versions 1 and 2, and of
    its address space (``ulimit -v``)."""
    found = []
    if resource is not None and sys.platform == "linux":
        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY:
            found.append((limit - int(limit * ADDRESS_SHARE), psutil.Process().memory_info().vms))
    for folder, version in groups("memory"):
        limit_name, usage_name, cache_name = _GROUP_FILES[version]
        try:
            limit, usage = int((folder / limit_name).read_text()), int((folder / usage_name).read_text())
        except (OSError, ValueError):  # absent, or "max"
            continue
        found.append((limit, max(usage - _stat(folder, cache_name), 0)))
    return found


def _stat(folder: Path, name: str) -> int:
    """Page cache that the kernel would drop before it refuses memory; usage counts it."""
    try:
        for line in (folder / "memory.stat").read_text().splitlines():
            if line.startswith(name + " "):
                return int(line.split()[1])
    except (OSError, ValueError):
        pass
    return 0
