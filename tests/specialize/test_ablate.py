"""Ablations: a variant that shares stages is the run that would have been made alone; what is equal is made once."""

import json
import shutil

import pytest
from test_pipeline import contents

from specialize import cli, evaluate
from specialize.ablate import REFERENCE, Variant, ablate, folder_name, read_variants, variants_of, vary
from specialize.errors import InputError
from specialize.evaluate import compare
from specialize.pipeline import Run
from specialize.progress import Reporter
from specialize.recipe import Recipe, override, read_recipe

VARIANTS = [
    Variant("no retrieval", {"retrieval.mode": "off"}),
    Variant("no filter", {"filter.enabled": False, "evaluate.seeds_only": True}),
    Variant("one answer", {"responses.samples": 0}),
    Variant("lower rank", {"tune.rank": 4, "evaluate.seeds_only": True}),
    Variant("no seeds", {"tune.include_seeds": False}),
    Variant("two rounds", {"rounds": 2}),
    Variant("nothing changed", {"tune.rank": 8}),
]


def opener(tiny, log=None):
    class Logged(Run):
        def _train(self, label, *args, **kwargs):
            if log is not None:
                log.append((self.folder.name, label))
            return super()._train(label, *args, **kwargs)

    return lambda recipe, folder, donors: Logged(
        folder, recipe, tiny.inputs, reporter=Reporter(mute=True), donors=donors
    )


@pytest.fixture(scope="module")
def ablation(tiny, tmp_path_factory):
    out, log, asked = tmp_path_factory.mktemp("ablation") / "out", [], []
    recipe = override(read_recipe(tiny.recipe)[0], ["evaluate.base_shots=[0, 1, 2]"])
    ask = evaluate.run_jobs

    def counting(generator, jobs, ledger, **more):
        asked.extend(job for job in jobs if more["origin"]["system"] == "base")
        return ask(generator, jobs, ledger, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "run_jobs", counting)
        result = ablate(opener(tiny, log), recipe, VARIANTS, out)
    return out, recipe, result, log, len(asked)


def test_each_variant_is_the_run_made_alone(ablation, tiny, tmp_path):
    out, recipe, *_ = ablation
    for variant, chosen in variants_of(recipe, VARIANTS):
        alone = tmp_path / folder_name(variant.name)
        opener(tiny)(chosen, alone, []).execute(until="evaluate")
        assert contents(out / folder_name(variant.name)) == contents(alone), variant.name


def test_what_is_equal_is_made_once(ablation):
    out, _, result, log, asked = ablation
    trained = {}
    for run, label in log:
        trained.setdefault(run, []).append(label.split()[0])
    folders = {v.name: folder_name(v.name) for v in VARIANTS}
    assert trained[REFERENCE][0] == "teacher"
    for name in ("no filter", "one answer", "no seeds", "two rounds"):
        assert "teacher" not in trained[folders[name]], name
    assert trained[folders["lower rank"]][0] == "teacher"  # its settings are the tuning's
    assert trained[folders["two rounds"]].count("tune") == 1  # the first round is the reference's
    assert folders["nothing changed"] not in trained and not (out / folders["nothing changed"]).exists()
    rows = {row["name"]: row for row in result["rows"]}
    assert {"index", "teacher", "instructions", "responses"} <= set(rows["no filter"]["taken_over"])
    assert "responses" not in rows["one answer"]["taken_over"]
    assert asked == 3 * 4  # the base is scored once: 0, 1 and 2 shots, four examples


def test_the_table_says_what_the_runs_say(ablation, tiny):
    out, _, result, *_ = ablation
    assert json.loads((out / "ablation.json").read_text()) == result
    names = [row["name"] for row in result["rows"]]
    assert names[:3] == ["base", "seeds alone, equal tokens", REFERENCE]
    assert set(names[3:]) == {v.name for v in VARIANTS} - {"nothing changed"}
    assert {m["shots"] for m in result["rows"][0]["means"]} == {0, 1, 2}
    reports = {}
    for name in (REFERENCE, folder_name("no seeds")):
        run = Run(out / name, read_recipe(out / name / "recipe.yaml")[0], tiny.inputs, reporter=Reporter(mute=True))
        run.execute(until="evaluate")
        reports[name] = run.reports["expert"]
    row = next(row for row in result["rows"] if row["name"] == "no seeds")
    wanted = compare(reports[folder_name("no seeds")], reports[REFERENCE], 0, "token_f1")
    assert row["against_recipe"][0] == wanted
    assert 0 < wanted["mean"]["p"] <= 1
    page = (out / "ablation.md").read_text()
    table = [line for line in page.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    assert len(table) == 2 + len(result["rows"]) + 2  # head, rule, rows, and the base at two more numbers of shots


def test_the_teacher_is_the_recipe_s_control_too(ablation, tiny, tmp_path):
    """Asked for later it is scored, nothing is trained; variants score none unless they ask for it."""
    out, recipe, before, *_ = ablation
    shutil.copytree(out, tmp_path / "out")
    asking = Variant("one answer", {"responses.samples": 0, "evaluate.teacher": True})
    log, chosen = [], [VARIANTS[1], asking]
    result = ablate(opener(tiny, log), override(recipe, ["evaluate.teacher=true"]), chosen, tmp_path / "out")
    assert log == []
    names = [row["name"] for row in result["rows"]]
    controls = ["base", "seeds alone, 6 epochs", "seeds alone, equal tokens"]
    assert names == [*controls, REFERENCE, "no filter", "one answer"]
    rows, old = ({row["name"]: row for row in found["rows"]} for found in (result, before))
    assert all(rows[name]["means"] == old[name]["means"] for name in names if name in old)
    assert rows[REFERENCE]["against_seeds"] == old[REFERENCE]["against_seeds"]
    scored = {
        name: json.loads((tmp_path / "out" / folder_name(name) / "eval.json").read_text())["systems"]
        for name in names[3:]
    }
    assert ["teacher" in systems for systems in scored.values()] == [True, False, True]
    means = [m for m in scored[REFERENCE]["teacher"]["means"] if m["metric"] != "rouge_l"]
    assert rows["seeds alone, 6 epochs"]["means"] == means
    told = {c["metric"]: c["mean"]["value"] for c in rows[REFERENCE]["against_teacher"]}
    expert = {m["metric"]: m["value"] for m in scored[REFERENCE]["expert"]["means"]}
    assert told == {m["metric"]: pytest.approx(expert[m["metric"]] - m["value"], abs=0.011) for m in means}
    assert "| seeds alone, 6 epochs |" in (tmp_path / "out" / "ablation.md").read_text()


def test_a_killed_ablation_goes_on(ablation, tiny, tmp_path, monkeypatch):
    _, recipe, result, *_ = ablation
    chosen, log = [VARIANTS[1], VARIANTS[4]], []
    start = opener(tiny, log)

    def killing(recipe, folder, donors):
        run = start(recipe, folder, donors)
        if folder.name == folder_name("no seeds"):
            monkeypatch.setattr(run, "_do_tune", interrupt)
        return run

    def interrupt(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ablate(killing, recipe, chosen, tmp_path / "out")
    before = len(log)
    again = ablate(start, recipe, chosen, tmp_path / "out")
    assert [run for run, _ in log[before:]] == [folder_name("no seeds")] * len(log[before:])

    def scores(found):
        return {r["name"]: (r["means"], r.get("against_recipe")) for r in found["rows"]}

    whole = scores(result)
    assert all(whole[name] == value for name, value in scores(again).items())


def test_a_variant_that_keeps_nothing_says_so(tiny, tmp_path):
    recipe = read_recipe(tiny.recipe)[0]
    hopeless = Variant("too strict", {"filter.min_words": 199, "instructions.novel": 1.0})
    found = ablate(opener(tiny), recipe, [hopeless], tmp_path)
    row = found["rows"][-1]
    assert "no candidate passed the filter" in row["failed"]
    assert "not finished" in (tmp_path / "ablation.md").read_text()


def test_damaged_files_of_another_run_are_not_taken(ablation, tiny, tmp_path):
    out, recipe, *_ = ablation
    log = []
    weights = tmp_path / "donor"
    opener(tiny)(recipe, weights, [out / REFERENCE]).execute(until="teacher")
    file = weights / "teacher" / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    file.unlink()  # a link: the donor's own file stays as it is
    content[-1] ^= 1
    file.write_bytes(content)
    opener(tiny, log)(recipe, tmp_path / "run", [weights]).execute(until="teacher")
    assert [label for _, label in log] == ["teacher"]
    assert (tmp_path / "run/teacher/adapter_model.safetensors").read_bytes() == (
        out / REFERENCE / "teacher/adapter_model.safetensors"
    ).read_bytes()


def test_combinations_and_names():
    found = vary(["retrieval.mode=off,hybrid", "filter.enabled=true,false", "evaluate.shots=[0,5]"])
    assert len(found) == 4
    assert found[0].settings == {"retrieval.mode": False, "filter.enabled": True, "evaluate.shots": [0, 5]}
    kept = variants_of(Recipe(), found)
    assert [recipe.retrieval.mode for _, recipe in kept] == ["off", "off", "hybrid", "hybrid"]
    assert len({folder_name(v.name) for v in found}) == 4
    assert len(variants_of(Recipe(), read_variants())) == 6


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--vary", "tune.rank"], "--vary tune.rank: write it as"),
        (["--vary", "tune.rank=4", "--vary", "tune.rank=8"], "tune.rank is given twice"),
        (["--vary", "tune.ranks=4"], 'unknown setting "tune.ranks"'),
        (["--vary", "tune.rank=0,8"], "variant tune.rank=0: tune.rank is 0; allowed: 1 to 1024"),
        (["--vary", "tune.rank=8"], "no variant differs from the recipe"),
        (["--vary", "tune.rank=8", "--list", "x"], "--vary or --list, not both"),
        (["--list", "nowhere.yaml"], "--list nowhere.yaml: No such file"),
    ],
)
def test_wrong_use_is_one_line(tiny, tmp_path, capsys, options, says):
    inputs = [x for name, path in tiny.inputs.items() for x in (f"--{name}", path)]
    with pytest.raises(SystemExit, match="2"):
        cli.main(["ablate", *inputs, "--recipe", str(tiny.recipe), "--out", str(tmp_path / "out"), *options])
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1
    assert not (tmp_path / "out" / REFERENCE / "ledger.sqlite").exists()


def test_by_command(tiny, tmp_path, capsys):
    inputs = [x for name, path in tiny.inputs.items() for x in (f"--{name}", path)]
    options = ["--recipe", str(tiny.recipe), "--out", str(tmp_path / "out"), "--quiet", "--examples", "6"]
    with pytest.raises(SystemExit, match="0"):
        cli.main(["ablate", *inputs, *options, "--vary", "tune.rank=4,8"])
    first = capsys.readouterr().out
    assert "tune.rank=4" in first and "seeds alone" in first and "ablation.md" in first
    with pytest.raises(SystemExit, match="0"):
        cli.main(["ablate", "--out", str(tmp_path / "out"), "--quiet", "--vary", "tune.rank=4", "--json"])
    assert json.loads(capsys.readouterr().out)["rows"][-1]["name"] == "tune.rank=4"


def test_a_list_that_is_none(tmp_path):
    for text in ("", "- a", "a: 3", "a: {b: [", "a: {}"):
        (tmp_path / "list.yaml").write_text(text)
        with pytest.raises(InputError, match=r"list\.yaml"):
            read_variants(tmp_path / "list.yaml")
