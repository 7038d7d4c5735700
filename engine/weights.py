"""Checkpoint files -> tensors by Hugging Face name: safetensors folders, memory-mapped, and random weights.

A reader is a read-only mapping from name to tensor. `check_tensors` compares what a file holds with what its config
calls for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from specialize.errors import InputError

from .config import PICKLES, ModelConfig, read_json
from .layout import EMBEDDING, HEAD, expected_tensors, top_path
from .quantize import PREFIX, quantized_tensors, stored_quantization

# Buffers that older exporters wrote beside the weights; they follow from the config.
_DERIVED = re.compile(r"(\.rotary_emb\.inv_freq|\.attn\.(masked_)?bias|\.attn_bias|\.position_ids)$")
_SHARD_NAME = re.compile(r"[^/\\\x00]{1,240}\.safetensors")
_FLOATS = {"F64", "F32", "F16", "BF16"}
_QUANTIZED = {"I8", "U8", "F8_E4M3", "F32"}


class SafetensorsFolder(Mapping[str, torch.Tensor]):
    """All tensors of a folder's ``*.safetensors``. Files stay mapped; a tensor is read when it is asked for."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._open: dict[Path, safe_open] = {}
        index = self.path / "model.safetensors.index.json"
        weight_map: dict[str, str] | None = None
        if index.exists():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
                raise InputError(f"{index}: weight_map is missing or malformed")
            names = sorted(set(weight_map.values()))
            if strange := [name for name in names if not _SHARD_NAME.fullmatch(name)]:
                raise InputError(f"{index}: shard {strange[0][:80]!r} is no *.safetensors file name in this folder")
            files = [self.path / name for name in names]
        else:
            single = self.path / "model.safetensors"
            files = [single] if single.exists() else sorted(self.path.glob("*.safetensors"))
        if not files:
            hint = "no *.safetensors in it"
            if pickles := sorted(f.suffix for f in self.path.glob("*") if f.suffix in PICKLES):
                hint = f"only {pickles[0]} weights, which are pickles; run `specialize convert {self.path} NEW` once"
            raise InputError(f"{self.path}: {hint}")
        self.files = files
        for file in files:
            self._read_header(file)
        if weight_map is not None:
            lost = sorted(n for n in weight_map if n not in self._files and not _DERIVED.search(n))
            if lost:
                raise InputError(f"{index}: names tensors that no shard holds: {_some(lost)}")

    def _read_header(self, file: Path) -> None:
        if not file.exists():
            raise InputError(f"{file}: this shard is missing; the download is incomplete")
        try:
            handle = safe_open(file, framework="pt")
            names = list(handle.keys())
            for name in names:
                view = handle.get_slice(name)
                if _DERIVED.search(name):
                    continue
                allowed = _QUANTIZED if name.startswith(PREFIX) else _FLOATS
                if view.get_dtype() not in allowed:
                    raise InputError(
                        f"{file}: tensor {name} has type {view.get_dtype()}; allowed: {', '.join(sorted(allowed))}"
                    )
                if name in self._files:
                    raise InputError(f"{file}: tensor {name} is in {self._files[name].name} as well")
                self.shapes[name] = tuple(view.get_shape())
                self._files[name] = file
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file}: not a whole safetensors file ({error}); fetch it again") from None
        self._open[file] = handle

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._open[self._files[name]].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


class RandomTensors(Mapping[str, torch.Tensor]):
    """Weights drawn per name from ``seed``: the same on every call; norms near one, biases small."""

    def __init__(self, config: ModelConfig, seed: int, device: torch.device | str = "cpu", std: float = 0.02) -> None:
        self.shapes = expected_tensors(config)
        self.seed, self.device, self.std = seed, torch.device(device), std
        self._order = {name: i for i, name in enumerate(self.shapes)}

    def __getitem__(self, name: str) -> torch.Tensor:
        generator = torch.Generator(self.device).manual_seed(self.seed * 1_000_003 + self._order[name])
        shape = self.shapes[name]
        noise = torch.randn(shape, generator=generator, device=self.device).mul_(self.std)
        return noise + 1 if len(shape) == 1 and name.endswith(".weight") else noise

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def check_tensors(
    found: Mapping[str, tuple[int, ...]],
    config: ModelConfig,
    source: str,
    expected: Mapping[str, tuple[int, ...]] | None = None,
) -> None:
    """Raises InputError naming tensors that are missing, surplus, or of another shape than the config says.

    ``expected`` are those of a dense checkpoint unless given.
    """
    expected = expected_tensors(config) if expected is None else expected
    missing = [name for name in expected if name not in found]
    surplus = [name for name in found if name not in expected]
    if config.tied_embeddings:  # many exporters write the tied matrix twice
        surplus = [name for name in surplus if name != top_path(config, HEAD) + ".weight"]
    if missing or surplus:
        what = [f"missing: {_some(missing)}"] * bool(missing) + [f"surplus: {_some(surplus)}"] * bool(surplus)
        raise InputError(
            f"{source}: tensors do not fit the config of this {config.architecture} model; {'; '.join(what)}"
        )
    for name, shape in expected.items():
        if tuple(found[name]) != shape:
            embedding = name in (top_path(config, EMBEDDING) + ".weight", top_path(config, HEAD) + ".weight")
            if embedding and len(found[name]) == 2 and found[name][1] == shape[1]:
                raise InputError(
                    f"{source}: {name} has {found[name][0]} rows, but the config's vocab_size is {config.vocab_size}"
                )
            raise InputError(f"{source}: {name} has shape {tuple(found[name])}, the config calls for {shape}")


class FiniteTensors(Mapping[str, torch.Tensor]):
    """Tensors of ``tensors``, each looked at when it is read: NaN or infinity in one, or a number that ``dtype`` would
    make infinite, is an InputError naming it."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], source: str, dtype: torch.dtype | None = None) -> None:
        self._tensors, self._source, self._dtype = tensors, source, dtype

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self._tensors[name]
        if not is_finite(tensor):
            raise InputError(
                f"{self._source}: tensor {name} holds NaN or infinity; the checkpoint is damaged or its training failed"
            )
        if self._dtype is not None and not is_finite(tensor, self._dtype):
            raise InputError(
                f"{self._source}: tensor {name} holds {tensor.abs().max().item():.3g}, beyond what "
                f"{str(self._dtype).removeprefix('torch.')} can hold; ask for bf16 or fp32"
            )
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def is_finite(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether every number is finite (once it is of ``dtype``), in one pass that allocates nothing of a wide tensor's
    size."""
    if tensor.numel() == 0 or not tensor.is_floating_point():
        return True
    if tensor.itemsize == 1:  # fp8 has no arithmetic; its NaN is all ones but for the sign
        return not bool(((tensor.view(torch.uint8) & 0x7F) == 0x7F).any())
    low, high = (end.to(dtype or tensor.dtype) for end in torch.aminmax(tensor))
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _some(names: list[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def read_config(path: str | Path) -> ModelConfig:
    """The config of a Hugging Face folder or a ``.gguf`` file, from its header alone."""
    path = Path(path)
    if path.suffix == ".gguf":
        from .gguf import GGUFFile

        return GGUFFile(path).config
    return ModelConfig.from_folder(path)


def open_checkpoint(path: str | Path) -> tuple[ModelConfig, Mapping[str, torch.Tensor]]:
    """Config and tensors of a Hugging Face folder or a ``.gguf`` file, checked against each other.

    Those of a folder of quantised weights are in its own form: see `quantize.quantized_tensors`.
    """
    path = Path(path)
    if path.suffix == ".gguf":
        from .gguf import GGUFFile

        file = GGUFFile(path)
        config, tensors = file.config, file
    else:
        config = ModelConfig.from_folder(path)
        quantization = stored_quantization(path)
        tensors = SafetensorsFolder(path)
        if quantization is not None:
            check_tensors(tensors.shapes, config, str(path), quantized_tensors(config, quantization))
            return config, tensors
    check_tensors(tensors.shapes, config, str(path))
    return config, tensors
