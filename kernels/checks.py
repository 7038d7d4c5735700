"""The one sentence in which every kernel refuses an argument: op, argument, given, allowed."""

from __future__ import annotations


def bad_argument(op: str, argument: str, given: object, allowed: str) -> ValueError:
    """The ValueError for an argument that does not fit; the caller raises it before any launch."""
    return ValueError(f"{op}: argument {argument}: given {given}; allowed: {allowed}")
