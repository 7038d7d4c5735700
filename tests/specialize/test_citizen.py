"""How a command behaves on a machine that others use: threads, the network, its cache, its log."""

import json
import logging
import os
import re
import socket
import subprocess
import sys

import pytest

from specialize import fetch as fetch_module
from specialize.cli import main
from specialize.errors import InputError
from specialize.fetch import cache_dir, is_offline, offline
from specialize.log import LOGGER, run_log
from specialize.pipeline import Run
from specialize.progress import Reporter
from specialize.recipe import read_recipe

LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z (DEBUG|INFO|WARNING|ERROR) +([0-9a-f]{8}) (.+)")


def outcome(arguments, capsys) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.out, said.err


# threads


@pytest.mark.parametrize(
    ("environment", "threads"),
    [({}, 1), ({"OMP_NUM_THREADS": "2"}, 2)],
)
def test_threads_of_a_container(tmp_path, environment, threads):
    """A quota of 1.5 processors; OMP_NUM_THREADS goes before it."""
    (tmp_path / "self").write_text("0::/\n")
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    code = (
        "import sys, pathlib; from specialize.engine import control_groups as c; from specialize.cli import main;"
        "c._CGROUP_ROOT, c._PROC_CGROUP = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[1]) / 'self';"
        "main(sys.argv[2:])"
    )
    clean = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), "doctor", "--json"],
        capture_output=True, text=True, env=clean | environment, check=True,
    )  # fmt: skip
    found = json.loads(done.stdout)["cpu"]
    assert found["torch_threads"] == threads
    assert found["cores"] == 1 and found["container_quota"] == 1.5


# network


@pytest.fixture
def no_network(monkeypatch):
    """The test fails where anything connects or asks pip."""

    run = subprocess.run

    def refuse(*given, **more):
        pytest.fail(f"went out: {given}")

    def only_compilers(command, *given, **more):
        return refuse(command) if "pip" in command else run(command, *given, **more)

    monkeypatch.setattr(fetch_module.subprocess, "run", only_compilers)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.delenv("SPECIALIZE_OFFLINE", raising=False)


@pytest.mark.parametrize(
    ("command", "names"),
    [
        ("fetch smollm2-135m-instruct", "smollm2-135m-instruct"),
        ("fetch owner/name", "owner/name"),
        ("generate --model smollm2-135m-instruct hello", "smollm2-135m-instruct"),
        ("chat --model smollm2-135m-instruct", "smollm2-135m-instruct"),
        ("merge smollm2-135m-instruct a out", "smollm2-135m-instruct"),
        ("doctor --model smollm2-135m-instruct", "smollm2-135m-instruct"),
        ("tune --model smollm2-135m-instruct --data d --out o", "smollm2-135m-instruct"),
        ("eval --model smollm2-135m-instruct --tasks t", "smollm2-135m-instruct"),
        ("index corpus.txt --out idx", "all-minilm-l6-v2"),
        ("run --model smollm2-135m-instruct --seeds s --corpus c --tasks t --out r", "smollm2-135m-instruct"),
        ("bench soak --model smollm2-135m-instruct --requests 1", "smollm2-135m-instruct"),
        ("run --ray auto --model m --seeds s --corpus c --tasks t --out r", "the Ray cluster auto"),
    ],
)
@pytest.mark.parametrize("how", ["option", "variable"])
def test_offline_names_what_it_would_have_fetched(no_network, tmp_path, monkeypatch, capsys, command, names, how):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "corpus.txt").write_text("The heart is in the chest.")
    if how == "variable":
        monkeypatch.setenv("SPECIALIZE_OFFLINE", "1")
    given = command.split()
    if how == "option":  # before the command's name it means the same, and `bench` takes it there
        given = ["--offline", *given] if given[0] == "bench" else [*given, "--offline"]
    code, _, said = outcome(given, capsys)
    assert code == 2
    assert re.fullmatch(rf"specialize: offline: {re.escape(names)}.* would be needed from the network; .*\n", said)
    assert not (tmp_path / "cache" / "specialize" / "packages").exists()
    assert is_offline() == (how == "variable")  # the option does not outlive the command


def test_what_is_there_works_offline(no_network, tiny, tmp_path, capsys):
    model = tiny.inputs["model"]
    code, text, said = outcome(["generate", "--model", model, "the cat", "--max-tokens", 4, "--offline"], capsys)
    assert code == 0 and text.strip(), said
    corpus, index = tiny.inputs["corpus"], tmp_path / "i"
    assert outcome(["index", corpus, "--out", index, "--embedder", "none", "--offline"], capsys)[0] == 0
    assert outcome(["search", index, "cat", "--mode", "bm25", "--offline"], capsys)[0] == 0


def test_a_peer_is_not_installed_offline(no_network, tmp_path, monkeypatch):
    from specialize.bench.peers.install import PEERS, PeerError, ensure

    monkeypatch.setenv("SPECIALIZE_OFFLINE", "1")
    spec = next(iter(PEERS.values()))
    with pytest.raises(PeerError, match=f"offline .*{re.escape(spec.packages[0])}.* cannot be fetched"):
        ensure(spec, pytest.fail, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_libraries_are_told(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with offline(True):
        assert os.environ["HF_HUB_OFFLINE"] == os.environ["SPECIALIZE_OFFLINE"] == "1"
    assert "HF_HUB_OFFLINE" not in os.environ
    monkeypatch.setenv("SPECIALIZE_OFFLINE", "0")
    assert not is_offline()


def test_cache_folder_is_xdgs(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "specialize"


# memory


def test_an_index_that_cannot_fit_is_refused_in_one_line(tiny, tmp_path, capsys):
    arguments = ["index", tiny.inputs["corpus"], "--out", tmp_path / "i", "--embedder", "none", "--memory", "100MB"]
    code, _, said = outcome([*arguments, "--quiet"], capsys)
    assert code == 2
    assert re.search(r"specialize: index: 40 passages need 0\.07 GB of memory .* or more memory$", said.strip())


def test_doctor_foretells_a_million_passages(capsys):
    code, text, _ = outcome(["doctor", "--passages", "1000000", "--json", "--memory", "3GB"], capsys)
    found = json.loads(text)
    assert code == 0 and not found["fits"]
    assert found["graph_bytes"] == pytest.approx(1_000_000 * (8 * 16 + 12 + 4 * 384 + 102 + 84 / 15))
    code, text, _ = outcome(["doctor", "--passages", "1000", "--dim", "0"], capsys)
    assert code == 0 and "fits: 0.0" in text and "graph" not in text
    assert outcome(["doctor", "--passages", "10", "--model", "m"], capsys)[0] == 2


# log


def logged(folder) -> list[tuple[str, str, str]]:
    found = [LINE.fullmatch(line) for line in (folder / "run.log").read_text().splitlines()]
    assert all(found)
    return [match.groups() for match in found if match is not None]


def test_a_run_logs_under_an_id_for_each_process(tiny, tmp_path):
    def execute(until, **more):
        run = Run(tmp_path / "r", read_recipe(tiny.recipe)[0], tiny.inputs, reporter=Reporter(quiet=True), **more)
        run.execute(until=until)

    execute("index")
    first = logged(tmp_path / "r")
    assert {level for level, _, _ in first} == {"INFO"}
    assert [text.split(",")[0] for _, _, text in first if text.startswith("stage")] == [
        "stage index begins", "stage index is done",
    ]  # fmt: skip
    assert first[0][2].startswith("begins: specialize ") and first[-1][2] == "ends: done"
    execute("teacher", log_level="debug")
    lines = logged(tmp_path / "r")
    assert lines[: len(first)] == first
    ids = [run_id for _, run_id, _ in lines]
    assert len(set(ids)) == 2 and len(set(ids[len(first) :])) == 1
    assert "DEBUG" in {level for level, _, _ in lines}
    size = len(lines)
    execute("teacher", log_level="error")
    assert len(logged(tmp_path / "r")) == size


def test_how_it_ended_is_logged(tmp_path):
    for error in (InputError("too\nlittle"), KeyboardInterrupt(), ValueError("surprise")):
        with pytest.raises(type(error)), run_log(tmp_path):
            raise error
    text = (tmp_path / "run.log").read_text()
    assert "ERROR" in text and "ends: too" in text and "\n    little\n" in text
    assert "WARNING" in text and "ends: interrupted" in text
    assert "\n    Traceback" in text and "ValueError: surprise" in text
    assert not any(isinstance(handler, logging.FileHandler) for handler in LOGGER.handlers)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_log_that_cannot_be_written_ends_nothing(tmp_path, capsys):
    (tmp_path / "run.log").symlink_to("/dev/full")
    with run_log(tmp_path):
        LOGGER.info("lost")
    with run_log(tmp_path / "missing"):
        LOGGER.info("lost, too")
    assert capsys.readouterr() == ("", "")
