"""Chat templates, which come with downloaded models and are therefore programs of strangers.

They run in jinja2's immutable sandbox: no attributes beyond data, no files. Further limits: the template's size, the
length of what it prints and of the strings it builds, the loop steps it may ask ``range`` for, and the time it takes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from specialize.errors import InputError

MAX_TEMPLATE_CHARS = 200_000
MAX_CHARS = 10_000_000  # of the output, and of any value on the way
MAX_LOOP_STEPS = 200_000
MAX_SECONDS = 5.0
MAX_WIDTH = 10_000  # of padding and indentation


class TemplateError(Exception):
    """The template itself refused the messages."""


class _Generator(CodeGenerator):
    """Lets the environment see the concatenations ``a ~ b``."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.concat((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class _Environment(ImmutableSandboxedEnvironment):
    """Counts down a budget; jinja2 asks the environment for every call, attribute, item and listed operator."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])
    code_generator_class = _Generator

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        self.deadline = time.monotonic() + MAX_SECONDS
        self.loop_steps = 0
        self.filters["tojson"] = _tojson
        self.globals["raise_exception"] = _refuse
        self.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self.globals["range"] = self._range
        self.globals.pop("lipsum", None)
        for name in ("center", "format", "wordwrap", "xmlattr", "urlize"):  # never seen in a chat template
            self.filters.pop(name, None)
        indent = self.filters["indent"]
        self.filters["indent"] = lambda text, width=4, *args, **kwargs: indent(
            text, self._width(width), *args, **kwargs
        )

    def _tick(self) -> None:
        if time.monotonic() > self.deadline:
            raise SecurityError(f"it runs longer than {MAX_SECONDS:g} s")

    def _range(self, *args: int) -> range:
        steps = range(*args)
        self.loop_steps += len(steps)
        if self.loop_steps > MAX_LOOP_STEPS:
            raise SecurityError(f"it loops more than {MAX_LOOP_STEPS} times")
        self._tick()
        return steps

    def _width(self, value: Any) -> Any:
        if len(value) > MAX_WIDTH if isinstance(value, str) else isinstance(value, int) and value > MAX_WIDTH:
            raise SecurityError(f"it pads by more than {MAX_WIDTH} characters")
        return value

    def _sized(self, value: Any) -> Any:
        if isinstance(value, str | list | tuple) and len(value) > MAX_CHARS:
            raise SecurityError(f"it builds a value longer than {MAX_CHARS}")
        return value

    def concat(self, values: tuple[Any, ...]) -> str:
        self._tick()
        return self._sized("".join(map(str, values)))

    def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        self._tick()
        if isinstance(getattr(function, "__self__", None), str):
            if getattr(function, "__name__", "") in ("format", "format_map"):
                raise SecurityError("it formats strings")
            for value in args:
                self._width(value if isinstance(value, int) else 0)
        return self._sized(super().call(context, function, *args, **kwargs))

    def getattr(self, obj: Any, attribute: str) -> Any:
        self._tick()
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        self._tick()
        return super().getitem(obj, argument)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self._tick()
        if operator == "*":
            for value, count in ((left, right), (right, left)):
                if isinstance(value, str | list | tuple) and isinstance(count, int) and len(value) * count > MAX_CHARS:
                    raise SecurityError(f"it builds a value longer than {MAX_CHARS}")
        if operator == "**" or (operator == "%" and isinstance(left, str)):
            raise SecurityError(f"it uses the operator {operator}")
        return self._sized(super().call_binop(context, operator, left, right))


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise TemplateError(message)


def render_chat(
    template: str,
    variables: Mapping[str, Any],
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool,
    *,
    source: str,
) -> str:
    """The text of a chat. Raises InputError where the template is unusable, breaks a limit, or refuses the messages."""
    if len(template) > MAX_TEMPLATE_CHARS:
        raise InputError(f"{source}: the chat template has {len(template)} characters; allowed: {MAX_TEMPLATE_CHARS}")
    pieces, size = [], 0
    try:
        environment = _Environment()
        rendering = environment.from_string(template).generate(
            messages=[dict(m) for m in messages], add_generation_prompt=add_generation_prompt, **variables
        )
        for piece in rendering:
            pieces.append(piece)
            size += len(piece)
            environment._tick()
            if size > MAX_CHARS:
                raise SecurityError(f"it prints more than {MAX_CHARS} characters")
    except TemplateError as error:
        raise InputError(f"{source}: the chat template refuses these messages: {error}") from None
    except SecurityError as error:
        raise InputError(f"{source}: the chat template was stopped: {error}") from None
    except (
        jinja2.TemplateError,
        TypeError,
        ValueError,
        LookupError,
        ArithmeticError,
        RecursionError,
        MemoryError,
    ) as error:
        reason = str(error).splitlines() or [type(error).__name__]
        raise InputError(f"{source}: the chat template does not work: {reason[0]}") from None
    return "".join(pieces)
