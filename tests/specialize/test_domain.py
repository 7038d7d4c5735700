"""A folder that ``specialize init`` writes: refused until it is filled in, then run."""

import json
import shutil
from pathlib import Path

import pytest

from specialize import domain
from specialize.cli import main
from specialize.errors import InputError
from specialize.kinds import kinds_of
from specialize.recipe import read_recipe, shipped
from specialize.records import read_seeds, read_tasks


def run(*arguments):
    with pytest.raises(SystemExit) as stopped:
        main([str(a) for a in arguments])
    return stopped.value.code


def test_init_then_run_says_what_to_fill_in_then_runs(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run("init", "animals") == 0
    folder = tmp_path / "animals"
    assert "fill in: seeds" in capsys.readouterr().out
    assert run("run", "--recipe", "animals/recipe.yaml", "--out", "animals/run") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    for place in ("seeds.jsonl:1 still says", "example.json:3 still says", "corpus is empty"):
        assert place in said
    assert not (folder / "run").exists()

    for name in ("seeds", "tasks"):
        source = tiny.inputs[name]
        shutil.rmtree(folder / name, ignore_errors=True)
        (shutil.copytree if name == "tasks" else shutil.copy)(source, folder / domain.INPUT_FILES[name])
    rows = [json.loads(line) for line in Path(tiny.inputs["corpus"]).read_text().splitlines()]
    for row in rows:
        (folder / "corpus" / f"{row['id']}.txt").write_text(row["text"])
    settings = "retrieval.mode=bm25 examples=4 responses.samples=1 responses.max_tokens=4 filter.min_agreement=0.0 "
    settings += "tune.learning_rate=2e-2 tune.teacher_epochs=6 tune.epochs=1 tune.schedule=constant evaluate.limit=2 "
    settings += "tune.rank=8 tune.alpha=16 evaluate.seeds_only=false evaluate.max_tokens=4"
    options = [part for text in settings.split() for part in ("--set", text)]
    arguments = ["run", "--recipe", "animals/recipe.yaml", "--model", tiny.inputs["model"], "--out", "animals/run"]
    assert run(*arguments, "--dtype", "fp32", "--quiet", *options) == 0, capsys.readouterr().err
    assert (folder / "run" / "report.html").is_file()
    assert read_recipe(folder / "run" / "recipe.yaml")[1]["seeds"] == str(folder / "seeds.jsonl")


def test_the_template_is_the_recipe_small(tmp_path):
    recipe, inputs = read_recipe(domain.create("geology", tmp_path / "there") / "recipe.yaml")
    small = read_recipe("small")[0].to_dict()
    assert recipe.to_dict() == small | {"name": "geology", "description": "An expert on geology."}
    there = tmp_path / "there"
    assert inputs == {"model": "smollm2-135m-instruct"} | {k: str(there / v) for k, v in domain.INPUT_FILES.items()}
    assert len(read_tasks(inputs["tasks"])[0].shots) == 1


@pytest.mark.parametrize("name", ["finance", "biomed"])
def test_shipped_domains_come_with_seeds(name, tmp_path):
    folder = domain.create(name, tmp_path / name)
    assert read_recipe(folder / "recipe.yaml")[0] == read_recipe(shipped()[name])[0]
    assert (folder / "seeds.jsonl").read_text() == Path(read_recipe(name)[1]["seeds"]).read_text()
    todo = domain.unfilled(read_recipe(folder / "recipe.yaml")[1])
    assert [text.split()[0] for text in todo] == ["tasks", "corpus"]


def test_finance_seeds_are_seen_as_what_they_are():
    forms = {kind.name: kind.form for kind in kinds_of(read_seeds(read_recipe("finance")[1]["seeds"]))}
    assert forms["sentiment"] == forms["support"] == forms["accounts"] == "label"
    assert (forms["entities"], forms["amounts"], forms["calculate"]) == ("entities", "list", "text")


def test_init_does_not_write_over_anything(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="not empty"):
        domain.create("x", tmp_path)
    for bad in ("../x", "", "a b", "-x"):
        with pytest.raises(InputError, match="letters, digits"):
            domain.create(bad, tmp_path / "new")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
