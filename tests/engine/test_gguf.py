"""GGUF files: the same model as the folder it was made of, every block format, and broken files."""

from __future__ import annotations

import struct

import gguf
import numpy as np
import pytest
import torch
from checkpoints import llama_dict, mpt_dict, save_folder
from gguf import GGMLQuantizationType as Type
from specialize.engine.batch import Batch
from specialize.engine.config import ModelConfig
from specialize.engine.gguf import GGUFFile
from specialize.engine.model import Model
from specialize.engine.weights import open_checkpoint

from specialize.errors import InputError

HF_TO_GGUF = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "transformer.wte": "token_embd", "transformer.wpe": "position_embd", "transformer.norm_f": "output_norm",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "norm_1": "attn_norm",
    "norm_2": "ffn_norm", "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
    "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down", "Wqkv": "attn_qkv",
    "out_proj": "attn_output", "q_norm": "attn_q_norm", "k_norm": "attn_k_norm", "q_ln": "attn_q_norm",
    "k_ln": "attn_k_norm",
}  # fmt: skip


def gguf_name(name: str) -> str:
    module, kind = name.rsplit(".", 1)
    if module in HF_TO_GGUF:
        return f"{HF_TO_GGUF[module]}.{kind}"
    pieces = module.split(".")
    layer = next(p for p in pieces if p.isdigit())
    return f"blk.{layer}.{HF_TO_GGUF[pieces[-1]]}.{kind}"


def interleave(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows (i, i + D/2) of each head become neighbours, as converters write llama's q and k."""
    rows = tensor.reshape(heads, 2, -1, *tensor.shape[1:])
    return rows.transpose(1, 2).reshape(tensor.shape)


def write_gguf(path, config: ModelConfig, tensors, quantise=None, extra=None):
    """A GGUF file of these tensors. ``quantise`` maps a tensor's name to a block type; the rest is F32."""
    writer = gguf.GGUFWriter(path, config.architecture)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    if config.architecture == "mpt":
        writer.add_layer_norm_eps(config.norm_eps)
        writer.add_max_alibi_bias(config.alibi_bias_max if config.position == "alibi" else 0.0)
        if config.clip_qkv:
            writer.add_clamp_kqv(config.clip_qkv)
    else:
        writer.add_layer_norm_rms_eps(config.norm_eps)
        writer.add_rope_freq_base(config.rope_theta)
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_key_length(config.head_dim)
    for key, value in (extra or {}).items():
        {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32, list: writer.add_array}[
            type(value)
        ](key, value)
    for name, tensor in tensors.items():
        if config.architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            tensor = interleave(tensor, config.num_heads if "q_proj" in name else config.num_kv_heads)
        kind = (quantise or {}).get(name)
        values = tensor.numpy()
        if kind is None:
            writer.add_tensor(gguf_name(name), values)
        else:
            writer.add_tensor(gguf_name(name), gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def logits(path):
    sequences = [[5, 6, 7, 96, 1, 2, 3], [9]]
    model = Model.from_pretrained(path)
    with torch.no_grad():
        return model.logits(model.forward(Batch.packed(sequences)))


MODELS = {
    "llama": llama_dict(),
    "llama tied, biases": llama_dict(tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "llama wide heads": llama_dict(head_dim=16),
    "qwen2": llama_dict(model_type="qwen2"),
    "qwen3": llama_dict(model_type="qwen3", head_dim=16),
    "mpt": mpt_dict(),
    "mpt clip, qk_ln, biases": mpt_dict(attn={"clip_qkv": 0.5, "qk_ln": True, "alibi_bias_max": 16}, no_bias=False),
    "mpt learned positions": mpt_dict(attn={"alibi": False}, tie_word_embeddings=False),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_file_is_the_same_model_as_the_folder(name, tmp_path):
    save_folder(tmp_path, MODELS[name])
    config, tensors = open_checkpoint(tmp_path)
    path = write_gguf(tmp_path / "model.gguf", config, dict(tensors))
    read = GGUFFile(path)
    assert set(read) == set(tensors)
    assert all(torch.equal(read[n], tensors[n]) for n in tensors)
    torch.testing.assert_close(logits(path), logits(tmp_path), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "kind", [Type.F32, Type.F16, Type.BF16, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0], ids=lambda t: t.name
)
def test_block_formats(kind, tmp_path):
    raw = llama_dict(hidden_size=64, num_attention_heads=4, intermediate_size=96)
    save_folder(tmp_path, raw)
    config, tensors = open_checkpoint(tmp_path)
    matrices = {n: kind for n, t in tensors.items() if t.dim() == 2}
    read = GGUFFile(write_gguf(tmp_path / "model.gguf", config, dict(tensors), matrices))
    bits = {"F32": 24, "F16": 11, "BF16": 8, "Q8": 7, "Q5": 4, "Q4": 3}[kind.name.split("_")[0]]
    for name in matrices:
        largest = tensors[name].abs().max()
        assert (read[name] - tensors[name]).abs().max() <= largest * 2.0**-bits


@pytest.mark.parametrize("kind", [Type.Q4_K, Type.Q5_K, Type.Q6_K], ids=lambda t: t.name)
def test_k_formats_are_read_block_by_block(kind, tmp_path):
    """Random blocks with a sane scale; the values are the gguf package's, in the right place and shape."""
    raw = llama_dict(hidden_size=256, num_attention_heads=4, intermediate_size=256, num_hidden_layers=1)
    save_folder(tmp_path, raw)
    config, tensors = open_checkpoint(tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"
    block_bytes = gguf.GGML_QUANT_SIZES[kind][1]
    blocks = np.random.default_rng(0).integers(0, 256, (256, block_bytes), dtype=np.uint8)
    scale_at = [block_bytes - 2] if kind == Type.Q6_K else [0, 2]
    for at in scale_at:
        blocks[:, at : at + 2] = np.array([0.01], np.float16).view(np.uint8)
    path = write_gguf(tmp_path / "zero.gguf", config, dict(tensors), {name: Type.Q8_0})
    info = GGUFFile(path)._infos["blk.0.ffn_up.weight"]
    data = bytearray(path.read_bytes())
    # Put the blocks at the file's end and point the tensor's entry there.
    data += bytes(-len(data) % 32)
    start = len(data)
    first = min(i.offset for i in GGUFFile(path)._infos.values())
    entry = data.index(b"blk.0.ffn_up.weight") + len("blk.0.ffn_up.weight") + 4 + 16
    assert struct.unpack_from("<IQ", data, entry) == (Type.Q8_0, info.offset - first)
    struct.pack_into("<IQ", data, entry, kind, start - first)
    (tmp_path / "k.gguf").write_bytes(bytes(data) + blocks.tobytes())
    read = GGUFFile(tmp_path / "k.gguf")[name]
    expected = gguf.quants.dequantize(blocks, kind)
    assert read.shape == (256, 256) and np.array_equal(read.numpy(), expected)
    assert read.isfinite().all() and read.abs().max() > 0


def test_rope_factors_and_scaling(tmp_path):
    save_folder(tmp_path, llama_dict())
    config, tensors = open_checkpoint(tmp_path)
    linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    read = GGUFFile(write_gguf(tmp_path / "a.gguf", config, dict(tensors), extra=linear)).config
    assert read.rope_scaling is not None and (read.rope_scaling.kind, read.rope_scaling.factor) == ("linear", 4.0)
    yarn = {
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 4.0,
        "llama.rope.scaling.original_context_length": 32,
    }
    assert GGUFFile(write_gguf(tmp_path / "b.gguf", config, dict(tensors), extra=yarn)).config.rope_scaling is not None
    with pytest.raises(InputError, match="longrope"):
        GGUFFile(
            write_gguf(
                tmp_path / "c.gguf", config, dict(tensors), extra={**linear, "llama.rope.scaling.type": "longrope"}
            )
        )


def test_truncated_files_are_refused_at_any_length(tmp_path):
    save_folder(tmp_path, llama_dict(num_hidden_layers=1))
    config, tensors = open_checkpoint(tmp_path)
    data = write_gguf(tmp_path / "whole.gguf", config, dict(tensors)).read_bytes()
    path = tmp_path / "cut.gguf"
    for size in [0, 3, 4, 20, 23, *range(24, len(data), len(data) // 40), len(data) - 33]:
        path.write_bytes(data[:size])
        with pytest.raises(InputError) as error:
            Model.from_pretrained(path)
        assert "\n" not in str(error.value) and "cut.gguf" in str(error.value)


def test_corrupted_headers_never_crash(tmp_path):
    save_folder(tmp_path, llama_dict(num_hidden_layers=1))
    config, tensors = open_checkpoint(tmp_path)
    data = write_gguf(tmp_path / "whole.gguf", config, dict(tensors)).read_bytes()
    header = min(i.offset for i in GGUFFile(tmp_path / "whole.gguf")._infos.values())
    rng = np.random.default_rng(0)
    path = tmp_path / "bad.gguf"
    refused = 0
    for _ in range(300):
        broken = bytearray(data)
        for at in rng.integers(0, header, 4):
            broken[at] = rng.integers(0, 256)
        path.write_bytes(bytes(broken))
        try:
            open_checkpoint(path)
        except InputError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 150


def test_other_architectures_and_types_are_named(tmp_path):
    save_folder(tmp_path, llama_dict(num_hidden_layers=1))
    config, tensors = open_checkpoint(tmp_path)
    data = write_gguf(tmp_path / "a.gguf", config, dict(tensors)).read_bytes()
    (tmp_path / "b.gguf").write_bytes(data.replace(b"llama", b"gemma"))
    with pytest.raises(InputError, match="'gemma' is not supported; allowed: llama, qwen2, qwen3, mpt"):
        GGUFFile(tmp_path / "b.gguf")
    entry = data.index(b"token_embd.weight") + len("token_embd.weight") + 4 + 16
    changed = bytearray(data)
    struct.pack_into("<I", changed, entry, Type.Q2_K)
    (tmp_path / "c.gguf").write_bytes(bytes(changed))
    with pytest.raises(InputError, match="Q2_K; allowed: F32, F16"):
        GGUFFile(tmp_path / "c.gguf")
    with pytest.raises(InputError, match="no such file"):
        GGUFFile(tmp_path / "d.gguf")
    (tmp_path / "e.gguf").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(InputError, match="does not start like a GGUF file"):
        GGUFFile(tmp_path / "e.gguf")
