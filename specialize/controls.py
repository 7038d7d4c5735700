"""What the controls on the seeds alone are called wherever systems are shown.

``eval.json`` knows them as "seeds" (tuned for as many tokens as the expert) and "teacher" (for the recipe's
``tune.teacher_epochs``). Where both can be seen, their names say how they differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

ALONE = "seeds alone"
EQUAL_TOKENS = f"{ALONE}, equal tokens"


def passes(epochs: Iterable[float]) -> str:
    """``4 epochs``, or ``2 or 4 epochs`` where runs differ in it."""
    chosen = sorted(set(epochs))
    return f"{' or '.join(f'{n:g}' for n in chosen)} epoch{'' if chosen == [1] else 's'}"


def control_names(teacher_epochs: Iterable[float] = (), alone: str = ALONE) -> dict[str, str]:
    """The controls' names by system. ``teacher_epochs``: those of the teachers that are scored, too; without one the
    control of equal tokens is called ``alone``."""
    epochs = tuple(teacher_epochs)
    return {"teacher": f"{ALONE}, {passes(epochs)}", "seeds": EQUAL_TOKENS} if epochs else {"seeds": alone}


def teacher_epochs(found: Mapping[str, Any]) -> tuple[float, ...]:
    """The epochs of the teacher that an evaluation (``eval.json``) scored; () where it scored none."""
    epochs = found.get("setting", {}).get("teacher_epochs")
    return () if epochs is None else (epochs,)


def system_names(found: Mapping[str, Any], alone: str = ALONE) -> dict[str, str]:
    """`control_names` of an evaluation (``eval.json``)."""
    return control_names(teacher_epochs(found), alone)
