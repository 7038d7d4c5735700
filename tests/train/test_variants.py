"""Variants of LoRA against PEFT: the same logits from the same files, the same gradients, the same optimizer steps."""

import copy
import math

import pytest
import torch
from models import rows
from specialize.engine.adapter import AdapterPool, load_adapter, merge_adapter
from specialize.engine.batch import Batch
from specialize.engine.model import Model
from specialize.kernels.cross_entropy import linear_cross_entropy
from specialize.train.config import TrainConfig
from specialize.train.data import build_micro_batches
from specialize.train.loop import Trainer, tune
from specialize.train.lora import TrainableLora, principal_factors

from specialize.errors import InputError

ALL = {
    "Llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "Mpt": ["Wqkv", "out_proj", "up_proj", "down_proj"],
}
SOME = {"Llama": ["q_proj", "v_proj", "down_proj"], "Mpt": ["Wqkv", "down_proj"]}
IDS = list(range(1, 30))


def peft_model(theirs, targets, **options):
    """A PEFT model over a copy of ``theirs``, B and A far from their start."""
    from peft import LoraConfig, get_peft_model

    settings = {"r": 4, "lora_alpha": 12, "target_modules": targets, "task_type": "CAUSAL_LM", **options}
    model = get_peft_model(copy.deepcopy(theirs), LoraConfig(**settings))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
            elif "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    return model


def their_logits(model, ids=IDS):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


def our_logits(model, adapters=None, ids=IDS, **batch):
    with torch.no_grad():
        return model.logits(model.forward(Batch.packed([ids], **batch), adapters=adapters))


def their_gradients(peft, examples):
    total = sum(len(e.response_ids) for e in examples)
    for e in examples:
        ids = torch.tensor([[*e.prompt_ids, *e.response_ids]])
        labels = ids.clone()
        labels[:, : len(e.prompt_ids)] = -100
        (peft(input_ids=ids, labels=labels).loss * (len(e.response_ids) / total)).backward()
    return {name: p.grad for name, p in peft.named_parameters() if p.grad is not None}


def our_gradient(model, lora, examples, budget=1000):
    for part in build_micro_batches(examples, max_batch_tokens=budget, device="cpu"):
        hidden = model.forward(part.batch, adapters=lora, rows=part.loss_rows)
        linear_cross_entropy(hidden, model.head_weight, part.targets, weights=part.weights).backward()
        lora.collect()
    return lora.gradient


def stirred(lora, seed=3):
    """The adapter with all its parameters moved."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for pair in lora.part_matrices().values():
            for matrix in pair:
                matrix += torch.randn(matrix.shape, generator=generator) * 0.1
        for magnitude in lora.part_magnitudes().values():
            magnitude.mul_(1 + 0.2 * torch.rand(magnitude.shape, generator=generator))
    lora.refresh()
    return lora


PATTERNS = {
    "Llama": {
        "rank_pattern": {"layers.1.self_attn.q_proj": 2, "v_proj": 3},
        "alpha_pattern": {r"layers\.0\..*v_proj": 5, "down_proj": 20},
    },
    "Mpt": {"rank_pattern": {"blocks.1.attn.Wqkv": 2}, "alpha_pattern": {r"blocks\.0\..*down_proj": 5, "Wqkv": 20}},
}
SAME_NAMES = {"use_dora": "dora", "use_rslora": "rank_stabilized", "layers_to_transform": "layers"}
VARIANTS = {
    "dora": {"use_dora": True},
    "dora rslora": {"use_dora": True, "use_rslora": True},
    "patterns": {},
    "patterns dora": {"use_dora": True},
    "layers": {"layers_to_transform": [1]},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["Llama", "Mpt"])
@pytest.mark.parametrize("names", [ALL, SOME], ids=["all", "some"])
def test_logits_and_gradients_equal_those_of_peft(variant, kind, names, tiny, tmp_path):
    theirs, ours = tiny(kind)
    patterns = PATTERNS[kind] if "patterns" in variant else {}
    their_options = {**VARIANTS[variant], **patterns}
    our_options = {SAME_NAMES.get(name, name): value for name, value in their_options.items()}
    peft = peft_model(theirs, names[kind], **their_options)
    peft.save_pretrained(tmp_path)
    lora = TrainableLora(ours, rank=4, alpha=12, targets=names[kind], **our_options)
    lora.load(tmp_path)
    expected = their_logits(peft)
    assert (expected - their_logits(theirs)).abs().max() > 0.05
    torch.testing.assert_close(our_logits(ours, lora), expected, atol=1e-4, rtol=1e-4)
    adapter = load_adapter(tmp_path, ours)
    pool = AdapterPool(ours)
    slot = pool.add(adapter)
    torch.testing.assert_close(our_logits(ours, pool.select([slot])), expected, atol=1e-4, rtol=1e-4)
    merged = Model(ours.config, dict(ours.tensors()))
    merge_adapter(merged, adapter)
    torch.testing.assert_close(our_logits(merged), expected, atol=1e-4, rtol=1e-4)

    gradient = our_gradient(ours, lora, rows(5))
    matrices, magnitudes = lora.part_matrices(gradient), lora.part_magnitudes(gradient)
    compared = 0
    for name, expected in their_gradients(peft, rows(5)).items():
        module = name.removeprefix("base_model.model.").split(".lora_")[0]
        if "magnitude" in name:
            mine = magnitudes[module]
        else:
            mine = matrices[module][0 if "lora_A" in name else 1]
        assert torch.linalg.norm(mine - expected) <= 1e-4 * torch.linalg.norm(expected), name
        compared += 1
    assert compared == 2 * len(matrices) + len(magnitudes)


@pytest.mark.parametrize(
    "options",
    [
        {"dora": True},
        {"init": "pissa"},
        {"init": "pissa", "rank_stabilized": True},
        {"init": "pissa", "dora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.down_proj": 3}},
        {"init": "pissa", "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
        {"layers": (1,)},
        {"targets": ["layers.0.self_attn.k_proj", r"layers\.1\..*_proj"]},
    ],
    ids=str,
)
def test_peft_gives_our_logits_from_our_files(options, tiny, tmp_path):
    from peft import PeftModel

    theirs, ours = tiny()
    settings = {"rank": 3, "alpha": 5, "targets": ["q_proj", "v_proj", "down_proj"], **options}
    lora = stirred(TrainableLora(ours, **settings))
    lora.save(tmp_path, base_model="tiny")
    mine = our_logits(ours, lora)
    assert (mine - our_logits(ours)).abs().max() > 0.01
    peft = PeftModel.from_pretrained(copy.deepcopy(theirs), str(tmp_path))
    torch.testing.assert_close(their_logits(peft), mine, atol=1e-4, rtol=1e-4)
    again = TrainableLora(ours, **settings, seed=9)
    again.load(tmp_path)
    torch.testing.assert_close(our_logits(ours, again), mine, atol=1e-5, rtol=1e-5)


def test_several_adapters_of_which_some_are_dora_share_a_batch(tiny, tmp_path):
    _, ours = tiny("Mpt")
    pool, alone = AdapterPool(ours), {-1: our_logits(ours)}
    for number, dora in enumerate((True, False, True)):
        lora = stirred(TrainableLora(ours, rank=2 + number, dora=dora), seed=number)
        lora.save(tmp_path / str(number))
        slot = pool.add(load_adapter(tmp_path / str(number), ours))
        alone[slot] = our_logits(ours, lora)
    order = [2, -1, 0, 1, 0]
    sequences = [IDS[: 5 + 3 * place] for place in range(len(order))]
    batch = Batch.packed(sequences, adapter_index=order)
    assert pool.select(order) is pool
    with torch.no_grad():
        found = ours.logits(ours.forward(batch, adapters=pool))
    for place, slot in enumerate(order):
        start, stop = batch.query_starts[place : place + 2].tolist()
        torch.testing.assert_close(found[start:stop], alone[slot][: stop - start], atol=1e-4, rtol=1e-4)


def test_principal_factors_are_the_leading_singular_vectors():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 24, generator=generator)
    _check_factors(weight)


def _check_factors(weight):
    a, b = principal_factors(weight, 5, scaling=2.0)
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close(2.0 * b @ a, (u[:, :5] * s[:5]) @ v[:5], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(b.t() @ b, torch.diag(s[:5] / 2.0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(a @ a.t(), torch.diag(s[:5] / 2.0), atol=1e-4, rtol=1e-4)


def test_randomised_factors_are_so_too_where_singular_values_fall():
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(300, 300, generator=generator))[0] for _ in range(2))
    _check_factors((u * torch.logspace(1, -6, 300)) @ v)


@pytest.mark.parametrize("kind", ["Llama", "Mpt"])
def test_pissa_starts_at_the_base_and_has_pefts_gradients(kind, tiny):
    """PEFT's factors may differ from ours in sign, so the gradients of its start are compared through B A."""
    theirs, ours = tiny(kind)
    lora = TrainableLora(ours, rank=4, alpha=4, init="pissa")
    torch.testing.assert_close(our_logits(ours, lora), our_logits(ours), atol=1e-5, rtol=1e-5)
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, lora_alpha=4, target_modules=ALL[kind], task_type="CAUSAL_LM", init_lora_weights="pissa")
    peft = get_peft_model(copy.deepcopy(theirs), config)
    gradients = their_gradients(peft, rows(5))
    parameters = dict(peft.named_parameters())
    mine, found = lora.part_matrices(), lora.part_matrices(our_gradient(ours, lora, rows(5)))
    for module, (da, db) in found.items():
        names = [f"base_model.model.{module}.lora_{half}.default.weight" for half in "AB"]
        expected_a, _expected_b = (parameters[name].detach() for name in names)
        sign = torch.sign((mine[module][0] * expected_a).sum(1))
        assert torch.allclose(mine[module][0] * sign[:, None], expected_a, atol=1e-3)
        assert torch.linalg.norm(da * sign[:, None] - gradients[names[0]]) <= 1e-3 * torch.linalg.norm(da)
        assert torch.linalg.norm(db * sign - gradients[names[1]]) <= 1e-3 * torch.linalg.norm(db)


def test_a_bf16_adapter_of_principal_vectors_starts_at_the_base(tmp_path, tiny):
    _, ours = tiny()
    model = Model(ours.config, dict(ours.tensors()), dtype=torch.bfloat16, inference=False)
    lora = TrainableLora(model, rank=8, init="pissa")
    assert torch.equal(our_logits(model, lora), our_logits(model))


@pytest.mark.parametrize("options", [{}, {"dora": True}])
def test_lora_plus_steps_as_pefts_optimizer_does(options, tiny, tmp_path):
    from peft.optimizers import create_loraplus_optimizer

    theirs, ours = tiny()
    peft = peft_model(theirs, ALL["Llama"], **({"use_dora": True} if options else {}))
    peft.save_pretrained(tmp_path / "start")
    optimizer = create_loraplus_optimizer(peft, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8.0)
    config = TrainConfig(
        rank=4, alpha=12, plus_ratio=8.0, learning_rate=1e-3, schedule="constant", warmup_ratio=0.0, epochs=3,
        batch_size=5, max_grad_norm=math.inf, weight_decay=0.0, **options,
    )  # fmt: skip
    trainer = Trainer(ours, rows(5), config, tmp_path / "out", shuffle=False)
    trainer.trainable.load(tmp_path / "start")
    for _ in range(3):
        trainer.train_step()
        peft.zero_grad()
        their_gradients(peft, rows(5))
        optimizer.step()
    torch.testing.assert_close(our_logits(ours, trainer.trainable), their_logits(peft), atol=2e-3, rtol=2e-3)
    for name, parameter in peft.named_parameters():
        module = name.removeprefix("base_model.model.").split(".lora_")[0]
        if "lora_A" in name or "lora_B" in name:
            mine = trainer.trainable.part_matrices()[module]["lora_B" in name]
            assert (mine - parameter).abs().max() <= 2e-3, name


@pytest.mark.parametrize(
    "options",
    [
        {"dora": True, "dropout": 0.2},
        {"init": "pissa"},
        {"plus_ratio": 4.0, "layers": (1,), "weight_decay": 0.1},
        {"dropout_pattern": {"q_proj": 0.5}, "rank_pattern": {"down_proj": 2}},
    ],
    ids=str,
)
def test_a_variant_learns_and_goes_on_after_a_stop_bit_for_bit(options, tiny, tmp_path):
    _, model = tiny()
    quick = {"rank": 4, "learning_rate": 1e-2, "batch_size": 4, "max_batch_tokens": 64, "checkpoint_interval": 2}
    config = TrainConfig(**quick, epochs=4, **options)
    whole = tune(model, rows(12), config, tmp_path / "whole")
    assert whole.losses[-1] < whole.losses[0]

    def stop(report):
        if report.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(model, rows(12), config, tmp_path / "cut", on_step=stop)
    torch.manual_seed(5)  # nothing may hang on the global generator
    tune(model, rows(12), config, tmp_path / "cut")
    first, second = ((tmp_path / n / "adapter_model.safetensors").read_bytes() for n in ("whole", "cut"))
    assert first == second


def test_dropout_falls_on_the_modules_that_the_pattern_names(tiny):
    _, model = tiny()
    lora = stirred(TrainableLora(model, rank=4, dropout_pattern={"down_proj": 0.5}, targets=["q_proj", "down_proj"]))
    part = build_micro_batches(rows(3), max_batch_tokens=1000, device="cpu")[0]
    seen = {}

    class Watched:
        def linear(self, x, linear, layer_id, name, batch=None):
            y, again = (self.once(seed, x, linear, layer_id, name) for seed in (1, 2))
            seen[name] = torch.equal(y, again)
            return y

        def once(self, seed, x, linear, layer_id, name):
            lora.set_dropout_seed(seed)
            return lora.linear(x, linear, layer_id, name)

    model.forward(part.batch, adapters=Watched())
    assert seen == {"qkv": True, "o": True, "gate_up": True, "down": False}


def test_dora_dropout_has_pefts_expectation_and_none_when_not_training(tiny):
    """Dropping nothing through the dropout path gives what the plain path gives."""
    _, model = tiny("Mpt")
    for options in ({"dora": True}, {"dora": True, "init": "pissa"}, {"alpha_pattern": {"up_proj": 3}}):
        lora = stirred(TrainableLora(model, rank=4, dropout=1e-12, **options))
        dropped = our_logits(model, lora)
        lora.training = False
        torch.testing.assert_close(dropped, our_logits(model, lora), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layers", [(1,), (0,)])
def test_what_lies_below_the_first_adapted_layer_keeps_nothing_for_a_backward_pass(layers, tiny):
    _, model = tiny()
    lora = TrainableLora(model, rank=2, layers=layers)
    part = build_micro_batches(rows(3), max_batch_tokens=1000, device="cpu")[0]
    saved_in, current = set(), []

    class Watched:
        def linear(self, x, linear, layer_id, name, batch=None):
            current[:] = [layer_id]
            return lora.linear(x, linear, layer_id, name)

    def pack(tensor):
        saved_in.update(current)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.forward(part.batch, adapters=Watched(), rows=part.loss_rows)
    assert min(saved_in) == layers[0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"rank": 100},
            r"rank: 100 for model.layers.0.self_attn.q_proj, which maps 48 to 48 features; allowed: 1 to 48",
        ),
        ({"rank": 17, "targets": ["k_proj"]}, "rank: 17 for .*k_proj, which maps 48 to 16 features; allowed: 1 to 16"),
        ({"rank_pattern": {"q_proj": 0}}, "rank: 0 for"),
        ({"rank_pattern": {"Wqkv": 2}}, "rank pattern 'Wqkv': matches no adapted layer"),
        ({"alpha_pattern": {"q_proj": -1}}, "alpha: -1 for"),
        ({"dropout_pattern": {"q_proj": 1}}, "dropout: 1 for .*allowed: from 0 to below 1"),
        ({"layers": (2,)}, "layers: 2; this model has 0 to 1"),
        ({"layers": ()}, "layers: none"),
        ({"targets": ["layers.0.mlp.up_proj"], "layers": (1,)}, "none of these lies in layers 1"),
        ({"targets": ["layers.7.mlp.up_proj"]}, "no such layer in this model"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_told(options, said, tiny):
    _, model = tiny()
    with pytest.raises(InputError, match=said):
        TrainableLora(model, **{"rank": 4, **options})
