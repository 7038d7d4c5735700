"""What a system lost outside its domain: perplexity on general text, and scores on simple general tasks.

Texts (``general/texts.jsonl``) and tasks (``general/tasks/``) were written for this project, so that no model has been
trained on them. The tasks are asked with five shots: forgetting is to be seen, not who knows the form of an answer.
"""

# pyright: reportMissingImports=false
# The sibling folders join this package when it is installed (setup.py); by path pyright cannot see them from here.
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import metrics
from .evaluate import RESAMPLES, EvalReport, System, compare, evaluate
from .ledger import Ledger, Reply
from .records import Task, fingerprint, read_json_lines, read_tasks, text_field
from .synthesize import Job, number_of

SHOTS = 5
MAX_TOKENS = 32  # the answers are a few words
_FOLDER = Path(__file__).parent / "general"


@dataclass(frozen=True)
class GeneralText:
    id: str
    kind: str
    text: str


def general_texts() -> list[GeneralText]:
    path = _FOLDER / "texts.jsonl"
    rows = read_json_lines(path, "general texts")
    return [
        GeneralText(*(text_field(row, key, f"{path}:{number}") for key in ("id", "kind", "text")))
        for number, row in rows
    ]


def general_tasks() -> list[Task]:
    return read_tasks(_FOLDER / "tasks")


def text_losses(generator: Any, texts: Sequence[str], *, adapter: str | None = None) -> np.ndarray:
    """[n, 2] for n texts: the negative log-likelihood of its tokens after the first, in nats, and their number.

    All texts go through the packed scoring of the generator. One longer than the context is taken in pieces that share
    one token, so that each token is predicted once.
    """
    pairs, owner = [], []
    size = generator.max_context - 1
    for index, text in enumerate(texts):
        ids = generator.tokenizer.encode(text)
        for start in range(0, len(ids) - 1, size):
            piece = ids[start : start + size + 1]
            pairs.append((piece[:1], piece[1:]))
            owner.append(index)
    rows = np.zeros((len(texts), 2))
    for index, values in zip(owner, generator.score(pairs, adapter=adapter), strict=True):
        rows[index] += (-sum(values), len(values))
    return rows


def perplexity_statistic(rows: np.ndarray) -> np.ndarray:
    """Token-weighted perplexity of rows (nats, tokens): exp of the loss over all tokens, not a mean of texts' means."""
    return np.exp(rows[..., 0].sum(-1) / rows[..., 1].sum(-1))


def perplexity(rows: np.ndarray, seed: int) -> dict[str, float]:
    """Perplexity with its 95 % interval; texts are drawn."""
    found = metrics.interval(rows, perplexity_statistic, seed=_seed(seed), resamples=RESAMPLES)
    return {key: round(float(getattr(found, key)), 4) for key in ("value", "low", "high")}


def perplexity_change(rows: np.ndarray, base: np.ndarray, seed: int) -> dict[str, float]:
    """By how many percent the perplexity differs from the base's on the same tokens; both are drawn together."""

    def statistic(both: np.ndarray) -> np.ndarray:
        return 100 * (perplexity_statistic(both[..., :2]) / perplexity_statistic(both[..., 2:]) - 1)

    found = metrics.interval(np.hstack([rows, base]), statistic, seed=_seed(seed), resamples=RESAMPLES)
    return {key: round(float(getattr(found, key)), 3) for key in ("value", "low", "high")}


def _seed(seed: int) -> int:
    return number_of(seed, "general texts", bits=31)


def off_domain(
    generator: Any,
    systems: Sequence[System],
    losses: Callable[[System, Sequence[str]], np.ndarray],
    *,
    model: str,
    model_identity: str,
    ledger: Ledger,
    seed: int = 0,
    on_reply: Callable[[Reply], None] | None = None,
    adapter_name: Callable[[System], str | None],
    before: Callable[[Sequence[Job]], object] | None = None,
) -> dict[str, Any]:
    """The "general" part of ``eval.json``: each system's perplexity and scores, and how they differ from the first's.

    ``losses`` gives a system's rows of `text_losses`; what the ledger already has of its replies is not asked again.
    """
    tasks = general_tasks()
    reports: dict[str, EvalReport] = {}
    for system in systems:
        reports[system.name] = evaluate(
            generator, tasks, model=model, model_identity=model_identity, system=system, shots=(SHOTS,),
            max_tokens=MAX_TOKENS, ledger=ledger, seed=seed, on_reply=on_reply,
            adapter_name=lambda system=system: adapter_name(system), before=before,
        )  # fmt: skip
    texts = [text.text for text in general_texts()]
    rows = {system.name: losses(system, texts) for system in systems}
    base = systems[0].name
    found: dict[str, Any] = {
        "texts": len(texts), "tokens": int(rows[base][:, 1].sum()), "tasks": [task.name for task in tasks],
        "shots": SHOTS, "systems": {}, "changes": [],
    }  # fmt: skip
    for name, report in reports.items():
        scores = report.to_json()
        f1 = next(mean for mean in scores["means"] if mean["metric"] == "token_f1")
        found["systems"][name] = {
            "perplexity": perplexity(rows[name], seed),
            "token_f1": {key: f1[key] for key in ("value", "low", "high")},
            "results": [r for r in scores["results"] if r["primary"]],
        }
        if name != base:
            found["changes"].append(
                {
                    "system": name,
                    "against": base,
                    "perplexity_percent": perplexity_change(rows[name], rows[base], seed),
                    "token_f1": compare(report, reports[base], SHOTS)["mean"],
                }
            )
    return found


def num_replies(num_systems: int) -> int:
    return num_systems * sum(len(task.examples) for task in general_tasks())


def remembered_losses(
    ledger: Ledger,
    identity: Sequence[str],
    texts: Sequence[str],
    make: Callable[[], np.ndarray],
    elsewhere: Callable[[str], Any] = lambda _: None,
) -> np.ndarray:
    """The rows that the ledger has of a system on these texts, or ``elsewhere`` under the same key, else those that
    ``make`` gives; remembered."""
    key = "general/" + fingerprint(list(identity), list(texts))
    if ledger.meta(key) is None:
        ledger.set_meta(key, elsewhere(key) or make().tolist())
    return np.array(ledger.meta(key))


def perplexity_text(change: dict[str, Any]) -> str:
    """``+1.2 % [+0.9, +1.5]``: how the perplexity differs from the base's."""
    p = change["perplexity_percent"]
    return f"{p['value']:+.1f} % [{p['low']:+.1f}, {p['high']:+.1f}]"


def changes_lines(found: dict[str, Any], names: Mapping[str, str] | None = None) -> list[str]:
    """What the terminal says of it, a line for each system that has an adapter, called as in ``names``."""
    names = names or {}
    systems, lines = found["systems"], []
    for change in found["changes"]:
        name, base = change["system"], change["against"]
        f1 = change["token_f1"]
        lines.append(
            f"off-domain, {names.get(name, name)}: perplexity {systems[base]['perplexity']['value']:.2f} → "
            f"{systems[name]['perplexity']['value']:.2f} ({perplexity_text(change)}), "
            f"general tasks {systems[base]['token_f1']['value']:.1f} → {systems[name]['token_f1']['value']:.1f} "
            f"({f1['value']:+.1f} points [{f1['low']:+.1f}, {f1['high']:+.1f}])"
        )
    return lines
