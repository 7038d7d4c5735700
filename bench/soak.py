"""Many short requests through one generator: does memory, or the time of a request, grow; do all pages come back; are
the answers still right? Lengths, prefixes, stop strings and sampling are mixed; the tiny model's cache holds fewer
pages than the sequences that may run at once could fill, so that requests wait for pages and old contents go.

    specialize bench soak --requests 100000 --json soak.json
    specialize bench soak --seconds 3600 --model smollm2-135m-instruct

Requests run in waves. After each, one stream is left half read, as by a user who goes away, and the allocator's books
must balance with no page held. A sample of the requests, spread over the whole time, is asked again one by one at the
end, and of the naive generator: both must give the tokens of the first time.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from specialize.errors import InputError

from ..engine.config import ModelConfig
from ..engine.generator import Generator
from ..engine.model import Model
from ..engine.naive import naive_generate
from ..engine.sampler import Completion, Request, SamplingParams
from ..engine.scheduler import EngineConfig
from ..engine.tokenizer import Tokenizer
from .environment import environment

WAVE = 1000  # requests between two looks at the allocator's books
MARKS = 100  # memory and clocks are noted at each hundredth of the way
SAMPLE = 60  # requests asked again
# Growth from the first tenth on that counts as a leak: the allocator's arenas and Python's own tables move by less.
MAX_GROWTH_BYTES = 16 << 20
MAX_SLOWDOWN = 1.25  # CPU time of a request, beside a generator that has done nothing yet
TURNS, TURN_REQUESTS = 9, 400  # of that comparison
MIN_REQUESTS = 8_000  # before it is made: a short soak has nothing to grow slow from


@dataclass(frozen=True)
class Mark:
    """Where the work stood: requests done, wall and CPU seconds since the start, resident bytes."""

    requests: int
    seconds: float
    cpu_seconds: float
    rss_bytes: int


def tiny_generator() -> Generator:
    """Two random layers over bytes and a cache of 48 pages, too few for the 32 sequences that may run at once."""
    config = ModelConfig("llama", 256, 32, 48, 2, 4, num_kv_heads=2, max_context=256, eos_token_ids=(3, 7, 100))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    engine = EngineConfig(num_pages=48, max_sequences=32, max_batch_tokens=512)
    return Generator(Model.random(config, 3, std=0.3), Tokenizer(backend), engine)


def make_request(number: int, seed: int, vocab_size: int) -> Request:
    """Request ``number`` of the soak, the same whenever asked for: 1 to 90 prompt tokens, half of them after one of
    eight shared prefixes, 1 to 16 new tokens (one in ten: up to 64); greedy or sampled; some with stop strings."""
    rng = random.Random(f"{seed}/{number}")
    prompt = [rng.randrange(vocab_size) for _ in range(rng.randint(1, 50))]
    if rng.random() < 0.5:
        shared = random.Random(f"{seed}/prefix/{rng.randrange(8)}")
        prompt = [shared.randrange(vocab_size) for _ in range(40)] + prompt
    sampled = rng.random() < 0.6
    params = SamplingParams(
        max_tokens=rng.randint(1, 64 if rng.random() < 0.1 else 16),
        temperature=rng.choice([0.5, 1.0, 1.5]) if sampled else 0.0,
        top_p=rng.choice([1.0, 0.9]),
        top_k=rng.choice([0, 0, 20]),
        min_p=rng.choice([0.0, 0.0, 0.05]),
        repetition_penalty=rng.choice([1.0, 1.0, 1.2]),
        stop=tuple(rng.sample("abcdefgh", 2)) if rng.random() < 0.3 else (),
        ignore_eos=rng.random() < 0.5,
        seed=seed,
        logprobs=2 if rng.random() < 0.1 else None,
    )
    return Request(prompt, params, request_id=number)


def soak(
    generator: Generator,
    *,
    requests: int | None = None,
    seconds: float | None = None,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> dict[str, Any]:
    """Runs until ``requests`` are done or ``seconds`` have passed, whichever is first, and says what was found.

    ``progress`` hears the number of requests done and the share of the whole. ``problems`` in the result is empty where
    all is well. Rates are requests a second. CPU times of the first and last tenth are told, not judged: what else
    runs on the machine changes them (shared caches, threads that wait). Judged is the generator beside a new one.
    """
    if requests is None and seconds is None:
        raise InputError("soak: give --requests, --seconds, or both")
    process, vocab_size = psutil.Process(), generator.model.config.vocab_size
    generator.warm_up()
    kept: dict[int, Completion] = {}
    reasons: Counter[str] = Counter()
    problems: list[str] = []
    done, next_number, began, cpu_began = 0, 0, time.perf_counter(), time.process_time()

    def mark() -> Mark:
        return Mark(done, time.perf_counter() - began, time.process_time() - cpu_began, process.memory_info().rss)

    def share() -> float:
        by_count = done / requests if requests else 0.0
        return max(by_count, (time.perf_counter() - began) / seconds if seconds else 0.0)

    def wave() -> Iterator[Request]:
        nonlocal next_number
        for _ in range(WAVE):
            if (requests is not None and next_number >= requests) or share() >= 1:
                return
            yield make_request(next_number, seed, vocab_size)
            next_number += 1

    marks, sampled_share = [mark()], 0.0
    while share() < 1:
        for completion in generator.run(wave()):
            done += 1
            reasons[completion.finish_reason] += 1
            at = share()
            if at >= sampled_share:
                kept[completion.request_id] = completion
                sampled_share += 1 / SAMPLE
            if at >= len(marks) / MARKS:
                marks.append(mark())
                if progress is not None:
                    progress(done, min(at, 1.0))
        stream: Any = generator.stream("left half read", SamplingParams(max_tokens=16, temperature=0, ignore_eos=True))
        next(stream, None)
        stream.close()
        problems += _books(generator, done)
        if problems:
            break
    marks.append(mark())
    generator.allocator.forget_contents()  # asked again below, nothing is found in the cache
    differing = [number for number, first in kept.items() if not _same(generator, number, seed, first)]
    problems += [f"request {number}: another answer when asked again" for number in differing]
    if done != next_number:
        problems.append(f"{next_number} requests were handed over, {done} came back")
    if reasons["error"]:
        problems.append(f"{reasons['error']} requests ended with an error")
    slowdown = _slowdown(generator, next_number, seed) if done >= MIN_REQUESTS and not problems else None
    if slowdown is not None and slowdown > MAX_SLOWDOWN:
        problems.append(f"a request takes {slowdown:.2f} times the CPU time that it takes a new generator")
    result = {
        "requests": done, "seconds": round(marks[-1].seconds, 1), "seed": seed, "finish_reasons": dict(reasons),
        "asked_again": len(kept), "differing": len(differing), "pages_held": generator.allocator.num_held,
        "slowdown": slowdown, **_growth(marks, problems), "stats": generator.stats.as_dict(), "problems": problems,
        "marks": [asdict(m) for m in marks],
    }  # fmt: skip
    return result


def _books(generator: Generator, done: int) -> list[str]:
    try:
        generator.allocator.check()
    except AssertionError as error:
        return [f"after {done} requests the page allocator is wrong: {error}"]
    held = generator.allocator.num_held
    return [f"after {done} requests {held} pages are held by nobody"] if held else []


def _same(generator: Generator, number: int, seed: int, first: Completion) -> bool:
    request = make_request(number, seed, generator.model.config.vocab_size)
    [again] = generator.run([request])
    model, tokenizer = generator.model, generator.tokenizer
    ends = (*model.config.eos_token_ids, *(tokenizer.eos_ids if tokenizer else ()))
    prompt_ids = list(request.prompt_ids)
    naive = naive_generate(model, prompt_ids, request.params, tokenizer=tokenizer, eos_ids=ends, request_id=number)
    return all((c.token_ids, c.text, c.finish_reason) == (first.token_ids, first.text, first.finish_reason)
               for c in (again, naive))  # fmt: skip


def _slowdown(
    generator: Generator, first_number: int, seed: int, turns: int = TURNS, size: int = TURN_REQUESTS
) -> float:
    """CPU time of requests here over that of the same requests in a new generator of the same model: the median of
    ``turns`` turns, each of ``size`` requests and begun by the one and the other in turn."""
    new = Generator(generator.model, generator.tokenizer, generator.config)
    new.warm_up()
    ratios, vocab_size = [], generator.model.config.vocab_size
    for turn in range(turns):
        numbers = range(first_number + turn * size, first_number + (turn + 1) * size)
        seconds = {}
        for one in (generator, new) if turn % 2 else (new, generator):
            one.allocator.forget_contents()
            requests = [make_request(number, seed, vocab_size) for number in numbers]
            began = time.process_time()
            for _ in one.run(requests):
                pass
            seconds[one is new] = time.process_time() - began
        ratios.append(seconds[False] / seconds[True])
    return round(statistics.median(ratios), 3)


def _growth(marks: list[Mark], problems: list[str]) -> dict[str, Any]:
    """Figures of the first and the last tenth; what grew is added to ``problems``."""
    last = len(marks) - 1
    tenth = max(last // 10, 1)
    first_tenth, last_tenth = (marks[0], marks[tenth]), (marks[last - tenth], marks[last])

    def rate(start: Mark, stop: Mark) -> float:
        return (stop.requests - start.requests) / max(stop.seconds - start.seconds, 1e-9)

    def cpu_ms(start: Mark, stop: Mark) -> float:
        return (stop.cpu_seconds - start.cpu_seconds) / max(stop.requests - start.requests, 1) * 1e3

    growth = marks[last].rss_bytes - marks[tenth].rss_bytes
    if growth > MAX_GROWTH_BYTES:
        problems.append(f"memory grew by {growth / 2**20:.1f} MiB after the first tenth")
    return {
        "rss_start_mib": round(marks[0].rss_bytes / 2**20, 1),
        "rss_first_tenth_mib": round(marks[tenth].rss_bytes / 2**20, 1),
        "rss_end_mib": round(marks[last].rss_bytes / 2**20, 1),
        "rss_peak_mib": round(max(m.rss_bytes for m in marks) / 2**20, 1),
        "rate_first_tenth": round(rate(*first_tenth), 1),
        "rate_last_tenth": round(rate(*last_tenth), 1),
        "cpu_ms_first_tenth": round(cpu_ms(*first_tenth), 3),
        "cpu_ms_last_tenth": round(cpu_ms(*last_tenth), 3),
    }


def format_result(r: dict[str, Any]) -> str:
    lines = [
        f"{r['requests']:,} requests in {r['seconds']:,.0f} s; ends: {r['finish_reasons']}; "
        f"{r['stats']['preemptions']:,} preemptions",
        f"memory: {r['rss_start_mib']} MiB at the start, {r['rss_first_tenth_mib']} after a tenth, {r['rss_end_mib']} "
        f"at the end",
        f"requests a second: {r['rate_first_tenth']} in the first tenth, {r['rate_last_tenth']} in the last; "
        f"CPU ms a request: {r['cpu_ms_first_tenth']}, {r['cpu_ms_last_tenth']}; beside a new generator: "
        + (f"{r['slowdown']} times" if r["slowdown"] is not None else "not compared (too few, or a problem)"),
        f"asked again: {r['asked_again']}, other answers: {r['differing']}; pages held at the end: {r['pages_held']}",
    ]
    return "\n".join(lines + [f"PROBLEM: {problem}" for problem in r["problems"]])


def main(arguments: list[str] | None = None) -> int:
    """The command; 1 where something grew, leaked or was answered differently."""
    parser = argparse.ArgumentParser(
        prog="specialize bench soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, help="stop after so many requests")
    parser.add_argument("--seconds", type=float, help="stop after so long")
    parser.add_argument("--model", help="folder, .gguf file or fetch name (default: a tiny random model)")
    parser.add_argument("--seed", type=int, default=0, help="of the requests (default: 0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    o = parser.parse_args(arguments)
    for name, value in (("requests", o.requests), ("seconds", o.seconds)):
        if value is not None and value <= 0:
            raise InputError(f"soak: --{name} is {value}; allowed: more than 0")
    if o.model is None:
        generator = tiny_generator()
    else:
        from specialize.fetch import model_path

        generator = Generator.from_pretrained(model_path(o.model))
    gc.collect()

    def show(done: int, share: float) -> None:
        print(f"soak: {done:,} requests, {share:.0%}", file=sys.stderr, flush=True)

    result = soak(generator, requests=o.requests, seconds=o.seconds, seed=o.seed, progress=show) | environment()
    result["model"] = o.model or "tiny"
    if o.json is not None:
        o.json.write_text(json.dumps(result, indent=1), encoding="utf-8")
    print(format_result(result))
    return 1 if result["problems"] else 0
