# pyright: reportMissingImports=false
# The sibling folders join this package when it is installed (setup.py); by path pyright cannot see them from here.
"""Where a model's memory would go, for `doctor --model` and `tune --dry-run`: no weights are read, no GPU is needed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import InputError
from .standalone import existing_model, format_table


def model_config(model: str, reporter: Any) -> tuple[Any, Any, str]:
    """(config, stored quantisation, name) of a path, fetch name or known shape; headers are read, weights are not."""
    from .engine.quantize import stored_quantization
    from .engine.shapes import SHAPES
    from .engine.weights import read_config
    from .fetch import PACKAGES

    if model in SHAPES and not Path(model).exists():
        return SHAPES[model], None, model
    try:
        path = existing_model(model, reporter)
    except InputError as error:
        if model in PACKAGES or "/" in model:
            raise
        raise InputError(f"{error}; shapes known by name: {', '.join(SHAPES)}") from None
    return read_config(path), stored_quantization(path), path.name


def plan_model(
    model: str,
    *,
    reporter: Any,
    device: str = "auto",
    dtype: str = "auto",
    quantize: str | None = None,
    kv_dtype: str | None = None,
    memory: str | None = None,
) -> Any:
    """The `GenerationPlan` of a model on this machine's device, or on a GPU of the memory given, which need not be
    here."""
    from .engine.memory import CUDA_CONTEXT_BYTES
    from .engine.plan import plan_generation, plan_on_device
    from .engine.scheduler import EngineConfig

    config, quantization, name = planned_model(model, quantize, reporter)
    place, chosen, capacity = planned_device(device, dtype, memory)
    engine = EngineConfig(memory_bytes=capacity, kv_dtype=kv_dtype or "auto")
    settings = {"dtype": chosen, "quantization": quantization, "model": name}
    if place is None:
        return plan_generation(
            config, engine, memory_bytes=capacity or 0, process_bytes=CUDA_CONTEXT_BYTES, device="cuda", **settings
        )
    return plan_on_device(config, engine, device=place, **settings)


def planned_model(model: str, quantize: str | None, reporter: Any) -> tuple[Any, Any, str]:
    """(config, quantisation to load with, name)."""
    from .engine.quantize import Quantization, agree, check_shapes

    config, stored, name = model_config(model, reporter)
    quantization = agree(Quantization.parse(quantize), stored, model)
    check_shapes(config, quantization, name)
    return config, quantization, name


def planned_device(device: str, dtype: str, memory: str | None) -> tuple[Any, Any, int | None]:
    """(device, dtype, capacity in bytes); the device is None for a GPU that is not here but has the memory given."""
    import torch

    from .engine.generator import DTYPES, choose_device, choose_dtype
    from .engine.memory import capacity_bytes

    capacity = None if memory is None else capacity_bytes(memory)
    if capacity is not None and device != "cpu" and not torch.cuda.is_available():
        return None, DTYPES.get(dtype, torch.bfloat16), capacity
    place = choose_device(device)
    return place, choose_dtype(dtype, place), capacity


def plan_tuning_of(
    model: str,
    settings: Any,
    *,
    data: Path | None,
    reporter: Any,
    device: str = "auto",
    dtype: str = "auto",
    quantize: str | None = None,
    memory: str | None = None,
    changes: Mapping[str, Any] | None = None,
) -> Any:
    """The `TuningPlan` of a model with a recipe's tune settings: for the rows of ``data``, or for micro-batches filled
    to the brim with rows of the longest length, a quarter of each a response."""
    from .engine.memory import CUDA_CONTEXT_BYTES
    from .train.plan import BatchShape, largest_micro_batch, plan_on_device, plan_tuning
    from .train.rates import CARD_RATES, matrix_rate
    from .tune import train_config

    config, quantization, name = planned_model(model, quantize, reporter)
    place, chosen, capacity = planned_device(device, dtype, memory)
    train = train_config(
        settings, epochs=settings.epochs, seed=0, max_context=config.max_context, **dict(changes or {})
    )
    if data is None:
        batch = BatchShape(train.max_batch_tokens, train.max_batch_tokens // 4)
    else:
        from .engine.tokenizer import Tokenizer
        from .records import read_training_rows
        from .tune import encode_rows

        rows = read_training_rows(data)
        examples = encode_rows(Tokenizer.from_pretrained(existing_model(model, reporter)), rows)
        batch = largest_micro_batch(examples, train)
    shared = {"dtype": chosen, "quantization": quantization, "model": name}
    if place is None:
        return plan_tuning(
            config, train, batch, memory_bytes=capacity or 0, process_bytes=CUDA_CONTEXT_BYTES, device="cuda",
            matrix_rate=CARD_RATES.get((memory or "").lower()), **shared,
        )  # fmt: skip
    rate = matrix_rate(place, chosen)
    return plan_on_device(config, train, batch, device=place, matrix_rate=rate, memory_bytes=capacity, **shared)


def format_tuning(plan: Any) -> str:
    """The plan as aligned tables, and what it comes to."""
    from .engine.plan import gigabytes
    from .train.plan import EFFICIENCY

    saved = [("kept for backward, by op", "GB")]
    saved += [(op, f"{size / 1e9:.2f}") for op, size in plan.saved.items()]
    efficiency = EFFICIENCY["cpu" if plan.device == "cpu" else "cuda"]
    if plan.tokens_per_s is None:
        speed = "tokens per second: give a card's name as --memory for an estimate"
    else:
        speed = (
            f"about {plan.tokens_per_s:,.0f} tokens a second: {plan.operations / plan.tokens / 1e9:,.1f} billion "
            f"operations a token, at {efficiency:.0%} of the matrix rate (as measured elsewhere, README)"
        )
    fits = "fits" if plan.fits else "does not fit"
    return (
        f"tuning {plan.model} in {gigabytes(plan.memory_bytes)} on {plan.device}\n\n{_table(plan.rows())}\n\n"
        f"{format_table(saved)}\n\n{fits}: {gigabytes(plan.total_bytes)} with {plan.recompute_layers} of "
        f"{plan.num_layers} blocks recomputed in the backward pass\n{speed}"
    )


def _table(rows: list[tuple[str, int, str]]) -> str:
    lines = [("", "GB", ""), *((name, f"{size / 1e9:.2f}", note) for name, size, note in rows)]
    width = max(len(note) for _, _, note in lines)
    return format_table([(name, size, note.ljust(width)) for name, size, note in lines])


def format_plan(plan: Any, num_tokens: int) -> str:
    """The plan as an aligned table, and what it comes to."""
    from .engine.plan import gigabytes

    table = _table(plan.rows())
    count = plan.num_sequences(num_tokens)
    head = f"{plan.model} in {gigabytes(plan.memory_bytes)} on {plan.device}"
    if not plan.fits:
        return f"{head}\n\n{table}\n\ndoes not fit: the parts above leave no room for the KV cache"
    more = f" ({plan.max_sequences} run at once)" if count > plan.max_sequences else ""
    return f"{head}\n\n{table}\n\nroom for {count:,} sequences of {num_tokens:,} tokens{more}"


def index_memory(cap: int | None) -> int:
    """What an index build may still take: of what there is, and of a cap on all that this process takes."""
    from .engine.memory import available_memory_bytes, process_bytes

    available = available_memory_bytes("cpu")
    return available if cap is None else min(available, cap - process_bytes("cpu"))


def format_index(plan: Any, available: int) -> str:
    """The plan of an index build as an aligned table, and what it comes to."""
    fits = "fits" if plan.peak_bytes <= available else "does not fit"
    return (
        f"an index of {plan.num_passages:,} passages, stage after stage\n\n{_table(plan.rows())}\n\n"
        f"{fits}: {plan.peak_bytes / 1e9:.2f} GB at most beside the embedder, {max(available, 0) / 1e9:.2f} GB can be "
        f"had; {plan.disk_bytes / 1e9:.2f} GB of disk"
    )
