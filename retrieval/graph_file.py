"""Checks a saved hnswlib graph before it is loaded: hnswlib follows whatever numbers it finds in the file.

Layout (hnswlib 0.8, ``HierarchicalNSW::saveIndex``): a header of 96 bytes; per element its links on level 0 (a count of
16 bits in a word of 32, then ``2 M`` neighbours), its vector and its label; per element the size and the links of its
higher levels, ``M`` neighbours each.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from specialize.errors import InputError

_HEADER = struct.Struct("<6QiI3QdQ")


def check_graph(path: Path, *, dim: int, count: int, M: int) -> None:
    """Raises InputError where the file is no graph over ``count`` vectors of ``dim`` with every link inside it."""

    def need(ok: bool, what: str) -> None:
        if not ok:
            raise InputError(f"{path} is damaged ({what}); build the index again")

    try:
        data = np.memmap(path, np.uint8, "r")
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); build the index again") from None
    need(len(data) >= _HEADER.size, "its header ends early")
    (level0, capacity, found, stride, label_at, vector_at, top, entry, max_m, max_m0, m, mult, _) = _HEADER.unpack(
        data[: _HEADER.size].tobytes()
    )
    need(count >= 1 and found == count and capacity >= count, f"{found} vectors, not {count}")
    need((max_m, max_m0, m) == (M, 2 * M, M), f"{m} links a vector, not {M}")
    need((level0, vector_at) == (0, 8 * M + 4), "its vectors lie elsewhere")
    need((label_at, stride) == (vector_at + 4 * dim, vector_at + 4 * dim + 8), f"its vectors are not of dim {dim}")
    need(entry < count and 0 <= top < 64 and bool(np.isfinite(mult)), "no place to start from")
    links_at = _HEADER.size + count * stride
    need(len(data) >= links_at + 4 * count, "it ends early")
    rows = data[_HEADER.size : links_at].reshape(count, stride)
    levels = np.zeros(count, np.int64)
    labels = np.ascontiguousarray(rows[:, label_at:]).view(np.uint64)[:, 0]
    need(bool((np.sort(labels) == np.arange(count, dtype=np.uint64)).all()), "labels are not 0 to count-1")
    for start in range(0, count, 4096):  # a block at a time: the graph may be larger than memory
        _check_links(np.ascontiguousarray(rows[start : start + 4096, :vector_at]).view(np.uint32), count, need)
        vectors = np.ascontiguousarray(rows[start : start + 4096, vector_at:label_at]).view(np.float32)
        need(bool(np.isfinite(vectors).all()), "a vector is not finite")
    at, width, blocks = links_at, 4 * M + 4, []
    for element in range(count):
        need(at + 4 <= len(data), "it ends early")
        (size,) = struct.unpack_from("<I", data[at : at + 4].tobytes())
        need(size % width == 0 and at + 4 + size <= len(data), "links of a higher level are cut off")
        if size:
            levels[element] = size // width
            links = data[at + 4 : at + 4 + size].view(np.uint8).tobytes()
            blocks.append(np.frombuffer(links, np.uint32).reshape(-1, M + 1))
        at += 4 + size
    need(at == len(data), "it has surplus bytes")
    need(int(levels.max()) == top == int(levels[entry]), "its levels contradict each other")
    if blocks:
        _check_links(np.concatenate(blocks), count, need)
        # A link on level n leads to an element that has a level n.
        heights = np.concatenate([np.arange(1, len(block) + 1) for block in blocks])
        for height, row in zip(heights, np.concatenate(blocks), strict=True):
            need(bool((levels[row[1 : 1 + (row[0] & 0xFFFF)]] >= height).all()), "a link leads above its target")


def _check_links(links: np.ndarray, count: int, need) -> None:
    """``links`` u32 [N, 1 + width]: a count of 16 bits, then neighbours, of which the first so many are in use."""
    sizes = links[:, 0] & 0xFFFF
    need(bool((sizes < links.shape[1]).all()) and not bool((links[:, 0] >> 16).any()), "a vector has too many links")
    used = np.arange(links.shape[1] - 1)[None, :] < sizes[:, None]
    need(bool((links[:, 1:][used] < count).all()), "a link leads nowhere")
