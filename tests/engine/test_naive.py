"""The oracle itself: greedy equals the argmax of one pass, sampling depends on its key alone, and every way to end."""

from __future__ import annotations

import pytest
import torch
from specialize.engine.config import ModelConfig
from specialize.engine.model import Model
from specialize.engine.naive import naive_generate, naive_logits
from specialize.engine.sampler import SamplingParams
from specialize.engine.tokenizer import Tokenizer
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def model():
    return Model.random(ModelConfig("llama", 256, 32, 64, 2, 4, num_kv_heads=2, max_context=40), 3, std=0.3)


@pytest.fixture(scope="module")
def tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend)


def test_greedy_is_the_argmax_at_every_position(model):
    done = naive_generate(model, [5, 6, 7], GREEDY)
    assert (done.finish_reason, done.prompt_tokens, len(done.token_ids)) == ("length", 3, 12)
    choices = naive_logits(model, [5, 6, 7, *done.token_ids]).argmax(-1)
    assert choices[2:-1].tolist() == done.token_ids


def test_samples_depend_on_seed_request_and_index_only(model):
    params = SamplingParams(max_tokens=10, temperature=1.0, top_p=0.95, seed=4, ignore_eos=True)
    first = naive_generate(model, [5, 6], params, request_id=2).token_ids
    assert naive_generate(model, [5, 6], params, request_id=2).token_ids == first
    assert naive_generate(model, [5, 6], params, request_id=3).token_ids != first
    assert naive_generate(model, [5, 6], params, request_id=2, index=1).token_ids != first


def test_the_context_ends_a_completion(model):
    done = naive_generate(model, list(range(38)), GREEDY)
    assert (len(done.token_ids), done.finish_reason) == (2, "length")


def test_end_tokens(model):
    ids = naive_generate(model, [5, 6, 7], GREEDY).token_ids
    end = ids[3]
    params = SamplingParams(max_tokens=12, temperature=0)
    done = naive_generate(model, [5, 6, 7], params, eos_ids=[end])
    assert (done.token_ids, done.finish_reason) == (ids[: ids.index(end) + 1], "stop")
    assert naive_generate(model, [5, 6, 7], GREEDY, eos_ids=[end]).token_ids == ids


def test_stop_strings_are_cut(model, tokenizer):
    whole = naive_generate(model, [5, 6, 7], GREEDY, tokenizer=tokenizer)
    stop = whole.text[4:6]
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, stop=(stop,))
    done = naive_generate(model, [5, 6, 7], params, tokenizer=tokenizer)
    assert done.finish_reason == "stop"
    assert done.text == whole.text[: whole.text.index(stop)]
    assert whole.token_ids[: len(done.token_ids)] == done.token_ids


def test_logprobs(model):
    params = SamplingParams(max_tokens=5, temperature=1.5, seed=1, logprobs=2, ignore_eos=True)
    done = naive_generate(model, [5, 6], params)
    truth = naive_logits(model, [5, 6, *done.token_ids]).log_softmax(-1)[1:-1]
    assert done.logprobs is not None
    for row, token, pairs in zip(truth, done.token_ids, done.logprobs, strict=True):
        assert [i for i, _ in pairs[:2]] == row.topk(2).indices.tolist()
        assert token in [i for i, _ in pairs]
        assert all(abs(row[i].item() - value) < 1e-4 for i, value in pairs)


def test_the_repetition_penalty_counts_the_prompt(model):
    first = naive_generate(model, [5, 6, 7], GREEDY).token_ids[0]
    params = SamplingParams(max_tokens=1, temperature=0, repetition_penalty=1e6, ignore_eos=True)
    logits = naive_logits(model, [5, 6, 7, first])
    assert naive_generate(model, [5, 6, 7, first], params).token_ids[0] not in (5, 6, 7, first)
    assert torch.isfinite(logits).all()
