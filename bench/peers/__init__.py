"""Other software, run beside ours on the same work: ``specialize bench peers``.

Each peer has its own virtual environment and its own process; what runs in them lies in ``scripts/``.
"""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    from .command import main as run

    return run(argv)
