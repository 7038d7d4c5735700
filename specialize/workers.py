"""Generation spread over processes, GPUs and machines by Ray: a pool of workers that stands in for one generator.

Each worker is a Ray actor with a generator of its own. The pool, in the process that writes the ledger, hands requests
out in bundles, a few more than a worker runs at once, and yields completions as they come. A request's random stream
is keyed by its id and seed, so it does not matter which worker answers it, how often it was handed out, or when. A
worker that dies is replaced and its requests go to others; one that falls silent keeps its place while others do its
work; what has been answered already is dropped when it comes again.
"""

# pyright: reportMissingImports=false
# The sibling folders join this package when it is installed (setup.py); Ray is an extra and may be missing.
from __future__ import annotations

import contextlib
import os
import queue
import shutil
import socket
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from . import __version__
from .errors import InputError

# Prompts of a bundle: about as many as share their demonstrations, whose pages are then computed on one worker only.
BUNDLE_PROMPTS = 8
MEMORY_SHARE = 0.8  # of a machine's memory, for all its CPU workers together
WINDOW = 512  # requests looked at when bundles are made
LOADING_S = 60.0  # after which waiting for workers is mentioned
HEARTBEAT_S = 1.0  # a busy worker answers at least this often
MAX_DEATHS = 3  # of workers in a row with no completion in between
_MAX_TEMP_PATH = 44  # a Unix socket's path has 107 characters, and Ray's part of it 62
_OBJECT_STORE_BYTES = 80 << 20  # Ray's least; prompts and replies are small


@dataclass(frozen=True)
class Spread:
    """How many workers, and where. ``address`` is a running Ray cluster's; without it one is started on this machine.

    ``workers`` None means one per GPU of the cluster, or one per machine where there are none. ``threads`` are those of
    all CPU workers of a machine together (None: its cores). A worker that is silent for ``patience_s`` (seconds) is not
    waited for.
    """

    workers: int | None = None
    address: str | None = None
    threads: int | None = None
    patience_s: float = 300.0

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise InputError(f"--workers {self.workers}; allowed: 1 or more")
        if self.workers is None and self.address is None:
            raise InputError("workers: give a number of workers, the address of a Ray cluster, or both")


def require_ray() -> Any:
    """The ``ray`` module. Raises InputError where it is not installed."""
    try:
        import ray
    except ImportError:
        raise InputError(
            "--workers and --ray need Ray, which is not installed; do: pip install 'specialize[ray]'"
        ) from None
    return ray


class Worker:
    """What runs in a worker's process: a generator on a thread of its own, and a mailbox."""

    def __init__(self) -> None:
        self._incoming: queue.Queue[Any] = queue.Queue()
        self._changed = threading.Condition()
        self._done: list[Any] = []
        self._error: BaseException | None = None
        self._generator: Any = None

    def start(
        self,
        model: str,
        dtype: str,
        quantize: str | None,
        kv_dtype: str,
        memory_bytes: int | None,
        device: str,
        threads: int,
        share: int,
    ) -> dict[str, Any]:
        """Load the model. ``share`` workers have the device's memory, or ``memory_bytes`` of it, in common. Returns
        what the pool must know."""
        import torch

        from .engine.generator import Generator
        from .engine.memory import available_memory_bytes, total_memory_bytes
        from .engine.scheduler import EngineConfig

        if not Path(model).exists():
            raise InputError(f"worker on {socket.gethostname()}: {model} is not there; put it on a shared disk")
        torch.set_num_threads(threads)
        cap = memory_bytes and memory_bytes // share
        if device == "cpu" and cap is None:
            cap = min(int(MEMORY_SHARE * total_memory_bytes("cpu")) // share, int(0.9 * available_memory_bytes("cpu")))
        config = EngineConfig(memory_bytes=cap, kv_dtype=kv_dtype)
        self._generator = Generator.from_pretrained(model, dtype=dtype, device=device, quantize=quantize, config=config)
        threading.Thread(target=self._work, args=(threads,), daemon=True).start()
        return {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "version": __version__,
            "max_sequences": self._generator.max_sequences,
        }

    def exchange(self, requests: list[Any], adapters: dict[str, dict[str, bytes]]) -> list[Any]:
        """Take requests, with new adapters as the content of their files, and give the completions that are done, after
        a heartbeat at the latest. Raises what went wrong in the thread."""
        for item in (*adapters.items(), *requests):
            self._incoming.put(item)
        with self._changed:
            self._changed.wait_for(lambda: self._done or self._error, HEARTBEAT_S)
            if self._error is not None:
                raise self._error
            done, self._done = self._done, []
        return done

    def _work(self, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)  # OpenMP keeps this number per calling thread
        try:
            while True:
                for completion in self._generator.run(self._waiting(self._incoming.get())):
                    with self._changed:
                        self._done.append(completion)
                        self._changed.notify()
        except BaseException as error:  # noqa: BLE001, handed to whoever asks next
            with self._changed:
                self._error = error
                self._changed.notify()

    def _waiting(self, item: Any) -> Iterator[Any]:
        """``item`` and whatever else is in the mailbox by then; never waits, since sequences are running."""
        with contextlib.suppress(queue.Empty):
            while True:
                if isinstance(item, tuple):
                    self._load_adapter(*item)
                else:
                    yield item
                item = self._incoming.get_nowait()

    def _load_adapter(self, name: str, files: dict[str, bytes]) -> None:
        with tempfile.TemporaryDirectory() as folder:  # the adapter's own need not exist on this machine
            for file, content in files.items():
                Path(folder, file).parent.mkdir(parents=True, exist_ok=True)
                Path(folder, file).write_bytes(content)
            self._generator.load_adapter(folder, name)


@dataclass(eq=False)
class _Member:
    """A worker as the pool sees it. ``reply`` is the call in flight, ``holds`` samples to come by request id."""

    number: int
    actor: Any
    reply: Any
    since: float
    info: dict[str, Any] | None = None  # None while it loads
    holds: dict[int, int] = field(default_factory=dict)
    adapters: set[str] = field(default_factory=set)
    silent: bool = False

    @property
    def is_full(self) -> bool:
        """Whether it has a quarter more than it runs at once: then there is a next one while its answers travel."""
        assert self.info is not None
        return sum(self.holds.values()) >= 1.25 * self.info["max_sequences"]

    @property
    def name(self) -> str:
        return f"worker {self.number}" + (f" (process {self.info['pid']} on {self.info['host']})" if self.info else "")


class _Work:
    """The requests of one `WorkerPool.run`: what is to be handed out, and what is still to come."""

    def __init__(self, requests: Iterable[Any], num_workers: int) -> None:
        self._source, self._num_workers = iter(requests), num_workers
        self._exhausted = False
        self._bundles: deque[list[Any]] = deque()
        self._waiting: set[int] = set()  # ids in the bundles
        self._open: dict[int, tuple[Any, set[int]]] = {}  # id -> request, samples that are to come

    @property
    def is_done(self) -> bool:
        return self._exhausted and not self._open

    def next_bundle(self) -> list[Any]:
        """Requests for one worker; none when nothing is left to hand out."""
        while True:
            if not self._bundles and not self._exhausted:
                self._read()
            if not self._bundles:
                return []
            bundle = self._bundles.popleft()
            self._waiting -= {request.request_id for request in bundle}
            if found := [request for request in bundle if request.request_id in self._open]:
                return found  # the others were given back and have been answered since

    def give_back(self, ids: Iterable[int], held: set[int]) -> int:
        """Hand out again, before all else, what is still to come of ``ids``, but for what others have (``held``)."""
        again = [self._open[i][0] for i in ids if i in self._open and i not in held and i not in self._waiting]
        self._waiting |= {request.request_id for request in again}
        self._bundles.extendleft(reversed(_bundles(again, self._size(again))))
        return len(again)

    def take(self, completion: Any) -> bool:
        """Count a completion as come; False when it had come before."""
        _, missing = self._open.get(completion.request_id, (None, set()))
        if completion.index not in missing:
            return False
        missing.remove(completion.index)
        if not missing:
            del self._open[completion.request_id]
        return True

    def _read(self) -> None:
        window = list(islice(self._source, WINDOW))
        self._exhausted = len(window) < WINDOW
        for request in window:
            if request.request_id in self._open:
                raise InputError("request_ids: each must differ from the others")
            self._open[request.request_id] = (request, set(range(request.params.n)))
            self._waiting.add(request.request_id)
        self._bundles.extend(_bundles(window, self._size(window) if self._exhausted else BUNDLE_PROMPTS))

    def _size(self, requests: list[Any]) -> int:
        """Prompts of a bundle, so that each worker gets some of the last ones."""
        prompts = len({tuple(request.prompt_ids) for request in requests})
        return min(BUNDLE_PROMPTS, max(1, prompts // (2 * self._num_workers)))


def _bundles(requests: list[Any], size: int) -> list[list[Any]]:
    """Parts of ``size`` different prompts each, in the order given; requests with one prompt stay together."""
    bundle_of: dict[tuple[int, ...], int] = {}
    found: list[list[Any]] = []
    for request in requests:
        place = bundle_of.setdefault(tuple(request.prompt_ids), len(bundle_of) // size)
        if place == len(found):
            found.append([])
        found[place].append(request)
    return found


class WorkerPool:
    """Generators in other processes behind the part of a `Generator`'s face that runs and evaluations use.

    Ray and the workers start with the first `run`. `release` gives the workers' memory back, `close` ends Ray, too.
    """

    def __init__(
        self,
        model: str | Path,
        spread: Spread,
        *,
        dtype: str = "auto",
        device: str = "auto",
        quantize: str | None = None,
        kv_dtype: str = "auto",
        memory_bytes: int | None = None,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        if device.startswith("cuda:"):
            raise InputError(f"--device {device} with workers: each takes a GPU of its own; allowed: auto, cpu, cuda")
        self._ray = require_ray()
        self._path, self._spread, self._dtype, self._device = Path(model), spread, dtype, device
        self._quantize, self._kv_dtype, self._memory_bytes, self._say = quantize, kv_dtype, memory_bytes, say
        self._members: list[_Member] = []
        self._options: dict[str, Any] = {}  # Ray's, of each worker
        self._arguments: tuple[Any, ...] = ()  # of `Worker.start`
        self._adapters: dict[str, dict[str, bytes]] = {}
        self._temporary: str | None = None
        self._connected, self._owned = False, True
        self._deaths = 0
        self.num_dropped = 0  # completions that came again
        self.num_replaced = 0

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the workers that have loaded their model."""
        return [member.info["pid"] for member in self._members if member.info is not None]

    # the face of a generator

    @cached_property
    def tokenizer(self) -> Any:
        from .engine.tokenizer import Tokenizer

        tokenizer = Tokenizer.from_pretrained(self._path)
        tokenizer.check_vocabulary(self.model.config)
        return tokenizer

    @cached_property
    def model(self) -> Any:
        """Has the ``config`` of the model that the workers hold."""
        from .engine.weights import read_config

        return SimpleNamespace(config=read_config(self._path))

    def load_adapter(self, path: str | Path, name: str | None = None) -> str:
        """Make an adapter folder known under a name (its path by default); workers get it when they need it."""
        name = name or str(path)
        if name in self._adapters:
            raise InputError(f"adapter {name!r} is loaded already; choose another name")
        from .engine.mixture import adapter_files

        self._adapters[name] = {file: Path(path, file).read_bytes() for file in adapter_files(path)}
        return name

    def run(self, requests: Iterable[Any]) -> Iterator[Any]:
        """Yields the completions of all requests, each once, in the order in which they come."""
        self._start()
        work = _Work(requests, len(self._members))
        finished = False
        try:
            while True:
                self._hand_out(work)
                if work.is_done:
                    finished = True
                    return
                for member in self._answered():
                    for completion in self._answer(member, work):
                        if work.take(completion):
                            self._deaths = 0
                            yield completion
                        else:
                            self.num_dropped += 1
                self._mind_the_silent(work)
        finally:
            if not finished:  # what was handed out is of no use to the next run
                self.release()

    # workers

    def _start(self) -> None:
        if not self._connected:
            self._connect()
        if self._members:
            return
        count, self._options, self._arguments = self._layout()
        self._say(f"starting {count} worker{'s' if count > 1 else ''} with {self._path.name}")
        self._members = [self._hire(number) for number in range(1, count + 1)]
        # All begin together: the first to be ready would else take most of a small job.
        told = False
        while waiting := [member for member in self._members if member.info is None]:
            for member in self._answered():
                self._answer(member, None)
            if not told and time.monotonic() - waiting[0].since > LOADING_S:
                told = True
                self._say(f"still waiting for {len(waiting)} of {count} workers to load {self._path.name}")

    def _connect(self) -> None:
        ray, address = self._ray, self._spread.address
        if ray.is_initialized():  # by the program that uses this package; then it is not ours to end
            self._connected, self._owned = True, False
            return
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}
        if address is not None:
            try:
                ray.init(address=address, **quiet)
            except (ConnectionError, RuntimeError, ValueError) as error:
                reason = (str(error).strip().splitlines() or ["no answer"])[0]
                raise InputError(f"--ray {address}: no Ray cluster can be joined there ({reason})") from None
            self._connected = True
            return
        workers, gpus = self._spread.workers or 1, self._local_gpus()
        if gpus and workers > gpus:
            raise InputError(
                f"--workers {workers}: this machine has {gpus} GPU{'s' if gpus > 1 else ''}, one for each worker; "
                f"allowed: 1 to {gpus}, or --device cpu"
            )
        base = tempfile.gettempdir()
        self._temporary = tempfile.mkdtemp(prefix="ray", dir=base if len(base) <= _MAX_TEMP_PATH - 12 else "/tmp")
        self._connected = True  # a start that fails half-way has something to end, too
        try:
            ray.init(
                address="local", num_cpus=workers, num_gpus=gpus, include_dashboard=False, _temp_dir=self._temporary,
                _node_ip_address="127.0.0.1", object_store_memory=_OBJECT_STORE_BYTES, **quiet,
            )  # fmt: skip
        except BaseException:
            self.close()
            raise

    def _local_gpus(self) -> int:
        import torch

        if self._device == "cpu":
            return 0
        count = torch.cuda.device_count()
        if self._device == "cuda" and not count:
            raise InputError("device 'cuda' is not there; CUDA devices found: 0")
        return count

    def _layout(self) -> tuple[int, dict[str, Any], tuple[Any, ...]]:
        """(number of workers, Ray's options of each, arguments of `Worker.start`)."""
        spread = self._spread
        loading = (str(self._path.resolve()), self._dtype, self._quantize, self._kv_dtype, self._memory_bytes)
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        gpus = sum(int(node.get("GPU", 0)) for node in nodes)
        if self._device != "cpu" and gpus:
            count = spread.workers or gpus
            if count > gpus:
                raise InputError(f"--workers {count}: the cluster has {gpus} GPUs, one for each; allowed: 1 to {gpus}")
            return count, {"num_gpus": 1, "num_cpus": 0}, (*loading, "cuda", 1, 1)
        if self._device == "cuda":
            raise InputError("device 'cuda': the cluster has no GPU; allowed: cpu, auto")
        if spread.address is None:
            count = spread.workers or 1
            from .engine.control_groups import usable_cpus

            cores = spread.threads or usable_cpus()
            return count, {"num_cpus": 1}, (*loading, "cpu", max(1, cores // count), count)
        cores = [int(node.get("CPU", 0)) for node in nodes if node.get("CPU", 0) >= 1]
        count = spread.workers or len(cores)
        if not 1 <= count <= sum(cores):
            raise InputError(f"--workers {count}: the cluster has {sum(cores)} CPUs; allowed: 1 to {sum(cores)}")
        each = next(t for t in range(max(cores), 0, -1) if sum(c // t for c in cores) >= count)
        threads = min(each, spread.threads or each)
        return count, {"num_cpus": each}, (*loading, "cpu", threads, max(c // each for c in cores))

    def _hire(self, number: int) -> _Member:
        actor = self._ray.remote(Worker).options(max_restarts=0, **self._options).remote()
        return _Member(number, actor, actor.start.remote(*self._arguments), time.monotonic())

    def _answered(self) -> list[_Member]:
        """Members whose call has come back; waits for one of them, but not longer than a heartbeat."""
        calls = {member.reply: member for member in self._members if member.reply is not None}
        ready, _ = self._ray.wait(list(calls), num_returns=1, timeout=HEARTBEAT_S)
        return [calls[reply] for reply in ready]

    def _answer(self, member: _Member, work: _Work | None) -> list[Any]:
        """What a member's call gave: completions, or nothing when it has just loaded or is no more."""
        errors = self._ray.exceptions
        reply, member.reply = member.reply, None
        try:
            found = self._ray.get(reply)
        except errors.RayTaskError as error:
            if isinstance(error.cause, InputError):
                raise error.cause from None
            raise RuntimeError(f"{member.name}: {type(error.cause).__name__}: {error.cause}") from error
        except (errors.RayActorError, errors.ObjectLostError):
            self._replace(member, work)
            return []
        if member.silent:
            member.silent = False
            self._say(f"{member.name} is back")
        if member.info is None:
            member.info = found
            if found["version"] != __version__:
                raise InputError(
                    f"{member.name} has specialize {found['version']}, not {__version__}; install the same"
                )
            return []
        for completion in found:
            member.holds[completion.request_id] -= 1
            if not member.holds[completion.request_id]:
                del member.holds[completion.request_id]
        return found

    def _replace(self, member: _Member, work: _Work | None) -> None:
        self._deaths += 1
        self.num_replaced += 1
        back = work.give_back(member.holds, self._held_elsewhere(member)) if work is not None else 0
        if self._deaths >= MAX_DEATHS:
            raise RuntimeError(
                f"{self._deaths} workers died one after the other, the last while it "
                + ("ran" if member.info else f"loaded {self._path.name}")
                + "; look at this machine's memory, or use fewer workers. What was finished is kept"
            )
        self._say(f"{member.name} died; it is replaced, {back} prompts go to others")
        self._members[self._members.index(member)] = self._hire(member.number)

    def _held_elsewhere(self, member: _Member) -> set[int]:
        return {i for other in self._members if other is not member and not other.silent for i in other.holds}

    def _hand_out(self, work: _Work) -> None:
        """Fill up the members that have no call in flight, a bundle each in turn."""
        free = [member for member in self._members if member.info is not None and member.reply is None]
        given: dict[_Member, list[Any]] = {member: [] for member in free}
        wanting = list(free)
        while wanting:
            for member in list(wanting):
                if member.is_full or not (bundle := work.next_bundle()):
                    wanting.remove(member)
                    continue
                given[member] += bundle
                for request in bundle:
                    member.holds[request.request_id] = member.holds.get(request.request_id, 0) + request.params.n
        for member, requests in given.items():
            wanted = {request.adapter for request in requests if request.adapter is not None} - member.adapters
            for name in wanted - set(self._adapters):
                raise InputError(f"adapter {name!r} is not loaded; loaded: {', '.join(self._adapters) or 'none'}")
            member.adapters |= wanted
            if member.holds:
                member.reply = member.actor.exchange.remote(requests, {name: self._adapters[name] for name in wanted})
                member.since = time.monotonic()

    def _mind_the_silent(self, work: _Work) -> None:
        """Hand out anew what a member holds that has not answered for too long; what it still says is welcome."""
        now = time.monotonic()
        for member in self._members:
            late = member.reply is not None and now - member.since > self._spread.patience_s
            if late and not member.silent:
                member.silent = True
                if member.info is not None:
                    back = work.give_back(member.holds, self._held_elsewhere(member))
                    self._say(f"{member.name} is silent; {back} prompts go to others")
        if all(member.silent for member in self._members):
            raise RuntimeError(
                f"no worker has answered for {self._spread.patience_s:.0f} s; what was finished is kept, "
                "the same command goes on from there"
            )

    def release(self) -> None:
        """End the workers and forget their adapters; the next `run` starts new ones."""
        for member in self._members:
            with contextlib.suppress(Exception):  # one that is dead already
                self._ray.kill(member.actor)
        self._members, self._adapters, self._deaths = [], {}, 0

    def close(self) -> None:
        """End the workers and, where it was started here, Ray with its files."""
        if not self._connected:
            return
        self.release()
        if self._owned:
            self._ray.shutdown()
        self._connected = False
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)
            self._temporary = None
