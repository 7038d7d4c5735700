# pyright: reportMissingImports=false
# The sibling folders join this package when it is installed (setup.py); by path pyright cannot see them from here.
"""The command line: options to function calls, errors to one line and an exit code. Commands import torch."""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from . import __version__
from .errors import InputError
from .progress import Reporter

DISK_FULL = 28  # errno.ENOSPC
INTERRUPTED, TERMINATED = 130, 143


@dataclass(frozen=True)
class Common:
    """The options every command has."""

    dtype: str
    device: str
    threads: int | None
    quiet: bool
    as_json: bool

    @property
    def reporter(self) -> Reporter:
        return Reporter(quiet=self.quiet)

    def prepare(self) -> Common:
        """Set the number of threads: --threads, else OMP_NUM_THREADS, else what the container allows. Imports torch."""
        import torch

        from .engine.control_groups import usable_cpus

        if self.threads is not None:
            torch.set_num_threads(self.threads)
        elif not os.environ.get("OMP_NUM_THREADS"):  # torch reads it by itself
            torch.set_num_threads(min(torch.get_num_threads(), usable_cpus()))
        return self

    def show(self, result: Any, text: str | Callable[[], str]) -> None:
        """The result on standard output: JSON where asked for, else text."""
        click.echo(
            json.dumps(result, indent=1, ensure_ascii=False) if self.as_json else (text() if callable(text) else text)
        )


def common(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options that mean the same everywhere; the command receives them as ``common``."""

    @click.option(
        "--dtype",
        type=click.Choice(["auto", "fp32", "bf16", "fp16"]),
        default="auto",
        show_default=True,
        help="Number format of the model's weights.",
    )
    @click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
    @click.option(
        "--threads",
        type=click.IntRange(1),
        help="CPU threads.  [default: OMP_NUM_THREADS, else all that may be used]",
    )
    @click.option("--quiet", is_flag=True, help="Plain lines instead of progress bars.")
    @click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
    @click.option("--offline", is_flag=True, help="Fetch nothing; SPECIALIZE_OFFLINE=1 does the same.")
    @click.option("--debug", is_flag=True, help="Show the traceback of an unexpected error.")
    @functools.wraps(function)
    def wrapped(
        *args: Any,
        dtype: str,
        device: str,
        threads: int | None,
        quiet: bool,
        as_json: bool,
        offline: bool,
        debug: bool,
        **kwargs: Any,
    ) -> Any:
        from .fetch import offline as without_network

        with without_network(offline):
            return function(*args, common=Common(dtype, device, threads, quiet, as_json), **kwargs)

    return wrapped


class Commands(click.Group):
    """Lists commands in the order of a user's work, not of the alphabet."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="specialize")
@click.option("--offline", is_flag=True, help="No command fetches anything; SPECIALIZE_OFFLINE=1 does the same.")
@click.pass_context
def cli(context: click.Context, offline: bool) -> None:
    """Turn a general language model into a domain expert: about eighty seed tasks and unlabelled text in, a tuned
    adapter and an honest before/after table out.

    \b
    A first run, with a 135M model that fits a laptop:
      specialize fetch smollm2-135m-instruct
      specialize run --model smollm2-135m-instruct --seeds seeds.jsonl \\
                     --corpus corpus.jsonl --tasks tasks/ --out my-run
      specialize chat --model smollm2-135m-instruct --adapter my-run/adapter

    A MODEL is a Hugging Face folder, a .gguf file, or a name that `specialize fetch` knows.
    Exit codes: 0 done, 1 failure, 2 wrong usage or input, 130 interrupted, 143 terminated (the same command resumes).
    """
    from .fetch import offline as without_network

    context.with_resource(without_network(offline))


model_option = click.option("--model", required=True, help="Model folder, .gguf file or fetch name.")
quantize_option = click.option(
    "--quantize",
    metavar="FORMAT",
    help="Hold the linear weights in nf4, int8 or fp8; with +head (int8+head) the output projection, too.",
)


def _parse_memory(_: Any, __: Any, text: str | None) -> int | None:
    from .engine.memory import parse_bytes

    return None if text is None else parse_bytes(text)


memory_option = click.option(
    "--memory",
    "memory_bytes",
    metavar="SIZE",
    callback=_parse_memory,
    help="Cap for all that this process takes of the device (on a CPU: of the machine), such as 24GB.",
)
kv_dtype_option = click.option(
    "--kv-dtype",
    type=click.Choice(["auto", "fp32", "bf16", "fp16", "int8", "fp8"]),
    help="What the KV cache holds: 8 bits a number for half the memory.  [default: the dtype]",
)
adapter_option = click.option(
    "--adapter", type=click.Path(), help="Adapter folder, as PEFT writes it, or what `specialize compose` wrote."
)


def worker_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds --workers and --ray; the command receives ``workers`` and ``ray``, both None where not given."""
    function = click.option("--ray", metavar="ADDRESS", help="Spread prompts over this Ray cluster.")(function)
    return click.option(
        "--workers", type=click.IntRange(1), help="Spread prompts over this many processes, one a GPU, by Ray."
    )(function)


def input_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds what a run is made from: --model, --seeds, --corpus, --tasks."""
    for option in (
        click.option("--tasks", help="Evaluation task file or folder of them."),
        click.option("--corpus", help="JSONL, folder of .txt/.md, Parquet or PubMed XML."),
        click.option("--seeds", help='JSONL of {"instruction", "input", "output", "task"?}.'),
        click.option("--model", help="Model folder, .gguf file or fetch name."),
    ):
        function = option(function)
    return function


def size_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the settings that have options of their own: --examples, --rounds, --seed."""
    for option in (
        click.option("--seed", type=int, help="Random seed of everything."),
        click.option("--rounds", type=click.IntRange(1), help="Rounds of answering and tuning."),
        click.option("--examples", type=click.IntRange(1), help="Synthetic rows to keep."),
    ):
        function = option(function)
    return function


def _spread(common: Common, workers: int | None, ray: str | None) -> Any:
    """What --workers and --ray ask for, or None; checked before any work."""
    if workers is None and ray is None:
        return None
    if ray is not None:
        from .fetch import require_network

        require_network(f"the Ray cluster {ray}")
    from .workers import Spread, require_ray

    require_ray()
    return Spread(workers=workers, address=ray, threads=common.threads)


log_option = click.option(
    "--log-level", type=click.Choice(["debug", "info", "warning", "error"]), default="info", show_default=True,
    help="What run.log in the run folder gets.",
)  # fmt: skip

# runs


@cli.command()
@click.argument("domain")
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write; DOMAIN if left out.")
@common
def init(common: Common, domain: str, out: Path | None) -> None:
    """Begin a DOMAIN: a folder with recipe, seeds, task and README to fill in. biomed and finance come with seeds.

    \b
    Examples:
      specialize init geology
      specialize run --recipe geology/recipe.yaml --out geology/run        once geology/ is filled in
    """
    from .domain import INPUT_FILES, create, unfilled

    folder = create(domain, out or Path(domain))
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    todo = unfilled({name: str(folder / where) for name, where in INPUT_FILES.items()})
    common.show(
        {"folder": str(folder), "files": files, "fill_in": todo},
        f"{folder}: {', '.join(files)}\nfill in: {'; '.join(todo)}\n"
        f"then: specialize run --recipe {folder / 'recipe.yaml'} --out {folder / 'run'}",
    )


@cli.command()
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Run folder; an existing one is resumed.")
@input_options
@click.option("--recipe", help="Shipped recipe (small, demo, paper, biomed, finance) or a YAML file.  [default: small]")
@size_options
@quantize_option
@kv_dtype_option
@memory_option
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any recipe setting, such as tune.rank=8.")
@click.option(
    "--until",
    default="report",
    help="Stop after this stage: index, teacher, instructions or responses (those of the first wave), filter, tune, …",
)
@click.option("--redo", is_flag=True, help="Redo the stages that changed settings invalidate.")
@worker_options
@log_option
@common
def run(common: Common, **options: Any) -> None:
    """Do the whole job, or resume it: index, synthesis, filter, tuning, evaluation, report.

    \b
    Examples:
      specialize run --model smollm2-135m-instruct --seeds seeds.jsonl --corpus corpus.jsonl --tasks tasks/ --out r1
      specialize run --out r1                        resume, everything as before
      specialize run --out r1 --set tune.epochs=3 --redo
      specialize run --out r1 --workers 4            prompts answered by four processes, one a GPU where there are any
    """
    found = _open_run(common, **{k: v for k, v in options.items() if k not in ("until", "redo")})
    result = found.execute(until=options["until"], redo=options["redo"])
    _show_run(common, found.folder, result)


def _open_run(
    common: Common,
    *,
    out: Path,
    recipe: str | None = None,
    settings: tuple[str, ...] = (),
    workers: int | None = None,
    ray: str | None = None,
    **options: Any,
) -> Any:
    """The run in a folder: what the command line says, else what the folder's recipe.yaml remembers."""
    from .domain import require_filled
    from .pipeline import Run
    from .recipe import INPUTS, override, read_recipe, remembered_inputs
    from .standalone import existing_model

    spread = _spread(common, workers, ray)
    remembered = out / "recipe.yaml"
    chosen, inputs = read_recipe(recipe or (remembered if remembered.is_file() else "small"))
    if recipe and remembered.is_file():
        inputs = remembered_inputs(remembered) | inputs
    changes: dict[str, Any] = {
        k: options[k] for k in ("examples", "rounds", "seed", "quantize", "kv_dtype") if options.get(k) is not None
    }
    if common.dtype != "auto":
        changes["dtype"] = common.dtype
    chosen = override(override(chosen, changes), list(settings))
    require_filled(inputs | {name: options[name] for name in INPUTS if options.get(name)})
    for name in INPUTS:
        given = options.get(name)
        if name == "model" and (given or name in inputs):
            inputs[name] = str(existing_model(given or inputs[name], common.reporter))
        elif given:
            inputs[name] = str(Path(given).expanduser().resolve())
        if name not in inputs:
            raise InputError(f"--{name} is missing, and {out} is no run that remembers it")
    return Run(
        out, chosen, inputs, reporter=common.prepare().reporter, device=common.device,
        memory_bytes=options.get("memory_bytes"), spread=spread, log_level=options.get("log_level", "info"),
    )  # fmt: skip


def _show_run(common: Common, folder: Path, result: dict[str, Any]) -> None:
    from .controls import system_names
    from .standalone import format_table, systems_table

    if "systems" not in result:
        common.show(
            result,
            lambda: "\n".join(
                f"{name}: {'done' if s['done'] else 'begun'}, {s['seconds']} s" for name, s in result["stages"].items()
            ),
        )
        return

    def text() -> str:
        lines = ["token F1 in percent, 95 % bootstrap intervals", "", format_table(systems_table(result)), ""]
        names = {"base": "base"} | system_names(result)
        for row in result["comparisons"]:
            if row["metric"] == "token_f1" and row["system"] == "expert" and row.get("mean"):
                m = row["mean"]
                lines.append(
                    f"expert against the {names[row['against']]}, {row['shots']}-shot: {m['value']:+.1f} points "
                    f"[{m['low']:+.1f}, {m['high']:+.1f}]"
                )
        if "general" in result:
            from .general import changes_lines

            lines += changes_lines(result["general"], system_names(result, alone="seeds"))
        if (folder / "report.html").is_file():
            lines += ["", f"report: {(folder / 'report.html').resolve()}"]
        return "\n".join(lines)

    common.show(result, text)


@cli.command()
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Folder of the runs; an existing one goes on."
)
@input_options
@click.option("--recipe", help="Shipped recipe or a YAML file: what the variants differ from.  [default: small]")
@size_options
@quantize_option
@memory_option
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="A recipe setting, of all variants.")
@click.option(
    "--vary", multiple=True, metavar="KEY=V1,V2", help="Values of a setting; several options: all combinations."
)
@click.option(
    "--list", "variants", type=click.Path(path_type=Path), help="YAML of variants by name.  [default: a shipped list]"
)
@click.option("--redo", is_flag=True, help="Redo the stages that changed settings invalidate.")
@worker_options
@common
def ablate(common: Common, out: Path, vary: tuple[str, ...], variants: Path | None, redo: bool, **options: Any) -> None:
    """Do a run and variants of it, sharing every stage that is equal, and compare them in one table.

    Without --vary or --list: no retrieval, no filter, no self-consistency, no seeds in the mix, no teacher, invented
    instructions.

    \b
    Examples:
      specialize ablate --model smollm2-135m-instruct --seeds s.jsonl --corpus c.jsonl --tasks tasks/ --out ab
      specialize ablate --out ab                     resume, inputs and recipe as before
      specialize ablate --out ab --vary responses.samples=0,2,4 --vary retrieval.mode=off,hybrid
    """
    from .ablate import REFERENCE, read_variants, table, with_base_shots
    from .ablate import ablate as work
    from .ablate import vary as combinations
    from .pipeline import Run
    from .standalone import format_table

    if vary and variants:
        raise InputError("ablate: give --vary or --list, not both")
    wanted = combinations(vary) if vary else read_variants(variants)
    first = _open_run(common, out=out / REFERENCE, **options)
    spread = _spread(common, options["workers"], options["ray"])

    def open_run(recipe: Any, folder: Path, donors: Any) -> Any:
        return Run(
            folder, recipe, first.inputs, reporter=first.reporter, device=common.device,
            memory_bytes=options["memory_bytes"], spread=spread, donors=donors,
        )  # fmt: skip

    chosen = with_base_shots(first.recipe, first.tasks)
    result = work(open_run, chosen, wanted, out, say=first.reporter.say, redo=redo)
    common.show(result, lambda: f"{format_table(table(result))}\n\n{out / 'ablation.md'}")


@cli.command()
@click.argument("name")
@common
def fetch(common: Common, name: str) -> None:
    """Bring a model into the cache: a known NAME, or OWNER/NAME of the Hugging Face hub.

    \b
    Examples:
      specialize fetch smollm2-135m-instruct
      specialize fetch mosaicml/mpt-7b
    """
    from .fetch import convert_hint
    from .fetch import fetch as bring
    from .standalone import fetch_progress

    with fetch_progress(common.reporter) as show:
        path = bring(name, show)
    hint = convert_hint(path)
    common.show({"path": str(path)}, f"{path}" + (f"\nnext: {hint}" if hint else ""))


@cli.command()
@click.argument("source")
@click.argument("target", type=click.Path(path_type=Path))
@quantize_option
@common
def convert(common: Common, source: str, target: Path, quantize: str | None) -> None:
    """Write a model folder with safetensors from one with .bin shards or from a .gguf file; --quantize quantises it.

    \b
    Examples:
      specialize convert mpt-7b mpt-7b-safetensors --dtype bf16
      specialize convert mpt-30b mpt-30b-nf4 --dtype bf16 --quantize nf4
    """
    from .engine.convert import convert as work
    from .engine.generator import DTYPES

    common.prepare()
    with common.reporter.bar("convert", unit="MB") as bar:
        path = work(
            source,
            target,
            dtype=DTYPES.get(common.dtype),
            quantize=quantize,
            on_tensor=lambda done, total: bar.set(done / 1e6, total=round(total / 1e6)),
        )
    common.show({"path": str(path)}, str(path))


@cli.command()
@click.argument("corpus")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the index.")
@click.option(
    "--embedder", default="all-minilm-l6-v2", show_default=True, help='Embedder folder or name; "none": BM25 only.'
)
@click.option("--max-words", type=click.IntRange(8), default=120, show_default=True, help="Words of a passage.")
@click.option(
    "--overlap-words", type=click.IntRange(0), default=20, show_default=True, help="Words that neighbours share."
)
@memory_option
@common
def index(
    common: Common, corpus: str, out: Path, embedder: str, max_words: int, overlap_words: int, memory_bytes: int | None
) -> None:
    """Build a passage index of a CORPUS; run again, it resumes, or takes in what was added.

    \b
    Examples:
      specialize index corpus.jsonl --out idx
      specialize doctor --passages 1000000           what a build takes of memory and disk
    """
    from .pipeline import load_embedder
    from .plans import index_memory
    from .retrieval.index import Index

    common.prepare()
    encoder = None if embedder == "none" else load_embedder(embedder)
    with common.reporter.bar("index") as bar:

        def show(stage: str, done: int, total: int) -> None:
            bar.unit = stage
            bar.set(done, total=total)

        built = Index.build(
            corpus,
            out,
            encoder,
            max_words=max_words,
            overlap_words=overlap_words,
            available_bytes=index_memory(memory_bytes),
            progress=show,
        )
    found: dict[str, Any] = {"index": str(out), "passages": len(built)}
    if encoder is not None:
        found["recall_at_10"] = round(built.manifest.recall_at_10 or 0.0, 4)
    common.show(found, ", ".join(f"{k}: {v}" for k, v in found.items()))


@cli.command()
@click.argument("index", type=click.Path(path_type=Path))
@click.argument("query")
@click.option("-k", type=click.IntRange(1), default=5, show_default=True, help="How many passages.")
@click.option("--mode", type=click.Choice(["hybrid", "dense", "exact", "bm25"]), default="hybrid", show_default=True)
@click.option("--embedder", default="all-minilm-l6-v2", show_default=True, help="The embedder the index was made with.")
@common
def search(common: Common, index: Path, query: str, k: int, mode: str, embedder: str) -> None:
    """Search an INDEX.

    \b
    Example:
      specialize search idx "loss of hearing in childhood" -k 3
    """
    from .pipeline import load_embedder
    from .retrieval.index import Index

    common.prepare()
    if not index.is_dir():
        raise InputError(f"index {index} does not exist; build it with: specialize index CORPUS --out {index}")
    found = Index.load(index, None if mode == "bm25" else load_embedder(embedder))
    hits = found.search([query], k, mode=mode)[0]
    rows = [
        {
            "rank": h.rank,
            "score": round(h.score, 4),
            "id": h.passage.id,
            "title": h.passage.title,
            "text": h.passage.text,
        }
        for h in hits
    ]
    common.show(
        rows,
        lambda: (
            "\n\n".join(f"{r['rank']}. {r['id']}  {r['score']:.3f}  {r['title']}\n{r['text']}" for r in rows)
            or "nothing found"
        ),
    )


def _stage_command(name: str, until: str, what: str) -> None:
    @cli.command(name, help=what)
    @click.argument("run", type=click.Path(path_type=Path))
    @click.option("--redo", is_flag=True, help="Redo the stages that changed settings invalidate.")
    @click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Change a recipe setting.")
    @worker_options
    @log_option
    @common
    def command(common: Common, run: Path, redo: bool, **options: Any) -> None:
        _run_stage(common, run, until, redo, **options)


def _run_stage(common: Common, run: Path, until: str, redo: bool, **options: Any) -> None:
    if not (run / "recipe.yaml").is_file():
        raise InputError(f"{run} is no run folder (no recipe.yaml); start one with: specialize run --out {run} …")
    found = _open_run(common, out=run, **options)
    _show_run(common, run, found.execute(until=until, redo=redo))


_stage_command(
    "synth",
    "filter",
    "Make and filter the synthetic rows of a RUN, after what comes before.\n\n\b\nExample:\n  specialize synth r1",
)


def _variants(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options of how is tuned, beyond what a recipe says."""
    for option in reversed(
        (
            click.option(
                "--method", type=click.Choice(["lora", "full"]), default="lora", show_default=True,
                help="An adapter, or every weight: then --out becomes a whole checkpoint.",
            ),
            click.option("--dora", is_flag=True, help="DoRA: train the length of weight rows beside their direction."),
            click.option("--rslora", is_flag=True, help="Scale by alpha over the root of the rank."),
            click.option(
                "--init", type=click.Choice(["kaiming", "pissa"]), default="kaiming", show_default=True,
                help="Start; pissa: the weights' leading singular vectors (twice the rank in the file).",
            ),
            click.option("--lora-plus", type=float, metavar="RATIO", help="LoRA+: how much faster B learns than A."),
            click.option("--dropout", type=float, default=0.0, show_default=True, help="Of the adapters' inputs."),
            click.option("--layers", metavar="LIST", help="Blocks to adapt, such as 0-11,20.  [default: all]"),
            *(
                click.option(
                    f"--{name}-for", multiple=True, metavar="PATTERN=VALUE",
                    help=f"Another {name} for modules whose path ends so, such as down_proj=4 or "
                         "'layers.0.mlp.up_proj=4'; may be given often, the first match holds.",
                )
                for name in ("rank", "alpha", "dropout")
            ),
            click.option("--batch-tokens", type=click.IntRange(2), help="Tokens of one forward pass.  [default: 4096]"),
            click.option(
                "--long", "long_examples", type=click.Choice(["truncate", "drop", "error"]), default="truncate",
                show_default=True, help="What becomes of rows longer than --max-length; truncate cuts a prompt's left.",
            ),
            click.option("--validation", type=float, default=0.0, show_default=True, help="Share of rows held out."),
            click.option(
                "--patience", type=click.IntRange(0), default=0, show_default=True,
                help="Stop after so many epochs without a lower validation loss (0: never); keeps the best.",
            ),
            click.option("--keep-best", is_flag=True, help="Keep the weights of the lowest validation loss."),
            click.option("--merge-out", type=click.Path(path_type=Path), help="Write base and adapter here, merged."),
        )
    ):  # fmt: skip
        command = option(command)
    return command


def _loop_settings(o: dict[str, Any]) -> dict[str, Any]:
    """The training loop's settings that `_variants` gave."""
    changes: dict[str, Any] = {
        "method": o["method"], "dora": o["dora"], "rank_stabilized": o["rslora"], "init": o["init"],
        "long_examples": o["long_examples"], "patience": o["patience"], "alpha": o["alpha"],
        "recompute": o["recompute"],
        "keep_best": o["keep_best"] or o["patience"] > 0,
    }  # fmt: skip
    if o["lora_plus"] is not None:
        changes["plus_ratio"] = o["lora_plus"]
    if o["layers"] is not None:
        changes["layers"] = _number_list("--layers", o["layers"])
    if o["batch_tokens"] is not None:
        changes["max_batch_tokens"] = o["batch_tokens"]
    for name in ("rank", "alpha", "dropout"):
        pattern = {}
        for entry in o[f"{name}_for"]:
            key, _, value = entry.rpartition("=")
            try:
                pattern[key] = int(value) if name == "rank" else float(value)
            except ValueError:
                key = ""
            if not key:
                raise InputError(f"--{name}-for {entry}: write PATTERN=NUMBER, such as down_proj=4") from None
        changes[f"{name}_pattern"] = pattern
    if o["method"] == "full" and o["merge_out"]:
        raise InputError("tune: --method full writes a whole checkpoint to --out; leave --merge-out out")
    return changes


def _number_list(option: str, text: str) -> tuple[int, ...]:
    """``0-2,5`` → (0, 1, 2, 5)."""
    numbers: list[int] = []
    for entry in text.split(","):
        first, _, last = entry.strip().partition("-")
        if not first.isdigit() or (last and not last.isdigit()):
            raise InputError(f"{option} {text}: write numbers and ranges, such as 0-11,20")
        numbers.extend(range(int(first), int(last or first) + 1))
    return tuple(dict.fromkeys(numbers))


@cli.command()
@click.argument("run", required=False, type=click.Path(path_type=Path))
@click.option("--model", help="Model folder, .gguf file or fetch name.")
@quantize_option
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help='JSONL of {"instruction", "input", "output"} or {"prompt", "response"}.',
)
@click.option("--out", type=click.Path(path_type=Path), help="Adapter folder; an interrupted one is resumed.")
@click.option("--rank", type=click.IntRange(1), default=16, show_default=True)
@click.option("--alpha", type=float, help="Scale of the adapter.  [default: twice the rank]")
@click.option(
    "--targets", default="all", show_default=True,
    help="all, or names such as q_proj,v_proj, ends of paths such as layers.3.mlp.down_proj, or regular expressions.",
)  # fmt: skip
@click.option("--lr", type=float, default=5e-4, show_default=True, help="Learning rate.")
@click.option("--epochs", type=float, default=3.0, show_default=True)
@click.option("--batch", type=click.IntRange(1), default=16, show_default=True, help="Rows of an optimizer step.")
@click.option("--max-length", type=click.IntRange(16), default=1024, show_default=True, help="Tokens of a row.")
@click.option("--schedule", type=click.Choice(["linear", "cosine", "constant"]), default="linear", show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@_variants
@click.option("--stats", type=click.Path(path_type=Path), help="Write tokens, steps, seconds and losses here as JSON.")
@click.option("--redo", is_flag=True, help="Of a RUN: redo the stages that changed settings invalidate.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Of a RUN: change a recipe setting.")
@click.option(
    "--memory", metavar="SIZE", help="Cap for all that this process takes, such as 24GB; with --dry-run also a card."
)
@click.option(
    "--recompute", type=click.Choice(["auto", "none", "layers"]), default="auto", show_default=True,
    help="Blocks computed again in the backward pass: as few as memory calls for, none, or all.",
)  # fmt: skip
@click.option("--shard", is_flag=True, help="Under torchrun: each process keeps a part of the frozen layers (FSDP2).")
@click.option(
    "--dry-run", is_flag=True, help="Print where memory would go and how fast it would be; --data is optional."
)
@log_option
@common
def tune(common: Common, run: Path | None, redo: bool, settings: tuple[str, ...], **o: Any) -> None:
    """Tune the adapter of a RUN, or, with --data, any model on your own rows.

    \b
    Examples:
      specialize tune r1
      specialize tune --model smollm2-135m-instruct --data rows.jsonl --out adapter --rank 8 --epochs 2
      specialize tune --model smollm2-135m-instruct --data rows.jsonl --out adapter --dora --validation 0.1 --patience 2
      torchrun --nproc-per-node 2 -m specialize tune --model M --data rows.jsonl --out adapter [--shard]
      specialize tune --dry-run --model mpt-30b --quantize nf4 --memory h100-80gb --max-length 4096
    """
    if run is not None:
        if o["data"] or o["out"]:
            raise InputError("tune: give a RUN folder, or --model, --data and --out, not both")
        if o["dry_run"]:
            raise InputError("tune: --dry-run goes with --model, not with a RUN folder")
        if o["shard"] or int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise InputError("tune: torchrun and --shard go with --model and --data, not with a RUN folder")
        options = {"memory_bytes": _parse_memory(None, None, o["memory"]), "log_level": o["log_level"]}
        _run_stage(common, run, "tune", redo, settings=settings, **options)
        return
    for name in ("model",) if o["dry_run"] else ("model", "data", "out"):
        if not o[name]:
            raise InputError(f"tune: --{name} is missing (or name a RUN folder)")
    from .recipe import Tune, check_value
    from .standalone import existing_model, tune_file

    values = {"rank": o["rank"], "alpha": o["alpha"] or 2.0 * o["rank"], "targets": o["targets"], "epochs": o["epochs"]}
    values |= {"learning_rate": o["lr"], "batch": o["batch"], "max_length": o["max_length"], "schedule": o["schedule"]}
    values |= {"dropout": o["dropout"], "validation": o["validation"]}
    changes = _loop_settings(o)
    for key, value in values.items():
        check_value(f"tune.{key}", type(value), value)
    if o["dry_run"]:
        from .plans import format_tuning, plan_tuning_of

        plan = plan_tuning_of(
            o["model"],
            Tune(**values),
            data=o["data"],
            reporter=common.prepare().reporter,
            device=common.device,
            dtype=common.dtype,
            quantize=o["quantize"],
            memory=o["memory"],
            changes=changes,
        )
        common.show(plan.as_dict(), lambda: format_tuning(plan))
        return
    changes["memory_bytes"] = _parse_memory(None, None, o["memory"])
    if o["stats"]:
        from .standalone import check_writable

        check_writable(o["stats"])
    from .train.distributed import joined, place

    device = place(common.device)
    with joined(device, shard=o["shard"]) as ranks:
        reporter = common.prepare().reporter if ranks.is_first else Reporter(mute=True)
        ranks.first(lambda: existing_model(o["model"], reporter))  # one process fetches
        stats = tune_file(
            existing_model(o["model"], reporter),
            o["data"],
            o["out"],
            Tune(**values),
            dtype=common.dtype,
            device=device,
            quantize=o["quantize"],
            seed=o["seed"],
            base_model=o["model"],
            reporter=reporter,
            changes=changes,
            merge_out=o["merge_out"],
            ranks=ranks,
        )
    if not ranks.is_first:
        return
    if o["stats"]:
        o["stats"].write_text(json.dumps(stats, indent=1), encoding="utf-8")
    common.show(
        stats,
        f"{o['out']}: {stats['steps']} steps, {stats['tokens']:,} tokens in {stats['seconds']:.1f} s "
        f"({stats['tokens_per_second']:,.0f} a second), last loss {stats['losses'][-1]:.3f}"
        + (f", kept step {stats['best_step']}" if stats["best_step"] is not None else "")
        + (f"; {stats['num_truncated']} long rows cut" if stats["num_truncated"] else "")
        + (f"; {stats['num_dropped']} long rows dropped" if stats["num_dropped"] else ""),
    )


@cli.command()
@click.argument("model")
@click.argument("adapter", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@common
def merge(common: Common, model: str, adapter: Path, out: Path) -> None:
    """Write MODEL with ADAPTER added to its weights as a new model folder, OUT.

    \b
    Example:
      specialize merge smollm2-135m-instruct adapter expert --dtype bf16
    """
    from .engine.generator import DTYPES
    from .engine.merge import merge_checkpoint
    from .standalone import existing_model

    source = existing_model(model, common.reporter)
    with common.prepare().reporter.bar("merge", unit="MB") as bar:
        path = merge_checkpoint(
            source, adapter, out, dtype=DTYPES.get(common.dtype),
            on_tensor=lambda done, total: bar.set(done / 1e6, total=round(total / 1e6)),
        )  # fmt: skip
    common.show({"path": str(path)}, str(path))


@cli.command()
@click.argument("experts", nargs=-1, type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of what is composed.")
@click.option(
    "--method", type=click.Choice(["mixse", "pooled", "ties", "dare", "average"]), default="mixse", show_default=True,
    help="A router over frozen experts; one adapter on the rows of all; or arithmetic on their updates.",
)  # fmt: skip
@click.option("--top-k", default="1", show_default=True, metavar="K", help="Experts of a token: a number, or all.")
@click.option("--model", help="The base, where no RUN names it, or where it lies now.")
@click.option("--data", multiple=True, type=click.Path(path_type=Path), help="Rows of an adapter folder; one for each.")
@click.option("--compare", default="", metavar="METHODS", help="Also make and score these, such as pooled,ties,dare.")
@click.option("--lr", type=float, help="Learning rate.  [default: 0.01 for a router, the first RUN's for pooled]")
@click.option(
    "--epochs", type=float, help="Passes over all rows.  [default: 2 for a router, the first RUN's for pooled]"
)
@click.option("--batch", type=click.IntRange(1), help="Rows of a step.  [default: 8; the first RUN's for pooled]")
@click.option("--density", type=float, default=0.5, show_default=True, help="Share of entries that TIES and DARE keep.")
@click.option("--rank", type=click.IntRange(1), help="Of a TIES or DARE merge.  [default: 4 times the experts' sum]")
@click.option("--shots", default="0", show_default=True, help="Examples in the prompt, such as 0,5.")
@click.option("--limit", type=click.IntRange(0), help="Examples of each task; 0: all.  [default: the RUN's]")
@click.option("--no-eval", is_flag=True, help="Compose only.")
@click.option("--seed", type=int, default=0, show_default=True)
@common
def compose(common: Common, experts: tuple[Path, ...], **o: Any) -> None:
    """Put several EXPERTS on one base: finished RUN folders, or adapter folders with their --data.

    \b
    Examples:
      specialize compose biomed/run finance/run --out mix --compare pooled,ties,dare
      specialize compose biomed/run finance/run --out merged --method ties --no-eval
      specialize compose a b --model smollm2-135m-instruct --data a.jsonl --data b.jsonl --out mix --top-k all
      specialize generate --model smollm2-135m-instruct --adapter mix "The heart is"
    """
    from . import compose as work
    from .mix_report import routing_table, score_table
    from .standalone import existing_model, format_table, parse_shots

    peers = tuple(dict.fromkeys(name.strip() for name in o["compare"].split(",") if name.strip()))
    for name in peers:
        if name not in work.METHODS:
            raise InputError(f"--compare {name}: allowed: {', '.join(work.METHODS)}")
    if o["top_k"] != "all" and not (o["top_k"].isdigit() and int(o["top_k"]) > 0):
        raise InputError(f"--top-k {o['top_k']}: allowed: 1 to the number of experts, or all")
    for name, low in (("lr", 0.0), ("epochs", 0.0), ("density", 0.0)):
        if o[name] is not None and not low < o[name] < float("inf"):
            raise InputError(f"--{name} {o[name]}: allowed: above 0")
    shots = parse_shots(o["shots"])
    found = work.read_experts(experts, o["data"])
    base = work.base_of(found, o["model"])
    settings = work.Settings(
        method=o["method"], top_k=0 if o["top_k"] == "all" else int(o["top_k"]), lr=o["lr"], epochs=o["epochs"],
        batch=o["batch"], density=o["density"], rank=o["rank"], seed=o["seed"],
    )  # fmt: skip
    composer = work.Composer(
        existing_model(base, common.reporter), found, dtype=common.dtype, device=common.device, base_model=base,
        reporter=common.prepare().reporter,
    )  # fmt: skip
    result = work.compose(
        composer, settings, o["out"], peers=peers, shots=shots, limit=o["limit"], scored=not o["no_eval"]
    )

    def text() -> str:
        lines = []
        if result.get("routing"):
            lines += ["which expert, how often:", "", format_table(routing_table(result["routing"])), ""]
        if result.get("evaluation"):
            lines += [format_table(score_table(result, shots[0])), ""]
            for row in result["summary"]:
                for domain, score in row["domains"].items():
                    own = score["to_own_expert"]
                    lines.append(
                        f"{row['system']} against {domain}'s own expert: {own['value']:+.1f} "
                        f"[{own['low']:+.1f}, {own['high']:+.1f}]"
                        + ("" if score["within_a_point"] else ", more than a point below")
                    )
            lines.append("")
        return "\n".join([*lines, f"{o['out']}: {o['method']} of {', '.join(e.name for e in found)}; mix.json has all"])

    common.show(result, text)


@cli.command("eval")
@click.argument("run", required=False, type=click.Path(path_type=Path))
@click.option("--model", help="Model folder, .gguf file or fetch name.")
@adapter_option
@quantize_option
@memory_option
@kv_dtype_option
@click.option("--tasks", type=click.Path(path_type=Path), help="Task file or folder of them.")
@click.option("--shots", default="0", show_default=True, help="Examples in the prompt, such as 0,1,5.")
@click.option("--limit", type=click.IntRange(0), default=0, show_default=True, help="Examples of each task; 0: all.")
@click.option("--max-tokens", type=click.IntRange(1), default=96, show_default=True, help="Longest reply.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the bootstrap.")
@click.option("--general", is_flag=True, help="Perplexity on general text and general tasks, too, beside the base's.")
@click.option("--out", type=click.Path(path_type=Path), help="Write eval.json here.")
@click.option("--redo", is_flag=True, help="Of a RUN: redo the stages that changed settings invalidate.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Of a RUN: change a recipe setting.")
@worker_options
@log_option
@common
def evaluate(common: Common, run: Path | None, redo: bool, settings: tuple[str, ...], **o: Any) -> None:
    """Score a RUN's systems, or any model with or without an adapter.

    \b
    Examples:
      specialize eval r1
      specialize eval --model smollm2-135m-instruct --adapter r1/adapter --tasks tasks/ --shots 0,1,5 --out eval.json
    """
    if o["general"] and (run is not None or o["workers"] or o["ray"]):
        raise InputError("eval: --general goes with --model without --workers; of a RUN: --set evaluate.general=true")
    if run is not None:
        if o["kv_dtype"]:
            raise InputError(
                f"eval: --kv-dtype {o['kv_dtype']} goes with --model; of a RUN: specialize run --out {run} "
                f"--kv-dtype {o['kv_dtype']} --redo"
            )
        given = click.get_current_context().get_parameter_source
        for name in ("model", "adapter", "quantize", "tasks", "shots", "limit", "max_tokens", "seed", "out"):
            if given(name) != click.core.ParameterSource.DEFAULT:
                settable = name in ("shots", "limit", "max_tokens")
                hint = f"of a RUN: --set evaluate.{name}=… --redo" if settable else "a RUN has its own"
                raise InputError(f"eval: --{name.replace('_', '-')} goes with --model; {hint}")
        options = {name: o[name] for name in ("workers", "ray", "memory_bytes", "log_level")}
        _run_stage(common, run, "evaluate", redo, settings=settings, **options)
        return
    for name in ("model", "tasks"):
        if not o[name]:
            raise InputError(f"eval: --{name} is missing (or name a RUN folder)")
    from .files import write_text
    from .standalone import (
        check_writable,
        evaluate_model,
        evaluation_table,
        existing_model,
        format_table,
        general_lines,
        parse_shots,
    )

    if o["out"]:
        check_writable(o["out"])
    shots = parse_shots(o["shots"])
    spread = _spread(common, o["workers"], o["ray"])
    found = evaluate_model(
        existing_model(o["model"], common.reporter),
        o["tasks"],
        adapter=o["adapter"],
        shots=shots,
        limit=o["limit"],
        max_tokens=o["max_tokens"],
        dtype=common.dtype,
        device=common.device,
        quantize=o["quantize"],
        memory_bytes=o["memory_bytes"],
        seed=o["seed"],
        model_name=o["model"],
        reporter=common.prepare().reporter,
        kv_dtype=o["kv_dtype"] or "auto",
        spread=spread,
        general=o["general"],
    )
    if o["out"]:
        write_text(o["out"], json.dumps(found, indent=1, ensure_ascii=False))
    common.show(found, lambda: format_table(evaluation_table(found)) + general_lines(found))


@cli.command()
@click.argument("runs", required=True, nargs=-1, type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path), help="Of several RUNS: the page to write.  [default: comparison.html]"
)
@common
def report(common: Common, runs: tuple[Path, ...], out: Path | None) -> None:
    """Write a RUN's report.html anew from what its folder holds, or one page that compares several RUNS.

    Runs that differ in nothing but --seed are taken together: mean and spread over the runs, and a paired bootstrap
    interval of what the expert gained, each example's difference averaged over the runs.

    \b
    Examples:
      specialize report r1
      specialize report r1 r2 r3 --out seeds.html
    """
    if len(runs) == 1:
        from .pipeline import rewrite_report

        if out is not None:
            raise InputError("report: --out belongs to several RUNS; a single one has its report.html")
        path = rewrite_report(runs[0])
        common.show({"report": str(path)}, str(path))
        return
    from .comparison import compare_runs
    from .repeats import group_table
    from .standalone import check_writable, format_table

    out = out or Path("comparison.html")
    check_writable(out)
    found = compare_runs(runs, out)
    lines = []
    for group in found["seeds"]:
        lines += [format_table(group_table(group))]
        if group["not_pooled"]:
            lines.append(f"no intervals over the runs: {group['not_pooled']}")
    common.show(found, "\n".join([*lines, str(out)]))


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the data set.")
@click.option("--format", "formats", default="parquet,jsonl,chat", show_default=True, help="Some of these.")
@click.option("--seeds", is_flag=True, help="The seeds, too.")
@common
def export(common: Common, run: Path, out: Path, formats: str, seeds: bool) -> None:
    """Write the kept rows of a RUN as a data set, with its card, that `datasets.load_dataset` reads.

    \b
    Example:
      specialize export r1 --out rows                then: load_dataset("rows"), load_dataset("rows", "chat")
    """
    from .export import export as work

    found = work(run, out, tuple(dict.fromkeys(name.strip() for name in formats.split(","))), seeds=seeds)
    common.show(found, f"{found['folder']}: {found['rows']:,} rows; {', '.join(found['files'])}")


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@common
def verify(common: Common, run: Path) -> None:
    """Check a RUN's folder whole: the ledger and its rows, the hash of every file, counts, adapters and their base.
    Exit code 1 where something is wrong, one line for each finding. Changes nothing.

    \b
    Example:
      specialize verify r1
    """
    from .verify import verify as check

    found = check(run)
    common.show(found.as_dict(), lambda: "\n".join(found.lines()))
    if found.wrong:
        raise SystemExit(1)


# generation

_sampling_options = (
    click.option("--max-tokens", type=click.IntRange(1), default=256, show_default=True),
    click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy."),
    click.option("--top-p", type=float, default=1.0, show_default=True),
    click.option("--top-k", type=int, default=0, show_default=True, help="0 is off."),
    click.option("--min-p", type=float, default=0.0, show_default=True),
    click.option("--repetition-penalty", type=float, default=1.0, show_default=True),
    click.option("--seed", type=int, default=0, show_default=True),
    click.option("--stop", multiple=True, help="Text that ends the reply; may be given several times."),
    kv_dtype_option,
    click.option(
        "--speculation",
        type=click.Choice(["off", "prompt_lookup", "auto"]),
        default="off",
        show_default=True,
        help="Draft what the text seems to copy from itself; every token is checked by the model. auto: only where "
        "drafts are mostly kept.",
    ),
)


def _sampling(function: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(_sampling_options):
        function = option(function)
    return function


def _generator(common: Common, model: str, adapter: str | None, o: dict[str, Any]) -> tuple[Any, str | None]:
    """The generator of `generate` and `chat`, and the adapter's name in it."""
    from .standalone import existing_model, load_generator

    names = ("quantize", "memory_bytes", "speculation")
    return load_generator(
        existing_model(model, common.reporter),
        adapter=adapter,
        dtype=common.prepare().dtype,
        device=common.device,
        kv_dtype=o["kv_dtype"] or "auto",
        **{name: o[name] for name in names},
    )


def _params(o: dict[str, Any], **more: Any) -> Any:
    from .engine.sampler import SamplingParams

    names = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
    return SamplingParams(**{name: o[name] for name in names}, stop=tuple(o["stop"]), **more)


@cli.command()
@click.argument("prompt", required=False)
@model_option
@adapter_option
@quantize_option
@memory_option
@click.option("--prompts", type=click.Path(path_type=Path), help='JSONL of {"prompt": text} or {"prompt_ids": [...]}.')
@click.option("--out", type=click.Path(path_type=Path), help="JSONL of replies, in the order of --prompts.")
@_sampling
@click.option("--ignore-eos", is_flag=True, help="Go on past the end-of-text token.")
@click.option("--n", "n", type=click.IntRange(1), default=1, show_default=True, help="Samples of each prompt.")
@click.option("--logprobs", type=click.IntRange(0), help="Report the K likeliest tokens at each step.")
@click.option("--chat", "as_chat", is_flag=True, help="Put PROMPT into the model's chat template.")
@click.option(
    "--input", "input_text", help="PROMPT is an instruction and this its input, in the form experts are tuned on."
)
@click.option("--stats", type=click.Path(path_type=Path), help="Write counts and rates here as JSON.")
@common
def generate(common: Common, prompt: str | None, model: str, adapter: str | None, **o: Any) -> None:
    """Continue a PROMPT, or every line of a prompts file.

    \b
    Examples:
      specialize generate --model smollm2-135m-instruct "The heart is" --max-tokens 40
      specialize generate --model M --adapter my-run/adapter "List the diseases in the text." --input "A case of gout."
      specialize generate --model M --prompts in.jsonl --out out.jsonl --temperature 0.7 --n 4 --stats stats.json
    """
    from .standalone import check_writable, generate_file, statistics

    if (prompt is None) == (o["prompts"] is None):
        raise InputError("generate: give a PROMPT or --prompts FILE, one of the two")
    if o["input_text"] is not None:
        from .prompts import STOP, example_prompt

        if prompt is None or o["as_chat"]:
            raise InputError("generate: --input belongs to a PROMPT without --chat")
        prompt = example_prompt(prompt, o["input_text"])
        o["stop"] = o["stop"] or STOP
    if o["prompts"] is not None and o["out"] is None:
        raise InputError("generate: --prompts needs --out FILE")
    for file in (o["out"], o["stats"]):
        if file:
            check_writable(file)
    params = _params(o, n=o["n"], ignore_eos=o["ignore_eos"], logprobs=o["logprobs"])
    if o["prompts"] is not None:
        from .standalone import read_prompts

        read_prompts(o["prompts"])
    generator, name = _generator(common, model, adapter, o)
    if o["prompts"] is not None:
        stats = generate_file(generator, o["prompts"], o["out"], params, adapter=name, reporter=common.reporter)
        shown: Any = stats
        rate = stats["tokens_per_second"]
        text = f"{o['out']}: {stats['generated_tokens']:,} tokens in {stats['seconds']:.1f} s ({rate:,.0f} a second)"
    else:
        import time

        wanted: Any = prompt
        if o["as_chat"]:
            ready = generator.tokenizer.apply_chat_template([{"role": "user", "content": prompt}])
            wanted = generator.tokenizer.encode(ready, add_special_tokens=False)
        if not common.as_json and o["n"] == 1 and not o["stats"]:
            for piece in generator.stream(wanted, params, adapter=name):
                click.echo(piece, nl=False)
            click.echo()
            return
        started = time.perf_counter()
        completions = generator.generate([wanted], params, adapter=name)
        stats = statistics(completions, time.perf_counter() - started, generator)
        shown = [
            {"text": c.text, "token_ids": list(c.token_ids), "finish_reason": c.finish_reason} for c in completions
        ]
        text = "\n\n".join(c.text for c in completions)
    if o["stats"]:
        o["stats"].write_text(json.dumps(stats, indent=1), encoding="utf-8")
    common.show(shown, text)


@cli.command()
@model_option
@adapter_option
@quantize_option
@memory_option
@_sampling
@common
def chat(common: Common, model: str, adapter: str | None, **o: Any) -> None:
    """Talk to a model. With an adapter, turns have the form it was tuned on. An empty line or Ctrl-D ends.

    \b
    Example:
      specialize chat --model smollm2-135m-instruct --adapter my-run/adapter
    """
    from .prompts import STOP
    from .standalone import chat_prompt

    generator, name = _generator(common, model, adapter, o)
    if adapter and not o["stop"]:
        o["stop"] = STOP
    params = _params(o)
    messages: list[dict[str, str]] = []
    interactive = sys.stdin.isatty()
    while True:
        try:
            text = (
                click.prompt("you", prompt_suffix="> ", default="", show_default=False)
                if interactive
                else next(sys.stdin, "").strip()
            )
        except click.Abort:
            click.echo()
            return
        if not text:
            return
        messages.append({"role": "user", "content": text})
        reply = ""
        for piece in generator.stream(
            chat_prompt(generator, messages, instruct=adapter is not None), params, adapter=name
        ):
            click.echo(piece, nl=False)
            reply += piece
        click.echo("\n")
        messages.append({"role": "assistant", "content": reply.strip()})


# the machine

BENCHMARKS = ("kernels", "generate", "train", "retrieval", "peers", "workers", "quality", "soak", "passages")


@cli.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("what", type=click.Choice(BENCHMARKS))
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def bench(what: str, arguments: tuple[str, ...]) -> None:
    """Measure kernels, generate, train, retrieval, peers, scaling over workers, the quality of quantised weights,
    endurance (soak), or the memory of an index (passages). `specialize bench WHAT --help` lists the options.

    \b
    Example:
      specialize bench generate --help
    """
    import importlib

    try:
        module = importlib.import_module(f"specialize.bench.{what}")
    except ModuleNotFoundError as error:
        if error.name != f"specialize.bench.{what}":
            raise
        raise InputError(f"bench {what}: this benchmark is not installed") from None
    code = module.main(list(arguments))
    if code:
        raise SystemExit(code)


@cli.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("what", type=click.Choice(["generate", "train"]))
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def profile(what: str, arguments: tuple[str, ...]) -> None:
    """Show where a step's time goes, and write a trace: generate or train. `specialize profile WHAT --help`: options.

    \b
    Example:
      specialize profile generate --model smollm2-135m-instruct --out trace.json
    """
    from .bench.profile import main as work

    work([what, *arguments])


@cli.command()
@click.option("--model", help="Plan the memory of this model: a folder, .gguf file, name, or shape such as mpt-30b.")
@quantize_option
@click.option("--kv-dtype", metavar="FORMAT", help="KV cache in bf16, fp16, fp32, int8 or fp8.  [default: the dtype]")
@click.option("--memory", metavar="SIZE", help="Plan for a GPU of 24GB, h100-80gb, …; with --device cpu a cap.")
@click.option("--context", type=click.IntRange(1), default=1000, show_default=True, help="Tokens of a sequence.")
@click.option("--passages", type=click.IntRange(1), help="What an index of so many passages takes of memory and disk.")
@click.option("--dim", type=click.IntRange(0), default=384, show_default=True, help="Of --passages; 0: words only.")
@common
def doctor(common: Common, model: str | None, context: int, passages: int | None, dim: int, **o: Any) -> None:
    """Say what this machine has, what will be used, and what is missing; with --model or --passages, where memory
    would go.

    \b
    Examples:
      specialize doctor
      specialize doctor --model mpt-30b --quantize int8 --kv-dtype int8 --memory h100-80gb
      specialize doctor --passages 1000000
    """
    from .doctor import examine, format_findings
    from .plans import format_index, format_plan, index_memory, plan_model

    if passages is not None:
        from .engine.memory import capacity_bytes
        from .retrieval.plan import plan_index

        for name, value in {"model": model, "quantize": o["quantize"], "kv_dtype": o["kv_dtype"]}.items():
            if value is not None:
                raise InputError(f"doctor: give --passages or --{name.replace('_', '-')}, not both")
        found = plan_index(passages, dim)
        available = index_memory(None if o["memory"] is None else capacity_bytes(o["memory"]))
        result = found.as_dict() | {"available_bytes": available, "fits": found.peak_bytes <= available}
        common.show(result, lambda: format_index(found, available))
        return

    if model is None:
        for name, value in o.items():
            if value is not None:
                raise InputError(f"doctor: --{name.replace('_', '-')} needs --model")
        common.prepare()
        findings = examine()
        common.show(findings, lambda: format_findings(findings))
        return
    plan = plan_model(model, reporter=common.reporter, device=common.device, dtype=common.dtype, **o)
    common.show(plan.as_dict(context), lambda: format_plan(plan, context))


class Terminated(BaseException):
    """SIGTERM, as a container or a batch system sends it: the way out is that of Ctrl-C."""


def _terminated(*_: Any) -> None:
    raise Terminated


def main(arguments: list[str] | None = None) -> None:
    """The console script: runs a command and turns what goes wrong into one line and an exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    signal.signal(signal.SIGTERM, _terminated)
    try:
        cli.main(given, prog_name="specialize", standalone_mode=False)
        code = 0
    except Terminated:
        print("terminated; what was finished is kept, the same command goes on from there", file=sys.stderr)
        code = TERMINATED
    except click.exceptions.Exit as error:
        code = error.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        code = 2
    except click.UsageError as error:
        where = f"; see {error.ctx.command_path} --help" if error.ctx is not None else ""
        print(f"specialize: {' '.join(error.format_message().split()).rstrip('.')}{where}", file=sys.stderr)
        code = 2
    except (KeyboardInterrupt, click.Abort):
        print("interrupted; what was finished is kept, the same command goes on from there", file=sys.stderr)
        code = INTERRUPTED
    except InputError as error:
        if "--debug" in given:
            raise
        print(f"specialize: {' '.join(str(error).split())}", file=sys.stderr)
        code = 2
    except BrokenPipeError:
        code = 1
    except Exception as error:
        if "--debug" in given:
            raise
        full = (
            getattr(error, "errno", None) == DISK_FULL or "disk is full" in str(error) or "No space left" in str(error)
        )
        if full:
            message = "the disk is full; free some space and run the same command again, what was finished is kept"
        else:
            lines = str(error).strip().splitlines() or [""]
            message = f"{type(error).__name__}: {lines[0]} (add --debug for the traceback)"
        print(f"specialize: {message}", file=sys.stderr)
        code = 1
    raise SystemExit(code)


if __name__ == "__main__":
    main()
