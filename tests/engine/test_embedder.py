"""Our sentence encoder against transformers' BertModel with mean pooling, and what it refuses."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from specialize.engine.embedder import Embedder

from specialize.errors import InputError

TEXTS = [
    "Seizure", "", "An abnormality of the eye. HP:0000478", "a b c " * 400, "Ein naïver Café-Besuch, 日本語 😀",
    *(f"Sentence number {i} about muscle weakness of the {'left' if i % 2 else 'right'} arm." for i in range(20)),
]  # fmt: skip


@pytest.fixture(scope="module")
def embedder(minilm):
    return Embedder.from_pretrained(minilm)


def test_vectors_equal_transformers(embedder, minilm):
    from transformers import AutoModel, AutoTokenizer

    model, tokenizer = AutoModel.from_pretrained(minilm).eval(), AutoTokenizer.from_pretrained(minilm)
    vectors = embedder.embed(TEXTS)
    assert vectors.dtype == np.float32 and vectors.shape == (len(TEXTS), 384)
    for text, vector in zip(TEXTS, vectors, strict=True):
        with torch.no_grad():
            inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=256)
            mean = model(**inputs).last_hidden_state[0].mean(0)
        assert np.abs((mean / mean.norm()).numpy() - vector).max() < 1e-4


def test_batching_does_not_change_vectors(embedder):
    whole, parts = embedder.embed(TEXTS), embedder.embed(TEXTS, max_batch_tokens=64)
    assert np.abs(whole - parts).max() < 1e-5
    np.testing.assert_allclose(np.linalg.norm(whole, axis=1), 1, rtol=1e-5)
    assert embedder.embed([]).shape == (0, 384)


def test_meaning_shows(embedder):
    a, b, c = embedder.embed(["heart attack", "myocardial infarction", "a red bicycle"])
    assert a @ b > a @ c + 0.3


def test_bf16_is_near(embedder, minilm):
    rough = Embedder.from_pretrained(minilm, torch.bfloat16)
    assert (rough.embed(TEXTS) * embedder.embed(TEXTS)).sum(1).min() > 0.999
    assert rough.fingerprint == embedder.fingerprint


def test_the_fingerprint_follows_the_files(embedder, minilm, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(minilm, folder)
    assert Embedder.from_pretrained(folder).fingerprint == embedder.fingerprint
    tensors = load_file(folder / "model.safetensors")
    tensors["embeddings.LayerNorm.bias"] += 1e-3
    save_file(tensors, folder / "model.safetensors")
    assert Embedder.from_pretrained(folder).fingerprint != embedder.fingerprint


def test_wrong_folders_are_refused(minilm, tmp_path):
    with pytest.raises(InputError, match="no such embedder folder"):
        Embedder.from_pretrained(tmp_path / "nowhere")
    folder = tmp_path / "model"
    shutil.copytree(minilm, folder)
    config = json.loads((folder / "config.json").read_text())

    def refused(match):
        with pytest.raises(InputError, match=match) as error:
            Embedder.from_pretrained(folder)
        assert "\n" not in str(error.value)

    (folder / "config.json").write_text(json.dumps({**config, "model_type": "roberta"}))
    refused("'roberta' is not supported; allowed: bert")
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 100}))
    refused("more tokens than the model's 100 embeddings")
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 40000}))
    refused(r"word_embeddings\.weight has shape \(30522, 384\), the config calls for \(40000, 384\)")
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 7}))
    refused(r"tensor encoder\.layer\.6\..* is missing")
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 5}))
    refused(r"surplus tensors: encoder\.layer\.5")
    (folder / "config.json").write_text(json.dumps(config))
    data = (folder / "model.safetensors").read_bytes()
    tensors = load_file(folder / "model.safetensors")
    tensors["encoder.layer.3.output.dense.weight"][2, 2] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    refused(r"tensor encoder\.layer\.3\.output\.dense\.weight holds NaN or infinity")
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    refused("not a whole safetensors file")
    (folder / "tokenizer.json").unlink()
    refused(r"tokenizer\.json: no such file")
