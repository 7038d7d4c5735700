"""What a run gives to others: its rows as a data set that ``datasets`` loads, and the cards of data set and adapter.

Everything said in a card is read from the run's ledger, recipe and evaluation.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import InputError
from .ledger import Ledger
from .recipe import read_yaml
from .records import read_json_lines, read_seeds

FORMATS = ("parquet", "jsonl", "chat")
COLUMNS = ("id", "instruction", "input", "output", "task", "source", "provenance")


def read_rows(run: Path, *, seeds: bool = False) -> list[dict[str, str]]:
    """The kept rows of a run with ``COLUMNS``, all text (provenance is JSON); with ``seeds`` these come first."""
    if not (run / "ledger.sqlite").is_file():
        raise InputError(f"{run} is no run folder (no ledger.sqlite)")
    if not (run / "dataset.jsonl").is_file():
        raise InputError(f"{run} has no kept rows yet; make them with: specialize synth {run}")
    rows = []
    if seeds:
        found = read_seeds(read_yaml(run / "recipe.yaml")["inputs"]["seeds"])
        rows = [(s.id, s.instruction, s.input, s.output, s.kind, "seed", "{}") for s in found]
    for _, row in read_json_lines(run / "dataset.jsonl", "rows"):
        trail = dict(row["provenance"])
        source = trail.pop("source")
        for name in ("model", "adapter"):  # a path on the machine of the run says nothing elsewhere
            if trail.get(name):
                trail[name] = Path(trail[name]).name
        trail_text = json.dumps(trail, ensure_ascii=False, sort_keys=True)
        rows.append((*(row[c] for c in COLUMNS[:5]), source, trail_text))
    return [dict(zip(COLUMNS, row, strict=True)) for row in rows]


def chat_messages(row: Mapping[str, str]) -> list[dict[str, str]]:
    """The row as a talk of one turn; the input follows its instruction after an empty line."""
    asked = f"{row['instruction']}\n\n{row['input']}" if row["input"] else row["instruction"]
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}]


def _files(formats: Sequence[str]) -> dict[str, str]:
    """Place of each file by what it holds. Chats are written in the same formats as the rows, or as JSONL alone."""
    ends = [name for name in formats if name != "chat"]
    places = {f"rows.{end}": f"data/train.{end}" for end in ends}
    if "chat" in formats:
        places |= {f"chat.{end}": f"chat/train.{end}" for end in ends or ["jsonl"]}
    return places


def _configs(files: Mapping[str, str]) -> list[dict[str, Any]]:
    """Configurations of ``load_dataset``, the first by default. ``datasets`` reads all of a folder in one format."""
    end = next(iter(files)).partition(".")[2]
    names = [name for name in ("rows", "chat") if f"{name}.{end}" in files]
    return [
        {"config_name": name, "data_files": files[f"{name}.{end}"]} | ({"default": True} if name == names[0] else {})
        for name in names
    ]


def export(run: Path, out: Path, formats: Sequence[str] = FORMATS, *, seeds: bool = False) -> dict[str, Any]:
    """Write the data set's folder with its card; it appears whole or not at all. Returns its files and row count."""
    import pyarrow
    import pyarrow.parquet

    for name in formats:
        if name not in FORMATS:
            raise InputError(f"--format {name}: allowed: {', '.join(FORMATS)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out {out}: exists and is not empty; choose another, or delete it")
    rows, files = read_rows(run, seeds=seeds), _files(formats)
    temporary = out.with_name(out.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        for what, place in files.items():
            path = temporary / place
            path.parent.mkdir(parents=True, exist_ok=True)
            name, _, end = what.partition(".")
            shown = rows if name == "rows" else [{"id": r["id"], "messages": chat_messages(r)} for r in rows]
            if end == "parquet":
                pyarrow.parquet.write_table(pyarrow.Table.from_pylist(shown), path)
            else:
                path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in shown), encoding="utf-8")
        (temporary / "README.md").write_text(dataset_card(run, rows, files), encoding="utf-8")
        if out.exists():
            out.rmdir()
        temporary.rename(out)
    except OSError as error:
        raise InputError(f"--out {out}: {error.strerror}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return {"folder": str(out), "rows": len(rows), "files": ["README.md", *files.values()]}


def dataset_card(run: Path, rows: Sequence[Mapping[str, str]], files: Mapping[str, str]) -> str:
    """README.md of the data set, its front matter as the Hugging Face hub and ``datasets`` read it."""
    recipe, last = read_yaml(run / "recipe.yaml"), _last_round(run)
    with Ledger(run / "ledger.sqlite") as ledger:
        counts, reasons = ledger.counts(last), ledger.reasons(last)
    head = {
        "pretty_name": f"{recipe['name']}, self-specialized",
        "task_categories": ["text-generation"],
        "tags": ["synthetic", "self-specialization"],
        "size_categories": [_size(len(rows))],
        "configs": _configs(files),
    }
    model = Path(recipe["inputs"]["model"]).name
    kinds = Counter(row["task"] for row in rows)
    sources = Counter(row["source"] for row in rows)
    return _page(
        head,
        f"# {head['pretty_name']}",
        f"{len(rows):,} rows of instruction, input and output ({_listed(sources)}). Inputs of source `corpus` are cut "
        "from the run's corpus, instructions of `novel` were written by a model, rows of `seed` are the user's. "
        f"The answers of all but seeds were written by `{model}`"
        + (", tuned on the seeds first" if recipe["teacher"]["enabled"] else "")
        + ", and were not checked by a person: they hold mistakes.",
        "## Kinds of task",
        _table([("task", "rows"), *((name, f"{n:,}") for name, n in kinds.most_common())]),
        "## What was left out",
        f"Of {sum(counts.values()):,} candidates of the last round {counts.get('kept', 0):,} were kept.",
        _table([("reason", "candidates"), *((name, f"{n:,}") for name, n in reasons.items())]) if reasons else "",
        "## Columns",
        "`id`, `instruction`, `input`, `output`, `task`, `source` and `provenance` (JSON: documents, passages, model, "
        "random seed and agreement of the samples). Files in `chat/` hold `id` and `messages` instead.",
        f"Made by specialize, recipe `{recipe['name']}`, random seed {recipe['seed']}.",
    )


def model_card(run: Path, found: dict[str, Any]) -> str:
    """README.md of a run's adapter: what it was tuned on and, where ``found`` is an evaluation (``eval.json``), its
    scores beside the base's and the seeds alone."""
    from .standalone import systems_table

    recipe, last = read_yaml(run / "recipe.yaml"), _last_round(run)
    with Ledger(run / "ledger.sqlite") as ledger:
        stages = ledger.stages()
    info = stages["tune" if last == 1 else f"tune-{last}"].info
    tune, model = recipe["tune"], Path(recipe["inputs"]["model"]).name
    head = {
        "base_model": model,
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "self-specialization"],
    }
    parts = [
        f"# {model}, specialized: {recipe['name']}",
        f"A {'DoRA' if tune.get('dora') else 'LoRA'} adapter (rank {tune['rank']}, alpha {tune['alpha']:g}, "
        f"targets {tune['targets']}) in PEFT's format for `{model}`"
        + (f", tuned over {recipe['quantize']} weights." if recipe["quantize"] != "none" else "."),
        f"Tuned for {info['steps']:,} steps on {info['num_examples']:,} rows, {info['tokens']:,} tokens, at a learning "
        f"rate of {tune['learning_rate']:g}"
        + (", seeds among them." if tune["include_seeds"] else ", synthetic ones only."),
        "Prompts have the form `### Instruction:`, `### Input:`, `### Response:`; `specialize generate --adapter` and "
        "`chat` make it.",
    ]
    if found.get("systems"):
        parts += ["## Scores", "Token F1 in percent, 95 % bootstrap intervals.", _table(systems_table(found))]
        overlap = found.get("contamination") or {}
        if overlap:
            parts.append(
                f"{overlap['training_rows']:,} of the training rows share {overlap['n']} words in a row with an "
                "evaluation input."
            )
    parts += [
        "## Limits",
        "The rows were written by a model and filtered by rules, not checked by a person. The base model's licence and "
        "limits hold for the adapter, too.",
    ]
    return _page(head, *parts)


def _last_round(run: Path) -> int:
    """The last round that was filtered to its end, whose rows ``dataset.jsonl`` holds."""
    with Ledger(run / "ledger.sqlite") as ledger:
        done = [name for name, stage in ledger.stages().items() if stage.done and name.partition("-")[0] == "filter"]
    return max((int(name.partition("-")[2] or 1) for name in done), default=1)


def _size(count: int) -> str:
    """The hub's word for how many rows there are."""
    low, words = 1000, ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M")
    for word in words:
        if count < low:
            return word
        low *= 10
    return "n>1M"


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{n:,} {name}" for name, n in counts.items())


def _table(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def _page(head: Mapping[str, Any], *parts: str) -> str:
    import yaml

    front = yaml.safe_dump(dict(head), sort_keys=False, allow_unicode=True)
    return f"---\n{front}---\n\n" + "\n\n".join(part for part in parts if part) + "\n"
