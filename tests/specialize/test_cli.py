"""The command line: wrong input in one line and exit code 2, generation and tuning and evaluation by file, Ctrl-C."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from specialize import cli


def call(capsys, *arguments):
    """(exit code, stdout, stderr) of a command run in this process."""
    with pytest.raises(SystemExit) as caught:
        cli.main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return caught.value.code, out, err


@pytest.fixture(scope="module")
def arguments(tiny):
    return [x for name, path in tiny.inputs.items() for x in (f"--{name}", path)]


def test_importing_the_command_line_is_quick_and_loads_no_torch():
    code = "import sys, time; t = time.perf_counter(); import specialize.cli; "
    code += "print(time.perf_counter() - t, 'torch' in sys.modules)"
    best = min(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        for _ in range(3)
    )
    seconds, torch_loaded = best.split()
    assert torch_loaded == "False"
    assert float(seconds) < 0.5


def test_every_command_explains_itself(capsys):
    code, out, _ = call(capsys, "--help")
    assert code == 0
    for name, command in cli.cli.commands.items():
        assert name in out
        if name not in ("bench", "profile"):  # their --help is the benchmark's own
            assert "Example" in call(capsys, name, "--help")[1] or name == "doctor", name
            assert command.help


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["generate", "--model", "nowhere", "hello"], "nowhere"),
        (["generate", "--model", "nowhere"], "give a PROMPT or --prompts"),
        (["generate", "--model", "m", "--prompts", "x.jsonl"], "--out"),
        (["run", "--out", "OUT"], "--model is missing"),
        (["tune", "--model", "m"], "--data is missing"),
        (["eval", "--tasks", "t"], "--model is missing"),
        (["eval", "OUT", "--shots", "5"], "--shots goes with --model; of a RUN: --set evaluate.shots"),
        (["eval", "OUT", "--max-tokens", "96"], "--set evaluate.max_tokens"),
        (["eval", "OUT", "--out", "x.json"], "--out goes with --model; a RUN has its own"),
        (["synth", "OUT"], "is no run folder"),
        (["report", "OUT"], "is no run folder"),
        (["search", "OUT", "query"], "does not exist"),
        (["fetch", "no-such-name"], "unknown name"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(capsys, tmp_path, command, message):
    code, out, err = call(capsys, *[str(tmp_path / "out") if a == "OUT" else a for a in command])
    assert code == 2
    assert out == ""
    assert message in err
    assert err.count("\n") == 1


def test_wrong_usage_is_exit_code_2(capsys):
    for arguments, message in (
        (("run", "--nonsense"), "No such option"),
        (("generate", "--model", "m", "x", "--max-tokens", "0"), "0 is not in the range x>=1"),
        (("init",), "Missing argument 'DOMAIN'; see specialize init --help"),
    ):
        code, _, err = call(capsys, *arguments)
        assert code == 2 and message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("seeds", "{bad\n", ":1: not JSON"),
        ("seeds", "", "is empty"),
        ("tasks", '{"name": "x"}', "no examples"),
        ("corpus", '{"id": "a", "title": "", "text": "fine text"}\n{"id": "b"}\n', ":2"),
        ("corpus", "", ""),
    ],
)
def test_bad_files_of_a_run(capsys, tiny, tmp_path, name, content, message):
    path = tmp_path / ("t.json" if name == "tasks" else f"{name}.jsonl")
    path.write_text(content)
    inputs = tiny.inputs | {name: str(path)}
    flags = [x for key, value in inputs.items() for x in (f"--{key}", value)]
    code, _, err = call(capsys, "run", *flags, "--recipe", tiny.recipe, "--out", tmp_path / "run", "--quiet")
    assert code == 2
    assert str(path) in err
    assert message in err
    assert len([line for line in err.splitlines() if line.startswith("specialize:")]) == 1


def test_an_interrupted_file_keeps_what_is_finished(capsys, tiny, tmp_path, monkeypatch):
    from specialize.engine import Generator

    prompts, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts.write_text("".join(json.dumps({"prompt_ids": [i + 3]}) + "\n" for i in range(3)))
    flags = ["--model", tiny.inputs["model"], "--dtype", "fp32", "--max-tokens", 4, "--ignore-eos"]
    flags += ["--prompts", prompts, "--out", out]
    assert call(capsys, "generate", *flags, "--speculation", "prompt_lookup")[0] == 0
    whole = [json.loads(line) for line in out.read_text().splitlines()]
    out.unlink()
    run = Generator.run

    def stopping(generator, requests):
        completions = list(run(generator, requests))
        yield from (completions[2], completions[0])
        raise KeyboardInterrupt

    monkeypatch.setattr(Generator, "run", stopping)
    code, _, err = call(capsys, "generate", *flags)
    assert code == 130 and not out.exists()
    partial = tmp_path / "out.jsonl.partial"
    assert f"2 finished replies are in {partial}" in err
    rows = [json.loads(line) for line in partial.read_text().splitlines()]
    assert rows == [{"prompt": r["prompt"], "sample": 0} | whole[r["prompt"]] for r in rows] and len(rows) == 2


def test_generate_by_file_is_in_order(capsys, tiny, tmp_path):
    prompts = tmp_path / "in.jsonl"
    rows = [{"prompt": "The cat"}, {"prompt_ids": [5, 6, 7, 8, 9]}, {"prompt": "The owl that we saw"}]
    prompts.write_text("".join(json.dumps(r) + "\n" for r in rows))
    out, stats = tmp_path / "out.jsonl", tmp_path / "stats.json"
    flags = [
        "--model",
        tiny.inputs["model"],
        "--dtype",
        "fp32",
        "--max-tokens",
        5,
        "--ignore-eos",
        "--n",
        2,
        "--temperature",
        1,
    ]
    code, _, err = call(
        capsys, "generate", *flags, "--prompts", prompts, "--out", out, "--stats", stats, "--logprobs", 2
    )
    assert code == 0, err
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(found) == 6
    assert all(set(r) == {"text", "token_ids", "finish_reason", "logprobs"} for r in found)
    assert all(len(r["token_ids"]) == len(r["logprobs"]) == 5 for r in found)
    numbers = json.loads(stats.read_text())
    assert numbers["generated_tokens"] == 30
    assert numbers["prompt_tokens"] > 5
    assert {"seconds", "tokens_per_second"} <= set(numbers)

    from specialize.engine import Generator, SamplingParams

    generator = Generator.from_pretrained(tiny.inputs["model"], dtype="fp32")
    params = SamplingParams(max_tokens=5, temperature=1.0, ignore_eos=True, n=2)
    expected = generator.generate([r.get("prompt") or r["prompt_ids"] for r in rows], params)
    assert [r["token_ids"] for r in found] == [c.token_ids for c in expected]

    prompts.write_text('{"prompt": "x"}\n{"text": "y"}\n')
    code, _, err = call(capsys, "generate", *flags, "--prompts", prompts, "--out", out)
    assert code == 2
    assert f"{prompts}:2: neither" in err


def test_quantised_weights_by_every_command(capsys, tiny, tmp_path):
    """Converted once or quantised on load: the same replies; tuned over and scored likewise."""
    model, folder = ["--model", tiny.inputs["model"], "--quantize", "int8"], tmp_path / "int8"
    code, _, err = call(capsys, "convert", tiny.inputs["model"], folder, "--quantize", "int8")
    assert code == 0, err
    flags = ["The cat", "--dtype", "fp32", "--max-tokens", 8, "--ignore-eos", "--json"]
    replies = [call(capsys, "generate", *m, *flags) for m in (model, ["--model", folder])]
    assert replies[0][0] == 0, replies[0]
    assert replies[0][1] == replies[1][1]

    data, adapter = tmp_path / "rows.jsonl", tmp_path / "adapter"
    data.write_text('{"prompt": "raw prompt", "response": "no"}\n')
    for command in (
        ("tune", *model, "--data", data, "--out", adapter, "--rank", 2, "--epochs", 1, "--dtype", "fp32"),
        ("eval", *model, "--adapter", adapter, "--tasks", tiny.inputs["tasks"], "--limit", 1, "--max-tokens", 2),
    ):
        code, _, err = call(capsys, *command)
        assert code == 0, err

    for command, message in (
        (("convert", folder, tmp_path / "again", "--quantize", "fp8"), "its weights are int8 already"),
        (("generate", "--model", folder, "--quantize", "fp8", "hi"), "leave --quantize out"),
        (("generate", *model[:2], "--quantize", "int7", "hi"), "'int7' is no known format; allowed: none, nf4"),
        (("generate", *model[:2], "--quantize", "nf4", "hi"), "nf4 takes inputs in blocks of 64, and qkv has 32"),
    ):
        code, _, err = call(capsys, *command)
        assert code == 2 and message in err and err.count("\n") == 1, err


def test_tune_and_eval_outside_a_run(capsys, tiny, tmp_path):
    data, adapter, stats = tmp_path / "rows.jsonl", tmp_path / "adapter", tmp_path / "stats.json"
    rows = [{"instruction": "Say it.", "input": f"number {i}", "output": "yes"} for i in range(6)]
    rows.append({"prompt": "raw prompt", "response": "no"})
    data.write_text("".join(json.dumps(r) + "\n" for r in rows))
    flags = ["--model", tiny.inputs["model"], "--dtype", "fp32"]
    code, _, err = call(
        capsys,
        "tune",
        *flags,
        "--data",
        data,
        "--out",
        adapter,
        "--rank",
        4,
        "--epochs",
        2,
        "--batch",
        4,
        "--lr",
        0.01,
        "--stats",
        stats,
    )
    assert code == 0, err
    numbers = json.loads(stats.read_text())
    assert numbers["steps"] == 4
    assert len(numbers["losses"]) == 4
    assert numbers["tokens"] > 0
    assert {"seconds", "tokens_per_second"} <= set(numbers)
    assert json.loads((adapter / "adapter_config.json").read_text())["r"] == 4

    out = tmp_path / "eval.json"
    code, shown, err = call(
        capsys,
        "eval",
        *flags,
        "--adapter",
        adapter,
        "--tasks",
        tiny.inputs["tasks"],
        "--shots",
        "0,1",
        "--limit",
        3,
        "--max-tokens",
        4,
        "--out",
        out,
        "--json",
    )
    assert code == 0, err
    found = json.loads(out.read_text())
    assert json.loads(shown) == found
    assert set(found) >= {"model", "adapter", "results", "means"}
    assert {(r["shots"], r["metric"]) for r in found["results"]} == {
        (s, m) for s in (0, 1) for m in ("token_f1", "entity_f1", "rouge_l")
    }
    assert all(r["n"] == 3 for r in found["results"])
    assert call(capsys, "eval", *flags, "--tasks", tiny.inputs["tasks"], "--shots", "9")[0] == 2
    assert call(capsys, "eval", *flags, "--tasks", tiny.inputs["tasks"], "--adapter", tmp_path / "none")[0] == 2


def test_a_run_by_command_resumes_and_remembers(capsys, tiny, arguments, tmp_path):
    run = tmp_path / "run"
    code, out, err = call(
        capsys, "run", *arguments, "--recipe", tiny.recipe, "--out", run, "--until", "filter", "--quiet"
    )
    assert code == 0, err
    assert "filter: done" in out
    code, out, err = call(capsys, "eval", run, "--quiet", "--json")
    assert code == 0, err
    assert set(json.loads(out)["systems"]) == {"base", "seeds", "expert"}
    code, out, err = call(capsys, "run", "--out", run, "--quiet")
    assert code == 0, err
    assert "mean token_f1" in out
    assert str(run / "report.html") in out
    code, out, err = call(capsys, "run", "--out", run, "--set", "evaluate.teacher=true", "--quiet")
    assert code == 0, err
    for name in ("seeds alone, 6 epochs", "seeds alone, equal tokens"):
        assert f"  {name}, 0-shot" in out and f"expert against the {name}, 0-shot: " in out
    code, _, err = call(capsys, "run", "--out", run, "--set", "tune.rank=2", "--quiet")
    assert code == 2
    assert "tune.rank: 8 → 2" in err
    assert "--redo" in err
    assert Path(call(capsys, "report", run)[1].strip()) == run / "report.html"


def test_ctrl_c_leaves_a_run_that_resumes(tiny, arguments, tmp_path):
    run = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "specialize.cli",
        "run",
        *arguments,
        "--recipe",
        str(tiny.recipe),
        "--out",
        str(run),
        "--quiet",
    ]
    # Under a shell's `&` the tests inherit an ignored SIGINT; the child gets what a terminal would give it.
    child = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    for _ in range(600):
        if (run / "teacher").exists():
            break
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert err.splitlines()[-1].startswith("interrupted")
    assert "Traceback" not in err


def test_an_unexpected_error_is_short(capsys, monkeypatch):
    import specialize.doctor

    def fail():
        raise RuntimeError("something broke\nmore lines")

    monkeypatch.setattr(specialize.doctor, "examine", fail)
    code, _, err = call(capsys, "doctor")
    assert (code, err) == (1, "specialize: RuntimeError: something broke (add --debug for the traceback)\n")
    with pytest.raises(RuntimeError):
        cli.main(["doctor", "--debug"])

    def full():
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(specialize.doctor, "examine", full)
    code, _, err = call(capsys, "doctor")
    assert code == 1
    assert "the disk is full" in err


def test_doctor(capsys):
    code, out, _ = call(capsys, "doctor")
    assert code == 0
    assert "will use" in out
    assert json.loads(call(capsys, "doctor", "--json")[1])["packages"]["torch"]


def test_doctor_plans_without_weights_or_device(capsys):
    options = ("--model", "mpt-30b", "--quantize", "int8", "--kv-dtype", "int8", "--memory", "h100-80gb")
    code, out, err = call(capsys, "doctor", *options)
    assert code == 0, err
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line}
    assert rows["weights"][1] == "30.33" and rows["room"][2] == "68"
    plan = json.loads(call(capsys, "doctor", *options, "--json", "--context", 2000)[1])
    assert plan["num_sequences"] == 34 and plan["fits"]
    code, out, _ = call(capsys, "doctor", "--model", "mpt-30b", "--memory", "24GB")
    assert code == 0 and out.rstrip().endswith("does not fit: the parts above leave no room for the KV cache")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--memory", "24GB"), "--memory needs --model"),
        (("--model", "mpt-9b"), "shapes known by name: smollm2-135m, llama-3.1-8b, mpt-7b, mpt-30b"),
        (("--model", "mpt-7b", "--memory", "lots"), "give a size such as 80GB, or a card: a100-40gb"),
        (("--model", "mpt-7b", "--kv-dtype", "int3"), "kv_dtype is 'int3'; allowed: auto, fp32"),
    ],
)
def test_doctor_refuses_in_one_line(capsys, options, message):
    code, _, err = call(capsys, "doctor", *options)
    assert code == 2 and message in err and err.count("\n") == 1


def test_tuning_is_planned_without_weights_or_device(capsys):
    options = ("--dry-run", "--model", "mpt-30b", "--quantize", "nf4", "--memory", "h100-80gb", "--max-length", 4096)
    code, out, err = call(capsys, "tune", *options)
    assert code == 0, err
    assert "fits: 66." in out and "tokens a second" in out
    plan = json.loads(call(capsys, "tune", *options, "--json")[1])
    assert plan["fits"] and plan["recompute_layers"] == 0 and plan["tokens_per_s"] > 3000
    code, out, _ = call(capsys, "tune", "--dry-run", "--model", "mpt-30b", "--memory", "40GB")
    assert code == 0 and "does not fit" in out


def test_profile_options_are_checked(capsys, tmp_path):
    code, _, err = call(capsys, "profile", "generate", "--model", "random:huge", "--out", tmp_path / "t.json")
    assert code == 2 and "no such shape; allowed: random:smollm2-135m" in err
    code, _, err = call(capsys, "profile", "train", "--out", tmp_path)
    assert code == 2 and "give a file in a folder that exists" in err


def test_tuning_that_cannot_fit_is_refused_before_work(capsys, tiny, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "Say", "response": "no"}\n')
    options = ("--model", tiny.inputs["model"], "--data", data, "--out", tmp_path / "a", "--device", "cpu")
    code, _, err = call(capsys, "tune", *options, "--memory", "1MB")
    assert code == 2 and "has 0.00 GB on cpu: process" in err


def test_a_cap_too_small_is_refused_before_work(capsys, tiny):
    options = ("--model", tiny.inputs["model"], "--dtype", "fp32", "--device", "cpu", "--memory", "1MB", "Say")
    code, _, err = call(capsys, "generate", *options)
    assert code == 2 and "does not fit in 0.00 GB on cpu: process" in err


def test_chat_reads_lines(capsys, tiny, monkeypatch):
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("Say something.\n\n"))
    code, out, err = call(capsys, "chat", "--model", tiny.inputs["model"], "--dtype", "fp32", "--max-tokens", 4)
    assert code == 0, err
    assert out.endswith("\n\n")
