"""The soak: nothing grows, all pages return, answers stay the same; and it sees where that is not so."""

from __future__ import annotations

import json
import os
import time

import pytest
from specialize.bench import soak
from specialize.engine.outputs import Outputs

from specialize.errors import InputError

SOAK_SECONDS = float(os.environ.get("SPECIALIZE_SOAK_SECONDS", "3600"))


def test_short_soak(tmp_path):
    out = tmp_path / "soak.json"
    code = soak.main(["--requests", "2000", "--json", str(out)])
    found = json.loads(out.read_text())
    assert found["problems"] == []
    assert code == 0
    assert found["pages_held"] == found["differing"] == 0
    assert found["requests"] == sum(found["finish_reasons"].values()) == 2000
    assert found["asked_again"] >= 10
    assert set(found["finish_reasons"]) == {"length", "stop"}


@pytest.mark.slow
def test_long_soak():
    """An hour, or SPECIALIZE_SOAK_SECONDS."""
    found = soak.soak(soak.tiny_generator(), seconds=SOAK_SECONDS)
    assert found["problems"] == []


def test_a_page_that_is_not_returned_is_seen():
    generator = soak.tiny_generator()
    generator.allocator.allocate(1)
    found = soak.soak(generator, requests=50)
    assert any("1 pages are held by nobody" in problem for problem in found["problems"])


def test_another_answer_is_seen(monkeypatch):
    generator = soak.tiny_generator()
    after_step, calls = Outputs.after_step, []

    def wrong_at_first(self, plan, tokens, *more):
        calls.append(1)
        return after_step(self, plan, (tokens + 1) % 256 if len(calls) < 20 else tokens, *more)

    monkeypatch.setattr(Outputs, "after_step", wrong_at_first)
    found = soak.soak(generator, requests=200)
    assert found["differing"] > 0
    assert any("another answer" in problem for problem in found["problems"])


def test_growth_is_seen():
    problems: list[str] = []
    marks = [soak.Mark(10 * i, i, 1.0 * i * (1 + i / 50), (100 + i) << 20) for i in range(101)]
    soak._growth(marks, problems)
    assert [problem.split(" ")[0] for problem in problems] == ["memory"]


class Slowed:
    """A generator whose every completion takes longer."""

    def __init__(self, generator):
        self.__dict__.update(generator=generator, model=generator.model, tokenizer=generator.tokenizer)
        self.__dict__.update(config=generator.config, allocator=generator.allocator)

    def run(self, requests):
        for completion in self.generator.run(requests):
            until = time.process_time() + 0.01
            while time.process_time() < until:
                pass
            yield completion


def test_a_generator_that_has_become_slow_is_seen():
    generator = soak.tiny_generator()
    generator.warm_up()
    assert soak._slowdown(Slowed(generator), 0, 0, turns=3, size=60) > 2 * soak.MAX_SLOWDOWN


def test_a_soak_without_an_end_is_refused():
    with pytest.raises(InputError, match="give --requests, --seconds, or both"):
        soak.main([])
    with pytest.raises(InputError, match="--requests is 0"):
        soak.main(["--requests", "0"])
