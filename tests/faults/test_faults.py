"""Every fault in every stage: the run is started again and ends, nothing is lost, nothing is there twice, and what it
made is what the undisturbed run made. The default tier takes each stage once."""

import os
import random
import re
import resource
import signal

import pytest
from harness import (
    FAULTS,
    STAGES,
    Fault,
    break_at,
    child,
    contents,
    differences,
    job,
    make_writable,
)

from specialize.verify import verify

# Each stage once, and most kinds of fault; the slow tier has all cells.
QUICK = [
    ("SIGKILL", "teacher"),
    ("SIGTERM", "index"),
    ("failing write", "responses"),
    ("short write", "control"),
    ("full disk", "instructions"),
    ("changed input", "evaluate"),
    ("out of memory", "filter"),
    ("second run", "tune"),
    ("stale lock", "report"),
]
REST = [(fault, stage) for fault in FAULTS for stage in STAGES if (fault, stage) not in QUICK]


@pytest.mark.parametrize(("name", "stage"), [*QUICK, *(pytest.param(*cell, marks=pytest.mark.slow) for cell in REST)])
def test_a_run_survives(name, stage, small, tmp_path, small_disk):
    fault = FAULTS[name]
    if fault.small_disk and small_disk is None:
        pytest.skip("this process may not mount a small file system")
    work = job(small.domain, (small_disk if fault.small_disk else tmp_path) / "run")
    try:
        ended = child(work, lambda: break_at(stage, lambda: fault.happen(work)))
        check_end(fault, ended, work)
        if fault.undo is not None and ended.code != 0 and not fault.small_disk:
            again = child(work)  # what is wrong is still wrong
            assert again.code == 2, again.output
            assert again.output.count("\n") == 1, again.output
    finally:
        if fault.undo is not None:
            fault.undo(work)
        make_writable(work.folder)
    restarted = child(work)
    assert restarted.code == 0, restarted.output
    assert differences(small.expected, contents(work.folder)) == []
    assert verify(work.folder).wrong == []


@pytest.mark.parametrize("answers", [1, 4, 7, 10, 13, 16])
def test_a_kill_in_the_second_wave(answers, small, tmp_path):
    """Its candidates are in the ledger, some with a part of their 18 answers, as if they had been asked no more."""
    work = job(small.domain, tmp_path / "run")
    ended = child(work, lambda: break_at("second wave", lambda: FAULTS["SIGKILL"].happen(work), answers))
    assert ended.code == -signal.SIGKILL, ended.output
    restarted = child(work)
    assert restarted.code == 0, restarted.output
    assert differences(small.expected, contents(work.folder)) == []


def check_end(fault: Fault, ended, work) -> None:
    """The child met the fault, and ended as one must: by the signal, or with one line that says what happened."""
    assert ended.code in fault.codes, (ended.code, ended.output)
    assert "Traceback" not in ended.output
    if ended.code > 0:
        last = ended.output.strip().splitlines()[-1]
        assert re.search(fault.says, last), ended.output
    if fault is FAULTS["second run"]:
        found = re.search(r"second: exit 2, first is (\d+)", ended.output)
        assert found, ended.output
        assert re.search(rf"another run \(process {found[1]}, started 2\d\d\d-\d\d-\d\d ", ended.output)


@pytest.mark.slow
def test_200_random_kills(small, tmp_path):
    """Full runs, each killed at random moments and started again until it ends; until there were 200 kills.

    A kill comes after up to half of what a whole run takes, so that a run is killed a few times on its way.
    ``SPECIALIZE_KILLS`` in the environment sets another number, to look at a machine for a shorter or longer time.
    """
    wanted, chance = int(os.environ.get("SPECIALIZE_KILLS", "200")), random.Random(11)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert child(job(small.domain, tmp_path / "timed")).code == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    whole_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    kills = runs = 0
    while kills < wanted:
        work = job(small.domain, tmp_path / f"run{runs}")
        while True:
            ended = child(work, kill_after_s=chance.uniform(0, whole_s / 2))
            if ended.code == 0:
                break
            assert ended.code == -signal.SIGKILL, ended.output
            kills += 1
        assert differences(small.expected, contents(work.folder)) == [], (runs, kills)
        assert verify(work.folder).wrong == [], (runs, kills)
        runs += 1
    print(f"{kills} kills over {runs} runs, one run takes {whole_s:.2f} s of processor time")
