"""Sentence embeddings by a BERT encoder (MiniLM and its kin): our own forward pass on the same packed layout.

Post-norm blocks, learned positions, mean pooling over a text's tokens, unit length.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer as Backend

from specialize.errors import InputError

from ..kernels.activation import gelu
from ..kernels.attention_prefill import attention_prefill
from ..kernels.layernorm import layernorm
from .batch import Batch
from .config import read_json
from .linear import Linear
from .tokenizer_growth import check_growth
from .weights import FiniteTensors, SafetensorsFolder

_UNUSED = ("pooler.", "cls.")  # heads for other tasks that checkpoints may carry


@dataclass(frozen=True)
class _Norm:
    weight: torch.Tensor
    bias: torch.Tensor


@dataclass(frozen=True)
class _Block:
    qkv: Linear
    out: Linear
    attn_norm: _Norm
    up: Linear
    down: Linear
    mlp_norm: _Norm


class Embedder:
    """Texts -> unit vectors f32[N, dim]. Equal ``fingerprint``, equal vectors: it names weights and settings."""

    def __init__(
        self, folder: str | Path, *, dtype: torch.dtype, device: torch.device | str, backend: str | None
    ) -> None:
        folder = Path(folder)
        self.dtype, self.device, self.kernel_backend = dtype, torch.device(device), backend
        config = _checked_config(folder)
        self.dim: int = config["hidden_size"]
        self._num_heads: int = config["num_attention_heads"]
        self._eps: float = config.get("layer_norm_eps", 1e-12)
        sentence = folder / "sentence_bert_config.json"
        limit = config["max_position_embeddings"]
        if sentence.exists():
            limit = min(limit, read_json(sentence).get("max_seq_length") or limit)
        self.max_tokens: int = limit
        self._tokenizer = _read_tokenizer(folder, limit)
        if self._tokenizer.get_vocab_size() > config["vocab_size"]:
            raise InputError(
                f"{folder}: the tokenizer has more tokens than the model's {config['vocab_size']} embeddings"
            )
        tensors = SafetensorsFolder(folder)
        self._load(tensors, config, folder)
        self.fingerprint = _fingerprint(folder, tensors, limit)

    @staticmethod
    def from_pretrained(
        path: str | Path,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        *,
        backend: str | None = None,
    ) -> Embedder:
        """Reads a folder with config.json, model.safetensors, tokenizer.json. Raises InputError for anything else."""
        return Embedder(path, dtype=dtype, device=device, backend=backend)

    def _load(self, tensors: SafetensorsFolder, config: dict[str, Any], folder: Path) -> None:
        finite = FiniteTensors(tensors, str(folder), self.dtype)
        prefix = "bert." if any(name.startswith("bert.") for name in tensors) else ""
        used: set[str] = set()

        def take(name: str) -> torch.Tensor:
            if prefix + name not in tensors:
                raise InputError(f"{folder}: tensor {prefix + name} is missing")
            used.add(prefix + name)
            return finite[prefix + name].to(device=self.device, dtype=self.dtype)

        def linear(*names: str) -> Linear:
            weight = torch.cat([take(n + ".weight") for n in names])
            bias = torch.cat([take(n + ".bias") for n in names])
            return Linear(weight, bias)

        def norm(name: str) -> _Norm:
            return _Norm(take(name + ".weight"), take(name + ".bias"))

        for name, rows in (("word", config["vocab_size"]), ("position", config["max_position_embeddings"])):
            full = f"{prefix}embeddings.{name}_embeddings.weight"
            if full in tensors and tensors.shapes[full] != (rows, self.dim):
                found, wanted = tensors.shapes[full], (rows, self.dim)
                raise InputError(f"{folder}: {full} has shape {found}, the config calls for {wanted}")
        self._words = take("embeddings.word_embeddings.weight")
        # Every token is of type 0, so that row is part of the positions.
        types = take("embeddings.token_type_embeddings.weight")
        self._positions = take("embeddings.position_embeddings.weight") + types[:1]
        self._norm = norm("embeddings.LayerNorm")
        self._blocks = []
        for i in range(config["num_hidden_layers"]):
            at = f"encoder.layer.{i}."
            self._blocks.append(
                _Block(
                    qkv=linear(*(f"{at}attention.self.{name}" for name in ("query", "key", "value"))),
                    out=linear(at + "attention.output.dense"),
                    attn_norm=norm(at + "attention.output.LayerNorm"),
                    up=linear(at + "intermediate.dense"),
                    down=linear(at + "output.dense"),
                    mlp_norm=norm(at + "output.LayerNorm"),
                )
            )
        surplus = [n for n in tensors if n not in used and not n.removeprefix(prefix).startswith(_UNUSED)]
        surplus = [n for n in surplus if not n.startswith(_UNUSED)]
        if surplus:
            raise InputError(f"{folder}: surplus tensors: {', '.join(surplus[:5])}")

    @torch.inference_mode()
    def embed(self, texts: Sequence[str], *, max_batch_tokens: int = 8192) -> np.ndarray:
        """Unit vectors f32[N, dim] in the order of ``texts``. Texts beyond ``max_tokens`` tokens are cut."""
        ids = [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts))]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        vectors = np.empty((len(ids), self.dim), np.float32)
        start = 0
        while start < len(order):
            stop, total = start, 0
            while stop < len(order) and (stop == start or total + len(ids[order[stop]]) <= max_batch_tokens):
                total += len(ids[order[stop]])
                stop += 1
            chosen = order[start:stop]
            vectors[chosen] = self._encode([ids[i] for i in chosen]).cpu().numpy()
            start = stop
        return vectors

    def _encode(self, sequences: list[list[int]]) -> torch.Tensor:
        """f32[B, dim] of one packed batch."""
        batch = Batch.packed(sequences, self.device)
        x = F.embedding(batch.token_ids, self._words) + F.embedding(batch.positions, self._positions)
        x = self._layernorm(x, self._norm)
        head_dim = self.dim // self._num_heads
        for block in self._blocks:
            qkv = block.qkv(x).view(-1, 3, self._num_heads, head_dim)
            q, k, v = qkv[:, 0], qkv[:, 1], qkv[:, 2]
            h = attention_prefill(
                q,
                k,
                v,
                batch.query_starts,
                max_query_len=batch.max_query_len,
                softmax_scale=head_dim**-0.5,
                causal=False,
                backend=self.kernel_backend,
            )
            assert isinstance(h, torch.Tensor)
            x = self._layernorm(block.out(h.flatten(1)), block.attn_norm, x)
            h = block.down(gelu(block.up(x), backend=self.kernel_backend))
            x = self._layernorm(h, block.mlp_norm, x)
        lens = batch.context_lens.long()
        owner = torch.repeat_interleave(torch.arange(len(sequences), device=self.device), lens, output_size=x.shape[0])
        sums = torch.zeros(len(sequences), self.dim, dtype=torch.float32, device=self.device)
        sums.index_add_(0, owner, x.float())
        return F.normalize(sums / lens.unsqueeze(1), dim=-1)

    def _layernorm(self, x: torch.Tensor, norm: _Norm, residual: torch.Tensor | None = None) -> torch.Tensor:
        out = layernorm(x, norm.weight, norm.bias, self._eps, residual=residual, backend=self.kernel_backend)
        return out if isinstance(out, torch.Tensor) else out[0]


def _checked_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise InputError(
            f"{folder}: no such embedder folder; give one with config.json, model.safetensors, tokenizer.json"
        )
    file = folder / "config.json"
    config = read_json(file)
    for key, allowed in (
        ("model_type", ("bert",)),
        ("hidden_act", ("gelu",)),
        ("position_embedding_type", ("absolute", None)),
    ):
        if config.get(key) not in allowed:
            raise InputError(f"{file}: {key} {config.get(key)!r} is not supported; allowed: {allowed[0]}")
    for key in ("hidden_size", "num_attention_heads", "num_hidden_layers", "max_position_embeddings", "vocab_size"):
        if not isinstance(config.get(key), int):
            raise InputError(f"{file}: {key} is missing")
    pooling = folder / "1_Pooling" / "config.json"
    if pooling.exists():
        modes = [k for k, on in read_json(pooling).items() if k.startswith("pooling_mode_") and on]
        if modes != ["pooling_mode_mean_tokens"]:
            raise InputError(f"{pooling}: {', '.join(modes)} is not supported; allowed: pooling_mode_mean_tokens")
    return config


def _read_tokenizer(folder: Path, max_tokens: int) -> Backend:
    file = folder / "tokenizer.json"
    if not file.exists():
        raise InputError(f"{file}: no such file; an embedder folder needs it")
    try:
        tokenizer = Backend.from_file(str(file))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # noqa: BLE001  (the package raises plain Exception, and its panics are no Exception)
        raise InputError(f"{file}: not a usable tokenizer ({error})") from None
    check_growth(tokenizer, str(file))
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_tokens)
    return tokenizer


def _fingerprint(folder: Path, tensors: SafetensorsFolder, max_tokens: int) -> str:
    digest = hashlib.sha256(f"mean;{max_tokens};".encode())
    for file in [folder / "tokenizer.json", *tensors.files]:
        with file.open("rb") as handle:
            while chunk := handle.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest()[:16]
