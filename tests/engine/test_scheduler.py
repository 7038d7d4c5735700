"""The scheduler without a model: budgets, order, sharing and preemption."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from specialize.engine.pages import PageAllocator
from specialize.engine.sampler import SamplingParams
from specialize.engine.scheduler import MAX_HELD_STEPS, EngineConfig, Scheduler, Sequence

from specialize.errors import InputError


def sequence(number: int, tokens: list[int], max_tokens: int = 4) -> Sequence:
    params = SamplingParams(max_tokens=max_tokens)
    return Sequence(number, 0, params, np.asarray(tokens, np.int32), len(tokens), stream_key=number)


def drive(scheduler: Scheduler, steps: list | None = None, *, late: bool = False) -> dict[int, list[int]]:
    """Runs to the end with a made-up model whose next token is a function of the tokens so far. With ``late`` a step is
    planned before the tokens of the one before it are known."""
    outputs: dict[int, list[int]] = {}
    flying: list = []

    def land() -> None:
        plan, rows = flying.pop(0), scheduler.rows
        drawn = [
            int(rows.tokens[row, :at].sum() % 89) for row, at in zip(plan.sampled_rows, plan.sampled_at, strict=True)
        ]
        for done in scheduler.commit(plan, np.asarray(drawn, np.int64))[1]:
            outputs[done.request_id] = scheduler.generated(done).tolist()
            scheduler.retire(done)

    while True:
        if flying and scheduler.must_commit():
            land()
        plan = scheduler.schedule()
        scheduler.allocator.check()
        if plan is not None:
            assert 0 < plan.num_tokens <= scheduler.max_batch_tokens
            flying.append(plan)
            if steps is not None:
                steps.append(plan)
        if plan is None and not flying:
            return outputs
        if len(flying) > (late and plan is not None):
            land()


def expected(tokens: list[int], count: int) -> list[int]:
    tokens, start = list(tokens), len(tokens)
    for _ in range(count):
        tokens.append(sum(tokens) % 89)
    return tokens[start:]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_all_is_served_whatever_the_limits(data):
    page_size, max_sequences = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 5))
    context = data.draw(st.integers(8, 40))
    allocator = PageAllocator(-(-context // page_size) + data.draw(st.integers(0, 12)), page_size)
    scheduler = Scheduler(
        allocator,
        max_batch_tokens=max_sequences + data.draw(st.integers(0, 20)),
        max_sequences=max_sequences,
        max_context=context,
        prefix_cache=data.draw(st.booleans()),
        group_share=data.draw(st.sampled_from([0.0, 0.0, 0.5, 1.0])),
    )
    prompts = data.draw(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=context - 1), max_size=8))
    counts = [data.draw(st.integers(1, 12)) for _ in prompts]
    for number, (prompt, count) in enumerate(zip(prompts, counts, strict=True)):
        scheduler.add(sequence(number, prompt, count))
    outputs = drive(scheduler, late=data.draw(st.booleans()))
    for number, (prompt, count) in enumerate(zip(prompts, counts, strict=True)):
        assert outputs[number] == expected(prompt, min(count, context - len(prompt)))
    assert allocator.num_held == 0 and scheduler.num_running == scheduler.num_waiting == 0


def test_decodes_come_first_and_prompts_fill_the_budget():
    scheduler = Scheduler(PageAllocator(50, 4), max_batch_tokens=10, max_sequences=4, max_context=64)
    for number, length in enumerate((3, 15, 6)):
        scheduler.add(sequence(number, [number] * length))
    steps: list = []
    drive(scheduler, steps)
    shapes = [(len(p.decodes), [(c.sequence.request_id, c.stop - c.start) for c in p.chunks]) for p in steps]
    assert shapes[:3] == [(0, [(0, 3), (1, 7)]), (1, [(1, 8), (2, 1)]), (2, [(2, 5)])]
    assert [p.num_tokens for p in steps[:3]] == [10, 10, 7]


@pytest.mark.parametrize("late", [False, True])
def test_further_sequences_are_admitted_in_groups(late):
    rng = random.Random(0)
    lengths = [rng.randint(1, 120) for _ in range(300)]
    shares = {}
    for share in (0.0, 0.25):
        scheduler = Scheduler(
            PageAllocator(600, 4), max_batch_tokens=200, max_sequences=16, max_context=130, group_share=share
        )
        for number, length in enumerate(lengths):
            scheduler.add(sequence(number, [number % 89, 1, 2], length))
        steps: list = []
        assert {number: len(ids) for number, ids in drive(scheduler, steps, late=late).items()} == dict(
            enumerate(lengths)
        )
        shares[share] = sum(bool(plan.chunks) for plan in steps) / len(steps)
        held, longest = 0, 0
        for plan in steps[:-120]:  # somebody waits throughout
            held = 0 if plan.chunks or len(plan.decodes) == 16 else held + 1
            longest = max(longest, held)
        assert longest <= (MAX_HELD_STEPS if share else 0) + late  # a row may wait for its last token
    assert shares[0.25] < 0.4 * shares[0.0]


def test_a_prefix_is_shared_within_one_step():
    scheduler = Scheduler(PageAllocator(50, 4), max_batch_tokens=64, max_sequences=4, max_context=64)
    for number in range(3):
        scheduler.add(sequence(number, [*range(16), 50 + number]))
    plan = scheduler.schedule()
    assert plan is not None
    assert [(c.start, c.stop) for c in plan.chunks] == [(0, 17), (16, 17), (16, 17)]
    assert scheduler.allocator.num_held == 4 + 3


def test_the_youngest_gives_way_and_is_served_later():
    scheduler = Scheduler(PageAllocator(8, 4), max_batch_tokens=32, max_sequences=4, max_context=32, prefix_cache=False)
    for number in range(3):
        scheduler.add(sequence(number, [number] * 8, max_tokens=16))
    steps: list = []
    outputs = drive(scheduler, steps)
    assert scheduler.num_preemptions > 0
    assert outputs == {number: expected([number] * 8, 16) for number in range(3)}
    assert all(p.decodes[0].request_id == 0 for p in steps if any(s.request_id == 0 for s in p.decodes))


def test_different_salts_share_nothing():
    scheduler = Scheduler(PageAllocator(50, 4), max_batch_tokens=64, max_sequences=4, max_context=64)
    for number in range(2):
        one = sequence(number, list(range(16)))
        one.cache_salt = bytes([number])
        scheduler.add(one)
    plan = scheduler.schedule()
    assert plan is not None and [(c.start, c.stop) for c in plan.chunks] == [(0, 16), (0, 16)]


def test_abort_gives_all_pages_back():
    allocator = PageAllocator(20, 4)
    scheduler = Scheduler(allocator, max_batch_tokens=8, max_sequences=4, max_context=32)
    for number in range(5):
        scheduler.add(sequence(number, list(range(10))))
    scheduler.schedule()
    scheduler.abort()
    assert allocator.num_held == 0 and scheduler.schedule() is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"page_size": 0}, "page_size is 0"),
        ({"num_pages": 0}, "num_pages is 0"),
        ({"max_batch_tokens": 3, "max_sequences": 4}, "allowed: from max_sequences, 4, on"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(InputError, match=message):
        EngineConfig(**settings)
