"""What quantising a model's weights costs in quality: perplexity on texts, and scores on tasks where given.

`specialize bench quality --model M --text corpus.jsonl [--tasks DIR --limit 20]` takes one format after the other, each
loaded anew. Perplexity is over the tokens of each text after its first, at most ``--max-length`` of them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import torch

from specialize.errors import InputError

from ..engine.batch import Batch
from ..engine.generator import choose_device, choose_dtype
from ..engine.model import Model
from ..engine.quantize import CHOICES, FORMATS
from ..engine.tokenizer import Tokenizer
from .environment import environment

BATCH_TOKENS = 2048


def read_texts(path: Path, limit: int) -> list[str]:
    """Texts of a JSONL corpus (``title`` and ``text``), or a plain file's paragraphs."""
    if not path.is_file():
        raise InputError(f"--text {path}: no such file; give JSONL rows with a text, or plain text")
    texts: list[str] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if len(texts) == limit:
            break
        if path.suffix == ".jsonl":
            try:
                row = dict(json.loads(line))
            except (ValueError, TypeError):
                raise InputError(f"{path}:{number}: not a JSON row") from None
            line = " ".join(str(row[key]) for key in ("title", "text") if row.get(key))
        if line.strip():
            texts.append(line.strip())
    if not texts:
        raise InputError(f"--text {path}: holds no text")
    return texts


def _packed(documents: Sequence[list[int]]) -> Iterator[list[list[int]]]:
    group: list[list[int]] = []
    for document in documents:
        if group and sum(map(len, group)) + len(document) > BATCH_TOKENS:
            yield group
            group = []
        group.append(document)
    if group:
        yield group


@torch.inference_mode()
def perplexity(model: Model, documents: Sequence[list[int]]) -> tuple[float, int]:
    """(perplexity, number of predicted tokens) over documents of two tokens or more."""
    total, count = 0.0, 0
    for group in _packed(documents):
        hidden = model.forward(Batch.packed(group, model.device))
        start = 0
        for ids in group:
            logits = model.logits(hidden[start : start + len(ids) - 1]).float()
            targets = torch.tensor(ids[1:], device=model.device)
            total += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
            count += len(ids) - 1
            start += len(ids)
    return math.exp(total / count), count


def measure(model_path: Path, documents: Sequence[list[int]], form: str, dtype: str, device: str) -> dict[str, Any]:
    """One row: format, bytes of the weights, perplexity."""
    chosen = choose_device(device)
    model = Model.from_pretrained(model_path, dtype=choose_dtype(dtype, chosen), device=chosen, quantize=form)
    value, count = perplexity(model, documents)
    return {"quantize": form, "weight_mb": round(model.weight_bytes / 1e6, 1), "tokens": count, "perplexity": value}


@click.command()
@click.option("--model", default="smollm2-135m-instruct", show_default=True, help="Folder, .gguf file or fetch name.")
@click.option("--text", type=click.Path(path_type=Path), required=True, help="JSONL corpus or plain text.")
@click.option("--documents", type=click.IntRange(1), default=200, show_default=True, help="Texts to read.")
@click.option("--max-length", type=click.IntRange(2), default=512, show_default=True, help="Tokens of a text.")
@click.option("--formats", default=",".join(("none", *FORMATS, "int8+head")), show_default=True)
@click.option("--tasks", type=click.Path(path_type=Path), help="Also score these tasks, 0-shot.")
@click.option("--limit", type=click.IntRange(0), default=20, show_default=True, help="Examples of each task; 0: all.")
@click.option("--dtype", default="bf16", show_default=True)
@click.option("--device", default="auto", show_default=True)
@click.option("--json", "out", type=click.Path(path_type=Path), help="Write the rows here.")
def command(
    model: str, text: Path, documents: int, max_length: int, formats: str, tasks: Path | None, limit: int, dtype: str,
    device: str, out: Path | None,
) -> None:  # fmt: skip
    """Perplexity (and task scores) of a model with its weights quantised in each format."""
    from specialize.fetch import model_path as find

    path = find(model)
    names = [name.strip() for name in formats.split(",") if name.strip()]
    for name in names:
        if name not in ("none", *CHOICES):
            raise InputError(f"--formats {name}: allowed: none, {', '.join(CHOICES)}")
    tokenizer = Tokenizer.from_pretrained(path)
    encoded = [ids[:max_length] for ids in tokenizer.encode_batch(read_texts(text, documents))]
    encoded = [list(ids) for ids in encoded if len(ids) > 1]
    rows: list[dict[str, Any]] = []
    for name in names:
        row = measure(path, encoded, name, dtype, device)
        row["change_percent"] = round(100 * (row["perplexity"] / (rows[0] if rows else row)["perplexity"] - 1), 2)
        if tasks is not None:
            row |= _scores(path, tasks, name, limit, dtype, device, model)
        rows.append(row)
        click.echo("  ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
    if out is not None:
        out.write_text(json.dumps([{**environment(), "model": model, **row} for row in rows], indent=1))


def _scores(path: Path, tasks: Path, form: str, limit: int, dtype: str, device: str, name: str) -> dict[str, float]:
    from specialize.progress import Reporter
    from specialize.standalone import evaluate_model

    found = evaluate_model(
        path, tasks, adapter=None, shots=(0,), limit=limit, max_tokens=96, dtype=dtype, device=device, seed=0,
        model_name=name, reporter=Reporter(quiet=True), quantize=form,
    )  # fmt: skip
    return {f"mean {row['metric']}": row["value"] for row in found["means"]}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of ``specialize bench quality``."""
    return command.main(args=list(argv) if argv is not None else None, standalone_mode=argv is None) or 0


if __name__ == "__main__":
    raise SystemExit(main())
