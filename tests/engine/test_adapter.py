"""Adapters against PEFT, both ways; merged against applied; and what adapters of another base get."""

from __future__ import annotations

import json
import re
import shutil

import peft
import pytest
import torch
from checkpoints import LLAMA, save_transformers
from safetensors.torch import load_file, save_file
from specialize.engine.adapter import AdapterPool, load_adapter, merge_adapter, save_adapter, save_part_matrices
from specialize.engine.batch import Batch
from specialize.engine.config import ModelConfig
from specialize.engine.model import Model

from specialize.errors import InputError

IDS = [5, 17, 3, 88, 41, 2, 60]
MPT = {"d_model": 48, "n_layers": 2, "max_seq_len": 64, "vocab_size": 97, "n_heads": 4}
CASES = [
    ("Llama", LLAMA, {"target_modules": ["q_proj", "v_proj", "down_proj"]}),
    ("Llama", LLAMA, {"target_modules": "all-linear", "use_rslora": True}),
    ("Llama", LLAMA, {"target_modules": ["k_proj", "gate_proj", "up_proj"], "rank_pattern": {"gate_proj": 2},
                      "alpha_pattern": {"layers.1.mlp.up_proj": 3}}),
    ("Mpt", MPT, {"target_modules": ["Wqkv", "out_proj", "up_proj", "down_proj"]}),
]  # fmt: skip


@torch.no_grad()
def logits(model: Model, pool=None, slots=(-1,)) -> torch.Tensor:
    batch = Batch.packed([IDS] * len(slots), adapter_index=slots)
    return model.logits(model.forward(batch, adapters=pool)).view(len(slots), len(IDS), -1)


@torch.no_grad()
def their_logits(model) -> torch.Tensor:
    return model(torch.tensor([IDS])).logits


@pytest.fixture(params=CASES, ids=lambda c: f"{c[0]}-{c[2]['target_modules']}")
def trained(request, tmp_path):
    """A PEFT model with weights in B, its base folder and its adapter folder."""
    kind, options, lora = request.param
    base = save_transformers(kind, tmp_path / "base", **options)
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=12, task_type="CAUSAL_LM", **lora))
    torch.manual_seed(1)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    theirs.eval()
    theirs.save_pretrained(tmp_path / "adapter")
    return theirs, tmp_path / "base", tmp_path / "adapter", kind, options


def test_we_load_pefts_adapters(trained):
    theirs, base, folder, *_ = trained
    model = Model.from_pretrained(base)
    adapter = load_adapter(folder, model)
    pool = AdapterPool(model)
    slot = pool.add(adapter)
    truth = their_logits(theirs)
    plain = logits(model)
    assert (truth - plain).abs().max() > 0.01
    assert (logits(model, pool, [slot]) - truth).abs().max() < 1e-4
    assert (logits(model, pool.select([slot]), [slot]) - truth).abs().max() < 1e-4
    merge_adapter(model, adapter)
    assert (logits(model) - truth).abs().max() < 1e-4


def test_peft_loads_ours(trained, tmp_path):
    theirs, base, folder, kind, options = trained
    ours = load_adapter(folder, Model.from_pretrained(base))
    save_adapter(tmp_path / "ours", ours, base_model=str(base))
    fresh = save_transformers(kind, tmp_path / "again", **options)
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "ours").eval()
    assert (their_logits(loaded) - their_logits(theirs)).abs().max() < 1e-5
    back = load_adapter(tmp_path / "ours", Model.from_pretrained(base))
    assert back.matrices.keys() == ours.matrices.keys()
    for key, pair in ours.matrices.items():
        scale = ours.scaling / back.scaling
        assert torch.allclose(back.matrices[key][1] @ back.matrices[key][0], scale * pair[1] @ pair[0], atol=1e-6)


def test_several_adapters_in_one_batch(tmp_path):
    model = Model.random(ModelConfig("llama", 97, 32, 48, 2, 4, num_kv_heads=2, max_context=64), 0, std=0.2)
    pool, alone = AdapterPool(model), {}
    for number, (rank, targets) in enumerate([(2, ["q_proj"]), (5, ["o_proj", "up_proj"]), (1, ["v_proj", "q_proj"])]):
        torch.manual_seed(number)
        parts = {
            part.path: (torch.randn(rank, a.linear.in_features), torch.randn(part.stop - part.start, rank))
            for a in model.adaptable
            for part in a.parts
            if part.name in targets
        }
        folder = save_part_matrices(tmp_path / str(number), parts, rank=rank, alpha=3, targets=targets)
        slot = pool.add(load_adapter(folder, model))
        alone[slot] = logits(model, pool.select([slot]), [slot])[0]
    alone[-1] = logits(model)[0]
    slots = [1, -1, 0, 2, 2, -1, 1]
    assert pool.select(slots) is pool
    together = logits(model, pool, slots)
    for place, slot in enumerate(slots):
        assert torch.allclose(together[place], alone[slot], atol=1e-4)
    assert pool.select([-1, -1]) is None
    pool.remove(1)
    assert torch.allclose(logits(model, pool, [2, 0])[0], alone[2], atol=1e-4)
    assert pool.add(load_adapter(tmp_path / "1", model)) == 1
    assert torch.allclose(logits(model, pool, [1, 0])[0], alone[1], atol=1e-4)


@pytest.fixture
def saved(tmp_path):
    model = Model.random(ModelConfig("llama", 97, 32, 48, 2, 4, num_kv_heads=2, max_context=64), 0)
    parts = {
        part.path: (torch.randn(2, a.linear.in_features), torch.randn(part.stop - part.start, 2))
        for a in model.adaptable
        for part in a.parts
        if part.name == "q_proj"
    }
    return model, save_part_matrices(tmp_path / "adapter", parts, rank=2, alpha=4, targets=["q_proj"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 1}, r"adapts model.layers.1.self_attn.q_proj, which this llama model of 1 layers lacks"),
        ({"hidden_size": 64}, r"q_proj has A \(2, 32\) and B \(32, 2\); this model's module maps 64 to 64 features"),
        ({"architecture": "mpt", "norm": "layernorm"}, r"and 1 more, which this mpt model"),
    ],
)
def test_an_adapter_of_another_base_names_what_differs(saved, changes, message):
    _, folder = saved
    shape = {
        "architecture": "llama", "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_layers": 2,
        "num_heads": 4, "num_kv_heads": 2, "max_context": 64,
    }  # fmt: skip
    with pytest.raises(InputError, match=message):
        load_adapter(folder, Model.random(ModelConfig(**{**shape, **changes}), 0))


def test_broken_adapter_folders(saved, tmp_path):
    model, folder = saved
    with pytest.raises(InputError, match="no such adapter folder"):
        load_adapter(tmp_path / "nothing", model)

    def broken(name):
        shutil.rmtree(tmp_path / name, ignore_errors=True)
        return shutil.copytree(folder, tmp_path / name)

    copy = broken("a")
    (copy / "adapter_config.json").unlink()
    with pytest.raises(InputError, match="no such file"):
        load_adapter(copy, model)
    for change, message in (
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not supported"),
        ({"use_dora": True}, "use_dora is True in adapter_config.json, but adapter_model.safetensors lacks magnitude"),
        ({"r": 0}, "r is 0; it must be a positive number"),
    ):
        copy = broken("b")
        config = json.loads((copy / "adapter_config.json").read_text()) | change
        (copy / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(InputError, match=message):
            load_adapter(copy, model)
    copy = broken("c")
    weights = copy / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(InputError, match="not a whole safetensors file"):
        load_adapter(copy, model)
    copy = broken("d")
    tensors = load_file(copy / "adapter_model.safetensors")
    tensors.pop(next(name for name in tensors if "lora_B" in name))
    save_file(tensors, copy / "adapter_model.safetensors")
    with pytest.raises(InputError, match="without its other half"):
        load_adapter(copy, model)
    for kind in ("lora_A", "lora_B"):
        copy = broken("e")
        tensors = load_file(copy / "adapter_model.safetensors")
        name = next(name for name in tensors if kind in name)
        tensors[name][1, 1] = float("nan")
        save_file(tensors, copy / "adapter_model.safetensors")
        with pytest.raises(InputError, match=re.escape(f"tensor {name} holds NaN or infinity")):
            load_adapter(copy, model)
    (copy / "adapter_model.safetensors").rename(copy / "adapter_model.bin")
    with pytest.raises(InputError, match=r"pickled adapters \(\.bin\) are not read"):
        load_adapter(copy, model)


def test_equal_contents_have_equal_fingerprints(saved, tmp_path):
    model, folder = saved
    adapter = load_adapter(folder, model)
    save_adapter(tmp_path / "copy", adapter)
    assert load_adapter(tmp_path / "copy", model).fingerprint == adapter.fingerprint
    adapter.parts[next(iter(adapter.parts))][1][0, 0] += 1
    save_adapter(tmp_path / "other", adapter)
    assert load_adapter(tmp_path / "other", model).fingerprint != adapter.fingerprint
