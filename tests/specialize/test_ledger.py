"""The ledger under ``kill -9``, a second process, and its own bookkeeping."""

import os
import signal
import sqlite3
import subprocess
import sys
import time

import pytest

from specialize.errors import InputError
from specialize.ledger import Item, Ledger, Reply, run_lock

WRITER = """
import sys
from specialize.ledger import Item, Ledger, Reply
ledger = Ledger(sys.argv[1])
have, replies = ledger.item_ids(), ledger.reply_ids("response")
for i in range(2000):
    identity = f"r1-k00-{i:06d}"
    if identity not in have:
        ledger.add_items([Item(identity, 1, 0, "corpus", "k", "do", f"input {i}")])
    if f"{identity}/response/0" not in replies:
        ledger.add_reply(Reply(f"{identity}/response/0", identity, "response", 0, f"raw {i}", "stop", 3))
print("done")
"""


def item(number, **more):
    return Item(f"r1-k00-{number:06d}", 1, 0, "corpus", "kind", "instruction", f"input {number}", **more)


def test_killed_writer_loses_and_doubles_nothing(tmp_path):
    path = tmp_path / "ledger.sqlite"
    kills = 0
    for wait in (0.15, 0.25, 0.4, 0.6, None):
        child = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE)
        if wait is None:
            assert child.communicate(timeout=60)[0] == b"done\n"
            break
        time.sleep(wait)
        if child.poll() is None:
            os.kill(child.pid, signal.SIGKILL)
            kills += 1
        child.communicate()
    assert kills
    with Ledger(path) as ledger:
        items = ledger.items()
        assert [i.input for i in items] == [f"input {i}" for i in range(2000)]
        replies = ledger.replies("response")
        assert {k: [r.raw for r in v] for k, v in replies.items()} == {i.id: [f"raw {n}"] for n, i in enumerate(items)}
    assert sqlite3.connect(path).execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_items_are_inserted_once(tmp_path):
    with Ledger(tmp_path / "l") as ledger:
        assert ledger.add_items([item(1), item(2)]) == 2
        assert ledger.add_items([item(2), item(3)]) == 1
        assert ledger.add_reply(Reply("a", item(1).id, "response", 0, "first", "stop", 1, {"seed": 7}))
        assert not ledger.add_reply(Reply("a", item(1).id, "response", 0, "second", "stop", 1))
        [reply] = ledger.replies("response")[item(1).id]
        assert (reply.raw, reply.provenance) == ("first", {"seed": 7})


def test_verdicts_and_reopening(tmp_path):
    with Ledger(tmp_path / "l") as ledger:
        ledger.add_items([item(1), item(2), item(3, status="rejected", reason="reply does not parse")])
        ledger.decide([(item(1).id, "kept", "", "", "answer", 0.9), (item(2).id, "rejected", "empty", "", "", 0.0)])
        assert ledger.counts() == {"kept": 1, "rejected": 2}
        assert ledger.reasons() == {"empty": 1, "reply does not parse": 1}
        ledger.reopen(1)
        assert ledger.counts() == {"new": 2, "rejected": 1}
        assert ledger.items(status="new")[0].output == ""


def test_a_transaction_is_whole_or_not_at_all(tmp_path):
    with Ledger(tmp_path / "l") as ledger:
        with pytest.raises(ZeroDivisionError), ledger.transaction():
            ledger.add_items([item(1)])
            _ = 1 / 0
        assert ledger.items() == []


def test_deleting_synthesis_keeps_evaluations(tmp_path):
    with Ledger(tmp_path / "l") as ledger:
        ledger.add_items([item(1)])
        ledger.set_meta("wave-0", {})
        ledger.add_reply(Reply("a", item(1).id, "response", 0, "x", "stop", 1))
        ledger.add_reply(Reply("b", "task/0", "eval/abc", 0, "x", "stop", 1))
        ledger.delete_synthesis()
        assert (ledger.items(), ledger.meta("wave-0"), ledger.replies("response")) == ([], None, {})
        assert list(ledger.replies("eval/abc")) == ["task/0"]


def test_not_a_ledger(tmp_path):
    path = tmp_path / "ledger.sqlite"
    path.write_bytes(b"this is no database at all" * 100)
    with pytest.raises(InputError, match="not a usable ledger"):
        Ledger(path)


def test_objects_without_what_every_run_writes(tmp_path):
    with Ledger(tmp_path / "l") as ledger:
        ledger.begin_stage("tune", "f", {})
        ledger.end_stage("tune", {"steps": 3})
        ledger.add_items([item(1, provenance={"number": 1}), item(2)])
        stage = ledger.stages()["tune"]
        assert (stage.info["steps"], stage.info.get("tokens"), "tokens" in stage.info) == (3, None, False)
        assert stage.info == {"steps": 3} and type(stage.info | {"a": 1}) is dict
        with pytest.raises(InputError, match='an object has no "tokens", only: steps'):
            stage.info["tokens"]
        first, second = ledger.items()
        assert first.provenance["number"] == 1
        with pytest.raises(InputError, match='no "number", only: nothing'):
            second.provenance["number"]
        ledger.add_items([item(3, provenance={"number": "three"})])
        with pytest.raises(InputError, match='"number" of item r1-k00-000003 is a str, not a number'):
            ledger.items()
        ledger.end_stage("tune", {"tokens": [1]})
        with pytest.raises(InputError, match='"tokens" of stage tune is a list, not a number'):
            ledger.stages()


def test_second_process_is_refused(tmp_path):
    code = "import sys, pathlib; from specialize.ledger import run_lock\nwith run_lock(pathlib.Path(sys.argv[1])): pass"
    with run_lock(tmp_path):
        found = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert found.returncode == 1
    assert f"another run (process {os.getpid()}, started 20" in found.stderr
    with run_lock(tmp_path):
        pass
