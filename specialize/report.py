"""``report.html`` of a run: one file with its plots and styles inside, from the ledger and ``eval.json`` alone."""

from __future__ import annotations

import io
import json
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

from .errors import InputError
from .files import write_text
from .ledger import Item, Ledger
from .standalone import systems_table

INK, MUTED, BLUE, ORANGE, GREEN, RED = "#1f2933", "#7b8794", "#2b6cb0", "#c05621", "#2f855a", "#c53030"


def write_report(folder: Path) -> Path:
    """Write the run's report and return its path. Raises InputError when there is nothing to report yet."""
    if not (folder / "ledger.sqlite").is_file():
        raise InputError(f"{folder} is no run folder (no ledger.sqlite)")
    with Ledger(folder / "ledger.sqlite") as ledger:
        values = _gather(folder, ledger)
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string(
        (Path(__file__).parent / "templates" / "report.html").read_text(encoding="utf-8")
    )
    path = folder / "report.html"
    write_text(path, template.render(**values))
    return path


def _gather(folder: Path, ledger: Ledger) -> dict[str, Any]:
    import yaml

    recipe = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    found = json.loads((folder / "eval.json").read_text(encoding="utf-8")) if (folder / "eval.json").is_file() else {}
    stages = ledger.stages()
    rounds = max((item.round for item in ledger.items(status="kept")), default=1)
    kept, rejected = ledger.items(round=rounds, status="kept"), ledger.items(round=rounds, status="rejected")
    plots = {
        "gains": _plot_gains(found),
        "loss": _plot_loss(stages),
        "reasons": _plot_reasons(ledger.reasons(rounds)),
        "kept": _plot_kept(ledger.answer_times(rounds)),
        "lengths": _plot_lengths(kept),
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
        "rounds_table": _rounds_table(found),
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
        c["against"]: c["mean"] for c in found["comparisons"] if c["system"] == "expert" and c["metric"] == "token_f1"
    }
    return {"shots": shots, "base": mean("base"), "seeds": mean("seeds"), "expert": mean("expert"), "against": against}


def _rounds_table(found: dict[str, Any]) -> list[tuple[str, ...]]:
    systems = found.get("systems", {})
    rounds = [name for name in systems if name.startswith("round ")]
    if not rounds:
        return []
    rows: list[tuple[str, ...]] = [("", "token F1", "entity F1", "ROUGE-L")]
    for name in (*rounds, "expert"):
        if name in systems:
            cells = {
                m["metric"]: f"{m['value']:.1f}"
                for m in systems[name]["means"]
                if m["shots"] == systems[name]["means"][0]["shots"]
            }
            rows.append(
                (name if name != "expert" else "last round", cells["token_f1"], cells["entity_f1"], cells["rouge_l"])
            )
    return rows


def _general(found: dict[str, Any]) -> dict[str, Any] | None:
    """What was measured off the domain, with a row of cells for each system."""
    general = found.get("general")
    if not general:
        return None
    changes = {change["system"]: change for change in general["changes"]}
    names = {"seeds": "seeds alone"}
    rows = []
    for name, system in general["systems"].items():
        p, f1 = system["perplexity"], system["token_f1"]
        cells = [names.get(name, name), f"{p['value']:.2f} [{p['low']:.2f}, {p['high']:.2f}]", "–"]
        cells += [f"{f1['value']:.1f} [{f1['low']:.1f}, {f1['high']:.1f}]", "–"]
        if name in changes:
            c, d = changes[name]["perplexity_percent"], changes[name]["token_f1"]
            cells[2] = f"{c['value']:+.2f} % [{c['low']:+.2f}, {c['high']:+.2f}]"
            cells[4] = f"{d['value']:+.1f} [{d['low']:+.1f}, {d['high']:+.1f}]"
        rows.append(cells)
    return general | {"rows": rows}


def _notes(found: dict[str, Any]) -> list[str]:
    notes = []
    for name, report in found.get("systems", {}).items():
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
        if "same_as" in stage.info:
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


# plots: SVG text, so that the file stays small and sharp


def _figure(width: float = 6.4, height: float = 3.0) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(MUTED)
    axes.tick_params(colors=INK, labelsize=10)
    axes.grid(color="#e4e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def _svg(figure: Any) -> str:
    import matplotlib

    stream = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "specialize"}):
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    # The drawing scales with the page; its fonts are the page's.
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r"font: ([0-9.]+px) [^;\"]*", r"font: \1 system-ui, sans-serif", text)
    return text


def _plot_gains(found: dict[str, Any]) -> str:
    rows = [
        c
        for c in found.get("comparisons", [])
        if c["system"] == "expert" and c["metric"] == "token_f1" and c.get("tasks")
    ]
    if not rows:
        return ""
    shots = rows[0]["shots"]
    rows = [r for r in rows if r["shots"] == shots]
    names = ["mean", *(t["task"] for t in reversed(rows[0]["tasks"]))]
    figure, axes = _figure(height=0.9 + 0.52 * len(names))
    styles = {"base": (BLUE, "against the base"), "seeds": (ORANGE, "against the seeds alone")}
    for position, row in enumerate(rows):
        values = [row["mean"], *reversed(row["tasks"])]
        offset = (position - (len(rows) - 1) / 2) * 0.26
        color, label = styles[row["against"]]
        points = [v["value"] for v in values]
        spans = [
            [p - v["low"] for p, v in zip(points, values, strict=True)],
            [v["high"] - p for p, v in zip(points, values, strict=True)],
        ]
        axes.errorbar(
            points, [i - offset for i in range(len(names))], xerr=spans, fmt="o", color=color, label=label, capsize=3
        )
    axes.axvline(0, color=INK, linewidth=1)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel(f"gain in token F1, points ({shots}-shot)")
    axes.legend(frameon=False, fontsize=9, loc="best")
    return _svg(figure)


def _plot_loss(stages: dict[str, Any]) -> str:
    curves = {n: s.info for n, s in stages.items() if s.info.get("losses") and "same_as" not in s.info}
    if not curves:
        return ""
    figure, axes = _figure()
    labels = {"teacher": "teacher (seeds)", "control": "control (seeds alone)", "tune": "expert"}
    for (name, info), color in zip(curves.items(), (MUTED, BLUE, ORANGE, GREEN, RED, INK), strict=False):
        losses = info["losses"]
        share = [info["tokens"] * (i + 1) / len(losses) / 1000 for i in range(len(losses))]
        smooth: list[float] = []
        for loss in losses:
            smooth.append(loss if not smooth else 0.7 * smooth[-1] + 0.3 * loss)
        axes.plot(share, losses, color=color, alpha=0.25, linewidth=1)
        axes.plot(share, smooth, color=color, linewidth=2, label=labels.get(name, name))
    axes.set_xlabel("thousand tokens trained")
    axes.set_ylabel("loss on responses")
    axes.legend(frameon=False, fontsize=9)
    return _svg(figure)


def _plot_reasons(reasons: dict[str, int]) -> str:
    if not reasons:
        return ""
    names = list(reversed(reasons))
    figure, axes = _figure(height=0.9 + 0.34 * len(names))
    bars = axes.barh(names, [reasons[n] for n in names], color=ORANGE, height=0.6)
    axes.bar_label(bars, padding=3, fontsize=9, color=INK)
    axes.set_xlabel("candidates rejected")
    axes.grid(axis="y", visible=False)
    return _svg(figure)


def _plot_kept(times: list[tuple[float, str]]) -> str:
    if len(times) < 2:
        return ""
    # A pause (an interrupted run) would squeeze everything else, so gaps over a minute are closed.
    at, clock, last = [], 0.0, times[0][0]
    for moment, _ in times:
        clock += min(moment - last, 60.0)
        last = moment
        at.append(clock / 60)
    figure, axes = _figure()
    total, kept, answered = 0, [], []
    for count, (_, status) in enumerate(times, 1):
        total += status == "kept"
        kept.append(total)
        answered.append(count)
    axes.plot(at, answered, color=MUTED, linewidth=1.5, label="answered")
    axes.plot(at, kept, color=GREEN, linewidth=2, label="kept")
    rate = total / max(at[-1], 1e-9)
    axes.set_xlabel(f"minutes of answering; {rate:,.0f} kept a minute")
    axes.set_ylabel("candidates")
    axes.legend(frameon=False, fontsize=9)
    return _svg(figure)


def _plot_lengths(kept: list[Item]) -> str:
    if not kept:
        return ""
    figure, axes = _figure()
    inputs, outputs = [len(i.input.split()) for i in kept], [len(i.output.split()) for i in kept]
    top = max(max(inputs), max(outputs), 2)
    edges = [1.0]
    while edges[-1] < top + 1:
        edges.append(edges[-1] * 1.5)
    axes.hist(inputs, bins=edges, color=BLUE, alpha=0.55, label="inputs")
    axes.hist(outputs, bins=edges, color=ORANGE, alpha=0.55, label="answers")
    axes.set_xscale("log")
    ticks = [t for t in (1, 3, 10, 30, 100, 300, 1000) if t <= edges[-1]]
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.minorticks_off()
    axes.set_xlabel("words")
    axes.set_ylabel("rows kept")
    axes.legend(frameon=False, fontsize=9)
    return _svg(figure)
