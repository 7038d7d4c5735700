"""The ledger's running hashes: right after every kind of write, and what they find after a process was killed."""

import json
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from specialize.errors import InputError
from specialize.files import Artefact
from specialize.ledger import Item, Ledger, Reply
from specialize.seal import SEAL, check_seal, open_read_only, sealed_ledger, write_seal
from specialize.tally import TABLES

KILLED = """
import os, sys, signal
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from specialize.seal import sealed_ledger
from test_tally import fill
with sealed_ledger(Path(sys.argv[1])) as ledger:
    fill(ledger)
    if sys.argv[3] == "file":
        ledger.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def item(number, **more):
    return Item(f"r1-k00-{number:06d}", 1, 0, "corpus", "kind", "do\0 it", f"input {number} \N{SNOWMAN} " * 40, **more)


def fill(ledger):
    ledger.begin_stage("index", "f", {"a": 1})
    ledger.end_stage("index", {"n": 2}, [Artefact("index/a", 3, "00")])
    ledger.add_items(item(n, score=n / 7) for n in range(40))
    for n in range(20):
        ledger.add_reply(Reply(f"r{n}", item(n).id, "response", 0, "text " * n, "stop", n, {"seed": n}))
    ledger.decide([(item(n).id, "kept", "", "", "text", -0.0) for n in range(10)])


@pytest.fixture(scope="module", params=["file", "log"])
def killed(request, tmp_path_factory):
    """The folder of a ledger whose process was killed, with its rows in the file, or in SQLite's log beside it."""
    folder = tmp_path_factory.mktemp(request.param)
    code = [sys.executable, "-c", KILLED, str(folder / "ledger.sqlite"), str(Path(__file__).parent), request.param]
    assert subprocess.run(code).returncode == -signal.SIGKILL
    assert not (folder / SEAL).exists()
    return folder


def rows(path):
    with closing(open_read_only(path)) as db:
        return {name: db.execute(f"SELECT * FROM {name} ORDER BY 1").fetchall() for name in TABLES}


def test_every_kind_of_write_keeps_the_hashes(tmp_path):
    chance = random.Random(3)
    with Ledger(tmp_path / "l") as ledger:

        def fails():
            with pytest.raises(ZeroDivisionError), ledger.transaction():
                ledger.add_items([item(99)])
                _ = 1 / 0

        writes = [
            lambda: ledger.add_items([item(chance.randrange(50)) for _ in range(3)]),
            lambda: ledger.add_reply(Reply(f"r{chance.randrange(50)}", "i", "response", 0, "x", "stop", 1)),
            lambda: ledger.add_reply(Reply(f"e{chance.randrange(50)}", "i", "eval/a", 0, "x", "stop", 1)),
            lambda: ledger.decide([(item(chance.randrange(50)).id, "kept", "", "", "y", chance.random())]),
            lambda: ledger.set_meta(f"wave-{chance.randrange(3)}", chance.random()),
            lambda: ledger.begin_stage(f"s{chance.randrange(4)}", "f", {}),
            lambda: ledger.add_seconds(f"s{chance.randrange(4)}", chance.random()),
            lambda: ledger.end_stage(f"s{chance.randrange(4)}", {}, [Artefact(f"p{chance.randrange(9)}", 1, "0")]),
            lambda: ledger.record("o", [Artefact(f"p{n}", n, "0") for n in range(chance.randrange(9))]),
            lambda: ledger.forget_stages([f"s{chance.randrange(4)}"]),
            lambda: ledger.reopen(1),
            lambda: ledger.delete_responses(1),
            ledger.delete_synthesis,
            fails,
        ]
        for step in range(400):
            chance.choices(writes, weights=[8] * 10 + [1] * 4)[0]()
            if step % 10 == 0:
                assert ledger.changed_rows() == []
        assert ledger.changed_rows() == []
        assert ledger.add_items([item(1000), item(1000), item(1001)]) == 2  # what triggers write is not counted


def test_a_killed_ledger_goes_on(killed, tmp_path):
    folder = shutil.copytree(killed, tmp_path / "run")
    before = rows(folder / "ledger.sqlite")
    assert len(before["items"]) == 40
    with sealed_ledger(folder / "ledger.sqlite") as ledger:
        assert ledger.changed_rows() == []
    assert rows(folder / "ledger.sqlite") == before
    assert (folder / SEAL).exists()


@pytest.mark.parametrize(
    ("text", "finding"),
    [
        ("UPDATE items SET output = 'other' WHERE id = 'r1-k00-000003'", "rows of items are not what was written"),
        ("UPDATE replies SET created = created + 1e-6 WHERE id = 'r7'", "rows of replies are not what was written"),
        ("DELETE FROM replies WHERE id = 'r7'", "replies has 19 rows where 20 were written"),
        ("INSERT INTO meta VALUES ('a', '1')", "meta has 2 rows where 1 were written"),
        ("UPDATE artefacts SET sha256 = '01'", "rows of artefacts are not what was written"),
        ("DELETE FROM tallies WHERE name = 'items'", "the running hash of items is lost"),
        ("DELETE FROM tallies", "its format or its running hashes are lost"),
        ("UPDATE meta SET value = '1' WHERE key = 'format'", "its format or its running hashes are lost"),
        ("DELETE FROM meta", "its format or its running hashes are lost"),
        ("UPDATE meta SET value = '3' WHERE key = 'format'", "ledger format 3, this version reads 2"),
        ("UPDATE items SET round = 'x' WHERE id = 'r1-k00-000003'", r"items\.round of row 4 is not a value"),
        ("UPDATE items SET score = 'x' WHERE id = 'r1-k00-000003'", r"items\.score of row 4 is not a value"),
        ("UPDATE items SET decided = 9e999 WHERE id = 'r1-k00-000003'", r"items\.decided of row 4 is not a value"),
        ("UPDATE items SET input = x'00ff' WHERE id = 'r1-k00-000003'", r"items\.input of row 4 is not a value"),
        ("UPDATE stages SET done = 1.5", r"stages\.done of row 1 is not a value"),
        ("UPDATE tallies SET digest = 3.5", "rows of meta are not what was written; rows of stages"),
        ("UPDATE items SET id = NULL WHERE id = 'r1-k00-000003'", r"items\.id of row 4 is not a value"),
    ],
)  # fmt: skip
def test_a_row_changed_after_the_kill_is_found(killed, tmp_path, text, finding):
    folder = shutil.copytree(killed, tmp_path / "run")
    with sqlite3.connect(folder / "ledger.sqlite") as db:
        db.execute(text)
    db.close()
    before = rows(folder / "ledger.sqlite")
    with pytest.raises(InputError, match=finding) as caught, sealed_ledger(folder / "ledger.sqlite"):
        pass
    assert "\n" not in str(caught.value)
    assert rows(folder / "ledger.sqlite") == before  # refused again next time
    assert not (folder / SEAL).exists()


@pytest.mark.parametrize("flips", [40, pytest.param(2000, marks=pytest.mark.slow)])
def test_a_flipped_byte_after_the_kill_is_found_or_changes_nothing(killed, tmp_path, flips):
    """What SQLite keeps no check of is free space. A log is cut at its first damaged frame: then rows are missing, as
    if the kill had come earlier, and will be made again."""
    files = sorted(path.name for path in killed.iterdir() if path.stat().st_size and not path.name.endswith("-shm"))
    sound = rows(killed / "ledger.sqlite")
    chance, found = random.Random(flips), 0
    for number in range(flips):
        folder = shutil.copytree(killed, tmp_path / str(number))
        name = files[number % len(files)]
        (folder / "ledger.sqlite-shm").unlink(missing_ok=True)
        content = bytearray((folder / name).read_bytes())
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        (folder / name).write_bytes(content)
        try:
            with sealed_ledger(folder / "ledger.sqlite") as ledger:
                now = {n: ledger._db.execute(f"SELECT * FROM {n} ORDER BY 1").fetchall() for n in TABLES}
                if name.endswith("-wal"):
                    lost = {row[0] for n in TABLES for row in sound[n]} - {row[0] for n in TABLES for row in now[n]}
                    assert lost or [len(now[n]) for n in TABLES] == [len(sound[n]) for n in TABLES]
                else:
                    assert now == sound, (number, name)
        except InputError:
            found += 1
        shutil.rmtree(folder)
    assert found or "ledger.sqlite-wal" in files  # there nothing is found: what is whole goes on


def test_a_ledger_from_before_the_hashes_gets_them(killed, tmp_path):
    folder = shutil.copytree(killed, tmp_path / "run")
    with sqlite3.connect(folder / "ledger.sqlite") as db:
        db.execute("DROP TABLE tallies")
        db.execute("UPDATE meta SET value = '1' WHERE key = 'format'")
    db.close()
    write_seal(folder / "ledger.sqlite")
    with Ledger(folder / "ledger.sqlite") as ledger:  # somebody who reads
        assert len(ledger.items()) == 40
    assert check_seal(folder / "ledger.sqlite") == []
    with sealed_ledger(folder / "ledger.sqlite") as ledger:
        assert ledger.meta("format") == 2
        assert len(ledger.items()) == 40
        assert ledger.changed_rows() == []


@pytest.mark.parametrize("value", ["[1]", "3", "null", "{", json.dumps("x")])
def test_a_value_that_is_no_object_is_an_input_error(tmp_path, value):
    with Ledger(tmp_path / "l") as ledger:
        fill(ledger)
        ledger._db.execute("UPDATE items SET provenance = ?", (value,))
        with pytest.raises(InputError, match="the ledger is damaged"):
            ledger.items()
