"""The generator against the naive one, token for token, and everything else that a caller may rely on."""

from __future__ import annotations

import gc
import random
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from specialize.engine import scheduler
from specialize.engine.adapter import save_part_matrices
from specialize.engine.batch import build_step
from specialize.engine.config import ModelConfig
from specialize.engine.generator import Generator, choose_device, choose_dtype
from specialize.engine.model import Model
from specialize.engine.naive import naive_generate, naive_logits
from specialize.engine.runner import Draws, Runner
from specialize.engine.sampler import Request, SamplingParams
from specialize.engine.scheduler import EngineConfig
from specialize.engine.speculate import MODES
from specialize.engine.tokenizer import Tokenizer
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from specialize.errors import InputError

CONTEXT = 64
LLAMA = ModelConfig("llama", 256, 32, 48, 2, 4, num_kv_heads=2, max_context=CONTEXT)
MPT = ModelConfig(
    "mpt", 256, 24, 48, 2, 3, max_context=CONTEXT, norm="layernorm", position="alibi", mlp="gelu",
    fused_qkv_checkpoint=True, tied_embeddings=True, clip_qkv=1.5,
)  # fmt: skip
WINDOWED = ModelConfig("mistral", 256, 32, 48, 2, 4, num_kv_heads=1, max_context=CONTEXT, sliding_window=9)
GREEDY = SamplingParams(max_tokens=10, temperature=0, ignore_eos=True)


@pytest.fixture(autouse=True)
def short_prefixes_are_shared(monkeypatch):
    monkeypatch.setattr(scheduler, "MIN_PREFIX_TOKENS", 1)


@pytest.fixture(scope="module")
def built():
    return {
        name: Model.random(config, 3, std=0.3)
        for name, config in {"llama": LLAMA, "mpt": MPT, "windowed": WINDOWED}.items()
    }


@pytest.fixture(scope="module")
def model(built):
    return built["llama"]


@pytest.fixture(scope="module")
def tokenizer():
    """One token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend)


@pytest.fixture(scope="module")
def pairs():
    """Two letters per token, so that stop strings lie across tokens."""
    letters = "abcdefghijklmnop"
    vocab = {a + b: 16 * i + j for i, a in enumerate(letters) for j, b in enumerate(letters)}
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend)


@pytest.fixture(scope="module")
def adapter_folders(model, tmp_path_factory):
    """Two adapters of the llama model, of different ranks and targets, strong enough to change every answer."""
    folders = []
    for number, (rank, targets) in enumerate([(2, ("q_proj", "v_proj", "down_proj")), (3, ("o_proj", "gate_proj"))]):
        torch.manual_seed(number)
        parts = {
            part.path: (torch.randn(rank, a.linear.in_features), torch.randn(part.stop - part.start, rank) * 0.3)
            for a in model.adaptable
            for part in a.parts
            if part.name in targets
        }
        folder = tmp_path_factory.mktemp(f"adapter{number}")
        folders.append(save_part_matrices(folder, parts, rank=rank, alpha=2 * rank, targets=targets))
    return folders


def prompts_of(seed: int, count: int, longest: int, shared: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    prefix = [rng.randrange(256) for _ in range(shared)]
    return [prefix + [rng.randrange(256) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def assert_all_free(generator: Generator) -> None:
    generator.allocator.check()
    assert generator.allocator.num_held == 0


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_greedy_equals_naive_token_for_token(built, adapter_folders, data):
    """Random batches, chunk sizes, page sizes, page shortage (preemption), shared prefixes and mixed adapters."""
    name = data.draw(st.sampled_from(["llama", "llama", "mpt", "windowed"]))
    model = built[name]
    page_size = data.draw(st.sampled_from([1, 3, 4, 16]))
    max_sequences = data.draw(st.integers(1, 6))
    shortest = -(-CONTEXT // page_size)
    config = EngineConfig(
        page_size=page_size,
        max_sequences=max_sequences,
        max_batch_tokens=max_sequences + data.draw(st.integers(0, 40)),
        num_pages=data.draw(st.integers(shortest, 2 * shortest)),
        prefix_cache=data.draw(st.booleans()),
        overlap=data.draw(st.booleans()),
    )
    shared = data.draw(st.sampled_from([0, 0, 11, 20]))
    prompts = prompts_of(data.draw(st.integers(0, 99)), data.draw(st.integers(1, 8)), 24, shared)
    names = [None, "first", "second"] if name == "llama" else [None]
    adapters = [data.draw(st.sampled_from(names)) for _ in prompts]
    loaded = dict(zip(["first", "second"], adapter_folders, strict=True)) if name == "llama" else {}
    generator = Generator(model, None, config, loaded)
    lengths = [data.draw(st.integers(1, 20)) for _ in prompts]
    params = [SamplingParams(max_tokens=n, temperature=0, ignore_eos=True) for n in lengths]
    completions = generator.generate(prompts, params, adapter=adapters)
    for prompt, param, adapter, completion in zip(prompts, params, adapters, completions, strict=True):
        slot = -1 if adapter is None else names.index(adapter) - 1
        pool = None if adapter is None else generator._pool
        truth = naive_generate(model, prompt, param, adapters=pool, adapter_index=slot)
        assert completion.token_ids == truth.token_ids
        assert completion.finish_reason == "length"
    assert_all_free(generator)


def test_page_shortage_preempts_and_changes_nothing(model):
    prompts = prompts_of(1, 6, 20)
    params = SamplingParams(max_tokens=25, temperature=0.9, ignore_eos=True)
    plenty = Generator(model).generate(prompts, params)
    for overlap in (False, True):
        scarce = Generator(model, None, EngineConfig(page_size=4, num_pages=17, max_sequences=6, overlap=overlap))
        assert [c.token_ids for c in scarce.generate(prompts, params)] == [c.token_ids for c in plenty]
        assert scarce.stats.preemptions > 0
        assert_all_free(scarce)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 999), budget=st.integers(8, 60), page_size=st.sampled_from([2, 5, 16]))
def test_samples_are_the_same_alone_and_in_a_batch(model, seed, budget, page_size):
    prompts = prompts_of(seed, 6, 20)
    rng = random.Random(seed)
    params = [
        SamplingParams(
            max_tokens=rng.randint(1, 12), temperature=rng.choice([0.7, 1.3]), top_p=rng.choice([0.8, 1.0]),
            top_k=rng.choice([0, 5]), min_p=rng.choice([0.0, 0.1]), repetition_penalty=rng.choice([1.0, 1.3]),
            seed=rng.randint(0, 3), ignore_eos=True,
        )
        for _ in prompts
    ]  # fmt: skip
    config = EngineConfig(page_size=page_size, max_batch_tokens=budget, max_sequences=6, overlap=bool(seed % 2))
    together = Generator(model, None, config).generate(prompts, params)
    for number, (prompt, param) in enumerate(zip(prompts, params, strict=True)):
        [alone] = Generator(model).generate([prompt], param, request_ids=[number])
        assert alone.token_ids == together[number].token_ids
        assert alone.token_ids == naive_generate(model, prompt, param, request_id=number).token_ids


def test_n_samples_differ_and_share_the_prompts_pages(model):
    generator = Generator(model, None, EngineConfig(page_size=4))
    prompt = prompts_of(2, 1, 1, shared=30)[0]
    done = generator.generate([prompt, [1, 2]], SamplingParams(max_tokens=8, n=3, ignore_eos=True))
    assert [(c.request_id, c.index) for c in done] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert len({tuple(c.token_ids) for c in done[:3]}) == 3
    assert generator.stats.cached_prompt_tokens == 2 * 28  # whole pages before the last token


def test_a_shared_prefix_is_computed_once(model):
    prompts = prompts_of(3, 10, 5, shared=40)
    with_cache, without = (Generator(model, None, EngineConfig(page_size=4, prefix_cache=c)) for c in (True, False))
    assert [c.token_ids for c in with_cache.generate(prompts, GREEDY)] == [
        c.token_ids for c in without.generate(prompts, GREEDY)
    ]
    assert without.stats.cached_prompt_tokens == without.stats.shared_decode_tokens == 0
    assert with_cache.stats.shared_decode_tokens > 9 * 40
    assert with_cache.stats.cached_prompt_tokens >= 9 * 40
    before = with_cache.stats.computed_tokens
    with_cache.generate(prompts, GREEDY)
    assert with_cache.stats.computed_tokens - before < before  # the second time all but the ends are there


def test_prompts_that_begin_alike_run_together(model):
    """Two groups, given alternately, of which only one fits at a time: each prefix is computed once all the same."""
    groups = [prompts_of(seed, 4, 5, shared=40) for seed in (31, 32)]
    mixed = [prompt for pair in zip(*groups, strict=True) for prompt in pair]
    generator = Generator(model, None, EngineConfig(page_size=4, num_pages=24, max_sequences=3))
    done = generator.generate(mixed, GREEDY)
    assert [c.token_ids for c in done] == [c.token_ids for c in Generator(model).generate(mixed, GREEDY)]
    assert [c.request_id for c in done] == list(range(8))
    assert generator.stats.cached_prompt_tokens >= 2 * 3 * 40


def test_cached_pages_belong_to_one_adapter(model, adapter_folders):
    generator = Generator(model, None, EngineConfig(page_size=4), {"a": adapter_folders[0]})
    prompt = prompts_of(4, 1, 1, shared=20)
    base = generator.generate(prompt, GREEDY)[0].token_ids
    adapted = generator.generate(prompt, GREEDY, adapter="a")[0].token_ids
    assert base != adapted
    assert generator.generate(prompt, GREEDY)[0].token_ids == base
    generator.unload_adapter("a")
    with pytest.raises(InputError, match="'a' is not loaded; loaded: none"):
        generator.generate(prompt, GREEDY, adapter="a")
    generator.load_adapter(adapter_folders[1], "a")
    assert generator.generate(prompt, GREEDY, adapter="a")[0].token_ids not in (base, adapted)


@pytest.mark.parametrize("overlap", [False, True])
def test_end_tokens_stop_and_stay_out_of_the_text(model, tokenizer, overlap):
    prompt = [5, 6, 7]
    free = Generator(model, tokenizer).generate([prompt], GREEDY)[0].token_ids
    generator = Generator(model, tokenizer, EngineConfig(overlap=overlap))
    generator._end_ids = (free[4],)
    params = SamplingParams(max_tokens=10, temperature=0)
    [done] = generator.generate([prompt], params)
    expected = naive_generate(model, prompt, params, tokenizer=tokenizer, eos_ids=[free[4]])
    assert done == expected
    assert done.finish_reason == "stop" and done.token_ids[-1] == free[4]
    assert generator.stats.dropped_tokens == overlap  # the one drawn before the end was noticed
    assert generator.generate([prompt], GREEDY)[0].token_ids == free
    assert generator.stats.generated_tokens == len(done.token_ids) + len(free)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("streaming", [False, True])
def test_stop_strings_across_token_borders(model, pairs, streaming, overlap):
    rng = random.Random(0)
    params = SamplingParams(max_tokens=20, temperature=1.0, ignore_eos=True)
    for _ in range(12):
        prompt = [rng.randrange(256) for _ in range(5)]
        text = Generator(model, pairs).generate([prompt], params)[0].text
        assert len(text) == 40
        first, second = rng.randrange(20), rng.randrange(30)
        stops = (text[first : first + rng.randint(1, 7)], "never there", text[second : second + 3] + "z")
        cut = text[: text.find(stops[0])]
        stopping = SamplingParams(max_tokens=20, temperature=1.0, ignore_eos=True, stop=stops)
        generator = Generator(model, pairs, EngineConfig(overlap=overlap))
        if streaming:
            assert "".join(generator.stream(prompt, stopping)) == cut
        else:
            [done] = generator.generate([prompt], stopping)
            assert (done.text, done.finish_reason) == (cut, "stop")
            assert done == naive_generate(model, prompt, stopping, tokenizer=pairs)
        assert_all_free(generator)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("stop", [(), ("never there",)])
def test_an_ignored_end_token_keeps_its_text_where_it_comes_last(model, pairs, streaming, stop):
    """End tokens count for nothing under ignore_eos, be they first, last or between; otherwise they have no text."""
    prompt = [3, 1, 4, 1, 5]
    whole = naive_generate(model, prompt, SamplingParams(max_tokens=9, temperature=0, ignore_eos=True), tokenizer=pairs)
    for tokens in range(1, 10):
        end = whole.token_ids[tokens - 1]
        generator = Generator(model, pairs)
        generator._end_ids = (end,)
        for ignored in (True, False):
            params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=ignored, stop=stop)
            truth = naive_generate(model, prompt, params, tokenizer=pairs, eos_ids=(end,))
            if streaming:
                assert "".join(generator.stream(prompt, params)) == truth.text
            else:
                assert generator.generate([prompt], params) == [truth]
            assert len(truth.text) == 2 * (tokens if ignored else whole.token_ids.index(end))


def test_streamed_text_is_the_whole_text(model, tokenizer):
    params = SamplingParams(max_tokens=20, temperature=1.0, ignore_eos=True)
    generator = Generator(model, tokenizer)
    pieces = list(generator.stream("abc", params))
    assert len(pieces) > 1
    assert "".join(pieces) == generator.generate(["abc"], params)[0].text


def test_logprobs_are_the_models_own(model):
    prompts = prompts_of(6, 4, 12)
    params = [SamplingParams(max_tokens=6, temperature=1.4, ignore_eos=True, logprobs=k) for k in (0, 1, 3, 5)]
    for prompt, param, done in zip(prompts, params, Generator(model).generate(prompts, params), strict=True):
        assert done.logprobs is not None and len(done.logprobs) == 6
        truth = naive_logits(model, prompt + done.token_ids).log_softmax(-1)[len(prompt) - 1 : -1]
        for token, pairs, row in zip(done.token_ids, done.logprobs, truth, strict=True):
            k = param.logprobs or 0
            assert len(pairs) in (k, k + 1) and token in [t for t, _ in pairs]
            assert [t for t, _ in pairs[:k]] == row.topk(k).indices.tolist()
            for other, value in pairs:
                assert abs(value - float(row[other])) < 1e-4


GREEDY_SIX = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)


def test_scores_are_the_continuations_logprobs(model, adapter_folders):
    generator = Generator(model, None, EngineConfig(max_batch_tokens=64), {"a": adapter_folders[0]})
    pairs = [(p[: len(p) // 2 + 1], p[len(p) // 2 + 1 :]) for p in prompts_of(7, 7, 30)]
    for adapter in (None, "a"):
        scores = generator.score(pairs, adapter=adapter)
        pool = None if adapter is None else generator._pool
        for (prompt, continuation), score in zip(pairs, scores, strict=True):
            truth = naive_logits(model, prompt + continuation, pool, 0 if pool else -1).log_softmax(-1)
            expected = [float(truth[len(prompt) - 1 + i, t]) for i, t in enumerate(continuation)]
            assert score == pytest.approx(expected, abs=1e-4)
        # Greedy continuations are told from others that differ in one token.
        prompts = [prompt for prompt, _ in pairs]
        greedy = [c.token_ids for c in generator.generate(prompts, GREEDY_SIX, adapter=adapter)]
        other = [[*ids[:3], (ids[3] + 1) % model.config.vocab_size, *ids[4:]] for ids in greedy]
        told = generator.score_greedy(list(zip(prompts * 2, greedy + other, strict=True)), adapter=adapter)
        assert [is_greedy for _, is_greedy in told] == [True] * 7 + [False] * 7
    with pytest.raises(InputError, match="pair 0"):
        generator.score([([], [1])])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_drafts_change_no_token(built, pairs, data):
    """Greedy and sampled, end tokens, stop strings, log-probabilities, several samples, page shortage."""
    model = built[data.draw(st.sampled_from(["llama", "mpt", "windowed"]))]
    rng = random.Random(data.draw(st.integers(0, 999)))
    page_size = data.draw(st.sampled_from([1, 3, 4, 16]))
    shortest = -(-CONTEXT // page_size)
    limits = {
        "page_size": page_size, "max_sequences": 4, "max_batch_tokens": data.draw(st.integers(4, 60)),
        "num_pages": data.draw(st.integers(shortest, 3 * shortest)), "prefix_cache": data.draw(st.booleans()),
    }  # fmt: skip
    loop = [rng.randrange(256) for _ in range(5)]
    prompts = [
        (loop * 8)[: rng.randint(6, 30)] + [rng.randrange(256) for _ in range(rng.randrange(3))] for _ in range(5)
    ]
    params = [
        SamplingParams(
            max_tokens=rng.randint(1, 30), temperature=rng.choice([0.0, 0.0, 0.05, 0.7]), n=rng.choice([1, 1, 2]),
            top_p=rng.choice([1.0, 0.9]), logprobs=rng.choice([None, 2]), ignore_eos=rng.random() < 0.5,
            repetition_penalty=rng.choice([1.0, 1.0, 1.2]),
        )
        for _ in prompts
    ]  # fmt: skip
    plain = Generator(model, pairs, EngineConfig(**limits))
    plain._end_ids = tuple(rng.sample(range(256), 9))
    for done in plain.generate(prompts, params):
        cut = rng.randrange(len(done.text) - 3) if len(done.text) > 3 else 0
        if rng.random() < 0.3 and done.text:
            params[done.request_id] = replace(params[done.request_id], stop=(done.text[cut : cut + 3],))
    truth = plain.generate(prompts, params)
    drafting = Generator(model, pairs, EngineConfig(**limits, speculation=data.draw(st.sampled_from(MODES[1:]))))
    drafting._end_ids = plain._end_ids
    found = drafting.generate(prompts, params)
    for one, other in zip(truth, found, strict=True):
        assert replace(one, logprobs=None) == replace(other, logprobs=None)
        assert (one.logprobs is None) == (other.logprobs is None)
        for a, b in zip(one.logprobs or [], other.logprobs or [], strict=True):
            assert [t for t, _ in a] == [t for t, _ in b]
            assert [v for _, v in a] == pytest.approx([v for _, v in b], abs=1e-4)
    assert_all_free(drafting)


def test_drafts_save_steps_where_text_repeats():
    model = Model.random(ModelConfig("llama", 16, 32, 48, 2, 4, num_kv_heads=2, max_context=128), 3, std=0.3)
    for layer in model.layers:
        layer.o.weight.zero_()  # the next token follows from the newest alone, so greedy text goes round in circles
    params = SamplingParams(max_tokens=100, temperature=0, ignore_eos=True)
    prompts = [[1, 2, 3], [4, 5]]
    plain, drafting = (Generator(model, None, EngineConfig(speculation=mode)) for mode in ("off", "auto"))
    truth = [naive_generate(model, prompt, params).token_ids for prompt in prompts]
    assert [c.token_ids for c in plain.generate(prompts, params)] == truth
    assert [c.token_ids for c in drafting.generate(prompts, params)] == truth
    assert drafting.stats.steps < 0.7 * plain.stats.steps
    assert 0 < drafting.stats.accepted_tokens <= drafting.stats.drafted_tokens
    assert drafting.stats.generated_tokens == plain.stats.generated_tokens == 200


def test_speculation_is_named_rightly_or_not_at_all():
    with pytest.raises(InputError, match="speculation is 'on'; allowed: off, prompt_lookup, auto"):
        EngineConfig(speculation="on")
    with pytest.raises(InputError, match="one of them"):
        EngineConfig(speculation="auto", overlap=True)


def test_requests_are_taken_as_room_appears(model):
    taken = []

    def source():
        for number in range(40):
            taken.append(number)
            yield Request([number + 1, 2, 3], GREEDY, request_id=number)

    generator = Generator(model, None, EngineConfig(max_sequences=4, max_batch_tokens=16))
    finished = []
    for completion in generator.run(source()):
        finished.append(completion.request_id)
        assert len(taken) <= len(finished) + 8
    assert sorted(finished) == list(range(40))
    assert_all_free(generator)


def test_host_work_and_memory_do_not_grow_with_the_queue(model, monkeypatch):
    """Calls on the host, and live objects, per request: the same for a queue eight times as long."""

    def launch(runner, plan, rows):
        build_step(plan, rows, "cpu")
        count = len(plan.sampled)
        return Draws(torch.ones(count, dtype=torch.int64), torch.zeros(count))

    monkeypatch.setattr(Runner, "launch", launch)

    def calls_and_objects(num_requests: int) -> tuple[float, int]:
        generator = Generator(model, None, EngineConfig(page_size=4, max_sequences=8, num_pages=128))
        generator.warm_up()
        calls = peak = 0

        def count(frame, event, argument):
            nonlocal calls
            calls += event in ("call", "c_call")

        def requests():
            rng = random.Random(num_requests)
            for number in range(num_requests):
                yield Request([rng.randrange(256) for _ in range(20)], GREEDY, request_id=number)

        gc.collect()
        before = len(gc.get_objects())
        sys.setprofile(count)
        try:
            for number, _ in enumerate(generator.run(requests())):
                if number in (24, num_requests - 25):
                    peak = len(gc.get_objects()) - before
        finally:
            sys.setprofile(None)
        return calls / num_requests, peak

    few, few_objects = calls_and_objects(60)
    many, many_objects = calls_and_objects(480)
    assert many <= 1.02 * few
    assert many_objects <= few_objects + 100


def test_a_request_that_fails_fails_alone(model):
    def source():
        yield Request([1, 2], GREEDY, request_id=0)
        yield Request(list(range(CONTEXT)), GREEDY, request_id=1)
        yield Request([], GREEDY, request_id=2)
        yield Request([256], GREEDY, request_id=3)
        yield Request([3, 4], GREEDY, adapter="none", request_id=4)
        yield Request([5, 6], GREEDY, request_id=5)

    generator = Generator(model)
    done = {c.request_id: c for c in generator.run(source())}
    assert {i for i, c in done.items() if c.finish_reason == "error"} == {1, 2, 3, 4}
    assert done[1].error == "the prompt has 64 tokens; the context holds 64, so at most 63 are allowed"
    assert "vocabulary" in str(done[3].error) and "'none' is not loaded" in str(done[4].error)
    assert len(done[0].token_ids) == len(done[5].token_ids) == 10
    assert generator.stats.failed == 4


def test_unusable_logits_fail_one_request():
    model = Model.random(LLAMA, 3, std=0.3)
    model.embedding[7] = float("nan")
    generator = Generator(model, None, EngineConfig(max_sequences=3))
    prompts = [[1, 2], [7, 2], [3, 4]]
    params = SamplingParams(max_tokens=3, temperature=0.8, ignore_eos=True)
    done = list(generator.run(Request(p, params, request_id=i) for i, p in enumerate(prompts)))
    assert {c.request_id: c.finish_reason for c in done} == {0: "length", 1: "error", 2: "length"}
    assert_all_free(generator)


def test_list_use_checks_everything_first(model):
    generator = Generator(model)
    with pytest.raises(InputError, match="prompt 1: the prompt has 70 tokens; the context holds 64"):
        generator.generate([[1], list(range(70))], GREEDY)
    assert generator.stats.steps == 0
    with pytest.raises(InputError, match="params: 1 are given for 2 prompts"):
        generator.generate([[1], [2]], [GREEDY])
    with pytest.raises(InputError, match="one string"):
        generator.generate("text", GREEDY)
    with pytest.raises(InputError, match="no tokenizer"):
        generator.generate(["text"], GREEDY)


def test_leaving_a_stream_early_gives_the_pages_back(model, tokenizer):
    generator = Generator(model, tokenizer)
    stream = generator.stream("abc", SamplingParams(max_tokens=50, temperature=1.0, ignore_eos=True))
    next(stream)
    other = generator.generate(["xyz"], GREEDY)  # interleaved
    assert other[0].token_ids == Generator(model, tokenizer).generate(["xyz"], GREEDY)[0].token_ids
    assert generator.allocator.num_held > 0
    stream.close()
    assert_all_free(generator)


def test_an_interrupted_step_leaves_nothing_to_be_found(model, monkeypatch):
    generator = Generator(model, None, EngineConfig(page_size=4))
    prompts = prompts_of(8, 3, 5, shared=20)
    truth = generator.generate(prompts, GREEDY)
    generator.allocator.forget_contents()
    forward = Model.forward

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(Model, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generator.generate(prompts, GREEDY)
    monkeypatch.setattr(Model, "forward", forward)
    assert_all_free(generator)
    assert [c.token_ids for c in generator.generate(prompts, GREEDY)] == [c.token_ids for c in truth]


@pytest.mark.parametrize("overlap", [False, True])
def test_device_memory_running_out_shrinks_the_steps(model, monkeypatch, overlap):
    generator = Generator(model, None, EngineConfig(max_batch_tokens=64, max_sequences=4, overlap=overlap))
    prompts = prompts_of(9, 5, 30)
    truth = Generator(model).generate(prompts, GREEDY)
    forward = Model.forward

    def limited(self, batch, *args, **kwargs):
        if batch.num_tokens > 20:
            raise torch.cuda.OutOfMemoryError
        return forward(self, batch, *args, **kwargs)

    monkeypatch.setattr(Model, "forward", limited)
    done = generator.generate(prompts, GREEDY)
    assert [c.token_ids for c in done] == [c.token_ids for c in truth]
    assert generator.stats.out_of_memory == 2 and generator.max_batch_tokens == 16


def test_warming_up_is_timed_apart_and_leaves_no_trace(model):
    generator = Generator(model, None, EngineConfig(page_size=4))
    caches = [tensor for i in range(LLAMA.num_layers) for tensor in generator.cache.layer(i)]
    assert generator.warm_up() > 0
    assert all(not tensor.any() for tensor in caches)
    assert generator.stats.warmup_seconds > 0 and generator.stats.seconds == 0 == generator.stats.steps
    before = generator.stats.warmup_seconds
    generator.generate([[1, 2, 3]], GREEDY)
    assert generator.stats.warmup_seconds == before and generator.stats.seconds > 0


def test_devices_and_dtypes_by_name():
    cpu = torch.device("cpu")
    assert choose_device("cpu") == cpu
    assert choose_dtype("bf16", cpu) == torch.bfloat16
    for wrong in ("tpu", "mps", "cuda:99"):
        with pytest.raises(InputError, match="device"):
            choose_device(wrong)
    with pytest.raises(InputError, match="allowed: auto, fp32, bf16, fp16"):
        choose_dtype("float", cpu)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs_and_batches_alike(dtype):
    model = Model.random(LLAMA, 3, std=0.3, dtype=dtype)
    prompts = prompts_of(10, 5, 20)
    done = Generator(model, None, EngineConfig(max_batch_tokens=16, max_sequences=4)).generate(prompts, GREEDY)
    assert all(len(c.token_ids) == 10 for c in done)


def test_a_request_with_poisoned_logits_fails_alone(model, monkeypatch):
    generator = Generator(model, config=EngineConfig())
    prompts = [[5, 6, 7], [9, 8], [3, 1, 4, 1]]
    whole = generator.generate(prompts, GREEDY)
    launch = Runner.launch

    @torch.inference_mode()
    def poisoned(self, plan, rows):
        draws = launch(self, plan, rows)
        for i, sequence in enumerate(plan.sampled):
            if sequence.request_id == 1 and plan.sampled_at[i] - sequence.num_prompt == 4:
                draws.logprobs = draws.logprobs.clone()
                draws.logprobs[i] = float("nan")  # what a row of NaN logits gives, see tests/kernels/test_sampling.py
        return draws

    monkeypatch.setattr(Runner, "launch", poisoned)
    found = generator.generate(prompts, GREEDY)
    assert [c.finish_reason for c in found] == ["length", "error", "length"]
    assert "request 1" in found[1].error and "step 4" in found[1].error
    assert found[1].token_ids == whole[1].token_ids[:4]
    assert [found[i].token_ids for i in (0, 2)] == [whole[i].token_ids for i in (0, 2)]
