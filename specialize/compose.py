"""Several experts on one base: a mixture with a trained router (MiXSE), and what it is compared with, each of them
written as a folder that generation and evaluation take like an adapter, scored on the tasks of every domain.

    mixse     frozen experts, and a router trained on the rows of all of them     ties, dare, average   arithmetic
    pooled    one adapter tuned on the rows of all of them

``mix.json`` in the folder holds settings, routing shares and scores, ``mix.html`` shows them.
"""

# pyright: reportMissingImports=false
# The sibling folders join this package when it is installed (setup.py); by path pyright cannot see them from here.
from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .errors import InputError
from .evaluate import EvalReport, System, compare, evaluate
from .ledger import Ledger, run_lock
from .mix_report import summary, write_page
from .progress import Reporter
from .recipe import Tune, read_recipe, remembered_inputs
from .records import Task, file_fingerprint, read_seeds, read_tasks, read_training_rows
from .synthesize import anchor_texts

METHODS = ("mixse", "pooled", "ties", "dare", "average")
WEIGHTS = "adapter_model.safetensors"
MIX_FILE = "mix.json"
MEASURED_ROWS = 64  # of each domain: what routing shares are counted on


@dataclass(frozen=True)
class Expert:
    """One domain: its adapter, the rows it was tuned on, and, of a run, its tasks, model and settings."""

    name: str
    adapter: Path
    rows: tuple[Mapping[str, str], ...]
    tasks: tuple[Task, ...] = ()
    model: str | None = None
    tune: Tune | None = None
    anchors: tuple[str, ...] = ()  # the texts of the run's anchor
    limit: int = 0
    max_tokens: int = 96


@dataclass(frozen=True)
class Settings:
    """How is composed. ``top_k`` 0: all experts. ``lr``, ``epochs`` and ``batch`` of None are a router's defaults, or
    for "pooled" those of the first expert's run. ``density`` and ``rank`` concern TIES and DARE."""

    method: str = "mixse"
    top_k: int = 1
    lr: float | None = None
    epochs: float | None = None
    batch: int | None = None
    density: float = 0.5
    rank: int | None = None
    seed: int = 0


ROUTER_TUNE = Tune(learning_rate=1e-2, epochs=2.0, batch=8, schedule="cosine")


def read_experts(paths: Sequence[Path], data: Sequence[Path]) -> list[Expert]:
    """Run folders, or adapter folders with one ``data`` file each. Raises InputError for what cannot be composed."""
    if len(paths) < 2:
        given = f"only {paths[0]}" if paths else "none"
        raise InputError(f"compose: two or more experts are wanted, {given} given; name finished RUN folders")
    found, files = [], list(data)
    for path in paths:
        name = _name(path, [expert.name for expert in found])
        if (path / "recipe.yaml").is_file():
            found.append(_read_run(path, name))
        elif (path / WEIGHTS).is_file():
            if not files:
                raise InputError(f"compose: {path} is an adapter folder; give its rows, too: --data ROWS.jsonl")
            found.append(Expert(name, path, tuple(read_training_rows(files.pop(0)))))
        else:
            raise InputError(f"compose: {path} is neither a run folder (recipe.yaml) nor an adapter folder ({WEIGHTS})")
    if files:
        raise InputError(f"compose: --data {files[0]} belongs to no adapter folder; a RUN has its own rows")
    return found


def _read_run(run: Path, name: str) -> Expert:
    for needed in (f"adapter/{WEIGHTS}", "dataset.jsonl"):
        if not (run / needed).is_file():
            raise InputError(
                f"compose: {run} is not finished, it has no {needed}; go on with: specialize run --out {run}"
            )
    recipe, _ = read_recipe(run / "recipe.yaml")
    inputs = remembered_inputs(run / "recipe.yaml")
    rows: list[Mapping[str, str]] = []
    if recipe.tune.include_seeds:
        seeds = [
            {"instruction": s.instruction, "input": s.input, "output": s.output} for s in read_seeds(inputs["seeds"])
        ]
        rows += seeds * recipe.tune.seed_repeat
    rows += read_training_rows(run / "dataset.jsonl")
    tasks = tuple(read_tasks(inputs["tasks"])) if Path(inputs.get("tasks", "")).exists() and "tasks" in inputs else ()
    anchors: list[str] = []
    if recipe.tune.anchor and (run / "ledger.sqlite").is_file():
        with Ledger(run / "ledger.sqlite") as ledger:
            anchors = anchor_texts(recipe, ledger)
    return Expert(
        name, run / "adapter", tuple(rows), tasks, inputs.get("model"), recipe.tune, tuple(anchors),
        limit=recipe.evaluate.limit, max_tokens=recipe.evaluate.max_tokens,
    )  # fmt: skip


def _name(path: Path, taken: Sequence[str]) -> str:
    """The folder's name, or its parent's where that says more; unlike those ``taken`` and the systems beside it."""
    path = path.resolve()
    name = path.parent.name if path.name in ("run", "adapter") and path.parent.name else path.name
    name = re.sub(r"[^\w.-]+", "-", name)[:40] or "expert"
    taken = ["base", *METHODS, *taken]  # what the other columns of a table are called
    return name if name not in taken else next(f"{name}-{i}" for i in range(2, 99) if f"{name}-{i}" not in taken)


def base_of(experts: Sequence[Expert], given: str | None) -> str:
    """The model that all experts share, as the user or the first run names it."""
    named = [expert for expert in experts if expert.model is not None]
    for expert in named[1:]:
        if expert.model != named[0].model and file_fingerprint(str(expert.model)) != file_fingerprint(
            str(named[0].model)
        ):
            raise InputError(
                f"compose: experts of different bases: {named[0].name} is of {named[0].model}, {expert.name} of "
                f"{expert.model}; compose experts of one"
            )
    if given is None and not named:
        raise InputError("compose: --model is missing; adapter folders do not say where their base lies")
    return given or str(named[0].model)


class Composer:
    """Makes one method's folder after another over one base."""

    def __init__(
        self, model_path: Path, experts: Sequence[Expert], *, dtype: str, device: str, base_model: str,
        reporter: Reporter,
    ) -> None:  # fmt: skip
        self.model_path, self.experts, self.reporter = model_path, list(experts), reporter
        self.dtype, self.device, self.base_model = dtype, device, base_model

    def check(self, settings: Settings) -> None:
        """Raises InputError for adapters that do not go together, before anything long."""
        from .engine.adapter_format import load_modules
        from .engine.digest import require_base
        from .engine.layout import layer_linears
        from .engine.weights import read_config
        from .train.merging import check_same_shapes

        folders = [expert.adapter for expert in self.experts]
        saved = [load_modules(folder) for folder in folders]
        check_same_shapes(folders, saved)
        config = read_config(self.model_path)
        shapes = {
            part.path: (fused.in_features, part.stop - part.start)
            for layer_id in range(config.num_layers)
            for fused in layer_linears(config, layer_id)
            for part in fused.parts
        }
        for folder, adapter in zip(folders, saved, strict=True):
            require_base(adapter.base, folder, self.model_path)
            for module, (a, b) in adapter.parts.items():
                if shapes.get(module) != (a.shape[1], b.shape[0]):
                    raise InputError(f"{folder}: adapts {module}, which is another in {self.model_path}: another base")
        if settings.top_k > len(self.experts):
            raise InputError(
                f"compose: --top-k {settings.top_k} of {len(self.experts)} experts; allowed: 1 to that, all"
            )

    def make(self, settings: Settings, out: Path) -> dict[str, Any]:
        """The method's folder, or what an earlier call with the same settings left there; what it took."""
        out.mkdir(parents=True, exist_ok=True)
        if settings.method in ("mixse", "pooled"):
            return self._train(settings, out)
        from .pipeline import write_text
        from .train.merging import merge_adapters

        folders = [expert.adapter for expert in self.experts]
        wanted = {name: getattr(settings, name) for name in ("method", "density", "rank", "seed")}
        wanted["experts"] = [file_fingerprint(folder / WEIGHTS) for folder in folders]
        note = out / "merge.json"
        if note.is_file() and (out / WEIGHTS).is_file():
            known = json.loads(note.read_text(encoding="utf-8"))
            if known["settings"] == wanted:
                return known["result"]
        note.unlink(missing_ok=True)
        self.reporter.say(f"{settings.method} of {len(folders)} adapters")
        report = merge_adapters(
            folders, settings.method, out, density=settings.density, rank=settings.rank, seed=settings.seed,
            base_model=self.base_model,
        )  # fmt: skip
        result = {"rank": report.rank, "lost": round(report.lost, 4), "density": settings.density}
        write_text(note, json.dumps({"settings": wanted, "result": result}, indent=1) + "\n")
        return result

    def _train(self, settings: Settings, out: Path) -> dict[str, Any]:
        from .engine.adapter import load_adapter
        from .engine.mixture import mix
        from .engine.model import Model
        from .engine.tokenizer import Tokenizer
        from .pipeline import load_model
        from .train.router import TrainableRouter
        from .tune import encode_rows, epoch_tokens, train, train_config

        routed = settings.method == "mixse"
        first = next((e for e in self.experts if e.tune is not None), None)
        tune = ROUTER_TUNE if routed else Tune() if first is None or first.tune is None else first.tune
        changed = {"learning_rate": settings.lr, "epochs": settings.epochs, "batch": settings.batch}
        tune = replace(tune, **{name: value for name, value in changed.items() if value is not None})
        tokenizer = Tokenizer.from_pretrained(self.model_path)
        rows = encode_rows(tokenizer, self._rows())
        texts = first.anchors if first is not None and tune.anchor else ()
        if tune.anchor and not texts:
            self.reporter.say(f"{settings.method}: the first run's ledger has no anchor texts; tuned without an anchor")
            tune = replace(tune, anchor=0.0)
        model = load_model(Model, self.model_path, self.dtype, self.device)
        trainable: Any = None
        more: dict[str, Any] = {}
        if routed:
            adapters = [load_adapter(expert.adapter, model) for expert in self.experts]
            names = [expert.name for expert in self.experts]
            import torch

            router = torch.zeros(len(adapters), model.config.hidden_size)
            trainable = TrainableRouter(
                model, mix(adapters, names, router, settings.top_k or len(adapters)), seed=settings.seed
            )
            more["rank"] = max(adapter.rank for adapter in adapters)  # what memory is planned by
        config = train_config(
            tune, epochs=tune.epochs, seed=settings.seed, max_context=model.config.max_context, **more
        )
        total = round(epoch_tokens(rows) * tune.epochs)
        with self.reporter.bar("router" if routed else "pooled", total, "tokens") as bar:

            def show(step: Any) -> None:
                bar.set(bar.done + step.tokens, f"step {step.step}/{step.num_steps}, loss {step.loss:.3f}")

            result = train(
                model, rows, config, out, base_model=self.base_model, source=self.model_path, on_step=show,
                trainable=trainable, anchors=[list(tokenizer.encode(text)) for text in texts],
            )  # fmt: skip
        keys = ("steps", "tokens", "num_parameters", "num_examples")
        found = {key: result[key] for key in keys} | {"seconds": round(result["seconds"], 1)}
        count = max(1, len(result["losses"]) // 10)
        found |= {
            "first_loss": round(sum(result["losses"][:count]) / count, 4),
            "last_loss": round(sum(result["losses"][-count:]) / count, 4),
            "learning_rate": tune.learning_rate, "epochs": tune.epochs, "batch": tune.batch,
        }  # fmt: skip
        if routed:
            found["top_k"] = settings.top_k or len(self.experts)
        else:
            found["anchor"] = tune.anchor
        return found

    def _rows(self) -> list[dict[str, str]]:
        return [dict(row) for expert in self.experts for row in expert.rows]

    def routing(self, mixture_folder: Path, *, rows: int = MEASURED_ROWS) -> dict[str, Any]:
        """Which expert, how often: for each domain, over the tokens of some of its rows and all half-blocks."""
        import torch

        from .engine.batch import Batch
        from .engine.mixture import load_mixture
        from .engine.model import Model
        from .engine.tokenizer import Tokenizer
        from .pipeline import load_model
        from .train.routing_share import RoutingCounter
        from .tune import encode_rows

        model = load_model(Model, self.model_path, self.dtype, self.device)
        tokenizer = Tokenizer.from_pretrained(self.model_path)
        mixture = load_mixture(mixture_folder, model)
        found: dict[str, Any] = {"experts": list(mixture.names), "top_k": mixture.top_k, "domains": {}}
        limit = min(1024, model.config.max_context)
        for expert in self.experts:
            step = max(1, len(expert.rows) // rows)
            counter, sample = RoutingCounter(mixture, model), None
            for example in encode_rows(tokenizer, [dict(row) for row in expert.rows[::step][:rows]]):
                ids = [*example.prompt_ids, *example.response_ids][:limit]
                with torch.no_grad():
                    model.forward(Batch.packed([ids], model.device), adapters=counter)
                shown = counter.take_tokens()
                if sample is None:
                    words = [tokenizer.decode([token]) for token in ids]
                    sample = [[word, *map(float, row)] for word, row in zip(words, shown.tolist(), strict=True)]
            found["domains"][expert.name] = counter.shares() | {"sample": sample}
        return found

    def score(
        self, folders: Mapping[str, Path], ledger: Ledger, *, shots: Sequence[int], limit: int | None, seed: int = 0
    ) -> dict[str, Any]:
        """Base, each domain's own expert and the composed ``folders`` on the tasks of every domain that has some."""
        from .engine.generator import Generator
        from .engine.mixture import adapter_files

        domains = [expert for expert in self.experts if expert.tasks]
        if not domains:
            return {}
        generator = Generator.from_pretrained(self.model_path, dtype=self.dtype, device=self.device)
        loaded: dict[str, str] = {}

        def name_of(folder: str | None) -> str | None:
            if folder is not None and folder not in loaded:
                loaded[folder] = generator.load_adapter(folder)
            return None if folder is None else loaded[folder]

        places = {"base": None, **{e.name: e.adapter for e in self.experts}, **folders}
        found: dict[str, Any] = {}
        for expert in domains:
            reports: dict[str, EvalReport] = {}
            count = limit if limit is not None else expert.limit
            total = sum(len(t.examples[: count or None]) for t in expert.tasks) * len(shots)
            for name, place in places.items():
                folder = None if place is None else str(place)
                identity = "base"
                if place is not None:
                    identity = " ".join(file_fingerprint(place / file) for file in sorted(adapter_files(place)))
                with self.reporter.bar(f"{expert.name}: {name}", total, "replies") as bar:
                    reports[name] = evaluate(
                        generator, expert.tasks, model=self.base_model,
                        model_identity=f"{file_fingerprint(self.model_path)} {generator.model.dtype}",
                        system=System(name, folder, identity), shots=tuple(shots), limit=count,
                        max_tokens=expert.max_tokens, ledger=ledger, seed=seed,
                        on_reply=lambda _, bar=bar: bar.advance(), adapter_name=lambda folder=folder: name_of(folder),
                    )  # fmt: skip
            against = [
                {"system": name, "against": expert.name} | compare(reports[name], reports[expert.name], count)
                for name in folders
                for count in shots
            ]
            found[expert.name] = {
                "systems": {name: report.to_json() for name, report in reports.items()},
                "comparisons": against,
            }
        return found


def compose(
    composer: Composer,
    settings: Settings,
    out: Path,
    *,
    peers: Sequence[str] = (),
    shots: Sequence[int] = (0,),
    limit: int | None = None,
    scored: bool = True,
) -> dict[str, Any]:
    """Makes ``out`` and, below ``out/peers``, what it is compared with; scores all; returns what ``mix.json`` then
    holds. Called again with the same settings it goes on where it was."""
    composer.check(settings)
    check_target(out, settings.method)
    with run_lock(out):
        made = {settings.method: composer.make(settings, out)}
        folders = {settings.method: out}
        for name in peers:
            if name == settings.method:
                continue
            folders[name] = out / "peers" / name
            made[name] = composer.make(replace(settings, method=name, lr=None, epochs=None, batch=None), folders[name])
        found: dict[str, Any] = {
            "method": settings.method,
            "base_model": composer.base_model,
            "settings": asdict(settings),
            "experts": [
                {"name": e.name, "adapter": str(e.adapter), "rows": len(e.rows), "tasks": [t.name for t in e.tasks]}
                for e in composer.experts
            ],
            "made": made,
        }
        if settings.method == "mixse":
            found["routing"] = composer.routing(out)
        if scored:
            with Ledger(out / "ledger.sqlite") as ledger:
                found["evaluation"] = composer.score(folders, ledger, shots=shots, limit=limit, seed=settings.seed)
            found["summary"] = summary(found["evaluation"], list(folders), shots[0])
        from .pipeline import write_text

        write_text(out / MIX_FILE, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
        write_page(found, out / "mix.html")
    return found


def check_target(out: Path, method: str) -> None:
    """Raises InputError where ``out`` holds something else than an earlier composition by this method."""
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: this is a file, a folder is wanted")
    for file, what in (
        ("recipe.yaml", "a run folder"),
        ("adapter_config.json" if method == "mixse" else "mixture.json", "what another method made"),
    ):
        if (out / file).exists():
            raise InputError(f"--out {out}: holds {what} ({file}); give another folder")
