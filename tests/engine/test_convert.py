"""Released ``.bin`` checkpoints become safetensors folders that transformers and we read alike."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from checkpoints import LLAMA, llama_dict, mpt_dict, save_folder, save_transformers
from safetensors.torch import load_file, save_file
from specialize.engine.batch import Batch
from specialize.engine.config import ModelConfig
from specialize.engine.convert import convert
from specialize.engine.model import Model
from specialize.engine.tokenizer import Tokenizer
from specialize.engine.weights import open_checkpoint

from specialize.errors import InputError


def bin_folder(folder, raw, num_shards=1):
    """A folder as MPT was released: pickled shards, an index, a tokenizer, a licence."""
    save_folder(folder, raw)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for i in range(num_shards):
        name = "pytorch_model.bin" if num_shards == 1 else f"pytorch_model-{i + 1:05d}-of-{num_shards:05d}.bin"
        part = dict(list(tensors.items())[i::num_shards])
        torch.save(part, folder / name)
        weight_map.update(dict.fromkeys(part, name))
    if num_shards > 1:
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "LICENSE").write_text("free")
    return tensors


@pytest.mark.parametrize("num_shards", [1, 3])
def test_bin_shards_become_safetensors(num_shards, tmp_path):
    tensors = bin_folder(tmp_path / "src", mpt_dict(), num_shards)
    seen = []
    out = convert(tmp_path / "src", tmp_path / "dst", on_tensor=lambda done, total: seen.append((done, total)))
    written = load_file(out / "model.safetensors")
    assert set(written) == set(tensors) and all(torch.equal(written[n], tensors[n]) for n in tensors)
    assert sorted(f.name for f in out.iterdir()) == ["LICENSE", "config.json", "model.safetensors", "tokenizer.json"]
    assert seen[-1][0] == seen[-1][1] and len(seen) == len(tensors)
    Model.from_pretrained(out)


def test_large_models_are_cut_into_shards(tmp_path):
    tensors = bin_folder(tmp_path / "src", llama_dict())
    out = convert(tmp_path / "src", tmp_path / "dst", max_shard_bytes=60_000, dtype=torch.bfloat16)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 1 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert index["metadata"]["total_size"] == sum(t.numel() * 2 for t in tensors.values())
    for file in files:
        content = load_file(out / file)
        assert sum(t.numel() * t.itemsize for t in content.values()) <= 60_000 or len(content) == 1
        assert all(torch.equal(t, tensors[n].bfloat16()) for n, t in content.items())
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    Model.from_pretrained(out)


def test_transformers_reads_the_result(tmp_path):
    from transformers import AutoModelForCausalLM

    model = save_transformers("Llama", tmp_path / "src", **LLAMA)
    torch.save(model.state_dict(), tmp_path / "src" / "pytorch_model.bin")
    (tmp_path / "src" / "model.safetensors").unlink()
    out = convert(tmp_path / "src", tmp_path / "dst")
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    ids = [3, 5, 7, 9]
    ours = Model.from_pretrained(out)
    with torch.no_grad():
        difference = ours.logits(ours.forward(Batch.packed([ids]))) - theirs(torch.tensor([ids])).logits[0]
    assert difference.abs().max() < 1e-4


def test_tied_and_derived_tensors_are_dropped(tmp_path):
    tensors = bin_folder(tmp_path / "src", mpt_dict())
    tied = {**tensors, "lm_head.weight": tensors["transformer.wte.weight"]}
    tied["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    torch.save(tied, tmp_path / "src" / "pytorch_model.bin")
    assert set(load_file(convert(tmp_path / "src", tmp_path / "dst") / "model.safetensors")) == set(tensors)


def test_gguf_files_become_folders_that_transformers_reads(tmp_path):
    from test_gguf import write_gguf
    from test_tokenizer import sentencepiece_metadata
    from transformers import AutoModelForCausalLM, AutoTokenizer

    save_folder(tmp_path / "src", llama_dict(vocab_size=400))
    config, tensors = open_checkpoint(tmp_path / "src")
    file = write_gguf(tmp_path / "m.gguf", config, dict(tensors), extra=sentencepiece_metadata(True))
    out = convert(file, tmp_path / "dst")
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    ours, from_file = Tokenizer.from_pretrained(out), Tokenizer.from_pretrained(file)
    their_tokenizer = AutoTokenizer.from_pretrained(out)
    for text in ("the cat sat", " on the mat", "naïve 日本"):
        ids = from_file.encode(text)
        assert ids == ours.encode(text) == their_tokenizer.encode(text)
        logits = [m.logits(m.forward(Batch.packed([ids]))) for m in map(Model.from_pretrained, (file, out))]
        with torch.no_grad():
            assert torch.equal(*logits) and (logits[0] - theirs(torch.tensor([ids])).logits[0]).abs().max() < 1e-4
    half = convert(file, tmp_path / "half", dtype=torch.bfloat16)
    assert (half / "model.safetensors").stat().st_size < (out / "model.safetensors").stat().st_size * 0.6


class Evil:
    def __reduce__(self):
        return (print, ("code of a stranger ran",))


def test_what_is_refused_leaves_nothing_behind(tmp_path, capsys):
    source, target = tmp_path / "src", tmp_path / "dst"
    tensors = bin_folder(source, llama_dict())
    file = source / "pytorch_model.bin"
    whole = file.read_bytes()

    def refused(match):
        with pytest.raises(InputError, match=match) as error:
            convert(source, target)
        assert "\n" not in str(error.value)
        assert [p.name for p in tmp_path.iterdir()] == ["src"]

    torch.save({**tensors, "evil": Evil()}, file)
    refused("holds more than tensors")
    assert "stranger" not in capsys.readouterr().out
    file.write_bytes(whole[: len(whole) // 2])
    refused(r"pytorch_model\.bin: ")
    file.write_bytes(b"")
    refused(r"pytorch_model\.bin: ")
    torch.save([1, 2], file)
    refused("does not map names to tensors")
    torch.save({k: v for k, v in tensors.items() if "norm" not in k}, file)
    refused("missing: model.layers.0.input_layernorm.weight")
    file.unlink()
    refused("neither")
    shutil.rmtree(source)
    source.mkdir()
    refused("config.json: no such file")


@pytest.mark.parametrize("kind", ["bin", "safetensors", "gguf"])
@pytest.mark.parametrize("bad", [float("nan"), -float("inf")])
def test_weights_that_are_no_numbers_are_named(kind, bad, tmp_path):
    from test_gguf import write_gguf
    from test_tokenizer import sentencepiece_metadata

    source, name = tmp_path / "src", "model.layers.1.mlp.down_proj.weight"
    tensors = bin_folder(source, llama_dict(vocab_size=400))
    tensors[name][3, 5] = bad
    if kind == "bin":
        torch.save(tensors, source / "pytorch_model.bin")
    elif kind == "safetensors":
        save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    else:
        config = ModelConfig.from_folder(source)
        source = write_gguf(tmp_path / "m.gguf", config, tensors, extra=sentencepiece_metadata(True))
    before = sorted(tmp_path.iterdir())
    for options in ({}, {"dtype": torch.float16}, {"quantize": "int8"}):
        with pytest.raises(InputError, match=re.escape(f"tensor {name} holds NaN or infinity")):
            convert(source, tmp_path / "dst", **options)
    assert sorted(tmp_path.iterdir()) == before


def test_numbers_beyond_the_type_asked_for_are_named(tmp_path):
    source, name = save_folder(tmp_path / "src", llama_dict()), "model.layers.0.self_attn.q_proj.weight"
    tensors = load_file(source / "model.safetensors")
    tensors[name][0, 0] = -70_000.0
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    for call in (
        lambda: convert(source, tmp_path / "dst", dtype=torch.float16),
        lambda: Model.from_pretrained(source, dtype=torch.float16),
    ):
        with pytest.raises(InputError, match=re.escape(f"tensor {name} holds 7e+04, beyond what float16 can hold")):
            call()
    tensors[name][0, 0] = 65_519.0  # rounds to fp16's largest number
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    written = load_file(convert(source, tmp_path / "dst", dtype=torch.float16) / "model.safetensors")
    assert written[name][0, 0] == 65_504


def test_existing_targets_are_kept(tmp_path):
    bin_folder(tmp_path / "src", llama_dict())
    (tmp_path / "dst").mkdir()
    (tmp_path / "dst" / "mine").write_text("x")
    with pytest.raises(InputError, match="exists already"):
        convert(tmp_path / "src", tmp_path / "dst")
    assert (tmp_path / "dst" / "mine").read_text() == "x"


def test_a_failing_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    from specialize.engine import digest as module

    bin_folder(tmp_path / "src", llama_dict())

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        convert(tmp_path / "src", tmp_path / "dst")
    assert [p.name for p in tmp_path.iterdir()] == ["src"]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(InputError, match=r"GB of disk, 0\.0 GB are free"):
        convert(tmp_path / "src", tmp_path / "dst")
