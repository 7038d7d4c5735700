import os

import pytest
import torch
from specialize.train.checkpoint import load_checkpoint, save_checkpoint, write_atomic

from specialize.errors import InputError


def test_tensors_and_floats_survive_bit_for_bit(tmp_path):
    tensors = {"a": torch.randn(7), "b": torch.arange(3), "step": torch.tensor(2.0)}
    state = {"losses": [0.1, 1e-300, 1 / 3], "step": 3, "fingerprint": "x"}
    save_checkpoint(tmp_path / "c", tensors, state)
    found, found_state = load_checkpoint(tmp_path / "c")
    assert found_state == state and set(found) == set(tensors)
    assert all(torch.equal(found[n], tensors[n]) for n in tensors)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    write_atomic(tmp_path / "f", b"old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(tmp_path / "f", b"new")
    assert (tmp_path / "f").read_bytes() == b"old" and os.listdir(tmp_path) == ["f"]


@pytest.mark.parametrize("cut", [3, 40, -5])
def test_damaged_checkpoints_are_told(cut, tmp_path):
    save_checkpoint(tmp_path / "c", {"a": torch.randn(7)}, {})
    content = (tmp_path / "c").read_bytes()
    (tmp_path / "c").write_bytes(content[:cut])
    with pytest.raises(InputError, match="damaged checkpoint"):
        load_checkpoint(tmp_path / "c")


def test_a_foreign_file_is_told(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "c")
    with pytest.raises(InputError, match="not a training checkpoint"):
        load_checkpoint(tmp_path / "c")
