"""Several runs side by side in one page: what each reached, which settings differ, mean and spread over seeds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .controls import control_names, teacher_epochs
from .errors import InputError
from .files import write_text
from .general import perplexity_text
from .ledger import Ledger
from .plots import plot_comparison
from .recipe import Recipe, read_yaml
from .repeats import METRICS, add_pooled, seed_groups
from .report import render_page


def compare_runs(folders: Sequence[Path], out: Path) -> dict[str, Any]:
    """Write the page ``out`` on two or more evaluated runs and return what it says as plain values."""
    found = [_read(folder) for folder in folders]
    names = _names(folders)
    if len(set(map(Path.resolve, folders))) < len(folders):
        raise InputError("report: a run is given twice")
    runs: list[dict[str, Any]] = [{**run, "name": name} for run, name in zip(found, names, strict=True)]
    shots = sorted({s for run in runs for system, s in run["means"] if system == "expert"})
    groups = seed_groups(runs)
    for group in groups:
        add_pooled(group, [run for run in runs if run["name"] in group["runs"]])
    controls = _controls(runs)
    values: dict[str, Any] = {
        "title": f"{len(runs)} runs compared",
        "runs": runs,
        "shots": shots,
        "differing": differing_settings(runs),
        "groups": groups,
        "warnings": _warnings(runs),
        "tasks": _tasks(runs, shots),
        "controls": controls,
        "plots": [plot_comparison(runs, s, controls) for s in shots],
    }
    write_text(out, render_page("comparison.html", values))
    plain = ("name", "folder", "seed", "kept", "trained_tokens", "minutes")
    return {
        "report": str(out),
        "runs": [
            {key: run[key] for key in plain}
            | {
                "means": [
                    {"system": system, "shots": s} | {k: mean[k] for k in ("value", "low", "high")}
                    for (system, s), mean in run["means"].items()
                ]
            }
            for run in runs
        ],
        "seeds": groups,
        "differing": values["differing"],
    }


def _read(folder: Path) -> dict[str, Any]:
    """What a run's folder says of its settings, scores and costs."""
    if not (folder / "ledger.sqlite").is_file():
        raise InputError(f"{folder} is no run folder (no ledger.sqlite)")
    if not (folder / "eval.json").is_file():
        raise InputError(f"{folder} is not evaluated yet; do: specialize eval {folder}")
    try:
        found = json.loads((folder / "eval.json").read_text(encoding="utf-8"))
        recipe = read_yaml(folder / "recipe.yaml")
        systems = found["systems"]
        _ = found["comparisons"], recipe["name"], recipe["seed"], recipe["inputs"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{folder}: eval.json or recipe.yaml cannot be read ({' '.join(str(error).split())})"
        ) from None
    if "expert" not in systems:
        raise InputError(f"{folder} has no expert yet; do: specialize run --out {folder}")
    with Ledger(folder / "ledger.sqlite") as ledger:
        stages = ledger.stages()
        rounds = max((item.round for item in ledger.items(status="kept")), default=1)
        kept = ledger.counts(rounds).get("kept", 0)
    tuned = [stage.info["tokens"] for name, stage in stages.items() if name.startswith("tune") and stage.done]
    general = {change["system"]: change for change in found.get("general", {}).get("changes", [])}
    # What an older run's recipe does not name is what it is by default.
    settings = _flat(Recipe().to_dict()) | _flat({k: v for k, v in recipe.items() if k != "inputs"})
    settings = {k: v for k, v in settings.items() if k not in ("name", "description")}
    settings |= {f"inputs.{name}": Path(str(path)).name for name, path in recipe["inputs"].items()}
    return {
        "folder": str(folder),
        "recipe": recipe["name"],
        "seed": recipe["seed"],
        "settings": settings,
        # What decides whether two runs are one run with other random numbers: names of files are not enough.
        "identity": {name: str(path) for name, path in recipe["inputs"].items()},
        "teacher_epochs": teacher_epochs(found),
        "kept": kept,
        "trained_tokens": tuned[-1] if tuned else 0,
        "minutes": round(sum(stage.seconds for stage in stages.values()) / 60, 1),
        "means": {
            (name, mean["shots"]): mean
            for name, report in systems.items()
            for mean in report["means"]
            if mean["metric"] == "token_f1"
        },
        "entity": {
            (name, mean["shots"]): mean
            for name, report in systems.items()
            for mean in report["means"]
            if mean["metric"] == "entity_f1"
        },
        "gains": {
            (c["against"], c["shots"]): c["mean"]
            for c in found["comparisons"]
            if (c["system"], c["metric"]) == ("expert", "token_f1") and c.get("mean")
        },
        "differences": {
            (c["against"], c["shots"], c["metric"]): c["mean"]
            for c in found["comparisons"]
            if c["system"] == "expert" and c["metric"] in METRICS and c.get("mean")
        },
        "results": {
            (r["task"], r["shots"]): r for r in systems["expert"]["results"] if r["metric"] == "token_f1"
        },
        "general": general.get("expert"),
        "evaluation": found,
        "off_domain": perplexity_text(general["expert"]) if "expert" in general else "–",
    }  # fmt: skip


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' own names, with as much of what is above them as tells them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-depth:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def _flat(settings: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= _flat(value, f"{path}{key}.") if isinstance(value, Mapping) else {f"{path}{key}": value}
    return found


def differing_settings(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The settings that are not the same in all runs, with each run's value ("–" where a run knows none)."""
    keys = list(dict.fromkeys(key for run in runs for key in run["settings"]))
    rows = [{"setting": key, "values": [run["settings"].get(key, "–") for run in runs]} for key in keys]
    return [row for row in rows if any(value != row["values"][0] for value in row["values"])]


def _controls(runs: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The names of the controls that the runs have scored."""
    return control_names(epochs for run in runs for epochs in run["teacher_epochs"])


def _tasks(runs: Sequence[Mapping[str, Any]], shots: Sequence[int]) -> list[dict[str, Any]]:
    """The experts' token F1 by task, a cell a run."""
    keys = [(task, s) for s in shots for task in dict.fromkeys(t for run in runs for t, n in run["results"] if n == s)]
    return [{"task": task, "shots": s, "cells": [run["results"].get((task, s)) for run in runs]} for task, s in keys]


def _warnings(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Why numbers of some of the runs should not be put side by side."""
    found = []
    if len({frozenset((key, r["n"]) for key, r in run["results"].items()) for run in runs}) > 1:
        found.append(
            "The runs were not evaluated on the same tasks and numbers of examples, so their means differ anyway."
        )
    if len({run["identity"]["tasks"] for run in runs}) > 1:
        found.append("The runs' task files lie in different folders; whether they are the same was not looked at.")
    if len({run["settings"].get("inputs.model") for run in runs}) > 1:
        found.append("The runs have different base models: compare gains rather than scores.")
    return found
