"""Off-domain loss: packed scoring against token-by-token logits, and the shipped texts and tasks themselves."""

import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from specialize.engine.generator import Generator
from specialize.engine.naive import naive_logits

from specialize import general
from specialize.cli import main
from specialize.general import (
    changes_lines,
    general_tasks,
    general_texts,
    perplexity,
    perplexity_change,
    text_losses,
)
from specialize.pipeline import Run
from specialize.progress import Reporter
from specialize.recipe import override, read_recipe
from specialize.records import read_seeds


@pytest.fixture(scope="module")
def run_folder(tiny, tmp_path_factory):
    """A small run with an adapter, evaluated off the domain on a few of the texts and tasks."""
    folder = tmp_path_factory.mktemp("general") / "run"
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        recipe = override(read_recipe(tiny.recipe)[0], ["evaluate.general=true", "evaluate.limit=2"])
        found = Run(folder, recipe, tiny.inputs, reporter=Reporter(quiet=True)).execute()
    return folder, found


def shorten(patch):
    texts, tasks = general_texts()[:5], general_tasks()[:1]
    patch.setattr(general, "general_texts", lambda: texts)
    patch.setattr(general, "general_tasks", lambda: tasks)


def naive_rows(generator, texts, pool=None):
    """Loss and tokens of each text, one forward pass a text, no packing."""
    rows = []
    for text in texts:
        ids = generator.tokenizer.encode(text)
        logprobs = naive_logits(generator.model, ids, pool, 0 if pool else -1).double().log_softmax(-1)
        picked = [float(logprobs[place, token]) for place, token in enumerate(ids[1:])]
        rows.append((-math.fsum(picked), len(picked)))
    return rows


def test_losses_are_those_of_naive_scoring(tiny, run_folder):
    folder, found = run_folder
    generator = Generator.from_pretrained(tiny.inputs["model"], dtype="fp32")
    name = generator.load_adapter(str(folder / "adapter"))
    texts = [t.text[:300] for t in general_texts()[:4]] + ["A cat.", "Z"]
    plain, tuned = text_losses(generator, texts), text_losses(generator, texts, adapter=name)
    pool = generator._pool
    np.testing.assert_allclose(plain, naive_rows(generator, texts), rtol=2e-5)
    np.testing.assert_allclose(tuned, naive_rows(generator, texts, pool), rtol=2e-5)
    assert (plain[:, 0] != tuned[:, 0])[:-1].all()
    # and what a run writes down is that of whole texts
    whole = [t.text for t in general_texts()[:5]]
    rows = np.array(naive_rows(generator, whole))
    base = found["general"]["systems"]["base"]["perplexity"]
    assert base["value"] == pytest.approx(math.exp(rows[:, 0].sum() / rows[:, 1].sum()), rel=1e-4)
    tuned = np.array(naive_rows(generator, whole, pool))
    expert = next(c for c in found["general"]["changes"] if c["system"] == "expert")["perplexity_percent"]
    assert expert["value"] == pytest.approx(100 * math.expm1((tuned - rows)[:, 0].sum() / rows[:, 1].sum()), abs=0.01)


class Recorder:
    """A generator that predicts every token with the same probability and notes what it was asked."""

    def __init__(self, max_context):
        self.max_context, self.asked = max_context, []
        self.tokenizer = SimpleNamespace(encode=lambda text: [ord(c) for c in text])

    def score(self, pairs, *, adapter=None):
        self.asked = pairs
        return [[-0.5] * len(continuation) for _, continuation in pairs]


@pytest.mark.parametrize("length", [0, 1, 2, 7, 8, 9, 15, 16, 23])
def test_a_text_longer_than_the_context_is_predicted_once_per_token(length):
    recorder = Recorder(8)
    text = "abcdefghijklmnopqrstuvwxyz"[:length]
    [[loss, tokens]] = text_losses(recorder, [text])
    assert (loss, tokens) == (0.5 * max(0, length - 1), max(0, length - 1))
    assert all(len(prompt) == 1 and len(prompt) + len(c) - 1 < 8 for prompt, c in recorder.asked)
    assert "".join(chr(t) for _, c in recorder.asked for t in c) == text[1:]


def test_perplexity_weighs_tokens_and_pairs_texts():
    base = np.array([[2.0, 1.0], [30.0, 20.0], [12.0, 9.0], [8.0, 10.0]])
    assert perplexity(base, 0)["value"] == pytest.approx(math.exp(52 / 40), abs=1e-4)
    worse = base.copy()
    worse[:, 0] += 0.1 * base[:, 1]  # 0.1 nats a token everywhere: whatever is drawn, the change is the same
    change = perplexity_change(worse, base, 0)
    assert change["low"] == change["value"] == change["high"] == pytest.approx(100 * math.expm1(0.1), abs=1e-3)
    worse[0, 0] += 1.0
    change = perplexity_change(worse, base, 0)
    assert change["low"] < change["value"] < change["high"]
    assert perplexity_change(worse, base, 0) == change


def test_a_run_reports_it(tiny, run_folder, tmp_path, monkeypatch):
    folder, found = run_folder
    part = json.loads((folder / "eval.json").read_text())["general"]
    assert part == found["general"]
    assert list(part["systems"]) == ["base", "seeds", "expert"]
    assert [c["system"] for c in part["changes"]] == ["seeds", "expert"]
    for system in part["systems"].values():
        assert system["perplexity"]["low"] <= system["perplexity"]["value"] <= system["perplexity"]["high"]
    assert len(changes_lines(part)) == 2
    page = (folder / "report.html").read_text()
    assert "Off the domain" in page and f"{part['systems']['expert']['perplexity']['value']:.2f}" in page
    # a second evaluation asks nothing anew and gives the same
    monkeypatch.setattr(general, "text_losses", None)
    shorten(monkeypatch)
    recipe = read_recipe(folder / "recipe.yaml")[0]
    again = Run(folder, recipe, tiny.inputs, reporter=Reporter(quiet=True)).execute(until="evaluate")
    assert again["general"] == part
    # with the teacher among the systems, it alone is asked
    monkeypatch.undo()
    shorten(monkeypatch)
    folder = shutil.copytree(folder, tmp_path / "run")
    more = Run(
        folder, override(recipe, ["evaluate.teacher=true"]), tiny.inputs, reporter=Reporter(quiet=True)
    ).execute()
    assert [c["system"] for c in more["general"]["changes"]] == ["teacher", "seeds", "expert"]
    assert {name: more["general"]["systems"][name] for name in part["systems"]} == part["systems"]
    assert changes_lines(more["general"], {"teacher": "few"})[0].startswith("off-domain, few: perplexity")
    assert changes_lines(more["general"], {"teacher": "few"})[1:] == changes_lines(part)


def test_eval_of_a_model(tiny, run_folder, monkeypatch, capsys):
    folder, found = run_folder
    shorten(monkeypatch)
    options = ["eval", "--model", tiny.inputs["model"], "--tasks", tiny.inputs["tasks"], "--limit", "1"]
    options += ["--max-tokens", "2", "--dtype", "fp32", "--general", "--adapter", str(folder / "adapter")]
    with pytest.raises(SystemExit, match="0"):
        main([*options, "--quiet"])
    out = capsys.readouterr().out
    assert "off-domain, model: perplexity" in out
    assert f"→ {found['general']['systems']['expert']['perplexity']['value']:.2f}" in out
    with pytest.raises(SystemExit, match="2"):
        main(["eval", str(folder), "--general"])
    assert "evaluate.general=true" in capsys.readouterr().err


def test_the_shipped_texts_and_tasks():
    texts, tasks = general_texts(), general_tasks()
    assert len(texts) == len({t.id for t in texts}) == len({t.text for t in texts}) == 60
    assert len({t.kind for t in texts}) >= 10
    for text in texts:
        assert 50 <= len(text.text.split()) <= 120, text.id
        assert not re.search(r"[{}<>=\[\]_\\]", text.text), text.id
    assert sum(len(t.examples) for t in tasks) >= 30
    for task in tasks:
        inputs = [s.input for s in task.shots] + [e.input for e in task.examples]
        assert len(task.shots) == 5 and len(set(inputs)) == len(inputs)


def test_no_shipped_seed_is_a_general_task():
    package = Path(general.__file__).parent
    asked = {e.input for task in general_tasks() for e in task.examples}
    for file in (package / "recipes" / "seeds" / "finance.jsonl", package / "demo" / "seeds.jsonl"):
        assert not asked & {seed.input for seed in read_seeds(file)}
