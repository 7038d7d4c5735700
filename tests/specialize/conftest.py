"""The tiny domain, once a session."""

from types import SimpleNamespace

import pytest
import torch
from domain import write_domain


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> SimpleNamespace:
    torch.manual_seed(0)
    return write_domain(tmp_path_factory.mktemp("tiny") / "domain")
