"""One decoder for every architecture: norm, positions and MLP are chosen by the config.

The model holds frozen weights and nothing else; all that changes from call to call comes in as an argument. Tokens are
packed: [T, C] with the batch's ``query_starts``. Without a cache a forward pass is differentiable (in the inputs of the
linear layers, so for adapters); with one it writes keys and values to pages and attends over them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from ..kernels.activation import gelu, swiglu
from ..kernels.attention_decode import attention_paged
from ..kernels.attention_prefill import alibi_slopes, attention_prefill
from ..kernels.cpu import keep_freed_memory
from ..kernels.kv_write import kv_write
from ..kernels.layernorm import layernorm
from ..kernels.quantized_linear import QuantizedWeight, dequantize
from ..kernels.rmsnorm import rmsnorm
from ..kernels.rope import rope
from .batch import Batch
from .config import ModelConfig
from .layout import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    POSITIONS,
    FusedLinear,
    LinearPart,
    layer_linears,
    layer_norms,
    num_parameters,
    top_path,
)
from .linear import Linear
from .memory import available_memory_bytes
from .quantize import (
    HEAD_PATH,
    Quantization,
    agree,
    check_shapes,
    linear_path,
    quantize_weight,
    quantized_bytes,
    read_weight,
    stack,
    stored_quantization,
)
from .rope_tables import rope_tables
from .routing import Routed, RoutedAdapters
from .weights import FiniteTensors, RandomTensors, open_checkpoint


class LayerAdapters(Protocol):
    """What adds low-rank updates to linear layers: a pool of adapters when generating, trainable ones when tuning.
    `RoutedAdapters` are shown the hidden states of each half of a block first."""

    def linear(self, x: torch.Tensor, linear: Linear, layer_id: int, name: str, batch: Batch) -> torch.Tensor: ...


class LayerKeeper(Protocol):
    """Keeps the matrices of layers in its own way, such as in parts on several devices, and runs a layer's block with
    them whole."""

    def add(self, layer: Layer) -> None: ...

    def run(self, block: Callable[..., Any], layer: Layer, *arguments: Any) -> Any: ...


@dataclass(frozen=True)
class AdaptedLinear:
    """One linear layer that an adapter may touch: ours, and the checkpoint modules that its rows come from."""

    layer_id: int
    name: str
    linear: Linear
    parts: tuple[LinearPart, ...]


@dataclass(frozen=True)
class Norm:
    weight: torch.Tensor
    bias: torch.Tensor | None


@dataclass(frozen=True)
class Layer:
    """Weights of one block."""

    layer_id: int
    attn_norm: Norm
    qkv: Linear
    q_norm: Norm | None
    k_norm: Norm | None
    o: Linear
    mlp_norm: Norm
    up: Linear  # "gate_up" in gated MLPs
    down: Linear
    window: int | None


class Model:
    """A decoder with its weights on one device. ``backend`` is passed to every kernel (None: each op's own choice)."""

    def __init__(
        self,
        config: ModelConfig,
        tensors: Mapping[str, torch.Tensor],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        inference: bool = True,
        backend: str | None = None,
        quantization: Quantization | None = None,
        keeper: LayerKeeper | None = None,
    ) -> None:
        """Takes tensors by checkpoint name (`layout.expected_tensors`, or those of a quantised folder).

        ``inference`` allows packed weight copies. With ``quantization`` the layers' matrices are held quantised: read
        as they are stored, or quantised from dense tensors, one matrix at a time. A ``keeper`` gets each layer as soon
        as it is there.
        """
        check_shapes(config, quantization, "quantize")
        self.source: Path | None = None  # the folder or file that the weights are of
        self._keeper = keeper
        self.quantization = quantization
        self.config, self.dtype, self.device, self.backend = config, dtype, torch.device(device), backend
        self._prepack = inference and self.device.type == "cpu" and dtype == torch.bfloat16
        if self.device.type == "cpu":
            keep_freed_memory()
            # Packed copies double the weights; they are for machines with room to spare.
            # Quantised ones are packed in place.
            if quantization is None:
                self._prepack &= num_parameters(config) * dtype.itemsize < available_memory_bytes(self.device) / 4

        def take(name: str) -> torch.Tensor:
            return tensors[name].to(device=self.device, dtype=dtype)

        def take_norm(path: str) -> Norm:
            return Norm(take(path + ".weight"), take(path + ".bias") if config.norm_bias else None)

        self.embedding = take(top_path(config, EMBEDDING) + ".weight")
        self.position_embedding = (
            take(top_path(config, POSITIONS) + ".weight") if config.position == "learned" else None
        )
        self.layers: list[Layer] = []
        self._adaptable: list[AdaptedLinear] = []
        for layer_id in range(config.num_layers):
            norms = {name: take_norm(path) for name, (path, _) in layer_norms(config, layer_id).items()}
            linears = []
            for fused in layer_linears(config, layer_id):
                linear = self._fuse(fused, layer_id, tensors)
                linears.append(linear)
                self._adaptable.append(AdaptedLinear(layer_id, fused.name, linear, fused.parts))
            qkv, o, up, down = linears
            layer = Layer(
                layer_id=layer_id,
                attn_norm=norms["attn_norm"],
                qkv=qkv,
                q_norm=norms.get("q_norm"),
                k_norm=norms.get("k_norm"),
                o=o,
                mlp_norm=norms["mlp_norm"],
                up=up,
                down=down,
                window=config.window(layer_id),
            )
            self.layers.append(layer)
            if keeper is not None:
                keeper.add(layer)
        self._up_name = "up" if config.mlp == "gelu" else "gate_up"
        self.final_norm = take_norm(top_path(config, FINAL_NORM))
        self.head = self._head(tensors, inference)
        self.slopes = (
            alibi_slopes(config.num_heads, config.alibi_bias_max).to(self.device)
            if config.position == "alibi"
            else None
        )
        self.cos, self.sin = rope_tables(config, self.device) if config.position == "rope" else (None, None)

    def _fuse(self, fused: FusedLinear, layer_id: int, tensors: Mapping[str, torch.Tensor]) -> Linear:
        """Stacks the checkpoint's matrices along their rows; the only copy made of them."""
        place = {"dtype": self.dtype, "device": self.device}
        if self.quantization is not None:
            biases = [tensors[part.path + ".bias"].to(**place) for part in fused.parts] if fused.has_bias else []
            sources = [part.path + ".weight" for part in fused.parts]
            quantized = self._quantized(linear_path(layer_id, fused.name), sources, tensors, self.quantization.format)
            return Linear(quantized, stack(biases) if biases else None, prepack=self._prepack)
        if len(fused.parts) == 1:
            path = fused.parts[0].path
            weight = tensors[path + ".weight"].to(**place)
            bias = tensors[path + ".bias"].to(**place) if fused.has_bias else None
        else:
            weight = torch.empty(fused.out_features, fused.in_features, **place)
            bias = torch.empty(fused.out_features, **place) if fused.has_bias else None
            for part in fused.parts:
                weight[part.start : part.stop].copy_(tensors[part.path + ".weight"])
                if bias is not None:
                    bias[part.start : part.stop].copy_(tensors[part.path + ".bias"])
        return Linear(weight, bias, prepack=self._prepack)

    def _quantized(
        self, path: str, sources: list[str], tensors: Mapping[str, torch.Tensor], format_name: str
    ) -> QuantizedWeight:
        """The matrix stored quantised under ``path``, else made from the dense tensors named by ``sources``."""
        if sources[0] not in tensors:
            return read_weight(tensors, path, format_name, path).to(self.device)
        return quantize_weight(stack([tensors[name].to(self.device) for name in sources]), format_name, path)

    def _head(self, tensors: Mapping[str, torch.Tensor], inference: bool) -> Linear:
        """The output projection: quantised where asked for, but dense in training, whose loss reads it in pieces."""
        c = self.config
        if self.quantization is not None and self.quantization.head and (inference or not c.tied_embeddings):
            source = top_path(c, EMBEDDING if c.tied_embeddings else HEAD) + ".weight"
            weight = self._quantized(HEAD_PATH, [source], tensors, self.quantization.head_format)
            if inference:
                return Linear(weight, prepack=self._prepack)
            return Linear(dequantize(weight, self.dtype))
        if c.tied_embeddings:
            return Linear(self.embedding, prepack=self._prepack)
        return Linear(tensors[top_path(c, HEAD) + ".weight"].to(self.device, self.dtype), prepack=self._prepack)

    @staticmethod
    def from_pretrained(
        path: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        inference: bool = True,
        backend: str | None = None,
        quantize: str | Quantization | None = None,
        keeper: LayerKeeper | None = None,
    ) -> Model:
        """Reads a Hugging Face folder or a ``.gguf`` file. Raises InputError where it is not a whole, known model.

        ``quantize`` ("int8", "nf4+head", … see `quantize.CHOICES`) quantises dense weights on the way; a folder of
        quantised weights needs no word about it.
        """
        quantization = agree(Quantization.parse(quantize), stored_quantization(path), path)
        config, tensors = open_checkpoint(path)
        model = Model(
            config,
            FiniteTensors(tensors, str(path), dtype),
            dtype=dtype,
            device=device,
            inference=inference,
            backend=backend,
            quantization=quantization,
            keeper=keeper,
        )
        model.source = Path(path)
        return model

    @staticmethod
    def random(
        config: ModelConfig,
        seed: int = 0,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        inference: bool = True,
        backend: str | None = None,
        std: float = 0.02,
        quantize: str | Quantization | None = None,
    ) -> Model:
        """A model with random weights, for tests and benchmarks."""
        tensors, quantization = RandomTensors(config, seed, device, std), Quantization.parse(quantize)
        return Model(
            config, tensors, dtype=dtype, device=device, inference=inference, backend=backend, quantization=quantization
        )

    def keep_unpacked(self) -> None:
        """Makes no packed copies of weights from here on: for a memory cap that has no room for them."""
        for linear in (*(adapted.linear for adapted in self._adaptable), self.head):
            linear.prepack = False

    @property
    def adaptable(self) -> tuple[AdaptedLinear, ...]:
        """Every linear layer that adapters can touch, in the order in which they run."""
        return tuple(self._adaptable)

    @property
    def head_weight(self) -> torch.Tensor:
        """Output projection [V, C] in the model's dtype, the embedding matrix where the two are tied."""
        return self.embedding if self.config.tied_embeddings else self.head.dense(self.dtype)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights as they are held; packed copies not counted."""
        return quantized_bytes(self.config, self.quantization, self.dtype)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Weights under their checkpoint names, what a writer of checkpoints needs: views, or dense copies of quantised
        ones."""
        c = self.config

        def norm(path: str, value: Norm) -> Iterator[tuple[str, torch.Tensor]]:
            yield path + ".weight", value.weight
            if value.bias is not None:
                yield path + ".bias", value.bias

        yield top_path(c, EMBEDDING) + ".weight", self.embedding
        if self.position_embedding is not None:
            yield top_path(c, POSITIONS) + ".weight", self.position_embedding
        for layer in self.layers:
            for name, (path, _) in layer_norms(c, layer.layer_id).items():
                yield from norm(path, getattr(layer, name))
        for adapted in self._adaptable:
            weight = adapted.linear.dense(self.dtype)
            for part in adapted.parts:
                yield part.path + ".weight", weight[part.start : part.stop]
                if adapted.linear.bias is not None:
                    yield part.path + ".bias", adapted.linear.bias[part.start : part.stop]
        yield from norm(top_path(c, FINAL_NORM), self.final_norm)
        if not c.tied_embeddings:
            yield top_path(c, HEAD) + ".weight", self.head_weight

    def forward(
        self,
        batch: Batch,
        cache: Any | None = None,
        adapters: LayerAdapters | None = None,
        *,
        recompute_layers: int = 0,
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states [T, C] after the final norm.

        ``cache.layer(i)`` gives (k_cache, v_cache) [P,S,K,D] of a layer, and optionally two scales. The backward pass
        recomputes the first ``recompute_layers`` blocks instead of keeping their activations: by the time their turn
        comes those of the later blocks are freed, so recomputing needs no memory beyond the peak. With ``rows``
        (i64 [N], positions in the packed batch) the result is [N, C], and the last block goes on from its attention
        with these rows alone; adapters must then treat all rows alike.
        """
        x = F.embedding(batch.token_ids, self.embedding)
        if self.position_embedding is not None:
            x = x + F.embedding(batch.positions, self.position_embedding)
        residual: torch.Tensor | None = None
        run_block = self._block if self._keeper is None else partial(self._keeper.run, self._block)
        for layer in self.layers:
            wanted = rows if layer is self.layers[-1] else None
            if layer.layer_id < recompute_layers:
                arguments = (layer, x, residual, batch, None, adapters, wanted)
                x, residual = checkpoint(run_block, *arguments, use_reentrant=False)
            else:
                x, residual = run_block(layer, x, residual, batch, cache, adapters, wanted)
        return self._norm(x, self.final_norm, residual)[0]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, C] -> [N, V] in the model's dtype, the config's logit scale applied."""
        logits = self.head(hidden)
        return logits if self.config.logit_scale == 1.0 else logits * self.config.logit_scale

    def _block(
        self,
        layer: Layer,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        batch: Batch,
        cache: Any | None,
        adapters: LayerAdapters | None,
        rows: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One pre-norm block. The sum ``residual + x`` is taken by the norm that reads it."""

        def linear(value: torch.Tensor, weights: Linear, name: str) -> torch.Tensor:
            if serving is None:
                return weights(value)
            return serving.linear(value, weights, layer.layer_id, name, batch)

        h, residual = self._norm(x, layer.attn_norm, residual)
        serving = adapters.routed(h, batch) if isinstance(adapters, RoutedAdapters) else adapters
        h = self._attention(layer, linear(h, layer.qkv, "qkv"), batch, cache)
        if rows is not None:
            h, residual = h.index_select(0, rows), residual.index_select(0, rows)
            serving = serving.take(rows) if isinstance(serving, Routed) else serving
        h = linear(h, layer.o, "o")
        h, residual = self._norm(h, layer.mlp_norm, residual)
        serving = adapters.routed(h, batch) if isinstance(adapters, RoutedAdapters) else adapters
        if adapters is None and self.config.mlp == "swiglu":
            h = layer.up.swiglu(h, backend=self.backend)
        else:
            h = self._activation(linear(h, layer.up, self._up_name))
        return linear(h, layer.down, "down"), residual

    def _norm(self, x: torch.Tensor, norm: Norm, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm(x + residual), x + residual); a first block has no residual yet, and x becomes it."""
        eps, backend = self.config.norm_eps, self.backend
        if self.config.norm == "rmsnorm":
            out = rmsnorm(x, norm.weight, eps, residual=residual, backend=backend)
        else:
            out = layernorm(x, norm.weight, norm.bias, eps, residual=residual, backend=backend)
        return (out, x) if isinstance(out, torch.Tensor) else out

    def _activation(self, h: torch.Tensor) -> torch.Tensor:
        if self.config.mlp == "swiglu":
            return swiglu(h, backend=self.backend)
        if self.config.mlp == "gelu":
            return gelu(h, backend=self.backend)
        gate, up = h.chunk(2, dim=-1)
        return gelu(gate, backend=self.backend) * up

    def _attention(self, layer: Layer, qkv: torch.Tensor, batch: Batch, cache: Any | None) -> torch.Tensor:
        """[T, (H+2K)D] -> [T, HD]."""
        c = self.config
        if c.clip_qkv is not None:
            qkv = qkv.clamp(-c.clip_qkv, c.clip_qkv)
        q, k, v = qkv.unflatten(1, (-1, c.head_dim)).split((c.num_heads, c.num_kv_heads, c.num_kv_heads), dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = self._qk_norm(q, layer.q_norm), self._qk_norm(k, layer.k_norm)
        if self.cos is not None and self.sin is not None:
            q = rope(q, self.cos, self.sin, batch.positions, backend=self.backend)
            if cache is None:
                k = rope(k, self.cos, self.sin, batch.positions, backend=self.backend)
        shared: dict[str, Any] = {
            "max_query_len": batch.max_query_len, "softmax_scale": c.softmax_scale, "alibi_slopes": self.slopes,
            "window": layer.window, "backend": self.backend,
        }  # fmt: skip
        if cache is None:
            out = attention_prefill(q, k, v, batch.query_starts, **shared)
            assert isinstance(out, torch.Tensor)
            return out.flatten(1)
        assert batch.slots is not None and batch.page_table is not None, (
            "a batch for a cache has slots and a page table"
        )
        k_cache, v_cache, *scales = cache.layer(layer.layer_id)
        k_scale, v_scale = scales or (None, None)
        kv_write(
            k, v, k_cache, v_cache, batch.slots, cos=self.cos, sin=self.sin,
            positions=batch.positions if self.cos is not None else None, k_scale=k_scale, v_scale=v_scale,
            backend=self.backend,
        )  # fmt: skip
        out = attention_paged(
            q, k_cache, v_cache, batch.page_table, batch.context_lens, batch.query_starts,
            max_context_len=batch.max_context_len, num_decodes=batch.num_decodes, k_scale=k_scale, v_scale=v_scale,
            prefix_groups=batch.prefix_groups, prefix_lens=batch.prefix_lens, max_prefix_len=batch.max_prefix_len,
            **shared,
        )  # fmt: skip
        return out.flatten(1)

    def _qk_norm(self, x: torch.Tensor, norm: Norm) -> torch.Tensor:
        """x [T,N,D] normalised per head, or over all heads together."""
        if self.config.qk_norm == "head":
            return self._norm(x, norm, None)[0]
        return self._norm(x.flatten(1), norm, None)[0].view(x.shape)
