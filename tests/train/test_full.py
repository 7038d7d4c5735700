"""Full fine-tuning against torch's own training of transformers' model, and what early stopping keeps."""

import json
import math
import time

import pytest
import torch
from models import rows, tiny_pair
from specialize.engine.batch import Batch
from specialize.engine.model import Model
from specialize.train.config import TrainConfig
from specialize.train.data import TrainExample
from specialize.train.loop import Trainer, tune

from specialize.errors import InputError

FULL = {"method": "full", "learning_rate": 1e-3, "batch_size": 4, "max_batch_tokens": 60, "warmup_ratio": 0.0}


def their_loss(theirs, examples):
    total = sum(len(e.response_ids) for e in examples)
    loss = torch.zeros(())
    for e in examples:
        ids = torch.tensor([[*e.prompt_ids, *e.response_ids]])
        labels = ids.clone()
        labels[:, : len(e.prompt_ids)] = -100
        loss = loss + theirs(input_ids=ids, labels=labels).loss * (len(e.response_ids) / total)
    return loss


def logits(model, ids):
    with torch.no_grad():
        return model.logits(model.forward(Batch.packed([ids])))


@pytest.mark.parametrize(("kind", "tied"), [("Llama", False), ("Llama", True), ("Mpt", True)])
def test_every_weight_has_the_gradient_of_transformers(kind, tied, tmp_path):
    theirs, ours = tiny_pair(kind, tmp_path / "base", tie_word_embeddings=tied)
    examples = rows(4)
    theirs.train().zero_grad()
    their_loss(theirs, examples).backward()
    settings = {**FULL, "max_grad_norm": math.inf}
    trainer = Trainer(ours, examples, TrainConfig(**settings), tmp_path / "out", shuffle=False)
    trainer.train_step()
    flat = trainer.trainable.gradient.clone()
    assert trainer.trainable.num_parameters == sum(p.numel() for p in theirs.parameters())
    # the gradient, laid out as the weights are, read through the model's own map of names
    with torch.no_grad():
        trainer.trainable.flat.copy_(flat)
    trainer.trainable.close()
    mine = dict(ours.tensors())
    compared = 0
    for name, parameter in theirs.named_parameters():
        expected = parameter.grad
        assert torch.linalg.norm(mine[name] - expected) <= 1e-4 * torch.linalg.norm(expected) + 1e-8, name
        compared += 1
    assert compared >= len(mine) - 1  # a tied head goes by the embedding's name


@pytest.mark.parametrize("kind", ["Llama", "Mpt"])
def test_steps_equal_those_of_adamw_and_transformers_loads_the_result(kind, tmp_path):
    import transformers

    theirs, ours = tiny_pair(kind, tmp_path / "base")
    examples = rows(8)
    config = TrainConfig(
        **{**FULL, "epochs": 2, "schedule": "constant", "max_grad_norm": math.inf, "weight_decay": 0.1}
    )
    decayed = [p for p in theirs.parameters() if p.dim() > 1]
    others = [p for p in theirs.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    trainer = Trainer(ours, examples, config, tmp_path / "unused")
    theirs.train()
    for step in range(trainer.num_steps):
        optimizer.zero_grad()
        their_loss(theirs, trainer._rows(step)).backward()
        optimizer.step()
    result = trainer.run()
    ids = list(range(1, 30))
    theirs.eval()
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(logits(ours, ids), expected, atol=2e-3, rtol=2e-3)
    saved = getattr(transformers, kind + "ForCausalLM").from_pretrained(tmp_path / "unused", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(saved(torch.tensor([ids])).logits[0], logits(ours, ids), atol=1e-4, rtol=1e-4)
    assert result.losses[-1] < result.losses[0]
    assert not any(t.requires_grad for _, t in ours.tensors())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_full_run_equals_the_uninterrupted_one(dtype, tmp_path):
    tiny_pair("Llama", tmp_path / "base")
    config = TrainConfig(**{**FULL, "epochs": 2, "checkpoint_interval": 2, "val_fraction": 0.2, "keep_best": True})

    def run(out, stop_at=None):
        def stop(report):
            if report.step == stop_at:
                raise KeyboardInterrupt

        model = Model.from_pretrained(tmp_path / "base", dtype=dtype)
        return tune(model, rows(12), config, tmp_path / out, source=tmp_path / "base", on_step=stop)

    whole = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("cut", 3)
    resumed = run("cut")
    assert resumed.losses == whole.losses and resumed.val_losses == whole.val_losses
    first, second = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("whole", "cut"))
    assert first == second
    assert sorted(p.name for p in (tmp_path / "whole").iterdir()) == [
        "config.json", "generation_config.json", "metrics.jsonl", "model.safetensors", "train.json",
    ]  # fmt: skip


def test_quantised_weights_are_not_trained_whole(tmp_path):
    from specialize.engine.quantize import Quantization

    tiny_pair("Llama", tmp_path / "base")
    model = Model.from_pretrained(tmp_path / "base", quantize=Quantization.parse("int8"))
    with pytest.raises(InputError, match="method full: qkv of layer 0 is quantised"):
        Trainer(model, rows(4), TrainConfig(**FULL), tmp_path / "out")


def overfitting(tmp_path, **changes):
    """A run whose validation rows contradict its training rows, so that the loss there rises before long."""
    tiny_pair("Llama", tmp_path / "base")
    model = Model.from_pretrained(tmp_path / "base")
    train = [TrainExample(list(range(1, 8)), [20 + i % 3], name=f"r{i}") for i in range(8)]
    held_out = [TrainExample(list(range(1, 8)), [60], name="v")]
    config = TrainConfig(**{
        "rank": 4, "learning_rate": 3e-3, "batch_size": 4, "epochs": 20, "val_interval": 1, "schedule": "constant",
        "warmup_ratio": 0.0, **changes,
    })  # fmt: skip
    return model, train, held_out, config


def test_patience_ends_the_run_and_the_best_weights_are_kept(tmp_path):
    model, train, held_out, config = overfitting(tmp_path, patience=3, keep_best=True)
    result = tune(model, train, config, tmp_path / "out", val_examples=held_out)
    losses = [loss for _, loss in result.val_losses]
    best = losses.index(min(losses))
    assert result.stopped_early and result.best_step == best and result.steps == best + 3 < 40
    trainer = Trainer(model, train, config, tmp_path / "again", val_examples=held_out)
    trainer.trainable.load(tmp_path / "out")
    trainer.out.mkdir()
    assert trainer._validate() == pytest.approx(min(losses), rel=1e-6)
    assert not (tmp_path / "out" / "best.safetensors").exists()


@pytest.mark.parametrize("stop_at", [2, 4])
def test_a_run_that_stops_early_does_so_after_a_stop_too(stop_at, tmp_path):
    model, train, held_out, config = overfitting(tmp_path, patience=4, keep_best=True, checkpoint_interval=3)
    whole = tune(model, train, config, tmp_path / "whole", val_examples=held_out)

    def stop(report):
        if report.step == stop_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(model, train, config, tmp_path / "cut", val_examples=held_out, on_step=stop)
    resumed = tune(model, train, config, tmp_path / "cut", val_examples=held_out)
    assert (resumed.steps, resumed.best_step, resumed.val_losses) == (whole.steps, whole.best_step, whole.val_losses)
    first, second = ((tmp_path / n / "adapter_model.safetensors").read_bytes() for n in ("whole", "cut"))
    assert first == second


def test_patience_without_validation_rows_is_refused(tiny, tmp_path):
    _, model = tiny()
    for options in ({"patience": 2}, {"keep_best": True}):
        with pytest.raises(InputError, match="need validation rows"):
            tune(model, rows(4), TrainConfig(**options), tmp_path)


def test_events_are_what_the_metrics_say(tiny, tmp_path):
    pytest.importorskip("tensorboard")
    from specialize.train.events import EventLog
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, model = tiny()
    config = TrainConfig(rank=2, batch_size=4, epochs=2, val_fraction=0.2)
    events = EventLog(tmp_path / "events")
    tune(model, rows(10), config, tmp_path / "out", on_step=events)
    events.close()
    found = EventAccumulator(str(tmp_path / "events"))
    found.Reload()
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    for name in ("loss", "val_loss", "grad_norm", "learning_rate", "tokens_per_s", "mfu"):
        expected = [(line["step"], line[name]) for line in lines if name in line]
        shown = [(event.step, event.value) for event in found.Scalars(name)]
        assert [step for step, _ in shown] == [step for step, _ in expected]
        assert [v for _, v in shown] == pytest.approx([v for _, v in expected], rel=1e-6)


def test_budget_and_utilisation_are_reported(tiny, tmp_path):
    _, model = tiny()
    examples = [TrainExample([1] * 10, [2] * 6, name=f"r{i}") for i in range(8)]
    reports = []
    config = TrainConfig(rank=2, batch_size=4, epochs=1, max_batch_tokens=32)
    result = tune(model, examples, config, tmp_path, on_step=reports.append)
    assert (result.micro_batches, result.budget_filled) == (4, 1.0)
    assert all(report.mfu > 0 for report in reports)


def test_each_step_reports_its_own_seconds(tiny, tmp_path, monkeypatch):
    """Also the last one of an epoch, which is followed by a validation."""
    _, model = tiny()
    step = Trainer.train_step

    def slow(trainer):
        time.sleep(0.05)
        return step(trainer)

    monkeypatch.setattr(Trainer, "train_step", slow)
    reports = []
    tune(
        model, rows(10), TrainConfig(rank=2, batch_size=4, epochs=2, val_fraction=0.2), tmp_path, on_step=reports.append
    )
    assert all(report.seconds >= 0.05 for report in reports)
