"""Quantised models: folders and loading, equality with the dequantised model, merging, and what is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from checkpoints import llama_dict, mpt_dict, save_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from specialize.engine.adapter import load_adapter, merge_adapter, save_part_matrices
from specialize.engine.batch import Batch
from specialize.engine.config import ModelConfig
from specialize.engine.convert import convert
from specialize.engine.generator import Generator
from specialize.engine.model import Model
from specialize.engine.naive import naive_generate
from specialize.engine.quantize import CHOICES, FORMATS, Quantization, quantized_bytes, weight_fields
from specialize.engine.sampler import SamplingParams
from specialize.engine.scheduler import EngineConfig
from specialize.engine.weights import open_checkpoint

from specialize.errors import InputError

WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
MODELS = {
    "llama": llama_dict(**WIDE),
    "tied": llama_dict(**WIDE, tie_word_embeddings=True),
    "biases": llama_dict(**WIDE, model_type="qwen2"),
    "mpt": mpt_dict(d_model=64, n_heads=4, attn={"clip_qkv": 2.0}),
}
IDS = [3, 5, 7, 9, 11, 2, 4]


def logits(model):
    with torch.no_grad():
        return model.logits(model.forward(Batch.packed([IDS])))


def dequantized(model):
    """The model with dense weights that has the same values: the slow truth of a quantised one."""
    tensors = {name: tensor.clone() for name, tensor in model.tensors()}
    return Model(model.config, tensors, dtype=model.dtype)


@pytest.mark.parametrize("form", CHOICES)
@pytest.mark.parametrize("kind", MODELS)
def test_a_folder_and_loading_give_the_same_weights(kind, form, tmp_path):
    source = save_folder(tmp_path / "src", MODELS[kind])
    loaded = Model.from_pretrained(source, quantize=form)
    folder = convert(source, tmp_path / "dst", quantize=form)
    stored = Model.from_pretrained(folder)
    assert stored.quantization == loaded.quantization == Quantization.parse(form)
    for a, b in zip((*loaded.adaptable,), (*stored.adaptable,), strict=True):
        ours, theirs = weight_fields(a.linear.weight), weight_fields(b.linear.weight)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.equal(logits(loaded), logits(stored))
    content = load_file(folder / "model.safetensors")
    assert sum(t.nbytes for t in content.values()) < 0.6 * sum(t.nbytes for t in open_checkpoint(source)[1].values())
    assert isinstance(loaded.head.weight, torch.Tensor) == (not form.endswith("+head"))
    assert quantized_bytes(loaded.config, loaded.quantization, torch.float32) == loaded.weight_bytes
    tied = loaded.config.tied_embeddings and form.endswith("+head")
    head = sum(t.nbytes for t in weight_fields(loaded.head.weight).values()) if tied else 0
    assert loaded.weight_bytes == sum(t.nbytes for t in content.values()) + head


@pytest.mark.parametrize("form", CHOICES)
@pytest.mark.parametrize("kind", MODELS)
def test_logits_are_those_of_the_dequantised_model(kind, form, tmp_path):
    model = Model.from_pretrained(save_folder(tmp_path / "src", MODELS[kind]), quantize=form)
    if model.quantization.head and model.config.tied_embeddings:
        hidden = torch.randn(3, model.config.hidden_size)
        assert torch.equal(model.logits(hidden), hidden @ model.head.dense(torch.float32).t())
        return
    torch.testing.assert_close(logits(model), logits(dequantized(model)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", MODELS)
def test_each_part_of_a_fused_matrix_is_near_its_original(kind, tmp_path):
    """Eight bits keep a value within half a step of its own row, whichever part of the fused matrix it is in."""
    source = save_folder(tmp_path / "src", MODELS[kind])
    original = open_checkpoint(source)[1]
    for name, tensor in Model.from_pretrained(source, quantize="int8").tensors():
        step = original[name].abs().amax(-1, keepdim=True) / 127
        assert ((tensor - original[name]).abs() <= 0.5001 * step).all(), name


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """format -> (quantised model, the dense one of the same values), fp32"""
    source = save_folder(tmp_path_factory.mktemp("pairs"), MODELS["llama"])
    models = {form: Model.from_pretrained(source, quantize=form) for form in FORMATS}
    return {form: (model, dequantized(model)) for form, model in models.items()}


@settings(max_examples=12, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(0, 96), min_size=1, max_size=30), min_size=1, max_size=6),
    form=st.sampled_from(FORMATS),
    budget=st.integers(4, 40),
)
def test_generator_and_naive_agree_over_the_dequantised_weights(pairs, prompts, form, budget):
    model, truth = pairs[form]
    params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    config = EngineConfig(max_batch_tokens=budget, max_sequences=4, num_pages=64)
    got = Generator(model, config=config).generate(prompts, params)
    assert [c.token_ids for c in got] == [naive_generate(truth, p, params).token_ids for p in prompts]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("kind", MODELS)
def test_bf16_logits_are_as_good_as_those_of_the_dense_bf16_model(kind, form, tmp_path):
    """Whatever arithmetic this machine has packed: a quantised model is as near to the truth as its dense twin."""
    quantized = Model.from_pretrained(save_folder(tmp_path / "src", MODELS[kind]), dtype=torch.bfloat16, quantize=form)
    exact = Model.from_pretrained(tmp_path / "src", quantize=form)
    truth, dense = logits(dequantized(exact)).double(), logits(dequantized(quantized)).double()

    def worst(value):
        return ((value - truth).norm(dim=1) / truth.norm(dim=1)).max()

    assert worst(logits(quantized).double()) <= 2 * worst(dense) + torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("form", FORMATS)
def test_gradients_of_inputs_are_those_of_the_dequantised_weight(form, tmp_path):
    model = Model.from_pretrained(save_folder(tmp_path / "src", MODELS["llama"]), quantize=form, inference=False)
    linear = model.layers[0].qkv
    x = torch.randn(5, 64, requires_grad=True)
    y = linear(x)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    torch.testing.assert_close(x.grad, upstream @ linear.dense(torch.float32))


def adapter_folder(path, model, scale):
    generator = torch.Generator().manual_seed(1)
    parts = {}
    for adapted in model.adaptable:
        for part in adapted.parts:
            a = torch.randn(4, adapted.linear.in_features, generator=generator) * scale
            parts[part.path] = (a, torch.randn(part.stop - part.start, 4, generator=generator) * scale)
    names = sorted({name.rsplit(".", 1)[-1] for name in parts})
    return save_part_matrices(path, parts, rank=4, alpha=4, targets=names)


@pytest.mark.parametrize("form", FORMATS)
def test_merging_requantises_the_sum(form, tmp_path):
    source = save_folder(tmp_path / "src", MODELS["llama"])
    model = Model.from_pretrained(source, quantize=form)
    before = dequantized(model)
    adapter = load_adapter(adapter_folder(tmp_path / "adapter", model, 0.3), model)
    merge_adapter(model, adapter)
    merge_adapter(before, adapter)
    for ours, dense in zip(model.adaptable, before.adaptable, strict=True):
        assert not isinstance(ours.linear.weight, torch.Tensor)
        error = (ours.linear.dense(torch.float32) - dense.linear.weight).norm() / dense.linear.weight.norm()
        assert error < {"nf4": 0.12, "int8": 0.01, "fp8": 0.04}[form]


def test_a_folder_keeps_its_other_tensors_and_files(tmp_path):
    source = save_folder(tmp_path / "src", MODELS["mpt"])
    (source / "tokenizer.json").write_text("{}")
    folder = convert(source, tmp_path / "dst", quantize="nf4", dtype=torch.bfloat16, max_shard_bytes=20_000)
    assert (folder / "tokenizer.json").exists() and (folder / "model.safetensors.index.json").exists()
    raw = json.loads((folder / "config.json").read_text())
    assert raw["quantization_config"] == {"quant_method": "specialize", "format": "nf4", "head": False}
    tensors = open_checkpoint(folder)[1]
    assert tensors["transformer.wte.weight"].dtype == torch.bfloat16
    assert tensors["quantized.layers.1.up.absmax_scale"].dtype == torch.float32
    assert torch.equal(logits(Model.from_pretrained(folder)), logits(Model.from_pretrained(folder, quantize="nf4")))


def test_what_cannot_be_quantised_is_named(tmp_path):
    source = save_folder(tmp_path / "src", MODELS["llama"])
    with pytest.raises(InputError, match="'int7' is no known format; allowed: none, nf4, int8"):
        Model.from_pretrained(source, quantize="int7")
    folder = convert(source, tmp_path / "dst", quantize="int8")
    with pytest.raises(InputError, match="its weights are int8 already"):
        convert(folder, tmp_path / "again", quantize="nf4")
    with pytest.raises(InputError, match="its weights are int8 already; leave --quantize out"):
        Model.from_pretrained(folder, quantize="nf4")
    odd = save_folder(tmp_path / "odd", llama_dict())
    with pytest.raises(InputError, match="nf4 takes inputs in blocks of 64, and qkv has 48"):
        Model.from_pretrained(odd, quantize="nf4")
    with pytest.raises(InputError, match="blocks of 64"):
        convert(odd, tmp_path / "not", quantize="nf4")
    assert not (tmp_path / "not").exists()
    Model.from_pretrained(odd, quantize="int8")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = float("inf")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"tensor model\.layers\.1\.mlp\.up_proj\.weight holds NaN or infinity"):
        convert(source, tmp_path / "not", quantize="fp8")
    with pytest.raises(InputError, match=r"tensor model\.layers\.1\.mlp\.up_proj\.weight holds NaN or infinity"):
        Model.from_pretrained(source, quantize="fp8")


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "compressed-tensors"])
def test_weights_quantised_elsewhere_are_refused(method, tmp_path):
    source = save_folder(tmp_path / "src", MODELS["llama"])
    raw = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**raw, "quantization_config": {"quant_method": method}}))
    for call in (Model.from_pretrained, lambda path: convert(path, tmp_path / "dst")):
        with pytest.raises(InputError, match=f"quantised by '{method}', which is not read; give the model before"):
            call(source)


def test_a_damaged_folder_is_named(tmp_path):
    folder = convert(save_folder(tmp_path / "src", MODELS["llama"]), tmp_path / "dst", quantize="int8")
    content = load_file(folder / "model.safetensors")
    name = "quantized.layers.0.down.scales"
    for change, message in (
        ({name: None}, f"missing: {name}"),
        ({name: torch.ones(3)}, rf"{name} has shape \(3,\)"),
        ({"quantized.layers.0.down.values": content["quantized.layers.0.down.values"].view(torch.uint8)}, "type"),
    ):
        kept = {n: t for n, t in {**content, **change}.items() if t is not None}
        shutil.copytree(folder, tmp_path / "bad", dirs_exist_ok=True)
        save_file(kept, tmp_path / "bad" / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(InputError, match=message):
            Model.from_pretrained(tmp_path / "bad")


def test_bytes_of_large_models_without_loading_them():
    config = ModelConfig.from_dict(
        mpt_dict(d_model=7168, n_heads=64, n_layers=48, vocab_size=50432), source="MPT-30B's shape"
    )
    dense, nf4 = (quantized_bytes(config, Quantization.parse(q), torch.bfloat16) for q in (None, "nf4"))
    linear = 48 * 12 * 7168**2
    assert dense - nf4 == pytest.approx(linear * (16 - 4.127) / 8, rel=1e-3)
