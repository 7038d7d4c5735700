"""Recorded decode steps without a GPU: a recording is a function that is called again, on the same static tensors."""

from __future__ import annotations

import random

import pytest
import torch
from specialize.engine import decode_graph
from specialize.engine.adapter import save_part_matrices
from specialize.engine.config import ModelConfig
from specialize.engine.generator import Generator
from specialize.engine.model import Model
from specialize.engine.sampler import SamplingParams
from specialize.engine.scheduler import EngineConfig

CONFIG = ModelConfig("llama", 256, 32, 48, 2, 4, num_kv_heads=2, max_context=256)


class Replayed:
    def __init__(self, step) -> None:
        self._step, self.out = step, tuple(out.clone() for out in step())

    def replay(self) -> None:
        for out, new in zip(self.out, self._step(), strict=True):
            out.copy_(new)

    def pool(self) -> None:
        return None


@pytest.fixture
def model():
    return Model.random(CONFIG, 3, std=0.3)


@pytest.fixture
def recorded(monkeypatch):
    """Counts what is recorded and lets the CPU take part."""
    graphs: list[Replayed] = []

    def record(step, model, pool):
        graphs.append(Replayed(step))
        return graphs[-1], graphs[-1].out

    monkeypatch.setattr(decode_graph, "record", record)
    monkeypatch.setattr(decode_graph, "MIN_CONTEXT", 32)
    return graphs


def with_graphs(model: Model, config: EngineConfig, adapters=None) -> Generator:
    generator = Generator(model, None, config, adapters)
    generator._graphs._off = False
    return generator


def prompts_of(groups: int, each: int, shared: int) -> list[list[int]]:
    rng = random.Random(groups)
    prefixes = [[rng.randrange(256) for _ in range(shared)] for _ in range(groups)]
    return [p + [rng.randrange(256) for _ in range(rng.randint(1, 20))] for p in prefixes for _ in range(each)]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("shared", [0, 80])
def test_replayed_steps_give_the_same_tokens(model, recorded, overlap, shared):
    prompts = prompts_of(3, 3, shared)
    params = [SamplingParams(max_tokens=8 + 4 * i, temperature=0.8 * (i % 2)) for i in range(len(prompts))]
    plain = Generator(model, None, EngineConfig(page_size=4, prefix_cache=False))
    truth = [c.token_ids for c in plain.generate(prompts, params)]
    generator = with_graphs(model, EngineConfig(page_size=4, max_sequences=7, overlap=overlap))
    for _ in range(2):
        assert [c.token_ids for c in generator.generate(prompts, params)] == truth
    assert len(recorded) > 3
    assert (generator.stats.shared_decode_tokens > 0) == (shared > 0)


def test_warming_up_records_ahead(model, recorded):
    generator = with_graphs(model, EngineConfig(page_size=4, max_sequences=6))
    generator.warm_up(5, max_context=100)
    assert len(recorded) == 3  # of 8 sequences, for 32, 64 and 128 tokens
    generator.generate([[1, 2]] * 5, SamplingParams(max_tokens=40, temperature=0))
    assert len(recorded) == 3


def test_a_larger_graph_serves_until_a_bucket_has_come_up_often(model, recorded):
    prompts = prompts_of(1, 3, 0)
    params = [SamplingParams(max_tokens=8 + 8 * i, temperature=0.7, ignore_eos=True) for i in range(len(prompts))]
    truth = Generator(model, None, EngineConfig(page_size=4)).generate(prompts, params)
    generator = with_graphs(model, EngineConfig(page_size=4, max_sequences=6, overlap=True))
    generator.warm_up()
    ahead = len(recorded)
    assert generator.generate(prompts, params) == truth
    assert len(recorded) == ahead + 1  # a single sequence would fill but a small part of one
    ahead += 1
    for _ in range(decode_graph.RECORD_BESIDE_AT_USE // 7):
        assert generator.generate(prompts, params) == truth
    assert len(recorded) == ahead + 2  # for 3 and 2 sequences


def test_adapters_are_replayed_and_forgotten_when_they_change(model, recorded, tmp_path):
    for number in range(2):
        torch.manual_seed(number)
        parts = {
            part.path: (torch.randn(2, a.linear.in_features), torch.randn(part.stop - part.start, 2) * 0.3)
            for a in model.adaptable
            for part in a.parts
        }
        targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
        save_part_matrices(tmp_path / str(number), parts, rank=2, alpha=4, targets=targets)
    prompts = prompts_of(2, 3, 0)
    params = SamplingParams(max_tokens=12, temperature=0)
    names = {"a": tmp_path / "0", "b": tmp_path / "1"}
    plain = Generator(model, None, EngineConfig(page_size=4), names)
    generator = with_graphs(model, EngineConfig(page_size=4), names)
    for wanted in ([None, "a", "b", "a", "b", None], ["a"] * 6, [None] * 6):
        truth = [c.token_ids for c in plain.generate(prompts, params, adapter=wanted)]
        assert [c.token_ids for c in generator.generate(prompts, params, adapter=wanted)] == truth
    assert len(recorded) >= 3
    plain.unload_adapter("a")
    generator.unload_adapter("a")
    plain.load_adapter(tmp_path / "1", "a")
    generator.load_adapter(tmp_path / "1", "a")
    truth = [c.token_ids for c in plain.generate(prompts, params, adapter="a")]
    assert [c.token_ids for c in generator.generate(prompts, params, adapter="a")] == truth


@pytest.mark.parametrize("engine", [{"overlap": True}, {"overlap": False}, {"speculation": "prompt_lookup"}], ids=str)
def test_whatever_a_request_asks_for_is_replayed(model, recorded, tmp_path, engine):
    """Penalties, contrast, log-probabilities, 8-bit pages, drafts and too few pages: with graphs as without."""
    torch.manual_seed(0)
    parts = {
        part.path: (torch.randn(2, a.linear.in_features), torch.randn(part.stop - part.start, 2) * 0.3)
        for a in model.adaptable
        for part in a.parts
        if part.path.endswith("q_proj")
    }
    save_part_matrices(tmp_path / "a", parts, rank=2, alpha=4, targets=("q_proj",))
    rng = random.Random(1)
    prompts = [[rng.randrange(9) for _ in range(rng.randint(4, 40))] for _ in range(9)]
    kinds = [
        {}, {"repetition_penalty": 1.3}, {"logprobs": 2}, {"contrast": 0.5}, {"top_p": 0.9, "top_k": 20},
        {"temperature": 0.0}, {"min_p": 0.1}, {"logprobs": 1, "repetition_penalty": 0.8}, {"n": 2},
    ]  # fmt: skip
    limits = {"page_size": 4, "max_sequences": 6, "max_context": 100, "num_pages": 50, "kv_dtype": "int8", **engine}
    for chosen in (kinds[:1] + kinds[4:7], kinds):
        params = [
            SamplingParams(max_tokens=9 + 5 * i, **{"temperature": 0.7, **chosen[i % len(chosen)]})
            for i in range(len(prompts))
        ]
        adapter = ["a" if p.contrast else None for p in params]
        plain = Generator(model, None, EngineConfig(**limits), {"a": tmp_path / "a"})
        truth = plain.generate(prompts, params, adapter=adapter)
        generator = with_graphs(model, EngineConfig(**limits), {"a": tmp_path / "a"})
        generator._group_share = 0.5
        for _ in range(3):
            assert generator.generate(prompts, params, adapter=adapter) == truth
        assert generator.stats.preemptions > 0
    assert len(recorded) > 6
