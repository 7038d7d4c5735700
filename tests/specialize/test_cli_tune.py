"""`specialize tune` and `merge` on a user's rows: what variants write, and what wrong input gets."""

import json

import pytest
import torch

from specialize.cli import main


def call(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err


@pytest.fixture
def data(tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = [{"instruction": "Say it.", "input": f"number {i}", "output": "yes it is"} for i in range(8)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def tune(capsys, tiny, data, tmp_path):
    def run(*options, rows=data, out="adapter"):
        flags = ["--model", tiny.inputs["model"], "--dtype", "fp32", "--data", rows, "--out", tmp_path / out]
        small = ["--rank", 4, "--batch", 4, "--epochs", 1, "--lr", 0.01]
        return call(capsys, "tune", *flags, *small, "--json", *options)

    return run


def test_patterns_layers_and_variants_reach_the_adapter(tune, tmp_path):
    options = ["--dora", "--rslora", "--layers", "1", "--rank-for", "down_proj=2", "--alpha-for", "layers.1.*q_proj=3"]
    code, shown, err = tune(*options, "--targets", "q_proj,down_proj", "--lora-plus", 4, "--dropout-for", "q_proj=0.1")
    assert code == 0, err
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    down, q = "model.layers.1.mlp.down_proj", "model.layers.1.self_attn.q_proj"
    assert config["use_dora"] and config["use_rslora"] and sorted(config["target_modules"]) == [down, q]
    assert config["rank_pattern"] == {down: 2} and config["alpha_pattern"][q] == 3
    stats = json.loads(shown)
    assert stats["padding_tokens"] == 0 and 0 < stats["budget_filled"] <= 1 and stats["mfu"] > 0
    lines = [json.loads(line) for line in (tmp_path / "adapter" / "metrics.jsonl").read_text().splitlines()]
    assert {"loss", "tokens_per_s", "mfu", "grad_norm"} <= set(lines[0])


def test_merging_in_one_go_and_by_its_own_command_is_the_same(tune, capsys, tiny, tmp_path):
    code, shown, err = tune("--merge-out", tmp_path / "merged")
    assert code == 0, err
    assert json.loads(shown)["merged"] == str(tmp_path / "merged")
    code, _, err = call(capsys, "merge", tiny.inputs["model"], tmp_path / "adapter", tmp_path / "again")
    assert code == 0, err
    first, second = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("merged", "again"))
    assert first == second
    code, _, err = call(capsys, "merge", tiny.inputs["model"], tmp_path / "adapter", tmp_path / "again")
    assert code == 2 and "exists already" in err
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()


def test_full_fine_tuning_writes_a_model_that_generates(tune, capsys, tmp_path):
    code, _, err = tune("--method", "full", out="model")
    assert code == 0, err
    code, _, err = call(capsys, "generate", "--model", tmp_path / "model", "--max-tokens", 3, "--json", "hello")
    assert code == 0, err


def test_patience_keeps_the_best(tune):
    code, shown, err = tune("--validation", 0.25, "--patience", 1, "--epochs", 3)
    assert code == 0, err
    stats = json.loads(shown)
    assert stats["best_step"] == min(stats["val_losses"], key=lambda entry: entry[1])[0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--targets", "nothing_proj"], "targets: nothing_proj: no such layer in this model"),
        (["--rank", 5000], "allowed: 1 to"),
        (["--rank-for", "nothing=2"], "rank pattern 'nothing': matches no adapted layer"),
        (["--rank-for", "q_proj"], "--rank-for q_proj: write PATTERN=NUMBER"),
        (["--layers", "0-99"], "layers: "),
        (["--layers", "a"], "--layers a: write numbers and ranges"),
        (["--patience", 2], "need validation rows"),
        (["--lora-plus", 0], "plus_ratio: 0"),
        (["--method", "full", "--merge-out", "x"], "leave --merge-out out"),
        (["--max-length", 16, "--long", "error"], "tokens, but max_length is 16"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_settings_that_do_not_fit_give_one_line_and_code_2(options, said, tune):
    code, shown, err = tune(*options)
    assert code == 2 and shown == "" and said in err
    assert len(err.strip().splitlines()) == 1


def test_long_rows_are_counted(tune, data, tmp_path):
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    rows[0]["input"] = "word " * 200
    rows[1]["output"] = "word " * 200
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, shown, err = tune("--max-length", 64, rows=tmp_path / "long.jsonl")
    assert code == 0, err
    stats = json.loads(shown)
    assert (stats["num_truncated"], stats["num_dropped"]) == (1, 1)


def test_an_empty_response_is_named(tune, data, tmp_path):
    (tmp_path / "empty.jsonl").write_text(data.read_text() + '{"prompt": "a", "response": ""}\n')
    code, _, err = tune(rows=tmp_path / "empty.jsonl")
    assert code == 2 and "9" in err and len(err.strip().splitlines()) == 1


def test_a_loss_that_is_no_number_ends_with_the_rows_named(tune, tiny, tmp_path, monkeypatch):
    from specialize.engine.model import Model

    load = Model.from_pretrained

    def broken(*arguments, **options):
        model = load(*arguments, **options)
        model.layers[0].o.weight.fill_(float("nan"))
        return model

    monkeypatch.setattr(Model, "from_pretrained", broken)
    code, _, err = tune()
    assert code == 2 and "step 1: the loss is nan in the batch of row" in err and "no checkpoint" in err


def test_a_checkpoint_of_another_recipe_is_refused(tune, monkeypatch):
    from specialize.train.loop import Trainer

    def interrupted(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_finish", interrupted)
        code, _, err = tune("--epochs", 2)
    assert code == 130 and "the same command goes on" in err
    code, _, err = tune("--epochs", 2, "--rank", 2)
    assert code == 2 and "belongs to a run with other rows, settings or model" in err
    code, shown, _ = tune("--epochs", 2)
    assert code == 0 and json.loads(shown)["steps"] == 4
