"""`specialize compose`: two tiny experts, every method, what is written and scored, and what cannot be composed."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from specialize.engine.model import Model
from specialize.engine.tokenizer import Tokenizer

from specialize.cli import main
from specialize.ledger import Ledger, Reply
from specialize.pipeline import load_model
from specialize.progress import Reporter
from specialize.recipe import Tune, override, read_recipe, write_recipe
from specialize.records import read_json_lines
from specialize.standalone import tune_file
from specialize.synthesize import anchor_jobs
from specialize.tune import encode_rows, train, train_config


def call(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """Two finished runs over one base: one says "no" of the animals, the other repeats a word; neither can both."""
    folder = tmp_path_factory.mktemp("compose")
    one = [row for _, row in read_json_lines(tiny.inputs["seeds"], "seeds")]
    two = [{"instruction": "Name the animal.", "input": row["input"], "output": row["input"].split()[1]} for row in one]
    task = json.loads((tiny.folder / "tasks" / "awake.json").read_text())
    examples = [{"input": row["input"], "outputs": [row["output"]]} for row in two[:4]]
    shots = [{"input": row["input"], "output": row["output"]} for row in two[:2]]
    other = task | {"name": "animal", "instruction": "Name the animal.", "examples": examples, "shots": shots}
    (folder / "tasks2").mkdir()
    (folder / "tasks2" / "animal.json").write_text(json.dumps(other))
    recipe, _ = read_recipe(tiny.recipe)
    recipe = override(recipe, {"dtype": "fp32"})
    made = []
    for name, rows, tasks in (("one", one, tiny.inputs["tasks"]), ("two", two, str(folder / "tasks2"))):
        run = folder / name
        run.mkdir()
        seeds = run / "seeds.jsonl"
        seeds.write_text("".join(json.dumps(row) + "\n" for row in rows))
        write_recipe(recipe, tiny.inputs | {"tasks": tasks, "seeds": str(seeds)}, run / "recipe.yaml")
        (run / "dataset.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = Tune(rank=4, alpha=8.0, learning_rate=2e-2, epochs=12, batch=4, schedule="constant")
        tune_file(
            tiny.folder / "model", seeds, run / "adapter", settings, dtype="fp32", device="cpu", seed=0,
            base_model="tiny", reporter=Reporter(mute=True),
        )  # fmt: skip
        made.append(run)
    return tiny, made


def test_a_mixture_beside_its_peers(runs, capsys, tmp_path):
    tiny, folders = runs
    out = tmp_path / "mix"
    options = ["--out", out, "--compare", "pooled,ties,dare,average", "--lr", 0.05, "--epochs", 6, "--dtype", "fp32"]
    code, shown, err = call(capsys, "compose", *folders, *options, "--json")
    assert code == 0, err
    found = json.loads(shown)
    assert found == json.loads((out / "mix.json").read_text())
    assert [e["name"] for e in found["experts"]] == ["one", "two"] and found["experts"][0]["rows"] == 16
    assert set(found["made"]) == {"mixse", "pooled", "ties", "dare", "average"}
    assert found["made"]["mixse"]["num_parameters"] == 2 * 32
    assert found["made"]["mixse"]["last_loss"] < found["made"]["mixse"]["first_loss"]
    routing = found["routing"]
    for name, shares in routing["domains"].items():
        assert abs(sum(shares["chosen"]) - 1) < 1e-3 and len(shares["by_layer"]) == 2 and shares["tokens"] > 100
        assert all(abs(sum(layer) - 1) < 1e-3 for layer in shares["by_layer"]), name
        assert len(shares["sample"][0]) == 3
    ones, twos = (routing["domains"][name]["chosen"] for name in ("one", "two"))
    assert ones[0] > twos[0]  # each domain's rows go to its own expert more often than the other's do
    for domain_name, scores in found["evaluation"].items():
        assert set(scores["systems"]) == {"base", "one", "two", *found["made"]}
        assert {c["against"] for c in scores["comparisons"]} == {domain_name}
    by_name = {row["system"]: row for row in found["summary"]}
    assert by_name["mixse"]["domains"]["one"]["to_own_expert"]["value"] == pytest.approx(
        by_name["mixse"]["domains"]["one"]["value"]
        - next(m["value"] for m in found["evaluation"]["one"]["systems"]["one"]["means"] if m["metric"] == "token_f1"),
        abs=0.02,
    )
    page = (out / "mix.html").read_text()
    assert "one and two on one base" in page and "<script" not in page and page.count("<h3>") == 2
    # again: nothing is made or asked anew, and the table is the same
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.safetensors")}
    code, text, err = call(capsys, "compose", *folders, *options)
    assert code == 0, err
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("*.safetensors")}
    assert "which expert, how often" in text and "mixse against one's own expert" in text and "own expert" in text
    # what was written serves wherever an adapter does
    model = tiny.inputs["model"]
    for adapter in (out, out / "peers" / "ties"):
        code, _, err = call(
            capsys, "generate", "--model", model, "--adapter", adapter, "The cat", "--max-tokens", 3, "--dtype", "fp32"
        )
        assert code == 0, err
    tasks = tiny.inputs["tasks"]
    code, shown, err = call(
        capsys, "eval", "--model", model, "--adapter", out, "--tasks", tasks, "--limit", 4, "--max-tokens", 4,
        "--dtype", "fp32", "--json",
    )  # fmt: skip
    assert code == 0, err
    scored = {(r["task"], r["metric"]): r["value"] for r in json.loads(shown)["results"]}
    mine = found["evaluation"]["one"]["systems"]["mixse"]["results"]
    assert scored == {(r["task"], r["metric"]): r["value"] for r in mine}
    code, _, err = call(capsys, "merge", model, out, tmp_path / "merged")
    assert code == 2 and "mixture of experts" in err and err.count("\n") == 1


def test_the_pooled_adapter_has_the_first_run_s_anchor(runs, capsys, tmp_path):
    """Its texts are those in the run's ledger: the weights are those of the loop called with them by hand."""
    tiny, (one, two) = runs
    anchored = tmp_path / "anchored"
    shutil.copytree(one, anchored)
    recipe, inputs = read_recipe(anchored / "recipe.yaml")
    recipe = override(recipe, {"tune.anchor": 0.5, "tune.anchor_tokens": 20})
    write_recipe(recipe, inputs, anchored / "recipe.yaml")
    call_pooled = ("compose", anchored, two, "--method", "pooled", "--dtype", "fp32", "--no-eval", "--json")
    code, shown, err = call(capsys, *call_pooled, "--out", tmp_path / "none")
    assert code == 0 and "has no anchor texts; tuned without an anchor" in err
    assert json.loads(shown)["made"]["pooled"]["anchor"] == 0.0
    jobs = anchor_jobs(recipe)
    with Ledger(anchored / "ledger.sqlite") as ledger:
        for job in jobs:
            for n in range(2):
                ledger.add_reply(Reply(job.reply_id(n), job.item_id, "anchor", n, f" the cat {n}", "length", 3, {}))
    code, shown, err = call(capsys, *call_pooled, "--out", tmp_path / "pooled")
    assert code == 0, err
    assert json.loads(shown)["made"]["pooled"]["anchor"] == 0.5
    drifts = [json.loads(line) for line in (tmp_path / "pooled" / "metrics.jsonl").read_text().splitlines()]
    assert drifts[-1]["anchor_loss"] > 0
    model = load_model(Model, tiny.folder / "model", "fp32", "cpu")
    tokenizer = Tokenizer.from_pretrained(tiny.folder / "model")
    seeds = [[row for _, row in read_json_lines(run / "seeds.jsonl", "seeds")] for run in (anchored, two)]
    rows = [row for members in seeds for row in members * 2]  # as seeds and as what the run has kept
    config = train_config(recipe.tune, epochs=recipe.tune.epochs, seed=0, max_context=model.config.max_context)
    texts = [tokenizer.encode(f"{job.prompt} the cat {n}") for job in jobs for n in range(2)]
    train(
        model, encode_rows(tokenizer, rows), config, tmp_path / "by-hand", base_model="tiny",
        anchors=[list(ids) for ids in texts],
    )  # fmt: skip
    file = "adapter_model.safetensors"
    ours, wanted = (load_file(tmp_path / name / file) for name in ("pooled", "by-hand"))
    assert all(torch.equal(ours[name], wanted[name]) for name in wanted) and ours.keys() == wanted.keys()
    assert any(not torch.equal(other, wanted[name]) for name, other in load_file(tmp_path / "none" / file).items())


def test_what_cannot_be_composed_is_said_in_one_line(runs, capsys, tmp_path):
    tiny, (one, two) = runs
    unfinished, foreign = tmp_path / "unfinished", tmp_path / "foreign"
    shutil.copytree(one, unfinished)
    shutil.rmtree(unfinished / "adapter")
    shutil.copytree(two, foreign)
    shutil.copytree(tiny.inputs["model"], tmp_path / "other-model")
    (tmp_path / "other-model" / "more.txt").write_text("another")
    recipe = (foreign / "recipe.yaml").read_text()
    (foreign / "recipe.yaml").write_text(recipe.replace(tiny.inputs["model"], str(tmp_path / "other-model")))
    wide = tmp_path / "wide"
    shutil.copytree(two, wide)
    from safetensors.torch import load_file, save_file

    weights = wide / "adapter" / "adapter_model.safetensors"
    save_file(
        {name: (t.repeat(1, 2) if "lora_A" in name else t).contiguous() for name, t in load_file(weights).items()},
        weights,
    )
    for arguments, said in (
        ([one], "two or more experts"),
        ([one, unfinished], "is not finished"),
        ([one, foreign], "different bases"),
        ([one, wide], "share one base"),
        ([one, tmp_path], "neither a run folder"),
        ([one / "adapter", two / "adapter"], "--data ROWS.jsonl"),
        (
            [one / "adapter", two / "adapter", "--data", one / "seeds.jsonl", "--data", two / "seeds.jsonl"],
            "--model is",
        ),
        ([one, two, "--data", one / "seeds.jsonl"], "belongs to no adapter folder"),
        ([one, two, "--top-k", 3], "--top-k 3 of 2 experts"),
        ([one, two, "--top-k", "none"], "--top-k none"),
        ([one, two, "--compare", "magic"], "--compare magic"),
        ([one, two, "--density", -1], "--density -1"),
    ):
        code, _, err = call(capsys, "compose", *arguments, "--out", tmp_path / "mix", "--dtype", "fp32")
        assert code == 2 and said in err and err.count("\n") == 1, err
    code, _, err = call(capsys, "compose", one, two, "--out", one)
    assert code == 2 and "a run folder" in err


def test_adapter_folders_bring_their_rows(runs, capsys, tmp_path):
    tiny, (one, two) = runs
    out = tmp_path / "mix"
    code, shown, err = call(
        capsys, "compose", one / "adapter", two / "adapter", "--model", tiny.inputs["model"], "--data",
        one / "seeds.jsonl", "--data", two / "seeds.jsonl", "--out", out, "--top-k", "all", "--epochs", 1, "--json",
        "--dtype", "fp32",
    )  # fmt: skip
    assert code == 0, err
    found = json.loads(shown)
    assert found["evaluation"] == {} and found["routing"]["top_k"] == 2
    assert found["routing"]["domains"]["one"]["chosen"] == [0.5, 0.5]
    assert sum(found["routing"]["domains"]["one"]["weight"]) == pytest.approx(1, abs=1e-3)
    code, _, err = call(capsys, "compose", one, two, "--out", out, "--method", "ties", "--no-eval")
    assert code == 2 and "what another method made" in err
