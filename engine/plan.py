"""What a generator takes of a device's memory, told before anything is loaded: weights, workspace, CUDA graphs, pages.

All sizes follow from the config; the device itself is asked only for how much there is (`memory.py`). A cap
(``EngineConfig.memory_bytes``) is for everything this process takes: on a CPU its resident set, on CUDA torch's pool
and the context. What is left beside the fixed parts becomes pages of the KV cache.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from specialize.errors import InputError

from .config import ModelConfig
from .layout import layer_linears, num_parameters
from .memory import available_memory_bytes, free_unused, process_bytes
from .quantize import Quantization, quantized_bytes
from .scheduler import EngineConfig

# Unless told otherwise a CPU run takes at most this much for its cache: other programs live on the machine, too.
CPU_CACHE_BYTES = 4 << 30
# Share of the cap that is planned for nothing: the allocator's fragments, and what the arithmetic does not know.
RESERVE = {"cuda": 0.02, "cpu": 0.04}
# What a CPU process takes beside tensors once it works: compiled twins, thread stacks, the tokenizer, oneDNN's code.
CPU_RUNTIME_BYTES = 96 << 20
# What of it is still to come when the model is there, so that a model which fits before it is loaded fits afterwards.
CPU_RUNTIME_LEFT_BYTES = 48 << 20
TOKENS_BEFORE_PACKING = 2048  # room for these in the cache is worth more than a faster layout of the weights
GRAPH_CONTEXT = 4096
GRAPH_BYTES = 4 << 20  # nodes and arguments of one recorded step, beside its tensors
KV_DTYPES = {
    "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}  # fmt: skip


@dataclass(frozen=True)
class Limits:
    """How much one step may hold. The defaults of a generator whose `EngineConfig` leaves them open."""

    max_batch_tokens: int
    max_sequences: int
    max_context: int


def engine_limits(config: ModelConfig, engine: EngineConfig, device_type: str) -> Limits:
    """The limits that ``engine`` asks for, or what suits the device. Raises InputError where they contradict."""
    on_gpu = device_type == "cuda"
    max_sequences = engine.max_sequences or min(256 if on_gpu else 64, engine.max_batch_tokens or 1 << 30)
    max_batch_tokens = engine.max_batch_tokens or max(8192 if on_gpu else 1024, max_sequences)
    if max_batch_tokens < max_sequences:
        raise InputError(f"engine: max_batch_tokens is {max_batch_tokens}; allowed: {max_sequences} or more")
    return Limits(max_batch_tokens, max_sequences, min(engine.max_context or config.max_context, config.max_context))


def packed_bytes(config: ModelConfig, dtype: torch.dtype, quantization: Quantization | None = None) -> int:
    """Bytes of the second, blocked copies that a bf16 CPU model makes of its linear layers and head."""
    linears = [f for i in range(config.num_layers) for f in layer_linears(config, i)]
    blocks = sum(f.in_features * f.out_features for f in linears)
    head = config.vocab_size * config.hidden_size
    if quantization is None:
        return (blocks + head) * dtype.itemsize
    dense = num_parameters(config) - blocks - (head if quantization.head and not config.tied_embeddings else 0)
    quantised = quantized_bytes(config, quantization, dtype) - dense * dtype.itemsize
    return quantised + (0 if quantization.head else head * dtype.itemsize)


def page_bytes(config: ModelConfig, page_size: int, dtype: torch.dtype) -> int:
    """Bytes of one page over all layers."""
    return 2 * config.num_layers * page_size * config.num_kv_heads * config.head_dim * dtype.itemsize


def workspace_bytes(
    config: ModelConfig,
    max_batch_tokens: int,
    max_sequences: int,
    dtype: torch.dtype,
    quantization: Quantization | None = None,
) -> int:
    """What one step holds at its widest place: a block's tensors or the logits, and one dequantised matrix.

    A block holds its input, the residual before and after, and a norm's output; beside them either queries, keys and
    values, rotated ones and the attention's output, or the MLP's hidden layer before and after its activation.
    """
    attention = config.qkv_size + 3 * config.num_heads * config.head_dim
    mlp = config.intermediate_size * (2 if config.mlp == "gelu" else 3)
    block = max_batch_tokens * (4 * config.hidden_size + max(attention, mlp)) * dtype.itemsize
    # Logits in the model's dtype, in fp32 for sampling, and what sorting the likeliest takes.
    logits = max_sequences * config.vocab_size * (dtype.itemsize + 8)
    dequantised = 0
    if quantization is not None:
        largest = max(f.in_features * f.out_features for f in layer_linears(config, 0))
        # the 8-bit ones pass through fp32
        dequantised = largest * (dtype.itemsize + (0 if quantization.format == "nf4" else 4))
    return max(block + dequantised, logits + max_sequences * 4 * config.hidden_size * dtype.itemsize)


def graphs_bytes(
    config: ModelConfig, limits: Limits, dtype: torch.dtype, quantization: Quantization | None = None
) -> int:
    """Recorded decode steps: each keeps its logits, all share one pool of a decode step's workspace.

    Planned for contexts of up to ``GRAPH_CONTEXT`` tokens; where longer ones leave no room graphs are given up.
    """
    from .decode_graph import MAX_GRAPHS, bucket_context, bucket_size

    sizes = {bucket_size(n) for n in range(1, limits.max_sequences + 1)}
    contexts = {bucket_context(n, limits.max_context) for n in _powers(min(limits.max_context, GRAPH_CONTEXT))}
    largest = sorted((size for size in sizes for _ in contexts), reverse=True)[:MAX_GRAPHS]
    logits = sum(size * config.vocab_size * dtype.itemsize for size in largest)
    return logits + len(largest) * GRAPH_BYTES + workspace_bytes(config, max(sizes), 0, dtype, quantization)


@dataclass(frozen=True)
class GenerationPlan:
    """Where the memory goes; sizes in bytes. ``process_bytes`` is held before the model is there."""

    model: str
    device: str
    dtype: str
    weights: str
    kv_dtype: str
    memory_bytes: int
    process_bytes: int
    weights_bytes: int
    packed_bytes: int
    workspace_bytes: int
    graphs_bytes: int
    reserve_bytes: int
    page_bytes: int
    page_size: int
    num_pages: int
    max_batch_tokens: int
    max_sequences: int
    max_context: int

    @property
    def fixed_bytes(self) -> int:
        """Everything but the pages."""
        return (
            self.process_bytes + self.weights_bytes + self.packed_bytes + self.workspace_bytes + self.graphs_bytes
            + self.reserve_bytes
        )  # fmt: skip

    @property
    def kv_bytes(self) -> int:
        return self.num_pages * self.page_bytes

    @property
    def fits(self) -> bool:
        return self.num_pages > 0

    def num_sequences(self, num_tokens: int) -> int:
        """How many sequences of a length have room at once."""
        return self.num_pages // -(-num_tokens // self.page_size)

    def require(self) -> GenerationPlan:
        """Itself; raises InputError with the plan in one line where not one page fits."""
        if not self.fits:
            hint = "a smaller model, --quantize int8 or nf4" if self.weights == "none" else "a smaller model, nf4"
            raise InputError(
                f"{self.model or 'the model'} does not fit in {gigabytes(self.memory_bytes)} on {self.device}: "
                f"{self._parts()} leave no room for the KV cache, of which a page of {self.page_size} tokens takes "
                f"{self.page_bytes / 1e6:.1f} MB; use {hint}, or more memory"
            )
        return self

    def _parts(self) -> str:
        return ", ".join(f"{name} {gigabytes(size)}" for name, size, _ in self.rows() if name != "KV cache")

    def rows(self) -> list[tuple[str, int, str]]:
        """(part, bytes, note), what is zero left out."""
        stored = self.dtype if self.weights == "none" else f"{self.weights}, the rest {self.dtype}"
        running = "interpreter and libraries" if self.device == "cpu" else "CUDA context"
        rows = [
            ("process", self.process_bytes, running),
            ("weights", self.weights_bytes, stored),
            ("packed copies", self.packed_bytes, "linear layers in the order a CPU's matrix unit reads"),
            ("workspace", self.workspace_bytes, f"one step of {self.max_batch_tokens:,} tokens"),
            ("CUDA graphs", self.graphs_bytes, f"decode steps of up to {self.max_sequences} sequences"),
            ("reserve", self.reserve_bytes, "fragments"),
            (
                "KV cache",
                max(self.kv_bytes, 0),
                f"{self.kv_dtype}, {max(self.num_pages, 0):,} pages of {self.page_size} tokens, "
                f"{self.page_bytes / self.page_size / 1024:,.1f} KiB a token",
            ),
        ]
        return [row for row in rows if row[1] or row[0] == "KV cache"]

    def as_dict(self, num_tokens: int | None = None) -> dict[str, Any]:
        found: dict[str, Any] = {**asdict(self), "fits": self.fits, "kv_bytes": self.kv_bytes}
        found["kv_tokens"] = max(self.num_pages, 0) * self.page_size
        if num_tokens is not None:
            found |= {"sequence_tokens": num_tokens, "num_sequences": self.num_sequences(num_tokens)}
        return found


def plan_generation(
    config: ModelConfig,
    engine: EngineConfig | None = None,
    *,
    dtype: torch.dtype,
    memory_bytes: int,
    process_bytes: int,
    device: str = "cuda",
    quantization: Quantization | None = None,
    packs: bool = False,
    loaded: bool = False,
    model: str = "",
) -> GenerationPlan:
    """Arithmetic alone: what goes where under a cap of ``memory_bytes``, of which the process holds some already.

    ``packs``: the CPU has a product over packed weights (they are made where they take at most a quarter of the cap and
    leave room for ``TOKENS_BEFORE_PACKING`` tokens in the cache). ``loaded``: the weights are within ``process_bytes``.
    A plan that does not fit has no pages.
    """
    engine = engine or EngineConfig()
    device_type = "cpu" if device == "cpu" else "cuda"
    limits = engine_limits(config, engine, device_type)
    stored = dtype if engine.kv_dtype == "auto" else KV_DTYPES[engine.kv_dtype]
    on_cpu = device_type == "cpu"
    workspace = workspace_bytes(config, limits.max_batch_tokens, limits.max_sequences, dtype, quantization)
    reserve = int(RESERVE[device_type] * memory_bytes)
    graphs = 0 if on_cpu else graphs_bytes(config, limits, dtype, quantization)
    runtime = 0 if not on_cpu else CPU_RUNTIME_LEFT_BYTES if loaded else CPU_RUNTIME_BYTES
    held = 0 if loaded else quantized_bytes(config, quantization, dtype)
    size = page_bytes(config, engine.page_size, stored)
    pages_of_context = -(-limits.max_context // engine.page_size)
    budget = memory_bytes - (process_bytes + runtime + held + workspace + graphs + reserve)
    packed = packed_bytes(config, dtype, quantization) if on_cpu and packs else 0
    worth_more = min(pages_of_context, -(-TOKENS_BEFORE_PACKING // engine.page_size)) * size
    if packed > memory_bytes / 4 or budget - packed < worth_more:
        packed = 0
    budget -= packed
    if on_cpu and engine.memory_bytes is None:
        budget = min(budget, max(CPU_CACHE_BYTES, pages_of_context * size))
    num_pages = min(budget // size, limits.max_sequences * pages_of_context)
    if engine.num_pages is not None:
        num_pages = engine.num_pages
    return GenerationPlan(
        model=model,
        device=device,
        dtype=_name(dtype),
        weights=str(quantization or "none"),
        kv_dtype=_name(stored),
        memory_bytes=memory_bytes,
        process_bytes=process_bytes + runtime,
        weights_bytes=held,
        packed_bytes=packed,
        workspace_bytes=workspace,
        graphs_bytes=graphs,
        reserve_bytes=reserve,
        page_bytes=size,
        page_size=engine.page_size,
        num_pages=max(num_pages, 0),
        max_batch_tokens=limits.max_batch_tokens,
        max_sequences=limits.max_sequences,
        max_context=limits.max_context,
    )


def plan_on_device(
    config: ModelConfig,
    engine: EngineConfig,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    quantization: Quantization | None = None,
    loaded: bool = False,
    model: str = "",
) -> GenerationPlan:
    """`plan_generation` for what the device has now. Raises InputError for a cap above what there is."""
    device = torch.device(device)
    free_unused(device)
    available, held = available_memory_bytes(device), process_bytes(device)
    there = available + held
    if engine.memory_bytes is not None and engine.memory_bytes > there:
        raise InputError(
            f"memory: {gigabytes(engine.memory_bytes)} is asked for; {gigabytes(there)} can be had on {device}"
        )
    return plan_generation(
        config, engine, dtype=dtype, memory_bytes=engine.memory_bytes or there, process_bytes=held,
        device="cpu" if device.type == "cpu" else str(device), quantization=quantization,
        packs=packs_weights(dtype, device, quantization), loaded=loaded, model=model,
    )  # fmt: skip


def packs_weights(dtype: torch.dtype, device: torch.device | str, quantization: Quantization | None = None) -> bool:
    """Whether this machine has a product over packed weights for models of this dtype."""
    from ..kernels import cpu_quantized
    from .linear import can_prepack

    if torch.device(device).type != "cpu" or not can_prepack(torch.empty(1, 1, dtype=dtype)):
        return False
    return quantization is None or cpu_quantized.available()


def gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


def _name(dtype: torch.dtype) -> str:
    return next(name for name, value in KV_DTYPES.items() if value == dtype)


def _powers(limit: int) -> list[int]:
    found, n = [], 1
    while n < limit:
        found.append(n)
        n *= 2
    return [*found, limit]
