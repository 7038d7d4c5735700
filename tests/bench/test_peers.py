"""Peers: the protocol with real processes on a tiny checkpoint, failures that are reported, floors, the chart."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from specialize.bench.charts import Bar, bar_chart
from specialize.bench.floor import Ceilings, generation_floor, spread
from specialize.bench.generate import Workload
from specialize.bench.peers import install, main, measure
from specialize.bench.peers.install import SCRIPTS, PeerError, PeerSpec
from specialize.bench.peers.process import PeerProcess
from specialize.bench.peers.workload import PUBMEDQA_LENGTHS, peers_workload
from specialize.engine.config import ModelConfig

from specialize.errors import InputError

PYTHON = Path(sys.executable)  # has transformers for the tests, so no environment needs to be made


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.5,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(99)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    rows = [[(7 * i + 3 * j) % 90 + 3 for j in range(5 + 4 * i)] for i in range(3)]
    path.write_text("".join(json.dumps({"prompt_ids": row}) + "\n" for row in rows))
    return path


@pytest.fixture
def no_installing(monkeypatch):
    """transformers from the tests' own environment; llama_cpp fails to install."""

    def ensure(spec, say, folder=None):
        if spec.environment == "transformers":
            return PYTHON
        raise PeerError("does not install: ERROR: no matching distribution")

    monkeypatch.setattr(measure, "ensure", ensure)


def test_the_command_compares_and_writes_and_names_what_is_missing(
    checkpoint, prompts, tmp_path, no_installing, capsys
):
    out = tmp_path / "out"
    arguments = ["--model", str(checkpoint), "--peers", "transformers,vllm,llama_cpp", "--prompts", str(prompts)]
    arguments += ["--dtype", "fp32", "--new-tokens", "6", "--rounds", "2", "--threads", "1", "--out", str(out)]
    assert main(arguments) == 0
    body = json.loads((out / "peers.json").read_text())
    assert body["check"]["equal"] == body["check"]["prompts"] == 3  # our fp32 greedy tokens are transformers'
    assert body["workload"]["prompts"] == 3 and body["commit"] and body["device"]
    rows = {row["name"]: row for row in body["rows"]}
    assert rows["vllm"]["error"].startswith("does not install") and "tokens_per_s" not in rows["vllm"]
    assert "GGUF" in rows["llama_cpp"]["error"]
    ours, theirs = rows["ours fp32"], rows["transformers"]
    for row in (ours, theirs):
        assert len(row["seconds"]) == 2 and row["greedy_agreement"] == 1.0 and row["memory_bytes"] > 2**20
        assert row["tokens_per_s"]["median"] == pytest.approx(
            sum(18 / seconds for seconds in row["seconds"]) / 2, rel=1e-6
        )
    expected = sum(b / a for a, b in zip(ours["seconds"], theirs["seconds"], strict=True)) / 2
    assert theirs["times"] == {"ours fp32": pytest.approx(expected)}
    assert body["floors"]["fp32"]["seconds"] < min(ours["seconds"])
    assert (out / "peers.png").read_bytes().startswith(b"\x89PNG") and "floor, fp32" in (out / "peers.svg").read_text()
    printed = capsys.readouterr().out
    assert "vLLM (CPU): left out" in printed and "llama.cpp: left out" in printed and "floor, fp32" in printed


def test_wrong_greedy_tokens_stop_the_measurement(monkeypatch):
    setting = measure.Setting("model", "model", None, "fp32", "cpu", 1, 1)
    workload = Workload("work", [[1, 2], [3]], 4)

    def contender(tokens):
        return lambda *_, **__: measure.Contender("name", "their", "fp32", greedy=tokens)

    monkeypatch.setattr(measure, "start_ours", contender([[5, 6], [7, 8]]))
    monkeypatch.setattr(measure, "start_peer", contender([[5, 6], [7, 8]]))
    peer = ("transformers", install.PEERS["transformers"])
    assert measure.reference_tokens(setting, workload, print, peer)["equal"] == 2
    monkeypatch.setattr(measure, "start_peer", contender([[5, 6], [7, 9]]))
    with pytest.raises(RuntimeError, match="equal their's on 1 of 2 prompts"):
        measure.reference_tokens(setting, workload, print, peer)


def test_agreement_counts_up_to_the_first_token_that_differs():
    assert measure.agreement([[1, 2, 3, 4], [1, 2]], [[1, 2, 9, 4], [1, 2]]) == 0.75
    assert measure.agreement([[1], []], [[2], []]) == 0.0


def test_a_contender_that_takes_long_sits_out_and_one_that_fails_is_left_out(monkeypatch):
    class Process:
        def __init__(self, seconds: float, tokens: int = 4) -> None:
            self.answer = {"seconds": seconds, "token_ids": [[0] * tokens] * 2}

        def ask(self, *_, **__):
            turns.append(self.answer["seconds"])
            return self.answer

        resume = pause = close = memory_bytes = lambda self: 0

    turns: list[float] = []
    workload = Workload("work", [[1, 2], [3]], 4)
    processes = [Process(1.0), Process(50.0), Process(2.0, tokens=3)]
    contenders = [measure.Contender(f"ours {i}", "label", "fp32", process=p) for i, p in enumerate(processes)]
    measure.run_rounds(contenders, workload, rounds=4, budget_s=60.0, say=lambda text: None)
    assert turns == [1.0, 50.0, 2.0, 50.0, 1.0, 1.0, 1.0]
    assert contenders[2].error == "made [3] new tokens where 4 were asked for" and not contenders[2].seconds


def test_a_peers_error_and_its_death_are_told(tmp_path):
    def peer(name: str, body: str) -> PeerProcess:
        script = tmp_path / f"{name}.py"
        script.write_text(f"import sys\nsys.path.insert(0, {str(SCRIPTS)!r})\n{body}")
        return PeerProcess(name, PYTHON, script, tmp_path / "log")

    raises = peer(
        "raises", "from protocol import serve\ndef load():\n    raise OSError('no weights')\nserve(load=load)\n"
    )
    with pytest.raises(PeerError, match="OSError: no weights"):
        raises.ask("load")
    raises.close()
    dies = peer("dies", "sys.stdin.readline()\nsys.exit('out of luck')\n")
    with pytest.raises(PeerError, match=r"ended with code 1; its last words: out of luck"):
        dies.ask("load")
    dies.close()
    sleeps = peer("sleeps", "import time\ntime.sleep(60)\n")
    with pytest.raises(PeerError, match="no answer to load within 0 s"):
        sleeps.ask("load", timeout_s=0.05)
    sleeps.pause()
    sleeps.close()  # a paused one ends, too


def test_a_peer_ends_when_its_loading_is_interrupted(tmp_path, monkeypatch):
    started = []

    def interrupted(self, *_, **__):
        started.append(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(PeerProcess, "ask", interrupted)
    setting = measure.Setting("model", "model", None, "fp32", "cpu", 1, 1)
    with pytest.raises(KeyboardInterrupt):
        measure.start_ours(setting, Workload("work", [[1]], 4), None, "fp32", tmp_path)
    assert started[0]._process.returncode is not None


def test_what_libraries_print_does_not_mix_with_answers(tmp_path):
    script = tmp_path / "chatty.py"
    script.write_text(
        f"import os, sys\nsys.path.insert(0, {str(SCRIPTS)!r})\nfrom protocol import serve\n"
        "def load():\n    print('hello')\n    os.write(1, b'from C\\n')\n    return {'versions': {}}\n"
        "serve(load=load)\n"
    )
    peer = PeerProcess("chatty", PYTHON, script, tmp_path / "log")
    assert peer.ask("load") == {"versions": {}}
    peer.close()
    assert sorted((tmp_path / "log").read_text().split("\n")) == ["", "from C", "hello"]


@pytest.mark.slow
def test_an_environment_is_made_once_and_a_failure_says_why(tmp_path):
    empty = PeerSpec("nothing", "vllm_generate", "nothing", ("pip",))
    said: list[str] = []
    python = install.ensure(empty, said.append, tmp_path)
    assert python.exists() and len(said) == 1
    assert install.ensure(empty, said.append, tmp_path) == python and len(said) == 1
    broken = PeerSpec("broken", "vllm_generate", "broken", (str(tmp_path / "no-such-wheel.whl"),))
    with pytest.raises(PeerError, match=r"does not install: ERROR.*no-such-wheel"):
        install.ensure(broken, said.append, tmp_path)
    assert not (tmp_path / "broken").exists()


def test_the_floor_is_the_larger_of_compute_and_traffic():
    config = ModelConfig("llama", 10, 4, 8, 1, 2, num_kv_heads=1, head_dim=2, max_context=64)
    blocks = 4 * (4 + 2 + 2) + 4 * 4 + 2 * 4 * 8 + 8 * 4
    # two prompts of 3 and 5 tokens, 2 new each: 8 + 2 tokens computed, 4 through the output projection
    pairs = 4 * 5 / 2 + 6 * 7 / 2
    operations = 2 * blocks * 10 + 2 * 40 * 4 + 4 * 1 * 2 * 2 * pairs
    moved = 1 * (blocks + 40) * 2 + (1 * (3 + 1) + 1 * (5 + 1)) * 2 * 1 * 1 * 2 * 2
    floor = generation_floor(config, [3, 5], 2, Ceilings(1.0, 1e9), bytes_per_weight=2)
    assert floor["operations"] == operations and floor["bytes"] == moved
    assert floor["seconds"] == operations and floor["tokens_per_s"] == 4 / operations
    slow_memory = generation_floor(config, [3, 5], 2, Ceilings(1e12, 1.0), bytes_per_weight=2)
    assert slow_memory["seconds"] == moved
    halves = generation_floor(config, [3, 5], 2, Ceilings(1e12, 1.0), bytes_per_weight=2, batch=1)
    assert halves["bytes"] == moved + (blocks + 40) * 2  # one at a time: the weights twice


def test_percentiles():
    assert spread([3.0]) == {"median": 3.0, "p20": 3.0, "p80": 3.0}
    assert spread([5.0, 1.0, 2.0, 4.0, 3.0, 6.0]) == {"median": 3.5, "p20": 2.0, "p80": 5.0}


def test_the_chart_is_written_twice_and_is_the_same_each_time(tmp_path):
    bars = [Bar("one", 10.0, 9.0, 12.0, ours=True), Bar("two", 20.0, 19.0, 21.0)]
    first = bar_chart(bars, tmp_path / "a", title="speed", unit="tokens per second", floors=[("floor", 40.0)])
    second = bar_chart(bars, tmp_path / "b", title="speed", unit="tokens per second", floors=[("floor", 40.0)])
    assert [p.name for p in first] == ["a.png", "a.svg"]
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]
    drawn = first[1].read_text()
    assert all(text in drawn for text in ("one", "two", "speed", "tokens per second", "floor: 40"))


def test_the_work_is_of_a_task_file_or_a_stand_in_of_the_same_lengths(tmp_path):
    def encode(text: str) -> list[int]:
        return [len(word) for word in text.split()]

    made_up = peers_workload(None, encode, 4)
    assert tuple(map(len, made_up.prompts)) == PUBMEDQA_LENGTHS and made_up.prompt_tokens == 11642
    assert len(peers_workload(None, encode, 4, 40).prompts) == 40
    task = tmp_path / "task.json"
    task.write_text(json.dumps({"examples": [{"input": "a b c"}, {"input": "d " * 600}]}))
    assert list(map(len, peers_workload(task, encode, 4).prompts)) == [3, 512]
    task.write_text("{}")
    with pytest.raises(InputError, match="not a task file"):
        peers_workload(task, encode, 4)
    with pytest.raises(InputError, match="no such file"):
        peers_workload(tmp_path / "nothing.json", encode, 4)


def test_wrong_use_is_told(capsys):
    assert main(["--peers", "tensorflow"]) == 2
    assert "tensorflow: no such peer; allowed: vllm, openvino" in capsys.readouterr().err
    with pytest.raises(InputError, match="no-such-model"):
        main(["--model", "no-such-model", "--peers", ""])


def test_floors_that_a_run_beats_are_dropped():
    from specialize.bench.peers.command import _drop_floors_that_were_beaten

    rows = [{"weights": "bf16", "label": "ours", "tokens_per_s": {"p80": 10.0}}, {"weights": "q4", "error": "no"}]
    body = {"rows": rows, "floors": {"bf16": {"tokens_per_s": 11.0}, "int8": {"tokens_per_s": 12.0}}}
    _drop_floors_that_were_beaten(body, print)
    assert len(body["floors"]) == 2
    body["floors"]["bf16"] = {"tokens_per_s": 9.0}
    _drop_floors_that_were_beaten(body, print)
    assert body["floors"] == {}
