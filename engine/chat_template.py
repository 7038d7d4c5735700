"""Chat templates, which come with downloaded models and are therefore programs of strangers.

They run in jinja2's immutable sandbox: no attributes beyond data, no files. Further limits: the template's size, the
length of what it prints, the loop steps it may ask ``range`` for, the size of repeated strings, and the time it takes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from specialize.errors import InputError

MAX_TEMPLATE_CHARS = 200_000
MAX_OUTPUT_CHARS = 20_000_000
MAX_LOOP_STEPS = 200_000
MAX_SECONDS = 5.0


class TemplateError(Exception):
    """The template itself refused the messages."""


class _Environment(ImmutableSandboxedEnvironment):
    """Counts down a budget; jinja2 asks the environment for every call, attribute, item and listed operator."""

    intercepted_binops = frozenset(["*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        self.deadline = time.monotonic() + MAX_SECONDS
        self.loop_steps = 0
        self.filters["tojson"] = _tojson
        self.globals["raise_exception"] = _refuse
        self.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self.globals["range"] = self._range
        for name in ("lipsum", "cycler"):
            self.globals.pop(name, None)

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

    def call(self, *args: Any, **kwargs: Any) -> Any:
        self._tick()
        return super().call(*args, **kwargs)

    def getattr(self, obj: Any, attribute: str) -> Any:
        self._tick()
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        self._tick()
        return super().getitem(obj, argument)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            for text, count in ((left, right), (right, left)):
                too_long = isinstance(text, str | list | tuple) and len(text) * count > MAX_OUTPUT_CHARS
                if isinstance(count, int) and too_long:
                    raise SecurityError("it repeats a value too often")
        if operator == "**" or (operator == "%" and isinstance(left, str)):
            raise SecurityError(f"it uses the operator {operator}")
        return super().call_binop(context, operator, left, right)


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
            if size > MAX_OUTPUT_CHARS:
                raise SecurityError(f"it prints more than {MAX_OUTPUT_CHARS} characters")
    except TemplateError as error:
        raise InputError(f"{source}: the chat template refuses these messages: {error}") from None
    except SecurityError as error:
        raise InputError(f"{source}: the chat template was stopped: {error}") from None
    except (jinja2.TemplateError, TypeError, ValueError, KeyError, ArithmeticError, RecursionError) as error:
        raise InputError(f"{source}: the chat template does not work: {error}") from None
    return "".join(pieces)
