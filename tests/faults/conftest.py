"""The tiny domain of ``tests/specialize``, and its run without any fault."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "specialize"))

from domain import write_domain
from harness import child, contents, job


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> SimpleNamespace:
    """``domain``, and ``expected``: the contents of its run that nothing disturbed."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("faults")
    domain = write_domain(folder / "domain")
    ended = child(job(domain, folder / "whole"))
    assert ended.code == 0, ended.output
    return SimpleNamespace(domain=domain, whole=folder / "whole", expected=contents(folder / "whole"))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MiB; None where this process may not mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True)
    yield folder if made.returncode == 0 else None
    if made.returncode == 0:
        subprocess.run(["umount", "-l", str(folder)], check=True)
