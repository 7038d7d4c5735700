"""A sentence encoder that needs no weights: words hashed to random directions, so texts that share words are near."""

import zlib

import numpy as np
import pytest


class WordHashEmbedder:
    """Mean of one fixed random vector per word, normalised. ``embedded`` counts the texts it was given."""

    def __init__(self, dim: int = 24, name: str = "word-hash") -> None:
        self.dim = dim
        self.fingerprint = f"{name}-{dim}"
        self.embedded: list[str] = []
        self.fail_after: int | None = None

    def embed(self, texts: list[str]) -> np.ndarray:
        if self.fail_after is not None and len(self.embedded) + len(texts) > self.fail_after:
            raise KeyboardInterrupt
        self.embedded += texts
        rows = np.stack([sum(map(self._vector, text.lower().split()), np.zeros(self.dim)) for text in texts])
        return (rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)).astype(np.float32)

    def _vector(self, word: str) -> np.ndarray:
        return np.random.default_rng(zlib.crc32(word.encode())).standard_normal(self.dim)


@pytest.fixture
def embedder() -> WordHashEmbedder:
    return WordHashEmbedder()


@pytest.fixture
def make_embedder():
    return WordHashEmbedder
