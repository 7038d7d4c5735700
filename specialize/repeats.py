"""Repetitions: runs that differ in nothing but their random seed, taken together.

What each system reached is shown as mean and spread over the runs. What the expert gained is compared example by
example over all of them; the scores of single examples are made again from the replies in the runs' ledgers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .controls import control_names
from .errors import InputError
from .evaluate import (
    EvalReport,
    Scores,
    System,
    base_identity,
    compare_pooled,
    percent_of,
    reply_purpose,
    score_replies,
)
from .ledger import Ledger
from .prompts import clean_reply, example_prompt
from .records import Task, file_fingerprint, fingerprint, read_tasks

METRICS = ("token_f1", "entity_f1")
RESAMPLES = 10_000  # 2,000 leave 0.1 points of chance in a bound; here no model waits


def seed_groups(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Runs that differ in their random seed alone, two or more together: mean and spread of what each system reached,
    and of the expert's differences to base and controls.

    ``spread`` is the standard deviation of the runs, n - 1 in its denominator.
    """
    by_settings: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        settings = {k: v for k, v in run["settings"].items() if k != "seed"} | run["identity"]
        by_settings.setdefault(json.dumps(settings, sort_keys=True, default=str), []).append(run)
    groups = []
    for alike in by_settings.values():
        members = list({run["seed"]: run for run in reversed(alike)}.values())[::-1]  # one of each random seed
        if len(members) < 2:
            continue
        names = control_names(epochs for run in members for epochs in run["teacher_epochs"])
        rows: list[dict[str, Any]] = []
        for metric, key in zip(METRICS, ("means", "entity"), strict=True):
            for system, shots in members[0][key]:
                values = [run[key][system, shots]["value"] for run in members if (system, shots) in run[key]]
                if len(values) == len(members):
                    rows.append({"what": names.get(system, system), "shots": shots, "metric": metric} | _of(values))
        for against, shots, metric in members[0]["differences"]:
            key = (against, shots, metric)
            values = [run["differences"][key]["value"] for run in members if key in run["differences"]]
            if len(values) == len(members):
                what = f"expert − {names.get(against, against)}"
                rows.append({"what": what, "shots": shots, "metric": metric, "against": against} | _of(values))
        groups.append(
            {"runs": [run["name"] for run in members], "random_seeds": [run["seed"] for run in members], "rows": rows}
        )
    return groups


def _of(values: Sequence[float]) -> dict[str, Any]:
    mean = math.fsum(values) / len(values)
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
    found = {"mean": mean, "spread": spread, "low": min(values), "high": max(values)}
    return {key: round(value, 2) for key, value in found.items()} | {"values": list(values)}


def add_pooled(group: dict[str, Any], runs: Sequence[Mapping[str, Any]]) -> None:
    """Give a group's differences the "pooled" comparison over its ``runs``: "mean" with interval and p-value, "tasks".

    Where it cannot be made, nothing is added to the rows and the group's "not_pooled" says why.
    """
    group["not_pooled"] = ""
    try:
        reports = [remembered_reports(run) for run in runs]
    except InputError as error:
        group["not_pooled"] = str(error)
        return
    for row in group["rows"]:
        if "against" in row:
            pairs = [(found["expert"], found[row["against"]]) for found in reports]
            row["pooled"] = compare_pooled(pairs, row["shots"], row["metric"], resamples=RESAMPLES, digits=4)


def group_table(group: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A group as rows of text for `format_table`."""
    seeds = ", ".join(map(str, group["random_seeds"]))
    rows: list[tuple[str, ...]] = [
        (f"random seeds {seeds}", "shots", "metric", "mean ± spread", "95 % interval", "p", "each run")
    ]
    for row in group["rows"]:
        sign = "+" if "against" in row else ""
        pooled = row.get("pooled", {}).get("mean")
        mean = pooled["value"] if pooled else row["mean"]
        rows.append(
            (
                row["what"], str(row["shots"]), row["metric"], f"{mean:{sign}.1f} ± {row['spread']:.1f}",
                f"[{pooled['low']:+.1f}, {pooled['high']:+.1f}]" if pooled else "",
                _p(pooled["p"]) if pooled else "",
                ", ".join(f"{value:{sign}.1f}" for value in row["values"]),
            )
        )  # fmt: skip
    return rows


def _p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def remembered_reports(run: Mapping[str, Any]) -> dict[str, EvalReport]:
    """The scores of a run's systems, example by example, from its ledger and task files; no model is needed.

    ``run``: its "folder", "evaluation" (``eval.json``), flat "settings" and "identity" (its inputs' paths). Raises
    InputError where the ledger's replies do not give the scores that ``eval.json`` has.
    """
    folder, evaluation, settings = Path(run["folder"]), run["evaluation"], run["settings"]
    tasks = read_tasks(run["identity"]["tasks"])
    found = {}
    with Ledger(folder / "ledger.sqlite") as ledger:
        stages = ledger.stages()
        model = next((s.settings["model"] for s in stages.values() if "model" in s.settings), "")
        base = base_identity(str(model), *(str(settings[name]) for name in ("dtype", "quantize", "kv_dtype")))
        same = "control" in stages and stages["control"].info.get("same_as") == "teacher"
        places = {"teacher": "teacher", "seeds": "teacher" if same else "control", "expert": "adapter"}
        for name, scored in evaluation["systems"].items():
            identity = "base"
            if name != "base":
                weights = folder / (places.get(name) or name.replace("round ", "rounds/")) / "adapter_model.safetensors"
                if not weights.is_file():
                    raise InputError(f"{weights} is missing, so which replies are those of {name} is not known")
                identity = file_fingerprint(weights)
            found[name] = _remembered(
                ledger, tasks, base, System(name, None, identity), sorted({r["shots"] for r in scored["results"]}),
                limit=scored["settings"]["limit"], max_tokens=scored["settings"]["max_tokens"],
            )  # fmt: skip
            _require_same(folder, name, found[name], scored["results"])
    return found


def _remembered(
    ledger: Ledger,
    tasks: Sequence[Task],
    base: str,
    system: System,
    shots: Sequence[int],
    *,
    limit: int,
    max_tokens: int,
) -> EvalReport:
    """What `evaluate` found of a system."""
    found = []
    for num_shots in shots:
        for task in tasks:
            replies = ledger.replies(reply_purpose(base, system, task, max_tokens, num_shots))
            by_place: dict[str, list[str]] = {}
            for item in replies:
                by_place.setdefault(item.rpartition("/")[0], []).append(item)
            texts = []
            for index, example in enumerate(task.examples[: limit or None]):
                place = f"{task.name}/{index}"
                item = _item_of(task, example.input, num_shots, place, by_place.get(place, []))
                if item is None:
                    raise InputError(
                        f"{ledger.path} has no reply of {system.name} to example {index + 1} of {task.name}, "
                        f"{num_shots}-shot, as the task file has it now"
                    )
                texts.append(clean_reply(replies[item][0].raw))
            rows = score_replies(texts, [example.outputs for example in task.examples[: len(texts)]])
            found.append(Scores(task.name, num_shots, task.metric, rows, tuple(texts)))
    return EvalReport("", system.adapter, tuple(found))


def _item_of(task: Task, input: str, num_shots: int, place: str, items: Sequence[str]) -> str | None:
    """The one of ``items`` whose prompt is the example's (`evaluate.fit_prompt`); one whose input was cut to fit is
    known by its place alone."""
    for used in range(num_shots, -1, -1):
        shots = [(task.instruction, shot.input, shot.output) for shot in task.shots[:used]]
        identity = f"{place}/{fingerprint(example_prompt(task.instruction, input, shots))}"
        if identity in items:
            return identity
    return items[0] if len(items) == 1 else None


def _require_same(folder: Path, system: str, report: EvalReport, results: Sequence[Mapping[str, Any]]) -> None:
    """Raises InputError unless the scores made again are those that were written."""
    again = {
        (s.task, s.shots, metric): (s.n, percent_of(s.rows[metric], metric))
        for s in report.scores
        for metric in METRICS
    }
    written = {(r["task"], r["shots"], r["metric"]): (r["n"], r["value"]) for r in results if r["metric"] in METRICS}
    if again != written:
        task = next(key[0] for key in {**again, **written} if again.get(key) != written.get(key))
        raise InputError(
            f"{folder}: the ledger's replies of {system} to {task} do not have the scores of eval.json; the task files "
            "have changed since: evaluate the run again"
        )
