"""Tuning over a quantised base equals tuning over the same values held dense."""

import pytest
import torch
from models import rows
from specialize.engine.config import ModelConfig
from specialize.engine.model import Model
from specialize.train.config import TrainConfig
from specialize.train.data import build_micro_batches
from specialize.train.loop import tune
from specialize.train.lora import TrainableLora

from specialize.errors import InputError

LLAMA = {
    "model_type": "llama", "vocab_size": 97, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
MPT = {"model_type": "mpt", "vocab_size": 97, "d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 128}


def bases(raw, form, dtype=torch.float32):
    """(quantised model, dense model of the same values)"""
    config = ModelConfig.from_dict(raw, source="test")
    quantized = Model.random(config, quantize=form, std=0.1, inference=False, dtype=dtype)
    return quantized, Model(config, dict(quantized.tensors()), inference=False, dtype=dtype)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("targets", ["all", "some"])
@pytest.mark.parametrize("form", ["nf4", "int8", "fp8"])
@pytest.mark.parametrize("raw", [LLAMA, MPT], ids=["llama", "mpt"])
def test_gradients_equal_those_over_the_dequantised_base(raw, form, targets, checkpointed):
    """With some layers adapted, gradients pass through quantised layers that have no adapter, too."""
    names = "all" if targets == "all" else {"llama": "k_proj", "mpt": "up_proj"}[raw["model_type"]]
    found = []
    for model in bases(raw, form):
        lora = TrainableLora(model, rank=4, targets=names, seed=1)
        lora.flat += torch.randn(lora.flat.shape, generator=torch.Generator().manual_seed(2)) * 0.05
        lora.refresh()
        for part in build_micro_batches(rows(6), max_batch_tokens=60, device="cpu"):
            hidden = model.forward(
                part.batch, adapters=lora, rows=part.loss_rows, recompute_layers=len(model.layers) * checkpointed
            )
            logp = torch.nn.functional.linear(hidden, model.head_weight).log_softmax(-1)
            (-(logp[torch.arange(len(part.targets)), part.targets] * part.weights).sum()).backward()
            lora.collect()
        found.append(lora.part_matrices(lora.gradient))
    quantized, dense = found
    for path, pair in dense.items():
        for mine, expected in zip(quantized[path], pair, strict=True):
            assert expected.norm() > 0
            assert (mine - expected).norm() <= 1e-3 * expected.norm(), path


def test_a_checkpoint_of_the_dense_base_is_refused(tmp_path):
    quantized, dense = bases(LLAMA, "int8")
    config = TrainConfig(rank=2, max_steps=5, batch_size=2, max_batch_tokens=60, checkpoint_interval=1)

    def stop(report):
        if report.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(dense, rows(6), config, tmp_path, on_step=stop)
    assert (tmp_path / "checkpoint.safetensors").exists()
    with pytest.raises(InputError, match="checkpoint"):
        tune(quantized, rows(6), config, tmp_path)


@pytest.mark.parametrize("options", [{"dora": True}, {"init": "pissa"}, {"dora": True, "dropout": 0.3}], ids=str)
@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_variants_know_the_quantised_values(form, options):
    """Row lengths and singular vectors are those of what the quantised base computes with."""
    found = []
    for model in bases(LLAMA, form):
        lora = TrainableLora(model, rank=4, seed=1, **options)
        lora.flat += torch.randn(lora.flat.shape, generator=torch.Generator().manual_seed(2)) * 0.05
        lora.refresh()
        part = build_micro_batches(rows(4), max_batch_tokens=1000, device="cpu")[0]
        logp = model.logits(model.forward(part.batch, adapters=lora, rows=part.loss_rows)).log_softmax(-1)
        (-(logp[torch.arange(len(part.targets)), part.targets] * part.weights).sum()).backward()
        lora.collect()
        found.append(lora.gradient)
    assert (found[0] - found[1]).norm() <= 1e-3 * found[1].norm()


def test_the_loop_runs_over_a_quantised_base_with_the_same_losses(tmp_path):
    config = TrainConfig(rank=4, epochs=2, batch_size=4, learning_rate=1e-2)
    results = [
        tune(model, rows(12), config, tmp_path / name)
        for model, name in zip(bases(LLAMA, "nf4"), ("quantized", "dense"), strict=True)
    ]
    assert results[0].losses == pytest.approx(results[1].losses, rel=1e-5)
    assert results[0].losses[-1] < results[0].losses[0]
