"""The index against exact search; resumed and extended builds against uninterrupted ones; the manifest's checks."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from specialize.retrieval import index as index_module
from specialize.retrieval.corpus import Document
from specialize.retrieval.exact import exact_search
from specialize.retrieval.index import Index

from specialize.errors import InputError

ORGANS, ENDINGS = "renal cardiac dental ocular hepatic neural", "oma itis osis pathy"
WORDS = [organ + ending for organ in ORGANS.split() for ending in ENDINGS.split()]


def documents(count: int, start: int = 0) -> list[Document]:
    made = []
    for number in range(start, start + count):
        rng = random.Random(number)
        made.append(Document(f"d{number}", f"title{number}", " ".join(rng.choices(WORDS, k=rng.randint(4, 40)))))
    return made


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(index_module, "SHARD", 50)


@pytest.mark.parametrize("space", ["cosine", "ip"])
def test_search_and_recall(tmp_path, embedder, space):
    built = Index.build(documents(330), tmp_path / "i", embedder, space=space, max_words=30, overlap_words=5)
    assert built.recall(10, 100) >= 0.98
    assert built.manifest.recall_at_10 >= 0.98
    query = built.passage(7).searchable
    for mode in ("dense", "exact", "hybrid", "bm25"):
        hits = built.search([query], 4, mode)[0]
        assert hits[0].passage == built.passage(7), mode
        assert [hit.rank for hit in hits] == [1, 2, 3, 4]
        assert all(a.score >= b.score for a, b in itertools.pairwise(hits))
    vectors = embedder.embed(["renaloma cardiacitis", "dentalosis"])
    numbers, scores = built.exact(vectors, 5)
    matrix = embedder.embed([built.passage(n).searchable for n in range(len(built))])
    truth = np.sort(vectors @ matrix.T, axis=1)[:, ::-1][:, :5]
    assert np.allclose(scores, truth, atol=1e-5)
    assert np.allclose(np.take_along_axis(vectors @ matrix.T, numbers, 1), truth, atol=1e-5)
    assert np.allclose(built.dense(vectors, 5)[1], truth, atol=1e-4)


def test_k_beyond_the_count(tmp_path, embedder):
    built = Index.build(documents(3), tmp_path / "i", embedder)
    for mode in ("dense", "exact", "hybrid"):
        assert len(built.search(["renaloma"], 50, mode)[0]) == 3
    big = Index.build(documents(200), tmp_path / "j", embedder)
    assert len(big.search(["renaloma"], 150, "dense")[0]) == 150  # more than ef
    assert big.search([], 3) == []


def test_loaded_equals_built_and_build_is_deterministic(tmp_path, embedder):
    built = Index.build(documents(260), tmp_path / "i", embedder)
    again = Index.build(documents(260), tmp_path / "j", embedder)
    assert (tmp_path / "i" / "hnsw.bin").read_bytes() == (tmp_path / "j" / "hnsw.bin").read_bytes()
    loaded = Index.load(tmp_path / "i", embedder)
    assert loaded.manifest == built.manifest
    queries = [built.passage(n).text for n in range(0, 200, 9)]
    for mode in ("dense", "bm25", "hybrid"):
        assert loaded.search(queries, 6, mode) == built.search(queries, 6, mode) == again.search(queries, 6, mode)


def test_second_build_does_nothing(tmp_path, embedder):
    Index.build(documents(120), tmp_path / "i", embedder)
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "i").rglob("*") if file.is_file()}
    embedder.embedded.clear()
    Index.build(documents(120), tmp_path / "i", embedder)
    assert embedder.embedded == []
    assert before == {file: file.stat().st_mtime_ns for file in (tmp_path / "i").rglob("*") if file.is_file()}


def test_interrupted_build_continues(tmp_path, make_embedder):
    whole = Index.build(documents(230), tmp_path / "whole", make_embedder())
    broken = make_embedder()
    broken.fail_after = 120
    with pytest.raises(KeyboardInterrupt):
        Index.build(documents(230), tmp_path / "i", broken)
    with pytest.raises(InputError, match="unfinished"):
        Index.load(tmp_path / "i", make_embedder())
    resumed = make_embedder()
    index = Index.build(documents(230), tmp_path / "i", resumed)
    corpus_texts = {whole.passage(n).searchable for n in range(len(whole))}
    assert sum(text in corpus_texts for text in resumed.embedded) == 130  # shards of 50: 100 were kept
    assert (tmp_path / "i" / "hnsw.bin").read_bytes() == (tmp_path / "whole" / "hnsw.bin").read_bytes()
    assert index.search(["renaloma dentalitis"], 5) == whole.search(["renaloma dentalitis"], 5)


def test_extended_index(tmp_path, make_embedder):
    Index.build(documents(130), tmp_path / "i", make_embedder())
    adding = make_embedder()
    extended = Index.build(documents(100, start=130), tmp_path / "i", adding)
    assert len(extended) == 230 and extended.manifest.num_documents == 230
    new_texts = {extended.passage(n).searchable for n in range(130, 230)}
    old_texts = {extended.passage(n).searchable for n in range(130)}
    assert new_texts <= set(adding.embedded) and not old_texts & set(adding.embedded)
    whole = Index.build(documents(230), tmp_path / "whole", make_embedder())
    queries = [whole.passage(n).text for n in range(0, 230, 11)]
    assert extended.search(queries, 5, "exact") == whole.search(queries, 5, "exact")
    assert extended.search(queries, 5, "bm25") == whole.search(queries, 5, "bm25")
    assert (tmp_path / "i" / "hnsw.bin").read_bytes() == (tmp_path / "whole" / "hnsw.bin").read_bytes()
    with pytest.raises(InputError, match="'d3' differs"):
        Index.build([Document("d3", "", "other words")], tmp_path / "i", make_embedder())


def test_another_embedder_and_other_settings(tmp_path, make_embedder):
    Index.build(documents(20), tmp_path / "i", make_embedder())
    with pytest.raises(InputError, match="made with embedder word-hash-24, not with other-24"):
        Index.load(tmp_path / "i", make_embedder(name="other"))
    with pytest.raises(InputError, match="embedder"):
        Index.build(documents(20), tmp_path / "i", make_embedder(dim=16))
    with pytest.raises(InputError, match="max_words"):
        Index.build(documents(20), tmp_path / "i", make_embedder(), max_words=40)
    with pytest.raises(InputError, match="space"):
        Index.build(documents(20), tmp_path / "j", make_embedder(), space="l2")


def test_bm25_only(tmp_path, embedder):
    built = Index.build(documents(20), tmp_path / "i", None)
    assert built.search(["renaloma"], 2, "bm25")[0]
    with pytest.raises(InputError, match="without an embedder"):
        built.search(["renaloma"], 2)
    dense = Index.build(documents(20), tmp_path / "j", embedder)
    assert dense.manifest.dim == 24
    with pytest.raises(InputError, match="needs the embedder"):
        Index.load(tmp_path / "j").search(["renaloma"], 2)


def _edit_manifest(folder: Path, **changes) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: _edit_manifest(f, dim=8), "dim|fp32|embedding"),
        (lambda f: _edit_manifest(f, count=21), "counts 21"),
        (lambda f: _edit_manifest(f, format=99), "format 99"),
        (lambda f: _edit_manifest(f, extra=1), "damaged"),
        (lambda f: (f / "manifest.json").write_text("{"), "damaged"),
        (lambda f: (f / "manifest.json").unlink(), "unfinished"),
        (lambda f: (f / "hnsw.bin").unlink(), "hnsw.bin has -1 bytes"),
        (lambda f: (f / "hnsw.bin").write_bytes(b"\0" * (f / "hnsw.bin").stat().st_size), "hnsw.bin"),
        (lambda f: (f / "passages.jsonl").write_text("{}\n"), "not the file the index was made from"),
        (lambda f: (f / "passages.jsonl").unlink(), "passages.jsonl"),
        (lambda f: (f / "embeddings" / "000000.npy").write_bytes(b"x"), "damaged"),
    ],
)
def test_damage_is_noticed_at_load(tmp_path, embedder, damage, says):
    Index.build(documents(20), tmp_path / "i", embedder)
    damage(tmp_path / "i")
    with pytest.raises(InputError, match=says):
        Index.load(tmp_path / "i", embedder)


def test_graph_of_another_index(tmp_path, embedder):
    Index.build(documents(20), tmp_path / "i", embedder)
    Index.build(documents(20, start=500), tmp_path / "j", embedder)
    (tmp_path / "i" / "hnsw.bin").write_bytes((tmp_path / "j" / "hnsw.bin").read_bytes())
    _edit_manifest(tmp_path / "i", hnsw_bytes=(tmp_path / "i" / "hnsw.bin").stat().st_size)
    with pytest.raises(InputError, match="does not belong"):
        Index.load(tmp_path / "i", embedder)


def test_wrong_use(tmp_path, embedder):
    built = Index.build(documents(20), tmp_path / "i", embedder)
    for arguments, says in [((["x"], 0), "at least one"), ((["x"], 3, "magic"), "allowed are"), (([" "], 3), "empty")]:
        with pytest.raises(InputError, match=says):
            built.search(*arguments)
    with pytest.raises(InputError, match="does not exist"):
        Index.load(tmp_path / "nowhere", embedder)
    with pytest.raises(InputError, match="no text"):
        Index.build([], tmp_path / "j", embedder)
    with pytest.raises(InputError, match="occurs twice"):
        Index.build([Document("a", "", "x"), Document("a", "", "y")], tmp_path / "k", embedder)
    (tmp_path / "l").mkdir()
    (tmp_path / "l" / "passages.jsonl").write_text("mine")
    with pytest.raises(InputError, match="another folder"):
        Index.build(documents(2), tmp_path / "l", embedder)


def test_full_disk_is_noticed(tmp_path, embedder, monkeypatch):
    class Truncating:
        def __init__(self, **arguments):
            self.graph = hnswlib.Index(**arguments)

        def __getattr__(self, name):
            return getattr(self.graph, name)

        def save_index(self, path):
            self.graph.save_index(path)
            os.truncate(path, 100)

    hnswlib = index_module.hnswlib
    monkeypatch.setattr(index_module, "hnswlib", SimpleNamespace(Index=Truncating))
    with pytest.raises(OSError, match="No space left"):
        Index.build(documents(20), tmp_path / "i", embedder)
    monkeypatch.undo()
    embedder.embedded.clear()
    Index.build(documents(20), tmp_path / "i", embedder)
    assert len(embedder.embedded) == 20  # the queries that measure the recall; no passage was embedded again


def test_exact_search_orders_ties_by_number():
    matrix = np.array([[1, 0], [0, 1], [1, 0], [1, 0]], np.float32)
    numbers, _ = exact_search(matrix, np.array([[1, 0]], np.float32), 3)
    assert numbers.tolist() == [[0, 2, 3]]


CHILD = """
import sys, time
sys.path.insert(0, sys.argv[2])
from conftest import WordHashEmbedder
from test_index import documents
from specialize.retrieval import index
index.SHARD = 50
class Slow(WordHashEmbedder):
    def embed(self, texts):
        time.sleep(0.02)
        return super().embed(texts)
index.Index.build(documents(600), sys.argv[1], Slow())
"""


def test_killed_builds_end_the_same(tmp_path, embedder):
    """kill -9 at random moments, each followed by the same build."""
    command = [sys.executable, "-c", CHILD, str(tmp_path / "i"), str(Path(__file__).parent)]
    rng = random.Random(5)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    num_killed = 0
    while True:
        process = subprocess.Popen(command, env=environment)
        if num_killed < 5:
            wait_for = tmp_path / "i" / "embeddings" / f"{num_killed * 2:06d}.npy"
            deadline = time.monotonic() + 30
            while not wait_for.exists() and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.002)
            time.sleep(rng.random() * 0.05)
            process.send_signal(signal.SIGKILL)
            process.wait()
            num_killed += 1
            continue
        assert process.wait(timeout=60) == 0
        break
    Index.build(documents(600), tmp_path / "whole", embedder)
    for name in ("hnsw.bin", "passages.jsonl"):
        assert (tmp_path / "i" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not list((tmp_path / "i").rglob("*.part"))
