"""The plots of reports as SVG text, so that a page stays one small file and sharp at every width."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from .controls import system_names
from .ledger import Item

INK, MUTED, BLUE, ORANGE, GREEN, RED = "#1f2933", "#7b8794", "#2b6cb0", "#c05621", "#2f855a", "#c53030"
COLORS = (BLUE, ORANGE, GREEN, RED, MUTED, INK)
SYSTEM_COLORS = {"base": MUTED, "teacher": GREEN, "seeds": ORANGE, "expert": BLUE}


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


def plot_gains(found: dict[str, Any]) -> str:
    rows = [
        c
        for c in found.get("comparisons", [])
        if c["system"] == "expert" and c["metric"] == "token_f1" and c.get("tasks")
    ]
    if not rows:
        return ""
    shots = rows[0]["shots"]
    rows = [r for r in rows if r["shots"] == shots]
    lines = ["mean", *(t["task"] for t in reversed(rows[0]["tasks"]))]
    figure, axes = _figure(height=0.9 + 0.52 * len(lines))
    names = {"base": "base"} | system_names(found)
    colors = SYSTEM_COLORS | {"base": BLUE}
    for position, row in enumerate(rows):
        values = [row["mean"], *reversed(row["tasks"])]
        offset = (position - (len(rows) - 1) / 2) * 0.26
        points = [v["value"] for v in values]
        spans = [
            [p - v["low"] for p, v in zip(points, values, strict=True)],
            [v["high"] - p for p, v in zip(points, values, strict=True)],
        ]
        axes.errorbar(
            points, [i - offset for i in range(len(lines))], xerr=spans, fmt="o", color=colors[row["against"]],
            label=f"against the {names[row['against']]}", capsize=3,
        )  # fmt: skip
    axes.axvline(0, color=INK, linewidth=1)
    axes.set_yticks(range(len(lines)), lines)
    if len(rows) > 2:  # the outer ones of three lie near the frame
        axes.set_ylim(-0.5, len(lines) - 0.5)
    axes.set_xlabel(f"gain in token F1, points ({shots}-shot)")
    axes.legend(frameon=False, fontsize=9, loc="best")
    return _svg(figure)


def plot_loss(stages: dict[str, Any]) -> str:
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


def plot_reasons(reasons: dict[str, int]) -> str:
    if not reasons:
        return ""
    names = list(reversed(reasons))
    figure, axes = _figure(height=0.9 + 0.34 * len(names))
    bars = axes.barh(names, [reasons[n] for n in names], color=ORANGE, height=0.6)
    axes.bar_label(bars, padding=3, fontsize=9, color=INK)
    axes.set_xlabel("candidates rejected")
    axes.grid(axis="y", visible=False)
    return _svg(figure)


def plot_kept(times: list[tuple[float, str]]) -> str:
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


def plot_lengths(kept: list[Item]) -> str:
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


def plot_systems(found: dict[str, Any]) -> str:
    """Mean token F1 of every system at every number of shots, with intervals."""
    names = system_names(found)
    rows = [
        (f"{names.get(name, name)}, {mean['shots']}-shot", name, mean)
        for name, report in found.get("systems", {}).items()
        for mean in report["means"]
        if mean["metric"] == "token_f1"
    ]
    if len(rows) < 2:
        return ""
    figure, axes = _figure(height=0.8 + 0.36 * len(rows))
    rest = INK if any(name == "teacher" for _, name, _ in rows) else GREEN  # earlier rounds
    for place, (_, name, mean) in enumerate(reversed(rows)):
        spans = [[mean["value"] - mean["low"]], [mean["high"] - mean["value"]]]
        axes.errorbar(
            [mean["value"]], [place], xerr=spans, fmt="o", color=SYSTEM_COLORS.get(name, rest), capsize=3, markersize=7
        )
    axes.set_yticks(range(len(rows)), [label for label, _, _ in reversed(rows)])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xlabel("mean token F1 over the tasks, percent")
    return _svg(figure)


def plot_rounds(rounds: Sequence[dict[str, Any]]) -> str:
    """Mean token F1 of the expert after each round, with intervals."""
    rounds = [r for r in rounds if r.get("token_f1")]
    if len(rounds) < 2:
        return ""
    figure, axes = _figure()
    values = [r["token_f1"]["value"] for r in rounds]
    spans = [
        [v - r["token_f1"]["low"] for v, r in zip(values, rounds, strict=True)],
        [r["token_f1"]["high"] - v for v, r in zip(values, rounds, strict=True)],
    ]
    axes.errorbar([r["round"] for r in rounds], values, yerr=spans, color=BLUE, marker="o", capsize=3)
    losses = [(r["round"], r["held_out_loss"]) for r in rounds if r.get("held_out_loss") is not None]
    if losses:
        right = axes.twinx()
        right.plot(*zip(*losses, strict=True), color=ORANGE, marker="s")
        right.set_ylabel("loss on held-out seeds", color=ORANGE)
        right.spines["top"].set_visible(False)
    axes.set_xticks([r["round"] for r in rounds])
    axes.set_xlabel("round")
    axes.set_ylabel("mean token F1, percent")
    return _svg(figure)


def plot_time(stages: dict[str, Any]) -> str:
    """Minutes of each stage."""
    names = [name for name, stage in stages.items() if stage.seconds >= 0.5]
    if not names:
        return ""
    minutes = [stages[name].seconds / 60 for name in reversed(names)]
    figure, axes = _figure(height=0.8 + 0.34 * len(names))
    bars = axes.barh(list(reversed(names)), minutes, color=BLUE, height=0.6)
    axes.bar_label(bars, [f"{m:.1f}" for m in minutes], padding=3, fontsize=9, color=INK)
    axes.set_xlabel("minutes")
    axes.grid(axis="y", visible=False)
    return _svg(figure)


def plot_comparison(runs: Sequence[dict[str, Any]], shots: int, names: Mapping[str, str]) -> str:
    """Each run's expert with its interval; base and the controls of ``names`` as marks beside it."""
    marks = [(name, SYSTEM_COLORS[name], names.get(name, name)) for name in ("base", *names, "expert")]
    figure, axes = _figure(height=1.1 + 0.42 * len(runs))
    for system, color, label in marks:
        rows = [
            (place, mean) for place, run in enumerate(reversed(runs)) if (mean := run["means"].get((system, shots)))
        ]
        if not rows:
            continue
        spans = [[m["value"] - m["low"] for _, m in rows], [m["high"] - m["value"] for _, m in rows]]
        axes.errorbar(
            [m["value"] for _, m in rows], [place for place, _ in rows], xerr=spans if system == "expert" else None,
            fmt="o" if system == "expert" else "|", markersize=7 if system == "expert" else 12, color=color,
            label=label, capsize=3, linestyle="none",
        )  # fmt: skip
    axes.set_yticks(range(len(runs)), [run["name"] for run in reversed(runs)])
    axes.set_ylim(-0.7, len(runs) - 0.3)
    axes.set_xlabel(f"mean token F1 over the tasks, percent ({shots}-shot)")
    axes.legend(frameon=False, fontsize=9, loc="best")
    return _svg(figure)
