"""Scores a model, with or without an adapter, on task files: replies, metrics per task, means, paired comparisons.

A reply is kept in a ledger under what it depends on (model, adapter, task, shots, limits), so that nothing is asked
twice and an interrupted evaluation goes on where it stopped.
"""

# pyright: reportMissingImports=false
# The sibling folders join this package when it is installed (setup.py); by path pyright cannot see them from here.
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from . import metrics
from .errors import InputError
from .ledger import Ledger, Reply
from .prompts import STOP, clean_reply, example_prompt
from .records import METRICS, Task, fingerprint
from .synthesize import Job, number_of, run_jobs

RESAMPLES = 2000


@dataclass(frozen=True)
class System:
    """What is scored: the base alone (``adapter`` None) or with an adapter folder. ``identity`` is its weights'."""

    name: str
    adapter: str | None
    identity: str
    label: str = ""


@dataclass(frozen=True)
class Scores:
    """One system on one task with one number of shots. ``rows``: by metric, the columns the bootstrap draws from."""

    task: str
    shots: int
    metric: str
    rows: dict[str, np.ndarray]
    replies: tuple[str, ...]
    dropped_shots: int = 0
    cut_inputs: int = 0

    @property
    def n(self) -> int:
        return len(self.replies)


@dataclass(frozen=True)
class EvalReport:
    """All scores of one system. ``to_json`` is the content of ``eval.json``."""

    model: str
    adapter: str | None
    scores: tuple[Scores, ...]
    seed: int = 0
    settings: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        results, means = [], []
        for scores in self.scores:
            for metric in METRICS:
                found = _interval(scores.rows[metric], metric, self.seed, scores.task)
                results.append(
                    {
                        "task": scores.task,
                        "shots": scores.shots,
                        "metric": metric,
                        "primary": metric == scores.metric,
                        "value": _percent(found.value),
                        "low": _percent(found.low),
                        "high": _percent(found.high),
                        "n": scores.n,
                        "dropped_shots": scores.dropped_shots,
                        "cut_inputs": scores.cut_inputs,
                    }
                )
        for shots in sorted({s.shots for s in self.scores}):
            for metric in METRICS:
                value, low, high = self.mean(shots, metric)
                tasks = sum(s.shots == shots for s in self.scores)
                means.append(
                    {"shots": shots, "metric": metric, "value": value, "low": low, "high": high, "tasks": tasks}
                )
        return {
            "model": self.model,
            "adapter": self.adapter,
            "settings": self.settings,
            "results": results,
            "means": means,
        }

    def of(self, shots: int) -> list[Scores]:
        return [scores for scores in self.scores if scores.shots == shots]

    def mean(self, shots: int, metric: str, *, without: str | None = None) -> tuple[float, float, float]:
        """Mean over the tasks in percent with its interval; tasks count alike, examples are drawn within tasks."""
        chosen = [s for s in self.of(shots) if s.task != without]
        if not chosen:
            return float("nan"), float("nan"), float("nan")
        values = _resampled(chosen, metric, self.seed)
        point = np.mean([_statistic(metric)(s.rows[metric][None])[0] for s in chosen])
        low, high = np.percentile(values, [2.5, 97.5])
        return _percent(point), _percent(low), _percent(high)


def _percent(value: Any) -> float:
    return round(100 * float(value), 2)


def _statistic(metric: str) -> metrics.Statistic:
    return metrics.micro_f1_statistic if metric == "entity_f1" else metrics.mean_statistic


def percent_of(rows: np.ndarray, metric: str) -> float:
    """A task's score in percent, as ``eval.json`` has it, from its examples' columns [n, columns]."""
    return _percent(_statistic(metric)(rows[None])[0])


def _interval(rows: np.ndarray, metric: str, seed: int, task: str) -> metrics.Interval:
    return metrics.interval(rows, _statistic(metric), seed=number_of(seed, task, bits=31), resamples=RESAMPLES)


def _resampled(scores: Sequence[Scores], metric: str, seed: int) -> np.ndarray:
    """Bootstrap means over tasks [resamples]; systems that answered the same examples are paired draw by draw."""
    values = [
        metrics.resample(s.rows[metric], _statistic(metric), seed=number_of(seed, s.task, bits=31), resamples=RESAMPLES)
        for s in scores
    ]
    return np.mean(values, axis=0)


def score_replies(replies: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, np.ndarray]:
    """Per metric the per-example columns [n, 1] (entity F1: correct, said, wanted, [n, 3])."""
    pairs = list(zip(replies, references, strict=True))
    return {
        "token_f1": np.array([[metrics.token_f1(r, wanted)] for r, wanted in pairs], dtype=np.float64),
        "entity_f1": np.array([metrics.entity_counts(r, wanted) for r, wanted in pairs], dtype=np.float64),
        "rouge_l": np.array([[metrics.rouge_l(r, wanted)] for r, wanted in pairs], dtype=np.float64),
    }


def fit_prompt(
    tokenizer: Any, task: Task, input: str, num_shots: int, *, max_context: int, max_tokens: int
) -> tuple[str, int, bool]:
    """(prompt, shots used, input was cut). Shots are dropped from the end until the prompt and the answer fit."""
    for used in range(min(num_shots, len(task.shots)), -1, -1):
        shots = [(task.instruction, shot.input, shot.output) for shot in task.shots[:used]]
        prompt = example_prompt(task.instruction, input, shots)
        if len(tokenizer.encode(prompt)) + max_tokens <= max_context:
            return prompt, used, False
    words = input.split()
    low, high = 0, len(words)
    while low < high:  # the longest beginning of the input that fits
        middle = (low + high + 1) // 2
        prompt = example_prompt(task.instruction, " ".join(words[:middle]))
        if len(tokenizer.encode(prompt)) + max_tokens <= max_context:
            low = middle
        else:
            high = middle - 1
    if not low:
        raise InputError(
            f"task {task.name}: its instruction alone does not fit into the context of {max_context} tokens"
        )
    return example_prompt(task.instruction, " ".join(words[:low])), 0, True


def evaluate(
    generator: Any,
    tasks: Sequence[Task],
    *,
    model: str,
    model_identity: str,
    system: System,
    shots: Sequence[int] = (0,),
    limit: int = 0,
    max_tokens: int = 96,
    ledger: Ledger,
    seed: int = 0,
    on_reply: Callable[[Reply], None] | None = None,
    adapter_name: Callable[[], str | None] | None = None,
    before: Callable[[Sequence[Job]], object] | None = None,
) -> EvalReport:
    """Score ``system`` greedily. ``limit`` takes the first examples of each task (0: all).

    ``adapter_name`` gives the name under which the generator knows the adapter; asked only when replies are missing.
    ``before`` hears of all jobs first and may put replies that exist elsewhere into the ledger.
    """
    from .engine.sampler import SamplingParams

    max_context = generator.model.config.max_context
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, stop=STOP)
    plans = []
    jobs: list[Job] = []
    for num_shots in shots:
        for task in tasks:
            if num_shots > len(task.shots):
                raise InputError(f"task {task.name}: {num_shots} shots wanted, it has {len(task.shots)}")
            examples = task.examples[: limit or None]
            purpose = reply_purpose(model_identity, system, task, max_tokens, num_shots)
            mine, dropped, cut = [], 0, 0
            for index, example in enumerate(examples):
                prompt, used, was_cut = fit_prompt(
                    generator.tokenizer, task, example.input, num_shots, max_context=max_context, max_tokens=max_tokens
                )
                dropped += used < num_shots
                cut += was_cut
                identity = f"{task.name}/{index}/{fingerprint(prompt)}"
                mine.append(Job(identity, purpose, prompt, params))
            jobs += mine
            plans.append((task, num_shots, purpose, mine, dropped, cut))
    if before is not None:
        before(jobs)
    done = {purpose: ledger.reply_ids(purpose) for purpose in {job.purpose for job in jobs}}
    missing = [job for job in jobs if job.reply_id(0) not in done[job.purpose]]
    if missing:
        name = adapter_name() if adapter_name is not None else system.adapter
        missing = [Job(job.item_id, job.purpose, job.prompt, job.params, name) for job in missing]
        run_jobs(
            generator,
            missing,
            ledger,
            origin={"model": model, "adapter": system.adapter, "system": system.name},
            on_reply=on_reply,
        )
    found = []
    for task, num_shots, purpose, mine, dropped, cut in plans:
        replies = ledger.replies(purpose)
        texts = tuple(clean_reply(replies[job.item_id][0].raw) for job in mine)
        references = [example.outputs for example in task.examples[: len(mine)]]
        found.append(Scores(task.name, num_shots, task.metric, score_replies(texts, references), texts, dropped, cut))
    settings = {
        "limit": limit,
        "max_tokens": max_tokens,
        "temperature": 0.0,
        "stop": list(STOP),
        "resamples": RESAMPLES,
    }
    return EvalReport(model, system.adapter, tuple(found), seed, settings)


def reply_purpose(model_identity: str, system: System, task: Task, max_tokens: int, num_shots: int) -> str:
    """What the ledger knows a system's replies to a task by: all they depend on but the single examples."""
    return "eval/" + fingerprint(model_identity, system.identity, task.name, task.instruction, max_tokens, num_shots)


def base_identity(model_print: str, dtype: str, quantize: str = "none", kv_dtype: str = "auto") -> str:
    """The base as a run's evaluation knows it: the fingerprint of its files, and how its numbers are held."""
    quantized = [quantize] * (quantize != "none")
    cached = [f"kv {kv_dtype}"] * (kv_dtype != "auto")
    return " ".join((model_print, dtype, *quantized, *cached))


def telling_examples(
    one: EvalReport, other: EvalReport, tasks: Sequence[Task], shots: int, count: int = 2
) -> list[dict[str, Any]]:
    """Per task up to ``count`` examples in which ``one`` gained most over ``other`` by token F1, and as many in which
    it lost most or, where it lost in none, was worst: what the numbers look like."""
    theirs = {s.task: s for s in other.of(shots)}
    by_name = {task.name: task for task in tasks}
    found = []
    for mine in one.of(shots):
        his, task = theirs[mine.task], by_name[mine.task]
        after, before = mine.rows["token_f1"][:, 0], his.rows["token_f1"][:, 0]
        order = sorted(range(mine.n), key=lambda i: (before[i] - after[i], i))
        good = [i for i in order[:count] if after[i] > before[i]]
        bad = [i for i in reversed(order) if after[i] < before[i]][:count]
        bad += [i for i in sorted(order, key=lambda i: (after[i], i)) if after[i] < 1 and i not in good + bad]
        for verdict, chosen in (("good", good), ("bad", bad[:count])):
            found += [
                {
                    "task": mine.task, "example": i, "verdict": verdict, "instruction": task.instruction,
                    "input": task.examples[i].input, "references": list(task.examples[i].outputs),
                    "before": his.replies[i], "after": mine.replies[i],
                    "token_f1": [_percent(before[i]), _percent(after[i])],
                }
                for i in chosen
            ]  # fmt: skip
    return found


def compare(one: EvalReport, other: EvalReport, shots: int, metric: str = "token_f1") -> dict[str, Any]:
    """``one`` minus ``other`` in points: per task and mean with paired bootstrap intervals and the p-value of a paired
    randomization test, and the mean without the task that moved most."""
    return compare_pooled([(one, other)], shots, metric, seed=one.seed)


def compare_pooled(
    pairs: Sequence[tuple[EvalReport, EvalReport]],
    shots: int,
    metric: str = "token_f1",
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    digits: int = 2,
) -> dict[str, Any]:
    """`compare` over several runs of one setting on the same examples: the difference is the mean of the runs'.

    Examples are drawn (or swapped), the same ones in every run; so the interval is of these runs on other examples.
    What other runs would give is seen from how the runs differ. Points have ``digits`` after the point."""
    by_run = [({s.task: s for s in one.of(shots)}, {s.task: s for s in other.of(shots)}) for one, other in pairs]
    sizes = [{name: side[name].n for name in side} for run in by_run for side in run]
    names = [name for name, n in sizes[0].items() if all(other.get(name) == n for other in sizes)] if sizes else []
    if not names:
        return {}
    statistic = _statistic(metric)
    draws = []
    for name in names:
        draw_seed = number_of(seed, name, bits=31)
        swap_seed = number_of(draw_seed, "swap", bits=31)
        points, drawn, swapped = [], [], []
        for mine, his in ((ones[name].rows[metric], others[name].rows[metric]) for ones, others in by_run):
            points.append(statistic(mine[None])[0] - statistic(his[None])[0])
            drawn.append(
                metrics.resample(mine, statistic, seed=draw_seed, resamples=resamples)
                - metrics.resample(his, statistic, seed=draw_seed, resamples=resamples)
            )
            swapped.append(metrics.permuted(mine, his, statistic, seed=swap_seed, resamples=resamples))
        draws.append((name, np.mean(points), np.mean(drawn, axis=0), np.mean(swapped, axis=0)))

    def mean(rows: list[tuple[str, Any, np.ndarray, np.ndarray]]) -> dict[str, float]:
        value = np.mean([r[1] for r in rows])
        low, high = np.percentile(np.mean([r[2] for r in rows], axis=0), [2.5, 97.5])
        p = metrics.p_value(float(value), np.mean([r[3] for r in rows], axis=0))
        bounds = {"value": value, "low": low, "high": high}
        return {key: round(100 * float(bound), digits) for key, bound in bounds.items()} | {"p": round(p, 4)}

    tasks = [{"task": row[0]} | mean([row]) for row in draws]
    mover = max(draws, key=lambda row: abs(row[1]))[0]
    rest = [row for row in draws if row[0] != mover]
    return {
        "metric": metric,
        "shots": shots,
        "tasks": tasks,
        "mean": mean(draws),
        "largest_mover": mover,
        "mean_without_largest_mover": mean(rest) if rest else None,
    }
