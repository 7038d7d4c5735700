"""The plan's sizes against tensors that exist, and what it says of models that are not here."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from specialize.engine import plan as planning
from specialize.engine.cache import KVCache
from specialize.engine.config import ModelConfig
from specialize.engine.generator import Generator
from specialize.engine.memory import CUDA_CONTEXT_BYTES, capacity_bytes
from specialize.engine.model import Model
from specialize.engine.plan import (
    engine_limits,
    packed_bytes,
    page_bytes,
    plan_generation,
    plan_on_device,
)
from specialize.engine.quantize import Quantization
from specialize.engine.sampler import SamplingParams
from specialize.engine.scheduler import EngineConfig
from specialize.engine.shapes import SHAPES

from specialize.errors import InputError

CONFIG = ModelConfig("llama", 97, 32, 48, 3, 4, num_kv_heads=2, max_context=1000)


def on_a_card(shape: str, card: str, kv_dtype: str = "auto", **settings):
    return plan_generation(
        SHAPES[shape], EngineConfig(kv_dtype=kv_dtype), dtype=torch.bfloat16, memory_bytes=capacity_bytes(card),
        process_bytes=CUDA_CONTEXT_BYTES, model=shape, **settings,
    )  # fmt: skip


def num_bytes(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def test_pages_are_what_the_cache_allocates():
    cache = KVCache(CONFIG, 7, 16, torch.int8, "cpu")
    held = num_bytes(t for i in range(CONFIG.num_layers) for t in cache.layer(i))
    assert 7 * page_bytes(CONFIG, 16, torch.int8) == held


def test_mpt_30b_on_one_80_gb_card_in_8_and_4_bits():
    for weights, kv_dtype, at_least in (("int8", "int8", 64), ("fp8", "fp8", 64), ("nf4", "int8", 84)):
        plan = on_a_card("mpt-30b", "h100-80gb", quantization=Quantization(weights), kv_dtype=kv_dtype).require()
        assert plan.num_sequences(1000) >= at_least
        assert (
            plan.fixed_bytes + plan.kv_bytes <= plan.memory_bytes < plan.fixed_bytes + plan.kv_bytes + plan.page_bytes
        )
    assert on_a_card("mpt-30b", "h100-80gb").num_sequences(1000) < 20  # 60 GB of bf16 weights leave little


def test_what_cannot_fit_is_one_line_with_the_plan():
    with pytest.raises(InputError) as caught:
        on_a_card("mpt-30b", "24GB").require()
    line = str(caught.value)
    assert line.startswith("mpt-30b does not fit in 24.00 GB on cuda: process 0.84 GB, weights 59.91 GB, workspace")
    assert "--quantize int8 or nf4" in line and "\n" not in line


def test_a_cap_below_the_weights_is_refused_before_they_are_read(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(SHAPES["llama-3.1-8b"].to_dict()))
    with pytest.raises(InputError, match=r"does not fit in 4\.00 GB on cpu: .*weights 16\.06 GB"):
        Generator.from_pretrained(tmp_path, dtype="bf16", device="cpu", config=EngineConfig(memory_bytes=4 * 10**9))


def test_limits_left_open_suit_the_device():
    assert engine_limits(CONFIG, EngineConfig(), "cuda") == planning.Limits(8192, 256, 1000)
    assert engine_limits(CONFIG, EngineConfig(max_batch_tokens=32), "cpu") == planning.Limits(32, 32, 1000)
    with pytest.raises(InputError, match="max_batch_tokens is 8; allowed: from max_sequences, 9, on"):
        EngineConfig(max_sequences=9, max_batch_tokens=8)


def test_the_cap_is_for_the_whole_process():
    settings = {"dtype": torch.float32, "process_bytes": 400 << 20, "device": "cpu"}
    small, large = (
        plan_generation(CONFIG, EngineConfig(memory_bytes=cap), memory_bytes=cap, **settings)
        for cap in (520 << 20, 521 << 20)
    )
    more = large.kv_bytes - small.kv_bytes
    assert 0.9 * (1 << 20) < more < 1.02 * (1 << 20)
    assert small.fixed_bytes + small.kv_bytes <= 520 << 20
    assert plan_generation(CONFIG, EngineConfig(num_pages=7), memory_bytes=1 << 40, **settings).num_pages == 7
    assert plan_generation(CONFIG, EngineConfig(max_sequences=4), memory_bytes=1 << 40, **settings).num_pages == 4 * 63


def test_packed_copies_are_for_those_with_room():
    settings = {"dtype": torch.bfloat16, "process_bytes": 0, "device": "cpu", "packs": True}
    shape = SHAPES["smollm2-135m"]
    assert plan_generation(shape, memory_bytes=2 << 30, **settings).packed_bytes == packed_bytes(shape, torch.bfloat16)
    assert plan_generation(shape, memory_bytes=1 << 30, **settings).packed_bytes == 0
    int8 = plan_generation(shape, memory_bytes=1 << 30, **settings, quantization=Quantization("int8"))
    assert 0.5 < int8.packed_bytes / packed_bytes(shape, torch.bfloat16) < 0.7  # the head's copy is in bf16


def test_more_than_the_machine_has_is_refused(monkeypatch):
    monkeypatch.setattr(planning, "available_memory_bytes", lambda device: 10**9)
    monkeypatch.setattr(planning, "process_bytes", lambda device: 10**9)
    with pytest.raises(InputError, match=r"memory: 3\.00 GB is asked for; 2\.00 GB can be had on cpu"):
        plan_on_device(CONFIG, EngineConfig(memory_bytes=3 * 10**9), dtype=torch.float32, device="cpu")


def test_a_cache_too_small_preempts_and_says_so():
    config = EngineConfig(num_pages=8, page_size=16, max_sequences=4)
    generator = Generator(Model.random(CONFIG), None, config)
    completions = generator.generate([[1, 2, 3]] * 4, SamplingParams(max_tokens=60, ignore_eos=True))
    assert [len(c.token_ids) for c in completions] == [60] * 4
    assert generator.stats.preemptions > 0 and generator.stats.as_dict()["preemptions"] == generator.stats.preemptions


MEASURE = """
import json, re, sys
from specialize.engine import EngineConfig, Generator, SamplingParams
path, cap, dtype = sys.argv[1], int(sys.argv[2]), sys.argv[3]
generator = Generator.from_pretrained(path, dtype=dtype, device="cpu", config=EngineConfig(memory_bytes=cap))
plan = generator.plan
prompts = [[7 + 13 * i % 40000 + j for j in range(230)] for i in range(plan.num_sequences(272) + 2)]
generator.generate(prompts, SamplingParams(max_tokens=64, ignore_eos=True))
peak = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
planned = plan.fixed_bytes + plan.kv_bytes
print(json.dumps({"peak": peak, "planned": planned, "preemptions": generator.stats.preemptions}))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.parametrize(("cap", "dtype"), [(1_200_000_000, "bf16"), (950_000_000, "bf16"), (1_250_000_000, "fp32")])
def test_a_full_cache_takes_what_the_plan_said(smollm2, cap, dtype):
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(smollm2), str(cap), dtype], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["peak"] <= cap
    assert found["peak"] == pytest.approx(found["planned"], rel=0.15)
    assert found["preemptions"] > 0
