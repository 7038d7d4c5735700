"""What a killed process was writing goes when its work is begun again; what a living one writes stays."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from checkpoints import llama_dict, save_folder
from specialize.engine.convert import convert
from specialize.engine.staging import remove_abandoned, staging

KILLED = """
import os, signal, sys
from pathlib import Path
from specialize.engine.staging import staging
with staging(Path(sys.argv[1]), sys.argv[2]) as folder:
    (folder / "part").write_bytes(bytes(100))
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_conversion_is_cleared_and_a_living_one_is_not(tmp_path):
    base = save_folder(tmp_path / "base", llama_dict())
    for name in ("copy", "copy [2]"):
        assert subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), name]).returncode == -signal.SIGKILL
    with staging(tmp_path, "copy") as living:
        left = [path for path in tmp_path.iterdir() if path.name.startswith(".")]
        assert len(left) == 2  # the one in work and that of the other name
        assert living in left
        for name in ("copy", "copy [2]"):
            convert(base, tmp_path / name, dtype=torch.bfloat16)
            assert (tmp_path / name / "config.json").exists()
        assert [path for path in tmp_path.iterdir() if path.name.startswith(".")] == [living]
    assert not living.exists()


def test_a_failure_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), staging(tmp_path, "a") as folder:
        (folder / "part").write_text("x")
        _ = 1 / 0
    assert list(tmp_path.iterdir()) == []


def test_files_and_links(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / ".a.1.tmp").write_text("x")
    os.symlink(tmp_path / "kept", tmp_path / ".b.tmp")  # not followed, and not ours
    remove_abandoned(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".b.tmp", "kept"]
