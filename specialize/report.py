"""``report.html`` of a run: one file with its plots and styles inside, from the ledger and ``eval.json`` alone."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from .controls import passes, system_names, teacher_epochs
from .errors import InputError
from .files import write_text
from .ledger import Item, Ledger
from .plots import (
    plot_gains,
    plot_kept,
    plot_lengths,
    plot_loss,
    plot_reasons,
    plot_rounds,
    plot_systems,
    plot_time,
)
from .recipe import read_yaml
from .standalone import systems_table


def write_report(folder: Path) -> Path:
    """Write the run's report and return its path. Raises InputError when there is nothing to report yet."""
    if not (folder / "ledger.sqlite").is_file():
        raise InputError(f"{folder} is no run folder (no ledger.sqlite)")
    with Ledger(folder / "ledger.sqlite") as ledger:
        values = _gather(folder, ledger)
    path = folder / "report.html"
    write_text(path, render_page("report.html", values))
    return path


def render_page(name: str, values: Mapping[str, Any]) -> str:
    """A page of ``templates/`` with its styles inside; all values are escaped but plots."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined,
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
    )  # fmt: skip
    return environment.get_template(name).render(**values)


def _gather(folder: Path, ledger: Ledger) -> dict[str, Any]:
    import yaml

    recipe = read_yaml(folder / "recipe.yaml")
    found = json.loads((folder / "eval.json").read_text(encoding="utf-8")) if (folder / "eval.json").is_file() else {}
    stages = ledger.stages()
    rounds = max((item.round for item in ledger.items(status="kept")), default=1)
    kept, rejected = ledger.items(round=rounds, status="kept"), ledger.items(round=rounds, status="rejected")
    by_round = _rounds(ledger, stages, found)
    plots = {
        "systems": plot_systems(found),
        "rounds": plot_rounds(by_round),
        "time": plot_time(stages),
        "gains": plot_gains(found),
        "loss": plot_loss(stages),
        "reasons": plot_reasons(ledger.reasons(rounds)),
        "kept": plot_kept(ledger.answer_times(rounds)),
        "lengths": plot_lengths(kept),
    }
    return {
        "title": f"{Path(recipe['inputs']['model']).stem}, specialized",
        "recipe": recipe,
        "recipe_text": yaml.safe_dump(
            {k: v for k, v in recipe.items() if k != "inputs"}, sort_keys=False, allow_unicode=True
        ),
        "inputs": recipe["inputs"],
        "headline": _headline(found),
        "table": systems_table(found) if found.get("systems") else [],
        "setting": _setting(recipe, found, stages),
        "controls": _controls(found),
        "names": system_names(found),
        "short_names": system_names(found, alone="seeds"),
        "rounds": by_round,
        "stopped": _why_it_stopped(recipe, by_round),
        "examples": found.get("examples", []),
        "comparisons": [
            c for c in found.get("comparisons", []) if c.get("mean") and c["metric"] in ("token_f1", "entity_f1")
        ],
        "contamination": found.get("contamination"),
        "general": _general(found),
        "notes": _notes(found),
        "plots": plots,
        "counts": ledger.counts(rounds),
        "reasons": ledger.reasons(rounds),
        "kept_rows": _samples(folder, ledger, kept, 8),
        "rejected_rows": _rejected(ledger, rejected),
        "speed": _speed(ledger, stages),
        "cost": _cost(ledger, stages),
        "machine": _machine(),
    }


def _headline(found: dict[str, Any]) -> dict[str, Any] | None:
    systems = found.get("systems", {})
    if not {"base", "expert"} <= set(systems):
        return None
    shots = systems["expert"]["means"][0]["shots"]

    def mean(name: str) -> dict[str, Any] | None:
        rows = systems.get(name, {}).get("means", [])
        return next((m for m in rows if m["shots"] == shots and m["metric"] == "token_f1"), None)

    against = {
        c["against"]: c["mean"]
        for c in found["comparisons"]
        if c["system"] == "expert" and c["metric"] == "token_f1" and c["shots"] == shots
    }
    found_means = {name: mean(name) for name in ("base", "teacher", "seeds", "expert")}
    return {"shots": shots, "passes": passes(teacher_epochs(found)), "against": against} | found_means


def _setting(recipe: dict[str, Any], found: dict[str, Any], stages: dict[str, Any]) -> dict[str, Any]:
    """What went in, for the sentences at the top."""
    known = found.get("setting", {})
    index = stages["index"].info if "index" in stages else {}
    return {
        "model": Path(recipe["inputs"]["model"]).stem,
        "seeds": known.get("seeds"),
        "kinds": known.get("kinds", []),
        "tasks": known.get("tasks", []),
        "passages": index.get("passages"),
        "rounds": recipe["rounds"],
        "trained": next((s.info for n, s in reversed(stages.items()) if n.startswith("tune") and s.done), None),
    }


def _controls(found: dict[str, Any]) -> list[str]:
    """What the controls say, a sentence each."""
    systems, said = found.get("systems", {}), []
    if not {"base", "expert"} <= set(systems):
        return said
    shots = systems["expert"]["means"][0]["shots"]
    expert = _mean(found, "expert", shots)
    for n in sorted({m["shots"] for m in systems["base"]["means"]} - {shots}):
        base = _mean(found, "base", n)
        said.append(
            f"The base with {n} example{'s' if n > 1 else ''} in its prompt reaches {base['value']:.1f}; the expert "
            f"has {expert['value']:.1f} at {shots} shots."
        )
    rows = {
        (c["against"], c["metric"]): c for c in found["comparisons"] if (c["system"], c["shots"]) == ("expert", shots)
    }
    tuned = {
        "teacher": f"The teacher, tuned on the seeds alone for {passes(teacher_epochs(found))}, reaches",
        "seeds": "Tuned on the seeds alone, for as many tokens, the base reaches",
    }
    reached = {name: _mean(found, name, shots)["value"] for name in tuned if (name, "token_f1") in rows}
    for name, value in reached.items():
        mean = rows[name, "token_f1"]["mean"]
        if name != max(reached, key=lambda other: reached[other]):
            verdict = "but this is the weaker of the two controls"
        elif mean["low"] > 0:
            verdict = "so the synthetic rows are worth something of their own"
        elif mean["high"] >= 0:
            verdict = "so what the synthetic rows add to the seeds is not certain"
        else:
            verdict = "so the synthetic rows do harm: the seeds alone are better"
        said.append(f"{tuned[name]} {value:.1f}: the expert differs by {_points(mean)}, {verdict}.")
    for metric, text in (
        ("token_f1", "Without {mover}, the task that moved most, the gain over the base is {points}."),
        ("entity_f1", "By strict entity F1, which wants name and type exactly, the gain over the base is {points}."),
    ):
        row = rows.get(("base", metric))
        mean = row and (row["mean_without_largest_mover"] if metric == "token_f1" else row["mean"])
        if row and mean:
            said.append(text.format(mover=row["largest_mover"], points=_points(mean)))
    return said


def _points(mean: Mapping[str, Any]) -> str:
    return f"{mean['value']:+.1f} points ({mean['low']:+.1f} to {mean['high']:+.1f}{_p(mean)})"


def _mean(found: dict[str, Any], system: str, shots: int, metric: str = "token_f1") -> dict[str, Any]:
    return next(m for m in found["systems"][system]["means"] if (m["shots"], m["metric"]) == (shots, metric))


def _p(mean: Mapping[str, Any]) -> str:
    """``, p = 0.003`` of a paired test, where it was made."""
    if "p" not in mean:
        return ""
    return ", p < 0.001" if mean["p"] < 0.001 else f", p = {mean['p']:.3f}"


def _rounds(ledger: Ledger, stages: dict[str, Any], found: dict[str, Any]) -> list[dict[str, Any]]:
    """What each finished round was made of and reached."""
    systems, rows = found.get("systems", {}), []
    done = [(int(n.partition("-")[2] or 1), s.info) for n, s in stages.items() if n.startswith("tune") and s.done]
    taken = found.get("rounds", {}).get("taken", max((number for number, _ in done), default=1))
    for number, info in sorted(done, key=lambda pair: pair[0]):
        row: dict[str, Any] = {"round": number, "tokens": info["tokens"], "kept": ledger.counts(number).get("kept", 0)}
        row |= {"rejected": ledger.counts(number).get("rejected", 0), "held_out_loss": info.get("held_out_loss")}
        row |= {"loss": sum(info["losses"][-10:]) / len(info["losses"][-10:]), "chosen": number == taken}
        report = systems.get("expert" if number == taken else f"round {number}")
        if report:
            shots = report["means"][0]["shots"]
            row |= {m["metric"]: m for m in report["means"] if m["shots"] == shots}
        rows.append(row)
    return rows


def _why_it_stopped(recipe: dict[str, Any], rounds: list[dict[str, Any]]) -> str:
    """Whether all rounds were done, and if not, why the last one was the last."""
    if recipe["rounds"] == 1 or not rounds:
        return ""
    losses = [row["held_out_loss"] for row in rounds]
    if None in losses:
        return f"{len(rounds)} of {recipe['rounds']} rounds are done; no seeds were held out to tell which is best."
    taken = next(row["round"] for row in rounds if row["chosen"])
    best = (
        f"The expert is that of round {taken}, whose loss on the held-out seeds is the lowest, {losses[taken - 1]:.3f}."
    )
    if len(losses) > 1 and losses[-1] >= losses[-2] and len(rounds) < recipe["rounds"]:
        return (
            f"It stopped after round {len(rounds)} of at most {recipe['rounds']}: on seeds that nothing was made of, "
            f"the loss went from {losses[-2]:.3f} to {losses[-1]:.3f}. {best}"
        )
    return f"{len(rounds)} of {recipe['rounds']} rounds are done. {best}"


def _cost(ledger: Ledger, stages: dict[str, Any]) -> dict[str, Any]:
    """Time, tokens trained and tokens written of the whole run."""
    written = [tokens for purpose in ("instruction", "input", "response") for _, tokens in ledger.reply_times(purpose)]
    return {
        "minutes": sum(stage.seconds for stage in stages.values()) / 60,
        "trained": sum(s.info["tokens"] for s in stages.values() if "tokens" in s.info and "same_as" not in s.info),
        "written": sum(written),
        "replies": len(written),
    }


def _general(found: dict[str, Any]) -> dict[str, Any] | None:
    """What was measured off the domain, with a row of cells for each system."""
    general = found.get("general")
    if not general:
        return None
    changes = {change["system"]: change for change in general["changes"]}
    names, rows = system_names(found), []
    for name, system in general["systems"].items():
        p, f1 = system["perplexity"], system["token_f1"]
        cells = [names.get(name, name), f"{p['value']:.2f} [{p['low']:.2f}, {p['high']:.2f}]", "–"]
        cells += [f"{f1['value']:.1f} [{f1['low']:.1f}, {f1['high']:.1f}]", "–"]
        if name in changes:
            c, d = changes[name]["perplexity_percent"], changes[name]["token_f1"]
            cells[2] = f"{c['value']:+.2f} % [{c['low']:+.2f}, {c['high']:+.2f}]"
            cells[4] = f"{d['value']:+.1f} [{d['low']:+.1f}, {d['high']:+.1f}]"
        rows.append(cells)
    return general | {"rows": rows, "expert": changes.get("expert")}


def _notes(found: dict[str, Any]) -> list[str]:
    notes, names = [], system_names(found, alone="seeds")
    for system, report in found.get("systems", {}).items():
        name = names.get(system, system)
        dropped = {(r["task"], r["shots"], r["dropped_shots"], r["cut_inputs"]) for r in report["results"]}
        for task, shots, count, cut in sorted(dropped):
            if count:
                notes.append(
                    f"{name}, {task}, {shots}-shot: shots were dropped from {count} prompts that did not fit the "
                    "context."
                )
            if cut:
                notes.append(f"{name}, {task}, {shots}-shot: {cut} inputs were cut to fit the context.")
    return notes


def _passage_texts(folder: Path, wanted: set[str]) -> dict[str, str]:
    path = folder / "index" / "passages.jsonl"
    found: dict[str, str] = {}
    if path.is_file() and wanted:
        with path.open(encoding="utf-8") as stream:
            for line in stream:
                row = json.loads(line)
                if row["id"] in wanted:
                    found[row["id"]] = row["text"]
    return found


def _samples(folder: Path, ledger: Ledger, items: list[Item], count: int) -> list[dict[str, Any]]:
    """A few kept rows, one of each kind first, with the passages their answer was given."""
    chosen: list[Item] = []
    by_kind: dict[str, list[Item]] = {}
    for item in items:
        by_kind.setdefault(item.kind, []).append(item)
    while len(chosen) < min(count, len(items)):
        for members in by_kind.values():
            if members and len(chosen) < count:
                chosen.append(members.pop(len(members) // 2))
    replies = ledger.replies("response", [item.id for item in chosen])
    passages = {i: list(replies[i][0].provenance.get("passages", [])) for i in replies}
    texts = _passage_texts(folder, {p for ids in passages.values() for p in ids})
    return [
        {
            "item": item,
            "passages": [{"id": p, "text": texts.get(p, "")} for p in passages.get(item.id, [])],
            "samples": [reply.raw.strip() for reply in replies.get(item.id, [])],
            "documents": item.provenance.get("documents", []),
        }
        for item in chosen
    ]


def _rejected(ledger: Ledger, items: list[Item]) -> list[dict[str, Any]]:
    """One rejected candidate for each reason."""
    first: dict[str, Item] = {}
    for item in items:
        first.setdefault(item.reason, item)
    replies = ledger.replies("response", [item.id for item in first.values()])
    return [
        {"item": item, "samples": [r.raw.strip() for r in replies.get(item.id, [])][:2]}
        for item in list(first.values())[:10]
    ]


def _speed(ledger: Ledger, stages: dict[str, Any]) -> list[tuple[str, str, str]]:
    rows: list[tuple[str, str, str]] = []
    for name, stage in stages.items():
        what = ""
        if "tokens" in stage.info and stage.info.get("seconds"):
            what = f"{stage.info['tokens']:,} tokens, {stage.info['tokens'] / stage.info['seconds']:,.0f} a second"
        if "taken_from" in stage.info or ledger.meta(f"taken/{name}"):
            origin = stage.info.get("taken_from", "other runs")
            what = f"taken over from {origin}: the same settings and inputs"
        elif "same_as" in stage.info:
            what = "the teacher, which was tuned on as many tokens"
        elif name == "index" and "passages" in stage.info:
            what = f"{stage.info['passages']:,} passages"
            if "recall_at_10" in stage.info:
                what += f", recall@10 {stage.info['recall_at_10']:.3f} against exact search"
        elif name == "responses":
            times = ledger.reply_times("response")
            tokens = sum(count for _, count in times)
            what = f"{len(times):,} replies, {tokens:,} tokens, {tokens / max(stage.seconds, 1e-9):,.0f} a second"
        rows.append((name, f"{stage.seconds:,.1f} s", what))
    return rows


def _machine() -> dict[str, str]:
    import torch

    from .doctor import examine

    found = examine()
    device = found["gpus"][0]["name"] if found["gpus"] else f"{found['cpu']['name']}, {found['cpu']['cores']} cores"
    return {
        "device": device,
        "dtype": found["will_use"]["dtype"],
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "specialize": metadata.version("specialize"),
    }
