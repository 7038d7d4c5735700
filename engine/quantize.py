"""Quantised weights of the layers' linear matrices: which formats there are, how a model folder stores them.

What is quantised is the fused matrix of a layer (q, k and v stacked; gate and up stacked), as one piece, since that is
what a kernel reads; int8 and fp8 have a scale per output row, so there fusing changes nothing. Embeddings, norms and
biases keep the model's dtype. The output projection does, too, unless the format says ``+head``: then it is held in 8
bits for inference, beside the embedding where the two are tied (the embedding itself is never quantised).

A quantised folder holds, in place of each layer's ``….weight`` tensors, ``quantized.layers.<i>.<linear>.<field>`` with
the fields of `NF4Weight` or `ChannelWeight`, and in config.json
``"quantization_config": {"quant_method": "specialize", "format": "int8", "head": false}``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from specialize.errors import InputError

from ..kernels.channelwise import ChannelWeight
from ..kernels.nf4 import BLOCK, SCALE_BLOCK, NF4Weight
from ..kernels.quantized_linear import QUANTIZERS, QuantizedWeight
from .config import ModelConfig, read_json
from .layout import HEAD, FusedLinear, expected_tensors, layer_linears, num_parameters, top_path

FORMATS = tuple(QUANTIZERS)
CHOICES = (*FORMATS, *(f"{name}+head" for name in FORMATS))
METHOD = "specialize"
PREFIX = "quantized."
HEAD_PATH = PREFIX + "head"
_VALUES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


@dataclass(frozen=True)
class Quantization:
    """``format`` of the layers' linear weights; ``head``: whether the output projection is in 8 bits as well."""

    format: str
    head: bool = False

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise InputError(f"quantize: {self.format!r} is no known format; allowed: {', '.join(CHOICES)}")

    @staticmethod
    def parse(value: str | Quantization | None) -> Quantization | None:
        """ "int8", "int8+head", …, or None and "none" for weights as they are."""
        if value is None or isinstance(value, Quantization):
            return value
        if value == "none":
            return None
        name, plus, rest = value.partition("+")
        if value not in CHOICES:
            raise InputError(f"quantize: {value!r} is no known format; allowed: none, {', '.join(CHOICES)}")
        return Quantization(name, bool(plus and rest))

    def __str__(self) -> str:
        return self.format + "+head" * self.head

    @property
    def head_format(self) -> str:
        """Four bits are too few for the matrix that every token's choice passes through."""
        return "fp8" if self.format == "fp8" else "int8"

    def to_dict(self) -> dict[str, Any]:
        """The ``quantization_config`` of a config.json."""
        return {"quant_method": METHOD, "format": self.format, "head": self.head}


def stored_quantization(path: str | Path) -> Quantization | None:
    """How the weights of a model folder are quantised; None for dense weights and for GGUF files, which are read as
    dense ones. Raises InputError for folders quantised by other programs."""
    file = Path(path) / "config.json"
    if Path(path).suffix == ".gguf" or not file.exists():
        return None
    return quantization_of(read_json(file), str(file))


def quantization_of(raw: Mapping[str, Any], source: str) -> Quantization | None:
    """As `stored_quantization`, of a parsed config.json."""
    stored = raw.get("quantization_config")
    if stored is None:
        return None
    method = stored.get("quant_method") if isinstance(stored, dict) else stored
    if method != METHOD:
        raise InputError(
            f"{source}: the weights are quantised by {method!r}, which is not read; give the model before its "
            f"quantisation and use --quantize {'|'.join(FORMATS)}"
        )
    format_name, head = stored.get("format"), stored.get("head", False)
    if format_name not in FORMATS or not isinstance(head, bool):
        raise InputError(f"{source}: quantization_config has format {format_name!r:.80}; known: {', '.join(FORMATS)}")
    return Quantization(format_name, head)


def agree(wanted: Quantization | None, stored: Quantization | None, source: str | Path) -> Quantization | None:
    """The quantisation to load with. Raises InputError where quantised weights would be quantised once more."""
    if wanted is not None and stored is not None and wanted != stored:
        raise InputError(
            f"{source}: its weights are {stored} already; leave --quantize out, or start from the original"
        )
    return stored or wanted


def linear_path(layer_id: int, name: str) -> str:
    """Prefix of a quantised layer weight's tensors in a model folder."""
    return f"{PREFIX}layers.{layer_id}.{name}"


def check_shapes(config: ModelConfig, quantization: Quantization | None, source: str) -> None:
    """Raises InputError, before any work, where a layer's width does not fit the format."""
    if quantization is None or quantization.format != "nf4":
        return
    for fused in layer_linears(config, 0):
        if fused.in_features % BLOCK:
            raise InputError(
                f"{source}: nf4 takes inputs in blocks of {BLOCK}, and {fused.name} has {fused.in_features} of them; "
                f"use int8 or fp8"
            )


def quantized_tensors(config: ModelConfig, quantization: Quantization) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a quantised folder of this config."""
    shapes = expected_tensors(config)
    found: dict[str, tuple[int, ...]] = {}
    replaced = {part.path + ".weight" for _, fused in _linears(config) for part in fused.parts}
    if quantization.head and not config.tied_embeddings:
        replaced.add(top_path(config, HEAD) + ".weight")
    for name, shape in shapes.items():
        if name not in replaced:
            found[name] = shape
    for path, format_name, shape in _matrices(config, quantization):
        if path == HEAD_PATH and config.tied_embeddings:
            continue  # made from the embedding when the model is loaded
        found |= {f"{path}.{field}": size for field, (size, _) in _fields(format_name, shape).items()}
    return found


def quantized_bytes(config: ModelConfig, quantization: Quantization | None, dtype: torch.dtype) -> int:
    """Bytes that a loaded model's weights take, without loading it."""
    dense = num_parameters(config) * dtype.itemsize
    if quantization is None:
        return dense
    for path, format_name, (num_out, num_in) in _matrices(config, quantization):
        for shape, kind in _fields(format_name, (num_out, num_in)).values():
            dense += math.prod(shape) * kind.itemsize
        if path != HEAD_PATH or not config.tied_embeddings:
            dense -= num_out * num_in * dtype.itemsize
    return dense


def _linears(config: ModelConfig) -> Iterator[tuple[int, FusedLinear]]:
    for layer_id in range(config.num_layers):
        for fused in layer_linears(config, layer_id):
            yield layer_id, fused


def _matrices(config: ModelConfig, quantization: Quantization) -> Iterator[tuple[str, str, tuple[int, int]]]:
    """Path, format and shape of every quantised matrix."""
    for layer_id, fused in _linears(config):
        shape = (fused.out_features, fused.in_features)
        yield linear_path(layer_id, fused.name), quantization.format, shape
    if quantization.head:
        yield HEAD_PATH, quantization.head_format, (config.vocab_size, config.hidden_size)


def _fields(format_name: str, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    num_out, num_in = shape
    if format_name != "nf4":
        return {"values": (shape, _VALUES[format_name]), "scales": ((num_out,), torch.float32)}
    blocks = num_in // BLOCK
    return {
        "codes": ((blocks, num_out, BLOCK // 2), torch.uint8),
        "absmax_index": ((blocks, num_out), torch.uint8),
        "absmax_scale": ((-(-blocks * num_out // SCALE_BLOCK),), torch.float32),
        "absmax_offset": ((1,), torch.float32),
    }


def quantize_weight(weight: torch.Tensor, format_name: str, what: str) -> QuantizedWeight:
    """A dense [out, in] in ``format_name``; ``what`` names it in the InputError for values that cannot be quantised."""
    try:
        return QUANTIZERS[format_name](weight)
    except ValueError as error:
        raise InputError(f"{what}: cannot be quantised; {error}") from None


def weight_fields(weight: QuantizedWeight) -> dict[str, torch.Tensor]:
    """The tensors that make up a quantised weight, by field name."""
    if isinstance(weight, ChannelWeight):
        return {"values": weight.values, "scales": weight.scales}
    return {
        "codes": weight.codes,
        "absmax_index": weight.absmax_index,
        "absmax_scale": weight.absmax_scale,
        "absmax_offset": weight.absmax_offset,
    }


def read_weight(tensors: Mapping[str, torch.Tensor], path: str, format_name: str, source: str) -> QuantizedWeight:
    """The quantised weight stored under ``path``."""
    names = ("values", "scales") if format_name != "nf4" else tuple(_fields("nf4", (1, BLOCK)))
    fields = {name: tensors[f"{path}.{name}"] for name in names}
    for name, (_, kind) in _fields(format_name, (1, BLOCK)).items():
        if fields[name].dtype != kind:
            raise InputError(f"{source}: {path}.{name} has type {fields[name].dtype}; allowed for this format: {kind}")
    return NF4Weight(**fields) if format_name == "nf4" else ChannelWeight(**fields)


class QuantizedView(Mapping[str, torch.Tensor]):
    """A dense checkpoint's tensors under the names and in the form of a quantised folder, made one matrix at a time."""

    def __init__(
        self, config: ModelConfig, tensors: Mapping[str, torch.Tensor], quantization: Quantization, source: str
    ) -> None:
        self.shapes = quantized_tensors(config, quantization)
        self._config, self._tensors, self._source = config, tensors, source
        self._formats = {path: kind for path, kind, _ in _matrices(config, quantization)}
        self._sources = {linear_path(i, fused.name): [p.path for p in fused.parts] for i, fused in _linears(config)}
        self._sources[HEAD_PATH] = [top_path(config, HEAD)]
        self._last: tuple[str, dict[str, torch.Tensor]] = ("", {})

    def __getitem__(self, name: str) -> torch.Tensor:
        path, _, field = name.rpartition(".")
        if not name.startswith(PREFIX):
            return self._tensors[name]
        if self._last[0] != path:  # the fields of a matrix are asked for one after the other
            parts = [self._tensors[source + ".weight"] for source in self._sources[path]]
            weight = quantize_weight(stack(parts), self._formats[path], f"{self._source}: {path}")
            self._last = (path, weight_fields(weight))
        return self._last[1][field]

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def sizes(self, itemsizes: Mapping[str, int]) -> dict[str, int]:
        """Name -> bytes; ``itemsizes`` holds those of the tensors that stay dense."""
        found = {}
        for name, shape in self.shapes.items():
            path, _, field = name.rpartition(".")
            size = _fields(self._formats[path], (1, BLOCK))[field][1].itemsize if path in self._formats else 0
            found[name] = math.prod(shape) * (size or itemsizes[name])
        return found


def stack(parts: list[torch.Tensor]) -> torch.Tensor:
    """A layer's matrices as one, along their rows."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)
