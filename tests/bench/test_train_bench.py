"""The tuning benchmark on tiny models: the peer follows the same losses, and rows of results are whole."""

import json

import pytest
import torch
from specialize.bench import train as bench
from specialize.bench.train import compare_with_peft, main, measure_shape, operations_per_token, random_rows
from specialize.engine.config import ModelConfig


def test_twenty_steps_of_peft_and_ours_agree_and_speeds_are_reported(tmp_path):
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "tiny")
    rows = random_rows(12, vocab=99, mean=30, longest=40)
    row = compare_with_peft(
        tmp_path / "tiny", rows, rank=4, targets="all", dtype="fp32", batch_size=4, rounds=2, curve_steps=20,
        learning_rate=1e-2,
    )  # fmt: skip
    assert row["correct"] and row["fp32_loss_difference"] < 1e-3 and len(row["fp32_losses"]) == 20
    assert row["fp32_losses"][-1][0] < row["fp32_losses"][0][0]
    assert row["ratio"] > 0 and row["tokens_per_s"] > 0 and row["peer_versions"]["peft"]
    assert row["grad_norms"] == pytest.approx(row["peer_grad_norms"], rel=1e-2)
    json.dumps(row)


def test_a_named_shape_is_measured_with_its_gradient_norms(monkeypatch, tmp_path):
    monkeypatch.setitem(
        bench.SHAPES, "llama-8b",
        {"model_type": "llama", "vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512},
    )  # fmt: skip
    row = measure_shape("llama-8b", lengths=[20, 9], micro_batches=2, steps=1, dtype="fp32", device="cpu")
    assert row["tokens"] == 58 and row["correct"] and row["grad_norms"][0] > 0
    out = tmp_path / "out.json"
    arguments = ["--shape", "llama-8b", "--max-length", "32", "--rounds", "1", "--dtype", "fp32", "--device", "cpu"]
    assert main([*arguments, "--json", str(out)]) == 0
    assert json.loads(out.read_text())[0]["shape"] == "llama-8b"


def test_the_floor_counts_the_blocks_parameters():
    config = ModelConfig.from_dict(bench.SHAPES["mpt-7b"], source="test")
    assert operations_per_token(config) == 4 * 32 * 12 * 4096**2


def test_wrong_use_is_told(capsys):
    assert main(["--suite", "gpu", "--device", "cpu"]) == 2
    assert main(["--model", "no-such-model"]) == 2
    assert "no-such-model" in capsys.readouterr().err
