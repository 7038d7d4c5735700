"""A run: its folder, its stages, and what is redone when settings change.

recipe → index → teacher → instructions → responses → filter → tune → control → evaluate → report. Each stage reads and
writes the ledger; a stage that was begun goes on, a finished one is skipped. A stage's fingerprint holds its settings
and the fingerprints of what it builds on.
"""

# pyright: reportMissingImports=false
# The sibling folders join this package when it is installed (setup.py); by path pyright cannot see them from here.
from __future__ import annotations

import json
import math
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from . import filter as rules
from . import general
from .controls import control_names
from .errors import InputError
from .evaluate import EvalReport, System, base_identity, compare, evaluate, telling_examples
from .export import model_card
from .files import survey, sweep, write_text
from .kinds import kinds_of, taken_as_text
from .ledger import Item, Ledger, run_lock
from .log import LOGGER, run_log
from .metrics import rouge_words
from .progress import Reporter
from .recipe import INPUTS, YOUNGER, Recipe, write_recipe
from .records import Example, file_fingerprint, fingerprint, read_seeds, read_tasks
from .seal import sealed_ledger
from .share import Donors
from .synthesize import ANCHOR_SAMPLES, Job, Synthesizer, anchor_jobs, anchor_texts, number_of, run_jobs
from .tune import encode, encode_grouped, encode_rows, epoch_tokens, seed_examples, train, train_config
from .workers import Spread, WorkerPool

STAGES = ("index", "teacher", "instructions", "responses", "filter", "tune", "control", "evaluate", "report")
# The teacher is the seeds-only control when its training tokens differ from the expert's by less than this share.
EQUAL_TOKENS = 0.05


class Run:
    """One run folder, opened by one process. ``execute`` brings it as far as a stage."""

    def __init__(
        self,
        folder: Path,
        recipe: Recipe,
        inputs: Mapping[str, str],
        *,
        reporter: Reporter | None = None,
        device: str = "auto",
        memory_bytes: int | None = None,
        spread: Spread | None = None,
        donors: Sequence[Path] = (),
        log_level: str = "info",
    ):
        """With ``spread`` prompts are answered by workers; training stays in this process. What the run folders
        ``donors`` hold of the same fingerprint is taken over instead of made again. ``run.log`` gets what is of
        ``log_level`` or above."""
        self.folder = folder
        self.recipe = recipe
        self.inputs = dict(inputs)
        self.reporter = reporter or Reporter()
        self.device = device
        self.memory_bytes = memory_bytes
        self.log_level = log_level
        self.seeds = read_seeds(inputs["seeds"])
        self.tasks = read_tasks(inputs["tasks"])
        self.held_out = held_out(self.seeds, recipe.holdout, recipe.seed)
        if self.held_out:
            self.seeds = [seed for seed in self.seeds if seed not in self.held_out]
        self.kinds = kinds_of(self.seeds)
        if not Path(inputs["corpus"]).exists():
            raise InputError(f"corpus: no such file or folder: {inputs['corpus']}")
        for shots in (*recipe.evaluate.shots, *recipe.evaluate.base_shots):
            for task in self.tasks:
                if shots > len(task.shots):
                    raise InputError(
                        f"task {task.name}: evaluate.shots asks for {shots}, the file has {len(task.shots)}"
                    )
        self.prints = {name: file_fingerprint(inputs[name]) for name in INPUTS}
        self.reports: dict[str, EvalReport] = {}  # of the systems, once they are evaluated
        self._donors = Donors(other for other in donors if other != folder)
        self._found = dict(self.prints)
        self._generator: Any = None
        self._pool: WorkerPool | None = None
        if spread is not None:
            self._pool = WorkerPool(
                inputs["model"], spread, dtype=recipe.dtype, device=device, quantize=recipe.quantize,
                kv_dtype=recipe.kv_dtype, memory_bytes=memory_bytes, say=self.reporter.say,
            )  # fmt: skip
        self._adapter_names: dict[str, str] = {}
        self._index: Any = None

    # stages and their fingerprints

    def stage_names(self) -> list[str]:
        """All stages of this recipe in order; from the second round on "responses-2", "filter-2", "tune-2", …"""
        recipe = self.recipe
        names = ["index"] if recipe.retrieval.mode != "off" else []
        names += ["teacher"] if recipe.teacher.enabled else []
        names.append("instructions")
        for round in range(1, recipe.rounds + 1):
            names += [_numbered(name, round) for name in ("responses", "filter", "tune")]
        return names + (["control"] if recipe.evaluate.seeds_only else [])

    def settings_of(self) -> dict[str, dict[str, Any]]:
        """What each stage depends on by itself."""
        plain, prints = self.recipe.to_dict(), self.prints
        base = {"seed": plain["seed"], "model": prints["model"], "dtype": self.recipe.dtype}
        if self.recipe.quantize != "none":
            base["quantize"] = self.recipe.quantize
        if self.recipe.kv_dtype != "auto":
            base["kv_dtype"] = self.recipe.kv_dtype
        if self.recipe.holdout:
            base["holdout"] = self.recipe.holdout
        # Nothing to runs without them, nor to the first round.
        later = {name: plain["responses"].pop(name) for name in ("contrast", "shots")}
        standard = Recipe().to_dict()
        for section, names in YOUNGER.items():
            for name in names:
                if plain[section][name] == standard[section][name]:
                    del plain[section][name]
        # Teacher and control are the seeds' alone, whether or not the expert has the seeds among its rows.
        unread = ["epochs", "teacher_epochs", "budget", "anchor", "anchor_tokens"]
        if not self._teacher_is_shown():
            unread += ["demonstrations", "few_shot"]
        tune = plain["tune"] | dict.fromkeys(unread) | {"include_seeds": True}
        found: dict[str, dict[str, Any]] = {
            "index": {"corpus": prints["corpus"], **{f"retrieval.{k}": v for k, v in plain["retrieval"].items()}},
            "teacher": base
            | {"seeds": prints["seeds"], **{f"tune.{k}": v for k, v in tune.items() if v is not None}}
            | {"tune.teacher_epochs": plain["tune"]["teacher_epochs"]},
            "instructions": base
            | {"seeds": prints["seeds"], "corpus": prints["corpus"], "examples": plain["examples"]}
            | {f"instructions.{k}": v for k, v in plain["instructions"].items()},
        }
        if self._teacher_reads():
            shown = {f"responses.{k}": plain["responses"][k] for k in ("passages", "passage_words", "passages_for")}
            found["teacher"] |= found["index"] | shown
        for round in range(1, self.recipe.rounds + 1):
            found[_numbered("responses", round)] = base | {f"responses.{k}": v for k, v in plain["responses"].items()}
            if round > 1:
                found[_numbered("responses", round)] |= {f"responses.{k}": v for k, v in later.items() if v}
            found[_numbered("filter", round)] = {
                "tasks": prints["tasks"],
                **{f"filter.{k}": v for k, v in plain["filter"].items()},
            }
            found[_numbered("tune", round)] = base | {
                f"tune.{k}": v for k, v in plain["tune"].items() if k != "teacher_epochs" and v is not None
            }
        found["control"] = {
            "seeds": prints["seeds"],
            **{k: v for k, v in found["tune"].items() if k not in ("tune.epochs", "tune.budget")},
            "tune.include_seeds": True,
        }
        return {name: found[name] for name in self.stage_names()}

    def fingerprints(self) -> dict[str, str]:
        settings = self.settings_of()
        found: dict[str, str] = {}
        for position, name in enumerate(settings):
            upstream = {other: found[other] for other in list(settings)[:position] if _builds_on(name, other)}
            found[name] = fingerprint(settings[name], upstream)
        return found

    def invalidated(self, ledger: Ledger) -> tuple[list[str], list[str]]:
        """(stages begun that the present settings would redo, the settings that differ as "name: old → new")."""
        begun, wanted, settings = ledger.stages(), self.fingerprints(), self.settings_of()
        stale = [name for name in begun if name != "evaluate" and begun[name].fingerprint != wanted.get(name)]
        changes = []
        for name in stale:
            now = settings.get(name, {})
            for key, old in begun[name].settings.items():
                if key in now and now[key] != old:
                    text = f"{key}: {_short(old)} → {_short(now[key])}"
                    if text not in changes:
                        changes.append(text)
        return stale, changes

    def _keep_older_prints(self, ledger: Ledger) -> None:
        """A run of an earlier version knows large inputs by both their ends: where these are the same, it goes on."""
        for name in INPUTS:
            told = {s.settings[name] for s in ledger.stages().values() if name in s.settings}
            if told and self.prints[name] not in told:
                older = file_fingerprint(self.inputs[name], whole=False)
                if older in told:
                    self.prints[name] = older

    def _forget(self, ledger: Ledger, stale: list[str]) -> None:
        """Delete what the stale stages made, last first."""
        for name in reversed(stale):
            stage, round = _split(name)
            if stage == "index":
                shutil.rmtree(self.folder / "index", ignore_errors=True)
            elif stage in ("teacher", "control"):
                shutil.rmtree(self.folder / stage, ignore_errors=True)
            elif stage == "tune":
                shutil.rmtree(self._round_folder(round), ignore_errors=True)
                shutil.rmtree(self.folder / "adapter", ignore_errors=True)
                ledger.record("adapter", ())
            elif stage == "filter":
                ledger.reopen(round)
            elif stage == "responses":
                ledger.delete_responses(round)
            elif stage == "instructions":
                ledger.delete_synthesis()
        ledger.forget_stages(stale)

    # opening

    @contextmanager
    def _opened(self, *, redo: bool) -> Iterator[Ledger]:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--out {self.folder}: {error.strerror}") from None
        with (
            run_lock(self.folder),
            run_log(self.folder, self.log_level),
            sealed_ledger(self.folder / "ledger.sqlite") as ledger,
        ):
            sweep(self.folder)
            self._keep_older_prints(ledger)
            stale, changes = self.invalidated(ledger)
            if stale and not redo:
                what = f" ({'; '.join(changes)})" if changes else ""
                raise InputError(
                    f"{self.folder}: the settings differ from those the run was made with{what}; this redoes "
                    f"{', '.join(stale)}. Add --redo to do so, or choose another --out"
                )
            if stale:
                self.reporter.say(
                    f"redoing {', '.join(stale)}" + (f" because of {'; '.join(changes)}" if changes else "")
                )
                self._forget(ledger, stale)
            write_recipe(self.recipe, self.inputs, self.folder / "recipe.yaml")
            ledger.record("recipe", survey(self.folder, ["recipe.yaml"]))
            yield ledger

    def execute(self, *, until: str = "report", redo: bool = False) -> dict[str, Any]:
        """Do all stages up to and including ``until``; returns what ``eval.json`` holds when that far, else counts.

        Instructions, responses and filter take turns in waves: up to one of the first two is up to that of the first
        wave."""
        if until not in STAGES:
            raise InputError(f"stage {until!r} is unknown; stages: {', '.join(STAGES)}")
        last = STAGES.index(until)
        with self._opened(redo=redo) as ledger:
            self.ledger = ledger
            if "instructions" not in ledger.stages():
                for note in filter(None, map(taken_as_text, self.kinds)):
                    self.reporter.say(note)
            try:
                for name in self.stage_names():
                    stage, round = _split(name)
                    if self._gained_nothing(round):
                        continue
                    if STAGES.index(stage) > last or (stage in ("instructions", "responses")):
                        continue  # instructions and responses interleave with the filter, in waves
                    if stage == "filter":
                        self._synthesis(round)
                    elif stage == "control":
                        self._control()
                    else:
                        self._stage(name, getattr(self, f"_do_{stage}"), round)
                if until in ("instructions", "responses"):
                    self._synthesis(1, until)
                self._publish()
                result = self.summary()
                if last >= STAGES.index("evaluate"):
                    result = self._do_evaluate()
                if last >= STAGES.index("report"):
                    self._do_report()
                if (self.folder / "adapter").is_dir() and last >= STAGES.index("tune"):
                    write_text(self.folder / "adapter" / "README.md", model_card(self.folder, result))
                    self.ledger.record("adapter", survey(self.folder, ["adapter"]))
                return result
            finally:
                self._free_generator()
                if self._pool is not None:
                    self._pool.close()

    def held_out_losses(self) -> dict[int, float]:
        """By round, the loss of the held-out seeds under the round's expert, as far as there are such."""
        stages = self.ledger.stages()
        found = {}
        for round in range(1, self.recipe.rounds + 1):
            stage = stages.get(_numbered("tune", round))
            if self.held_out and stage is not None and stage.done:
                found[round] = float(stage.info["held_out_loss"])
        return found

    def _gained_nothing(self, round: int) -> bool:
        """Whether a round is left out since the one before it was no better than its own predecessor."""
        losses = self.held_out_losses()
        tried = [r for r in range(2, round) if r in losses and losses[r] >= losses[r - 1]]
        if tried and round not in losses:
            self.reporter.say(
                f"round {round} is left out: held-out seeds' loss {losses[tried[0] - 1]:.4f} → {losses[tried[0]]:.4f} "
                f"in round {tried[0]}"
            )
        return bool(tried)

    def final_round(self) -> int:
        """The round whose expert is the run's: the best on held-out seeds, without such the last."""
        losses = self.held_out_losses()
        return min(losses, key=lambda round: (losses[round], round)) if losses else self.recipe.rounds

    def _stage(self, name: str, work: Callable[[int], dict[str, Any]], round: int) -> None:
        """Run one stage unless it is done; the time it took is kept even when it is interrupted."""
        found = self.ledger.stages().get(name)
        if found is not None and found.done:
            return
        self.ledger.begin_stage(name, self.fingerprints()[name], self.settings_of()[name])
        LOGGER.info("stage %s %s", name, "begins" if found is None else "goes on")
        started = time.monotonic()
        try:
            info = self._taken_over(name) if _split(name)[0] != "control" else None
            if info is None:
                info = work(round)
        finally:
            self.ledger.add_seconds(name, time.monotonic() - started)
        self.ledger.end_stage(name, info, survey(self.folder, [self._stage_folder(name)]))
        LOGGER.info("stage %s is done, %.1f s", name, time.monotonic() - started)

    def _taken_over(self, name: str, **accept: Any) -> dict[str, Any] | None:
        """What a donor noted of the same stage, its files brought here; None where there is none."""
        info = self._donors.take_stage(
            name, self.fingerprints()[name], self._stage_folder(name), self.folder, **accept
        )  # fmt: skip
        if info is not None:
            self.reporter.say(f"{name}: as in {info['taken_from']}")
        return info

    def _take_replies(self, stage: str, jobs: Sequence[Job]) -> None:
        """Replies to ``jobs`` that donors got under the same fingerprint; remembered, for their time is not this
        run's."""
        taken = self._donors.take_replies(self.ledger, jobs, stage, self.fingerprints()[stage]) if jobs else 0
        if taken:
            key = f"taken/{stage}"
            self.ledger.set_meta(key, self.ledger.meta(key, 0) + taken)

    def _stage_folder(self, name: str) -> str:
        """Where a stage that makes files puts them, within the run folder."""
        stage, round = _split(name)
        return str(self._round_folder(round).relative_to(self.folder)) if stage == "tune" else stage

    def _require_unchanged(self, name: str) -> None:
        """Called when an input has been read: what was read must be what this run says it is made of."""
        if file_fingerprint(self.inputs[name]) != self._found[name]:
            raise InputError(
                f"{name}: {self.inputs[name]} was changed while the run was at work; put the old one back and run the "
                "same command again, or add --redo to go on with the new one"
            )

    # shared parts

    @cached_property
    def model_path(self) -> Path:
        return Path(self.inputs["model"])

    @property
    def generator(self) -> Any:
        """The generator with the base's weights, loaded when first needed, or the workers in its place."""
        if self._generator is None:
            self._generator = self._pool if self._pool is not None else self._load_generator()
        return self._generator

    def _load_generator(self) -> Any:
        from .engine.generator import Generator
        from .engine.scheduler import EngineConfig

        self.reporter.say(f"loading {self.model_path.name}")
        generator = Generator.from_pretrained(
            self.model_path,
            dtype=self.recipe.dtype,
            device=self.device,
            config=EngineConfig(memory_bytes=self.memory_bytes, kv_dtype=self.recipe.kv_dtype),
            quantize=self.recipe.quantize,
        )
        self._require_unchanged("model")
        return generator

    def _free_generator(self) -> None:
        if self._pool is not None:
            self._pool.release()
        self._generator, self._adapter_names = None, {}

    def _adapter_name(self, folder: str | None) -> str | None:
        """The name under which the generator knows an adapter folder, loaded when first asked for."""
        if folder is None:
            return None
        if folder not in self._adapter_names:
            self._adapter_names[folder] = self.generator.load_adapter(folder)
        return self._adapter_names[folder]

    def embedder(self) -> Any:
        if self.recipe.retrieval.mode == "bm25":
            return None
        return load_embedder(self.recipe.retrieval.embedder)

    @property
    def index(self) -> Any:
        if self.recipe.retrieval.mode == "off":
            return None
        if self._index is None:
            from .retrieval.index import Index

            self._index = Index.load(self.folder / "index", self.embedder())
        return self._index

    @cached_property
    def synthesizer(self) -> Synthesizer:
        from .retrieval.corpus import read_corpus

        overlap = rules.EvaluationOverlap(self.tasks, self.recipe.filter.overlap_words)
        documents = list(read_corpus(self.inputs["corpus"]))
        self._require_unchanged("corpus")
        if not documents:
            raise InputError(f"corpus: {self.inputs['corpus']} holds no documents")
        index = self.index
        embed = None
        if index is not None and self.recipe.retrieval.mode in ("dense", "hybrid"):
            encoder = self.embedder()
            embed = encoder.embed

        def remember(key: str, make: Callable[[], Any]) -> Any:
            if self.ledger.meta(key) is None:
                self.ledger.set_meta(key, make())
            return self.ledger.meta(key)

        return Synthesizer(
            self.recipe, self.kinds, documents, index=index, overlap=overlap, embed=embed, remember=remember
        )

    def _round_folder(self, round: int) -> Path:
        return self.folder / "rounds" / str(round)

    def _teacher_of(self, round: int) -> str | None:
        """The adapter that answers in a round: the expert of the round before, first the seeds-tuned teacher."""
        if round > 1:
            return str(self._round_folder(round - 1))
        return str(self.folder / "teacher") if self.recipe.teacher.enabled else None

    # stages

    def _do_index(self, _: int) -> dict[str, Any]:
        from .plans import index_memory
        from .retrieval.index import Index

        settings = self.recipe.retrieval
        with self.reporter.bar("index") as bar:

            def show(stage: str, done: int, total: int) -> None:
                bar.unit = stage
                bar.set(done, total=total)

            index = Index.build(
                self.inputs["corpus"],
                self.folder / "index",
                self.embedder(),
                max_words=settings.chunk_words,
                overlap_words=settings.overlap_words,
                available_bytes=index_memory(self.memory_bytes),
                progress=show,
            )
        try:
            self._require_unchanged("corpus")
        except InputError:
            shutil.rmtree(self.folder / "index", ignore_errors=True)  # it would be taken for one of the old corpus
            raise
        self._index = index
        info: dict[str, Any] = {"passages": len(index)}
        if settings.mode != "bm25":
            info["recall_at_10"] = round(index.manifest.recall_at_10 or 0.0, 4)
        return info

    def _train(
        self,
        label: str,
        examples: list[Example],
        epochs: float,
        out: Path,
        more: Sequence[dict[str, str]] = (),
        anchored: bool = True,
        grouped: bool = True,
    ) -> dict[str, Any]:
        from .engine.model import Model
        from .engine.tokenizer import Tokenizer

        tokenizer = Tokenizer.from_pretrained(self.model_path)
        anchors = [list(tokenizer.encode(text)) for text in self._anchor_texts()] if anchored else []
        self._free_generator()  # one copy of the weights at a time
        model = load_model(Model, self.model_path, self.recipe.dtype, self.device, self.recipe.quantize)
        self._require_unchanged("model")
        settings = self.recipe.tune
        seed = number_of(self.recipe.seed, "tune", bits=31)
        rows = encode(tokenizer, examples)
        passed_on = encode_rows(tokenizer, more) if more else []
        count = len(rows) + len(passed_on)
        per_epoch = epoch_tokens(rows + passed_on)
        if epochs <= 0:  # a budget in tokens, given as minus their number
            epochs = -epochs / per_epoch
        passes = 1
        if grouped and settings.demonstrations:
            passes = math.ceil(epochs)  # each in other groups, so all of them are one epoch of the loop
            rows = encode_grouped(
                tokenizer,
                examples,
                demonstrations=settings.demonstrations,
                few_shot=settings.few_shot,
                max_length=min(settings.max_length, model.config.max_context),
                seed=seed,
                passes=passes,
            )
        rows += passed_on * passes
        config = train_config(
            settings,
            epochs=epochs / passes,
            seed=seed,
            max_context=model.config.max_context,
            memory_bytes=self.memory_bytes,
            **({} if anchored else {"anchor": 0.0}),
        )
        with self.reporter.bar(label, unit="tokens") as bar:

            def show(step: Any) -> None:
                bar.set(
                    step.tokens_done,
                    f"step {step.step}/{step.num_steps}, loss {step.loss:.3f}",
                    total=round(per_epoch * epochs),
                )

            found = _Counter(show)
            result = train(
                model, rows, config, out, base_model=str(self.inputs["model"]), on_step=found, anchors=anchors,
                val_examples=encode(tokenizer, seed_examples(self.held_out)) if self.held_out else None,
            )  # fmt: skip
        if self.held_out:  # the loss of the weights that were kept
            by_step = dict(result["val_losses"])
            result["held_out_loss"] = by_step[result["steps"] if result["best_step"] is None else result["best_step"]]
        result |= {"epochs": epochs, "rows": count, "learning_rate": config.learning_rate, "rank": config.rank}
        return result

    def _anchor_texts(self) -> list[str]:
        """Texts that the base writes from the openings."""
        if not self.recipe.tune.anchor:
            return []
        jobs = anchor_jobs(self.recipe)
        with self.reporter.bar("anchor texts", len(jobs) * ANCHOR_SAMPLES) as bar:
            run_jobs(self.generator, jobs, self.ledger, origin=self._origin(None), on_reply=lambda _: bar.advance())
        return anchor_texts(self.recipe, self.ledger)

    def _do_teacher(self, _: int) -> dict[str, Any]:
        more = self.synthesizer.seed_rows_with_passages() if self._teacher_reads() else []
        epochs = self.recipe.tune.teacher_epochs
        # What the teacher forgets of other text does not matter: it only answers.
        info = self._train(
            "teacher", seed_examples(self.seeds), epochs, self.folder / "teacher", more, anchored=False,
            grouped=self._teacher_is_shown(),
        )  # fmt: skip
        return info | {"rows_with_passages": len(more)}

    def _teacher_is_shown(self) -> bool:
        """Whether the teacher answers with demonstrations in view. Otherwise rows in groups, which make fewer steps of
        the few seeds, would only cost it: 60.3 → 58.8 token F1, and the rows with it."""
        return self.recipe.responses.demonstrations > 0

    def _teacher_reads(self) -> bool:
        """Whether the teacher is tuned on seeds with passages, too, because answers will be written with them."""
        recipe = self.recipe
        return recipe.retrieval.mode != "off" and recipe.responses.passages > 0 and any(k.open_book for k in self.kinds)

    def _synthesis(self, round: int, until: str = "filter") -> None:
        """Instructions, responses and filter of one round, in waves until enough rows are kept.

        Whether there is a second wave follows from the filter; so up to an earlier stage is up to that of the first.
        """
        ledger, stages_here = self.ledger, ("instructions", "responses", "filter")
        names = [_numbered(n, round) for n in stages_here[: stages_here.index(until) + 1]]
        names = names if round == 1 else names[1:]
        stages = ledger.stages()
        if all(name in stages and stages[name].done for name in names):
            return
        prints, settings = self.fingerprints(), self.settings_of()
        for name in names:
            ledger.begin_stage(name, prints[name], settings[name])
        clock = _Clock(ledger)
        maker = self.synthesizer
        kept: dict[str, int] = {}
        if round > 1:
            self._carry_over(round)
        for wave in range(self.recipe.instructions.max_waves if round == 1 else 1):
            if round == 1:
                targets = maker.targets()
                missing = {source: targets[source] - kept.get(source, 0) for source in targets}
                if wave > 0 and sum(kept.values()) >= self.recipe.examples:
                    break
                with clock.of("instructions"):
                    if not self._draft(wave, missing) and wave > 0:
                        break
            if until == "instructions":
                self.reporter.say(f"{len(ledger.items(round=1, wave=0))} candidates drafted in the first wave")
                return
            with clock.of(_numbered("responses", round)):
                self._respond(round, wave)
            if until == "responses":
                self.reporter.say(f"{len(ledger.items(round=1, wave=0))} candidates of the first wave answered")
                return
            with clock.of(_numbered("filter", round)):
                judged = self._judge(round, through=wave)
                kept = {}
                for item, verdict, _, _ in judged:
                    if verdict.kept:
                        source = item.id.split("-")[1]
                        kept[source] = kept.get(source, 0) + 1
        with clock.of(_numbered("filter", round)):
            judged = maker.select(self._judge(round))
            ledger.decide(
                (item.id, "kept" if v.kept else "rejected", v.reason, v.detail, answer, score)
                for item, v, answer, score in judged
            )
            self._write_dataset(round)
        counts = ledger.counts(round)
        if not counts.get("kept"):
            raise InputError(
                f"round {round}: no candidate passed the filter; the commonest reason: "
                f"{next(iter(ledger.reasons(round)), 'none')}. The ledger {ledger.path} holds every reply"
            )
        if counts["kept"] < self.recipe.examples:
            self.reporter.say(
                f"round {round}: kept {counts['kept']} of the {self.recipe.examples} wanted; candidates ran out"
            )
        for name in names:
            if name.startswith("filter"):
                info = {"counts": counts, "reasons": ledger.reasons(round)}
                ledger.end_stage(name, info, survey(self.folder, ["dataset.jsonl"]))
            else:
                ledger.end_stage(name, {})
        self.reporter.say(
            f"round {round}: {sum(counts.values())} candidates, {counts['kept']} kept; rejected: "
            + (", ".join(f"{n} {reason}" for reason, n in ledger.reasons(round).items()) or "none")
        )

    def _draft(self, wave: int, missing: dict[str, int]) -> int:
        """Make the candidates of a wave; returns how many it has. The plan is fixed when the wave begins."""
        ledger, maker = self.ledger, self.synthesizer
        key = f"wave-{wave}"
        plan = self._wave_plan(wave)
        if plan is None:
            starts = dict.fromkeys(missing, 0)
            for earlier in range(wave):
                for source, (_, stop) in (self._wave_plan(earlier) or {}).items():
                    starts[source] = max(starts.get(source, 0), stop)
            plan = {s: (starts[s], starts[s] + n) for s, n in maker.plan_wave(wave, missing).items()}
            ledger.set_meta(key, plan)
        have = ledger.item_ids(round=1)
        direct, jobs, num_direct = [], {}, 0
        for source, (start, stop) in plan.items():
            items, asked = maker.draft_jobs(wave, source, range(start, stop))
            direct += [item for item in items if item.id not in have]
            num_direct += len(items)  # those that a killed process had written are still to be answered
            jobs[source] = asked
        with ledger.transaction():
            ledger.add_items(direct)
        asked = [job for source in jobs for job in jobs[source]]
        todo = [job for job in asked if job.item_id not in have]
        self._take_replies("instructions", todo)
        if todo:
            with self.reporter.bar(
                "instructions" if wave == 0 else f"instructions (wave {wave + 1})", len(todo)
            ) as bar:
                # Instructions are the base's own; the seeds-tuned model writes what belongs to the seeds' kinds.
                for purpose, writer in (("instruction", None), ("input", self._teacher_of(1))):
                    mine = [job for job in todo if job.purpose == purpose]
                    done = ledger.reply_ids(purpose)
                    mine = [job for job in mine if job.reply_id(0) not in done]
                    if mine:
                        mine = [replace(job, adapter=self._adapter_name(writer)) for job in mine]
                        run_jobs(
                            self.generator, mine, ledger, origin=self._origin(writer), on_reply=lambda _: bar.advance()
                        )
        for source, mine in jobs.items():
            if not mine:
                continue
            purpose = mine[0].purpose
            replies = ledger.replies(purpose, [job.item_id for job in mine])
            dedupe = rules.NearDuplicates(self.recipe.filter.rouge_l, {seed.instruction for seed in self.seeds})
            if source == "novel":
                # Instructions kept in earlier waves are part of the pool; items come in the order of their ids.
                for item in ledger.items(round=1):
                    if (
                        item.source == "novel"
                        and item.wave < wave
                        and (item.status != "rejected" or self._was_answered(item))
                    ):
                        dedupe.add(item.instruction)
            ordered = [replies[job.item_id][0] for job in mine if job.item_id in replies]
            with ledger.transaction():
                ledger.add_items(maker.drafted(wave, source, ordered, dedupe))
        return sum(stop - start for start, stop in plan.values()) if num_direct or asked else 0

    def _wave_plan(self, wave: int) -> dict[str, Any] | None:
        """By source, the first number of a wave's candidates and the one after the last; None before it has begun."""
        plan = self.ledger.meta(f"wave-{wave}")
        sources = set(self.synthesizer.targets())
        if plan is not None and not (
            isinstance(plan, dict)
            and plan.keys() <= sources
            and all(isinstance(p, list) and len(p) == 2 and {type(n) for n in p} == {int} for p in plan.values())
        ):
            raise InputError(
                f"{self.ledger.path}: the ledger is damaged (the plan of wave {wave + 1} is none); choose another "
                "--out folder"
            )
        return plan

    def _origin(self, adapter: str | None) -> dict[str, Any]:
        return {"model": str(self.inputs["model"]), "adapter": adapter}

    def _carry_over(self, round: int) -> None:
        """The candidates of round 1 that were answered stand again, to be answered by the better model."""
        items = [i for i in self.ledger.items(round=1) if self._was_answered(i)]
        with self.ledger.transaction():
            self.ledger.add_items(
                replace(
                    item,
                    id=f"r{round}-" + item.id.split("-", 1)[1],
                    round=round,
                    wave=0,
                    status="new",
                    reason="",
                    detail="",
                    output="",
                    score=None,
                    provenance=item.provenance | {"from": item.id},
                )
                for item in items
            )

    @staticmethod
    def _was_answered(item: Item) -> bool:
        return item.status == "kept" or item.score is not None

    def _respond(self, round: int, wave: int) -> None:
        ledger, maker = self.ledger, self.synthesizer
        items = [i for i in ledger.items(round=round, wave=wave) if i.status == "new" or self._was_answered(i)]
        teacher = self._teacher_of(round)
        jobs = maker.response_jobs(items, None, round)
        self._take_replies(_numbered("responses", round), jobs)
        done = ledger.reply_ids("response")
        waiting = [job for job in jobs if any(job.reply_id(n) not in done for n in range(job.params.n))]
        if not waiting:
            return
        name = self._adapter_name(teacher)
        per_item = maker.answers_each(round)
        by_id = {item.id: item for item in items}
        got = ledger.replies("response", by_id)
        passing = sum(
            1 for i, replies in got.items() if len(replies) == per_item and maker.judge(by_id[i], replies)[0].kept
        )
        label = "responses" if round == 1 else f"responses (round {round})"
        with self.reporter.bar(label, len(items), "items") as bar:
            finished = sum(len(replies) == per_item for replies in got.values())
            bar.already(finished)

            def count(reply: Any) -> None:
                nonlocal finished, passing
                replies = got.setdefault(reply.item_id, [])
                replies.append(reply)
                if len(replies) == per_item:
                    finished += 1
                    replies.sort(key=lambda r: r.sample)
                    passing += maker.judge(by_id[reply.item_id], replies)[0].kept
                    bar.set(finished, f"{passing} pass the filter")

            waiting = [replace(job, adapter=name) for job in waiting]
            if round > 1 and (contrast := self.recipe.responses.contrast):
                waiting = [
                    replace(
                        j, params=replace(j.params, contrast=contrast), provenance=j.provenance | {"contrast": contrast}
                    )
                    for j in waiting
                ]
            run_jobs(self.generator, waiting, ledger, origin=self._origin(teacher), on_reply=count)

    def _judge(self, round: int, through: int | None = None) -> list[tuple[Item, Any, str, float]]:
        """Verdicts on the answered candidates of a round's waves, up to ``through``: a killed process may have left
        later ones with a part of their answers, and whether a wave is needed follows from those before it alone."""
        items = [
            item
            for item in self.ledger.items(round=round)
            if (item.status == "new" or self._was_answered(item)) and (through is None or item.wave <= through)
        ]
        replies = self.ledger.replies("response", [i.id for i in items])
        judged = []
        inputs = set()
        for item in items:
            verdict, answer, score = self.synthesizer.judge(item, replies.get(item.id, []))
            key = (item.instruction, " ".join(rouge_words(item.input)))
            if verdict.kept and key in inputs and self.recipe.filter.enabled:
                verdict = rules.Verdict(False, rules.NEAR_DUPLICATE, "same instruction and input")
            if verdict.kept:
                inputs.add(key)
            judged.append((item, verdict, answer, score))
        return judged

    def examples(self, round: int) -> list[Example]:
        """The kept rows of a round, with their provenance."""
        kept = self.ledger.items(round=round, status="kept")
        replies = self.ledger.replies("response", [item.id for item in kept])
        found = []
        for item in kept:
            first = replies.get(item.id)
            trail = dict(item.provenance) | {"agreement": item.score}
            if first:
                origin = first[0].provenance
                trail |= {k: origin[k] for k in ("model", "adapter", "passages", "seed") if k in origin}
                trail["demonstrations"] = origin.get("seeds", [])
            found.append(Example(item.id, item.source, item.kind, item.instruction, item.input, item.output, trail))
        return found

    def _write_dataset(self, round: int) -> None:
        """``dataset.jsonl``: the kept rows of the last filtered round, written whole or not at all."""
        rows = [
            {"id": e.id, "instruction": e.instruction, "input": e.input, "output": e.output, "task": e.kind}
            | {"provenance": e.provenance | {"source": e.source}}
            for e in self.examples(round)
        ]
        write_text(self.folder / "dataset.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    def _do_tune(self, round: int) -> dict[str, Any]:
        settings = self.recipe.tune
        examples = self.examples(round)
        if settings.include_seeds:
            examples = seed_examples(self.seeds) * settings.seed_repeat + examples
        epochs = settings.epochs
        if settings.budget == "teacher" and self.recipe.teacher.enabled:
            epochs = -float(self.ledger.stages()["teacher"].info["tokens"])
        label = "tune" if self.recipe.rounds == 1 else f"tune (round {round})"
        info = self._train(label, examples, epochs, self._round_folder(round))
        overlap = rules.EvaluationOverlap(self.tasks, self.recipe.filter.overlap_words)
        info["contamination"] = overlap.report(examples)
        return info

    def _publish(self) -> None:
        """``adapter/`` is the final round's adapter, without the training state."""
        round = self.final_round()
        target, temporary = self.folder / "adapter", self.folder / "adapter.tmp"
        stage = self.ledger.stages().get(_numbered("tune", round))
        if stage is None or not stage.done:
            return
        if target.is_dir() and _adapter_identity(str(target)) == _adapter_identity(str(self._round_folder(round))):
            if "adapter" not in self.ledger.artefacts():  # killed between the two, or made by an older version
                self.ledger.record("adapter", survey(self.folder, ["adapter"]))
            return
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copy2(self._round_folder(round) / name, temporary / name)
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
        self.ledger.record("adapter", survey(self.folder, ["adapter"]))

    def _control(self) -> None:
        """Make the control unless there is one of the right number of tokens (another round may have changed it)."""
        stages = self.ledger.stages()
        wanted = float(stages[_numbered("tune", self.final_round())].info["tokens"])
        have = stages.get("control")
        if have is not None and have.done and abs(have.info["wanted_tokens"] - wanted) > EQUAL_TOKENS * wanted:
            shutil.rmtree(self.folder / "control", ignore_errors=True)
            self.ledger.forget_stages(["control"])
        self._stage("control", self._do_control, 1)

    def _do_control(self, _: int) -> dict[str, Any]:
        """The base tuned on the seeds alone for as many tokens as the expert; the teacher itself if it had as many."""
        stages = self.ledger.stages()
        wanted = float(stages[_numbered("tune", self.final_round())].info["tokens"])
        teacher = stages.get("teacher")
        if (
            teacher is not None
            and not teacher.info.get("rows_with_passages")
            and not self.recipe.tune.anchor
            and (self._teacher_is_shown() or not self.recipe.tune.demonstrations)
            and abs(teacher.info["tokens"] - wanted) <= EQUAL_TOKENS * wanted
        ):
            found = teacher.info | {"same_as": "teacher"}
        elif taken := self._taken_over(
            "control", accept=lambda info: info.get("wanted_tokens") == wanted and "same_as" not in info
        ):
            found = taken
        else:
            found = self._train("control (seeds alone)", seed_examples(self.seeds), -wanted, self.folder / "control")
        return found | {"wanted_tokens": wanted}

    def systems(self) -> list[System]:
        """What is scored, where it exists: base, teacher if asked for, seeds-only control, each round's expert."""
        stages = self.ledger.stages()
        found = [System("base", None, "base", "base")]
        done = {name: stages[name].info for name in ("teacher", "control") if name in stages and stages[name].done}
        controls = {}
        if self.recipe.evaluate.teacher and "teacher" in done and done.get("control", {}).get("same_as") != "teacher":
            controls["teacher"] = str(self.folder / "teacher")
        if "control" in done:
            same = done["control"].get("same_as") == "teacher"
            controls["seeds"] = str(self.folder / ("teacher" if same else "control"))
        labels = control_names([self.recipe.tune.teacher_epochs] if "teacher" in controls else [])
        found += [System(name, path, _adapter_identity(path), labels[name]) for name, path in controls.items()]
        for round in range(1, self.recipe.rounds + 1):
            stage = stages.get(_numbered("tune", round))
            if stage is None or not stage.done:
                continue
            folder = str(self._round_folder(round))
            last = round == self.final_round()
            name = "expert" if last else f"round {round}"
            found.append(System(name, folder, _adapter_identity(folder), name))
        return found

    def _do_evaluate(self) -> dict[str, Any]:
        settings = self.recipe.evaluate
        started = time.monotonic()
        self.ledger.begin_stage("evaluate", "", {})
        reports: dict[str, EvalReport] = {}
        systems = self.systems()
        counts = [len(t.examples[: settings.limit or None]) for t in self.tasks]
        recipe = self.recipe
        identity = base_identity(self.prints["model"], recipe.dtype, recipe.quantize, recipe.kv_dtype)
        for system in systems:
            shots = tuple(dict.fromkeys((*settings.shots, *(settings.base_shots if system.name == "base" else ()))))
            with self.reporter.bar(f"evaluate {system.label}", sum(counts) * len(shots), "replies") as bar:
                reports[system.name] = evaluate(
                    self.generator,
                    self.tasks,
                    model=str(self.inputs["model"]),
                    model_identity=identity,
                    system=system,
                    shots=shots,
                    limit=settings.limit,
                    max_tokens=settings.max_tokens,
                    ledger=self.ledger,
                    seed=self.recipe.seed,
                    on_reply=lambda _, bar=bar: bar.advance(),
                    adapter_name=lambda system=system: self._adapter_name(system.adapter),
                    before=lambda jobs: self._donors.take_replies(self.ledger, jobs),
                )
        self.reports = reports
        found = self._summarise(reports)
        if settings.general:
            found["general"] = self._off_domain(systems, identity)
        write_text(self.folder / "eval.json", json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False))
        self.ledger.record("evaluate", survey(self.folder, ["eval.json"]))
        self.ledger.add_seconds("evaluate", time.monotonic() - started)
        return found

    def _off_domain(self, systems: list[System], identity: str) -> dict[str, Any]:
        """Perplexity on general text and scores on general tasks, so that forgetting is seen."""
        with self.reporter.bar("evaluate off the domain", general.num_replies(len(systems)), "replies") as bar:

            def losses(system: System, texts: Sequence[str]) -> Any:
                def make() -> Any:
                    if self._pool is not None and self._generator is self._pool:  # workers answer, they do not score
                        self._free_generator()
                        self._generator = self._load_generator()
                    return general.text_losses(self.generator, texts, adapter=self._adapter_name(system.adapter))

                return general.remembered_losses(
                    self.ledger, (identity, system.identity), texts, make, self._donors.meta
                )

            return general.off_domain(
                self.generator,
                systems,
                losses,
                model=str(self.inputs["model"]),
                model_identity=identity,
                ledger=self.ledger,
                seed=self.recipe.seed,
                on_reply=lambda _: bar.advance(),
                adapter_name=lambda system: self._adapter_name(system.adapter),
                before=lambda jobs: self._donors.take_replies(self.ledger, jobs),
            )

    def _summarise(self, reports: dict[str, EvalReport]) -> dict[str, Any]:
        """``eval.json``: the expert's scores on top as in a plain evaluation, then every system and the comparisons."""
        top = reports.get("expert") or next(reversed(list(reports.values())))
        adapter = self.folder / "adapter"
        found = top.to_json() | {"adapter": str(adapter) if "expert" in reports and adapter.is_dir() else top.adapter}
        found["systems"] = {name: report.to_json() for name, report in reports.items()}
        comparisons = []
        for one, other in (("expert", "base"), ("expert", "teacher"), ("expert", "seeds"), ("seeds", "base")):
            if one in reports and other in reports:
                for shots in self.recipe.evaluate.shots:
                    for metric in ("token_f1", "entity_f1", "rouge_l"):
                        row = compare(reports[one], reports[other], shots, metric)
                        comparisons.append({"system": one, "against": other} | row)
        mover = next(
            (c["largest_mover"] for c in comparisons if c["against"] == "base" and c["system"] == "expert"), None
        )
        if mover and len(self.tasks) > 1:
            found["largest_mover"] = mover
            for name, report in reports.items():
                found["systems"][name]["means_without_largest_mover"] = [
                    {"shots": shots, "metric": "token_f1"}
                    | dict(zip(("value", "low", "high"), report.mean(shots, "token_f1", without=mover), strict=True))
                    for shots in sorted({s.shots for s in report.scores})
                ]
        found["comparisons"] = comparisons
        setting: dict[str, Any] = {
            "seeds": len(self.seeds),
            "kinds": [kind.name for kind in self.kinds],
            "tasks": [{"name": t.name, "metric": t.metric, "examples": len(t.examples)} for t in self.tasks],
        }
        if "teacher" in reports:
            setting["teacher_epochs"] = self.recipe.tune.teacher_epochs
        found["setting"] = setting
        if {"base", "expert"} <= set(reports):
            shots = self.recipe.evaluate.shots[0]
            found["examples"] = telling_examples(reports["expert"], reports["base"], self.tasks, shots)
        losses = self.held_out_losses()
        if len(losses) > 1:
            found["rounds"] = {
                "held_out_loss": {str(round): loss for round, loss in losses.items()},
                "taken": self.final_round(),
                "wanted": self.recipe.rounds,
            }
        stage = self.ledger.stages().get(_numbered("tune", self.final_round()))
        if stage is not None:
            found["contamination"] = stage.info.get("contamination", {})
        return found

    def _do_report(self) -> None:
        from .report import write_report

        write_report(self.folder)
        self.ledger.record("report", survey(self.folder, ["report.html"]))

    def summary(self) -> dict[str, Any]:
        """Where the run stands: stages and counts."""
        stages = self.ledger.stages()
        return {
            "run": str(self.folder),
            "stages": {name: {"done": s.done, "seconds": round(s.seconds, 1)} for name, s in stages.items()},
            "items": self.ledger.counts(),
            "rejected": self.ledger.reasons(),
        }


def rewrite_report(folder: Path) -> Path:
    """Write a run's report anew and record it. Raises InputError when there is nothing to report, or a run is at work
    in the folder: that writes its own."""
    from .report import write_report

    if not (folder / "ledger.sqlite").is_file():
        raise InputError(f"{folder} is no run folder (no ledger.sqlite)")
    with run_lock(folder), sealed_ledger(folder / "ledger.sqlite") as ledger:
        path = write_report(folder)
        ledger.record("report", survey(folder, ["report.html"]))
    return path


class _Counter:
    """Adds up the tokens of the steps for the progress bar."""

    def __init__(self, show: Callable[[Any], None]):
        self.show, self.tokens = show, 0

    def __call__(self, step: Any) -> None:
        self.tokens += step.tokens
        self.show(_Step(step.step, step.num_steps, step.loss, self.tokens))


@dataclass(frozen=True)
class _Step:
    step: int
    num_steps: int
    loss: float
    tokens_done: int


class _Clock:
    """Books time to stages as it passes."""

    def __init__(self, ledger: Ledger):
        self.ledger = ledger

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self.ledger.add_seconds(name, time.monotonic() - started)


def held_out(seeds: Sequence[Any], share: float, seed: int) -> list[Any]:
    """``share`` of each kind's seeds, rounded, but at least one and never all; none of a kind with a single seed."""
    found = []
    by_kind: dict[str, list[Any]] = {}
    for row in seeds:
        by_kind.setdefault(row.kind, []).append(row)
    for kind, rows in by_kind.items():
        if share and len(rows) > 1:
            count = min(max(1, round(share * len(rows))), len(rows) - 1)
            found += random.Random(number_of(seed, "holdout", kind)).sample(rows, count)
    return found


def _numbered(stage: str, round: int) -> str:
    return stage if round == 1 else f"{stage}-{round}"


def _split(name: str) -> tuple[str, int]:
    stage, _, number = name.partition("-")
    return stage, int(number or 1)


def _builds_on(name: str, other: str) -> bool:
    """Whether stage ``name`` uses what stage ``other`` made."""
    stage, round = _split(name)
    before, its_round = _split(other)
    if stage in ("index", "teacher", "control"):  # the control's number of tokens is looked at when it is made
        return False
    if stage == "instructions":
        return before in ("index", "teacher")
    order = ("responses", "filter", "tune")
    if before in order:
        return its_round < round or order.index(before) < order.index(stage)
    return True


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:23] + "…"


def _adapter_identity(folder: str) -> str:
    return file_fingerprint(Path(folder) / "adapter_model.safetensors")


def load_embedder(name: str) -> Any:
    """The sentence embedder of a folder or fetch name, in the dtype that this machine is fastest in."""
    from .engine.embedder import Embedder
    from .engine.generator import choose_device, choose_dtype
    from .fetch import model_path

    device = choose_device("auto")
    return Embedder.from_pretrained(model_path(name), dtype=choose_dtype("auto", device), device=device)


def load_model(
    model_class: Any, path: Path, dtype: str, device: str, quantize: str | None = None, keeper: Any = None
) -> Any:
    """The base for training; a ``keeper`` gets its layers as they are loaded."""
    from .engine.generator import choose_device, choose_dtype

    chosen = choose_device(device)
    return model_class.from_pretrained(
        path, dtype=choose_dtype(dtype, chosen), device=chosen, inference=False, quantize=quantize, keeper=keeper
    )
