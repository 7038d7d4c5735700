"""``specialize ablate``: a run as its recipe says, and variants of it that differ in a setting or two, side by side.

Each variant is a run folder of its own below one folder. Stages whose fingerprints are equal are taken over from the
others (`share.py`), so only what a changed setting reaches is made again; the same command resumes.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .controls import EQUAL_TOKENS, system_names
from .errors import InputError
from .evaluate import EvalReport, compare
from .files import write_text
from .general import perplexity_text
from .ledger import Ledger
from .recipe import Recipe, override, read_yaml
from .records import Task, fingerprint

REFERENCE = "recipe"  # the folder and the name of the run that nothing is changed in
BASE_SHOTS = (0, 1, 5)
_METRICS = ("token_f1", "entity_f1")


@dataclass(frozen=True)
class Variant:
    name: str
    settings: Mapping[str, Any]


def read_variants(path: Path | None = None) -> list[Variant]:
    """A YAML file of ``name: {section.setting: value, …}``; the shipped list where none is given."""
    path = path or Path(__file__).parent / "ablations.yaml"
    try:
        found = read_yaml(path)
    except OSError as error:
        raise InputError(f"--list {path}: {error.strerror}") from None
    except InputError as error:
        raise InputError(f"--list {error}") from None
    if not isinstance(found, dict) or not all(isinstance(v, dict) and v for v in found.values()) or not found:
        raise InputError(f"--list {path}: write lines such as no retrieval: {{retrieval.mode: off}}")
    return [Variant(str(name), settings) for name, settings in found.items()]


def vary(options: Sequence[str]) -> list[Variant]:
    """``["retrieval.mode=off,hybrid", "filter.enabled=true,false"]`` → all combinations, here four."""
    import yaml

    axes = []
    for text in options:
        key, found, values = text.partition("=")
        try:
            chosen = yaml.safe_load(f"[{values}]") if found and key.strip() and values.strip() else None
        except yaml.YAMLError:
            chosen = None
        if not chosen:
            raise InputError(f"--vary {text}: write it as section.setting=value,value")
        axes.append([(key.strip(), value) for value in chosen])
    keys = [axis[0][0] for axis in axes]
    if len(set(keys)) < len(keys):
        raise InputError(f"--vary {next(k for k in keys if keys.count(k) > 1)} is given twice; write all values in one")
    return [
        Variant(", ".join(f"{key}={_shown(value)}" for key, value in choice), dict(choice))
        for choice in itertools.product(*axes)
    ]


def _shown(value: Any) -> str:
    return json.dumps(value) if isinstance(value, bool | list) else str(value)


def variants_of(recipe: Recipe, variants: Sequence[Variant]) -> list[tuple[Variant, Recipe]]:
    """Each variant with its recipe, all settings checked; without those that change nothing. The controls on the
    seeds alone are the recipe's: variants make or score none of their own unless they ask for it."""
    found: list[tuple[Variant, Recipe]] = []
    for variant in variants:
        try:
            changed = override(recipe, variant.settings)
        except InputError as error:
            raise InputError(f"variant {variant.name}: {error}") from None
        if changed == recipe:
            continue
        for control in ("evaluate.seeds_only", "evaluate.teacher"):
            if control not in variant.settings:
                changed = override(changed, {control: False})
        if all(changed != other for _, other in found):
            found.append((variant, changed))
    if not found:
        raise InputError("no variant differs from the recipe; name other values with --vary")
    return found


def folder_name(name: str) -> str:
    """A folder's name for a variant's; different names never share one."""
    plain = re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.")
    return plain if plain == name else f"{plain[:48]}-{fingerprint(name)[:6]}"


def with_base_shots(recipe: Recipe, tasks: Sequence[Task]) -> Recipe:
    """The recipe with the base scored at 0, 1 and 5 shots, as far as the tasks have them."""
    if recipe.evaluate.base_shots:
        return recipe
    most = min(len(task.shots) for task in tasks)
    return override(recipe, {"evaluate.base_shots": [n for n in BASE_SHOTS if n <= most]})


def ablate(
    open_run: Callable[[Recipe, Path, Sequence[Path]], Any],
    recipe: Recipe,
    variants: Sequence[Variant],
    out: Path,
    *,
    say: Callable[[str], None] = lambda _: None,
    redo: bool = False,
) -> dict[str, Any]:
    """Run the recipe and its variants below ``out``; returns and writes ``ablation.json`` (and ``.md``).

    ``open_run(recipe, folder, donors)`` gives a `Run`. A variant that cannot be finished, because no row passes its
    filter, say, has the reason in its row; an unusable recipe raises InputError before any work.
    """
    planned = [(Variant(REFERENCE, {}), recipe), *variants_of(recipe, variants)]
    folders = [out / folder_name(variant.name) for variant, _ in planned]
    rows: list[dict[str, Any]] = []
    reference: dict[str, EvalReport] = {}
    for number, ((variant, chosen), folder) in enumerate(zip(planned, folders, strict=True)):
        say(f"{number + 1} of {len(planned)}: {variant.name}")
        run = open_run(chosen, folder, [other for other in folders if other != folder])
        row: dict[str, Any] = {"name": variant.name, "settings": dict(variant.settings), "run": folder.name}
        try:
            found = run.execute(until="evaluate", redo=redo)
        except InputError as error:
            if not reference:
                raise
            rows.append(row | {"failed": str(error)})
            say(f"{variant.name}: {error}")
            continue
        if not reference:
            reference = run.reports
            rows += _controls(found)
        rows.append(row | _made(folder) | _scores(found, "expert"))
        if number:
            rows[-1]["against_recipe"] = [
                compare(run.reports["expert"], reference["expert"], shots, metric)
                for shots in recipe.evaluate.shots
                for metric in _METRICS
            ]
        write_text(out / "ablation.json", json.dumps({"rows": rows}, indent=1, ensure_ascii=False))
    result = {"recipe": recipe.name, "shots": list(recipe.evaluate.shots), "rows": rows}
    write_text(out / "ablation.json", json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False))
    write_text(out / "ablation.md", markdown(result))
    return result


def _controls(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows that no variant changes: base, teacher where it is scored, and seeds alone."""
    names = {"base": "base"} | system_names(found, alone=EQUAL_TOKENS)
    return [{"name": names[name]} | _scores(found, name) for name in names if name in found["systems"]]


def _scores(found: dict[str, Any], system: str) -> dict[str, Any]:
    """A system's means, and what changed against the base on and off the domain."""
    row: dict[str, Any] = {"means": [m for m in found["systems"][system]["means"] if m["metric"] in _METRICS]}
    for change in found.get("general", {}).get("changes", []):
        if change["system"] == system:
            row["general"] = change
    for control in ("seeds", "teacher"):
        told = [c for c in found["comparisons"] if (c["system"], c["against"]) == (system, control)]
        if told:
            row[f"against_{control}"] = [c for c in told if c["metric"] in _METRICS]
    return row


def _made(folder: Path) -> dict[str, Any]:
    """What the run was made of: rows kept, tokens trained, its own time, and what it took over."""
    with Ledger(folder / "ledger.sqlite") as ledger:
        stages = ledger.stages()
        rounds = max((item.round for item in ledger.items(status="kept")), default=1)
        taken = [name for name, stage in stages.items() if "taken_from" in stage.info]
        taken += [name for name in stages if ledger.meta(f"taken/{name}")]
        kept = ledger.counts(rounds).get("kept", 0)
        last = stages["tune" if rounds == 1 else f"tune-{rounds}"].info
    return {
        "kept": kept,
        "trained_tokens": last["tokens"],
        "seconds": round(sum(stage.seconds for stage in stages.values()), 1),
        "taken_over": taken,
    }


def table(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """Rows of cells, the head first; without the run's own column of times where nothing was run."""
    metric_names = {"token_f1": "token F1", "entity_f1": "strict entity F1"}
    shots = result["shots"]
    head = ["", "kept", "tokens"]
    for n in shots:
        head += [f"{metric_names['token_f1']}, {n}-shot", "against the recipe", "p", metric_names["entity_f1"]]
    rows: list[tuple[str, ...]] = [(*head, "perplexity off the domain", "minutes", "taken over")]
    for row in result["rows"]:
        if "failed" in row:
            rows.append((row["name"], *["–"] * (len(head) + 1), f"not finished: {row['failed']}"))
            continue
        extra = [n for n in sorted({m["shots"] for m in row["means"]}) if n not in shots]
        cells = [row["name"], str(row.get("kept", "–")), f"{row['trained_tokens']:,}" if "kept" in row else "–"]
        for n in shots:
            means = {m["metric"]: m for m in row["means"] if m["shots"] == n}
            change = next(
                (c["mean"] for c in row.get("against_recipe", []) if (c["shots"], c["metric"]) == (n, "token_f1")), None
            )
            cells += [
                _interval(means["token_f1"]),
                _interval(change, "+") if change else "–",
                f"{change['p']:.3f}" if change else "–",
                _interval(means["entity_f1"]),
            ]
        off = perplexity_text(row["general"]) if "general" in row else "–"
        minutes = f"{row['seconds'] / 60:.1f}" if "kept" in row else "–"
        rows.append((*cells, off, minutes, ", ".join(row.get("taken_over", [])) or "–"))
        for n in extra:  # the base with examples in its prompt
            means = {m["metric"]: m for m in row["means"] if m["shots"] == n}
            filled = [f"{row['name']}, {n}-shot", "–", "–", _interval(means["token_f1"]), "–", "–"]
            filled += [_interval(means["entity_f1"]), *["–"] * (4 * (len(shots) - 1) + 3)]
            rows.append(tuple(filled))
    return rows


def _interval(value: Mapping[str, float], sign: str = "") -> str:
    return f"{value['value']:{sign}.1f} [{value['low']:{sign}.1f}, {value['high']:{sign}.1f}]"


def markdown(result: dict[str, Any]) -> str:
    """The table for a page: means over the tasks in percent with 95 % bootstrap intervals."""
    head, *rows = table(result)
    lines = [
        "Means over the tasks in percent with 95 % bootstrap intervals; differences are paired (example by example), "
        f"p is that of a paired randomization test. Recipe: {result['recipe']}.",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
    ]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"
