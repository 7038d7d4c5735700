"""Contrastive decoding: an expert and its base in one step, against the naive generator that runs them alone."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from specialize.engine import scheduler
from specialize.engine.adapter import save_part_matrices
from specialize.engine.config import ModelConfig
from specialize.engine.generator import Generator
from specialize.engine.model import Model
from specialize.engine.naive import naive_generate
from specialize.engine.sampler import Request, SamplingParams
from specialize.engine.scheduler import EngineConfig
from specialize.kernels.sampling import contrast

from specialize.errors import InputError

CONTEXT = 64
CONFIG = ModelConfig("llama", 256, 32, 48, 2, 4, num_kv_heads=2, max_context=CONTEXT)


@pytest.fixture(autouse=True)
def short_prefixes_are_shared(monkeypatch):
    monkeypatch.setattr(scheduler, "MIN_PREFIX_TOKENS", 1)


@pytest.fixture(scope="module")
def model():
    return Model.random(CONFIG, 3, std=0.3)


@pytest.fixture(scope="module")
def experts(model, tmp_path_factory):
    folders = {}
    for rank, name in ((2, "first"), (3, "second")):
        torch.manual_seed(rank)
        parts = {
            part.path: (torch.randn(rank, a.linear.in_features), torch.randn(part.stop - part.start, rank) * 0.1)
            for a in model.adaptable
            for part in a.parts
            if part.name in ("q_proj", "v_proj", "down_proj")
        }
        targets = ["q_proj", "v_proj", "down_proj"]
        folders[name] = save_part_matrices(tmp_path_factory.mktemp(name), parts, rank=rank, alpha=rank, targets=targets)
    return folders


def prompts_of(seed, count, longest, shared=0):
    rng = random.Random(seed)
    prefix = [rng.randrange(256) for _ in range(shared)]
    return [prefix + [rng.randrange(256) for _ in range(rng.randint(1, longest))] for _ in range(count)]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_equals_naive_token_for_token(model, experts, data):
    """Greedy and sampled, beside plain requests, in chunks, with page shortage, shared prefixes and overlap."""
    page_size = data.draw(st.sampled_from([1, 4, 16]))
    max_sequences = data.draw(st.integers(2, 6))
    least = -(-CONTEXT // page_size)
    config = EngineConfig(
        page_size=page_size,
        max_sequences=max_sequences,
        max_batch_tokens=max_sequences + data.draw(st.integers(0, 40)),
        num_pages=data.draw(st.integers(least, 3 * least)),
        prefix_cache=data.draw(st.booleans()),
        overlap=data.draw(st.booleans()),
    )
    seed = data.draw(st.integers(0, 99))
    prompts = prompts_of(seed, data.draw(st.integers(1, 7)), 10, data.draw(st.sampled_from([0, 9, 17])))
    rng = random.Random(seed)
    names = [rng.choice(["first", "second", None]) for _ in prompts]
    params = [
        SamplingParams(
            max_tokens=rng.randint(1, 15), temperature=rng.choice([0.0, 0.8]), top_p=rng.choice([0.9, 1.0]),
            repetition_penalty=rng.choice([1.0, 1.2]), seed=seed, ignore_eos=True,
            contrast=rng.choice([0.0, 0.5, 2.0]) if name else 0.0, contrast_floor=rng.choice([0.02, 0.3]),
        )
        for name in names
    ]  # fmt: skip
    # beside it the base's own context must fit, too
    room = config.num_pages // 2 * page_size
    params = [p if len(q) + p.max_tokens <= room else SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
              for p, q in zip(params, prompts, strict=True)]  # fmt: skip
    generator = Generator(model, None, config, experts)
    completions = generator.generate(prompts, params, adapter=names)
    for number, (prompt, param, name, done) in enumerate(zip(prompts, params, names, completions, strict=True)):
        slot = -1 if name is None else list(experts).index(name)
        pool = None if name is None else generator._pool
        truth = naive_generate(model, prompt, param, request_id=number, adapters=pool, adapter_index=slot)
        assert done.token_ids == truth.token_ids
    generator.allocator.check()
    assert generator.allocator.num_held == 0


def test_page_shortage_preempts_pairs(model, experts):
    prompts = prompts_of(1, 6, 20)
    params = SamplingParams(max_tokens=11, temperature=0.9, ignore_eos=True, contrast=1.0)
    plenty = Generator(model, None, None, experts).generate(prompts, params, adapter="first")
    for overlap in (False, True):
        config = EngineConfig(page_size=4, num_pages=18, max_sequences=6, overlap=overlap)
        scarce = Generator(model, None, config, experts)
        done = scarce.generate(prompts, params, adapter="first")
        assert [c.token_ids for c in done] == [c.token_ids for c in plenty]
        assert scarce.stats.preemptions > 0 and scarce.allocator.num_held == 0


def test_shared_prefixes_are_computed_once_for_expert_and_base(model, experts):
    prompts = prompts_of(4, 4, 3, shared=32)
    params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True, contrast=0.5)
    generator = Generator(model, None, EngineConfig(page_size=4), experts)
    generator.generate(prompts, params, adapter="first")
    assert generator.stats.cached_prompt_tokens == 3 * 32
    before = generator.stats.cached_prompt_tokens
    generator.generate(prompts[:1], SamplingParams(max_tokens=1), request_ids=[9])  # the base finds its pages, too
    assert generator.stats.cached_prompt_tokens - before >= 32


def test_it_changes_what_the_expert_says_and_reports_its_own_distribution(model, experts):
    generator = Generator(model, None, None, experts)
    plain, apart = (
        SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True, contrast=a, logprobs=50, contrast_floor=0.5)
        for a in (0.0, 3.0)
    )
    prompts = prompts_of(5, 4, 8)
    alone = generator.generate(prompts, plain, adapter="first")
    contrasted = generator.generate(prompts, apart, adapter="first")
    assert [c.token_ids for c in alone] != [c.token_ids for c in contrasted]
    for prompt, done in zip(prompts, contrasted, strict=True):
        truth = naive_generate(model, prompt, apart, adapters=generator._pool, adapter_index=0)
        for got, expected in zip(done.logprobs, truth.logprobs, strict=True):
            assert [t for t, _ in got] == [t for t, _ in expected] and len(got) < 50
            assert [v for _, v in got] == pytest.approx([v for _, v in expected], abs=1e-4)
            assert sum(torch.tensor([v for _, v in got]).exp()) == pytest.approx(1, abs=1e-4)


def test_the_formula():
    """Of tokens half as probable or more, the one that the base finds least probable beside the expert wins."""
    expert = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    base = torch.tensor([[0.7, 0.1, 0.0999, 0.1001]]).log()
    got = contrast(expert, base, torch.tensor([1.0]), torch.tensor([0.5])).softmax(-1)
    weights = torch.tensor([0.5**2 / 0.7, 0.3**2 / 0.1, 0.0, 0.0])
    torch.testing.assert_close(got[0], weights / weights.sum())
    off = contrast(expert, base, torch.tensor([0.0]), torch.tensor([1e-6]))
    torch.testing.assert_close(off, expert)


def test_wrong_use_is_one_line(model, experts):
    params = SamplingParams(contrast=0.5)
    with pytest.raises(InputError, match=r"prompt 0: contrast is 0.5 without an adapter.*not merged"):
        Generator(model, None, None, experts).generate([[1]], params)
    with pytest.raises(InputError, match="max_sequences is 1; allowed: 2"):
        Generator(model, None, EngineConfig(max_sequences=1), experts).generate([[1]], params, adapter="first")
    small = Generator(model, None, EngineConfig(page_size=4, num_pages=16), experts)
    with pytest.raises(InputError, match="the cache holds 32, so at most 31"):
        small.generate([list(range(40))], params, adapter="first")
    [ok] = small.generate([list(range(28))], SamplingParams(contrast=0.5, max_tokens=50), adapter="first")
    assert len(ok.token_ids) == 4 or ok.finish_reason == "stop"
    for wrong in ({"contrast": -1}, {"contrast": float("nan")}, {"contrast_floor": 0}, {"contrast_floor": 1.5}):
        with pytest.raises(InputError, match="sampling: contrast"):
            SamplingParams(**wrong)
    assert not next(iter(small.run([Request([1], params)]))).token_ids
