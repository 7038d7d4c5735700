"""A small run in a child process, something that goes wrong at a chosen point of it, and what must hold afterwards.

A *point* is a call within a stage; the child meets it in the middle of the stage's work. A *fault* is what happens
there. The child is a fork of the test process, so that it need not import torch again, and runs the real command line.
"""

import ctypes
import errno
import importlib
import json
import os
import resource
import shutil
import signal
import sqlite3
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from specialize.retrieval import index as index_module
from specialize.train.loop import Trainer

from specialize import cli, plots, report
from specialize.ledger import Ledger
from specialize.seal import open_read_only

# What a run imports late. Here it is imported once for all forks: two seconds of processor time less for each.
IMPORTED_LATE = (
    "jinja2", "matplotlib.backends.backend_svg", "matplotlib.figure", "rapidfuzz.fuzz", "rapidfuzz.process",
    "specialize.doctor", "specialize.engine.generator", "specialize.retrieval.index", "specialize.train.loop",
    "torch._dynamo",
)  # fmt: skip
for _name in IMPORTED_LATE:
    importlib.import_module(_name)

STAGES = ("index", "teacher", "instructions", "responses", "filter", "tune", "control", "evaluate", "report")


def _purpose(start):
    return lambda _, reply: reply.purpose.startswith(start)


# stage -> (owner, function, which of its calls count, how many of them are let through before the fault)
POINTS = {
    "index": (index_module, "_build_bm25", lambda *a: True, 0),
    "teacher": (Trainer, "train_step", lambda self: self.out.name == "teacher", 7),
    "instructions": (Ledger, "add_reply", _purpose("instruction"), 1),
    "responses": (Ledger, "add_reply", _purpose("response"), 12),
    "filter": (Ledger, "decide", lambda *a: True, 0),
    "tune": (Trainer, "train_step", lambda self: self.out.parent.name == "rounds", 2),
    "control": (Trainer, "train_step", lambda self: self.out.name == "control", 2),
    "evaluate": (Ledger, "add_reply", _purpose("eval/"), 5),
    "report": (report, "_gather", lambda *a: True, 0),
    "second wave": (Ledger, "add_reply", _purpose("response"), 45),  # of the responses; the first wave has 45
}


@dataclass(frozen=True)
class Job:
    """One command in the making: where it runs, its arguments, and what it reads."""

    folder: Path
    arguments: list[str]
    inputs: dict[str, str]


@dataclass(frozen=True)
class Ended:
    code: int
    output: str


def job(domain: SimpleNamespace, folder: Path) -> Job:
    given = [part for name, path in domain.inputs.items() for part in (f"--{name}", path)]
    arguments = ["run", "--out", str(folder), "--recipe", str(domain.recipe), "--quiet", *given]
    return Job(folder, arguments, domain.inputs)


def child(work: Job, prepare: Callable[[], None] = lambda: None, *, kill_after_s: float | None = None) -> Ended:
    """Run the command in a fork. ``prepare`` is called in it first; it gets SIGKILL after ``kill_after_s`` seconds of
    its own processor time, so that a busy machine kills as far into the work as an idle one."""
    descriptor, output = tempfile.mkstemp(suffix=".output")  # not on the disk that a fault may fill
    number = os.fork()
    if number == 0:
        code = 99
        try:
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            # pytest's own streams write elsewhere, and its handler would turn a signal into a failed test.
            sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
            sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            plots._svg = lambda figure: "<svg/>"  # drawing takes most of a tiny run, and no fault is about it
            prepare()
            cli.main(work.arguments)
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 98
        except BaseException:  # noqa: BLE001, a child that goes on as pytest would be worse
            traceback.print_exc()
        finally:
            os._exit(code)
    if kill_after_s is not None:
        _kill_later(number, kill_after_s)
    code = os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])
    with os.fdopen(descriptor, errors="replace") as stream:  # shared with the child, which left it at its end
        stream.seek(0)
        text = stream.read()
    os.unlink(output)
    return Ended(code, text)


def _kill_later(number: int, seconds: float) -> None:
    clock = (~number << 3) | 2  # the processor time of a process, as clock_getcpuclockid(3) gives it
    while os.waitid(os.P_PID, number, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if time.clock_gettime(clock) >= seconds:
            os.kill(number, signal.SIGKILL)
            return
        time.sleep(0.002)


def break_at(stage: str, happen: Callable[[], None], later: int = 0) -> None:
    """Let ``happen`` be called once, at the stage's point or so many calls ``later``, before the call is made."""
    owner, name, counts, let_through = POINTS[stage]
    let_through += later
    original = getattr(owner, name)
    seen = 0

    def wrapper(*args, **kwargs):
        nonlocal seen
        if counts(*args):
            seen += 1
            if seen == let_through + 1:
                happen()
        return original(*args, **kwargs)

    setattr(owner, name, wrapper)


# what can happen; each is called in the child, at the point


def kill(work: Job) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def terminate(work: Job) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def interrupt(work: Job) -> None:
    os.kill(os.getpid(), signal.SIGINT)


def fill_disk(work: Job) -> None:
    """Take all that is left of the file system, which is a small one made for this."""
    with open(work.folder.parent / "ballast", "wb", buffering=0) as sink:
        for block in (b"\0" * 65536, b"\0" * 512):
            try:
                while sink.write(block):
                    pass
            except OSError as error:
                assert error.errno == errno.ENOSPC


def fail_writes(work: Job) -> None:
    """Every write from here on: EIO to what Python writes and flushes, SQLite's own words to what the ledger does."""

    def fail(*_, **__):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    os.fsync = os.replace = Path.replace = Path.rename = fail  # type: ignore[assignment]

    class Failing:
        def __init__(self, db):
            self._db = db

        def __getattr__(self, name):
            return getattr(self._db, name)

        def execute(self, text, *values):
            if text.split()[0] in ("INSERT", "UPDATE", "DELETE", "COMMIT"):
                raise sqlite3.OperationalError("disk I/O error")
            return self._db.execute(text, *values)

        def executemany(self, text, values):
            raise sqlite3.OperationalError("disk I/O error")

    live = [o for o in _objects(Ledger) if getattr(o, "_db", None) is not None]
    assert live
    for ledger in live:
        ledger._db = Failing(ledger._db)


def _objects(kind):
    import gc

    return [o for o in gc.get_objects() if type(o) is kind]


def shorten_writes(work: Job) -> None:
    """The kernel writes each file up to 2,000 bytes, so that the write that crosses this comes back short, and fails
    what goes beyond. That goes for SQLite, safetensors and numpy, too."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))


def make_read_only(work: Job) -> None:
    """Take the right to write from the folder, and from root what lets it write all the same."""
    for path in (work.folder, *work.folder.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    if os.geteuid() == 0:
        _drop_override()


def _drop_override() -> None:
    """Give up CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH (capset of linux/capability.h, version 3)."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    data = (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.capget(header, data) == 0
    data[0] &= ~0b110
    assert libc.capset(header, data) == 0


def remove_inputs(work: Job) -> None:
    for path in map(Path, work.inputs.values()):
        path.rename(path.with_name("gone-" + path.name))


def bring_back_inputs(work: Job) -> None:
    for path in map(Path, work.inputs.values()):
        gone = path.with_name("gone-" + path.name)
        if gone.exists():
            gone.rename(path)


def change_input(work: Job) -> None:
    """Another corpus under the same name; whoever reads it from here on reads the other one."""
    path = Path(work.inputs["corpus"])
    shutil.copy2(path, path.with_name("old-" + path.name))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row["text"] = row["text"].replace("day", "night")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def change_input_back(work: Job) -> None:
    path = Path(work.inputs["corpus"])
    old = path.with_name("old-" + path.name)
    if old.exists():
        old.replace(path)


def jump_clock(work: Job) -> None:
    """Wall-clock time goes back ten years and forth twenty in turn. A monotonic clock cannot jump."""
    real, calls = time.time, 0

    def jumping():
        nonlocal calls
        calls += 1
        return real() + (-10 if calls % 2 else 20) * 365.25 * 86400

    time.time = jumping


def run_out_of_memory(work: Job) -> None:
    """No more address space than there is, and a need for more than what the allocator has kept of it."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    blocks = []
    while True:
        blocks.append(bytearray(64 << 20))


def start_another(work: Job) -> None:
    """The same command in a second process: it must be refused, and say by whom."""
    number = os.fork()
    if number == 0:
        code = 99
        try:
            cli.main(work.arguments)
        except SystemExit as error:
            code = error.code
        finally:
            os._exit(code)
    print(f"second: exit {os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])}, first is {os.getpid()}", flush=True)


def leave_stale_lock(work: Job) -> None:
    """Die, with a lock file that names a process which is alive and has nothing to do with the run."""
    (work.folder / "lock").write_text("1\n2001-01-01 00:00:00+00:00\n")
    os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class Fault:
    """``codes``: how the child may end. ``says``: what its output must hold when it ended by itself with an error."""

    happen: Callable[[Job], None]
    codes: tuple[int, ...]
    says: str = ""
    undo: Callable[[Job], None] | None = None
    small_disk: bool = False


FAULTS = {
    "SIGKILL": Fault(kill, (-signal.SIGKILL,)),
    "SIGTERM": Fault(terminate, (143,), "terminated; what was finished is kept"),
    "Ctrl-C": Fault(interrupt, (130,), "interrupted; what was finished is kept"),
    "full disk": Fault(fill_disk, (1,), "the disk is full", lambda w: (w.folder.parent / "ballast").unlink(), True),
    "failing write": Fault(fail_writes, (1,), "nput/output error|disk I/O error"),
    "short write": Fault(shorten_writes, (1,), "too large|disk is full|disk I/O error"),
    "read-only folder": Fault(make_read_only, (1, 2), "denied|readonly|cannot be written|unable to open"),
    "vanished input": Fault(remove_inputs, (0, 1, 2), "o such (file|model folder)", bring_back_inputs),
    "changed input": Fault(change_input, (0, 2), "changed while the run was at work", change_input_back),
    "jumping clock": Fault(jump_clock, (0,)),
    "out of memory": Fault(run_out_of_memory, (1,), "out of memory|MemoryError"),
    "second run": Fault(start_another, (0,)),
    "stale lock": Fault(leave_stale_lock, (-signal.SIGKILL,)),
}


def make_writable(folder: Path) -> None:
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


def contents(folder: Path) -> dict:
    """Everything a run decided, without times and paths; read without changing anything."""
    db = open_read_only(folder / "ledger.sqlite")
    try:
        items = db.execute(
            "SELECT id, round, wave, source, kind, instruction, input, output, status, reason, detail, score "
            "FROM items ORDER BY id"
        ).fetchall()
        replies = db.execute(
            "SELECT id, item_id, purpose, sample, raw, finish_reason, tokens FROM replies ORDER BY id"
        ).fetchall()
        done = db.execute("SELECT name, done FROM stages ORDER BY rowid").fetchall()
    finally:
        db.close()
    rows = [json.loads(line) for line in (folder / "dataset.jsonl").read_text().splitlines()]
    scores = json.loads((folder / "eval.json").read_text())["systems"]
    weights = {
        str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("adapter_model.safetensors"))
    }
    return {
        "items": items,
        "replies": replies,
        "done": sorted(done),
        "data": [(r["id"], r["instruction"], r["input"], r["output"]) for r in rows],
        "scores": {name: system["results"] for name, system in scores.items()},
        "weights": weights,
    }


def differences(one: dict, other: dict) -> list[str]:
    """The parts in which two runs' contents differ, with the ids that are lost and new."""
    found = []
    for name in one:
        if one[name] != other[name]:
            lost = [row for row in one[name] if row not in other[name]]
            new = [row for row in other[name] if row not in one[name]]
            found.append(f"{name}: {len(lost)} lost or changed, {len(new)} new")
    return found
