"""Several processes that train as one: rows dealt out, one gradient summed, and frozen layers held in parts (FSDP2).

Data parallel: every process holds the parameters and the optimizer's state, computes the gradient of its share of a
step's rows, and one all-reduce of the flat fp32 gradient makes it the step's. The loss weights are those of the whole
step, so the sum is what one process would have. With ``shards`` each process keeps a part of every layer's frozen
matrices; `torch.distributed.fsdp.fully_shard` gathers a layer when its turn comes, forward and backward, and lets it
go after. Embeddings, head, norms and adapters stay whole. The first process alone writes files.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from specialize.errors import InputError

from .data import pack

T = TypeVar("T")
TIMEOUT_S = 600.0
# What gloo, NCCL and the store say when a process at the other end is gone.
_LOST = ("connection", "closed by peer", "broken pipe", "gloo", "nccl", "timed out", "timeout", "socket", "recvvalue")


class LostProcessError(RuntimeError):
    """Another process of the group was killed, failed, or cannot be reached."""


@dataclass(frozen=True)
class Ranks:
    """This process's place among those that train together; alone by default. ``shards``: layers are held in parts."""

    rank: int = 0
    size: int = 1
    shards: bool = False

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def check(self, config: Any) -> None:
        """Raises InputError for settings that need every layer's matrices whole."""
        if self.shards and (config.method == "full" or config.dora or config.init == "pissa"):
            raise InputError("--shard is for plain LoRA; dora, pissa and full fine-tuning read whole matrices")

    def deal(self, lengths: Sequence[int], budget: int) -> list[list[list[int]]]:
        """Per process its micro-batches, each a list of places in ``lengths``; the same in every process.

        The longest row goes to whoever has the fewest tokens, then each share is packed into ``budget`` tokens.
        """
        shares: list[list[int]] = [[] for _ in range(self.size)]
        tokens = [0] * self.size
        for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
            poorest = tokens.index(min(tokens))
            shares[poorest].append(i)
            tokens[poorest] += lengths[i]
        found = []
        for share in map(sorted, shares):
            found.append([[share[i] for i in bin] for bin in pack([lengths[i] for i in share], budget)])
        return found

    def sum_(self, values: torch.Tensor) -> torch.Tensor:
        """Sums over the processes in place. Raises LostProcessError."""
        if self.size > 1:
            with self.watched():
                dist.all_reduce(values)
        return values

    def first(self, make: Callable[[], T]) -> T:
        """What ``make()`` gives, or raises, in the first process; everywhere. Tensors come on the CPU."""
        if self.size == 1:
            return make()
        box: list[Any] = [None, None]
        if self.is_first:
            try:
                box[0] = make()
            except Exception as error:  # noqa: BLE001, raised again below, by all
                box[1] = error
        with self.watched():
            dist.broadcast_object_list(box, src=0)
        if box[1] is not None:
            raise box[1]
        return box[0]

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Says what a broken connection means."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            text = str(error)
            if self.size == 1 or isinstance(error, LostProcessError) or not any(s in text.lower() for s in _LOST):
                raise
            reason = (text.strip().splitlines() or ["no reason given"])[0][:160]
            raise LostProcessError(
                f"process {self.rank + 1} of {self.size} lost the others ({reason}); one of them was killed or failed. "
                "The same command goes on from the last checkpoint"
            ) from error


ALONE = Ranks()


def place(device: str, environment: Mapping[str, str] = os.environ) -> str:
    """The device of this process: on CUDA the one that torchrun's LOCAL_RANK counts to. Raises InputError."""
    if int(environment.get("WORLD_SIZE", 1)) < 2 or device == "cpu":
        return device
    if device.startswith("cuda:"):
        raise InputError(f"device {device} under torchrun: each process takes its own; allowed: auto, cpu, cuda")
    count, local = torch.cuda.device_count(), int(environment["LOCAL_RANK"])
    if device == "auto" and not count:
        return "cpu"
    if local >= count:
        raise InputError(f"torchrun started {local + 1} or more processes here, and there are {count} CUDA devices")
    return f"cuda:{local}"


@contextmanager
def joined(device: str, *, shard: bool = False, timeout_s: float = TIMEOUT_S) -> Iterator[Ranks]:
    """The processes that torchrun started, as its environment variables tell; alone where it did not.

    Within, collective calls wait at most ``timeout_s`` seconds for the others.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) < 2:
        if shard:
            raise InputError(
                "--shard needs several processes: torchrun --nproc-per-node 2 -m specialize tune … --shard"
            )
        yield ALONE
        return
    backend = "gloo"
    if device.startswith("cuda"):
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout_s))
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), shard)
    finally:
        dist.destroy_process_group()


class _ShardedLayer(torch.nn.Module):
    """The matrices of one layer as frozen parameters, for FSDP2 to manage; runs the layer while they are whole."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self._linears = {"qkv": layer.qkv, "o": layer.o, "up": layer.up, "down": layer.down}
        for name, linear in self._linears.items():
            self.register_parameter(name, torch.nn.Parameter(linear.weight, requires_grad=False))

    def lend(self) -> None:
        """The layer's linears read what the parameters are now: parts, or whole matrices within a pass."""
        for name, linear in self._linears.items():
            linear.replace(getattr(self, name), linear.bias)

    def forward(self, block: Callable[..., Any], *arguments: Any) -> Any:
        self.lend()
        return block(*arguments)


class LayerShards:
    """Takes a model's layers as they are loaded and keeps this process's part of each. A `LayerKeeper` for `Model`.

    Each layer is gathered by itself, and not ahead of its turn.
    """

    def __init__(self, device: torch.device | str) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        self._mesh = init_device_mesh(torch.device(device).type, (dist.get_world_size(),))
        self._layers: dict[int, _ShardedLayer] = {}

    def add(self, layer: Any) -> None:
        from torch.distributed.fsdp import fully_shard

        for linear in (layer.qkv, layer.o, layer.up, layer.down):
            if not isinstance(linear.weight, torch.Tensor):
                raise InputError("--shard holds dense weights in parts; quantised ones take --quantize alone")
        module = _ShardedLayer(layer)
        # Each layer is a root of its own to FSDP2, which would keep a root's parameters whole after forward.
        fully_shard(module, mesh=self._mesh, reshard_after_forward=True)
        module.lend()
        self._layers[layer.layer_id] = module

    def run(self, block: Callable[..., Any], layer: Any, *arguments: Any) -> Any:
        return self._layers[layer.layer_id](block, layer, *arguments)
