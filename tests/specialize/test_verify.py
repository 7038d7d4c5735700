"""``specialize verify`` finds what was done to a finished run, says it in words, and leaves the folder as it was."""

import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing

import pytest
from safetensors.torch import load_file, save_file

from specialize.cli import main
from specialize.errors import InputError
from specialize.files import Artefact, survey
from specialize.ledger import run_lock
from specialize.pipeline import Run
from specialize.progress import Reporter
from specialize.recipe import read_recipe
from specialize.seal import check_seal, open_read_only
from specialize.verify import Findings, check_file, verify


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify") / "run"
    Run(folder, read_recipe(tiny.recipe)[0], tiny.inputs, reporter=Reporter(quiet=True)).execute()
    return folder


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def referenced(folder):
    """Every file that a finished run consists of; the lock has no content of its own, and nothing reads the log."""
    return [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name not in ("lock", "run.log")]


def test_a_finished_run_is_whole_and_not_touched(run):
    before = survey(run, ["."])
    found = verify(run)
    assert found.wrong == []
    assert set(found.checked) == {"items", "replies", "files", "rows", "adapters"}
    assert found.checked["adapters"] == 4
    assert survey(run, ["."]) == before
    assert len(before) == found.checked["files"] + 4  # ledger, seal, lock, log


def test_every_file_is_in_the_ledger(run):
    with closing(open_read_only(run / "ledger.sqlite")) as db:
        recorded = {path for (path,) in db.execute("SELECT path FROM artefacts")}
    assert recorded == {str(p.relative_to(run)) for p in referenced(run)} - {"ledger.sqlite", "ledger.seal"}


@pytest.mark.parametrize("flips", [100, pytest.param(500, marks=pytest.mark.slow)])
def test_every_flipped_byte_is_found(run, flips):
    """Single bytes, each file often: one bit or several of a byte anywhere in what the run consists of."""
    chance, files = random.Random(flips), referenced(run)
    for number in range(flips):
        path = files[number % len(files)]
        content = path.read_bytes()
        place = chance.randrange(len(content))
        flipped = content[place] ^ chance.choice([1 << chance.randrange(8), chance.randrange(1, 256)])
        path.write_bytes(content[:place] + bytes([flipped]) + content[place + 1 :])
        findings = verify(run).wrong
        assert any(path.name in text for text in findings), (path, place, findings)
        path.write_bytes(content)
    assert verify(run).wrong == []


def test_a_file_cut_off_at_some_lengths_is_found(run):
    chance = random.Random(6)
    for path in referenced(run):
        content = path.read_bytes()
        for length in {0, 1, len(content) - 1, chance.randrange(len(content))}:
            path.write_bytes(content[:length])
            findings = verify(run).wrong
            assert any(path.name in text for text in findings), (path, length, findings)
        path.write_bytes(content)
    assert verify(run).wrong == []


@pytest.mark.parametrize("most_bytes", [4096, pytest.param(1 << 30, marks=pytest.mark.slow)])
def test_a_file_cut_off_at_any_length_is_found(run, most_bytes):
    """Every length of every artefact and of the seal; of the ledger every eleventh and those beside a page's border.
    What is called here is what `verify` asks of each file, without the rest."""
    with closing(open_read_only(run / "ledger.sqlite")) as db:
        recorded = {row[0]: Artefact(*row) for row in db.execute("SELECT path, bytes, sha256 FROM artefacts")}
    checked = 0
    for path in referenced(run):
        content = path.read_bytes()
        if len(content) > most_bytes:
            continue
        name = str(path.relative_to(run))
        for length in reversed(range(len(content))):
            if name == "ledger.sqlite" and length % 11 and (length + 1) % 4096 > 2:
                continue
            os.truncate(path, length)
            if name in recorded:
                found = Findings(run)
                check_file(found, recorded[name], "")
                findings = found.wrong
            else:
                findings = check_seal(run / "ledger.sqlite")
            assert findings, (name, length)
            assert path.name in findings[0]
            checked += 1
        path.write_bytes(content)
    assert verify(run).wrong == []
    assert checked > 5000


def test_an_artefact_outside_of_the_folder_is_not_read(run):
    for place in ("../other", "/etc/hostname", "a/../../b"):
        found = Findings(run)
        check_file(found, Artefact(place, 1, "0"), "tune")
        assert found.wrong == [f"{place!r} (tune) is no place within the run folder"]


def test_a_missing_file_is_named(run):
    for path in referenced(run):
        content = path.read_bytes()
        path.unlink()
        findings = verify(run).wrong
        assert any(path.name in text for text in findings), path
        path.write_bytes(content)


def test_the_ledger_is_not_opened_when_its_bytes_changed(run, tiny):
    path = run / "ledger.sqlite"
    with sqlite3.connect(path) as db:
        db.execute("UPDATE items SET output = 'other' WHERE status = 'kept'")
    db.close()
    findings = verify(run).wrong
    assert any("rows of items differ" in text for text in findings)
    assert any("dataset.jsonl:1: " in text and "differs from the ledger's item" in text for text in findings)
    with pytest.raises(InputError, match=r"rows of items differ.*delete ledger\.seal"):
        Run(run, read_recipe(tiny.recipe)[0], tiny.inputs, reporter=Reporter(quiet=True)).execute()


def test_rows_that_break_the_ledgers_rules_are_named(run):
    (run / "ledger.seal").unlink()
    with sqlite3.connect(run / "ledger.sqlite") as db:
        [first, second] = [r[0] for r in db.execute("SELECT id FROM items WHERE status = 'rejected' LIMIT 2")]
        db.execute("UPDATE items SET reason = '' WHERE id = ?", (first,))
        db.execute("UPDATE items SET status = 'odd' WHERE id = ?", (second,))
        db.execute("INSERT INTO replies SELECT 'x', item_id, purpose, sample, raw, finish_reason, tokens, provenance, "
                   "created FROM replies WHERE purpose = 'response' LIMIT 1")  # fmt: skip
        db.execute("DELETE FROM items WHERE status = 'kept'")
    db.close()
    text = "\n".join(verify(run).wrong)
    assert "has no seal" in text
    assert f"item {first}: rejected without a reason" in text
    assert f"item {second}: status 'odd'" in text
    assert "is there twice" in text
    assert "is no item of the ledger" in text
    assert "the filter counted" in text
    assert "is no kept item of the ledger" in text


def test_another_base_is_named(run, tiny, tmp_path):
    model = shutil.copytree(tiny.inputs["model"], tmp_path / "model")
    text = (run / "recipe.yaml").read_text().replace(tiny.inputs["model"], str(model))
    (run / "recipe.yaml").write_text(text)
    assert [f for f in verify(run).wrong if "recipe.yaml" not in f] == []
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    findings = verify(run).wrong
    assert any("stage tune was made with another base" in text for text in findings)
    assert sum("was trained on another base: its weights had SHA-256" in text for text in findings) == 4
    config = json.loads((model / "config.json").read_text())
    halves = {  # one head of keys and values where the adapter's base has two
        name: tensor[:8].contiguous() if name.split(".")[-2] in ("k_proj", "v_proj") else tensor
        for name, tensor in load_file(model / "model.safetensors").items()
    }
    save_file(halves, model / "model.safetensors", metadata={"format": "pt"})
    (model / "config.json").write_text(json.dumps(config | {"num_key_value_heads": 1}))
    assert any("it belongs to another base" in text for text in verify(run).wrong)
    shutil.rmtree(model)
    assert verify(run).not_checked == [f"adapters against their base: {model} is not there"]


def test_command(finished, run, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["verify", str(finished)])
    assert caught.value.code == 0
    assert ": whole (" in capsys.readouterr().out
    with (run / "eval.json").open("a") as stream:
        stream.write("\n")
    with pytest.raises(SystemExit) as caught:
        main(["verify", str(run), "--json"])
    assert caught.value.code == 1
    shown = json.loads(capsys.readouterr().out)
    assert not shown["whole"]
    assert len(shown["findings"]) == 1
    assert "something was added" in shown["findings"][0]
    with pytest.raises(SystemExit) as caught:
        main(["verify", str(tmp_path)])
    assert caught.value.code == 2
    with run_lock(run):
        code = [sys.executable, "-m", "specialize", "verify", str(run)]
        found = subprocess.run(code, capture_output=True, text=True)
    assert found.returncode == 2
    assert "is at work here; wait until it is done" in found.stderr


def test_a_report_written_anew_is_recorded(run):
    with pytest.raises(SystemExit):
        main(["report", str(run)])
    assert verify(run).wrong == []
