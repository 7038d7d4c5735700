"""Text that a model is shown: the training format and, from the templates in ``prompts/``, the synthesis prompts.

Demonstrations stand first and are shared by a group of prompts, so that the generator's prefix cache serves them; what
differs (passages, instruction, input) comes last.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

STOP = ("\n###", "###")


@cache
def _template(name: str) -> Any:
    import jinja2

    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
    )
    return environment.from_string((Path(__file__).parent / "prompts" / f"{name}.jinja").read_text(encoding="utf-8"))


def render(name: str, **values: Any) -> str:
    """Render ``prompts/NAME.jinja``. A value that the template wants and nobody gave raises."""
    return _template(name).render(**values)


def example_prompt(instruction: str, input: str, shots: Sequence[tuple[str, str, str]] = ()) -> str:
    """The format of tuning and evaluation: shots (instruction, input, output), then the question up to its answer."""
    return render("example", instruction=instruction, input=input, shots=shots)


def response_prompt(
    instruction: str, input: str, shots: Sequence[tuple[str, str, str]] = (), passages: Sequence[str] = ()
) -> str:
    """The synthesis prompt for an answer: group's demonstrations, retrieved passages, then the question."""
    return render("response", instruction=instruction, input=input, shots=shots, passages=passages)


def instruction_prompt(shots: Sequence[tuple[str, str]], text: str) -> str:
    """Ask for a new instruction about ``text``, or, with no text, for an instruction and an input of its own.

    ``shots`` are (instruction, input) of seeds.
    """
    return render("instruction" if text else "instruction_and_input", shots=shots, text=text).rstrip()


def input_prompt(instruction: str, shots: Sequence[tuple[str, str]], material: str, wanted: str, name: str) -> str:
    """Ask for the part of an input that no text yields by cutting: what is ``wanted`` for the material called ``name``,
    or (nothing named) a whole input for the task. ``shots`` are (material, what was written). The format is that of
    tuning, since the seeds-tuned model is the one that is asked."""
    if wanted:
        ask = f"Write the {wanted} that belongs to the {name}."
    else:
        ask = f"Write an input for the following task that draws on the text. Task: {instruction}"
    return example_prompt(ask, material, [(ask, text, written) for text, written in shots])


def parse_instruction(raw: str) -> tuple[str, str] | None:
    """(instruction, input) of a reply to ``instruction_prompt``, or None. The input is "" when the reply has none."""
    text = raw
    for mark in ("\n\nTask", "\nTask ", "\n\nText:", "\n###"):
        text = text.split(mark)[0]
    text = text.strip()
    if text.lower().startswith("instruction:"):
        text = text[len("instruction:") :].strip()
    parts = text.split("Input:", 1)
    instruction = " ".join(parts[0].split()).strip(" \"'*-")
    if not instruction or not any(c.isalpha() for c in instruction):
        return None
    return instruction, parts[1].strip() if len(parts) > 1 else ""


@cache
def openings() -> tuple[str, ...]:
    """First words of texts of no domain, for a base model to go on from: ``prompts/openings.txt``."""
    return tuple((Path(__file__).parent / "prompts" / "openings.txt").read_text(encoding="utf-8").splitlines())


def clean_reply(raw: str) -> str:
    """An answer as it is kept: up to the next heading of the format, stripped."""
    return raw.split("###")[0].strip()
