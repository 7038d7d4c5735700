"""Safetensors folders: whole ones are read, broken ones are refused in one line that names the file or tensor."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from checkpoints import llama_dict, mpt_dict, save_folder
from safetensors.torch import load_file, save_file
from specialize.engine.config import ModelConfig
from specialize.engine.model import Model
from specialize.engine.weights import RandomTensors, SafetensorsFolder, open_checkpoint

from specialize.errors import InputError


@pytest.fixture
def folder(tmp_path):
    return save_folder(tmp_path / "model", llama_dict())


def refused(path, match):
    with pytest.raises(InputError, match=match) as error:
        Model.from_pretrained(path)
    assert "\n" not in str(error.value)


def shard(folder, num_shards=3):
    """Cuts model.safetensors into shards with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for i in range(num_shards):
        name = f"model-{i + 1:05d}-of-{num_shards:05d}.safetensors"
        part = dict(list(tensors.items())[i::num_shards])
        save_file(part, folder / name)
        weight_map.update(dict.fromkeys(part, name))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


def test_shards_give_the_same_tensors(folder):
    whole = dict(SafetensorsFolder(folder))
    shard(folder)
    parts = SafetensorsFolder(folder)
    assert set(parts) == set(whole) and len(parts) == len(whole)
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


def test_random_tensors_are_the_same_on_every_reading():
    config = ModelConfig.from_dict(llama_dict(), source="test")
    first, second, other = RandomTensors(config, 1), RandomTensors(config, 1), RandomTensors(config, 2)
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(first[name], second[name]) and not torch.equal(first[name], other[name])


def test_missing_and_surplus_tensors_are_named(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.extra.weight"] = tensors.pop("model.layers.2.mlp.up_proj.weight")
    save_file(tensors, folder / "model.safetensors")
    refused(folder, r"missing: model\.layers\.2\.mlp\.up_proj\.weight; surplus: model\.layers\.0\.extra\.weight")


def test_wrong_shapes_are_named(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(79, 48)
    save_file(tensors, folder / "model.safetensors")
    refused(folder, r"up_proj\.weight has shape \(79, 48\), the config calls for \(80, 48\)")
    tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(80, 48)
    tensors["model.embed_tokens.weight"] = torch.zeros(99, 48)
    save_file(tensors, folder / "model.safetensors")
    refused(folder, "embed_tokens.weight has 99 rows, but the config's vocab_size is 97")


def test_derived_buffers_and_a_tied_head_are_ignored(tmp_path):
    raw = llama_dict(tie_word_embeddings=True)
    buffers = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4), "lm_head.weight": torch.zeros(97, 48)}
    Model.from_pretrained(save_folder(tmp_path, raw, **buffers))


def test_integer_tensors_are_refused(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.zeros(48, dtype=torch.int8)
    save_file(tensors, folder / "model.safetensors")
    refused(folder, r"model\.norm\.weight has type I8")


@pytest.mark.parametrize("keep", [0, 7, 100, 0.5, -1])
def test_truncated_files_are_refused(folder, keep):
    file = folder / "model.safetensors"
    data = file.read_bytes()
    size = int(len(data) * keep) if isinstance(keep, float) else keep if keep >= 0 else len(data) + keep
    file.write_bytes(data[:size])
    refused(folder, r"model\.safetensors: not a whole safetensors file")


@pytest.mark.parametrize("header", [b"{", b'{"a": 1}', b"\xff\xfe" * 20])
def test_corrupted_headers_are_refused(folder, header):
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))
    refused(folder, r"model\.safetensors")


def test_missing_shards_and_bad_indexes_are_refused(folder):
    weight_map = shard(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {**weight_map, "ghost": weight_map["model.norm.weight"]}}))
    refused(folder, "names tensors that no shard holds: ghost")
    index.write_text(json.dumps({"metadata": {}}))
    refused(folder, "weight_map is missing")
    index.write_text(json.dumps({"weight_map": weight_map}))
    (folder / "model-00002-of-00003.safetensors").unlink()
    refused(folder, r"00002-of-00003\.safetensors: this shard is missing")


def test_folders_without_weights_are_refused(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    refused(folder, r"no \*\.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"")
    refused(folder, "specialize convert")
    refused(tmp_path / "nowhere", "no such model folder")
    (folder / "config.json").write_text(json.dumps({"model_type": "falcon"}))
    refused(folder, "'falcon' is not supported; allowed: mpt, llama, mistral, qwen2, qwen3")


def test_the_config_decides_what_a_checkpoint_must_hold(tmp_path):
    save_folder(tmp_path, mpt_dict())
    (tmp_path / "config.json").write_text(json.dumps(mpt_dict(no_bias=False)))
    refused(tmp_path, r"missing: transformer\.blocks\.0\.norm_1\.bias.* and \d+ more")
    config, tensors = open_checkpoint(save_folder(tmp_path, mpt_dict()))
    assert config.architecture == "mpt" and "transformer.wte.weight" in tensors


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_that_are_no_numbers_are_named(folder, bad, dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(folder / "model.safetensors").items()}
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 5] = bad
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    refused(folder, f"tensor {name} holds NaN or infinity")


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "a/b.safetensors", "x" * 300, "m.bin"])
def test_shards_are_files_of_the_folder(folder, name):
    index = {"weight_map": dict.fromkeys(load_file(folder / "model.safetensors"), name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, "no .*file name in this folder")
