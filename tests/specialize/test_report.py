"""Reports: whole HTML without anything from outside, saying what eval.json says; comparisons with mean and spread."""

import json
import re
import shutil
import statistics
from html.parser import HTMLParser

import numpy as np
import pytest

from specialize import cli
from specialize.comparison import _read, compare_runs
from specialize.controls import control_names
from specialize.evaluate import EvalReport, Scores, compare_pooled, telling_examples
from specialize.ledger import Ledger
from specialize.pipeline import Run
from specialize.progress import Reporter
from specialize.recipe import override, read_recipe
from specialize.repeats import remembered_reports, seed_groups
from specialize.report import _headline, write_report

VOID = {"meta", "br", "hr", "img", "input", "link", "col", "path", "use", "rect", "circle", "line", "polyline"}


class Structure(HTMLParser):
    """Checks that elements close in order, and gathers ids, links and text."""

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.links, self.outside, self.text = [], [], [], [], []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id" and "svg" not in self.open:
                self.ids.append(value)
            if name in ("href", "src") and "svg" not in self.open:
                (self.links if value.startswith("#") else self.outside).append(value)

    def handle_startendtag(self, tag, attrs):
        if tag not in VOID:
            self.handle_starttag(tag, attrs)
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open and self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data):
        self.text.append(data)


def parsed(path):
    page = path.read_text(encoding="utf-8")
    found = Structure()
    found.feed(page)
    found.close()
    assert found.open == []
    assert found.outside == [] and set(found.links) <= {f"#{i}" for i in found.ids}
    assert len(set(found.ids)) == len(found.ids)
    assert "<script" not in page and "url(http" not in page and "@import" not in page
    assert '<meta name="viewport"' in page
    return " ".join(" ".join(found.text).split())


@pytest.fixture(scope="module")
def seeds(tiny, tmp_path_factory):
    """Three runs that differ in their random seed, and one in its rank."""
    folder = tmp_path_factory.mktemp("seeds")
    recipe = read_recipe(tiny.recipe)[0]
    changes = {"s0": ["seed=0"], "s1": ["seed=1"], "s2": ["seed=2"], "rank": ["tune.rank=4"]}
    for name, settings in changes.items():
        settings = [*settings, "evaluate.shots=[0, 1]", "evaluate.base_shots=[2]"]
        Run(folder / name, override(recipe, settings), tiny.inputs, reporter=Reporter(mute=True)).execute()
    return folder


def test_the_report_reads_like_a_paper(seeds):
    text = parsed(seeds / "s0" / "report.html")
    found = json.loads((seeds / "s0" / "eval.json").read_text())
    order = ["Result", "Question and setting", "Scores by task", "Controls", "How the training rows", "Cost and speed"]
    places = [text.index(name, text.index("Mean 0-shot")) if name != "Result" else text.index(name) for name in order]
    assert places == sorted(places)
    mean = next(m for m in found["systems"]["expert"]["means"] if (m["shots"], m["metric"]) == (0, "token_f1"))
    assert f"{mean['value']:.1f}" in text
    base = next(m for m in found["systems"]["base"]["means"] if (m["shots"], m["metric"]) == (2, "token_f1"))
    assert f"The base with 2 examples in its prompt reaches {base['value']:.1f}" in text
    assert "from 8 seed tasks" in text and "awake (6 examples, the first 4 used)" in text
    against = next(
        c for c in found["comparisons"] if (c["against"], c["metric"], c["shots"]) == ("seeds", "token_f1", 0)
    )
    assert f"the expert differs by {against['mean']['value']:+.1f} points" in text
    assert "Rounds" not in text


def test_examples_show_gains_and_losses(seeds, tiny):
    recipe = read_recipe(seeds / "s0" / "recipe.yaml")[0]
    run = Run(seeds / "s0", recipe, tiny.inputs, reporter=Reporter(mute=True))
    found = run.execute(until="evaluate")["examples"]
    expert, base = run.reports["expert"], run.reports["base"]
    assert found == telling_examples(expert, base, run.tasks, 0)
    after, before = (r.of(0)[0].rows["token_f1"][:, 0] for r in (expert, base))
    for example in found:
        i = example["example"]
        assert example["token_f1"] == [round(100 * before[i], 2), round(100 * after[i], 2)]
        assert example["after"] == expert.of(0)[0].replies[i]
        assert example["input"] == run.tasks[0].examples[i].input
        assert (after[i] > before[i]) if example["verdict"] == "good" else after[i] < 1
    assert len({e["example"] for e in found}) == len(found)
    assert [e for e in found if e["verdict"] == "bad"]


def test_hostile_text_stays_text(seeds, tmp_path):
    shutil.copytree(seeds / "s0", tmp_path / "run")
    path = tmp_path / "run" / "eval.json"
    found = json.loads(path.read_text())
    for example in found["examples"]:
        example["after"] = "</div><script>alert(1)</script>{{ 7 * 7 }}"
    path.write_text(json.dumps(found))
    page = write_report(tmp_path / "run").read_text()
    assert "&lt;script&gt;alert(1)" in page and "{{ 7 * 7 }}" in page
    parsed(tmp_path / "run" / "report.html")


def test_the_gain_at_the_top_is_that_of_the_scores_beside_it(seeds):
    found = json.loads((seeds / "s0" / "eval.json").read_text())
    before = _headline(found)
    more = [c | {"shots": 5, "mean": c["mean"] | {"value": 99.0}} for c in found["comparisons"]]
    assert _headline(found | {"comparisons": found["comparisons"] + more}) == before
    assert _headline(found | {"comparisons": more})["against"] == {}


def test_a_setting_that_an_older_run_does_not_name_is_its_default(seeds, tmp_path):
    for name in ("s0", "s1"):
        shutil.copytree(seeds / name, tmp_path / name)
    path = tmp_path / "s0" / "recipe.yaml"
    text = path.read_text()
    assert "  teacher: false\n" in text
    path.write_text(text.replace("  teacher: false\n", ""))
    found = compare_runs([tmp_path / "s0", tmp_path / "s1"], tmp_path / "page.html")
    assert [row["setting"] for row in found["differing"]] == ["seed"]
    assert [group["runs"] for group in found["seeds"]] == [["s0", "s1"]]


def test_runs_of_several_seeds_are_taken_together(seeds, tmp_path):
    folders = [seeds / name for name in ("s0", "s1", "s2", "rank")]
    found = compare_runs(folders, tmp_path / "page.html")
    assert [group["runs"] for group in found["seeds"]] == [["s0", "s1", "s2"]]
    evals = [json.loads((folder / "eval.json").read_text()) for folder in folders[:3]]
    for system in ("base", "seeds", "expert"):
        for metric in ("token_f1", "entity_f1"):
            values = [
                next(m["value"] for m in e["systems"][system]["means"] if (m["shots"], m["metric"]) == (1, metric))
                for e in evals
            ]
            name = "seeds alone" if system == "seeds" else system
            row = next(
                r for r in found["seeds"][0]["rows"] if (r["what"], r["shots"], r["metric"]) == (name, 1, metric)
            )
            assert row["values"] == values
            assert row["mean"] == pytest.approx(statistics.fmean(values), abs=0.006)
            assert row["spread"] == pytest.approx(statistics.stdev(values), abs=0.006)
    assert found["differing"] == [
        {"setting": "seed", "values": [0, 1, 2, 0]},
        {"setting": "tune.rank", "values": [8, 8, 8, 4]},
    ]
    text = parsed(tmp_path / "page.html")
    assert "Over 3 random seeds" in text and "tune.rank" in text and "Take care" not in text


@pytest.fixture(scope="module")
def with_teacher(telling, tmp_path_factory):
    """Two runs that differ in their random seed, evaluated with their teachers."""
    folder = tmp_path_factory.mktemp("teacher")
    settings = ["tune.epochs=0.2", "evaluate.limit=0", "evaluate.shots=[0, 1]", "evaluate.teacher=true"]
    for seed in (0, 1):
        recipe = override(read_recipe(telling.recipe)[0], [*settings, f"seed={seed}"])
        Run(folder / f"s{seed}", recipe, telling.inputs, reporter=Reporter(mute=True)).execute()
    return folder


def test_the_report_shows_the_teacher_beside_the_control(with_teacher):
    text = parsed(with_teacher / "s0" / "report.html")
    found = json.loads((with_teacher / "s0" / "eval.json").read_text())
    means = {
        name: next(m["value"] for m in report["means"] if (m["shots"], m["metric"]) == (0, "token_f1"))
        for name, report in found["systems"].items()
    }
    for control, name in (("teacher", "6 epochs"), ("seeds", "equal tokens")):
        assert f"tuned on the seeds alone, {name} {means[control]:.1f}" in text  # its card
        assert f"seeds alone, {name}, 0-shot" in text and f"against the seeds alone, {name}" in text  # table and plots
        assert f"expert − seeds alone, {name}" in text
    row = next(c for c in found["comparisons"] if (c["against"], c["metric"], c["shots"]) == ("teacher", "token_f1", 0))
    said = f"The teacher, tuned on the seeds alone for 6 epochs, reaches {means['teacher']:.1f}: the expert differs by "
    assert f"{said}{row['mean']['value']:+.1f} points" in text
    # what the synthetic rows are worth is told from the stronger control alone
    assert means["teacher"] > means["seeds"]
    assert re.search(r"for as many tokens, the base reaches [^:]*: [^:]*, but this is the weaker of the two", text)
    assert text.count("the weaker of the two") == 1 and text.count("the synthetic rows") == 1


def test_runs_with_their_teachers_beside_runs_without(with_teacher, seeds, tmp_path):
    found = compare_runs([with_teacher / "s0", with_teacher / "s1", seeds / "rank"], tmp_path / "page.html")
    evals = [json.loads((with_teacher / name / "eval.json").read_text()) for name in ("s0", "s1")]
    rows = {(r["what"], r["shots"], r["metric"]): r["values"] for r in found["seeds"][0]["rows"]}
    for metric in ("token_f1", "entity_f1"):
        assert rows["seeds alone, 6 epochs", 1, metric] == [
            next(m["value"] for m in e["systems"]["teacher"]["means"] if (m["shots"], m["metric"]) == (1, metric))
            for e in evals
        ]
    for against, name in (("teacher", "6 epochs"), ("seeds", "equal tokens")):
        assert rows[f"expert − seeds alone, {name}", 0, "token_f1"] == [
            next(
                c["mean"]["value"]
                for c in e["comparisons"]
                if (c["system"], c["against"], c["shots"], c["metric"]) == ("expert", against, 0, "token_f1")
            )
            for e in evals
        ]
    means = [{(m["system"], m["shots"]) for m in run["means"]} for run in found["runs"]]
    assert [("teacher", 0) in told for told in means] == [True, True, False]
    page = (tmp_path / "page.html").read_text()
    text = parsed(tmp_path / "page.html")
    assert "base seeds alone, 6 epochs seeds alone, equal tokens expert against the base" in text
    assert "“Seeds alone, 6 epochs” is the teacher" in text
    assert "against the seeds alone, 6 epochs against the seeds alone, equal tokens" in text
    assert all(row.count("<td") == 8 for row in re.findall(r'<tr><td class="break">.*</tr>', page)[:3])


def test_controls_are_called_by_how_they_differ():
    assert control_names() == {"seeds": "seeds alone"}
    assert control_names(alone="seeds") == {"seeds": "seeds"}
    assert control_names([4.0], alone="seeds") == {
        "teacher": "seeds alone, 4 epochs", "seeds": "seeds alone, equal tokens"
    }  # fmt: skip
    assert [control_names(n)["teacher"] for n in ([1.0], [2.5, 2.5], [4.0, 2.0, 4.0])] == [
        "seeds alone, 1 epoch", "seeds alone, 2.5 epochs", "seeds alone, 2 or 4 epochs"
    ]  # fmt: skip


def test_groups_need_the_same_inputs():
    def run(seed, tasks, **more):
        return {
            "name": f"{seed}", "seed": seed, "settings": {"seed": seed}, "identity": {"tasks": tasks},
            "differences": {}, "means": {("expert", 0): {"value": float(seed)}}, "entity": {}, "teacher_epochs": (),
        } | more  # fmt: skip

    assert seed_groups([run(0, "a"), run(1, "b")]) == []
    assert seed_groups([run(0, "a"), run(0, "a")]) == []
    [group] = seed_groups([run(2, "a"), run(4, "a"), run(1, "b"), run(4, "a", name="again")])
    assert group["runs"] == ["2", "4"]
    assert group["rows"][0] | {"values": 0} == {
        "what": "expert", "shots": 0, "metric": "token_f1", "mean": 3.0, "spread": 1.41, "low": 2.0, "high": 4.0,
        "values": 0,
    }  # fmt: skip
    means = {("round 1", 0): {"value": 7.0}, ("expert", 0): {"value": 9.0}}
    [group] = seed_groups([run(n, "a", means=means) for n in range(3)])
    assert [(row["what"], row["mean"]) for row in group["rows"]] == [("round 1", 7.0), ("expert", 9.0)]


def made_up(draw, sizes):
    """A run's (expert, control): per task random token scores [n, 1] and entity counts [n, 3]."""

    def report():
        found = []
        for task, n in sizes.items():
            wanted, said = draw.integers(1, 5, n), draw.integers(0, 5, n)
            correct = np.minimum(draw.integers(0, 5, n), np.minimum(wanted, said))
            rows = {"token_f1": draw.random((n, 1)), "entity_f1": np.stack([correct, said, wanted], 1).astype(float)}
            found.append(Scores(task, 0, "token_f1", rows, ("",) * n))
        return EvalReport("", None, tuple(found))

    return report(), report()


@pytest.mark.parametrize("metric", ["token_f1", "entity_f1"])
def test_the_interval_over_runs_is_a_bootstrap_of_examples(metric):
    """Against loops that draw examples on their own: both estimate the same bounds, each of 6,000 draws."""
    sizes = {"one": 13, "two": 30}
    draw = np.random.default_rng(7)
    runs = [made_up(draw, sizes) for _ in range(3)]
    found = compare_pooled(runs, 0, metric, resamples=6_000, digits=6)

    def f1(counts):
        correct, said, wanted = counts.sum(0)
        return 2 * correct / (said + wanted)

    score = {"token_f1": lambda rows: rows.mean(), "entity_f1": f1}[metric]

    def difference(task, picks):
        mine, his = ([pair[side].of(0)[task].rows[metric] for pair in runs] for side in (0, 1))
        return np.mean([score(a[picks]) - score(b[picks]) for a, b in zip(mine, his, strict=True)])

    point = [difference(i, np.arange(n)) for i, n in enumerate(sizes.values())]
    assert found["mean"]["value"] == pytest.approx(100 * np.mean(point), abs=1e-5)
    assert [task["value"] for task in found["tasks"]] == pytest.approx([100 * x for x in point], abs=1e-5)
    own = np.random.default_rng(123)
    draws = 100 * np.array(
        [np.mean([difference(i, own.integers(0, n, n)) for i, n in enumerate(sizes.values())]) for _ in range(6_000)]
    )
    # A bound's own standard error: sqrt(0.025 * 0.975 / draws) over a normal density of 0.058 / sd at that place.
    error = np.sqrt(0.025 * 0.975 / 6_000) * draws.std() / 0.0584 * np.sqrt(2)
    assert error < 0.08 * draws.std()
    bounds = (found["mean"]["low"], found["mean"]["high"])
    assert bounds == pytest.approx(tuple(np.percentile(draws, [2.5, 97.5])), abs=4 * error)
    one = compare_pooled(runs[:1], 0, metric, digits=6)["mean"]
    assert one["high"] - one["low"] > 1.3 * (bounds[1] - bounds[0])  # three runs say more than one


def test_scores_of_examples_are_made_again_from_the_ledger(with_teacher, seeds, tmp_path):
    """Per example what the evaluation had, so the difference over runs is the mean of theirs and nothing is asked."""
    for folder in (with_teacher / "s1", seeds / "rank"):
        again = remembered_reports(_read(folder))
        recipe, inputs = read_recipe(folder / "recipe.yaml")
        run = Run(folder, recipe, inputs, reporter=Reporter(mute=True))
        run.execute(until="evaluate")
        assert list(again) == list(run.reports)
        for name, report in run.reports.items():
            ours = {(s.task, s.shots): s for s in again[name].scores}
            assert set(ours) == {(s.task, s.shots) for s in report.scores}
            for scores in report.scores:
                mine = ours[scores.task, scores.shots]
                assert mine.replies == scores.replies
                assert all(np.array_equal(mine.rows[metric], rows) for metric, rows in scores.rows.items())
    folders = [with_teacher / "s0", with_teacher / "s1"]
    found = compare_runs(folders, tmp_path / "page.html")
    [group] = found["seeds"]
    assert group["not_pooled"] == ""
    rows = [row for row in group["rows"] if "against" in row]
    assert {(r["against"], r["shots"], r["metric"]) for r in rows} == {
        (a, s, m) for a in ("base", "teacher", "seeds") for s in (0, 1) for m in ("token_f1", "entity_f1")
    }
    evals = [remembered_reports(_read(folder)) for folder in folders]
    for row in rows:
        mean = row["pooled"]["mean"]
        assert mean["value"] == pytest.approx(row["mean"], abs=0.011) and mean["low"] <= mean["value"] <= mean["high"]
        pairs = [(reports["expert"], reports[row["against"]]) for reports in evals]
        assert row["pooled"] == compare_pooled(pairs, row["shots"], row["metric"], resamples=10_000, digits=4)
    shown = next(r["pooled"]["mean"] for r in rows if (r["against"], r["shots"]) == ("teacher", 0))
    text = parsed(tmp_path / "page.html")
    assert "paired bootstrap over the runs" in text and f"[{shown['low']:+.1f}, {shown['high']:+.1f}]" in text


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("adapter", "adapter_model.safetensors is missing"),
        ("scores", "do not have the scores of eval.json"),
        ("replies", "has no reply of base to example 1 of awake, 0-shot"),
    ],
)
def test_without_the_replies_there_is_a_spread_but_no_interval(seeds, tmp_path, change, says):
    for name in ("s0", "s1"):
        shutil.copytree(seeds / name, tmp_path / name)
    folder = tmp_path / "s1"
    if change == "adapter":
        (folder / "adapter" / "adapter_model.safetensors").unlink()
    elif change == "scores":
        found = json.loads((folder / "eval.json").read_text())
        found["systems"]["expert"]["results"][0]["value"] += 1
        (folder / "eval.json").write_text(json.dumps(found))
    else:
        with Ledger(folder / "ledger.sqlite") as ledger, ledger.transaction():
            ledger._db.execute("DELETE FROM replies WHERE item_id LIKE 'awake/0/%'")
    found = compare_runs([tmp_path / "s0", folder], tmp_path / "page.html")
    [group] = found["seeds"]
    assert says in group["not_pooled"] and not any("pooled" in row for row in group["rows"])
    assert any(row["what"] == "expert" and row["spread"] >= 0 for row in group["rows"])
    assert says in parsed(tmp_path / "page.html")


def test_by_command(seeds, tmp_path, capsys):
    page = tmp_path / "page.html"
    with pytest.raises(SystemExit, match="0"):
        cli.main(["report", str(seeds / "s0"), str(seeds / "s1"), "--out", str(page)])
    out = capsys.readouterr().out
    assert re.search(r"random seeds 0, 1 .*\bspread +95 % interval", out) and str(page) in out
    assert re.search(r"\nexpert +0 +token_f1 +\d+\.\d ± \d+\.\d +\d", out)
    line = r"\nexpert − seeds alone +1 +entity_f1 +[+-]\d+\.\d ± \d+\.\d +\[[+-]\d+\.\d, [+-]\d+\.\d\] +[\d.< ]+ [+-]"
    assert re.search(line, out)


@pytest.mark.parametrize(
    ("runs", "says"),
    [
        (["s0", "nowhere"], "is no run folder"),
        (["s0", "s0"], "given twice"),
        (["s0", "begun"], "is not evaluated yet; do: specialize eval"),
        (["s0", "damaged"], "cannot be read"),
        (["s0", "--out", "x.html"], "--out belongs to several"),
    ],
)
def test_wrong_use_is_one_line(seeds, tmp_path, capsys, runs, says):
    for name in ("begun", "damaged"):
        shutil.copytree(seeds / "s1", tmp_path / name)
    (tmp_path / "begun" / "eval.json").unlink()
    (tmp_path / "damaged" / "eval.json").write_text('{"systems": 3')
    (tmp_path / "s0").symlink_to(seeds / "s0")
    arguments = [str(tmp_path / r) if r != "--out" else r for r in runs]
    if "--out" not in runs:
        arguments += ["--out", str(tmp_path / "page.html")]
    with pytest.raises(SystemExit, match="2"):
        cli.main(["report", *arguments])
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1
    assert not (tmp_path / "page.html").exists()


def test_rounds_side_by_side_and_why_they_ended(tiny, tmp_path):
    recipe = override(read_recipe(tiny.recipe)[0], ["rounds=2", "filter.enabled=false", "evaluate.seeds_only=false"])
    folder = tmp_path / "run"
    Run(folder, recipe, tiny.inputs, reporter=Reporter(mute=True)).execute()
    text = parsed(folder / "report.html")
    assert "2 of 2 rounds are done; no seeds were held out" in text and "2 (the expert)" in text
    with Ledger(folder / "ledger.sqlite") as ledger:
        stages = ledger.stages()
        for name, loss in (("tune", 0.5), ("tune-2", 0.625)):
            ledger.end_stage(name, stages[name].info | {"held_out_loss": loss})
    found = json.loads((folder / "eval.json").read_text())
    found["systems"] = {"base": found["systems"]["base"], "expert": found["systems"]["round 1"]} | {
        "round 2": found["systems"]["expert"]
    }
    found["rounds"] = {"taken": 1, "wanted": 4, "held_out_loss": {"1": 0.5, "2": 0.625}}
    (folder / "eval.json").write_text(json.dumps(found))
    settings = (folder / "recipe.yaml").read_text().replace("rounds: 2", "rounds: 4")
    (folder / "recipe.yaml").write_text(settings)
    write_report(folder)
    text = parsed(folder / "report.html")
    assert (
        "It stopped after round 2 of at most 4: on seeds that nothing was made of, the loss went from 0.500 to 0.625."
        in text
    )
    assert "The expert is that of round 1" in text and "1 (the expert)" in text
