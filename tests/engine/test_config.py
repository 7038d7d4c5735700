"""Configs are read in full or refused by name."""

from __future__ import annotations

import json
import math

import pytest
import torch
from checkpoints import llama_dict, mpt_dict
from specialize.engine.config import ModelConfig, RopeScaling
from specialize.engine.layout import expected_tensors, num_parameters
from specialize.engine.rope_tables import inverse_frequencies

from specialize.errors import InputError


def read(raw):
    return ModelConfig.from_dict(raw, source="config.json")


def test_defaults_are_filled_in_and_the_object_is_frozen():
    config = ModelConfig("llama", 10, 32, 64, 2, 4)
    assert (config.num_kv_heads, config.head_dim, config.softmax_scale) == (4, 8, 1 / math.sqrt(8))
    with pytest.raises(AttributeError):
        config.vocab_size = 3  # type: ignore[misc]


def test_qwen_windows_start_at_max_window_layers():
    raw = llama_dict(model_type="qwen2", use_sliding_window=True, sliding_window=7, max_window_layers=1)
    config = read(raw)
    assert [config.window(i) for i in range(3)] == [None, 7, 7]
    assert read({**raw, "use_sliding_window": False}).sliding_window is None
    assert read(llama_dict(model_type="mistral", sliding_window=7)).window(0) == 7
    types = ["sliding_attention", "full_attention", "full_attention"]
    assert [read({**raw, "layer_types": types}).window(i) for i in range(3)] == [7, None, None]


def test_mpt_positions():
    assert read(mpt_dict()).position == "alibi"
    assert read(mpt_dict(attn={"alibi": False})).position == "learned"
    assert read(mpt_dict(attn={"alibi": False}, learned_pos_emb=False)).position == "none"
    assert read(mpt_dict(attn={"alibi": False, "rope": True})).position == "rope"
    assert read(mpt_dict(learned_pos_emb=True)).position == "alibi"


def test_mpt_scales():
    assert read(mpt_dict(logit_scale="inv_sqrt_d_model")).logit_scale == 1 / math.sqrt(48)
    assert read(mpt_dict(logit_scale=0.5)).logit_scale == 0.5
    assert read(mpt_dict(attn={"softmax_scale": 0.3})).softmax_scale == 0.3
    assert read(mpt_dict(attn={"alibi_bias_max": 16})).alibi_bias_max == 16


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        ({"model_type": "gpt2"}, "gpt2"),
        ({}, "None"),
        (llama_dict(hidden_act="relu"), "relu"),
        (llama_dict(rope_scaling={"rope_type": "longrope", "factor": 2.0}), "longrope"),
        (llama_dict(rope_scaling={"rope_type": "dynamic", "factor": 2.0}), "dynamic"),
        (llama_dict(rope_scaling={"rope_type": "linear"}), "factor"),
        (llama_dict(rope_scaling={"rope_type": "linear", "factor": 2.0, "wobble": 1}), "wobble"),
        (llama_dict(partial_rotary_factor=0.5), "partial_rotary_factor"),
        (llama_dict(num_key_value_heads=4), "6 query heads"),
        (llama_dict(vocab_size=None), "vocab_size"),
        (llama_dict(vocab_size="many"), "vocab_size"),
        (llama_dict(num_hidden_layers=0), "num_layers"),
        (mpt_dict(attn={"attn_type": "linear_attention"}), "linear_attention"),
        (mpt_dict(attn={"attn_type": "grouped_query_attention"}), "kv_n_heads"),
        (mpt_dict(attn={"prefix_lm": True}), "prefix_lm"),
        (mpt_dict(attn={"rope": True}), "alibi"),
        (mpt_dict(attn={"new_switch": 1}), "new_switch"),
        (mpt_dict(attn={"alibi": False, "rope": True, "rope_impl": "own"}), "own"),
        (mpt_dict(norm_type="triton_rmsnorm"), "triton_rmsnorm"),
        (mpt_dict(logit_scale="sqrt"), "sqrt"),
        (mpt_dict(ffn_config={"ffn_type": "te_ln_mlp"}), "te_ln_mlp"),
        (mpt_dict(ffn_config={"ffn_act_fn": {"name": "relu"}}), "relu"),
        (mpt_dict(block_overrides={"order": []} | {"x": 1}), "block_overrides"),
    ],
)
def test_unknown_values_are_named(raw, named):
    with pytest.raises(InputError, match=named) as error:
        read(raw)
    assert "\n" not in str(error.value)


def test_folder_errors(tmp_path):
    with pytest.raises(InputError, match="no such model folder"):
        ModelConfig.from_folder(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"config\.json: no such file"):
        ModelConfig.from_folder(tmp_path)
    (tmp_path / "config.json").write_text("{ not json")
    with pytest.raises(InputError, match="not readable as JSON"):
        ModelConfig.from_folder(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(InputError, match="list"):
        ModelConfig.from_folder(tmp_path)


def test_end_of_text_ids_come_from_both_files(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(llama_dict(eos_token_id=[2, 3])))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 5}))
    assert ModelConfig.from_folder(tmp_path).eos_token_ids == (2, 3, 5)


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 64},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 16.0,
         "mscale": 0.7, "mscale_all_dim": 1.3, "truncate": False},
    ],
)  # fmt: skip
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_rope_scaling_equals_transformers(parameters, theta):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    raw = llama_dict(head_dim=32, rope_parameters={**parameters, "rope_theta": theta})
    options = {k: v for k, v in raw.items() if k != "model_type"}
    theirs, their_factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](LlamaConfig(**options), "cpu")
    ours, our_factor = inverse_frequencies(read(raw))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    assert our_factor == pytest.approx(their_factor)


def test_gguf_frequency_factors_divide():
    scaling = RopeScaling("factors", frequency_factors=(1.0, 2.0, 4.0, 8.0))
    plain = ModelConfig("llama", 10, 32, 64, 2, 4)
    stretched = ModelConfig("llama", 10, 32, 64, 2, 4, rope_scaling=scaling)
    ratio = inverse_frequencies(plain)[0] / inverse_frequencies(stretched)[0]
    torch.testing.assert_close(ratio, torch.tensor([1.0, 2.0, 4.0, 8.0]))


def test_parameters_are_counted():
    config = read(llama_dict())
    assert num_parameters(config) == sum(math.prod(shape) for shape in expected_tensors(config).values())


@pytest.mark.parametrize(
    "raw",
    [
        llama_dict(),
        llama_dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True, eos_token_id=[2, 3]),
        llama_dict(model_type="mistral", sliding_window=7, head_dim=16),
        llama_dict(model_type="qwen2", use_sliding_window=True, sliding_window=7, max_window_layers=1),
        llama_dict(model_type="qwen3", head_dim=16),
        llama_dict(rope_scaling={"rope_type": "linear", "factor": 2.0}),
        llama_dict(rope_scaling={"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 2.0}),
        llama_dict(rope_scaling={"rope_type": "yarn", "factor": 2.0, "beta_fast": 20, "truncate": False}),
        mpt_dict(),
        mpt_dict(no_bias=False, logit_scale=0.5, tie_word_embeddings=False, attn={"alibi_bias_max": 16, "clip_qkv": 6}),
        mpt_dict(attn={"attn_type": "grouped_query_attention", "kv_n_heads": 2, "qk_ln": True}),
        mpt_dict(attn={"alibi": False, "rope": True, "rope_theta": 500, "fused_qkv": False, "qk_gn": True}),
        mpt_dict(attn={"alibi": False}, norm_type="rmsnorm", ffn_config={"ffn_type": "mptglu", "ffn_hidden_size": 40}),
        mpt_dict(attn={"alibi": False, "sliding_window_size": 9}, learned_pos_emb=False, expansion_ratio=2),
    ],
)
def test_a_written_config_reads_back_the_same(raw):
    config = read(raw)
    assert read(json.loads(json.dumps(config.to_dict()))) == config


def released_mpt(**changes):
    """The config.json that the released MPT models carry, with what differs between them."""
    attn = {
        "alibi": True, "alibi_bias_max": 8, "attn_impl": "torch", "attn_pdrop": 0, "attn_type": "multihead_attention",
        "attn_uses_sequence_id": False, "clip_qkv": None, "prefix_lm": False, "qk_ln": False, "softmax_scale": None,
    }  # fmt: skip
    raw = {
        "architectures": ["MPTForCausalLM"], "auto_map": {"AutoConfig": "configuration_mpt.MPTConfig"}, "d_model": 4096,
        "emb_pdrop": 0, "embedding_fraction": 1.0, "expansion_ratio": 4, "init_config": {"name": "kaiming_normal_"},
        "init_device": "cpu", "learned_pos_emb": True, "logit_scale": None, "max_seq_len": 2048, "model_type": "mpt",
        "n_heads": 32, "n_layers": 32, "no_bias": True, "norm_type": "low_precision_layernorm", "resid_pdrop": 0,
        "tokenizer_name": "EleutherAI/gpt-neox-20b", "torch_dtype": "bfloat16", "transformers_version": "4.28.1",
        "use_cache": False, "verbose": 0, "vocab_size": 50432,
    }  # fmt: skip
    return {**raw, "attn_config": {**attn, **changes.pop("attn", {})}, **changes}


def test_released_mpt_models():
    small = read(released_mpt())
    assert (small.position, small.norm, small.norm_bias, small.tied_embeddings) == ("alibi", "layernorm", False, True)
    assert num_parameters(small) == 6_649_286_656
    large = read(released_mpt(d_model=7168, n_heads=64, n_layers=48, max_seq_len=8192))
    assert (num_parameters(large), large.head_dim) == (29_957_200_896, 112)
    story = read(released_mpt(max_seq_len=65536, attn={"alibi_bias_max": 16, "clip_qkv": 6}))
    assert (story.clip_qkv, story.alibi_bias_max, story.max_context) == (6.0, 16.0, 65536)
