"""Chat templates, which come with downloaded models and are therefore programs of strangers.

They run in jinja2's immutable sandbox: no attributes beyond data, no files. Further limits: the template's size, the
length of what it prints, of the strings it builds and of its nested lists (each use of a list counts, as it does when
it is printed), the size of its whole numbers, the loop steps it may ask ``range`` for, and the time it takes: every
turn of a loop and every call looks at the clock.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import wraps
from typing import Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.nodes import EvalContext
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from specialize.errors import InputError

MAX_TEMPLATE_CHARS = 200_000
MAX_CHARS = 10_000_000  # of the output, and of any value on the way
MAX_LOOP_STEPS = 200_000
MAX_SECONDS = 5.0
MAX_WIDTH = 10_000  # of padding and indentation
MAX_ITEMS = 200_000  # of a list or mapping, those of the lists in it included
MAX_BITS = 4096  # of a whole number


class TemplateError(Exception):
    """The template itself refused the messages."""


class _Generator(CodeGenerator):
    """Lets the environment see the concatenations ``a ~ b``, the lists and mappings that are written out, and each turn
    of a loop."""

    def visit_For(self, node: nodes.For, frame: Frame) -> None:
        tick = nodes.Call(nodes.EnvironmentAttribute("tick"), [], [], None, None)
        node.body.insert(0, nodes.ExprStmt(tick).set_lineno(node.lineno))
        super().visit_For(node, frame)

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self._nested(super().visit_List, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        if node.ctx == "load":
            self._nested(super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self._nested(super().visit_Dict, node, frame)

    def _nested(self, visit: Callable[[Any, Frame], None], node: nodes.Expr, frame: Frame) -> None:
        self.write("environment.sized(")
        visit(node, frame)
        self.write(")")

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
        for name in (
            "center",
            "format",
            "wordwrap",
            "xmlattr",
            "urlize",
            "batch",
            "slice",
        ):  # no chat template has them
            self.filters.pop(name, None)
        indent = self.filters["indent"]
        self.filters["indent"] = lambda text, width=4, *args, **kwargs: indent(
            text, self._width(width), *args, **kwargs
        )

        for name, function in list(self.filters.items()):
            self.filters[name] = self._guarded(name, function)

    def _guarded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter whose result is measured, and that of ``replace`` and ``join`` ahead of making it."""

        @wraps(function)  # keeps jinja's mark of filters that want the environment as their first argument
        def call(*args: Any, **kwargs: Any) -> Any:
            self.tick()
            values = [*(a for a in args if not isinstance(a, _Environment | EvalContext | Context)), *kwargs.values()]
            if name in ("replace", "join"):
                self._check_product(values)
            result = function(*args, **kwargs)
            return result if isinstance(result, Iterator) else self.sized(result)

        return call

    def _check_product(self, values: Sequence[Any]) -> None:
        lengths = [len(v) for v in values if isinstance(v, str | list | tuple | dict)]
        if len(lengths) > 1 and lengths[0] * max(lengths[1:]) > MAX_CHARS:
            raise SecurityError(f"it builds a value longer than {MAX_CHARS}")

    def tick(self) -> None:
        if time.monotonic() > self.deadline:
            raise SecurityError(f"it runs longer than {MAX_SECONDS:g} s")

    def _range(self, *args: int) -> range:
        steps = range(*args)
        self.loop_steps += len(steps)
        if self.loop_steps > MAX_LOOP_STEPS:
            raise SecurityError(f"it loops more than {MAX_LOOP_STEPS} times")
        self.tick()
        return steps

    def _width(self, value: Any) -> Any:
        if len(value) > MAX_WIDTH if isinstance(value, str) else isinstance(value, int) and value > MAX_WIDTH:
            raise SecurityError(f"it pads by more than {MAX_WIDTH} characters")
        return value

    def sized(self, value: Any) -> Any:
        """``value``, measured: a list within lists counts as often as it would be printed."""
        left, at = MAX_ITEMS, [value]
        while at:
            item = at.pop()
            if isinstance(item, str):
                if len(item) > MAX_CHARS:
                    raise SecurityError(f"it builds a value longer than {MAX_CHARS}")
            elif isinstance(item, list | tuple | dict | set):
                left -= len(item)
                if left < 0:
                    raise SecurityError(f"it builds a value of more than {MAX_ITEMS} items")
                at += [*item, *item.values()] if isinstance(item, dict) else item
            elif isinstance(item, int) and item.bit_length() > MAX_BITS:
                raise SecurityError(f"it computes a number of more than {MAX_BITS} bits")
        return value

    def concat(self, values: tuple[Any, ...]) -> str:
        self.tick()
        return self.sized("".join(map(str, values)))

    def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        self.tick()
        if isinstance(getattr(function, "__self__", None), str):
            if getattr(function, "__name__", "") in ("format", "format_map"):
                raise SecurityError("it formats strings")
            for value in args:
                self._width(value if isinstance(value, int) else 0)
            if getattr(function, "__name__", "") in ("replace", "join"):
                self._check_product([function.__self__, *args])
        return self.sized(super().call(context, function, *args, **kwargs))

    def getattr(self, obj: Any, attribute: str) -> Any:
        self.tick()
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        self.tick()
        return super().getitem(obj, argument)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self.tick()
        if operator == "*":
            for value, count in ((left, right), (right, left)):
                if isinstance(value, str | list | tuple) and isinstance(count, int) and len(value) * count > MAX_CHARS:
                    raise SecurityError(f"it builds a value longer than {MAX_CHARS}")
        if operator == "*" and isinstance(left, int) and isinstance(right, int):
            self.sized([left, right])
        if operator == "**" or (operator == "%" and isinstance(left, str)):
            raise SecurityError(f"it uses the operator {operator}")
        return self.sized(super().call_binop(context, operator, left, right))


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
            environment.tick()
            if size > MAX_CHARS:
                raise SecurityError(f"it prints more than {MAX_CHARS} characters")
    except TemplateError as error:
        raise InputError(f"{source}: the chat template refuses these messages: {error}") from None
    except SecurityError as error:
        raise InputError(f"{source}: the chat template was stopped: {error}") from None
    except Exception as error:  # noqa: BLE001  (a stranger's program: whatever it raises, it is what does not work)
        reason = str(error).splitlines() or [type(error).__name__]
        raise InputError(f"{source}: the chat template does not work: {reason[0]}") from None
    return "".join(pieces)
