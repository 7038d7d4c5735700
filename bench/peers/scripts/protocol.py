"""The talk between the benchmark and a peer's process: a JSON object a line, in and out.

A script beside this file runs in its peer's own Python and may import nothing of ours but this module, which stands in
its folder. It is told {"load": {...}} once, then any number of {"run": {...}}. Prompts are lists of token ids; ``run``
answers with the seconds between the call and the last token, and with the new tokens of each prompt.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from importlib import metadata
from typing import Any


def versions(*packages: str) -> dict[str, str]:
    """Installed versions of the packages that decide this peer's figures; those that are absent are left out."""
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def serve(**commands: Callable[..., dict[str, Any]]) -> None:
    """Answers commands until standard input ends; what libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    for line in sys.stdin:
        [(name, arguments)] = json.loads(line).items()
        try:
            answer = commands[name](**arguments)
        except Exception as error:  # noqa: BLE001  (told to the benchmark, whatever it is)
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
