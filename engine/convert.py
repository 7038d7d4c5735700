"""Checkpoints written anew as safetensors folders: released ``.bin`` shards, GGUF files.

``.bin`` files are pickles; torch's ``weights_only`` reader admits tensors and nothing else. Output appears whole or not
at all.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from specialize.errors import InputError

from .config import PICKLES, ModelConfig, read_json
from .digest import base_identity, save_tensors
from .gguf import GGUFFile
from .layout import expected_tensors
from .quantize import PREFIX, Quantization, QuantizedView, check_shapes, quantization_of
from .staging import staging
from .tokenizer import tokenizer_from_gguf
from .weights import FiniteTensors, SafetensorsFolder, check_tensors

_BIN_NAME = re.compile(r"[^/\\\x00]{1,240}\.bin")
# Names of whole models; a trainer's optimizer.pt and training_args.bin are none.
_BIN_PATTERNS = ("pytorch_model*.bin", "pytorch_model*.pt", "pytorch_model*.pth", "model*.pt", "model*.pth")
MAX_SHARD_BYTES = 5 * 10**9
_COMPANIONS = ("*.json", "*.jinja", "*.model", "*.txt", "LICENSE*")
_NOT_COPIED = ("*.index.json", "*.safetensors", *(f"*{suffix}" for suffix in PICKLES))


class BinFolder(Mapping[str, torch.Tensor]):
    """Tensors of pickled shards (``pytorch_model*.bin`` and the like), mapped where the file's format allows it."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        index = self.path / "pytorch_model.bin.index.json"
        if index.exists():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise InputError(f"{index}: weight_map is missing")
            names = sorted(set(weight_map.values())) if all(isinstance(v, str) for v in weight_map.values()) else []
            if not all(_BIN_NAME.fullmatch(name) for name in names):
                raise InputError(f"{index}: names a shard that is no *.bin file in this folder")
        else:
            found = (sorted(f.name for f in self.path.glob(pattern)) for pattern in _BIN_PATTERNS)
            names = next(filter(None, found), [])
        if not names:
            raise InputError(f"{self.path}: neither *.safetensors nor any of {', '.join(_BIN_PATTERNS)} in it")
        self._tensors: dict[str, torch.Tensor] = {}
        for name in names:
            self._tensors.update(_load_bin(self.path / name))
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class _Updated(Mapping[str, torch.Tensor]):
    """Tensors changed as they are read, so that never more than one is in memory twice."""

    def __init__(
        self, tensors: Mapping[str, torch.Tensor], update: Callable[[str, torch.Tensor], torch.Tensor]
    ) -> None:
        self._tensors, self._update = tensors, update

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._update(name, self._tensors[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _load_bin(file: Path) -> dict[str, torch.Tensor]:
    if not file.exists():
        raise InputError(f"{file}: this shard is missing; the download is incomplete")
    _check_archive(file)
    try:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files of torch < 1.6 cannot be mapped
            state = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise InputError(f"{file}: holds more than tensors, or is no torch checkpoint; it is not read") from None
    except Exception as error:  # noqa: BLE001  (the unpickler raises what damaged opcodes make it raise)
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{file}: not a whole torch checkpoint ({reason}); fetch it again") from None
    if not isinstance(state, dict) or not all(isinstance(t, torch.Tensor) for t in state.values()):
        raise InputError(f"{file}: does not map names to tensors")
    for name, tensor in state.items():
        if tensor.layout != torch.strided or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise InputError(f"{file}: tensor {str(name)[:80]} is larger than what is stored of it; it is not read")
    return state


def _check_archive(file: Path) -> None:
    """torch stores its archives' members as they are; one that unpacks to more than the file is not torch's."""
    try:
        if not zipfile.is_zipfile(file):
            return
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, struct.error, ValueError, LookupError, NotImplementedError, OSError) as error:
        raise InputError(f"{file}: not a whole torch checkpoint ({error}); fetch it again") from None
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED or member.file_size > file.stat().st_size:
            raise InputError(f"{file}: {member.filename[:80]!r} in it is compressed, which torch never does; not read")


def convert(
    source: str | Path,
    target: str | Path,
    *,
    dtype: torch.dtype | None = None,
    quantize: str | Quantization | None = None,
    update: Callable[[str, torch.Tensor], torch.Tensor] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    on_tensor: Callable[[int, int], None] | None = None,
) -> Path:
    """Writes a model folder with safetensors from one with ``.bin`` or safetensors files, or from a ``.gguf`` file.

    ``dtype`` casts the weights; those of GGUF files are dequantised to fp32 unless it says otherwise. ``quantize``
    (`quantize.CHOICES`) quantises the layers' linear weights from the values of the source; the rest is as without.
    ``update(name, tensor)`` gives what is written in a tensor's place, of the same shape and dtype.
    ``on_tensor(done_bytes, total_bytes)`` reports progress. Raises InputError where the source is not a whole, known
    model, a tensor holds NaN or infinity or a number beyond ``dtype``, the target exists, or the disk has too little
    room.
    """
    source, quantization = Path(source), Quantization.parse(quantize)
    if source.suffix == ".gguf":
        file = GGUFFile(source)
        config = file.config
        check_tensors(file.shapes, config, str(source))
        tokenizer, raw = tokenizer_from_gguf(file.metadata, str(source)), config.to_dict()
        if ModelConfig.from_dict(raw, source=str(source)) != config:
            raise InputError(f"{source}: this model cannot be described by a config.json; use the file itself")
        raw["dtype"] = str(dtype or torch.float32).removeprefix("torch.")

        def companions(folder: Path) -> None:
            _write_config(folder, raw, quantization)
            tokenizer.save(folder)

        tensors: Mapping[str, torch.Tensor] = file
        itemsizes = dict.fromkeys(file, 4)
    else:
        config = ModelConfig.from_folder(source)
        stored = quantization_of(read_json(source / "config.json"), str(source / "config.json"))
        if stored is not None:
            raise InputError(f"{source}: its weights are {stored} already; start from the folder it was made from")
        reader = SafetensorsFolder(source) if any(source.glob("*.safetensors")) else BinFolder(source)
        check_tensors({n: s for n, s in reader.shapes.items() if not n.endswith(".inv_freq")}, config, str(source))
        tensors, itemsizes = reader, {name: reader[name].itemsize for name in expected_tensors(config)}

        def companions(folder: Path) -> None:
            _copy_companions(source, folder, dtype)
            if quantization is not None:
                _write_config(folder, read_json(folder / "config.json"), quantization)

    tensors = FiniteTensors(tensors, str(source), dtype)
    if update is not None:
        tensors = _Updated(tensors, update)
    if dtype is not None:
        itemsizes = dict.fromkeys(itemsizes, dtype.itemsize)
    if quantization is not None:
        check_shapes(config, quantization, str(source))
        tensors = QuantizedView(config, tensors, quantization, str(source))
        sizes = tensors.sizes(itemsizes)
    else:
        sizes = {name: math.prod(shape) * itemsizes[name] for name, shape in expected_tensors(config).items()}
    return write_folder(
        target, tensors, sizes, companions, dtype=dtype, max_shard_bytes=max_shard_bytes, on_tensor=on_tensor,
        base=base_identity(source) if update is None else None,
    )  # fmt: skip


def save_model(model: Any, target: str | Path, *, source: str | Path | None = None) -> Path:
    """Writes the weights that a dense `Model` holds, in its number format, as a new folder that transformers loads.

    ``source``, the folder or ``.gguf`` file that the model came from, gives config and tokenizer; without it there is a
    config alone.
    """
    source = None if source is None else Path(source)
    tensors = {name: tensor.detach() for name, tensor in model.tensors()}

    def companions(folder: Path) -> None:
        if source is not None and source.is_dir():
            _copy_companions(source, folder, model.dtype)
            return
        raw = {**model.config.to_dict(), "dtype": str(model.dtype).removeprefix("torch.")}
        _write_config(folder, raw, None)
        if source is not None:
            tokenizer_from_gguf(GGUFFile(source).metadata, str(source)).save(folder)

    return write_folder(target, tensors, {name: t.nbytes for name, t in tensors.items()}, companions)


def write_folder(
    target: str | Path,
    tensors: Mapping[str, torch.Tensor],
    sizes: Mapping[str, int],
    write_companions: Callable[[Path], None],
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    on_tensor: Callable[[int, int], None] | None = None,
    base: str | None = None,
) -> Path:
    """Writes the tensors that ``sizes`` names (name -> bytes, in order) as one model folder, whole or not at all.

    ``write_companions(folder)`` adds config and tokenizer. ``base`` is the identity of the base that this is a copy of
    (`digest.base_identity`).
    """
    target = Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target}: exists already; give a new folder")
    shards = _plan(sizes, max_shard_bytes)
    total = sum(size for shard in shards for _, size in shard)
    target.parent.mkdir(parents=True, exist_ok=True)
    with staging(target.parent, target.name) as partial:
        free = shutil.disk_usage(target.parent).free
        if free < total * 1.01:
            raise InputError(f"{target}: needs {total / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB are free")
        weight_map, done = {}, 0
        for i, shard in enumerate(shards):
            single = len(shards) == 1
            file_name = "model.safetensors" if single else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
            content = {}
            for name, size in shard:
                tensor = tensors[name]
                kept = tensor.dtype if dtype is None or name.startswith(PREFIX) else dtype
                content[name] = tensor.to(kept).contiguous().clone()
                weight_map[name] = file_name
                done += size
                if on_tensor is not None:
                    on_tensor(done, total)
            save_tensors(content, partial / file_name, base)
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
        write_companions(partial)
        partial.chmod(0o755)
        if target.exists():
            target.rmdir()
        os.replace(partial, target)
    return target


def _plan(sizes: Mapping[str, int], max_shard_bytes: int) -> list[list[tuple[str, int]]]:
    """Names and sizes in bytes, in the given order, cut into shards."""
    shards: list[list[tuple[str, int]]] = [[]]
    room = max_shard_bytes
    for name, size in sizes.items():
        if shards[-1] and size > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append((name, size))
        room -= size
    return shards


def _write_config(folder: Path, raw: dict[str, Any], quantization: Quantization | None) -> None:
    if quantization is not None:
        raw = {**raw, "quantization_config": quantization.to_dict()}
    (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n")


def _copy_companions(source: Path, target: Path, dtype: torch.dtype | None) -> None:
    for pattern in _COMPANIONS:
        for file in source.glob(pattern):
            if file.is_file() and not any(file.match(p) for p in _NOT_COPIED):
                shutil.copyfile(file, target / file.name)
    if dtype is not None:
        config = read_json(target / "config.json")
        key = "torch_dtype" if "torch_dtype" in config else "dtype"
        config[key] = str(dtype).removeprefix("torch.")
        (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
