"""What a process of the distributed tests does; started by torchrun with a JSON file of settings."""

import gc
import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch
from specialize.engine.model import Model
from specialize.train.config import TrainConfig
from specialize.train.data import TrainExample
from specialize.train.distributed import LayerShards, joined
from specialize.train.loop import tune
from torch.distributed.tensor import DTensor


def held_bytes() -> int:
    """Bytes of all storages of floating numbers, those within DTensors among them."""
    gc.collect()
    storages = {}
    for item in gc.get_objects():
        if issubclass(type(item), torch.Tensor) and item.is_floating_point():
            local = item.to_local() if isinstance(item, DTensor) else item
            storages[local.untyped_storage()._cdata] = local.untyped_storage().nbytes()
    return sum(storages.values())


def train(settings, job, group, processes) -> None:
    out, ranks, before = Path(job["out"]), replace(group, shards=job["shard"]), held_bytes()
    keeper = LayerShards("cpu") if ranks.shards else None
    model = Model.from_pretrained(settings["model"], inference=False, keeper=keeper)
    held = held_bytes() - before

    def on_step(report) -> None:
        if report.step == job.get("die_at"):
            os.kill(processes[job["victim"]], signal.SIGKILL)

    rows = [TrainExample(**row) for row in settings["rows"]]
    result = tune(model, rows, TrainConfig(**settings["config"]), out, on_step=on_step, ranks=ranks)
    found = result.as_json() | {"held": held, "held_after": held_bytes() - before}
    out.with_suffix(f".{ranks.rank}.json").write_text(json.dumps(found))


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    with joined("cpu", timeout_s=60) as group:
        processes = [0] * group.size
        torch.distributed.all_gather_object(processes, os.getpid())
        for job in settings["jobs"]:
            train(settings, job, group, processes)


main()
