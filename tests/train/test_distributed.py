"""Two processes over gloo train as one does: same losses, same adapter, resumable when one of them is killed."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from models import rows, tiny_pair
from safetensors.torch import load_file
from specialize.engine.model import Model
from specialize.train.config import TrainConfig
from specialize.train.data import build_micro_batches
from specialize.train.distributed import ALONE, LostProcessError, Ranks, joined, place
from specialize.train.loop import tune

from specialize.errors import InputError

WORKER = Path(__file__).parent / "distributed_worker.py"
CONFIG = {
    "rank": 4, "epochs": 2, "batch_size": 5, "max_batch_tokens": 40, "learning_rate": 1e-2, "val_fraction": 0.2,
    "checkpoint_interval": 2, "weight_decay": 0.01,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_pair("Llama", path)
    return path


@pytest.fixture(scope="module")
def examples():
    return rows(23)


@pytest.fixture(scope="module")
def alone(folder, examples, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "adapter"
    return tune(Model.from_pretrained(folder, inference=False), examples, TrainConfig(**CONFIG), out)


def launch(folder, examples, base, *jobs):
    """torchrun with two processes that do the jobs one after the other; (exit code, standard error)."""
    settings = {"model": str(folder), "rows": [asdict(e) for e in examples], "config": CONFIG, "jobs": jobs}
    (base / "job.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(WORKER), str(base / "job.json")], capture_output=True, text=True, env=environment, timeout=240
    )
    return done.returncode, done.stderr


def told(out):
    """What each of the two processes wrote."""
    return [json.loads(out.with_suffix(f".{rank}.json").read_text()) for rank in (0, 1)]


def matrices(folder):
    return load_file(folder / "adapter_model.safetensors")


def check_equal(losses, val_losses, out, alone):
    assert list(losses) == pytest.approx(list(alone.losses), abs=1e-5, rel=0)
    assert [v for _, v in val_losses] == pytest.approx([v for _, v in alone.val_losses], abs=1e-5, rel=0)
    expected, got = matrices(alone.adapter_path), matrices(out)
    assert set(got) == set(expected)
    for name, value in expected.items():
        assert torch.allclose(got[name], value, atol=2e-4), name
    lines = (out / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, alone.steps + 1))


def test_two_processes_train_as_one_and_shards_take_half_the_memory(folder, examples, alone, tmp_path):
    whole, parts = tmp_path / "ddp", tmp_path / "fsdp2"
    jobs = [{"out": str(whole), "shard": False}, {"out": str(parts), "shard": True}]
    code, error = launch(folder, examples, tmp_path, *jobs)
    assert code == 0, error
    for out in (whole, parts):
        first, second = told(out)
        check_equal(first["losses"], first["val_losses"], out, alone)
        assert first["grad_norms"] == pytest.approx(alone.grad_norms, rel=1e-4)
        assert first["tokens"] == alone.tokens
        assert first["losses"] == second["losses"]
    model = Model.from_pretrained(folder, inference=False)
    layers = sum(adapted.linear.weight.numel() * 4 for adapted in model.adaptable)
    for one, half in zip(told(whole), told(parts), strict=True):
        for when in ("held", "held_after"):
            assert one[when] - half[when] == pytest.approx(layers / 2, rel=0.1), when


def test_a_killed_process_is_an_error_and_the_run_goes_on_alone(folder, examples, alone, tmp_path):
    out = tmp_path / "adapter"
    code, error = launch(folder, examples, tmp_path, {"out": str(out), "shard": False, "die_at": 4, "victim": 1})
    assert code != 0
    assert "lost the others" in error or "SIGKILL" in error or "Signal 9" in error
    assert not (out / "adapter_model.safetensors").exists()
    assert (out / "checkpoint.safetensors").exists()
    done = []
    model = Model.from_pretrained(folder, inference=False)
    result = tune(model, examples, TrainConfig(**CONFIG), out, on_step=lambda report: done.append(report.step))
    assert done[0] > 1, "it began anew"
    check_equal(result.losses, result.val_losses, out, alone)


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True], ids=["ddp", "fsdp2"])
def test_a_killed_first_process_leaves_a_run_that_goes_on(shard, folder, examples, alone, tmp_path):
    out = tmp_path / "adapter"
    job = {"out": str(out), "shard": shard}
    code, _ = launch(folder, examples, tmp_path, job | {"die_at": 4, "victim": 0})
    assert code != 0
    assert not (out / "adapter_model.safetensors").exists()
    code, error = launch(folder, examples, tmp_path, job)
    assert code == 0, error
    first, _ = told(out)
    check_equal(first["losses"], first["val_losses"], out, alone)


def test_shares_hold_every_row_once_and_weigh_as_much():
    examples = rows(17, longest=30)
    lengths = [e.num_tokens for e in examples]
    for size in (1, 2, 3, 20):
        dealt = Ranks(0, size).deal(lengths, 64)
        assert len(dealt) == size
        assert sorted(i for bins in dealt for indices in bins for i in indices) == list(range(17))
        assert all(sum(lengths[i] for i in indices) <= 64 for bins in dealt for indices in bins)
        sums = [sum(lengths[i] for indices in bins for i in indices) for bins in dealt]
        assert max(sums) - min(sums) <= max(lengths)
        for normalise in ("tokens", "examples"):
            made = [
                build_micro_batches(examples, max_batch_tokens=64, device="cpu", normalise=normalise, bins=bins)
                for bins in dealt
            ]
            assert float(sum(m.weights.sum() for share in made for m in share)) == pytest.approx(1.0, abs=1e-5)


def test_a_broken_connection_is_told_and_other_errors_stay():
    pair = Ranks(1, 2)
    with pytest.raises(LostProcessError, match="process 2 of 2 lost the others"), pair.watched():
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1234")
    with pytest.raises(RuntimeError, match="mat1 and mat2") as caught, pair.watched():
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    assert not isinstance(caught.value, LostProcessError)


def test_wrong_use_is_one_line(monkeypatch):
    with pytest.raises(InputError, match="--shard needs several processes"), joined("cpu", shard=True):
        pass
    with joined("cpu") as ranks:
        assert ranks is ALONE
    with pytest.raises(InputError, match="--shard is for plain LoRA"):
        Ranks(0, 2, shards=True).check(TrainConfig(dora=True))
    with pytest.raises(InputError, match="each process takes its own"):
        place("cuda:0", {"WORLD_SIZE": "2", "LOCAL_RANK": "0"})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert place("auto", {"WORLD_SIZE": "2", "LOCAL_RANK": "1"}) == "cuda:1"
    with pytest.raises(InputError, match="there are 2 CUDA devices"):
        place("cuda", {"WORLD_SIZE": "3", "LOCAL_RANK": "2"})
    assert place("cuda:1", {}) == "cuda:1"
