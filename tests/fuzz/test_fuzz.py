"""Every reader of a user's file, given mutated files: it reads them or raises InputError, in bounded time and memory.

The examples are derandomised: the same on every machine. ``FUZZ_EXAMPLES`` says how many a reader gets; continuous
integration asks for more (`.ci/run`). `tests/fuzz/run.py` searches further, guided by coverage; what
it found is kept in `tests/fuzz/corpus/` and tried here first.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from mutation import mutate
from readers import MAX_EXTRA_BYTES, MAX_SECONDS, READERS, Reader

CORPUS = Path(__file__).parent / "corpus"
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "150"))
REFUSED = {"corpus-xml": {1}, "corpus-xml-gz": {1}}  # seeds that declare entities


@pytest.fixture(autouse=True)
def bounded_memory():
    """A reader that asks for much more memory than its file needs is refused it, and fails."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MAX_EXTRA_BYTES, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def check(reader: Reader, data: bytes) -> bool:
    started = time.process_time()
    accepted = reader.check(data)
    assert time.process_time() - started < MAX_SECONDS, "a small file keeps the reader busy"
    return accepted


@pytest.mark.parametrize("name", READERS)
def test_a_reader_reads_its_seeds(name):
    accepted = [READERS[name].check(seed) for seed in READERS[name].seeds()]
    assert accepted == [i not in REFUSED.get(name, ()) for i in range(len(accepted))]


@pytest.mark.parametrize("path", sorted(CORPUS.glob("*/*")), ids=lambda p: f"{p.parent.name}/{p.name[:12]}")
def test_what_was_found_stays_fixed(path):
    check(READERS[path.parent.name], path.read_bytes())


def _fuzz(name: str, examples: int) -> None:
    reader = READERS[name]
    seeds = reader.seeds()

    @settings(
        max_examples=examples, derandomize=True, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.integers(0, len(seeds) - 1), st.randoms(use_true_random=False))
    def run(which, random):
        check(reader, mutate(reader, seeds[which], random.randrange))

    run()


@pytest.mark.parametrize("name", READERS)
def test_mutated_files(name):
    _fuzz(name, EXAMPLES)


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_many_mutated_files(name):
    _fuzz(name, 5000)
