"""The tuning benchmark on tiny models: the peer follows the same losses, and rows of results are whole."""

import json
import sys
from pathlib import Path

import pytest
import torch
from specialize.bench import train as bench
from specialize.bench.peers.tuning import compare_tuning
from specialize.bench.train import main, measure_shape, operations_per_token, random_rows
from specialize.engine.config import ModelConfig

from specialize.errors import InputError


def test_twenty_steps_of_peft_and_ours_agree_and_speeds_are_reported(tmp_path):
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "tiny")
    rows = random_rows(12, vocab=99, mean=30, longest=40)
    row = compare_tuning(
        "peft", tmp_path / "tiny", rows, rank=4, targets="all", dtype="fp32", batch_size=4, rounds=2, curve_steps=20,
        learning_rate=1e-2, python=Path(sys.executable),
    )  # fmt: skip
    assert row["correct"] and row["fp32_loss_difference"] < 1e-3 and len(row["fp32_losses"]) == 20
    assert row["fp32_losses"][-1][0] < row["fp32_losses"][0][0]
    assert row["ratio"] > 0 and row["tokens_per_s"] > 0 and row["peer_versions"]["peft"]
    assert row["grad_norms"] == pytest.approx(row["peer_grad_norms"], rel=1e-2)
    json.dumps(row)
    drawn = bench.draw([row], tmp_path / "train")
    assert [path.name for path in drawn] == ["train.png", "train.svg"]
    assert all(text in drawn[1].read_text() for text in ("specialize (all)", "transformers + PEFT (all)", "4 N floor"))
    assert bench.draw([{"name": "not timed"}], tmp_path / "nothing") == []


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


@pytest.mark.slow
def test_a_shape_is_measured_beside_a_peer_of_the_same_size(monkeypatch, tmp_path):
    for shape in ("llama-8b", "mpt-7b"):
        small = {"llama-8b": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 99,
                              "num_attention_heads": 4, "num_key_value_heads": 2},
                 "mpt-7b": {"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": 99}}[shape]  # fmt: skip
        monkeypatch.setitem(bench.SHAPES, shape, bench.SHAPES[shape] | small)
        arguments = ["--shape", shape, "--peer", "peft", "--peer-python", sys.executable, "--max-length", "32"]
        arguments += ["--rounds", "2", "--dtype", "fp32", "--device", "cpu", "--json", str(tmp_path / "out.json")]
        assert main(arguments) == 0
        [row] = json.loads((tmp_path / "out.json").read_text())
        assert row["ratio"] == pytest.approx(row["tokens_per_s"] / row["peer_tokens_per_s"])
        assert len(row["peer_grad_norms"]) == 2 and min(row["peer_grad_norms"]) > 0


def test_the_floor_counts_the_blocks_parameters():
    config = ModelConfig.from_dict(bench.SHAPES["mpt-7b"], source="test")
    assert operations_per_token(config) == 4 * 32 * 12 * 4096**2


def test_rows_come_from_a_file_of_rows_or_of_a_task(tmp_path, monkeypatch):
    class Words:
        eos_ids = (1,)

        @staticmethod
        def from_pretrained(path):
            return Words()

    encoded = []
    monkeypatch.setattr("specialize.engine.tokenizer.Tokenizer", Words)
    monkeypatch.setattr("specialize.train.data.encode_examples", lambda _, pairs: encoded.extend(pairs))
    monkeypatch.setattr("specialize.train.data.fit_examples", lambda rows, max_length: (rows, None))
    task = tmp_path / "task.json"
    example = {"input": "abstract", "outputs": ["yes", "y"]}
    task.write_text(json.dumps({"instruction": "Answer.", "examples": [example] * 5}))
    bench.read_rows(task, tmp_path, 512, 2)
    assert encoded == [("### Instruction:\nAnswer.\n\n### Input:\nabstract\n\n### Response:\n", "yes")] * 2
    encoded.clear()
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "response": "b"}\n{"instruction": "c", "input": "d"}\n')
    bench.read_rows(rows, tmp_path, 512, 1)
    assert encoded == [("a", "b")]
    with pytest.raises(InputError, match="row 2: needs prompt and response"):
        bench.read_rows(rows, tmp_path, 512, 2)
    task.write_text("[]")
    with pytest.raises(InputError, match="neither rows"):
        bench.read_rows(task, tmp_path, 512, 2)


def test_wrong_use_is_told(capsys):
    assert main(["--suite", "gpu", "--device", "cpu"]) == 2
    assert main(["--model", "no-such-model"]) == 2
    assert "no-such-model" in capsys.readouterr().err
