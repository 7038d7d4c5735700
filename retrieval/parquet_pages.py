"""How much a Parquet file may unpack to, before anything of it is unpacked: Arrow takes each page's word for its size.

A page's header is a struct in Thrift's compact protocol (github.com/apache/parquet-format, parquet.thrift,
``PageHeader``): field 2 is the size after decompression, field 3 that in the file. A value is never longer than its
page, so n rows hold at most n times the largest page of each column.
"""

from __future__ import annotations

import mmap
from collections.abc import Collection
from pathlib import Path
from typing import Any

_MAX_DEPTH = 8  # of structs in a page's header; the format has two
_STOP, _TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = 0, 1, 2, 3, 7, 8, 9, 10, 11, 12
_INTEGERS = (4, 5, 6)


class _Header:
    """A cursor over one page's header. Raises ValueError or IndexError where the bytes are none."""

    def __init__(self, data: mmap.mmap, at: int) -> None:
        self.data, self.at = data, at

    def byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1]

    def varint(self) -> int:
        value = shift = 0
        while shift < 64:
            byte = self.byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7
        raise ValueError("a number of a page's header has no end")

    def integer(self) -> int:
        value = self.varint()  # zigzag
        return (value >> 1) ^ -(value & 1)

    def struct(self, depth: int = 0) -> dict[int, int]:
        """Reads over a struct; returns its integer fields by number."""
        if depth > _MAX_DEPTH:
            raise ValueError("a page's header is nested too deeply")
        fields: dict[int, int] = {}
        number = 0
        while True:
            head = self.byte()
            if head == _STOP:
                return fields
            kind = head & 0x0F
            number = number + (head >> 4) if head >> 4 else self.integer()
            if kind in _INTEGERS:
                fields[number] = self.integer()
            elif kind not in (_TRUE, _FALSE):  # as a field, a truth value is the kind itself
                self._skip(kind, depth)

    def _skip(self, kind: int, depth: int) -> None:
        if depth > _MAX_DEPTH:
            raise ValueError("a page's header is nested too deeply")
        if kind in _INTEGERS:
            self.varint()
        elif kind in (_TRUE, _FALSE, _BYTE):
            self.at += 1
        elif kind == _DOUBLE:
            self.at += 8
        elif kind == _BINARY:
            self.at = self.varint() + self.at
        elif kind in (_LIST, _SET):
            head = self.byte()
            for _ in range(head >> 4 if head >> 4 < 15 else self.varint()):
                self._within()
                self._skip(head & 0x0F, depth + 1)
        elif kind == _MAP:
            size = self.varint()
            kinds = self.byte() if size else 0
            for _ in range(size):
                self._within()
                self._skip(kinds >> 4, depth + 1)
                self._skip(kinds & 0x0F, depth + 1)
        elif kind == _STRUCT:
            self.struct(depth + 1)
        else:
            raise ValueError(f"a page's header has a field of unknown kind {kind}")

    def _within(self) -> None:
        if self.at >= len(self.data):
            raise ValueError("a page's header ends early")


def largest_pages(file: Path, metadata: Any, columns: Collection[str]) -> dict[str, int]:
    """Bytes of the largest page, unpacked, of each of these columns; ``metadata`` is the file's, as pyarrow reads it.

    Raises ValueError where a page's header is damaged or lies outside the file.
    """
    largest = dict.fromkeys(columns, 0)
    with file.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for group in range(metadata.num_row_groups):
            for index in range(metadata.num_columns):
                chunk = metadata.row_group(group).column(index)
                name = chunk.path_in_schema
                if name not in largest:
                    continue
                at, dictionary = chunk.data_page_offset, chunk.dictionary_page_offset
                if dictionary is not None and 0 < dictionary < at:
                    at = dictionary
                end = at + chunk.total_compressed_size
                if not 0 <= at <= end <= len(data):
                    raise ValueError(f"column {name!r:.80} lies outside the file")
                while at < end:
                    header = _Header(data, at)
                    try:
                        fields = header.struct()
                        unpacked, packed = fields[2], fields[3]
                    except (IndexError, KeyError):
                        raise ValueError("a page's header is damaged") from None
                    if unpacked < 0 or packed < 0:
                        raise ValueError("a page has a negative size")
                    largest[name] = max(largest[name], unpacked)
                    at = header.at + packed
    return largest
