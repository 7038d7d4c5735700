"""The anchor holds the tuned model near the base, and what it measures is the definition's KL."""

import json

import pytest
import torch
from models import rows
from specialize.train.anchor import Anchor, anchor_loss
from specialize.train.config import TrainConfig
from specialize.train.loop import Trainer, tune

from specialize.errors import InputError

TEXTS = [list(range(3 + i, 40 + 2 * i)) for i in range(4)]
SETTINGS = {
    "rank": 4,
    "learning_rate": 2e-2,
    "epochs": 12,
    "batch_size": 3,
    "warmup_ratio": 0.0,
    "schedule": "constant",
}


def test_the_loss_is_the_definition_s_divergence():
    generator = torch.Generator().manual_seed(0)
    tuned, base = (torch.randn(7, 16, generator=generator, dtype=torch.float64) for _ in range(2))
    head = torch.randn(50, 16, generator=generator, dtype=torch.float64)
    tuned.requires_grad_()
    found = anchor_loss(tuned, base, head, logit_scale=0.5)
    p, q = (torch.softmax(0.5 * h @ head.t(), -1) for h in (base, tuned))
    assert float(found.detach()) == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-12)
    assert torch.autograd.gradcheck(lambda h: anchor_loss(h, base, head, logit_scale=0.5), [tuned])
    assert anchor_loss(base, base, head).item() == pytest.approx(0.0, abs=1e-14)


def test_a_step_takes_its_number_of_tokens_whatever_came_before(tiny):
    _, model = tiny()
    anchor = Anchor(model, TEXTS, tokens=60, seed=1)
    assert all(sum(count for _, count in anchor.chosen(step)) == 60 for step in range(9))
    assert anchor.chosen(3) == Anchor(model, TEXTS, tokens=60, seed=1).chosen(3)
    assert len({tuple(anchor.chosen(step)) for step in range(9)}) > 3
    few = Anchor(model, TEXTS[:1], tokens=1000, seed=1)
    assert few.chosen(0) == [(0, len(TEXTS[0]))]
    assert float(anchor.loss(0, None)) == pytest.approx(0.0, abs=1e-6)


def drift(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return lines[-1]["anchor_loss"], lines[0]["anchor_loss"]


def test_an_anchored_model_moves_less_and_learns_still(tiny, tmp_path):
    _, model = tiny()
    losses = {}
    for name, weight in (("loose", 1e-6), ("held", 0.3)):
        config = TrainConfig(**SETTINGS, anchor=weight, anchor_tokens=64)
        losses[name] = tune(model, rows(9), config, tmp_path / name, anchors=TEXTS).losses
    (loose, first), (held, _) = drift(tmp_path / "loose"), drift(tmp_path / "held")
    assert first == pytest.approx(0.0, abs=1e-6)  # the adapter starts at nothing
    assert held < 0.6 * loose
    assert sum(losses["held"][-3:]) < 0.8 * sum(losses["held"][:3])


def test_a_stopped_run_goes_on_to_the_same_weights(tiny, tmp_path):
    _, model = tiny()
    config = TrainConfig(**SETTINGS, anchor=1.0, anchor_tokens=50, checkpoint_interval=1)
    whole = tune(model, rows(9), config, tmp_path / "whole", anchors=TEXTS)

    class Stop(Exception):
        pass

    def stop(report):
        if report.step == 5:
            raise Stop

    with pytest.raises(Stop):
        tune(model, rows(9), config, tmp_path / "parts", anchors=TEXTS, on_step=stop)
    again = tune(model, rows(9), config, tmp_path / "parts", anchors=TEXTS)
    assert again.losses == whole.losses
    file = "adapter_model.safetensors"
    assert (tmp_path / "parts" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_an_anchor_needs_texts(tiny, tmp_path):
    _, model = tiny()
    with pytest.raises(InputError, match="no anchor texts"):
        Trainer(model, rows(3), TrainConfig(**SETTINGS, anchor=1.0), tmp_path)
    with pytest.raises(InputError, match="anchor"):
        TrainConfig(anchor=-1.0)
