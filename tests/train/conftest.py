import pytest
from models import tiny_pair


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """kind -> (transformers model, our model); the transformers model must not be changed."""
    made = {}

    def get(kind="Llama"):
        if kind not in made:
            made[kind] = tiny_pair(kind, tmp_path_factory.mktemp(kind))
        return made[kind]

    return get
