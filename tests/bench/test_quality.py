"""The quality benchmark: perplexity by hand, texts from files, and what it refuses."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from specialize.bench import quality
from specialize.engine.config import ModelConfig
from specialize.engine.model import Model
from specialize.engine.naive import naive_logits
from specialize.engine.weights import RandomTensors

from specialize.errors import InputError

LLAMA = {
    "model_type": "llama", "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip


def tiny_folder(path):
    (path / "config.json").write_text(json.dumps(LLAMA))
    tensors = RandomTensors(ModelConfig.from_dict(LLAMA, source="test"), 0, std=0.1)
    save_file(dict(tensors), path / "model.safetensors", metadata={"format": "pt"})
    return path


def test_perplexity_is_that_of_each_document_alone(tmp_path, monkeypatch):
    model = Model.from_pretrained(tiny_folder(tmp_path))
    documents = [[5, 9, 3], list(range(20)), [7, 7], [1, 2, 3, 4, 5]]
    total = count = 0
    for ids in documents:
        logp = naive_logits(model, ids).log_softmax(-1)
        total -= sum(float(logp[i, ids[i + 1]]) for i in range(len(ids) - 1))
        count += len(ids) - 1
    for budget in (2048, 8):
        monkeypatch.setattr(quality, "BATCH_TOKENS", budget)
        value, counted = quality.perplexity(model, documents)
        assert counted == count and value == pytest.approx(math.exp(total / count), rel=1e-4)


def test_a_row_tells_format_and_bytes(tmp_path):
    folder = tiny_folder(tmp_path)
    documents = [[5, 9, 3, 8, 2, 11] * 4]
    none, int8 = (quality.measure(folder, documents, form, "fp32", "cpu") for form in ("none", "int8"))
    assert int8["weight_mb"] < none["weight_mb"] and none["quantize"] == "none"
    assert int8["perplexity"] == pytest.approx(none["perplexity"], rel=0.05)


def test_texts_are_read_from_rows_and_paragraphs(tmp_path):
    rows = [{"title": "Gout", "text": "A disease."}, {"text": "Pain"}, {"id": 3}]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert quality.read_texts(tmp_path / "c.jsonl", 10) == ["Gout A disease.", "Pain"]
    assert quality.read_texts(tmp_path / "c.jsonl", 1) == ["Gout A disease."]
    (tmp_path / "t.txt").write_text("one\n\ntwo\n")
    assert quality.read_texts(tmp_path / "t.txt", 10) == ["one", "two"]
    (tmp_path / "bad.jsonl").write_text("{}\nnot json\n")
    for name, message in (("none.txt", "no such file"), ("bad.jsonl", r"bad\.jsonl:2: not a JSON row")):
        with pytest.raises(InputError, match=message):
            quality.read_texts(tmp_path / name, 10)
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(InputError, match="holds no text"):
        quality.read_texts(tmp_path / "empty.txt", 10)


def test_unknown_formats_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("specialize.fetch.model_path", Path)
    (tmp_path / "t.txt").write_text("one\n")
    with pytest.raises(InputError, match=r"--formats int7: allowed: none, nf4"):
        quality.main(["--model", str(tmp_path), "--text", str(tmp_path / "t.txt"), "--formats", "int8,int7"])
    assert torch.is_grad_enabled()
