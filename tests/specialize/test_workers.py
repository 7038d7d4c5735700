"""Workers in other processes give what one generator gives, each item once, whoever dies or falls silent on the way."""

import os
import signal
import sys
from types import SimpleNamespace

import pytest
from specialize.engine.generator import Generator
from specialize.engine.sampler import Completion, Request, SamplingParams

from specialize.errors import InputError
from specialize.ledger import Ledger
from specialize.pipeline import Run
from specialize.progress import Reporter
from specialize.recipe import read_recipe
from specialize.workers import Spread, Worker, WorkerPool, _Work, require_ray

STOPPED_S = 3.0  # after which a stopped worker counts as silent in these tests


@pytest.fixture(scope="module")
def pool(tiny):
    pytest.importorskip("ray")
    said = []
    spread = Spread(workers=3, patience_s=STOPPED_S, threads=3)
    pool = WorkerPool(tiny.inputs["model"], spread, dtype="fp32", device="cpu", say=said.append)
    pool.said = said
    list(pool.run([]))
    assert os.path.isdir(pool._temporary)
    yield pool
    temporary = pool._temporary
    pool.close()
    assert not os.path.exists(temporary)


def test_workers_share_the_memory_asked_for(tiny):
    worker = Worker()
    worker.start(
        tiny.inputs["model"], "fp32", None, "int8", 16 << 30, "cpu", 1, 2
    )  # the tests before this one stay in the process
    assert worker._generator.config.memory_bytes == 8 << 30 and worker._generator.config.kv_dtype == "int8"


def requests(tokenizer, count, *, max_tokens=24):
    """Greedy and sampled ones in turn; three of the latter share each prompt."""
    found = []
    for i in range(count):
        prompt = tokenizer.encode(
            f"On day {i % 7} the owl went to the barn and had a rest there. It ate {i // 2} seeds."
        )
        greedy = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        sampled = SamplingParams(max_tokens=max_tokens, temperature=1.0, n=3, seed=5, ignore_eos=True)
        found.append(Request(prompt, (greedy, sampled)[i % 2], request_id=1000 + i))
    return found


def outcome(completions):
    found = {(c.request_id, c.index): (c.text, tuple(c.token_ids), c.finish_reason) for c in completions}
    return found


@pytest.fixture(scope="module")
def alone(tiny):
    return Generator.from_pretrained(tiny.inputs["model"], dtype="fp32", device="cpu")


def test_three_workers_answer_as_one_generator(pool, alone):
    asked = requests(alone.tokenizer, 40)
    got = list(pool.run(asked))
    assert len(got) == sum(r.params.n for r in asked)
    assert outcome(got) == outcome(alone.run(asked))
    assert len({m.info["pid"] for m in pool._members} | {os.getpid()}) == 4


def halted(pool):
    """A worker that takes its next requests and does nothing about them."""
    list(pool.run([]))  # there is one
    member = next(m for m in pool._members if m.info is not None)
    os.kill(member.info["pid"], signal.SIGSTOP)
    return member


def test_a_killed_worker_is_replaced_and_its_items_go_to_others(pool, alone):
    asked = requests(alone.tokenizer, 120)
    victim, got, before = halted(pool), [], pool.num_replaced
    for completion in pool.run(asked):
        got.append(completion)
        if len(got) == 30:
            assert victim.holds
            os.kill(victim.info["pid"], signal.SIGKILL)
    assert pool.num_replaced == before + 1
    assert any("died; it is replaced" in line for line in pool.said)
    assert len(got) == len(outcome(got)) == sum(r.params.n for r in asked)
    assert outcome(got) == outcome(alone.run(asked))
    assert victim not in pool._members
    assert len(pool._members) == 3


def test_a_silent_workers_items_go_to_others_and_what_it_says_later_is_dropped(pool, alone):
    asked = requests(alone.tokenizer, 60)
    stopped, before = halted(pool), pool.num_dropped
    got = list(pool.run(asked))
    assert any("is silent" in line for line in pool.said)
    assert outcome(got) == outcome(alone.run(asked))
    assert len(got) == len(outcome(got))
    held = sum(stopped.holds.values())
    assert held
    os.kill(stopped.info["pid"], signal.SIGCONT)
    later = requests(alone.tokenizer, 90)[60:]
    for _ in range(100):  # what it has to say comes while other work is done
        got = list(pool.run(later))
        assert outcome(got) == outcome(alone.run(later))
        if not stopped.holds:
            break
    assert pool.num_dropped - before == held
    assert not stopped.silent


def test_requests_that_cannot_be_served_fail_alone(pool, alone):
    good = requests(alone.tokenizer, 2)
    bad = Request([5] * 600, SamplingParams(max_tokens=4), request_id=7)
    got = list(pool.run([*good, bad]))
    assert [c.request_id for c in got if c.finish_reason == "error"] == [7]
    assert len(got) == 5


def decided(folder):
    with Ledger(folder / "ledger.sqlite") as ledger:
        items = [(i.id, i.instruction, i.input, i.output, i.status, i.reason, i.score) for i in ledger.items()]
        replies = {p: {k: [r.raw for r in v] for k, v in ledger.replies(p).items()} for p in ("input", "response")}
    return items, replies, (folder / "dataset.jsonl").read_bytes().replace(str(folder).encode(), b"")


def test_a_run_with_workers_is_the_run_without(pool, tiny, tmp_path, monkeypatch):
    pool.release()  # the run's workers take the places; Ray is there already and stays
    recipe = read_recipe(tiny.recipe)[0]

    def execute(name, spread=None):
        run = Run(tmp_path / name, recipe, tiny.inputs, reporter=Reporter(quiet=True), device="cpu", spread=spread)
        run.execute(until="filter")
        return run

    execute("alone")
    add, calls, killed = Ledger.add_reply, [], []

    def add_and_kill(self, reply):
        calls.append(reply.id)
        if len(calls) == 20:
            killed.append(next(m.info["pid"] for m in run_pool._members if m.holds))
            os.kill(killed[0], signal.SIGKILL)
        return add(self, reply)

    made = WorkerPool.__init__

    def remember(self, *args, **kwargs):
        nonlocal run_pool
        run_pool = self
        made(self, *args, **kwargs)

    run_pool = None
    monkeypatch.setattr(WorkerPool, "__init__", remember)
    monkeypatch.setattr(Ledger, "add_reply", add_and_kill)
    execute("spread", Spread(workers=3))
    assert killed
    assert run_pool.num_replaced <= 1  # 0: it had just given its last answer
    assert len(calls) == len(set(calls)), "an item was answered twice"
    assert decided(tmp_path / "spread") == decided(tmp_path / "alone")
    assert not run_pool._members
    assert require_ray().is_initialized()


# what needs no Ray


def fake(request_id, prompt, n=1):
    return SimpleNamespace(request_id=request_id, prompt_ids=[prompt], params=SimpleNamespace(n=n), adapter=None)


def done(request_id, index=0):
    return Completion(request_id, index, 1, "", [], "stop")


def drain(work):
    found = []
    while bundle := work.next_bundle():
        found.append([r.request_id for r in bundle])
    return found


def test_requests_with_one_prompt_stay_together():
    work = _Work([fake(i, i % 20) for i in range(40)], 2)
    bundles = drain(work)
    assert sorted(i for b in bundles for i in b) == list(range(40))
    assert all({(i + 20) % 40 for i in b} == set(b) for b in bundles)
    assert len(bundles) >= 4, "each worker should get several"


def test_what_is_given_back_comes_first_and_only_while_it_is_open():
    work = _Work([fake(i, i, n=2) for i in range(20)], 2)
    first = [r.request_id for r in work.next_bundle()]
    assert work.take(done(first[0], 0)) and not work.take(done(first[0], 0))
    assert work.take(done(first[1], 0)) and work.take(done(first[1], 1))
    assert work.give_back(first, held={first[2]}) == len(first) - 2
    assert work.give_back(first, held=set()) == 1, "only the one that was held elsewhere is new"
    again = drain(work)
    assert again[0] == [first[2]]
    assert first[1] not in [i for b in again for i in b]
    assert not work.take(done(first[0], 0)), "a sample that came before its worker died"
    for i in range(20):
        for index in range(2):
            work.take(done(i, index))
    assert work.is_done and not work.next_bundle()
    assert not work.take(done(3, 1)), "a late duplicate"


def test_long_streams_are_read_as_they_are_needed():
    read = []

    def endless():
        for i in range(10**6):
            read.append(i)
            yield fake(i, i)

    work = _Work(endless(), 4)
    assert work.next_bundle()
    assert len(read) < 1000


def test_without_ray_there_is_one_clear_line(monkeypatch, tiny, tmp_path, capsys):
    from specialize.cli import main

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"pip install 'specialize\[ray\]'"):
        require_ray()
    for command in (
        ["run", "--out", str(tmp_path / "r"), "--recipe", str(tiny.recipe), "--workers", "2"],
        ["eval", "--model", tiny.inputs["model"], "--tasks", tiny.inputs["tasks"], "--ray", "auto"],
    ):
        with pytest.raises(SystemExit) as code:
            main(command)
        assert code.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "r").exists()


def test_what_is_asked_of_workers_is_checked(tiny):
    with pytest.raises(InputError, match="--workers 0; allowed: 1 or more"):
        Spread(workers=0)
    with pytest.raises(InputError, match="give a number of workers"):
        Spread()
    pytest.importorskip("ray")
    with pytest.raises(InputError, match="a GPU of its own"):
        WorkerPool(tiny.inputs["model"], Spread(workers=2), device="cuda:1")
