"""Planned activations against what autograd saves, and plans of models that are not here."""

from __future__ import annotations

import dataclasses
import json
import weakref
from pathlib import Path

import pytest
import torch
from models import rows, tiny_pair
from specialize.engine.config import ModelConfig
from specialize.engine.memory import CUDA_CONTEXT_BYTES, capacity_bytes
from specialize.engine.model import Model
from specialize.engine.quantize import Quantization
from specialize.engine.shapes import SHAPES
from specialize.kernels import cpu
from specialize.kernels.cross_entropy import linear_cross_entropy
from specialize.train import plan as planning
from specialize.train.anchor import Anchor
from specialize.train.config import TrainConfig
from specialize.train.data import TrainExample, build_micro_batches
from specialize.train.loop import Trainer, make_trainable
from specialize.train.plan import BatchShape, kept_bytes, largest_micro_batch, plan_tuning
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from specialize.errors import InputError

LLAMA = ModelConfig("llama", 97, 64, 96, 3, 4, 2, max_context=512)
MPT = ModelConfig(
    "mpt", 97, 64, 256, 3, 4, norm="layernorm", position="alibi", mlp="gelu", fused_qkv_checkpoint=True,
    tied_embeddings=True,
)  # fmt: skip
H100 = Path(__file__).parents[2] / "bench/results/NVIDIA_H100_80GB_HBM3/train.json"
fused = pytest.mark.skipif(
    cpu.default_backend("rows") != "cpp" or cpu.default_backend("attention_prefill") != "cpp",
    reason="eager torch keeps more than the fused ops that are planned for",
)


def kept_by_autograd(config: ModelConfig, train: TrainConfig, lengths: list[int], recompute_layers: int):
    """(bytes of all storages that a forward pass keeps, shape of the batch); what outlives the step does not count."""
    model = Model.random(config, dtype=torch.bfloat16, inference=False)
    examples = [TrainExample(range(1, n - n // 4 + 1), range(1, n // 4 + 1)) for n in lengths]
    trainable = make_trainable(model, train)
    [micro] = build_micro_batches(examples, max_batch_tokens=sum(lengths), device="cpu")
    owned = [t for _, t in model.tensors()] + [model.cos, model.sin, model.slopes]
    owned += [*vars(trainable).values(), *vars(micro.batch).values()]
    lasting = {t.untyped_storage().data_ptr() for t in owned if isinstance(t, torch.Tensor)}
    storages = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in lasting:
            storages[storage.data_ptr()] = storage  # kept alive, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model.forward(
            micro.batch, adapters=trainable.adapters, rows=micro.loss_rows, recompute_layers=recompute_layers
        )
        linear_cross_entropy(hidden, model.head_weight, micro.targets, weights=micro.weights)
    shape = BatchShape(micro.batch.num_tokens, len(micro.loss_rows))
    return sum(storage.nbytes() for storage in storages.values()), shape


@fused
@pytest.mark.parametrize(
    ("config", "settings", "recompute_layers"),
    [
        (LLAMA, {}, 0),
        (LLAMA, {}, 1),
        (LLAMA, {}, 3),
        (MPT, {}, 0),
        (MPT, {}, 2),
        (dataclasses.replace(LLAMA, architecture="qwen3", qk_norm="head"), {}, 0),
        (dataclasses.replace(MPT, clip_qkv=6.0), {}, 0),
        (dataclasses.replace(MPT, qk_norm="full"), {}, 0),
        (LLAMA, {"targets": ("q_proj", "v_proj")}, 0),
        (LLAMA, {"targets": ("o_proj",)}, 0),
        (LLAMA, {"targets": ("down_proj",)}, 0),
        (LLAMA, {"layers": (1,)}, 0),
        (LLAMA, {"dropout": 0.1}, 0),
        (LLAMA, {"dora": True}, 0),
        (LLAMA, {"init": "pissa"}, 0),
        (dataclasses.replace(SHAPES["smollm2-135m"], num_layers=3), {"rank": 16}, 0),
    ],
)
def test_saved_activations_are_those_planned(config, settings, recompute_layers):
    train = TrainConfig(**{"rank": 8, **settings})
    kept, shape = kept_by_autograd(config, train, [64, 100, 37], recompute_layers)
    assert kept_bytes(config, train, shape, torch.bfloat16, recompute_layers) == pytest.approx(kept, rel=0.02)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that ops make, for as long as these live, autograd's hold on them included."""

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        made = op(*args, **(kwargs or {}))
        for storage in [t.untyped_storage() for t in tree_leaves(made) if isinstance(t, torch.Tensor)]:
            key = storage._cdata
            if key not in given and key not in self.sizes:
                self.sizes[key] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, key)
        self.peak = max(self.peak, self.now)
        return made

    def _freed(self, key):
        self.now -= self.sizes.pop(key)


@fused
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("recompute", ["none", "layers"])
def test_the_anchor_s_peak_is_that_planned(dtype, recompute):
    config = dataclasses.replace(LLAMA, vocab_size=4_000)
    train = TrainConfig(rank=8, anchor=0.5, anchor_tokens=120, recompute=recompute)
    model = Model.random(config, dtype=dtype, inference=False)
    trainable = make_trainable(model, train)
    anchor = Anchor(model, [range(i, 100 + i) for i in range(3)], tokens=train.anchor_tokens, seed=0)
    for i in range(3):  # what stays from one step to the next is counted apart
        anchor._of_base(i)
    hidden = sum(base.nbytes for base in anchor._base.values())
    layers = config.num_layers if recompute == "layers" else 0
    trainable.training = True
    with LiveBytes() as found:
        loss = anchor.loss(0, trainable.adapters, layers)
        kept = found.now
        loss.backward()

    def plan(batch, **settings):
        return plan_tuning(
            config, dataclasses.replace(train, **settings), batch, dtype=dtype, memory_bytes=1 << 40, process_bytes=0,
            device="cpu", anchor_text_tokens=300,
        )  # fmt: skip

    shape = BatchShape(120, 120)
    assert kept_bytes(config, train, shape, dtype, layers) + 2 * 4 * 120 * 4_000 == pytest.approx(kept, rel=0.02)
    few = plan(BatchShape(4, 1))
    widest = max(few.loss_bytes, few.workspace_bytes)
    assert few.anchor_bytes - hidden + few.saved_bytes + widest == pytest.approx(found.peak, rel=0.02)
    assert few.total_bytes - plan(BatchShape(4, 1), anchor=0.0).total_bytes == few.anchor_bytes
    assert ("anchor", few.anchor_bytes) in [row[:2] for row in few.rows()]
    assert plan(BatchShape(60_000, 500)).anchor_bytes == hidden  # the rows' pass takes more, and they take turns
    assert plan(BatchShape(4, 1), anchor=0.0).anchor_bytes == 0


@pytest.mark.parametrize("row", json.loads(H100.read_text()), ids=lambda row: row["name"])
def test_peaks_measured_on_a_gpu_are_those_planned(row):
    from specialize.bench.train import SHAPES as RAW

    config = ModelConfig.from_dict(RAW[row["shape"]], source=row["shape"])
    shape = BatchShape(
        sum(n - 1 for n in row["lengths"]), sum(round(n * row["response_share"]) for n in row["lengths"])
    )
    train = TrainConfig(rank=row["rank"], recompute="layers" if row["checkpoint_layers"] else "none")
    plan = plan_tuning(config, train, shape, dtype=torch.bfloat16, memory_bytes=80 << 30, process_bytes=0)
    assert (plan.total_bytes - plan.reserve_bytes) / 2**30 == pytest.approx(row["peak_gib"], rel=0.03)


def qlora(shape: str, card: str, **settings):
    return plan_tuning(
        SHAPES[shape], TrainConfig(**settings), BatchShape(4096, 1024), dtype=torch.bfloat16, model=shape,
        memory_bytes=capacity_bytes(card), process_bytes=CUDA_CONTEXT_BYTES, quantization=Quantization("nf4"),
        matrix_rate=755e12,
    )  # fmt: skip


def test_qlora_of_mpt_fits_one_card():
    plan = qlora("mpt-30b", "80GB").require()
    assert plan.recompute_layers == 0 and 3_000 < plan.tokens_per_s < 5_800
    assert qlora("mpt-7b", "24GB").require().recompute_layers == 0
    assert qlora("mpt-7b", "rtx-4090").require().fits


def test_less_memory_recomputes_more_blocks_and_is_slower():
    plans = [qlora("mpt-30b", f"{size}GB") for size in (80, 60, 50, 40, 30)]
    counts = [plan.recompute_layers for plan in plans]
    assert counts == sorted(counts) and counts[0] == 0 < counts[2] < 48
    assert all(plan.fits for plan in plans)
    assert sorted((plan.tokens_per_s for plan in plans), reverse=True) == [plan.tokens_per_s for plan in plans]
    fewer = dataclasses.replace(plans[2], saved_bytes=plans[2].saved_bytes + sum(plans[2].saved.values()) // 48)
    assert not fewer.fits  # no more than needed
    assert qlora("mpt-30b", "80GB", recompute="layers").recompute_layers == 48


def test_what_cannot_fit_is_one_line_with_the_plan():
    with pytest.raises(InputError) as caught:
        qlora("mpt-30b", "16GB").require()
    line = str(caught.value)
    assert line.startswith("tuning mpt-30b takes ") and "has 16.00 GB on cuda: process 0.84 GB, weights 15.99" in line
    assert "\n" not in line
    with pytest.raises(InputError, match="recompute: sometimes; allowed: auto, none, layers"):
        TrainConfig(recompute="sometimes")


def test_a_trainer_recomputes_what_its_cap_calls_for(tmp_path, monkeypatch):
    _, model = tiny_pair("Llama", tmp_path / "model")
    examples = rows(12)
    monkeypatch.setattr(planning, "process_bytes", lambda device: 0)
    shape = largest_micro_batch(examples, TrainConfig(batch_size=4))
    free = plan_tuning(
        model.config, TrainConfig(), shape, dtype=torch.float32, memory_bytes=1 << 40, process_bytes=0, device="cpu",
        loaded=True,
    )  # fmt: skip
    tight = round((free.total_bytes - free.reserve_bytes - free.saved_bytes // 4) / (1 - planning.RESERVE["cpu"]))
    weights = []
    for cap in (None, tight):
        config = TrainConfig(batch_size=4, max_steps=3, memory_bytes=cap)
        trainer = Trainer(model, examples, config, tmp_path / str(cap))
        assert (trainer.plan.recompute_layers > 0) == (cap is not None)
        trainer.run()
        weights.append(trainer.trainable.flat.clone())
    assert torch.equal(*weights)
    with pytest.raises(InputError, match="tuning the model takes"):
        Trainer(model, examples, TrainConfig(memory_bytes=1 << 20), tmp_path / "none")
