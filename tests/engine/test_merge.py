"""A base and an adapter written as one checkpoint, against transformers with PEFT."""

import copy
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from specialize.engine.adapter import load_adapter, merge_adapter
from specialize.engine.merge import merge_checkpoint
from specialize.engine.model import Model
from specialize.engine.quantize import Quantization

from specialize.errors import InputError

OPTIONS = {
    "Llama": {
        "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 6,
        "num_key_value_heads": 2, "max_position_embeddings": 128,
    },
    "Mpt": {"vocab_size": 97, "d_model": 48, "n_heads": 6, "n_layers": 2, "max_seq_len": 128},
}  # fmt: skip
TARGETS = {"Llama": ["q_proj", "v_proj", "down_proj"], "Mpt": ["Wqkv", "down_proj"]}


def with_adapter(kind: str, folder: Path, **options):
    """(transformers model, PEFT model over a copy); both are saved below ``folder``."""
    import transformers
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    theirs = getattr(transformers, kind + "ForCausalLM")(getattr(transformers, kind + "Config")(**OPTIONS[kind])).eval()
    theirs.save_pretrained(folder / "base")
    config = LoraConfig(r=4, lora_alpha=12, target_modules=TARGETS[kind], task_type="CAUSAL_LM", **options)
    peft = get_peft_model(copy.deepcopy(theirs), config)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1.3)
            elif "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    peft.save_pretrained(folder / "adapter")
    return theirs, peft


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"alpha_pattern": {"down_proj": 3}, "use_rslora": True}])
@pytest.mark.parametrize("kind", ["Llama", "Mpt"])
def test_transformers_loads_the_merged_folder_and_gives_pefts_logits(kind, options, tmp_path):
    import transformers

    theirs, peft = with_adapter(kind, tmp_path, **options)
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged = getattr(transformers, kind + "ForCausalLM").from_pretrained(tmp_path / "merged", dtype=torch.float32)
    ids = torch.tensor([list(range(1, 30))])
    with torch.no_grad():
        expected = peft(ids).logits
        assert (expected - theirs(ids).logits).abs().max() > 0.01
        torch.testing.assert_close(merged(ids).logits, expected, atol=1e-4, rtol=1e-4)


def test_a_number_format_rounds_once(tmp_path):
    with_adapter("Llama", tmp_path)
    whole = merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "whole")
    half = merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "half", dtype=torch.bfloat16)
    halves = dict(Model.from_pretrained(half, dtype=torch.bfloat16).tensors())
    for name, tensor in Model.from_pretrained(whole).tensors():
        assert torch.equal(tensor.to(torch.bfloat16), halves[name])


def test_what_does_not_belong_together_is_told(tmp_path):
    with_adapter("Llama", tmp_path / "a")
    with_adapter("Mpt", tmp_path / "b")
    with pytest.raises(InputError, match=r"adapts transformer\.blocks.*belongs to another base"):
        merge_checkpoint(tmp_path / "a" / "base", tmp_path / "b" / "adapter", tmp_path / "out")
    with pytest.raises(InputError, match="exists already; give a new folder"):
        merge_checkpoint(tmp_path / "a" / "base", tmp_path / "a" / "adapter", tmp_path / "a" / "base")
    config = tmp_path / "a" / "base" / "config.json"
    quantised = {**json.loads(config.read_text()), "quantization_config": Quantization.parse("nf4").to_dict()}
    config.write_text(json.dumps(quantised))
    with pytest.raises(InputError, match="its weights are nf4"):
        merge_checkpoint(tmp_path / "a" / "base", tmp_path / "a" / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["base", "adapter"])
def test_numbers_that_are_none_are_named(name, tmp_path):
    with_adapter("Llama", tmp_path)
    file = tmp_path / ("base/model.safetensors" if name == "base" else "adapter/adapter_model.safetensors")
    tensors = load_file(file)
    bad = next(key for key in tensors if key.endswith(("layers.1.mlp.down_proj.weight", "down_proj.lora_A.weight")))
    tensors[bad][1, 2] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=re.escape(f"tensor {bad} holds NaN or infinity")):
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_the_number_format_cannot_hold_is_told(tmp_path):
    with_adapter("Llama", tmp_path)
    file = tmp_path / "adapter/adapter_model.safetensors"
    tensors = load_file(file)
    tensors[next(key for key in tensors if key.endswith("layers.0.self_attn.v_proj.lora_B.weight"))][0] = 1e6
    save_file(tensors, file, metadata={"format": "pt"})
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "whole")
    with pytest.raises(InputError, match=r"makes model\.layers\.0\.self_attn\.v_proj\.weight .*infinite in float16"):
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "half", dtype=torch.float16)
    model = Model.from_pretrained(tmp_path / "base", dtype=torch.float16)
    with pytest.raises(InputError, match=r"B of model\.layers\.0\.self_attn\.v_proj holds numbers beyond .*float16"):
        load_adapter(tmp_path / "adapter", model)
    tensors = {key: value.clamp(max=3e4) for key, value in tensors.items()}  # times alpha / rank: fp16 holds neither
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match="beyond what float16"):
        load_adapter(tmp_path / "adapter", model)
    load_adapter(tmp_path / "adapter", Model.from_pretrained(tmp_path / "base", dtype=torch.bfloat16))


def test_merging_into_a_model_looks_at_what_comes_out(tmp_path):
    with_adapter("Llama", tmp_path)
    model = Model.from_pretrained(tmp_path / "base", dtype=torch.float16)
    adapter = load_adapter(tmp_path / "adapter", model)
    large = {key: (a * 1e3, b * 1e3) for key, (a, b) in adapter.matrices.items()}
    with pytest.raises(InputError, match="the adapter makes the qkv weights of layer 0 infinite in float16"):
        merge_adapter(model, replace(adapter, matrices=large))
