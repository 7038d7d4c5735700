"""Hashes of large files, and which base a model folder is.

A base is known by the content of its weight files; an adapter carries that of the base it was trained on. A folder that
`convert` made from another says whose copy it is, so that an adapter of a base fits its quantised copy, too.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from specialize.errors import InputError

from .quantize import stored_quantization
from .weights import SafetensorsFolder

BASE_KEY = "specialize_base"  # in the metadata of a safetensors file
_known: dict[tuple[str, int, int, int, int], str] = {}  # what was hashed in this process, by path and state of the file


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file's whole content in hex digits: a second for 1.4 GB on one core. A file whose size, times and
    inode are as before is not read again by this process."""
    path = Path(path).resolve()
    state = _state(path)
    if state not in _known:
        digest = hashlib.sha256()
        with path.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
        if _state(path) != state:  # written to meanwhile
            return digest.hexdigest()
        _known[state] = digest.hexdigest()
    return _known[state]


def _state(path: Path) -> tuple[str, int, int, int, int]:
    found = os.stat(path)
    return str(path), found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


def base_identity(path: str | Path) -> str | None:
    """``kind:SHA-256`` of a model folder or ``.gguf`` file, or of the one it is a copy of; None for other folders.

    Kinds are "safetensors", "quantized" and "gguf"; only identities of one kind can be compared, for the same base has
    one of each. Shards are hashed side by side.
    """
    path = Path(path)
    if path.suffix == ".gguf":
        return f"gguf:{file_sha256(path)}"
    if not any(path.glob("*.safetensors")):
        return None
    files = sorted(SafetensorsFolder(path).files)
    origin = read_base(files[0])
    if origin is not None:
        return origin
    with ThreadPoolExecutor(min(4, len(files))) as pool:
        hashes = list(pool.map(file_sha256, files))
    kind = "safetensors" if stored_quantization(path) is None else "quantized"
    return f"{kind}:{hashlib.sha256(' '.join(hashes).encode()).hexdigest()}"


def read_base(file: Path) -> str | None:
    """The identity of a base that a safetensors file carries, if any."""
    try:
        with safe_open(file, framework="pt") as handle:
            found = (handle.metadata() or {}).get(BASE_KEY)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: not a whole safetensors file ({error})") from None
    if found is not None and not re.fullmatch(r"(safetensors|quantized|gguf):[0-9a-f]{64}", found):
        raise InputError(f"{file}: its {BASE_KEY} {found!r:.80} is no hash; the file is damaged")
    return found


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path, base: str | None) -> None:
    """Writes a safetensors file that carries ``base``. Equal contents are equal files: the package itself writes the
    metadata's entries in another order every time, so they are put in that of their names."""
    save_file(dict(tensors), path, metadata={"format": "pt", **({BASE_KEY: base} if base else {})})
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) <= length:
            file.seek(8)
            file.write(text.ljust(length))
    path.chmod(0o644)  # the package makes files that only their owner reads


def require_base(trained_on: str | None, adapter: str | Path, source: str | Path | None) -> None:
    """Raises InputError where the adapter carries the identity of another base than ``source``. One without (PEFT
    writes none), a model without files, and identities of two kinds pass."""
    if trained_on is None or source is None:
        return
    found = base_identity(source)
    if found is None or found == trained_on or found.partition(":")[0] != trained_on.partition(":")[0]:
        return
    raise InputError(
        f"{adapter}: was trained on another base: its weights had SHA-256 {_short(trained_on)}, those of {source} have "
        f"{_short(found)}. Give the base that it was trained on; copies in other number formats are known when "
        "'specialize convert' made them"
    )


def _short(identity: str) -> str:
    return identity.partition(":")[2][:12] + "…"
