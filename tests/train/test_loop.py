"""The loop against itself: packed as unpacked, accumulated as one batch, resumed as uninterrupted."""

import json
import math
from dataclasses import replace

import pytest
import torch
from models import rows, tiny_pair
from specialize.engine.model import Model
from specialize.train import loop
from specialize.train.checkpoint import load_checkpoint
from specialize.train.config import TrainConfig
from specialize.train.data import TrainExample
from specialize.train.loop import Trainer, tune

from specialize.errors import InputError

QUICK = {"rank": 4, "learning_rate": 1e-2, "batch_size": 4, "epochs": 2, "max_batch_tokens": 64, "warmup_ratio": 0.2}


def adapter_bytes(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


def first_gradient(model, examples, out, **changes):
    settings = {**QUICK, "batch_size": len(examples), "max_grad_norm": math.inf, **changes}
    trainer = Trainer(model, examples, TrainConfig(**settings), out)
    with torch.no_grad():  # B far from zero, so that A has a gradient, too
        for pair in trainer.trainable.pairs.values():
            pair.views(trainer.trainable.flat)[1].normal_(std=0.1, generator=torch.Generator().manual_seed(3))
    if trainer.trainable._mask is not None:
        trainer.trainable.flat.mul_(trainer.trainable._mask)
    trainer.trainable.refresh()
    _, *losses = trainer.train_step().wait()
    return sum(losses), trainer.trainable.gradient.clone(), len(losses)


@pytest.mark.parametrize("kind", ["Llama", "Mpt"])
@pytest.mark.parametrize("normalise", ["tokens", "examples"])
def test_packing_and_accumulation_change_nothing(kind, normalise, tiny, tmp_path):
    _, model = tiny(kind)
    examples = rows(9)
    limit = {"max_length": 40, "normalise": normalise}
    one, gradient, count = first_gradient(model, examples, tmp_path, max_batch_tokens=1000, **limit)
    assert count == 1
    for budget in (100, 40):
        other, split, count = first_gradient(model, examples, tmp_path, max_batch_tokens=budget, **limit)
        assert count > 1
        assert other == pytest.approx(one, rel=1e-5)
        assert torch.linalg.norm(split - gradient) <= 1e-5 * torch.linalg.norm(gradient)


def test_the_loss_is_the_mean_over_response_tokens(tiny, tmp_path):
    theirs, model = tiny()
    examples = rows(4)
    total, count = 0.0, 0
    for e in examples:
        with torch.no_grad():
            logp = theirs(torch.tensor([[*e.prompt_ids, *e.response_ids]])).logits[0].log_softmax(-1)
        for place, token in enumerate(e.response_ids, start=len(e.prompt_ids)):
            total, count = total - float(logp[place - 1, token]), count + 1
    trainer = Trainer(model, examples, TrainConfig(**QUICK), tmp_path)
    _, *losses = trainer.train_step().wait()
    assert sum(losses) == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("normalise", ["tokens", "examples"])
def test_only_counted_tokens_of_a_conversation_carry_a_loss(normalise, tiny, tmp_path):
    theirs, model = tiny()
    plain = rows(3)
    talk = TrainExample(range(3, 9), range(20, 32), name="talk", counted=[True, True] + [False] * 7 + [True] * 3)
    examples = [*plain, replace(talk, weight=2.0)]
    total = scale = 0.0
    for e in examples:
        with torch.no_grad():
            logp = theirs(torch.tensor([[*e.prompt_ids, *e.response_ids]])).logits[0].log_softmax(-1)
        counted = [i for i in range(len(e.response_ids)) if not e.counted or e.counted[i]]
        weight = e.weight if normalise == "tokens" else e.weight / len(counted)
        total -= weight * sum(float(logp[len(e.prompt_ids) + i - 1, e.response_ids[i]]) for i in counted)
        scale += weight * len(counted)
    trainer = Trainer(model, examples, TrainConfig(**(QUICK | {"normalise": normalise})), tmp_path)
    pending = trainer.train_step()
    _, *losses = pending.wait()
    assert sum(losses) == pytest.approx(total / scale, rel=1e-5)
    assert pending.response_tokens == sum(len(e.response_ids) for e in plain) + 5


def test_recomputed_layers_give_the_same_gradient(tiny, tmp_path):
    _, model = tiny()
    for dropout in (0.0, 0.3):
        plain = first_gradient(model, rows(5), tmp_path, dropout=dropout)
        again = first_gradient(model, rows(5), tmp_path, dropout=dropout, recompute="layers")
        assert plain[0] == again[0] and torch.equal(plain[1], again[1])


def test_the_output_projection_runs_at_response_tokens_only(tiny, tmp_path, monkeypatch):
    _, model = tiny()
    trainer = Trainer(model, [TrainExample([5, 6, 7], [8, 9])], TrainConfig(**QUICK), tmp_path)
    seen, entropy = [], loop.linear_cross_entropy

    def watched(hidden, weight, targets, **settings):
        seen.append((hidden.shape[0], targets.tolist()))
        return entropy(hidden, weight, targets, **settings)

    monkeypatch.setattr(loop, "linear_cross_entropy", watched)
    trainer.train_step()
    assert seen == [(2, [8, 9])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tiny_set_is_learned_by_heart(dtype, tmp_path):
    tiny_pair("Llama", tmp_path / "base")
    model = Model.from_pretrained(tmp_path / "base", dtype=dtype)
    model.final_norm.weight.mul_(6)  # random heads cannot be sure of anything otherwise
    reports = []
    config = TrainConfig(rank=16, learning_rate=1e-2, epochs=60, batch_size=6, schedule="cosine")
    result = tune(model, rows(6), config, tmp_path / "out", on_step=reports.append)
    assert result.losses[0] > 3.0 and result.losses[-1] < 0.1
    assert len(reports) == result.steps == 60 and reports[-1].loss == result.losses[-1]
    assert (
        reports[0].learning_rate
        < config.learning_rate
        == pytest.approx(max(r.learning_rate for r in reports), rel=0.01)
    )
    assert result.tokens == 60 * sum(e.num_tokens for e in rows(6)) and result.tokens_per_s > 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == list(result.losses)


class Stop(Exception):
    pass


@pytest.mark.parametrize("stop_at", [1, 3, 5, 6])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(stop_at, dropout, tiny, tmp_path):
    _, model = tiny()
    examples = rows(12)
    config = TrainConfig(**QUICK, dropout=dropout, checkpoint_interval=2, val_fraction=0.2, seed=7)
    whole = tune(model, examples, config, tmp_path / "whole")

    def stop(report):
        if report.step == stop_at:
            raise Stop

    with pytest.raises(Stop):
        tune(model, examples, config, tmp_path / "cut", on_step=stop)
    seen = []
    resumed = tune(model, examples, config, tmp_path / "cut", on_step=lambda r: seen.append(r.step))
    assert adapter_bytes(tmp_path / "cut") == adapter_bytes(tmp_path / "whole")
    assert resumed.losses == whole.losses and resumed.val_losses == whole.val_losses
    assert (resumed.tokens, resumed.response_tokens) == (whole.tokens, whole.response_tokens)
    assert seen == list(range((stop_at - 1) // 2 * 2 + 1, whole.steps + 1))
    steps = [json.loads(line)["step"] for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, whole.steps + 1))


def test_a_finished_run_is_not_done_again_but_a_changed_one_is(tiny, tmp_path):
    _, model = tiny()
    config = TrainConfig(**QUICK)
    seen = []
    first = tune(model, rows(4), config, tmp_path, on_step=seen.append)
    again = tune(model, rows(4), config, tmp_path, on_step=seen.append)
    assert again == first and len(seen) == first.steps
    (tmp_path / "adapter_model.safetensors").unlink()
    assert tune(model, rows(4), config, tmp_path, on_step=seen.append).losses == first.losses
    assert len(seen) == 2 * first.steps
    seen.clear()
    changed = tune(model, rows(5), config, tmp_path, on_step=seen.append)
    assert changed.losses != first.losses and len(seen) == changed.steps
    assert not (tmp_path / "checkpoint.safetensors").exists()


def test_a_checkpoint_of_other_settings_is_refused(tiny, tmp_path):
    _, model = tiny()

    def stop(report):
        if report.step == 2:
            raise Stop

    with pytest.raises(Stop):
        tune(model, rows(12), TrainConfig(**QUICK, checkpoint_interval=1), tmp_path, on_step=stop)
    with pytest.raises(InputError, match="other rows, settings or model"):
        tune(model, rows(12), TrainConfig(**{**QUICK, "rank": 2}, checkpoint_interval=1), tmp_path)
    result = tune(model, rows(12), TrainConfig(**{**QUICK, "rank": 2}), tmp_path, resume=False)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == result.steps


def test_a_loss_that_is_no_number_stops_with_the_rows_named_and_the_checkpoint_kept(tmp_path):
    tiny_pair("Llama", tmp_path / "base")
    model = Model.from_pretrained(tmp_path / "base")
    examples = [*rows(7, vocab=90), TrainExample([1, 2], [3, 96], name="the bad one"), *rows(4, seed=5, vocab=90)]
    examples[-1] = TrainExample([96, 2], [3], name="the bad one, too")
    model.embedding[96] = float("nan")
    config = TrainConfig(**{**QUICK, "epochs": 1, "batch_size": 1, "max_batch_tokens": 40}, checkpoint_interval=1)
    with pytest.raises(FloatingPointError, match=r"step \d+: the loss is nan in the batch of (the bad one|r\d)"):
        tune(model, examples, config, tmp_path / "out")
    if (tmp_path / "out" / "checkpoint.safetensors").exists():
        tensors, _ = load_checkpoint(tmp_path / "out" / "checkpoint.safetensors")
        assert all(torch.isfinite(t).all() for t in tensors.values())


def test_validation_rows_are_kept_out_and_reported_from_the_start(tiny, tmp_path):
    _, model = tiny()
    config = TrainConfig(**QUICK, val_fraction=0.25, val_interval=2)
    result = tune(model, rows(12), config, tmp_path)
    assert (result.num_examples, result.num_val_examples) == (9, 3)
    assert [step for step, _ in result.val_losses] == [0, 2, 4, 6]
    given = tune(model, rows(8), TrainConfig(**QUICK), tmp_path / "given", val_examples=rows(2, seed=9))
    assert (given.num_examples, given.num_val_examples) == (8, 2)
    assert [step for step, _ in given.val_losses] == [0, 2, 4]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"schedule": "step"}, "schedule: step; allowed: cosine, linear, constant"),
        ({"epochs": 0}, "epochs: 0; allowed: above 0"),
        ({"learning_rate": -1}, "learning_rate: -1"),
        ({"long_examples": "keep"}, "long_examples: keep; allowed: truncate, drop, error"),
        ({"val_fraction": 1.0}, "val_fraction: 1.0"),
    ],
)
def test_wrong_settings_are_refused_at_once(changes, said):
    with pytest.raises(InputError, match=said):
        TrainConfig(**changes)


def test_half_precision_scales_its_loss(tmp_path):
    tiny_pair("Llama", tmp_path / "base")
    model = Model.from_pretrained(tmp_path / "base", dtype=torch.float16)
    result = tune(model, rows(4), TrainConfig(**{**QUICK, "epochs": 20}), tmp_path / "out")
    assert result.losses[-1] < result.losses[0] / 2
    assert max(result.grad_norms) < 100


KILLED_RUN = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from models import rows
from specialize.engine.model import Model
from specialize.train.config import TrainConfig
from specialize.train.loop import tune
model = Model.from_pretrained(sys.argv[2])
config = TrainConfig(
    rank=4, batch_size=4, epochs=200, checkpoint_interval=3, dropout=0.1, max_batch_tokens=64, val_fraction=0.2,
    patience=1000, keep_best=True, schedule="constant",
)
print("ready", flush=True)
tune(model, rows(15), config, Path(sys.argv[3]))
"""


@pytest.mark.slow
def test_a_run_killed_at_any_moment_ends_with_the_same_adapter(tmp_path):
    import random
    import subprocess
    import sys
    import time
    from pathlib import Path

    tiny_pair("Llama", tmp_path / "base")
    command = [sys.executable, "-c", KILLED_RUN, str(Path(__file__).parent), str(tmp_path / "base")]
    started = time.perf_counter()
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True)
    longest = (time.perf_counter() - started) / 20  # on average the twenty lives then do half of the work
    moments, kills = random.Random(0), 0
    while kills < 20:
        process = subprocess.Popen([*command, str(tmp_path / "cut")], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        time.sleep(moments.uniform(0.0, longest))
        assert process.poll() is None, "the run ended before it was killed twenty times"
        process.kill()
        process.wait()
        kills += 1
    subprocess.run([*command, str(tmp_path / "cut")], check=True, capture_output=True)
    assert adapter_bytes(tmp_path / "cut") == adapter_bytes(tmp_path / "whole")
    results = [json.loads((tmp_path / name / "train.json").read_text()) for name in ("whole", "cut")]
    for name in ("losses", "val_losses", "best_step", "steps"):
        assert results[0][name] == results[1][name]
