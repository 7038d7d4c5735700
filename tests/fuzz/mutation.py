"""Changes to a valid file: of bytes, and of the values inside JSON. Drawn by hypothesis or by a random generator."""

from __future__ import annotations

import copy
import struct
from collections.abc import Callable
from typing import Any

from readers import Reader, repack

Draw = Callable[[int], int]  # n -> a number from 0 to n-1

_NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**40, 2**62, 2**63, 2**64 - 1)
_WORDS = (
    b"\x00", b"\n", b'"', b"{", b"}", b"[[[[", b"\xff\xfe", b"\xed\xa0\x80", b"&a;", b"*a", b"&a ", b"!!python/none ",
    b"{{", b"}}", b"{%", b"1e999", b"NaN", b"-1", b"\\ud800", b"range(99999999)", b" * 999999999", b"../../x",
    b"<!DOCTYPE ",
)  # fmt: skip


def _deep() -> Any:
    value: Any = []
    for _ in range(300):
        value = [value]
    return value


_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 3, 2**31, 2**63, 10**30, 1.5, -0.0, float("nan"), float("inf"), "", "x", "1", "\ud800",
    "../../outside.safetensors", "/etc/passwd", "a\x00b", "x" * 5000, [], {}, [None], [[1]], {"a": {}}, [1] * 300,
    {"x": None}, _deep(),
)  # fmt: skip


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found += _places(item, (*path, key))
    return found


def change_value(value: Any, draw: Draw) -> Any:
    """One place of a JSON value replaced, dropped, renamed or doubled."""
    value = copy.deepcopy(value)
    places = _places(value)
    *parents, key = (None, *places[draw(len(places))])
    if key is None:
        return copy.deepcopy(_VALUES[draw(len(_VALUES))])
    owner = value
    for parent in parents[1:]:
        owner = owner[parent]
    how = draw(6)
    if how == 0:
        del owner[key]
    elif how == 1 and isinstance(owner, list):
        owner.append(owner[key])
    elif how == 1:
        owner[str(key) + "x"] = owner.pop(key)
    elif how == 2:  # another place's value here
        other = value
        for step in places[draw(len(places))]:
            other = other[step]
        owner[key] = copy.deepcopy(other)
    else:
        owner[key] = copy.deepcopy(_VALUES[draw(len(_VALUES))])
    return value


def change_bytes(data: bytes, draw: Draw) -> bytes:
    """A few bytes replaced, inserted, dropped, doubled, or the file cut off."""
    at = draw(len(data) + 1)
    size = 1 + draw(16)
    how = draw(7)
    if how == 0:
        return data[:at] + bytes([draw(256)]) + data[at + 1 :]
    if how == 1:
        return data[:at] + data[at + size :]
    if how == 2:
        return data[:at] + data[max(at - size, 0) : at] * (1 + draw(3)) + data[at:]
    if how == 3:
        return data[:at]
    if how == 4:
        word = _WORDS[draw(len(_WORDS))]
        return data[:at] + word + data[at:]
    number, form = _NUMBERS[draw(len(_NUMBERS))], ("<B", "<H", "<I", "<Q")[draw(4)]
    width = struct.calcsize(form)
    packed = struct.pack(form, number % (1 << 8 * width))
    return (
        data[:at] + packed + data[at + width :]
        if how == 5
        else data[: at - at % 8] + packed + data[at - at % 8 + width :]
    )


def mutate(reader: Reader, data: bytes, draw: Draw) -> bytes:
    """One to four changes; in two of three cases within the structure that the file's kind has."""
    for _ in range(1 + draw(4)):
        if reader.kind == "gzip" and draw(2):
            data = repack("gzip", data, lambda inner: change_bytes(inner, draw))
        elif reader.kind in ("json", "jsonl", "safetensors") and draw(3):
            data = repack(reader.kind, data, lambda value: change_value(value, draw))
        else:
            data = change_bytes(data, draw)
    return data
