"""What a composition is worth, from the content of its ``mix.json`` alone: tables, and ``mix.html``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .files import write_text

NEAR = 1.0  # points that a domain may lie below its own expert
COLOURS = ("#9ecae9", "#ffbf79", "#a8d8a2", "#f4a6a6", "#cbb7e5", "#d8c0a4", "#f3b9dc", "#c9c9c9")


def summary(evaluation: Mapping[str, Any], composed: Sequence[str], shots: int) -> list[dict[str, Any]]:
    """Per composed system: its mean over domains, and per domain the difference to the own expert with interval."""

    def mean(domain: str, system: str) -> float:
        means = evaluation[domain]["systems"][system]["means"]
        return next(m["value"] for m in means if m["shots"] == shots and m["metric"] == "token_f1")

    rows = []
    for system in composed:
        if not evaluation:
            continue
        row: dict[str, Any] = {"system": system, "shots": shots, "domains": {}}
        for domain in evaluation:
            found = evaluation[domain]["comparisons"]
            against = next(c for c in found if c["system"] == system and c["shots"] == shots)["mean"]
            near = mean(domain, system) >= mean(domain, domain) - NEAR
            row["domains"][domain] = {"value": mean(domain, system), "to_own_expert": against, "within_a_point": near}
        row["mean"] = round(sum(d["value"] for d in row["domains"].values()) / len(row["domains"]), 2)
        rows.append(row)
    return rows


def score_table(found: Mapping[str, Any], shots: int) -> list[tuple[str, ...]]:
    """Rows: one a task, a mean for each domain and over domains. Columns: the systems; "own expert" is the domain's."""
    evaluation = found["evaluation"]
    composed = list(found["made"])
    columns = ["base", "own expert", "other experts", *composed]
    others = [e["name"] for e in found["experts"]]

    def cell(domain: str, column: str, pick: Any) -> float:
        systems = evaluation[domain]["systems"]
        if column == "own expert":
            return pick(systems[domain])
        if column == "other experts":
            values = [pick(systems[name]) for name in others if name != domain]
            return sum(values) / len(values)
        return pick(systems[column])

    def of_task(task: str) -> Any:
        return lambda report: next(
            r["value"] for r in report["results"] if (r["task"], r["shots"], r["metric"]) == (task, shots, "token_f1")
        )

    def of_mean(report: Mapping[str, Any]) -> float:
        return next(m["value"] for m in report["means"] if (m["shots"], m["metric"]) == (shots, "token_f1"))

    rows: list[tuple[str, ...]] = [("token F1", *columns)]
    means: list[list[float]] = []
    for domain in evaluation:
        tasks = list(dict.fromkeys(r["task"] for r in evaluation[domain]["systems"]["base"]["results"]))
        for task in tasks:
            rows.append((f"{domain}: {task}", *(f"{cell(domain, c, of_task(task)):.1f}" for c in columns)))
        means.append([cell(domain, c, of_mean) for c in columns])
        rows.append((f"{domain}: mean", *(f"{value:.1f}" for value in means[-1])))
    rows.append(("mean of domains", *(f"{sum(values) / len(values):.1f}" for values in zip(*means, strict=True))))
    return rows


def routing_table(routing: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Rows: the domains; columns: the share of choices that fell on each expert, and its mean weight."""
    names = routing["experts"]
    rows: list[tuple[str, ...]] = [("tokens of", *(f"to {name}" for name in names), *(f"weight {n}" for n in names))]
    for domain, found in routing["domains"].items():
        shares = [f"{100 * share:.1f} %" for share in found["chosen"]]
        rows.append((domain, *shares, *(f"{weight:.2f}" for weight in found["weight"])))
    return rows


def write_page(found: Mapping[str, Any], path: Path) -> Path:
    """``mix.html``: the scores, and which expert serves what, from the content of ``mix.json`` alone."""
    from .report import render_page

    def shade(weights: Sequence[float]) -> str:
        first = max(range(len(weights)), key=lambda i: weights[i])
        sure = weights[first] / max(1e-9, sum(weights))
        return f"{COLOURS[first % len(COLOURS)]}{round(255 * sure):02x}"

    rows = found.get("summary") or []
    shots = rows[0]["shots"] if rows else 0
    names = [expert["name"] for expert in found["experts"]]
    values = {
        "title": f"{' and '.join(names)} on one base", "method": found["method"], "experts": found["experts"],
        "base": Path(found["base_model"]).name, "shots": shots, "scores": score_table(found, shots) if rows else [],
        "summary": rows, "routing": found.get("routing"), "colours": COLOURS * (len(names) // len(COLOURS) + 1),
        "shade": shade,
    }  # fmt: skip
    write_text(path, render_page("mix.html", values))
    return path
