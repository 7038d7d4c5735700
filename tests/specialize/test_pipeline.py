"""A whole run on a tiny domain: resumed after kills, redone when settings change, refused when they clash."""

import hashlib
import json
import os
import re
import shutil
import signal
from pathlib import Path

import pyarrow.json
import pyarrow.parquet
import pytest
import torch
import yaml

from specialize import cli, pipeline
from specialize.errors import InputError
from specialize.export import export
from specialize.ledger import Ledger, run_lock
from specialize.pipeline import Run
from specialize.progress import Reporter
from specialize.prompts import openings
from specialize.recipe import override, read_recipe
from specialize.records import Seed, file_fingerprint
from specialize.seal import SEAL, sealed_ledger
from specialize.standalone import systems_table
from specialize.synthesize import ANCHOR_SAMPLES


def open_run(tiny, folder, *settings, **inputs):
    recipe = override(read_recipe(tiny.recipe)[0], settings)
    return Run(folder, recipe, tiny.inputs | inputs, reporter=Reporter(quiet=True))


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    result = open_run(tiny, folder).execute()
    return folder, result


def contents(folder):
    """Everything a run decided, without times and paths."""
    with Ledger(folder / "ledger.sqlite") as ledger:
        items = [(i.id, i.input, i.output, i.status, i.reason, i.score) for i in ledger.items()]
        purposes = ("instruction", "input", "response")
        replies = {p: {k: [r.raw for r in v] for k, v in ledger.replies(p).items()} for p in purposes}
        count = ledger._db.execute("SELECT COUNT(*), COUNT(DISTINCT id) FROM replies").fetchone()
    rows = [json.loads(line) for line in (folder / "dataset.jsonl").read_text().splitlines()]
    data = [(r["id"], r["instruction"], r["input"], r["output"]) for r in rows]
    scores = json.loads((folder / "eval.json").read_text())["systems"]
    adapter = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    return {"items": items, "replies": replies, "count": count, "data": data, "adapter": adapter} | {
        name: system["results"] for name, system in scores.items()
    }


def test_a_run_leaves_what_it_promises(finished, tiny):
    folder, result = finished
    assert set(result["systems"]) == {"base", "seeds", "expert"}
    for r in result["results"]:
        assert set(r) >= {"task", "shots", "metric", "value", "low", "high", "n"}
        assert r["low"] <= r["value"] <= r["high"]
        assert r["n"] == 4
    assert result["adapter"] == str(folder / "adapter")
    rows = [json.loads(line) for line in (folder / "dataset.jsonl").read_text().splitlines()]
    assert 1 <= len(rows) <= 10
    for row in rows:
        assert {"model", "adapter", "seed", "documents", "agreement"} <= set(row["provenance"])
    with Ledger(folder / "ledger.sqlite") as ledger:
        counts = ledger.counts()
        assert counts["kept"] == len(rows)
        assert all(i.reason for i in ledger.items(status="rejected"))
        replies = ledger.replies("response")
        assert all("prompt" in r[0].provenance for r in replies.values())
        assert all([x.sample for x in r] == [0, 1, 2] for r in replies.values())
    recipe, inputs = read_recipe(folder / "recipe.yaml")
    assert (recipe, inputs) == (read_recipe(tiny.recipe)[0], tiny.inputs)


def test_a_run_stops_after_the_first_wave_s_instructions_or_answers(finished, tiny, tmp_path):
    folder, wave = tmp_path / "run", None
    for until in ("instructions", "instructions", "responses", "instructions"):  # going on is not going back
        result = open_run(tiny, folder).execute(until=until)
        with Ledger(folder / "ledger.sqlite") as ledger:
            stages, items, answers = ledger.stages(), ledger.items(), ledger.replies("response")
        wave = wave or items
        assert items == wave and {(i.round, i.wave) for i in items} == {(1, 0)}
        assert all(i.status == "new" for i in items if not i.reason)  # nothing is judged but doubles among the drafts
        answered = until == "responses" or "responses" in stages
        assert set(answers) == ({i.id for i in items if i.status == "new"} if answered else set())
        assert not stages["instructions"].done and "filter" not in stages and "tune" not in stages
        assert result["stages"].keys() == stages.keys()
        assert not (folder / "dataset.jsonl").exists()
    with Ledger(finished[0] / "ledger.sqlite") as ledger:
        assert [i.id for i in wave] == [i.id for i in ledger.items(wave=0)]
    open_run(tiny, folder).execute()
    assert contents(folder) == contents(finished[0])


def test_labels_taken_as_text_are_told_once(tiny, tmp_path, capsys):
    rows = [json.loads(line) for line in Path(tiny.inputs["seeds"]).read_text().splitlines()]
    for number, row in enumerate(rows):
        row["output"] = "nobody could say so of an animal that is awake" if number % 2 else "yes"
    seeds = tmp_path / "seeds.jsonl"
    seeds.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for _ in range(2):
        open_run(tiny, tmp_path / "run", "retrieval.mode='off'", seeds=str(seeds)).execute(until="instructions")
    assert capsys.readouterr().err.count("different outputs, as labels have, but one is") == 1
    assert (tmp_path / "run" / "run.log").read_text().count("answers are taken as free text") == 1


def test_a_run_folder_may_be_elsewhere_than_it_was_made(tiny, finished, tmp_path):
    """Its control is found in it, not where the ledger says that it was written."""
    folder = tmp_path / "moved"
    shutil.copytree(finished[0], folder)
    with sealed_ledger(folder / "ledger.sqlite") as ledger:
        ledger.end_stage("control", dict(ledger.stages()["control"].info) | {"adapter_path": "gone"})
        ledger.forget_stages(["evaluate"])
    assert open_run(tiny, folder).execute()["systems"].keys() == {"base", "seeds", "expert"}


def without(key):
    def change(ledger, stage):
        found = dict(ledger.stages()[stage].info)
        del found[key]
        ledger.end_stage(stage, found)

    return change


@pytest.mark.parametrize(
    ("command", "stage", "change", "says"),
    [
        ("run", "tune", without("tokens"), 'an object has no "tokens"'),
        ("run", "control", without("wanted_tokens"), 'an object has no "wanted_tokens"'),
        ("compare", "tune", without("tokens"), 'an object has no "tokens"'),
        ("report", "tune", lambda ledger, stage: ledger.end_stage(stage, {"tokens": "x"}), '"tokens" of stage tune is'),
        ("redo", "wave-0", lambda ledger, key: ledger.set_meta(key, {"elsewhere": 3}), "the plan of wave 1 is none"),
        ("redo", "wave-0", lambda ledger, key: ledger.set_meta(key, [3]), "the plan of wave 1 is none"),
        ("redo", "materials-0", lambda ledger, key: ledger.set_meta(key, [3]), "materials-0 is no list of texts"),
    ],
)
def test_a_ledger_s_objects_with_wrong_keys_are_one_line(finished, tmp_path, capsys, command, stage, change, says):
    """Sealed and hashed as they are, so that only what they say is wrong."""
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    with sealed_ledger(folder / "ledger.sqlite") as ledger:
        change(ledger, stage)
        if command == "redo":
            ledger.forget_stages(["instructions", "responses", "filter", "tune", "control"])
    arguments = {
        "compare": ["report", folder, finished[0], "--out", tmp_path / "page.html"], "report": ["report", folder],
    }.get(command, ["run", "--out", folder])  # fmt: skip
    with pytest.raises(SystemExit, match="2"):
        cli.main([str(argument) for argument in arguments] + ["--quiet"])
    lines = capsys.readouterr().err.splitlines()
    assert says in lines[-1] and lines[-1].startswith("specialize: ")
    assert not any("Traceback" in line for line in lines)


@pytest.mark.parametrize("body", ["{}", "[]", '{"format": 1}'])
def test_a_seal_that_says_nothing_is_damaged(finished, tmp_path, body):
    shutil.copytree(finished[0], tmp_path / "run")
    (tmp_path / "run" / SEAL).write_text(f"{body}\n{hashlib.sha256(body.encode()).hexdigest()}\n")
    with pytest.raises(InputError, match=r"ledger\.seal is damaged"), sealed_ledger(tmp_path / "run" / "ledger.sqlite"):
        pass


VARIANT = (
    "dora=true",
    "init=pissa",
    "plus_ratio=4",
    "rank_stabilized=true",
    "validation=0.2",
    "patience=1",
    "epochs=3",
    "demonstrations=2",
    "anchor=0.5",
    "anchor_tokens=12",
)


def test_a_recipe_s_variants_reach_every_training(finished, tiny, tmp_path):
    settings = [f"tune.{pair}" for pair in VARIANT]
    result = open_run(tiny, tmp_path / "run", *settings).execute(until="evaluate")
    assert set(result["systems"]) == {"base", "seeds", "expert"}
    for part in ("teacher", "adapter", "control"):
        config = json.loads((tmp_path / "run" / part / "adapter_config.json").read_text())
        assert config["use_dora"], part
    with Ledger(tmp_path / "run" / "ledger.sqlite") as ledger:
        stages = ledger.stages()
        texts = ledger.replies("anchor")
    assert len(texts) == len(openings()) and all(len(replies) == ANCHOR_SAMPLES for replies in texts.values())
    drifts = {}
    for part in ("teacher", "rounds/1", "control"):
        metrics = [json.loads(line) for line in (tmp_path / "run" / part / "metrics.jsonl").read_text().splitlines()]
        drifts[part] = [line["anchor_loss"] for line in metrics if "anchor_loss" in line]
    assert not drifts["teacher"] and drifts["rounds/1"][-1] > 0 and drifts["control"][-1] > 0
    for name in ("teacher", "tune"):
        assert stages[name].info["best_step"] is not None
        assert stages[name].info["val_losses"]
        assert stages[name].settings["tune.plus_ratio"] == 4.0
    # at their defaults they are left out, so that runs made before there were such settings still stand
    with Ledger(finished[0] / "ledger.sqlite") as ledger:
        assert "tune.dora" not in ledger.stages()["tune"].settings


@pytest.mark.parametrize("shown", [0, 2])
def test_a_teacher_learns_in_groups_only_if_it_answers_with_demonstrations(tiny, tmp_path, shown):
    """In groups the rows are fewer texts, so fewer steps; an expert's rows stand in groups either way."""
    settings = [
        "tune.demonstrations=3", "tune.few_shot=1", "tune.batch=1", "tune.teacher_epochs=1",
        f"responses.demonstrations={shown}", "retrieval.mode='off'",
    ]  # fmt: skip
    run = open_run(tiny, tmp_path / "run", *settings)
    run.execute(until="teacher")
    with Ledger(tmp_path / "run" / "ledger.sqlite") as ledger:
        teacher = ledger.stages()["teacher"]
    assert (teacher.info["steps"] < len(run.seeds)) == bool(shown)
    assert ("tune.demonstrations" in teacher.settings) == bool(shown)
    assert run.settings_of()["tune"]["tune.demonstrations"] == 3


def test_the_teacher_is_scored_where_asked_for_and_nothing_is_made_again(telling, tmp_path, monkeypatch):
    folder, settings = tmp_path / "run", ("tune.epochs=0.2", "evaluate.limit=0")
    plain = open_run(telling, folder, *settings).execute()
    before = contents(folder)
    assert list(plain["systems"]) == ["base", "seeds", "expert"]
    monkeypatch.setattr(Run, "_train", None)  # no stage but evaluate and report
    result = open_run(telling, folder, *settings, "evaluate.teacher=true").execute()
    assert list(result["systems"]) == ["base", "teacher", "seeds", "expert"]
    names = ["base", "seeds alone, 6 epochs", "seeds alone, equal tokens", "expert"]
    assert systems_table(result)[0] == ("task", *(f"{name}, 0-shot" for name in names))
    assert result["systems"]["teacher"]["adapter"] == str(folder / "teacher")
    means = {
        (name, mean["shots"], mean["metric"]): mean["value"]
        for name, report in result["systems"].items()
        for mean in report["means"]
    }
    assert means["teacher", 0, "token_f1"] > means["expert", 0, "token_f1"]
    rows = {(c["system"], c["against"], c["metric"]): c for c in result["comparisons"]}
    pairs = [("expert", "base"), ("expert", "teacher"), ("expert", "seeds"), ("seeds", "base")]
    assert list(rows) == [(*pair, m) for pair in pairs for m in ("token_f1", "entity_f1", "rouge_l")]
    for (one, other, metric), row in rows.items():
        mean = row["mean"]
        assert mean["value"] == pytest.approx(means[one, 0, metric] - means[other, 0, metric], abs=0.011)
        assert mean["low"] <= mean["value"] <= mean["high"] and 0 < mean["p"] <= 1
        if other != "teacher":
            assert row in plain["comparisons"]
    for page in (folder / "report.html", folder / "adapter" / "README.md"):
        assert all(name in page.read_text() for name in names), page
    # the rest is as it was, and with the setting off again all of it
    assert {key: value for key, value in contents(folder).items() if key in before} | {
        "count": before["count"]
    } == before
    assert open_run(telling, folder, *settings).execute() == plain


@pytest.mark.parametrize(
    ("settings", "same"),
    [
        (["tune.budget=teacher", "tune.batch=2", "retrieval.mode='off'"], "teacher"),
        (["teacher.enabled=false", "filter.enabled=false"], None),
    ],
)
def test_no_teacher_beside_a_control_that_it_is_nor_where_there_is_none(tiny, tmp_path, settings, same):
    settings = ["evaluate.teacher=true", "evaluate.limit=1", *settings]
    result = open_run(tiny, tmp_path / "run", *settings).execute(until="evaluate")
    with Ledger(tmp_path / "run" / "ledger.sqlite") as ledger:
        assert ledger.stages()["control"].info.get("same_as") == same
    assert list(result["systems"]) == ["base", "seeds", "expert"] and "teacher_epochs" not in result["setting"]
    assert systems_table(result)[0] == ("task", "base, 0-shot", "seeds alone, 0-shot", "expert, 0-shot")


def test_held_out_seeds_decide_which_round_is_taken(tiny, tmp_path):
    settings = ["rounds=3", "holdout=0.25", "tune.teacher_epochs=2", "evaluate.limit=1", "evaluate.seeds_only=false"]
    run = open_run(tiny, tmp_path / "run", *settings, "retrieval.mode='off'")
    said = []
    run.reporter.say = said.append
    assert {s.output for s in run.held_out} <= {"yes", "no"} and len(run.held_out) + len(run.seeds) == 8
    assert len(run.held_out) == 2
    result = run.execute(until="evaluate")
    with Ledger(tmp_path / "run" / "ledger.sqlite") as ledger:
        stages, items = ledger.stages(), ledger.items()
    assert stages["teacher"].info["num_examples"] == 6 and stages["teacher"].info["num_val_examples"] == 2
    losses = [stages[name].info["held_out_loss"] for name in ("tune", "tune-2", "tune-3") if name in stages]
    assert len(losses) == (2 if losses[1] >= losses[0] else 3)
    assert any("round 3 is left out" in text for text in said) == (len(losses) == 2)
    taken = losses.index(min(losses)) + 1
    assert result["rounds"]["taken"] == taken and list(result["rounds"]["held_out_loss"].values()) == losses
    file = "adapter_model.safetensors"
    adapter = (tmp_path / "run" / "adapter" / file).read_bytes()
    assert adapter == (tmp_path / "run" / "rounds" / str(taken) / file).read_bytes()
    assert set(result["systems"]) == {"base", "expert"} | {
        f"round {i + 1}" for i in range(len(losses)) if i + 1 != taken
    }
    shown = {seed.id for seed in run.held_out}
    assert not any(shown & set(item.provenance.get("seeds", [])) for item in items)


def front_matter(path):
    _, front, page = path.read_text().split("---\n", 2)
    return yaml.safe_load(front), page


def test_datasets_loads_the_export(finished, tmp_path):
    """The library itself, where it is installed (it is no test dependency, for its weight): the rows by default."""
    datasets = pytest.importorskip("datasets")
    export(finished[0], tmp_path / "rows", seeds=True)
    kept = len((finished[0] / "dataset.jsonl").read_text().splitlines())
    cache = str(tmp_path / "cache")
    rows = datasets.load_dataset(str(tmp_path / "rows"), split="train", cache_dir=cache)
    chats = datasets.load_dataset(str(tmp_path / "rows"), "chat", split="train", cache_dir=cache)
    assert len(rows) == len(chats) == kept + 8
    assert [chat["messages"][1]["content"] for chat in chats] == rows["output"][:]


def test_the_data_set_reads_the_same_in_every_format(finished, tiny, tmp_path):
    folder, _ = finished
    kept = [json.loads(line) for line in (folder / "dataset.jsonl").read_text().splitlines()]
    export(folder, tmp_path / "rows", seeds=True)
    front, page = front_matter(tmp_path / "rows" / "README.md")
    # one format for all configurations, since `datasets` picks one reader for a folder, and one of them the default
    assert [(c["config_name"], c.get("default", False)) for c in front["configs"]] == [("rows", True), ("chat", False)]
    files = {c["config_name"]: tmp_path / "rows" / c["data_files"] for c in front["configs"]}
    table = pyarrow.parquet.read_table(files["rows"]).to_pylist()
    assert table == pyarrow.json.read_json(files["rows"].with_suffix(".jsonl")).to_pylist()
    assert [r["source"] for r in table[:8]] == ["seed"] * 8
    for row, original in zip(table[8:], kept, strict=True):
        assert {k: row[k] for k in ("id", "instruction", "input", "output", "task")} == {
            k: original[k] for k in ("id", "instruction", "input", "output", "task")
        }
        provenance = json.loads(row["provenance"])
        assert provenance["documents"] == original["provenance"]["documents"]
        assert provenance["model"] == "model"
    chats = pyarrow.parquet.read_table(files["chat"]).to_pylist()
    assert chats == pyarrow.json.read_json(files["chat"].with_suffix(".jsonl")).to_pylist()
    for chat, row in zip(chats, table, strict=True):
        user, assistant = chat["messages"]
        assert (user["role"], assistant) == ("user", {"role": "assistant", "content": row["output"]})
        assert user["content"].startswith(row["instruction"]) and user["content"].endswith(row["input"])
    assert front["size_categories"] == ["n<1K"]
    assert f"{len(table)} rows" in page and str(tiny.folder) not in page
    export(folder, tmp_path / "chats", ["chat"])
    front, _ = front_matter(tmp_path / "chats" / "README.md")
    assert front["configs"] == [{"config_name": "chat", "data_files": "chat/train.jsonl", "default": True}]
    with pytest.raises(InputError, match="not empty"):
        export(folder, tmp_path / "rows")
    with pytest.raises(InputError, match="allowed: parquet, jsonl, chat"):
        export(folder, tmp_path / "more", ["csv"])
    with pytest.raises(InputError, match="no run folder"):
        export(tmp_path, tmp_path / "more")
    assert not (tmp_path / "more").exists()


def test_the_adapter_s_card_tells_the_run_s_numbers(finished):
    folder, result = finished
    front, page = front_matter(folder / "adapter" / "README.md")
    assert (front["library_name"], front["base_model"]) == ("peft", "model")
    with Ledger(folder / "ledger.sqlite") as ledger:
        info = ledger.stages()["tune"].info
    assert f"{info['steps']:,} steps on {info['num_examples']:,} rows, {info['tokens']:,} tokens" in page
    mean = next(m for m in result["systems"]["expert"]["means"] if m["metric"] == "token_f1")
    assert f"{mean['value']:.1f}" in page and "seeds alone" in page
    assert str(folder) not in page


def test_the_report_needs_no_network(finished):
    text = (finished[0] / "report.html").read_text()
    assert text.count("<svg") >= 4
    assert not re.search(r'(?:src|href)="(?!#)', text.replace("xlink:href", "x").replace("xmlns", "x"))
    assert "url(http" not in text
    assert "seeds alone" in text


def test_a_second_run_does_nothing_twice(finished, tiny, monkeypatch):
    folder, result = finished
    before = contents(folder)
    monkeypatch.setattr(Run, "generator", property(lambda self: Stub()))
    again = open_run(tiny, folder).execute()
    assert json.dumps(again) == json.dumps(result)
    assert contents(folder) == before


class Stub:
    """Has what planning an evaluation asks for, and cannot generate."""

    def __init__(self):
        from specialize.engine.config import ModelConfig
        from specialize.engine.tokenizer import Tokenizer

        folder = Stub.folder
        self.tokenizer = Tokenizer.from_pretrained(folder)
        self.model = type("Model", (), {"config": ModelConfig.from_folder(folder)})

    folder: str = ""


@pytest.fixture(autouse=True)
def _stub_folder(tiny):
    Stub.folder = tiny.inputs["model"]


def killed_at(target, name, calls, when):
    """Patch a method so that the process kills itself at the given call of it, before or after the work."""
    original = getattr(target, name)
    seen = 0

    def wrapper(*args, **kwargs):
        nonlocal seen
        seen += 1
        if seen == calls and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if seen == calls:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(target, name, wrapper)


def run_in_child(tiny, folder, *point):
    child = os.fork()
    if child == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            killed_at(*point)
            open_run(tiny, folder).execute()
            os._exit(0)
        except BaseException:  # noqa: BLE001, a child that goes on as pytest would be worse
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_killed_runs_end_like_an_undisturbed_one(finished, tiny, tmp_path):
    from specialize.train.loop import Trainer

    from specialize import pipeline

    folder = tmp_path / "killed"
    points = [
        (pipeline, "write_recipe", 1, "before"),
        (Trainer, "train_step", 7, "after"),
        (Ledger, "add_items", 2, "after"),
        (Ledger, "add_reply", 2, "after"),
        (Ledger, "add_reply", 13, "before"),
        (Ledger, "decide", 1, "before"),
        (Ledger, "decide", 1, "after"),
        (Trainer, "train_step", 2, "after"),
        (Ledger, "add_reply", 5, "before"),
        (pipeline, "write_text", 1, "after"),
    ]
    for point in points:
        assert run_in_child(tiny, folder, *point) == -signal.SIGKILL, point[1:]
    open_run(tiny, folder).execute()
    assert contents(folder) == contents(finished[0])


def test_changed_settings_say_what_they_redo(finished, tiny, tmp_path):
    import shutil

    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    changed = open_run(tiny, folder, "filter.min_words=2", "tune.rank=4")
    with pytest.raises(InputError) as caught:
        changed.execute()
    message = str(caught.value)
    assert "filter.min_words: 1 → 2" in message
    assert "tune.rank: 8 → 4" in message
    assert "teacher, instructions, responses, filter, tune, control" in message
    assert "--redo" in message
    with pytest.raises(InputError, match=r"this redoes filter, tune\. Add"):
        open_run(tiny, folder, "filter.min_words=2").execute()
    open_run(tiny, folder, "evaluate.limit=3").execute(until="evaluate")  # nothing that was made is lost
    open_run(tiny, folder, "filter.min_words=2").execute(redo=True)
    with Ledger(folder / "ledger.sqlite") as ledger:
        assert {name for name, s in ledger.stages().items() if s.done} >= {"teacher", "instructions", "filter", "tune"}
    assert read_recipe(folder / "recipe.yaml")[0].filter.min_words == 2


def test_the_cache_s_format_is_the_run_s_and_part_of_what_was_made(finished, tiny, tmp_path):
    plain, small = open_run(tiny, tmp_path / "a"), open_run(tiny, tmp_path / "b", "kv_dtype=int8")
    assert small.generator.cache.layer(0)[0].dtype == torch.int8
    answered = ("teacher", "instructions", "responses")
    assert all("kv_dtype" not in plain.settings_of()[stage] for stage in answered), "older runs resume"
    assert all(small.settings_of()[stage]["kv_dtype"] == "int8" for stage in answered)
    with pytest.raises(InputError, match=r"kv_dtype is 'int3'.*allowed: auto"):
        open_run(tiny, tmp_path / "c", "kv_dtype=int3")


def test_a_second_round_is_answered_by_the_first_expert(finished, tiny, tmp_path):
    import shutil

    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    result = open_run(tiny, folder, "rounds=2").execute()
    assert set(result["systems"]) == {"base", "seeds", "round 1", "expert"}
    with Ledger(folder / "ledger.sqlite") as ledger:
        second = ledger.items(round=2)
        assert {i.provenance["from"] for i in second} <= {i.id for i in ledger.items(round=1)}
        reply = ledger.replies("response")[second[0].id][0]
        assert reply.provenance["adapter"] == str(folder / "rounds" / "1") and "contrast" not in reply.provenance
        raw = [r.raw for i in second for r in ledger.replies("response")[i.id]]
    apart = open_run(tiny, folder, "rounds=2", "responses.contrast=0.5")
    assert "responses.contrast" not in apart.settings_of()["responses"], "the first round is as it was"
    apart.execute(redo=True)
    with Ledger(folder / "ledger.sqlite") as ledger:
        replies = ledger.replies("response")
        assert {reply.provenance["contrast"] for i in second for reply in replies[i.id]} == {0.5}
        assert [r.raw for i in second for r in replies[i.id]] != raw
    shown = open_run(tiny, folder, "rounds=2", "responses.shots=2")
    assert shown.settings_of()["responses"] == apart.settings_of()["responses"]
    shown.execute(redo=True)
    with Ledger(folder / "ledger.sqlite") as ledger:
        replies = ledger.replies("response")
        assert {len(replies[i.id]) for i in second} == {1 + 2 * shown.recipe.responses.samples}
        assert {r.raw for i in second for r in replies[i.id][:1]} <= set(raw), "asked alone it says what it said"
    open_run(tiny, folder, "rounds=1").execute(redo=True)
    same = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    assert same == (finished[0] / "adapter" / "adapter_model.safetensors").read_bytes()


def test_a_folder_is_for_one_run_at_a_time(tiny, tmp_path):
    with run_lock(tmp_path / "run"), pytest.raises(InputError, match="another run"):
        open_run(tiny, tmp_path / "run").execute()


def test_inputs_are_checked_before_any_work(tiny, tmp_path):
    with pytest.raises(InputError, match="no such file"):
        open_run(tiny, tmp_path / "a", corpus=str(tmp_path / "nothing"))
    with pytest.raises(InputError, match="asks for 5"):
        open_run(tiny, tmp_path / "a", "evaluate.shots=[5]")
    assert not (tmp_path / "a").exists()


def test_shots_are_dropped_until_a_prompt_fits(tiny):
    from specialize.engine.tokenizer import Tokenizer

    from specialize.evaluate import fit_prompt
    from specialize.records import read_tasks

    [task] = read_tasks(tiny.inputs["tasks"])
    tokenizer = Tokenizer.from_pretrained(tiny.inputs["model"])
    text = task.examples[0].input

    def fit(limit):
        return fit_prompt(tokenizer, task, text, 2, max_context=limit, max_tokens=4)

    sizes = [
        len(tokenizer.encode(fit_prompt(tokenizer, task, text, n, max_context=9999, max_tokens=4)[0]))
        for n in (0, 1, 2)
    ]
    assert [fit(size + 4)[1:] for size in sizes] == [(0, False), (1, False), (2, False)]
    assert [fit(size + 3)[1] for size in sizes[1:]] == [0, 1]
    prompt, used, cut = fit(sizes[0] + 3)
    assert (used, cut) == (0, True)
    assert len(tokenizer.encode(prompt)) + 4 <= sizes[0] + 3
    with pytest.raises(InputError, match="its instruction alone"):
        fit(8)


def test_no_evaluation_question_among_the_rows(finished, tiny):
    from specialize.filter import EvaluationOverlap
    from specialize.records import read_tasks

    overlap = EvaluationOverlap(read_tasks(tiny.inputs["tasks"]), 8)
    for line in Path(finished[0] / "dataset.jsonl").read_text().splitlines():
        assert not overlap.hits(json.loads(line)["input"])


def test_seed_kinds_without_a_task_field_go_by_instruction(tmp_path):
    from specialize.kinds import kinds_of

    rows = [
        Seed(f"s{i}", f"Do {i % 2}.", f"Do {i % 2}.", f"text {i} of some length here for it", "yes") for i in range(6)
    ]
    assert [len(k.seeds) for k in kinds_of(rows)] == [3, 3]


def test_a_run_of_an_earlier_version_goes_on_with_large_inputs(tiny, tmp_path, monkeypatch):
    model = shutil.copytree(tiny.inputs["model"], tmp_path / "model")
    (model / "large").write_bytes(bytes(9 << 20))
    with monkeypatch.context() as patch:  # which took both ends of a large file for the whole
        patch.setattr(pipeline, "file_fingerprint", lambda path: file_fingerprint(path, whole=False))
        open_run(tiny, tmp_path / "run", model=str(model)).execute(until="teacher")
    open_run(tiny, tmp_path / "run", model=str(model)).execute(until="teacher")
    (model / "large").write_bytes(b"\1" + bytes((9 << 20) - 1))
    with pytest.raises(InputError, match=r"model: \w+ → \w+.*--redo"):
        open_run(tiny, tmp_path / "run", model=str(model)).execute(until="teacher")
