"""A mixture of experts: against a dense fp64 formula in another implementation, forward and router gradient; the router
is trained in the one loop; batches in which base, adapters and mixtures meet; folders and what is wrong with them."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from models import rows, tiny_pair
from specialize.engine.adapter import AdapterPool, load_adapter, merge_adapter, save_part_matrices
from specialize.engine.batch import Batch
from specialize.engine.generator import Generator
from specialize.engine.mixture import adapter_files, load_adapter_or_mixture, load_mixture, mix, save_mixture
from specialize.engine.model import Model
from specialize.engine.naive import naive_generate
from specialize.engine.routing import MixtureAdapters, routing_weights
from specialize.engine.sampler import SamplingParams
from specialize.engine.scheduler import EngineConfig
from specialize.train.config import TrainConfig
from specialize.train.data import build_micro_batches
from specialize.train.loop import tune
from specialize.train.router import TrainableRouter

from specialize.errors import InputError

NORMS = {"Llama": ("input_layernorm", "post_attention_layernorm"), "Mpt": ("norm_1", "norm_2")}
HALVES = {  # the modules of a block by the norm whose output chooses their experts
    "Llama": (("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")),
    "Mpt": (("Wqkv", "out_proj"), ("up_proj", "down_proj")),
}


def save_expert(folder, model: Model, seed: int, *, rank: int, targets: tuple[str, ...] = (), alpha: float = 3.0):
    """A random adapter on ``targets`` (all modules if none are named)."""
    generator = torch.Generator().manual_seed(seed)
    parts = {
        part.path: (
            torch.randn(rank, adapted.linear.in_features, generator=generator) * 0.3,
            torch.randn(part.stop - part.start, rank, generator=generator) * 0.3,
        )
        for adapted in model.adaptable
        for part in adapted.parts
        if not targets or part.name in targets
    }
    names = sorted({path.rsplit(".", 1)[-1] for path in parts})
    return save_part_matrices(folder, parts, rank=rank, alpha=alpha, targets=names)


@pytest.fixture(scope="module", params=["Llama", "Mpt"])
def made(request, tmp_path_factory):
    """(kind, transformers model, our model, folders of three experts of different rank and reach)."""
    kind = request.param
    folder = tmp_path_factory.mktemp(f"mixture-{kind}")
    theirs, ours = tiny_pair(kind, folder / "base")
    some = ("q_proj", "down_proj") if kind == "Llama" else ("Wqkv", "down_proj")
    folders = [
        save_expert(folder / "a", ours, 1, rank=4),
        save_expert(folder / "b", ours, 2, rank=2, targets=some),
        save_expert(folder / "c", ours, 3, rank=3, alpha=1.0),
    ]
    return kind, theirs, ours, folders


def mixture_of(model: Model, folders, top_k: int, seed: int = 0):
    experts = [load_adapter(folder, model) for folder in folders]
    router = torch.randn(len(experts), model.config.hidden_size, generator=torch.Generator().manual_seed(seed))
    return mix(experts, [folder.name for folder in folders], router, top_k)


def dense_logits(kind, theirs, mixture, router, ids):
    """fp64 [T, V] of one sequence: transformers' model, each adapted module of which adds its experts' dense updates,
    weighed by the softmax of what the half's norm gave."""
    model = copy.deepcopy(theirs).double()
    blocks = model.model.layers if kind == "Llama" else model.transformer.blocks
    paths = {module: path for path, module in model.named_modules()}
    for block in blocks:
        for norm, names in zip(NORMS[kind], HALVES[kind], strict=True):
            seen = {}

            def remember(_module, _inputs, output, seen=seen):
                weights = torch.softmax(output[0] @ router.T, dim=-1)
                order = weights.argsort(dim=-1, descending=True)
                kept = torch.zeros_like(weights)
                for t in range(len(weights)):
                    for i in order[t, : mixture.top_k].tolist():
                        kept[t, i] = 1.0
                seen["weights"] = weights * kept

            getattr(block, norm).register_forward_hook(remember)
            for name, module in block.named_modules():
                if name.rsplit(".", 1)[-1] not in names:
                    continue

                def add(module, inputs, output, seen=seen):
                    for i, expert in enumerate(mixture.experts):
                        if paths[module] in expert.parts:
                            a, b = (matrix.double() for matrix in expert.parts[paths[module]])
                            delta = expert.scaling * b @ a
                            output = output + seen["weights"][None, :, i, None] * (inputs[0] @ delta.T)
                    return output

                module.register_forward_hook(add)
    return model(torch.tensor([ids])).logits[0]


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_logits_and_router_gradient_are_those_of_the_dense_formula(made, top_k):
    kind, theirs, ours, folders = made
    mixture = mixture_of(ours, folders, top_k)
    examples = rows(4, seed=top_k)
    router = mixture.router.double().requires_grad_()
    losses, tokens = [], 0
    for example in examples:
        ids = [*example.prompt_ids, *example.response_ids]
        logits = dense_logits(kind, theirs, mixture, router, ids)
        first = len(example.prompt_ids) - 1
        targets = torch.tensor(list(example.response_ids))
        losses.append(F.cross_entropy(logits[first:-1], targets, reduction="sum"))
        tokens += len(targets)
        with torch.no_grad():
            mine = ours.logits(ours.forward(Batch.packed([ids]), adapters=MixtureAdapters(mixture, ours)))
        assert (mine - logits).abs().max() < 2e-4 * logits.abs().max()
    (sum(losses) / tokens).backward()

    trained = TrainableRouter(ours, mixture)
    with torch.no_grad():
        trained.flat[: mixture.router.numel()].copy_(mixture.router.flatten())
    for recompute in (0, 2):
        trained.gradient.zero_()
        for micro in build_micro_batches(examples, max_batch_tokens=40, device="cpu"):
            hidden = ours.forward(
                micro.batch, adapters=trained.adapters, rows=micro.loss_rows, recompute_layers=recompute
            )
            nll = F.cross_entropy(hidden @ ours.head_weight.T, micro.targets, reduction="none")
            (nll * micro.weights).sum().backward()
            trained.collect()
        found = trained.gradient[: router.numel()].view_as(router)
        assert (found - router.grad).abs().max() < 1e-4 * router.grad.abs().max()


def test_the_loop_trains_the_router_alone_and_resumes(made, tmp_path):
    _, _, ours, folders = made
    mixture = mixture_of(ours, folders, 1)
    before = [matrix.clone() for expert in mixture.experts for pair in expert.parts.values() for matrix in pair]
    config = TrainConfig(rank=4, learning_rate=3e-2, epochs=8, batch_size=4, max_batch_tokens=128, warmup_ratio=0.0)
    result = tune(ours, rows(8), config, tmp_path / "mix", trainable=TrainableRouter(ours, mixture))
    assert result.num_parameters == mixture.router.numel()
    assert sum(result.losses[-2:]) < sum(result.losses[:2])
    after = [matrix for expert in mixture.experts for pair in expert.parts.values() for matrix in pair]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
    again = tune(ours, rows(8), config, tmp_path / "mix", trainable=TrainableRouter(ours, mixture))
    assert again.losses == result.losses and again.seconds == result.seconds  # found finished
    other = TrainableRouter(ours, mixture_of(ours, folders, 2))
    assert tune(ours, rows(8), config, tmp_path / "mix", trainable=other).losses != result.losses


@pytest.mark.parametrize("top_k", [1, 2])
def test_base_adapters_and_mixtures_in_one_batch(made, tmp_path, top_k):
    """Each request gets what the naive generator gives it alone, whoever it is batched, chunked and preempted with."""
    _, _, ours, folders = made
    save_mixture(tmp_path / "m1", mixture_of(ours, folders, top_k, seed=1), ours)
    save_mixture(tmp_path / "m2", mixture_of(ours, folders[:2], top_k, seed=2), ours)
    paths = {"plain": folders[0], "m1": tmp_path / "m1", "m2": tmp_path / "m2"}
    config = EngineConfig(page_size=4, num_pages=24, max_batch_tokens=9, max_sequences=6)
    generator = Generator(ours, config=config, adapters=paths)
    names = [None, "m1", "plain", "m2", "m1", "m1", None, "m2", "plain"]
    prompts = [
        torch.randint(1, 97, (3 + 2 * i,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(9)
    ]
    params = SamplingParams(max_tokens=7, temperature=0.0, ignore_eos=True)
    got = generator.generate(prompts, params, adapter=names)
    for prompt, name, completion in zip(prompts, names, got, strict=True):
        adapters = None
        if name is not None:
            pool = AdapterPool(ours)
            adapters = pool.select([pool.add(load_adapter_or_mixture(paths[name], ours))])
        assert (
            completion.token_ids == naive_generate(ours, prompt, params, adapters=adapters, adapter_index=0).token_ids
        )
    alone = generator.generate(prompts, params, adapter="m1")
    assert [c.token_ids for n, c in zip(names, alone, strict=True) if n == "m1"] == [
        c.token_ids for n, c in zip(names, got, strict=True) if n == "m1"
    ]
    scores = generator.score([(prompts[1], alone[1].token_ids)], adapter="m1")[0]
    assert len(scores) == 7 and max(scores) <= 0
    generator.unload_adapter("m2")
    assert generator.generate(prompts[:3], params, adapter=names[:3])[1].token_ids == got[1].token_ids


def test_weights_are_the_largest_probabilities_as_they_are():
    hidden, router = torch.randn(5, 8), torch.randn(4, 8)
    everything = routing_weights(hidden, router, 4)
    torch.testing.assert_close(everything.sum(1), torch.ones(5))
    for k in (1, 2, 3):
        weights = routing_weights(hidden, router, k)
        assert (weights > 0).sum(1).tolist() == [k] * 5
        torch.testing.assert_close(weights.sum(1), everything.sort(1, descending=True).values[:, :k].sum(1))


def test_a_folder_gives_back_what_was_saved(made, tmp_path):
    _, _, ours, folders = made
    mixture = mixture_of(ours, folders, 2)
    folder = save_mixture(tmp_path / "mix", mixture, ours, base_model="tiny")
    assert not list(folder.glob("**/*.bin")) and sorted(adapter_files(folder)) == sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()
    )
    loaded = load_mixture(folder, ours)
    assert loaded.names == ("a", "b", "c") and loaded.base_model == "tiny" and loaded.top_k == 2
    batch = Batch.packed([[5, 17, 3, 88, 41, 2, 60]])
    with torch.no_grad():
        one, two = (ours.forward(batch, adapters=MixtureAdapters(m, ours)) for m in (mixture, loaded))
    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
    for dtype in (torch.bfloat16, torch.float16):  # the same base in another number format
        other = Model.from_pretrained(folders[0].parent / "base", dtype=dtype)
        assert load_mixture(folder, other).top_k == 2
    quantized = Model.from_pretrained(folders[0].parent / "base", quantize="int8")
    assert load_mixture(folder, quantized).top_k == 2


def test_what_does_not_belong_is_refused(made, tmp_path):
    _, _, ours, folders = made
    mixture = mixture_of(ours, folders, 2)

    def saved(name):
        return save_mixture(tmp_path / name, mixture, ours, base_model="tiny")

    changed = saved("changed")
    save_expert(changed / "experts" / "1", ours, 9, rank=2)
    with pytest.raises(InputError, match=r"experts/1/adapter.*sha256"):
        load_mixture(changed, ours)
    (saved("missing") / "router.safetensors").unlink()
    with pytest.raises(InputError, match=r"no router\.safetensors"):
        load_mixture(tmp_path / "missing", ours)
    other = Model.random(ours.config, 7)
    with pytest.raises(InputError, match=r"another base \(tiny\)"):
        load_mixture(saved("base"), other)
    for change, said in (
        ({"version": 2}, "version 2"),
        ({"top_k": 4}, "top_k is 4, allowed: 1 to 3"),
        ({"experts": ["a"]}, "2 to 64 names"),
        ({"sha256": {"../../etc/passwd": "0"}}, "does not name the files"),
        ({"base": None}, "must map names to hashes"),
    ):
        manifest = saved("manifest") / "mixture.json"
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | change))
        with pytest.raises(InputError, match=said):
            load_mixture(manifest.parent, ours)
    with pytest.raises(InputError, match="cannot be merged"):
        merge_adapter(ours, load_adapter(saved("merge"), ours))
    with pytest.raises(InputError, match="2 to 64 experts; 1 given"):
        mix(mixture.experts[:1], ["a"], mixture.router[:1], 1)
