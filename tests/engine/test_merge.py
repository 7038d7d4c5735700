"""A base and an adapter written as one checkpoint, against transformers with PEFT."""

import copy
import json
from pathlib import Path

import pytest
import torch
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
