"""Our adapters against transformers + PEFT: the same gradients, the same files, the same logits."""

import pytest
import torch
from models import rows
from specialize.engine.adapter import load_adapter, merge_adapter
from specialize.engine.batch import Batch
from specialize.engine.model import Model
from specialize.kernels.cross_entropy import linear_cross_entropy
from specialize.train.data import build_micro_batches
from specialize.train.lora import TrainableLora
from specialize.train.lora_layout import adaptable_names

from specialize.errors import InputError

TARGETS = {
    "Llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "Mpt": ["Wqkv", "out_proj", "up_proj", "down_proj"],
}


def with_peft(theirs, targets, *, rank=4, alpha=12, rslora=False):
    """A PEFT model over a copy of ``theirs``, its B matrices far from zero."""
    import copy

    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM", use_rslora=rslora)
    model = get_peft_model(copy.deepcopy(theirs), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    return model


def logits_of_theirs(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


def logits_of_ours(model, ids, adapters=None):
    with torch.no_grad():
        return model.logits(model.forward(Batch.packed([ids]), adapters=adapters))


@pytest.mark.parametrize(("kind", "count"), [("Llama", 7), ("Llama", 2), ("Mpt", 4)])
@pytest.mark.parametrize("packed", [True, False])
def test_gradients_equal_those_of_peft(kind, count, packed, tiny, tmp_path):
    theirs, ours = tiny(kind)
    targets = TARGETS[kind][:count]
    peft = with_peft(theirs, targets)
    peft.save_pretrained(tmp_path)
    examples = rows(5)
    total = sum(len(e.response_ids) for e in examples)
    expected_loss = 0.0
    for example in examples:
        ids = torch.tensor([[*example.prompt_ids, *example.response_ids]])
        labels = ids.clone()
        labels[:, : len(example.prompt_ids)] = -100
        loss = peft(input_ids=ids, labels=labels).loss * (len(example.response_ids) / total)
        loss.backward()
        expected_loss += float(loss.detach())

    lora = TrainableLora(ours, rank=4, alpha=12, targets=targets)
    lora.load(tmp_path)
    loss = 0.0
    for part in build_micro_batches(examples, max_batch_tokens=1000 if packed else 1, device="cpu"):
        hidden = ours.forward(part.batch, adapters=lora, rows=part.loss_rows)
        logp = ours.logits(hidden).log_softmax(-1)
        share = -(logp[torch.arange(len(part.targets)), part.targets] * part.weights).sum()
        share.backward()
        lora.collect()
        loss += float(share.detach())
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    gradients = lora.part_matrices(lora.gradient)
    compared = 0
    for name, parameter in peft.named_parameters():
        if "lora_" not in name:
            continue
        module = name.removeprefix("base_model.model.").split(".lora_")[0]
        mine = gradients[module][0 if "lora_A" in name else 1]
        assert torch.linalg.norm(mine - parameter.grad) <= 1e-4 * torch.linalg.norm(parameter.grad), name
        compared += 1
    assert compared == 2 * len(gradients) == 2 * count * len(ours.layers)


def test_below_the_first_adapted_layer_there_is_no_gradient(tiny):
    _, ours = tiny()
    needed = {}

    class Watched(TrainableLora):
        def linear(self, x, linear, layer_id, name, batch=None):
            needed[layer_id, name] = x.requires_grad
            return super().linear(x, linear, layer_id, name, batch)

    ours.forward(Batch.packed([[1, 2, 3]]), adapters=Watched(ours, rank=2, targets=["down_proj"]))
    assert {key for key, needs in needed.items() if not needs} == {(0, "qkv"), (0, "o"), (0, "gate_up"), (0, "down")}


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_gives_our_logits_from_our_files(rslora, tiny, tmp_path):
    from peft import PeftModel

    theirs, ours = tiny()
    lora = TrainableLora(ours, rank=3, alpha=5, targets=["q_proj", "v_proj", "down_proj"], rank_stabilized=rslora)
    with torch.no_grad():
        for _, b in lora.part_matrices().values():
            b.normal_(std=0.1)
    lora.refresh()
    lora.save(tmp_path, base_model="tiny")
    ids = list(range(1, 30))
    mine = logits_of_ours(ours, ids, lora)
    assert (mine - logits_of_ours(ours, ids)).abs().max() > 0.01
    import copy

    peft = PeftModel.from_pretrained(copy.deepcopy(theirs), str(tmp_path))
    torch.testing.assert_close(logits_of_theirs(peft, ids), mine, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["Llama", "Mpt"])
def test_we_give_pefts_logits_from_its_files_merged_and_unmerged(kind, tiny, tmp_path):
    theirs, ours = tiny(kind)
    peft = with_peft(theirs, TARGETS[kind])
    peft.save_pretrained(tmp_path / "adapter")
    theirs.save_pretrained(tmp_path / "base")
    ids = list(range(1, 30))
    expected = logits_of_theirs(peft, ids)
    lora = TrainableLora(ours, rank=4, alpha=12, targets="all")
    lora.load(tmp_path / "adapter")
    torch.testing.assert_close(logits_of_ours(ours, ids, lora), expected, atol=1e-4, rtol=1e-4)
    merged = Model.from_pretrained(tmp_path / "base")
    merge_adapter(merged, load_adapter(tmp_path / "adapter", merged))
    torch.testing.assert_close(logits_of_ours(merged, ids), expected, atol=1e-4, rtol=1e-4)


def test_a_fresh_adapter_changes_nothing_and_follows_its_seed(tiny):
    _, ours = tiny()
    ids = [1, 2, 3, 4]
    one, two, three = (TrainableLora(ours, rank=4, seed=s) for s in (0, 0, 1))
    assert torch.equal(logits_of_ours(ours, ids, one), logits_of_ours(ours, ids))
    assert torch.equal(one.flat, two.flat) and not torch.equal(one.flat, three.flat)
    assert one.num_parameters == sum(a.numel() + b.numel() for a, b in one.part_matrices().values())


def test_unknown_targets_are_told_what_exists(tiny):
    _, ours = tiny()
    with pytest.raises(InputError, match="targets: Wqkv: no such layer in this model; allowed: all, q_proj, k_proj"):
        TrainableLora(ours, rank=4, targets=["q_proj", "Wqkv"])
    with pytest.raises(InputError, match="targets: none"):
        TrainableLora(ours, rank=4, targets=[])
    with pytest.raises(InputError, match="rank: 0"):
        TrainableLora(ours, rank=0)
    assert adaptable_names(tiny("Mpt")[1]) == ("Wqkv", "out_proj", "up_proj", "down_proj")


def test_another_rank_or_other_targets_do_not_load(tiny, tmp_path):
    _, ours = tiny()
    TrainableLora(ours, rank=4, targets=["q_proj"]).save(tmp_path)
    with pytest.raises(InputError, match="rank differs from 2"):
        TrainableLora(ours, rank=2, targets=["q_proj"]).load(tmp_path)
    with pytest.raises(InputError, match="adapts other layers"):
        TrainableLora(ours, rank=4, targets=["o_proj"]).load(tmp_path)


def test_dropout_repeats_for_a_seed_and_is_off_outside_training(tiny):
    _, ours = tiny()
    lora = TrainableLora(ours, rank=4, dropout=0.5)
    with torch.no_grad():
        for _, b in lora.part_matrices().values():
            b.normal_(std=0.3)
    lora.refresh()
    ids = [1, 2, 3, 4, 5]
    lora.set_dropout_seed(1)
    first = logits_of_ours(ours, ids, lora)
    assert torch.equal(first, logits_of_ours(ours, ids, lora))
    lora.set_dropout_seed(2)
    assert not torch.equal(first, logits_of_ours(ours, ids, lora))
    lora.training = False
    plain = logits_of_ours(ours, ids, lora)
    lora.dropout = 0.0
    assert torch.equal(plain, logits_of_ours(ours, ids, lora))


@pytest.mark.parametrize("kind", ["Llama", "Mpt"])
def test_the_path_of_a_gpu_gives_the_same_gradients(kind, tiny):
    """All kernels of the training path under Triton's interpreter (or on the GPU) against torch."""
    _, reference = tiny(kind)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kernels = Model(reference.config, dict(reference.tensors()), device=device, inference=False, backend="triton")
    gradients = []
    for model in (reference, kernels):
        lora = TrainableLora(model, rank=4, alpha=8)
        generator = torch.Generator().manual_seed(1)
        for _, b in lora.part_matrices().values():
            b.copy_(torch.randn(b.shape, generator=generator) * 0.1)
        lora.refresh()
        (part,) = build_micro_batches(rows(3), max_batch_tokens=1000, device=model.device)
        hidden = model.forward(part.batch, adapters=lora, rows=part.loss_rows)
        linear_cross_entropy(
            hidden, model.head_weight, part.targets, weights=part.weights, backend=model.backend
        ).backward()
        lora.collect()
        gradients.append(lora.gradient.cpu())
    assert torch.linalg.norm(gradients[0] - gradients[1]) <= 1e-4 * torch.linalg.norm(gradients[0])
