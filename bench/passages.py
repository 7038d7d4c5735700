"""Builds an index over made-up passages and compares the memory it took with what `retrieval/plan.py` foretells.

    specialize bench passages --passages 100000 --dim 384 --words 80 --json passages.json

Words follow Zipf's law over a vocabulary of 200,000. Vectors are cheap: a few of 256 fixed directions each, so that
near and far neighbours exist and no model runs. Memory is what belongs to the process alone (RssAnon): mapped files can
be dropped by the kernel.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from specialize.errors import InputError

from ..retrieval.corpus import Document
from ..retrieval.index import Index
from ..retrieval.plan import plan_index
from .environment import environment

VOCABULARY = 200_000
STATUS = Path("/proc/self/status")


class CheapEmbedder:
    """Deterministic vectors from a text's own bytes; no model."""

    fingerprint = "cheap"

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self._directions = np.random.default_rng(0).standard_normal((256, dim)).astype(np.float32)

    def embed(self, texts: list[str], /) -> np.ndarray:
        rows = []
        for text in texts:
            data = text.encode()
            first = np.frombuffer((data * (12 // len(data) + 1))[:12], np.uint8)
            rows.append(self._directions[first].sum(0))
        matrix = np.stack(rows)
        return matrix / np.maximum(np.linalg.norm(matrix, axis=1, keepdims=True), 1e-9)


def made_up_documents(count: int, num_words: int, seed: int = 0) -> Iterator[Document]:
    """``count`` documents of one passage each, ``num_words`` words of them, the title's among these."""
    rng = np.random.default_rng(seed)
    names = np.array([f"w{i:x}" + "abcdefgh"[: i % 8] for i in range(VOCABULARY)])
    share = 1 / np.arange(2, VOCABULARY + 2)
    edges = np.cumsum(share) / share.sum()
    for start in range(0, count, 4096):
        size = min(4096, count - start)
        drawn = names[np.searchsorted(edges, rng.random((size, num_words - 1)))]
        for row, text in enumerate(drawn):
            yield Document(f"d{start + row}", f"t{start + row}", " ".join(text))


class Peak:
    """The largest RssAnon while it is open, looked at every 20 ms; ``stages`` by the build's stage."""

    def __init__(self) -> None:
        self.stages: dict[str, int] = {}
        self.stage = "read"
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._end.wait(0.02):
            self.stages[self.stage] = max(self.stages.get(self.stage, 0), own_bytes())


def own_bytes() -> int:
    """Memory of this process that no file backs."""
    for line in STATUS.read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise InputError("passages: /proc/self/status has no RssAnon; this benchmark needs Linux")


def measure(num_passages: int, dim: int, num_words: int, *, M: int = 16, ef_construction: int = 200) -> dict[str, Any]:
    """Builds in a temporary folder; bytes foretold and measured, both beside what the process held before."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        gc.collect()
        before = own_bytes()
        with Peak() as peak:

            def show(stage: str, done: int, total: int) -> None:
                if stage != peak.stage:
                    print(f"{stage} at {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
                peak.stage = stage

            built = Index.build(
                made_up_documents(num_passages, num_words), Path(folder) / "index", CheapEmbedder(dim) if dim else None,
                max_words=max(num_words, 120), overlap_words=20, M=M, ef_construction=ef_construction, progress=show,
            )  # fmt: skip
        disk = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
        plan = plan_index(len(built), dim, words_a_passage=num_words, M=M)
    measured = max(peak.stages.values()) - before
    return {
        "passages": len(built), "dim": dim, "words_a_passage": num_words, "M": M, "ef_construction": ef_construction,
        "seconds": round(time.perf_counter() - started, 1), "measured_bytes": measured,
        "measured_by_stage": {stage: size - before for stage, size in peak.stages.items()},
        "disk_bytes": disk, "foretold": plan.as_dict(), "measured_over_foretold": round(measured / plan.peak_bytes, 3),
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="specialize bench passages", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--passages", type=int, default=20_000)
    parser.add_argument("--dim", type=int, default=384, help="0: words only (default: 384)")
    parser.add_argument("--words", type=int, default=80, help="words of a passage, no stop words (default: 80)")
    parser.add_argument("--ef-construction", type=int, default=200)
    parser.add_argument("--json", type=Path, metavar="FILE", help="add a line here")
    o = parser.parse_args(arguments)
    for name, value, least in (("passages", o.passages, 1), ("dim", o.dim, 0), ("words", o.words, 2)):
        if value < least:
            raise InputError(f"passages: --{name} is {value}; allowed: {least} or more")
    found = measure(o.passages, o.dim, o.words, ef_construction=o.ef_construction)
    if o.json is not None:
        with o.json.open("a", encoding="utf-8") as sink:
            sink.write(json.dumps(found | environment()) + "\n")
    print(
        f"{found['passages']:,} passages, dim {o.dim}, {o.words} words: {found['measured_bytes'] / 1e6:,.0f} MB "
        f"measured, {found['foretold']['peak_bytes'] / 1e6:,.0f} MB foretold; {found['seconds']:,.0f} s"
    )
    print("by stage: " + ", ".join(f"{s} {size / 1e6:,.0f} MB" for s, size in found["measured_by_stage"].items()))
    return 0
