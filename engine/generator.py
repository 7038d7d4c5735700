"""Text from prompts: owns the model, the pages of its KV cache, the adapters, and the loop that drives them.

A step reads: schedule → launch (batch, forward, sample) → commit. On a GPU the next step is scheduled and launched
before the tokens of this one are read, so that the device never waits for the host. Requests are taken from an
iterable as room appears, and completions come out as they finish.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from specialize.errors import InputError

from .adapter import AdapterPool, load_adapter, merge_adapter
from .batch import Batch
from .cache import KVCache
from .decode_graph import DecodeGraphs
from .kv_scales import CALIBRATION_TEXT, calibrate, calibration_ids, kv_dtype_of
from .mixture import load_adapter_or_mixture
from .model import Model
from .outputs import Outputs
from .pages import PageAllocator
from .plan import plan_on_device
from .prefixes import prefix_order
from .quantize import Quantization, agree, stored_quantization
from .rows import Sequence as SequenceState
from .rows import StepPlan
from .runner import Draws, Runner
from .sampler import Completion, Request, SamplingParams, stream_key
from .scheduler import EngineConfig, Scheduler
from .spans import Span, no_span
from .speculate import make_drafter
from .warm_up import warm_up
from .weights import read_config

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

Prompt = str | Sequence[int]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Stats:
    """Sums over a generator's life. ``seconds`` is time spent in steps, host work included; ``warmup_seconds`` went
    before them into compiling kernels, packing weights and recording decode graphs.

    ``dropped_tokens`` were drawn for sequences that had ended one step before, or after a wrong draft.
    ``shared_decode_tokens`` of the contexts were read with those of another sequence: their prefixes lie in the same
    pages.
    """

    requests: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    shared_decode_tokens: int = 0
    generated_tokens: int = 0
    dropped_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    computed_tokens: int = 0
    steps: int = 0
    preemptions: int = 0
    out_of_memory: int = 0
    seconds: float = 0.0
    warmup_seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.generated_tokens / self.seconds if self.seconds else 0.0

    def as_dict(self) -> dict[str, float]:
        return {**asdict(self), "tokens_per_second": self.tokens_per_second}


class Generator:
    """Continuous batching over one model. Not for several threads at once; interleaved streams are fine."""

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer | None = None,
        config: EngineConfig | None = None,
        adapters: Mapping[str, str | Path] | None = None,
        *,
        span: Span = no_span,
    ) -> None:
        """Without a tokenizer, prompts are lists of token ids and completions have no text. ``span`` names the parts of
        a step to a profiler."""
        self.model, self.tokenizer, self._span = model, tokenizer, span
        self.config = config = config or EngineConfig()
        on_gpu = model.device.type == "cuda"
        stored = kv_dtype_of(config.kv_dtype, model.dtype, model.device)
        self.plan = plan_on_device(
            model.config, config, dtype=model.dtype, device=model.device, quantization=model.quantization, loaded=True,
        ).require()  # fmt: skip
        if not self.plan.packed_bytes:
            model.keep_unpacked()
        self.max_sequences, self.max_batch_tokens = self.plan.max_sequences, self.plan.max_batch_tokens
        num_pages = self.plan.num_pages
        self.max_context = min(self.plan.max_context, num_pages * config.page_size)
        self.allocator = PageAllocator(num_pages, config.page_size)
        scales = None
        if stored != model.dtype:
            text = None if tokenizer is None else tokenizer.encode(CALIBRATION_TEXT)
            scales = calibrate(model, calibration_ids(model.config, text), stored)
        self.cache = KVCache(model.config, num_pages, config.page_size, stored, model.device, scales)
        self._graphs = DecodeGraphs(model, self.cache, self.max_context)
        self.stats = Stats()
        self._warm = False
        # Where decodes replay a graph, the kernels of a step with prompts cost the host the more.
        self._group_share = 1 / 16 if on_gpu else 0.0
        self._overlap = on_gpu and config.speculation == "off" if config.overlap is None else config.overlap
        self._pool = AdapterPool(model)
        self._adapters: dict[str, tuple[int, bytes]] = {}  # name → slot, fingerprint
        end_ids = set(model.config.eos_token_ids) | set(tokenizer.eos_ids if tokenizer else ())
        self._end_ids = tuple(sorted(end_ids))
        for name, path in (adapters or {}).items():
            self.load_adapter(path, name)

    @staticmethod
    def from_pretrained(
        path: str | Path,
        *,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "auto",
        config: EngineConfig | None = None,
        adapters: Mapping[str, str | Path] | None = None,
        merge: str | Path | None = None,
        quantize: str | None = None,
    ) -> Generator:
        """Loads a model folder or GGUF file with its tokenizer. ``merge`` is an adapter folder added to the weights,
        ``quantize`` a format for them (`quantize.CHOICES`)."""
        from .tokenizer import Tokenizer

        device = choose_device(device)
        dtype, config = choose_dtype(dtype, device), config or EngineConfig()
        kv_dtype_of(config.kv_dtype, dtype, device)
        plan_on_device(
            read_config(path),
            config,
            dtype=dtype,
            device=device,
            model=Path(path).name,
            quantization=agree(Quantization.parse(quantize), stored_quantization(path), path),
        ).require()  # before minutes of loading
        model = Model.from_pretrained(path, dtype=dtype, device=device, inference=True, quantize=quantize)
        tokenizer = Tokenizer.from_pretrained(path)
        tokenizer.check_vocabulary(model.config)
        if merge is not None:
            merge_adapter(model, load_adapter(merge, model))
        return Generator(model, tokenizer, config, adapters)

    def load_adapter(self, path: str | Path, name: str | None = None) -> str:
        """Makes the folder of an adapter, or of a mixture of them, available under a name (its path by default) and
        returns the name."""
        name = name or str(path)
        if name in self._adapters:
            raise InputError(f"adapter {name!r} is loaded already; unload it first or choose another name")
        adapter = load_adapter_or_mixture(path, self.model)
        self._graphs.forget()  # they read the pool's tensors, which are made anew
        self._adapters[name] = (self._pool.add(adapter), adapter.fingerprint)
        return name

    def unload_adapter(self, name: str) -> None:
        slot, _ = self._adapter(name)
        self._graphs.forget()
        self._pool.remove(slot)
        del self._adapters[name]

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: str | Sequence[str | None] | None = None,
        request_ids: Sequence[int] | None = None,
        on_completion: Callable[[Completion], None] | None = None,
    ) -> list[Completion]:
        """Completes all prompts; n per prompt, in the prompts' order.

        A prompt's place in the list is its request id, which keys its random stream, unless ``request_ids`` says
        otherwise. All prompts are checked before any work; the first unusable one raises InputError. Prompts that begin
        alike run together, whatever their places.
        ``on_completion`` hears of each completion as soon as it is done.
        """
        requests = self._requests(prompts, params, adapter, request_ids)
        for place, request in enumerate(requests):
            problem = self._problem(request)
            if problem:
                raise InputError(f"prompt {place}: {problem}")
        order = {request.request_id: place for place, request in enumerate(requests)}
        if len(order) != len(requests):
            raise InputError("request_ids: each must differ from the others")
        results: list[list[Completion | None]] = [[None] * request.params.n for request in requests]
        for completion in self.run(sorted(requests, key=prefix_order)):
            results[order[completion.request_id]][completion.index] = completion
            if on_completion is not None:
                on_completion(completion)
        return [completion for samples in results for completion in samples if completion is not None]

    def run(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Takes requests as room appears and yields completions as they finish. A request that cannot be served comes
        out as a completion with ``finish_reason`` "error"; the others go on."""
        for event in self._drive(requests, streaming=False):
            if isinstance(event, Completion):
                yield event

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, adapter: str | None = None
    ) -> Iterator[str]:
        """Text of one completion, piece by piece; never half a character, never part of a stop string."""
        [request] = self._requests([prompt], params, adapter, None)
        if self.tokenizer is None:
            raise InputError("streaming gives text, and this generator has no tokenizer")
        if request.params.n != 1:
            raise InputError(f"sampling: n is {request.params.n}; a stream has one sample")
        problem = self._problem(request)
        if problem:
            raise InputError(problem)
        for event in self._drive([request], streaming=True):
            if isinstance(event, str):
                yield event
            elif event.error:
                raise RuntimeError(event.error)

    def score(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], *, adapter: str | None = None
    ) -> list[list[float]]:
        """Log-probabilities of each continuation's tokens; pairs are (prompt_ids, continuation_ids)."""
        return [logprobs for logprobs, _ in self.score_greedy(pairs, adapter=adapter)]

    @torch.inference_mode()
    def score_greedy(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], *, adapter: str | None = None
    ) -> list[tuple[list[float], bool]]:
        """As `score`, and whether each continuation is the greedy one: every token the most likely one at its place."""
        slot = -1 if adapter is None else self._adapter(adapter)[0]
        for place, (prompt, continuation) in enumerate(pairs):
            problem = self._problem(Request(list(prompt) + list(continuation)[:-1], SamplingParams(max_tokens=1)))
            if problem or not prompt:
                raise InputError(f"pair {place}: {problem or 'the prompt is empty; give at least one token'}")
        scores: list[tuple[list[float], bool]] = []
        group: list[tuple[Sequence[int], Sequence[int]]] = []
        tokens = 0
        for pair in pairs:
            length = len(pair[0]) + len(pair[1])
            if group and tokens + length > self.max_batch_tokens:
                scores += self._score_group(group, slot)
                group, tokens = [], 0
            group.append(pair)
            tokens += length
        return scores + (self._score_group(group, slot) if group else [])

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt given as text or as ids."""
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise InputError("this generator has no tokenizer; give prompts as lists of token ids")
            return self.tokenizer.encode(prompt)
        return list(prompt)

    def _requests(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
        adapter: str | Sequence[str | None] | None,
        request_ids: Sequence[int] | None,
    ) -> list[Request]:
        if isinstance(prompts, str):
            raise InputError("prompts is one string; give a list of prompts")
        count = len(prompts)
        each_params = [params or SamplingParams()] * count if not isinstance(params, Sequence) else list(params)
        each_adapter = [adapter] * count if adapter is None or isinstance(adapter, str) else list(adapter)
        ids = list(range(count)) if request_ids is None else list(request_ids)
        for name, values in (("params", each_params), ("adapter", each_adapter), ("request_ids", ids)):
            if len(values) != count:
                raise InputError(f"{name}: {len(values)} are given for {count} prompts; give one for all, or one each")
        encoded: list[Sequence[int]]
        if self.tokenizer is not None and count and all(isinstance(p, str) for p in prompts):
            encoded = list(self.tokenizer.encode_batch([str(p) for p in prompts]))
        else:
            encoded = [self.encode(p) for p in prompts]
        arrays = [np.asarray(prompt) for prompt in encoded]  # each is looked through several times
        return [Request(*parts) for parts in zip(arrays, each_params, each_adapter, ids, strict=True)]

    def _problem(self, request: Request) -> str | None:
        """Why a request cannot be served, in one line; None when it can."""
        length, vocab_size = len(request.prompt_ids), self.model.config.vocab_size
        if not length:
            return "the prompt is empty; give at least one token"
        if length >= self.max_context:
            return (
                f"the prompt has {length} tokens; the context holds {self.max_context}, "
                f"so at most {self.max_context - 1} are allowed"
            )
        ids = np.asarray(request.prompt_ids)
        if ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= vocab_size:
            return f"the prompt has ids outside the vocabulary; allowed: integers from 0 to {vocab_size - 1}"
        if request.adapter is not None and request.adapter not in self._adapters:
            return f"adapter {request.adapter!r} is not loaded; loaded: {', '.join(self._adapters) or 'none'}"
        if request.params.contrast:
            return self._contrast_problem(request)
        return self._stop_problem(request)

    def _contrast_problem(self, request: Request) -> str | None:
        if request.adapter is None:
            return (
                f"contrast is {request.params.contrast} without an adapter, which it sets apart from the base; "
                "allowed: 0, or an adapter loaded beside the base (not merged)"
            )
        if self.max_sequences < 2:
            return "contrast runs the base beside the expert, and max_sequences is 1; allowed: 2 or more"
        room = self.allocator.num_pages // 2 * self.config.page_size
        if len(request.prompt_ids) >= room:
            return (
                f"the prompt has {len(request.prompt_ids)} tokens; with contrast the cache holds {room}, "
                f"so at most {room - 1} are allowed"
            )
        return self._stop_problem(request)

    def _stop_problem(self, request: Request) -> str | None:
        if request.params.stop and self.tokenizer is None:
            return "stop strings need a tokenizer, and this generator has none"
        return None

    def _adapter(self, name: str) -> tuple[int, bytes]:
        if name not in self._adapters:
            raise InputError(f"adapter {name!r} is not loaded; loaded: {', '.join(self._adapters) or 'none'}")
        return self._adapters[name]

    def warm_up(self, num_sequences: int | None = None, max_context: int | None = None) -> float:
        """Compiles kernels, packs weights, and on a GPU records decode graphs for ``num_sequences`` (the most that run
        at once, by default) and contexts up to ``max_context`` tokens; returns the seconds that it took.

        The first use does it where it was not done, so that no step does.
        """
        began = time.perf_counter()
        if not self._warm:
            warm_up(self.model, self.cache, self.max_batch_tokens, self.max_sequences)
            self._warm = True
        self._graphs.record(min(num_sequences or self.max_sequences, self.max_sequences), max_context)
        seconds = time.perf_counter() - began
        self.stats.warmup_seconds += seconds
        return seconds

    def _drive(self, requests: Iterable[Request], *, streaming: bool) -> Iterator[Completion | str]:
        """The loop. Yields completions, and with ``streaming`` pieces of text between them."""
        if not self._warm:
            self.warm_up(1 if streaming else None)
        scheduler = Scheduler(
            self.allocator,
            max_batch_tokens=self.max_batch_tokens,
            max_sequences=self.max_sequences,
            max_context=self.max_context,
            end_ids=self._end_ids,
            prefix_cache=self.config.prefix_cache,
            drafter=make_drafter(self.config.speculation),
            group_share=self._group_share,
        )
        runner = Runner(self.model, self.cache, self._pool, self._graphs, self.max_sequences, self._span)
        outputs = Outputs(scheduler, self.tokenizer, self._end_ids, self.stats, streaming=streaming)
        source, exhausted = self._sequences(requests), False
        flying: list[_Step] = []  # launched, their tokens not read: one at most between turns
        try:
            while True:
                while not exhausted and scheduler.num_wanted > 0:
                    item = next(source, None)
                    if item is None:
                        exhausted = True
                    elif isinstance(item, Completion):
                        yield item
                    else:
                        scheduler.add(item)
                began, recording = time.perf_counter(), self._graphs.seconds
                events: list[Completion | str] = []
                if flying and scheduler.must_commit():
                    events += self._land(outputs, flying)
                with self._span("schedule"):
                    plan = scheduler.schedule()
                if plan is not None:
                    launched = self._launch(scheduler, runner, outputs, plan, flying, events)
                    if launched is not None and not self._overlap:
                        events += self._land(outputs, [launched])
                    elif launched is not None:
                        flying.append(launched)
                if len(flying) > (plan is not None):
                    events += self._land(outputs, flying)
                recording = self._graphs.seconds - recording
                self.stats.warmup_seconds += recording
                self.stats.seconds += time.perf_counter() - began - recording
                yield from events
                if plan is None and not flying and not events and exhausted:
                    return
        finally:
            self.stats.preemptions += scheduler.num_preemptions
            self.stats.drafted_tokens += scheduler.num_drafted
            self.stats.accepted_tokens += scheduler.num_accepted
            scheduler.abort()

    def _launch(
        self,
        scheduler: Scheduler,
        runner: Runner,
        outputs: Outputs,
        plan: StepPlan,
        flying: list[_Step],
        events: list[Completion | str],
    ) -> _Step | None:
        """Starts a step. None where memory ran out: then no step is in flight, and smaller ones come next."""
        try:
            draws = runner.launch(plan, scheduler.rows)
        except (RuntimeError, MemoryError) as error:
            self.allocator.forget_contents()  # pages published for this step hold nothing
            if not _is_out_of_memory(error):
                raise
            # The plan left too little room for activations: try again with smaller steps.
            self.stats.out_of_memory += 1
            self._graphs.drop()
            if flying:
                events += self._land(outputs, flying)
            scheduler.roll_back(plan)
            scheduler.preempt_all()
            if self.model.device.type == "cuda":
                torch.cuda.empty_cache()
            if not scheduler.shrink_budget():
                raise
            self.max_batch_tokens = scheduler.max_batch_tokens
            return None
        except BaseException:
            self.allocator.forget_contents()
            raise
        self.stats.steps += 1
        self.stats.computed_tokens += plan.num_tokens
        if plan.prefixes is not None:
            self.stats.shared_decode_tokens += plan.prefixes.num_spared * self.config.page_size
        return _Step(plan, draws)

    def _land(self, outputs: Outputs, flying: list[_Step]) -> list[Completion | str]:
        """Reads the oldest launched step's tokens, waiting for them if need be, and commits them."""
        step = flying.pop(0)
        with self._span("wait"):
            drawn = step.draws.read()
        with self._span("commit"):
            return outputs.after_step(step.plan, *drawn)

    def _sequences(self, requests: Iterable[Request]) -> Iterator[SequenceState | Completion]:
        """n sequences per request, or the completion that says why there is none."""
        for request in requests:
            self.stats.requests += 1
            problem = self._problem(request)
            if problem:
                self.stats.failed += 1
                for index in range(request.params.n):
                    yield Completion(request.request_id, index, len(request.prompt_ids), "", [], "error", None, problem)
                continue
            tokens = np.asarray(request.prompt_ids, np.int32)
            slot, salt = (-1, b"") if request.adapter is None else self._adapters[request.adapter]
            for index in range(request.params.n):
                yield SequenceState(
                    request_id=request.request_id,
                    index=index,
                    params=request.params,
                    tokens=tokens,
                    num_prompt=len(tokens),
                    stream_key=stream_key(request.params.seed, request.request_id, index),
                    adapter_id=slot,
                    cache_salt=salt,
                )

    def _score_group(
        self, group: list[tuple[Sequence[int], Sequence[int]]], slot: int
    ) -> list[tuple[list[float], bool]]:
        sequences = [list(prompt) + list(continuation)[:-1] for prompt, continuation in group]
        index = [slot] * len(group) if slot >= 0 else None
        batch = Batch.packed(sequences, self.model.device, adapter_index=index)
        hidden = self.model.forward(batch, None, self._pool.select([slot]))
        wanted, targets, start = [], [], 0
        for (prompt, continuation), sequence in zip(group, sequences, strict=True):
            first = start + len(prompt) - 1
            wanted += range(first, first + len(continuation))
            targets += continuation
            start += len(sequence)
        picked: list[float] = []
        likeliest: list[bool] = []
        for at in range(0, len(wanted), 256):  # logits are wide; a slice at a time
            rows = torch.tensor(wanted[at : at + 256], device=hidden.device)
            target = torch.tensor(targets[at : at + 256], device=hidden.device)
            logprobs = self.model.logits(hidden[rows]).float().log_softmax(-1)
            picked += logprobs.gather(1, target[:, None]).squeeze(1).tolist()
            likeliest += (logprobs.argmax(-1) == target).tolist()
        scores, at = [], 0
        for _, continuation in group:
            end = at + len(continuation)
            scores.append((picked[at:end], all(likeliest[at:end])))
            at = end
        return scores


@dataclass(frozen=True)
class _Step:
    """A step that was launched."""

    plan: StepPlan
    draws: Draws


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)


def choose_device(device: str | torch.device = "auto") -> torch.device:
    """ "auto" is the first CUDA device where there is one, else the CPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise InputError(f"device {device!r} is unknown; allowed: auto, cpu, cuda, cuda:N") from None
    if chosen.type not in ("cpu", "cuda"):
        raise InputError(f"device {device!r} is not supported; allowed: auto, cpu, cuda, cuda:N")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {device!r} is not there; CUDA devices found: {torch.cuda.device_count()}")
    return chosen


def choose_dtype(dtype: Any, device: torch.device) -> torch.dtype:
    """A torch dtype from "fp32", "bf16", "fp16" or "auto": bf16 where the device computes in it, else fp16 on CUDA and
    fp32 on a CPU."""
    if isinstance(dtype, torch.dtype):
        if dtype not in DTYPES.values():
            raise InputError(f"dtype {dtype} is not supported; allowed: {', '.join(DTYPES)}")
        return dtype
    if dtype == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
        fast = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return torch.bfloat16 if fast else torch.float32
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is unknown; allowed: auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]
