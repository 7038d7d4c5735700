"""GGUF files: metadata, and tensors dequantised to fp32 under their Hugging Face names.

The header is parsed here, with every length checked against the file's size; the arithmetic of the block formats is the
``gguf`` package's. Layout: github.com/ggml-org/ggml, docs/gguf.md.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from specialize.errors import InputError

from .config import ModelConfig, RopeScaling
from .hf_config import yarn_attention_factor
from .layout import EMBEDDING, FINAL_NORM, HEAD, POSITIONS, layer_linears, layer_norms, top_path

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_ALLOWED_TYPES = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
_PART_NAMES = {
    "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "gate_proj": "ffn_gate",
    "up_proj": "ffn_up", "down_proj": "ffn_down", "Wqkv": "attn_qkv", "out_proj": "attn_output",
}  # fmt: skip
_NORM_NAMES = {"attn_norm": "attn_norm", "mlp_norm": "ffn_norm", "q_norm": "attn_q_norm", "k_norm": "attn_k_norm"}


@dataclass(frozen=True)
class _TensorInfo:
    shape: tuple[int, ...]  # rows first, as torch has it
    type_name: str
    block_size: int
    block_bytes: int
    offset: int  # from the start of the file

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) // self.block_size * self.block_bytes


class _Cursor:
    """Reads little-endian values from a buffer; running past its end is the user's broken file."""

    def __init__(self, data: mmap.mmap, source: str) -> None:
        self.data, self.source, self.at = data, source, 0

    def take(self, size: int) -> int:
        start = self.at
        if size < 0 or start + size > len(self.data):
            raise InputError(f"{self.source}: the header ends early; the file is truncated or corrupted")
        self.at = start + size
        return start

    def scalar(self, form: str) -> Any:
        return struct.unpack_from(form, self.data, self.take(struct.calcsize(form)))[0]

    def string(self) -> str:
        size = self.scalar("<Q")
        start = self.take(size)
        return self.data[start : start + size].decode("utf-8", errors="replace")

    def _strings(self, count: int) -> list[str]:
        """As `string`, ``count`` times: vocabularies and merges are the bulk of a header."""
        data, at, end, strings = self.data, self.at, len(self.data) - 8, []
        read = struct.Struct("<Q").unpack_from
        for _ in range(count):
            stop = at + 8 + (read(data, at)[0] if at <= end else end + 1)
            if stop > end + 8:
                self.take(-1)
            strings.append(data[at + 8 : stop].decode("utf-8", errors="replace"))
            at = stop
        self.at = at
        return strings

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY and depth < 3:
            item_kind, count = self.scalar("<I"), self.scalar("<Q")
            if item_kind in _SCALARS:
                form = np.dtype(_SCALARS[item_kind])
                start = self.take(count * form.itemsize)
                return np.frombuffer(self.data, form, count, start).tolist()
            self.take(0 if count <= len(self.data) - self.at else -1)
            if item_kind == _STRING:
                return self._strings(count)
            return [self.value(item_kind, depth + 1) for _ in range(count)]
        raise InputError(f"{self.source}: metadata has a value of unknown type {kind}; the file is corrupted")


class GGUFFile(Mapping[str, torch.Tensor]):
    """One model in a ``.gguf`` file: ``metadata``, ``config``, and tensors by their Hugging Face names (fp32)."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.metadata: dict[str, Any] = {}
        self._infos: dict[str, _TensorInfo] = {}
        try:
            self._read_header()
            self.config = self._config()
        except InputError:
            raise
        except (TypeError, ValueError, ArithmeticError, AttributeError, LookupError) as error:
            raise InputError(f"{self.path}: a value of the header has a wrong type or size ({error})") from None
        self._names = self._hf_names()
        self.shapes = {self._names.get(name, name): info.shape for name, info in self._infos.items()}
        self.shapes.pop("rope_freqs.weight", None)
        self._by_hf_name = {hf: name for name, hf in self._names.items() if name in self._infos}

    def _read_header(self) -> None:
        try:
            with self.path.open("rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise InputError(f"{self.path}: no such file") from None
        except (OSError, ValueError) as error:
            raise InputError(f"{self.path}: cannot be read ({error})") from None
        cursor = _Cursor(self._data, str(self.path))
        if self._data[:4] != b"GGUF":
            raise InputError(f"{self.path}: does not start like a GGUF file")
        cursor.at = 4
        version = cursor.scalar("<I")
        if version not in (2, 3):
            raise InputError(f"{self.path}: GGUF version {version} is not supported; allowed: 2, 3")
        num_tensors, num_values = cursor.scalar("<Q"), cursor.scalar("<Q")
        for _ in range(num_values):
            key = cursor.string()
            self.metadata[key] = cursor.value(cursor.scalar("<I"))
        if self.metadata.get("split.count", 1) > 1:
            raise InputError(f"{self.path}: is one of several parts; join them with gguf-split first")
        raw = []
        for _ in range(num_tensors):
            name, num_dims = cursor.string(), cursor.scalar("<I")
            if not 1 <= num_dims <= 4:
                raise InputError(f"{self.path}: tensor {name!r} has {num_dims} dimensions; the file is corrupted")
            dims = tuple(cursor.scalar("<Q") for _ in range(num_dims))
            raw.append((name, dims, cursor.scalar("<I"), cursor.scalar("<Q")))
        alignment = self.metadata.get("general.alignment", 32)
        start = -(-cursor.at // alignment) * alignment
        for name, dims, type_id, offset in raw:
            if name in self._infos:
                raise InputError(f"{self.path}: tensor {name!r} is there twice; the file is corrupted")
            self._infos[name] = self._tensor_info(name, dims, type_id, start + offset)
        if sum(info.num_bytes for info in self._infos.values()) > len(self._data):
            raise InputError(f"{self.path}: its tensors overlap; the file is corrupted")

    def _tensor_info(self, name: str, dims: tuple[int, ...], type_id: int, offset: int) -> _TensorInfo:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        known = {kind.value: kind for kind in GGMLQuantizationType}
        kind = known.get(type_id)
        if kind is None or kind.name not in _ALLOWED_TYPES:
            shown = kind.name if kind is not None else type_id
            raise InputError(f"{self.path}: {name} has type {shown}; allowed: {', '.join(_ALLOWED_TYPES)}")
        block_size, block_bytes = GGML_QUANT_SIZES[kind]
        info = _TensorInfo(dims[::-1], kind.name, block_size, block_bytes, offset)
        if dims[0] % block_size:
            raise InputError(f"{self.path}: {name} has rows of {dims[0]}, no multiple of {block_size}; it is corrupted")
        if offset + info.num_bytes > len(self._data):
            raise InputError(
                f"{self.path}: tensor {name} ends at byte {offset + info.num_bytes}, but the file has only "
                f"{len(self._data)}; it is truncated, fetch it again"
            )
        return info

    def _field(self, key: str, default: Any = None) -> Any:
        architecture = self.metadata["general.architecture"]
        value = self.metadata.get(f"{architecture}.{key}", default)
        if value is None:
            raise InputError(f"{self.path}: metadata lacks {architecture}.{key}")
        return value

    def _config(self) -> ModelConfig:
        architecture = self.metadata.get("general.architecture")
        allowed = ("llama", "qwen2", "qwen3", "mpt")
        if architecture not in allowed:
            raise InputError(
                f"{self.path}: architecture {architecture!r} is not supported; allowed: {', '.join(allowed)}"
            )
        if "token_embd.weight" not in self._infos:
            raise InputError(f"{self.path}: tensor token_embd.weight is missing")
        num_heads, hidden_size = self._field("attention.head_count"), self._field("embedding_length")
        head_dim = self._field("attention.key_length", hidden_size // num_heads)
        meta = self.metadata
        eos = [meta.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
        common: dict[str, Any] = {
            "architecture": architecture,
            "vocab_size": self._infos["token_embd.weight"].shape[0],
            "hidden_size": hidden_size,
            "intermediate_size": self._field("feed_forward_length"),
            "num_layers": self._field("block_count"),
            "num_heads": num_heads,
            "num_kv_heads": self._field("attention.head_count_kv", num_heads),
            "head_dim": head_dim,
            "max_context": self._field("context_length"),
            "mlp_bias": "blk.0.ffn_up.bias" in self._infos,
            "out_bias": "blk.0.attn_output.bias" in self._infos,
            "tied_embeddings": "output.weight" not in self._infos,
            "bos_token_id": meta.get("tokenizer.ggml.bos_token_id"),
            "eos_token_ids": tuple(dict.fromkeys(i for i in eos if i is not None)),
        }
        if architecture == "mpt":
            return ModelConfig(**common, **self._mpt_fields())
        if self._field("rope.dimension_count", head_dim) != head_dim:
            raise InputError(f"{self.path}: rotary positions over part of a head are not supported")
        if self._field("expert_count", 0):
            raise InputError(f"{self.path}: mixtures of experts are not supported")
        theta = float(self._field("rope.freq_base", 10000.0))
        return ModelConfig(
            **common,
            norm_eps=self._field("attention.layer_norm_rms_epsilon"),
            rope_theta=theta,
            rope_scaling=self._rope_scaling(),
            qkv_bias="blk.0.attn_q.bias" in self._infos,
            qk_norm="head" if architecture == "qwen3" else None,
            sliding_window=self._field("attention.sliding_window", 0) or None,
        )

    def _mpt_fields(self) -> dict[str, Any]:
        bias_max = self._field("attention.max_alibi_bias", 0.0)
        learned = "position_embd.weight" in self._infos
        return {
            "norm": "layernorm",
            "norm_eps": self._field("attention.layer_norm_epsilon", 1e-5),
            "norm_bias": "output_norm.bias" in self._infos,
            "position": "alibi" if bias_max > 0 else "learned" if learned else "none",
            "alibi_bias_max": bias_max or 8.0,
            "mlp": "gelu",
            "qkv_bias": "blk.0.attn_qkv.bias" in self._infos,
            "qk_norm": "full" if "blk.0.attn_q_norm.weight" in self._infos else None,
            "clip_qkv": self._field("attention.clamp_kqv", 0.0) or None,
            "fused_qkv_checkpoint": True,
        }

    def _rope_scaling(self) -> RopeScaling | None:
        if "rope_freqs.weight" in self._infos:
            factors = self._dequantise("rope_freqs.weight").flatten().tolist()
            return RopeScaling("factors", frequency_factors=tuple(factors))
        kind = self._field("rope.scaling.type", "none")
        factor = float(self._field("rope.scaling.factor", 1.0))
        if kind == "none" or factor == 0.0:
            return None
        if kind == "linear":
            return RopeScaling("linear", factor=factor)
        if kind == "yarn":
            return RopeScaling(
                "yarn",
                factor=factor,
                original_max_context=self._field("rope.scaling.original_context_length"),
                beta_fast=float(self._field("rope.scaling.yarn_beta_fast", 32.0)),
                beta_slow=float(self._field("rope.scaling.yarn_beta_slow", 1.0)),
                attention_factor=yarn_attention_factor(factor),
            )
        raise InputError(f"{self.path}: rope.scaling.type {kind!r} is not supported; allowed: none, linear, yarn")

    def _hf_names(self) -> dict[str, str]:
        """GGUF name -> Hugging Face name of everything that the config may call for."""
        c = self.config
        pairs = {
            "token_embd": top_path(c, EMBEDDING),
            "output_norm": top_path(c, FINAL_NORM),
            "output": top_path(c, HEAD),
        }
        if c.position == "learned":
            pairs["position_embd"] = top_path(c, POSITIONS)
        for layer_id in range(c.num_layers):
            for name, (path, _) in layer_norms(c, layer_id).items():
                pairs[f"blk.{layer_id}.{_NORM_NAMES[name]}"] = path
            for fused in layer_linears(c, layer_id):
                for part in fused.parts:
                    pairs[f"blk.{layer_id}.{_PART_NAMES[part.name]}"] = part.path
        return {f"{a}.{kind}": f"{b}.{kind}" for a, b in pairs.items() for kind in ("weight", "bias")}

    def _dequantise(self, name: str) -> torch.Tensor:
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        info = self._infos[name]
        data = np.frombuffer(self._data, np.uint8, info.num_bytes, info.offset)
        if info.type_name == "F32":
            return torch.from_numpy(data.view(np.float32).reshape(info.shape).copy())
        if info.type_name == "F16":
            return torch.from_numpy(data.view(np.float16).astype(np.float32).reshape(info.shape))
        rows = data.reshape(*info.shape[:-1], -1)
        values = dequantize(rows, GGMLQuantizationType[info.type_name])
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32).reshape(info.shape))

    def __getitem__(self, name: str) -> torch.Tensor:
        source = self._by_hf_name[name]
        values = self._dequantise(source)
        heads = {"attn_q": self.config.num_heads, "attn_k": self.config.num_kv_heads}.get(source.split(".")[-2])
        if heads is None or self.config.architecture not in ("llama", "mistral"):
            return values
        # Files of the llama architecture pair rotary dimensions (2i, 2i+1); ours are (i, i + D/2), as in the original.
        return values.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(values.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_hf_name)

    def __len__(self) -> int:
        return len(self._by_hf_name)
