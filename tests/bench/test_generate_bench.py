"""The generation benchmark's workloads, peers and sweeps, on a tiny model."""

from __future__ import annotations

import json

import pytest
from specialize.bench import generate as bench
from specialize.engine.config import ModelConfig
from specialize.engine.generator import Generator
from specialize.engine.model import Model

from specialize.errors import InputError

TINY = ModelConfig("llama", 97, 32, 48, 2, 4, num_kv_heads=2, max_context=128)


def test_workloads_are_repeatable_and_share_what_is_asked():
    def words(text: str) -> list[int]:
        return [len(word) for word in text.split()]

    one = bench.make_workload(words, 97, batch=6, prompt_tokens=20, new_tokens=4, shared_prefix=9)
    two = bench.make_workload(words, 97, batch=6, prompt_tokens=20, new_tokens=4, shared_prefix=9)
    assert one == two
    assert all(prompt[:9] == one.prompts[0][:9] for prompt in one.prompts)
    assert {9 + 10 <= len(prompt) <= 9 + 30 for prompt in one.prompts} == {True}
    random_ids = bench.make_workload(None, 97, batch=3, prompt_tokens=10, new_tokens=4)
    assert all(0 <= token < 97 for prompt in random_ids.prompts for token in prompt)


def test_groups_of_prompts_have_prefixes_of_their_own():
    work = bench.make_workload(None, 97, batch=6, prompt_tokens=5, new_tokens=4, shared_prefix=9, groups=2, spread=0)
    assert work.name == "b6-p5-n4-s9-g2" and {len(p) for p in work.prompts} == {14}
    assert {tuple(p[:9]) for p in work.prompts[::2]} != {tuple(p[:9]) for p in work.prompts[1::2]}
    assert len({tuple(p[:9]) for p in work.prompts}) == 2


def test_prefix_reuse_is_compared_with_none(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(bench.SHAPES, "smollm2-135m", TINY)
    arguments = [
        "--model",
        "random:smollm2-135m",
        "--dtype",
        "fp32",
        "--device",
        "cpu",
        "--batch",
        "4",
        "--groups",
        "2",
    ]
    arguments += ["--prompt-tokens", "8", "--new-tokens", "4", "--shared-prefix", "20", "--repeats", "1"]
    out = tmp_path / "rows.json"
    assert bench.main([*arguments, "--compare-prefix-cache", "--json", str(out)]) == 0
    [row] = json.loads(out.read_text())
    assert row["same_completions"] == 4 and row["times_without_reuse"] > 0
    assert row["stats"]["on"]["cached_prompt_tokens"] == 2 * 16 and row["stats"]["off"]["cached_prompt_tokens"] == 0
    assert "4 of 4 completions the same" in capsys.readouterr().out
    with pytest.raises(InputError, match="--groups is 5"):
        bench.main([*arguments, "--groups", "5"])


def test_prompt_files_name_the_bad_line(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt_ids": [1, 2]}\n{"prompt": "ab"}\n')
    assert bench.read_prompts(path, lambda text: [len(text)], 5).prompts == [[1, 2], [2]]
    path.write_text('{"prompt_ids": [1, 2]}\n{"text": "ab"}\n')
    with pytest.raises(InputError, match=r"prompts\.jsonl:2"):
        bench.read_prompts(path, lambda text: [len(text)], 5)


def test_a_run_counts_every_token():
    generator = Generator(Model.random(TINY, 0))
    workload = bench.make_workload(None, 97, batch=5, prompt_tokens=12, new_tokens=6)
    run = bench.time_ours(generator, workload)
    assert run["generated_tokens"] == 30 and run["prompt_tokens"] == workload.prompt_tokens
    assert run["seconds"] > 0
    assert bench.time_ours(generator, workload)["cached_prompt_tokens"] == 0  # each run starts with an empty cache


def test_the_command_sweeps_and_writes(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(bench.SHAPES, "smollm2-135m", TINY)
    out = tmp_path / "rows.json"
    arguments = ["--model", "random:smollm2-135m", "--dtype", "fp32", "--device", "cpu", "--batch", "1,3"]
    arguments += ["--prompt-tokens", "8", "--new-tokens", "4", "--shared-prefix", "0,16", "--repeats", "2"]
    assert bench.main([*arguments, "--json", str(out)]) == 0
    rows = json.loads(out.read_text())
    assert [row["name"] for row in rows] == ["b1-p8-n4-s0", "b1-p8-n4-s16", "b3-p8-n4-s0", "b3-p8-n4-s16"]
    assert all(row["tokens_per_s"] > 0 and len(row["all_seconds"]) == 2 and "commit" in row for row in rows)
    assert len(capsys.readouterr().out.splitlines()) == 4
    with pytest.raises(InputError, match="no such shape"):
        bench.main(["--model", "random:nothing"])
