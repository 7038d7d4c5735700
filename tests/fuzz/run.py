"""Coverage-guided fuzzing of one reader: ``python -m tests.fuzz.run READER --seconds 600`` (needs the extra ``fuzz``).

Starts from the reader's seeds and from ``tests/fuzz/corpus/READER/``; inputs that reach new code are kept in a folder
of the user's cache, an input that crashes, hangs or blows up is written to ``findings/`` there. Exits 0 where nothing
was found.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

import atheris
import platformdirs

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent.parent)]

with atheris.instrument_imports(include=["specialize", "jinja2", "yaml", "defusedxml", "xml", "json", "gguf"]):
    from mutation import mutate
    from readers import READERS


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

    def mutator(data: bytes, max_size: int, seed: int) -> bytes:
        """Half of the time our own changes, which know JSON, and otherwise libFuzzer's."""
        source = random.Random(seed)
        if source.randrange(2):
            return atheris.Mutate(data, max_size)
        return mutate(reader, bytes(data), source.randrange)[:max_size]

    def one_input(data: bytes) -> None:
        reader.check(data)

    atheris.Setup(
        [
            sys.argv[0], f"-max_total_time={arguments.seconds}", "-timeout=20", "-rss_limit_mb=4096",
            "-max_len=65536",
            f"-artifact_prefix={findings}/", "-print_final_stats=1", str(reached),
            *([str(kept)] if kept.is_dir() else []),
        ],
        one_input,
        custom_mutator=mutator,
    )  # fmt: skip
    atheris.Fuzz()


if __name__ == "__main__":
    main()
