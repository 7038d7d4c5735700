"""What tuning takes of a device's memory and how fast it can be, told from the config; and which blocks to recompute.

Saved activations are those that `Model.forward` keeps for the backward pass, with Triton's or the CPU's fused ops:

    norm            its input, residual added in
    linear          with an adapter its input x and x Aᵀ; frozen alone nothing
    attention       q, k, v, output, log-sum-exp; v, and without rotary positions q and k, are views of one product
    activation      its input
    last block      from its output projection on only the rows that carry a loss

A recomputed block keeps what goes into it, hidden states and residual; the first blocks are chosen, since by the time
they are recomputed the later ones' activations are gone. An anchor (train/anchor.py) has a pass of its own after those
of the rows; its tokens' activations and logits count where they are more than the rows'. Eager torch keeps more:
attention in fp32 on a CPU, and norms in full fine-tuning on a CPU. Shape letters as in docs/structure.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

import torch

from specialize.errors import InputError

from ..engine.config import ModelConfig
from ..engine.layout import layer_linears, num_parameters
from ..engine.memory import available_memory_bytes, free_unused, process_bytes
from ..engine.model import AdaptedLinear
from ..engine.plan import CPU_RUNTIME_BYTES, RESERVE, gigabytes
from ..engine.quantize import Quantization, quantized_bytes
from ..kernels import cross_entropy
from .config import TrainConfig
from .data import TrainExample
from .lora_layout import LoraPair, lay_out, resolve_targets
from .rates import step_operations

# Share of the matrix rate that a step's necessary operations reach, as measured: MPT-7B's shape 0.57 to 0.70 and
# Llama-8B's 0.59 on an H100 (bench/results), SmolLM2 0.36 on two CPU cores (README).
EFFICIENCY = {"cuda": 0.6, "cpu": 0.36}


@dataclass(frozen=True)
class BatchShape:
    """A micro-batch: T tokens in sequences, N of them with a loss."""

    tokens: int
    loss_rows: int


def largest_micro_batch(examples: Sequence[TrainExample], train: TrainConfig) -> BatchShape:
    """The most that one micro-batch of these rows can hold."""
    lengths = sorted((e.num_tokens for e in examples), reverse=True)[: train.batch_size]
    tokens = min(sum(lengths), max(train.max_batch_tokens, lengths[0]))
    responses = sorted((e.num_targets for e in examples), reverse=True)[: train.batch_size]
    return BatchShape(tokens, min(tokens, sum(responses)))


@dataclass(frozen=True)
class TuningPlan:
    """Where the memory goes at a step's peak; sizes in bytes. ``saved`` lists activations kept for the backward pass
    by op with nothing recomputed, ``saved_bytes`` what is kept with ``recompute_layers`` blocks recomputed.
    ``anchor_bytes``: the anchor texts' hidden states, and what the anchor's pass takes beyond a micro-batch's."""

    model: str
    device: str
    dtype: str
    weights: str
    memory_bytes: int
    process_bytes: int
    weights_bytes: int
    adapter_bytes: int
    optimizer_bytes: int
    saved: Mapping[str, int]
    saved_bytes: int
    loss_bytes: int
    workspace_bytes: int
    anchor_bytes: int
    reserve_bytes: int
    num_layers: int
    recompute_layers: int
    num_parameters: int
    tokens: int
    loss_rows: int
    operations: float
    tokens_per_s: float | None

    @property
    def total_bytes(self) -> int:
        return (
            self.process_bytes + self.weights_bytes + self.adapter_bytes + self.optimizer_bytes + self.saved_bytes
            + max(self.loss_bytes, self.workspace_bytes) + self.anchor_bytes + self.reserve_bytes
        )  # fmt: skip

    @property
    def fits(self) -> bool:
        return self.total_bytes <= self.memory_bytes

    def require(self) -> TuningPlan:
        """Itself; raises InputError with the plan in one line where it does not fit."""
        if not self.fits:
            parts = ", ".join(f"{name} {gigabytes(size)}" for name, size, _ in self.rows())
            raise InputError(
                f"tuning {self.model or 'the model'} takes {gigabytes(self.total_bytes)} and has "
                f"{gigabytes(self.memory_bytes)} on {self.device}: {parts}; lower the tokens of a micro-batch "
                f"({self.tokens}), use recompute=auto or --quantize nf4, or give more memory"
            )
        return self

    def rows(self) -> list[tuple[str, int, str]]:
        """(part, bytes, note), what is zero left out."""
        stored = self.dtype if self.weights == "none" else f"{self.weights}, the rest {self.dtype}"
        kept = f"{self.tokens:,} tokens, {self.recompute_layers} of {self.num_layers} blocks recomputed"
        rows = [
            ("process", self.process_bytes, "interpreter and libraries" if self.device == "cpu" else "CUDA context"),
            ("weights", self.weights_bytes, stored),
            (
                "trained",
                self.adapter_bytes,
                f"{self.num_parameters:,} parameters in fp32, gradients, {self.dtype} copies",
            ),
            ("optimizer", self.optimizer_bytes, "AdamW, two fp32 moments"),
            ("activations", self.saved_bytes, kept),
            (
                "workspace",
                max(self.loss_bytes, self.workspace_bytes),
                f"the larger of a block's backward and a chunk of logits ({self.loss_rows:,} rows with a loss)",
            ),
            ("anchor", self.anchor_bytes, "the base's hidden states, and what its logits take beyond the rows' pass"),
            ("reserve", self.reserve_bytes, "fragments"),
        ]
        return [row for row in rows if row[1]]

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "total_bytes": self.total_bytes, "fits": self.fits}


def adapted_pairs(config: ModelConfig, train: TrainConfig) -> tuple[dict[tuple[int, str], LoraPair], int]:
    """(pairs by fused linear, elements of the flat tensor) as `TrainableLora` would lay them out, without a model."""
    adaptable = tuple(
        AdaptedLinear(i, fused.name, fused, fused.parts)  # type: ignore[arg-type]
        for i in range(config.num_layers)
        for fused in layer_linears(config, i)
    )
    chosen = resolve_targets(SimpleNamespace(config=config, adaptable=adaptable), train.targets, train.layers)
    patterns = {"rank": train.rank_pattern, "alpha": train.alpha_pattern, "dropout": train.dropout_pattern}
    pairs, groups = lay_out(
        chosen, rank=train.rank, alpha=train.alpha, dropout=train.dropout, patterns=patterns,
        rank_stabilized=train.rank_stabilized, dora=train.dora, plus_ratio=train.plus_ratio,
    )  # fmt: skip
    return pairs, groups[-1].stop


def saved_by_block(
    config: ModelConfig, train: TrainConfig, batch: BatchShape, dtype: torch.dtype
) -> list[dict[str, int]]:
    """Bytes that each block keeps for the backward pass, by op, nothing recomputed; the last entry is the head's."""
    full = train.method == "full"
    pairs = {} if full else adapted_pairs(config, train)[0]
    blocks, has_gradient = [], full
    for layer_id in range(config.num_layers):
        block = _Block(config, train, pairs, layer_id, dtype.itemsize, has_gradient, full)
        rows = batch.loss_rows if layer_id == config.num_layers - 1 else batch.tokens
        blocks.append(block.saved(batch.tokens, rows))
        has_gradient = block.has_gradient
    wide = batch.loss_rows * config.hidden_size * dtype.itemsize
    blocks.append({"norm": wide if has_gradient else 0, "loss": wide if has_gradient else 0})
    return blocks


class _Block:
    """Walks through one block as `Model._block` does, noting what the ops keep."""

    def __init__(
        self, config: ModelConfig, train: TrainConfig, pairs: Mapping[tuple[int, str], LoraPair], layer_id: int,
        itemsize: int, has_gradient: bool, full: bool,
    ) -> None:  # fmt: skip
        self.config, self.train, self.itemsize, self.full = config, train, itemsize, full
        self.pairs = {name: pair for (i, name), pair in pairs.items() if i == layer_id}
        self.has_gradient = has_gradient
        self.found: dict[str, int] = {"norm": 0, "linear": 0, "attention": 0, "activation": 0}

    def saved(self, tokens: int, rows: int) -> dict[str, int]:
        c, e = self.config, self.itemsize
        wide = c.num_heads * c.head_dim
        self._norm(tokens * c.hidden_size)
        self._linear("qkv", tokens, c.hidden_size, c.qkv_size)
        kept_out = self.has_gradient
        if self.has_gradient:
            self._attention(tokens, wide)
        # With rows picked the projection's input is a tensor of its own; else it is the attention's output.
        self._linear("o", rows, wide, c.hidden_size, shared=kept_out and rows == tokens)
        self._norm(rows * c.hidden_size)
        gated = c.mlp != "gelu"
        up = c.intermediate_size * (2 if gated else 1)
        self._linear("gate_up" if gated else "up", rows, c.hidden_size, up)
        if self.has_gradient:
            self.found["activation"] += rows * (up + (c.intermediate_size if c.mlp == "geglu" else 0)) * e
        self._linear("down", rows, c.intermediate_size, c.hidden_size)
        return self.found

    def _norm(self, elements: int) -> None:
        if self.has_gradient:
            self.found["norm"] += elements * self.itemsize

    def _linear(self, name: str, rows: int, num_in: int, num_out: int, *, shared: bool = False) -> None:
        """``shared``: another op keeps the input already."""
        if self.full:
            self.found["linear"] += 0 if shared else rows * num_in * self.itemsize
            return
        pair = self.pairs.get(name)
        if pair is None:
            return
        pissa = self.train.init == "pissa"
        rank = pair.rank * (2 if pissa else 1)
        if pissa:  # the start is taken off in matrices made for the step
            self.found["linear"] += rank * (num_in + num_out) * self.itemsize
        kept = rank + (0 if shared else num_in)
        dropping = sum(1 for part in pair.parts if part.dropout)
        if dropping:  # per part what is left of x, and in one byte each what was kept
            kept += dropping * num_in - (num_in if dropping == len(pair.parts) and not shared else 0)
            if self.has_gradient:
                self.found["linear"] += rows * num_in * dropping
        if self.train.dora:
            kept += num_out
        self.found["linear"] += rows * kept * self.itemsize
        self.has_gradient = True

    def _attention(self, tokens: int, wide: int) -> None:
        c, e = self.config, self.itemsize
        keys = c.num_kv_heads * c.head_dim
        elements = c.qkv_size + wide  # the fused product, of which v is a view, and the output
        if c.clip_qkv is not None:
            elements += c.qkv_size
        if c.position == "rope" or c.qk_norm is not None:
            elements += wide + keys
        self.found["attention"] += tokens * (elements * e + 4 * c.num_heads)


def kept_bytes(
    config: ModelConfig, train: TrainConfig, batch: BatchShape, dtype: torch.dtype, recompute_layers: int = 0
) -> int:
    """Bytes kept between forward and backward with the first ``recompute_layers`` blocks recomputed."""
    blocks = [sum(block.values()) for block in saved_by_block(config, train, batch, dtype)]
    return sum(blocks[recompute_layers:]) + _inputs_bytes(config, batch, dtype, recompute_layers)


def _inputs_bytes(config: ModelConfig, batch: BatchShape, dtype: torch.dtype, count: int) -> int:
    """What ``count`` recomputed blocks keep: hidden states, and from the second one on the residual."""
    return (2 * count - 1) * batch.tokens * config.hidden_size * dtype.itemsize if count else 0


def backward_bytes(
    config: ModelConfig, tokens: int, dtype: torch.dtype, quantization: Quantization | None = None
) -> int:
    """The widest moment of a block's backward pass: gradients on their way, and a dequantised matrix."""
    attention = 2 * config.qkv_size + 2 * config.num_heads * config.head_dim
    mlp = config.intermediate_size * (2 if config.mlp == "gelu" else 3)
    held = tokens * (3 * config.hidden_size + max(attention, mlp)) * dtype.itemsize
    largest = max(f.in_features * f.out_features for f in layer_linears(config, 0))
    if quantization is not None:
        held += largest * (dtype.itemsize + (0 if quantization.format == "nf4" else 4))
    return held


def loss_bytes(config: ModelConfig, loss_rows: int, dtype: torch.dtype, device_type: str) -> int:
    """Logits of one chunk (kernels/cross_entropy.py), with fp32 copies on a CPU."""
    if device_type == "cuda":
        return min(loss_rows, cross_entropy.TRITON_DEFAULT["ROWS"]) * config.vocab_size * dtype.itemsize
    rows, block = min(loss_rows, cross_entropy.CPU_CHUNK_ROWS), min(loss_rows, cross_entropy.CPU_BLOCK_ROWS)
    return config.vocab_size * (rows * dtype.itemsize + 2 * block * 4)


def anchor_logits_bytes(config: ModelConfig, num_tokens: int, dtype: torch.dtype) -> int:
    """`anchor_loss` at its widest, five [N, V] of it: log-probabilities of base and adapter, the base's probabilities,
    the difference and the products. Two are kept for the backward pass."""
    return 5 * num_tokens * config.vocab_size * max(4, dtype.itemsize)


def plan_tuning(
    config: ModelConfig,
    train: TrainConfig,
    batch: BatchShape,
    *,
    dtype: torch.dtype,
    memory_bytes: int,
    process_bytes: int,
    device: str = "cuda",
    quantization: Quantization | None = None,
    matrix_rate: float | None = None,
    loaded: bool = False,
    anchor_text_tokens: int = 0,
    model: str = "",
) -> TuningPlan:
    """Arithmetic alone, for micro-batches of ``batch``. ``matrix_rate`` in operations a second gives a speed.
    ``anchor_text_tokens``: of all anchor texts together, where there is an anchor (0: not known yet).

    With recompute "auto" as few blocks are recomputed as make the plan fit; where it fits with none of them kept
    neither, all are recomputed and `TuningPlan.fits` is False. ``loaded``: the weights are within ``process_bytes``.
    """
    device_type = "cpu" if device == "cpu" else "cuda"
    blocks = saved_by_block(config, train, batch, dtype)
    sizes = [sum(block.values()) for block in blocks]
    if train.method == "full":
        parameters = elements = num_parameters(config)
    else:
        pairs, elements = adapted_pairs(config, train)
        parameters = sum(
            part.rank * (pair.in_features + part.stop - part.start) + (part.stop - part.start) * train.dora
            for pair in pairs.values()
            for part in pair.parts
        )
    copies = 2 if dtype.itemsize == 4 else 3  # leaves' gradients, gathered ones, and below fp32 what forward reads
    masked = train.method == "lora" and not all(pair.is_whole for pair in pairs.values())
    trained = elements * (8 + 4 * masked + copies * dtype.itemsize)
    weights = 0 if loaded else quantized_bytes(config, quantization, dtype)
    if train.method == "full":
        weights = 0  # the model's tensors become views of the trained copy
    reserve = int(RESERVE[device_type] * memory_bytes)
    backward = backward_bytes(config, batch.tokens, dtype, quantization)
    loss = loss_bytes(config, batch.loss_rows, dtype, device_type)
    runtime = CPU_RUNTIME_BYTES if device_type == "cpu" else 0
    num_anchor = min(train.anchor_tokens, anchor_text_tokens or train.anchor_tokens) if train.anchor else 0
    texts = BatchShape(num_anchor, num_anchor)
    text_sizes = [sum(block.values()) for block in saved_by_block(config, train, texts, dtype)]
    text_logits = anchor_logits_bytes(config, texts.tokens, dtype)
    text_backward = backward_bytes(config, texts.tokens, dtype, quantization)
    hidden = anchor_text_tokens * config.hidden_size * dtype.itemsize if train.anchor else 0

    def saved_at(count: int, shape: BatchShape, sizes: list[int]) -> tuple[int, int]:
        """Bytes saved at the end of the forward pass, and at the widest moment of the backward pass."""
        inputs = [_inputs_bytes(config, shape, dtype, i) for i in range(count + 1)]
        kept = inputs[count] + sum(sizes[count:])
        # A recomputed block is alive as a whole beside the inputs of those before it; of those after it nothing is
        # left, which counts for the block before the last, where that has fewer rows.
        return kept, max([kept, *(inputs[i + 1] + sizes[i] for i in range(count))])

    def at(count: int) -> TuningPlan:
        _, saved = saved_at(count, batch, sizes)
        text_kept, text_saved = saved_at(count, texts, text_sizes)
        anchor = max(text_kept + text_logits, text_saved + text_backward) if train.anchor else 0
        operations = step_operations(config, batch.tokens, batch.loss_rows, trains_weights=train.method == "full")
        per_block = step_operations(config, batch.tokens, 0) / config.num_layers / 2
        operations += count * per_block
        seconds = operations / (matrix_rate * EFFICIENCY[device_type]) if matrix_rate else math.inf
        return TuningPlan(
            model=model,
            device=device,
            dtype=str(dtype).removeprefix("torch."),
            weights=str(quantization or "none"),
            memory_bytes=memory_bytes,
            process_bytes=process_bytes + runtime,
            weights_bytes=weights,
            adapter_bytes=trained,
            optimizer_bytes=8 * elements,
            saved=_by_op(blocks),
            saved_bytes=saved,
            loss_bytes=loss,
            workspace_bytes=backward,
            anchor_bytes=hidden + max(0, anchor - saved - max(loss, backward)),
            reserve_bytes=reserve,
            num_layers=config.num_layers,
            recompute_layers=count,
            num_parameters=parameters,
            tokens=batch.tokens,
            loss_rows=batch.loss_rows,
            operations=operations,
            tokens_per_s=batch.tokens / seconds if matrix_rate else None,
        )

    if train.recompute == "none":
        return at(0)
    if train.recompute == "layers":
        return at(config.num_layers)
    low, high = 0, config.num_layers
    while low < high:  # more recomputed blocks never take more
        middle = (low + high) // 2
        low, high = (low, middle) if at(middle).fits else (middle + 1, high)
    return at(low)


def plan_on_device(
    config: ModelConfig,
    train: TrainConfig,
    batch: BatchShape,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    quantization: Quantization | None = None,
    matrix_rate: float | None = None,
    memory_bytes: int | None = None,
    loaded: bool = False,
    anchor_text_tokens: int = 0,
    model: str = "",
) -> TuningPlan:
    """`plan_tuning` for what the device has now, or for a cap on what this process takes of it."""
    device = torch.device(device)
    free_unused(device)
    held = process_bytes(device)
    there = available_memory_bytes(device) + held
    if memory_bytes is not None and memory_bytes > there:
        raise InputError(f"memory: {gigabytes(memory_bytes)} is asked for; {gigabytes(there)} can be had on {device}")
    return plan_tuning(
        config, train, batch, dtype=dtype, memory_bytes=memory_bytes or there, process_bytes=held,
        device="cpu" if device.type == "cpu" else str(device), quantization=quantization, matrix_rate=matrix_rate,
        loaded=loaded, anchor_text_tokens=anchor_text_tokens, model=model,
    )  # fmt: skip


def _by_op(blocks: list[dict[str, int]]) -> dict[str, int]:
    found: dict[str, int] = {}
    for block in blocks:
        for name, size in block.items():
            found[name] = found.get(name, 0) + size
    return found
