"""Coverage-guided fuzzing of one reader: ``python -m tests.fuzz.run READER --seconds 600`` (needs the extra ``fuzz``).

Starts from the reader's seeds and from ``tests/fuzz/corpus/READER/``; inputs that reach new code are kept in a folder
of the user's cache. An input that a reader answers with anything but InputError, or that keeps it busy, is written to
``findings/`` there, one for each place in the code, and the search goes on; one that kills or stops the process, or
takes more memory than allowed, ends it. The last line of output is a JSON object with the counts. Exits 0 where nothing
was found. ``--seconds`` are seconds of this process on a processor, so that a busy machine searches no less.
"""

from __future__ import annotations

import argparse
import atexit
import json
import os
import random
import resource
import sys
import time
import traceback
from pathlib import Path

import atheris
import platformdirs

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent.parent)]

with atheris.instrument_imports(include=["specialize", "jinja2", "yaml", "defusedxml", "xml", "json", "gguf"]):
    from mutation import mutate
    from readers import MAX_EXTRA_BYTES, MAX_SECONDS, READERS

HANG_SECONDS = 900  # libFuzzer counts by the clock on the wall: far above MAX_SECONDS, as the process may be paused


def _place(error: BaseException) -> str:
    """What makes two findings one: the exception's type and where in our code it came through last."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "site-packages" not in f.filename]
    last = frames[-1]
    return f"{type(error).__name__}-{Path(last.filename).stem}-{last.lineno}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests.fuzz.run", description=__doc__)
    parser.add_argument("reader", choices=sorted(READERS))
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--work", type=Path, default=platformdirs.user_cache_path("specialize") / "fuzz")
    arguments = parser.parse_args()
    reader = READERS[arguments.reader]
    reached, findings = arguments.work / "reached" / reader.name, arguments.work / "findings" / reader.name
    for folder in (reached, findings):
        folder.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(reader.seeds()):
        (reached / f"seed-{number}").write_bytes(seed)
    kept = Path(__file__).parent / "corpus" / reader.name
    started = time.process_time()
    executions = accepted = 0
    found: dict[str, int] = {}

    def mutator(data: bytes, max_size: int, seed: int) -> bytes:
        """Half of the time our own changes, which know JSON, and otherwise libFuzzer's."""
        source = random.Random(seed)
        if source.randrange(2):
            return atheris.Mutate(data, max_size)
        return mutate(reader, bytes(data), source.randrange)[:max_size]

    def keep(place: str, data: bytes, what: str) -> None:
        file = findings / place
        if place not in found:
            print(f"finding {place}: {what}", flush=True)
        if place not in found or len(data) < file.stat().st_size:
            file.write_bytes(data)
        found[place] = found.get(place, 0) + 1

    def one_input(data: bytes) -> None:
        nonlocal executions, accepted
        executions += 1
        before = time.process_time()
        try:
            accepted += reader.check(data)
        except Exception as error:  # noqa: BLE001  (whatever a reader raises beside InputError is what is sought)
            keep(_place(error), data, traceback.format_exc())
        now = time.process_time()
        if now - before > MAX_SECONDS:
            keep("slow", data, f"{now - before:.1f} s")
        if now - started > arguments.seconds:
            counts = {"reader": reader.name, "seconds": round(now - started), "executions": executions}
            print("\n" + json.dumps({**counts, "accepted": accepted, "findings": found}), flush=True)
            atexit._run_exitfuncs()  # libFuzzer knows no end but that of the process
            os._exit(1 if found else 0)

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MAX_EXTRA_BYTES, resource.RLIM_INFINITY))
    atheris.Setup(
        [
            sys.argv[0], f"-timeout={HANG_SECONDS}", "-rss_limit_mb=4096", "-max_len=65536",
            f"-artifact_prefix={findings}/", "-print_final_stats=1", str(reached),
            *([str(kept)] if kept.is_dir() else []),
        ],
        one_input,
        custom_mutator=mutator,
    )  # fmt: skip
    atheris.Fuzz()


if __name__ == "__main__":
    main()
