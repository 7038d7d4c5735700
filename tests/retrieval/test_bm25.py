"""BM25 against its formula written out, ties, and files."""

import math
import os
import subprocess
import sys

import pytest
from specialize.retrieval.bm25 import BM25, K1, B, words
from specialize.retrieval.hybrid import reciprocal_rank_fusion

from specialize.errors import InputError

TEXTS = [
    "Renal cysts are fluid filled sacs in the kidney",
    "A seizure is an excess of synchronous neuronal activity",
    "Cysts of the kidney and cysts of the liver",
    "Short stature",
    "kidney",
]


def lucene_bm25(texts: list[str], query: str) -> list[float]:
    documents = [words(text) for text in texts]
    mean_length = sum(map(len, documents)) / len(documents)
    scores = []
    for document in documents:
        score = 0.0
        for term in words(query):
            containing = sum(term in other for other in documents)
            idf = math.log(1 + (len(documents) - containing + 0.5) / (containing + 0.5))
            count = document.count(term)
            score += idf * count / (count + K1 * (1 - B + B * len(document) / mean_length))
        scores.append(score)
    return scores


@pytest.mark.parametrize("query", ["cysts in the kidney", "seizure", "kidney kidney liver", "Short STATURE"])
def test_formula(query):
    truth = lucene_bm25(TEXTS, query)
    numbers, scores = BM25.build(TEXTS).search(query, 5)
    expected = sorted((n for n, s in enumerate(truth) if s > 0), key=lambda n: -truth[n])
    assert numbers.tolist() == expected
    assert scores.tolist() == pytest.approx([truth[n] for n in expected], rel=1e-5)


def test_no_match_few_matches_and_ties():
    bm25 = BM25.build(["alpha", "beta", "alpha", "alpha"])
    assert bm25.search("gamma", 3)[0].tolist() == []
    assert bm25.search("the of", 3)[0].tolist() == []
    assert bm25.search("alpha", 2)[0].tolist() == [0, 2]
    assert bm25.search("alpha", 50)[0].tolist() == [0, 2, 3]
    with pytest.raises(InputError, match="at least one"):
        BM25.build(["the", "..."])


def test_files(tmp_path):
    bm25 = BM25.build(TEXTS)
    bm25.save(tmp_path / "bm25")
    bm25.save(tmp_path / "bm25")
    loaded = BM25.load(tmp_path / "bm25", len(TEXTS))
    assert loaded.search("renal cysts", 3)[0].tolist() == bm25.search("renal cysts", 3)[0].tolist()
    with pytest.raises(InputError, match="counts 5"):
        BM25.load(tmp_path / "bm25", 4)
    next((tmp_path / "bm25").glob("data*")).write_bytes(b"x")
    with pytest.raises(InputError, match="damaged"):
        BM25.load(tmp_path / "bm25", len(TEXTS))


def test_fusion():
    fused = reciprocal_rank_fusion([[3, 1, 2], [1, 9]], rank_offset=60)
    assert [number for number, _ in fused] == [1, 3, 9, 2]
    assert fused[0][1] == pytest.approx(1 / 62 + 1 / 61)
    assert reciprocal_rank_fusion([[1], [2]]) == reciprocal_rank_fusion([[2], [1]])
    assert reciprocal_rank_fusion([[1], [2]], weights=[1, 2])[0][0] == 2
    assert reciprocal_rank_fusion([]) == []


def test_jax_is_left_alone(tmp_path):
    """bm25s imports JAX where there is one, which takes most of a GPU's memory; later it can be had as ever."""
    (tmp_path / "jax").mkdir()
    (tmp_path / "jax" / "__init__.py").write_text("print('taken')")
    (tmp_path / "jax" / "lax.py").write_text("")
    code = (
        "import specialize.retrieval.bm25 as bm25; print('built', bm25.BM25.build(['one two']).count); import jax.lax"
    )
    paths = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert done.stdout.split() == ["built", "1", "taken"], done.stderr
