"""A run's settings: frozen, complete, read from YAML. An unknown key or a bad value is an error with file and line."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from .errors import InputError
from .files import write_text

INPUTS = ("model", "seeds", "corpus", "tasks")


@dataclass(frozen=True)
class Retrieval:
    """How passages are cut and found. mode: "bm25" as in the paper, "dense", "hybrid" (both fused by rank) or "off"."""

    mode: str = "hybrid"
    embedder: str = "all-minilm-l6-v2"
    chunk_words: int = 120
    overlap_words: int = 20


@dataclass(frozen=True)
class Teacher:
    """The model that answers: the base tuned on the seeds alone first, or (enabled: false) the base itself."""

    enabled: bool = True


@dataclass(frozen=True)
class Instructions:
    """Where candidates come from. ``novel`` is the share of invented instructions; the rest pairs the seeds' kinds of
    task with inputs cut from the corpus. ``material``: documents "nearest" to the kind's seeds, or "random" ones.
    ``shares``: every kind of task gets as many "rows", or as many "words", so that short ones get more rows."""

    novel: float = 0.0
    novel_input: str = "corpus"
    material: str = "nearest"
    candidates: float = 2.0
    max_waves: int = 4
    demonstrations: int = 3
    group: int = 16
    temperature: float = 1.0
    top_p: float = 0.98
    max_tokens: int = 128
    shares: str = "rows"


@dataclass(frozen=True)
class Responses:
    """How candidates are answered: one greedy sample and ``samples`` drawn ones, seed demonstrations, passages.

    ``passages_for``: "open" gives passages where the answer does not lie in the input (invented instructions, free
    text), "all" to every prompt. ``contrast``: from the second round on, when the expert answers, it is decoded against
    the base by this strength (`SamplingParams.contrast`; 0: plainly). ``shots``: from the second round on as many
    answers again as ``samples``, greedy ones, each after so many other seeds of its kind (0: none). An expert that was
    tuned on rows in groups (``tune.demonstrations``) agrees with itself less when it is shown other examples, and where
    it still does, it is right more often.
    """

    demonstrations: int = 0
    passages: int = 2
    passages_for: str = "open"
    passage_words: int = 80
    samples: int = 4
    temperature: float = 0.7
    top_p: float = 0.95
    max_tokens: int = 128
    contrast: float = 0.0
    shots: int = 0


@dataclass(frozen=True)
class Filter:
    """``rouge_l``: an instruction nearer than this to a kept one is rejected. ``min_agreement``: samples that agree
    less are rejected, of labels also those that agree less than draws from the seeds' labels would; 0: none.
    ``balance``: each kind of task keeps an equal share, labels the proportions of the seeds."""

    enabled: bool = True
    rouge_l: float = 0.7
    min_words: int = 4
    max_words: int = 60
    max_response_words: int = 200
    min_agreement: float = 0.3
    balance: bool = True
    overlap_words: int = 13


@dataclass(frozen=True)
class Tune:
    """LoRA on base weights. ``epochs`` are passes over seeds and kept rows together; with ``budget: teacher`` there are
    as many passes as spend the teacher's tokens. The control on the seeds alone gets as many tokens as the expert.
    ``teacher_epochs`` are passes over the seeds for the model that answers. ``normalise``: whether each response token
    or each row has the same say in a step.

    ``rank_stabilized`` is rsLoRA's scale, ``dora`` trains the length of weight rows beside their direction, ``init``
    "pissa" starts from the weights' leading singular vectors, ``plus_ratio`` (LoRA+) is how much faster B learns.
    ``validation`` is the share of rows held out; ``patience`` validations (one an epoch) without a new lowest loss end
    the training (0: never), ``keep_best`` gives the weights of the lowest. All this holds for teacher and
    control as for the expert.

    ``demonstrations``: the share ``few_shot`` of the rows stands in groups, up to so many rows before a row as its
    demonstrations; of the teacher's rows, too, if it is to answer with demonstrations. ``anchor`` weighs the KL
    divergence from the base on texts of its own, ``anchor_tokens`` long.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: str = "all"
    dropout: float = 0.0
    learning_rate: float = 5e-4
    schedule: str = "linear"
    warmup: float = 0.05
    budget: str = "epochs"
    epochs: float = 2.0
    teacher_epochs: float = 4.0
    batch: int = 4
    normalise: str = "tokens"
    max_length: int = 1024
    weight_decay: float = 0.0
    include_seeds: bool = True
    seed_repeat: int = 1
    validation: float = 0.0
    rank_stabilized: bool = False
    dora: bool = False
    init: str = "kaiming"
    plus_ratio: float = 1.0
    patience: int = 0
    keep_best: bool = False
    demonstrations: int = 0
    few_shot: float = 0.5
    anchor: float = 0.0
    anchor_tokens: int = 192


# Settings younger than runs that lie on disks: at their defaults they are no part of a stage's fingerprint.
YOUNGER = {
    "tune": (
        "rank_stabilized", "dora", "init", "plus_ratio", "patience", "keep_best", "demonstrations", "few_shot",
        "anchor", "anchor_tokens",
    ),
    "instructions": ("shares",),
}  # fmt: skip


@dataclass(frozen=True)
class Evaluate:
    """``systems`` are scored with each of ``shots`` on ``limit`` examples a task (0: all).

    ``base_shots`` are further shots for the base alone, a control for what examples in the prompt already give.
    ``seeds_only``: a control is made and scored, too: the base tuned on the seeds alone for as many tokens as the
    expert. ``teacher``: the recipe's teacher is scored, too, unless it is that control already. As many tokens overfit
    few seeds, so that the teacher, tuned on them for ``tune.teacher_epochs`` only, can be the stronger control.
    ``general``: perplexity on general text and scores on general tasks, too, so that forgetting is seen.
    """

    shots: tuple[int, ...] = (0,)
    base_shots: tuple[int, ...] = ()
    limit: int = 60
    max_tokens: int = 96
    seeds_only: bool = True
    teacher: bool = False
    general: bool = True


@dataclass(frozen=True)
class Recipe:
    """Everything a run depends on besides its input files.

    ``holdout`` is the share of each kind's seeds, at least one, that nothing is made of: their loss under each round's
    expert decides which round's is taken and whether a third or later one is begun; ``tune.keep_best`` and
    ``tune.patience`` look at it, too.
    """

    name: str = "recipe"
    description: str = ""
    seed: int = 0
    examples: int = 300
    rounds: int = 1
    holdout: float = 0.0
    dtype: str = "auto"
    quantize: str = "none"
    kv_dtype: str = "auto"
    retrieval: Retrieval = field(default_factory=Retrieval)
    teacher: Teacher = field(default_factory=Teacher)
    instructions: Instructions = field(default_factory=Instructions)
    responses: Responses = field(default_factory=Responses)
    filter: Filter = field(default_factory=Filter)
    tune: Tune = field(default_factory=Tune)
    evaluate: Evaluate = field(default_factory=Evaluate)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they stand in YAML."""

        def plain(value: Any) -> Any:
            if dataclasses.is_dataclass(value):
                return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
            return list(value) if isinstance(value, tuple) else value

        return plain(self)


_CHOICES = {
    "dtype": ("auto", "fp32", "bf16", "fp16"),
    "quantize": ("none", "nf4", "int8", "fp8", "nf4+head", "int8+head", "fp8+head"),
    "kv_dtype": ("auto", "fp32", "bf16", "fp16", "int8", "fp8"),
    "retrieval.mode": ("bm25", "dense", "hybrid", "off"),
    "instructions.novel_input": ("corpus", "written"),
    "instructions.material": ("nearest", "random"),
    "instructions.shares": ("rows", "words"),
    "responses.passages_for": ("open", "all"),
    "tune.budget": ("epochs", "teacher"),
    "tune.normalise": ("tokens", "examples"),
    "tune.init": ("kaiming", "pissa"),
    "tune.schedule": ("linear", "cosine", "constant"),
}
_MAX_BYTES = 1 << 18
_MAX_DEPTH = 20  # recipes have three levels; the scanner looks at all open ones at each token
# Inclusive bounds of numbers; None is open.
_BOUNDS: dict[str, tuple[float, float | None]] = {
    "examples": (1, None),
    "rounds": (1, 100),
    "holdout": (0, 0.5),
    "retrieval.chunk_words": (8, None),
    "retrieval.overlap_words": (0, None),
    "instructions.novel": (0, 1),
    "instructions.candidates": (1, 100),
    "instructions.max_waves": (1, 1000),
    "instructions.demonstrations": (1, 100),
    "instructions.group": (1, None),
    "instructions.temperature": (0, 10),
    "instructions.top_p": (0.01, 1),
    "instructions.max_tokens": (1, None),
    "responses.demonstrations": (0, 100),
    "responses.passages": (0, 100),
    "responses.passage_words": (1, None),
    "responses.samples": (0, 100),
    "responses.temperature": (0, 10),
    "responses.top_p": (0.01, 1),
    "responses.max_tokens": (1, None),
    "responses.contrast": (0, 100),
    "responses.shots": (0, 100),
    "filter.rouge_l": (0.01, 1),
    "filter.min_words": (1, None),
    "filter.max_words": (1, None),
    "filter.max_response_words": (1, None),
    "filter.min_agreement": (0, 1),
    "filter.overlap_words": (3, 100),
    "tune.rank": (1, 1024),
    "tune.alpha": (0.001, None),
    "tune.dropout": (0, 0.9),
    "tune.learning_rate": (1e-8, 1),
    "tune.warmup": (0, 1),
    "tune.epochs": (0.01, 1000),
    "tune.teacher_epochs": (0.01, 1000),
    "tune.batch": (1, None),
    "tune.max_length": (16, None),
    "tune.weight_decay": (0, 10),
    "tune.seed_repeat": (1, 1000),
    "tune.validation": (0, 0.5),
    "tune.plus_ratio": (0.01, 1000),
    "tune.patience": (0, 1000),
    "tune.demonstrations": (0, 100),
    "tune.few_shot": (0, 1),
    "tune.anchor": (0, 1000),
    "tune.anchor_tokens": (1, None),
    "evaluate.limit": (0, None),
    "evaluate.max_tokens": (1, None),
}


def _compose(path: Path) -> Any:
    """The YAML node tree of a small file without aliases: those could make a few lines stand for more than memory
    holds."""
    import yaml

    try:
        if path.stat().st_size > _MAX_BYTES:
            raise InputError(f"{path}: larger than {_MAX_BYTES >> 10} KiB; this is no recipe")
        text = path.read_text(encoding="utf-8")
        starts = (yaml.FlowSequenceStartToken, yaml.FlowMappingStartToken)
        starts += (yaml.BlockSequenceStartToken, yaml.BlockMappingStartToken)
        ends = (yaml.FlowSequenceEndToken, yaml.FlowMappingEndToken, yaml.BlockEndToken)
        depth = 0
        for token in yaml.scan(text, Loader=yaml.SafeLoader):
            depth += isinstance(token, starts) - isinstance(token, ends)
            if depth > _MAX_DEPTH:
                line = token.start_mark.line + 1
                raise InputError(f"{path}:{line}: nested more than {_MAX_DEPTH} deep; this is no recipe")
            if isinstance(token, yaml.AliasToken | yaml.AnchorToken):
                line = token.start_mark.line + 1
                raise InputError(f"{path}:{line}: anchors and aliases (& and *) are not taken; write the value out")
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise InputError(f"{path}:{line}: not YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # the latter two: no UTF-8, an escape beyond Unicode
        raise InputError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise InputError(f"{path}: nested too deeply; this is no recipe") from None


class _Reader:
    """Turns a YAML node tree into dataclasses; every complaint names the line."""

    def __init__(self, source: str):
        self.source = source
        self.lines: dict[str, int] = {}  # of each setting that the file has, counted from 1

    def fail(self, node: Any, message: str) -> InputError:
        return InputError(f"{self.source}:{node.start_mark.line + 1}: {message}")

    def section(self, cls: type, node: Any, path: str, base: Any) -> Any:
        import yaml

        if not isinstance(node, yaml.MappingNode):
            raise self.fail(node, f"{path or 'a recipe'} must be a mapping of settings")
        hints = get_type_hints(cls)
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = str(key_node.value)
            full = f"{path}.{key}" if path else key
            if key not in hints:
                raise self.fail(key_node, f'unknown setting "{full}"; known here: {", ".join(hints)}')
            if key in values:
                raise self.fail(key_node, f'"{full}" is set twice')
            self.lines[full] = key_node.start_mark.line + 1
            if dataclasses.is_dataclass(hints[key]):
                values[key] = self.section(hints[key], value_node, full, getattr(base, key))  # type: ignore[arg-type]
            else:
                values[key] = self.value(hints[key], value_node, full)
        return dataclasses.replace(base, **values)

    def value(self, hint: Any, node: Any, path: str) -> Any:
        import yaml

        try:
            value = yaml.SafeLoader("").construct_object(node, deep=True)
        except (yaml.YAMLError, ValueError, TypeError, ArithmeticError, LookupError, AttributeError) as error:
            raise self.fail(node, f"{path} holds no usable value ({' '.join(str(error).split())[:200]})") from None
        try:
            return check_value(path, hint, value)
        except InputError as error:
            raise self.fail(node, str(error)) from None


def check_value(path: str, hint: Any, value: Any) -> Any:
    """``value`` as the type of setting ``path``, or an InputError that says what is allowed."""
    if get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise InputError(f"{path} must be a list, not {value!r}")
        items = tuple(check_value(f"{path}[]", get_args(hint)[0], v) for v in value)
        if any(v < 0 for v in items):
            raise InputError(f"{path} must not hold negative numbers")
        return items
    if hint is float and isinstance(value, str):  # YAML 1.1 reads 5e-4 as text
        try:
            value = float(value)
        except ValueError:
            raise InputError(f"{path} must be a number, not {value!r}") from None
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if value is False and hint is str and "off" in _CHOICES.get(path, ()):
        value = "off"  # what YAML 1.1 takes for a truth value
    if type(value) is not hint:
        wanted = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}[hint]
        raise InputError(f"{path} must be {wanted}, not {value!r}")
    if path in _CHOICES and value not in _CHOICES[path]:
        raise InputError(f"{path} is {value!r}; allowed: {', '.join(_CHOICES[path])}")
    if path in _BOUNDS:
        low, high = _BOUNDS[path]
        if not value >= low or (high is not None and value > high):
            raise InputError(f"{path} is {value}; allowed: {low} to {'any' if high is None else high}")
    return value


def _check_whole(recipe: Recipe, source: str, lines: Mapping[str, int] | None = None) -> Recipe:
    """What settings must be to each other. ``lines`` says where in ``source`` a setting stands."""

    def require(condition: bool, message: str, *settings: str) -> None:
        if not condition:
            line = max((lines[name] for name in settings if name in lines), default=0) if lines else 0
            raise InputError(f"{source}:{line}: {message}" if line else f"{source}: {message}")

    require(
        recipe.retrieval.overlap_words < recipe.retrieval.chunk_words,
        f"retrieval.overlap_words ({recipe.retrieval.overlap_words}) must be smaller than retrieval.chunk_words "
        f"({recipe.retrieval.chunk_words})",
        "retrieval.overlap_words", "retrieval.chunk_words",
    )  # fmt: skip
    require(
        recipe.filter.min_words <= recipe.filter.max_words,
        f"filter.min_words ({recipe.filter.min_words}) is larger than filter.max_words ({recipe.filter.max_words})",
        "filter.min_words", "filter.max_words",
    )  # fmt: skip
    require(
        recipe.tune.validation > 0 or recipe.holdout > 0 or not (recipe.tune.patience or recipe.tune.keep_best),
        "tune.patience and tune.keep_best need rows to validate on; set tune.validation to 0.1, or holdout",
        "tune.patience", "tune.keep_best", "tune.validation",
    )  # fmt: skip
    require(
        not (recipe.tune.validation and recipe.holdout),
        "tune.validation holds out rows and holdout seeds; set one of them to 0",
        "tune.validation", "holdout",
    )  # fmt: skip
    return recipe


def shipped() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    folder = Path(__file__).parent / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def read_recipe(name_or_path: str | Path) -> tuple[Recipe, dict[str, str]]:
    """A shipped recipe by name or any YAML file: (recipe, its ``inputs`` mapping, empty where it has none).

    ``inputs`` names some of model, seeds, corpus and tasks; a relative path there begins at the recipe's folder.
    """
    import yaml

    path = shipped().get(str(name_or_path), Path(name_or_path))
    if not path.is_file():
        raise InputError(f"recipe: {name_or_path} is neither a file nor shipped; shipped: {', '.join(shipped())}")
    root = _compose(path)
    inputs: dict[str, str] = {}
    if root is None:
        return Recipe(), inputs
    reader = _Reader(str(path))
    if isinstance(root, yaml.MappingNode):
        for pair in list(root.value):
            if pair[0].value == "inputs":
                inputs = _read_inputs(reader, pair[1], path.parent)
                root.value.remove(pair)
    return _check_whole(reader.section(Recipe, root, "", Recipe()), str(path), reader.lines), inputs


def _read_inputs(reader: _Reader, node: Any, folder: Path) -> dict[str, str]:
    import yaml

    if not isinstance(node, yaml.MappingNode):
        raise reader.fail(node, "inputs must be a mapping of " + ", ".join(INPUTS))
    inputs = {}
    for key, value in node.value:
        if str(key.value) not in INPUTS:
            raise reader.fail(key, f'unknown setting "inputs.{key.value}"; known here: {", ".join(INPUTS)}')
        if not isinstance(value, yaml.ScalarNode) or not value.value.strip():
            raise reader.fail(value, f"inputs.{key.value} must be a path" + " or a name" * (key.value == "model"))
        try:
            path = (folder / Path(value.value).expanduser()).resolve()
            there = path.exists()
        except (OSError, ValueError, RuntimeError) as error:  # a NUL, an endless name, an unknown user
            raise reader.fail(value, f"inputs.{key.value} is no usable path ({error})") from None
        # A model may be a name that is fetched.
        inputs[key.value] = value.value if key.value == "model" and not there else str(path)
    return inputs


def read_yaml(path: Path) -> Any:
    """A small YAML file as plain values, within a recipe's limits and with its errors."""
    import yaml

    root = _compose(path)
    try:
        return None if root is None else yaml.SafeLoader("").construct_document(root)
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise InputError(f"{path}: not YAML: {' '.join(str(error).split())}") from None


def remembered_inputs(path: Path) -> dict[str, str]:
    """The ``inputs`` of a run folder's recipe, whatever its settings: an older version's may be unknown to this one."""
    import yaml

    root = _compose(path)
    pairs = root.value if isinstance(root, yaml.MappingNode) else []
    inputs = next((value for key, value in pairs if key.value == "inputs"), None)
    if not isinstance(inputs, yaml.MappingNode):
        return {}
    return {str(key.value): value.value for key, value in inputs.value if isinstance(value, yaml.ScalarNode)}


def override(recipe: Recipe, settings: Mapping[str, Any] | Sequence[str]) -> Recipe:
    """The recipe with some settings changed: ``{"tune.rank": 8}`` or ``["tune.rank=8"]`` (values as in YAML)."""
    import yaml

    if not isinstance(settings, Mapping):
        pairs = {}
        for text in settings:
            key, found, value = text.partition("=")
            if not found:
                raise InputError(f'--set {text}: write it as "section.setting=value"')
            try:
                pairs[key.strip()] = yaml.safe_load(value)
            except (yaml.YAMLError, ValueError, OverflowError):
                raise InputError(f"--set {text}: the value is not YAML") from None
        settings = pairs
    for path, value in settings.items():
        *parents, name = path.split(".")
        owner: Any = recipe
        for parent in parents:
            owner = getattr(owner, parent, None)
        hints = get_type_hints(type(owner)) if dataclasses.is_dataclass(owner) else {}
        if name not in hints or dataclasses.is_dataclass(hints[name]):
            raise InputError(f'unknown setting "{path}"; see the recipe files for those there are')
        owner = dataclasses.replace(owner, **{name: check_value(path, hints[name], value)})  # type: ignore[type-var]
        if parents:
            owner = dataclasses.replace(recipe, **{parents[0]: owner})
        recipe = owner
    return _check_whole(recipe, "settings")


def write_recipe(recipe: Recipe, inputs: Mapping[str, str], path: Path) -> None:
    """Write the resolved recipe with its inputs; ``read_recipe`` gives both back."""
    import yaml

    text = yaml.safe_dump(recipe.to_dict() | {"inputs": dict(inputs)}, sort_keys=False, allow_unicode=True)
    write_text(path, "# Written by specialize: the settings this run was made with.\n" + text)
