"""An adapter knows the base it was trained on, and is refused by another one of the same shape."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))
sys.path.insert(0, str(Path(__file__).parents[1] / "specialize"))

from checkpoints import llama_dict, save_folder
from domain import write_model
from specialize.engine import digest
from specialize.engine.adapter import load_adapter, save_adapter
from specialize.engine.convert import convert
from specialize.engine.merge import merge_checkpoint
from specialize.engine.model import Model
from specialize.train.lora import TrainableLora

from specialize.cli import main
from specialize.errors import InputError

OTHER = r"^\S+: was trained on another base: its weights had SHA-256 [0-9a-f]{12}…, those of \S+ have [0-9a-f]{12}…\."


def other(base: Path, folder: Path) -> Path:
    """The base with the last byte of its weights changed."""
    shutil.copytree(base, folder)
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    return folder


@pytest.fixture
def base(tmp_path):
    return save_folder(tmp_path / "base", llama_dict())


@pytest.fixture
def adapter(base, tmp_path):
    trained = TrainableLora(Model.from_pretrained(base), rank=4, targets="all")
    trained.flat.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    return trained.save(tmp_path / "adapter", base_model="base")


def test_its_own_base_takes_it_and_another_does_not(base, adapter, tmp_path):
    mine, theirs = Model.from_pretrained(base), Model.from_pretrained(other(base, tmp_path / "other"))
    loaded = load_adapter(adapter, mine)
    assert loaded.base == digest.base_identity(base)
    assert loaded.base.startswith("safetensors:")
    with pytest.raises(InputError, match=OTHER):
        load_adapter(adapter, theirs)
    with pytest.raises(InputError, match=OTHER):
        merge_checkpoint(tmp_path / "other", adapter, tmp_path / "merged")
    with pytest.raises(InputError, match=OTHER):
        TrainableLora(theirs, rank=4, targets="all").load(adapter)
    TrainableLora(mine, rank=4, targets="all").load(adapter)
    save_adapter(tmp_path / "again", loaded)
    with pytest.raises(InputError, match=OTHER):
        load_adapter(tmp_path / "again", theirs)


def test_equal_adapters_are_equal_files(base, adapter, tmp_path):
    found = {(adapter / "adapter_model.safetensors").read_bytes()}
    for n in range(6):
        trained = TrainableLora(Model.from_pretrained(base), rank=4, targets="all")
        trained.load(adapter)
        found.add((trained.save(tmp_path / str(n)) / "adapter_model.safetensors").read_bytes())
    assert len(found) == 1


def test_an_adapter_that_says_nothing_fits_by_its_shapes(base, adapter, tmp_path):
    weights = adapter / "adapter_model.safetensors"
    save_file(load_file(weights), weights, metadata={"format": "pt"})  # as PEFT writes it
    assert load_adapter(adapter, Model.from_pretrained(other(base, tmp_path / "other"))).base is None


def test_copies_in_other_number_formats_are_the_same_base(base, adapter, tmp_path):
    for name, options in {"int8": {"quantize": "int8"}, "bf16": {"dtype": torch.bfloat16}}.items():
        copy = convert(base, tmp_path / name, **options)
        assert digest.base_identity(copy) == digest.base_identity(base)
        load_adapter(adapter, Model.from_pretrained(copy))
    again = convert(tmp_path / "bf16", tmp_path / "again", dtype=torch.float32)
    assert digest.base_identity(again) == digest.base_identity(base)
    merged = merge_checkpoint(base, adapter, tmp_path / "merged")
    assert digest.base_identity(merged) != digest.base_identity(base)


def test_several_shards(base, tmp_path):
    sharded = convert(base, tmp_path / "sharded", max_shard_bytes=60_000)
    files = sorted(sharded.glob("*.safetensors"))
    assert len(files) > 2
    for file in files:  # as somebody else writes shards, who says nothing of an origin
        save_file(load_file(file), file, metadata={"format": "pt"})
    first = digest.base_identity(sharded)
    content = bytearray(files[1].read_bytes())
    content[-1] ^= 1
    files[1].write_bytes(content)
    assert digest.base_identity(sharded) != first


def test_a_damaged_hash_is_refused(base, adapter):
    weights = adapter / "adapter_model.safetensors"
    save_file(load_file(weights), weights, metadata={"format": "pt", digest.BASE_KEY: "safetensors:12"})
    with pytest.raises(InputError, match="is no hash; the file is damaged"):
        load_adapter(adapter, Model.from_pretrained(base))


def test_peft_reads_it(base, adapter):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    assert PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).active_adapters == ["default"]


def test_a_file_is_hashed_anew_when_it_changed(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(bytes(100))
    first = digest.file_sha256(path)
    assert digest.file_sha256(path) == first == "cd00e292c5970d3c5e2f0ffa5171e555bc46bfc4faddfb4a418b6840b86e79a3"
    path.write_bytes(bytes(99) + b"\1" * 2)
    assert digest.file_sha256(path) != first


@pytest.mark.parametrize("command", ["generate", "chat", "eval"])
def test_commands_refuse_in_one_line(command, tmp_path, capsys, monkeypatch):
    write_model(tmp_path / "base", "the cat sat on the mat and the dog ran to the yard " * 20)
    adapter = TrainableLora(Model.from_pretrained(tmp_path / "base"), rank=4, targets="all").save(tmp_path / "adapter")
    task = {
        "name": "t",
        "instruction": "say",
        "metric": "f1",
        "shots": [],
        "examples": [{"input": "a", "outputs": "b"}],
    }
    (tmp_path / "tasks.json").write_text(json.dumps(task))
    more = {
        "generate": ["cat", "--max-tokens", "2"],
        "chat": [],
        "eval": ["--tasks", str(tmp_path / "tasks.json"), "--shots", "0", "--out", str(tmp_path / "eval.json")],
    }[command]
    base = other(tmp_path / "base", tmp_path / "other")
    with pytest.raises(SystemExit) as caught:
        main([command, "--model", str(base), "--adapter", str(adapter), *more])
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert said.count("was trained on another base") == 1
    assert "Traceback" not in said
