"""Profiles add up to the time that passed, and a traced model computes what the plain one does."""

from __future__ import annotations

import json

import pytest
import torch
from specialize.bench import profile
from specialize.bench.floor import Ceilings
from specialize.bench.trace import WORKLOAD, device_groups, host_groups, read_trace
from specialize.bench.traced import TracedTrainer, traced
from specialize.bench.train import random_rows
from specialize.engine.batch import Batch
from specialize.engine.config import ModelConfig
from specialize.engine.generator import Generator
from specialize.engine.model import Model
from specialize.engine.sampler import SamplingParams
from specialize.engine.scheduler import EngineConfig
from specialize.engine.spans import recorded_span
from specialize.train.config import TrainConfig
from specialize.train.loop import Trainer

from specialize.errors import InputError

TINY = ModelConfig("llama", 307, 64, 96, 3, 4, 2, max_context=512)
MPT = ModelConfig(
    "mpt", 307, 64, 256, 2, 4, norm="layernorm", position="alibi", mlp="gelu", fused_qkv_checkpoint=True,
    tied_embeddings=True,
)  # fmt: skip
DTYPE = torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


@pytest.fixture
def tiny_shape(monkeypatch):
    monkeypatch.setitem(profile.SHAPES, "tiny", TINY)
    monkeypatch.setattr(profile, "_measured", lambda device, dtype: Ceilings(1e12, 1e10))
    monkeypatch.setattr(profile, "floor_seconds", lambda *arguments: {"operations": 1e-3, "bytes": 2e-3})


@pytest.mark.parametrize(
    ("what", "options", "groups"),
    [
        (
            "generate",
            ("--batch", "5", "--prompt-tokens", "60", "--new-tokens", "12"),
            {"linear", "attention", "norm", "sampling", "schedule", "build batch", "commit", "host gaps"},
        ),
        (
            "train",
            ("--num-rows", "6", "--batch", "3", "--max-length", "90", "--recompute", "layers"),
            {"linear", "linear backward", "attention", "attention backward", "norm", "norm backward", "loss",
             "optimizer", "prepare batch", "collect gradients"},
        ),
    ],
)  # fmt: skip
def test_groups_add_up_to_the_time_that_passed(tiny_shape, tmp_path, capsys, what, options, groups):
    trace = tmp_path / "trace.json"
    common = ("--model", "random:tiny", "--device", "cpu", "--out", str(trace), "--json")
    with pytest.raises(SystemExit) as ended:
        profile.command.main([what, *common, *options])
    assert ended.value.code == 0
    result = json.loads(capsys.readouterr().out)
    assert json.loads(trace.read_text())["traceEvents"]
    found = {row["group"]: row["seconds"] for row in result["groups"]}
    assert groups <= set(found)
    assert sum(found.values()) == pytest.approx(result["profiled_seconds"], rel=0.1)
    assert result["gpu_busy_share"] is None and result["floor_share"] > 0
    text = profile.format_profile(result)
    assert "linear " in text and str(trace) in text


@pytest.mark.parametrize("config", [TINY, MPT], ids=["llama", "mpt"])
def test_a_traced_model_generates_the_same_tokens(config):
    model = Model.random(config, dtype=DTYPE)
    prompts = [[1, 2, 3, 4], [5, 6]]
    params = SamplingParams(max_tokens=9, temperature=0.8, ignore_eos=True)
    both = [
        [c.token_ids for c in Generator(m, None, EngineConfig(num_pages=64), span=s).generate(prompts, params)]
        for m, s in ((model, lambda name: recorded_span(name)), (traced(model), recorded_span))
    ]
    assert both[0] == both[1]


@pytest.mark.parametrize("recompute", ["none", "layers"])
def test_a_traced_trainer_trains_the_same_weights_and_counts_once(tmp_path, recompute):
    model = Model.random(TINY, dtype=DTYPE, inference=False)
    rows = random_rows(6, vocab=TINY.vocab_size, mean=40, longest=60)
    config = TrainConfig(batch_size=3, max_steps=2, rank=4, recompute=recompute)
    copy = traced(model)
    plain, watched = Trainer(model, rows, config, tmp_path / "a"), TracedTrainer(copy, rows, config, tmp_path / "b")
    for trainer in (plain, watched):
        trainer.train_step().wait()
    assert torch.equal(plain.trainable.flat, watched.trainable.flat)
    work = copy.work.operations
    forward = work["linear"] / (2 if recompute == "layers" else 1)
    assert 0.8 * forward < work["linear backward"] < 1.3 * forward  # the first layer's input needs no gradient
    assert work["attention backward"] > 0 and work["loss"] > 0


def test_operations_are_those_of_the_matrices():
    copy = traced(Model.random(TINY, dtype=torch.float32))
    with torch.inference_mode():
        copy.logits(copy.forward(Batch.packed([[1, 2, 3], [4, 5]])))
    weights = sum(a.linear.weight.numel() for a in copy.adaptable) + copy.head.weight.numel()
    assert copy.work.operations["linear"] == 2 * 5 * weights
    pairs = (1 + 2 + 3) + (1 + 2)
    assert copy.work.operations["attention"] == 4 * TINY.num_layers * TINY.num_heads * TINY.head_dim * pairs


def span(name, start, duration, tid=1, cat="user_annotation"):
    return {"ph": "X", "name": name, "ts": float(start), "dur": float(duration), "tid": tid, "cat": cat}


def test_every_moment_belongs_to_the_innermost_range():
    events = [
        span(WORKLOAD, 0, 100),
        span("schedule", 0, 10),
        span("forward", 20, 50),
        span("op:attention", 25, 20),
        span("op:norm", 30, 5),
        span("aten::mm", 46, 3, cat="cpu_op"),
        span("autograd::engine::evaluate_function: _SwigluBackward", 80, 10, cat="cpu_op"),
        span("op:linear", 82, 4),
        span("op:linear", 0, 90, tid=2),
    ]
    seconds = host_groups(events)
    assert {name: round(1e6 * s) for name, s in seconds.items()} == {
        "schedule": 10, "host gaps": 30, "model, the rest": 30, "attention": 15, "norm": 5, "activation backward": 6,
        "linear": 4,
    }  # fmt: skip
    with pytest.raises(InputError, match="has no range 'workload'"):
        host_groups(events[1:])


def test_a_device_is_busy_while_any_kernel_runs():
    events = [
        span("_attention_forward", 0, 40, tid=7, cat="kernel"),
        span("nvjet_tst_128x256", 20, 40, tid=8, cat="kernel"),
        span("Memcpy DtoH", 90, 10, tid=7, cat="gpu_memcpy"),
        span("op:linear", 0, 500),
    ]
    groups, busy, whole = device_groups(events)
    assert {name: round(1e6 * s) for name, s in groups.items()} == {"attention": 40, "linear": 40, "copies": 10}
    assert (round(1e6 * busy), round(1e6 * whole)) == (70, 100)
    assert device_groups([]) == ({}, 0.0, 0.0)


def test_what_is_no_trace_is_one_line(tmp_path):
    (tmp_path / "t.json").write_text("[]")
    with pytest.raises(InputError, match="no Chrome trace"):
        read_trace(tmp_path / "t.json")
    with pytest.raises(InputError, match="no such shape; allowed: random:"):
        profile.profile_generation(
            "random:huge", tmp_path / "x", dtype="fp32", device="cpu", config=EngineConfig(), workload={}
        )
