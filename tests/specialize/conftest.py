"""The tiny domain, once a session."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from domain import write_domain


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> SimpleNamespace:
    torch.manual_seed(0)
    return write_domain(tmp_path_factory.mktemp("tiny") / "domain")


@pytest.fixture(scope="session")
def telling(tiny, tmp_path_factory) -> SimpleNamespace:
    """The tiny domain with references that its teacher, which says "yes", meets in four of six examples."""
    folder = tmp_path_factory.mktemp("telling")
    task = json.loads((Path(tiny.inputs["tasks"]) / "awake.json").read_text())
    for number, example in enumerate(task["examples"]):
        example["outputs"] = ["no"] if number % 3 == 2 else ["yes"]
    (folder / "awake.json").write_text(json.dumps(task))
    return SimpleNamespace(**vars(tiny) | {"inputs": tiny.inputs | {"tasks": str(folder)}})
