"""8-bit pages: the generator against an oracle that quantises alike, and what is refused before any work."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from specialize.engine.batch import Batch
from specialize.engine.cache import KVCache
from specialize.engine.config import ModelConfig
from specialize.engine.generator import Generator
from specialize.engine.kv_scales import HEADROOM, calibrate, calibration_ids, kv_dtype_of
from specialize.engine.model import Model
from specialize.engine.naive import naive_logits
from specialize.engine.sampler import SamplingParams
from specialize.engine.scheduler import EngineConfig

from specialize.errors import InputError

CONTEXT = 64
CONFIGS = {
    "llama": ModelConfig("llama", 256, 32, 48, 2, 4, num_kv_heads=2, max_context=CONTEXT),
    "mpt": ModelConfig(
        "mpt", 256, 24, 48, 2, 3, max_context=CONTEXT, norm="layernorm", position="alibi", mlp="gelu",
        fused_qkv_checkpoint=True, tied_embeddings=True, clip_qkv=1.5,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def built():
    return {name: Model.random(config, 3, std=0.3) for name, config in CONFIGS.items()}


class RoundedCache:
    """Pages in floating point that hold what 8-bit pages give back: written in full, then rounded in place."""

    def __init__(self, model: Model, scales) -> None:
        self.inner, self.scales = KVCache(model.config, 1, CONTEXT, model.dtype, "cpu"), scales

    def layer(self, layer_id):
        return self.inner.layer(layer_id)

    def round(self, layer_id: int) -> None:
        for cache, scale in zip(self.inner.layer(layer_id), self.scales[layer_id], strict=True):
            steps = (cache / scale[:, None]).round().clamp(-127, 127)
            cache.copy_(steps * scale[:, None])


def rounded_greedy(model: Model, scales, prompt: list[int], count: int, monkeypatch) -> list[int]:
    """Greedy tokens, each from one pass over the whole sequence, one layer's keys and values rounded before they are
    attended to."""
    from specialize.engine import model as module

    cache = RoundedCache(model, scales)
    written = []

    def kv_write(k, v, k_cache, v_cache, slots, **named):
        named.pop("k_scale"), named.pop("v_scale"), named.pop("backend")
        original(k, v, k_cache, v_cache, slots, **named, backend="torch")
        cache.round(len(written) % model.config.num_layers)
        written.append(None)

    original = module.kv_write
    ids = list(prompt)
    with monkeypatch.context() as patch:
        patch.setattr(module, "kv_write", kv_write)
        for _ in range(count):
            n = len(ids)
            batch = Batch(
                torch.tensor(ids), torch.arange(n), torch.tensor([0, n], dtype=torch.int32),
                torch.tensor([n], dtype=torch.int32), n, n, slots=torch.arange(n),
                page_table=torch.zeros(1, 1, dtype=torch.int32),
            )  # fmt: skip
            with torch.inference_mode():
                ids.append(int(model.logits(model.forward(batch, cache))[-1].argmax()))
    return ids[len(prompt) :]


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_greedy_equals_an_oracle_with_rounded_keys_and_values(built, data):
    model = built[data.draw(st.sampled_from(sorted(CONFIGS)))]
    rng = random.Random(data.draw(st.integers(0, 99)))
    shared = [rng.randrange(256) for _ in range(data.draw(st.sampled_from([0, 20])))]
    prompts = [shared + [rng.randrange(256) for _ in range(rng.randrange(1, 20))] for _ in range(4)]
    config = EngineConfig(
        kv_dtype="int8", page_size=data.draw(st.sampled_from([1, 4, 16])), max_sequences=3, num_pages=CONTEXT * 2,
        max_batch_tokens=3 + data.draw(st.integers(0, 30)),
    )  # fmt: skip
    generator = Generator(model, None, config)
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    scales = [generator.cache.layer(i)[2:] for i in range(model.config.num_layers)]
    with pytest.MonkeyPatch.context() as patch:
        for prompt, completion in zip(prompts, generator.generate(prompts, params), strict=True):
            assert completion.token_ids == rounded_greedy(model, scales, prompt, 8, patch)


def test_scales_cover_what_was_seen(built):
    model = built["llama"]
    ids = calibration_ids(model.config, None)
    scales = calibrate(model, ids, torch.int8)
    assert len(ids) == CONTEXT and len(scales) == 2
    again = calibrate(model, ids, torch.int8)
    wide = calibrate(model, ids, torch.float8_e4m3fn)
    for layer, same, fp8 in zip(scales, again, wide, strict=True):
        for scale, equal, other in zip(layer, same, fp8, strict=True):
            assert scale.shape == (2,) and scale.dtype == torch.float32 and torch.equal(scale, equal)
            torch.testing.assert_close(scale * 127, other * 448)
    cache = KVCache(model.config, 4, 16, torch.int8, "cpu", scales)
    generator = Generator(model, None, EngineConfig(kv_dtype="int8", max_sequences=1))
    k_cache, v_cache, k_scale, v_scale = generator.cache.layer(1)
    assert k_cache.dtype == v_cache.dtype == cache.layer(0)[0].dtype == torch.int8
    assert torch.equal(k_scale, scales[1][0]) and torch.equal(v_scale, scales[1][1])
    assert generator.plan.page_bytes * 4 == Generator(model, None, EngineConfig(max_sequences=1)).plan.page_bytes
    generator.generate([ids[:-1]], SamplingParams(max_tokens=1, temperature=0))
    limit = round(127 / HEADROOM)  # the very text that the scales come from fills the range up to the headroom
    assert limit - 1 <= int(k_cache.to(torch.int32).abs().max()) <= limit + 1


def test_8_bits_are_close_to_the_models_own(built):
    """Logits at the end of a prompt, seen through the logprobs of the likeliest token."""
    model = built["llama"]
    prompt = list(range(3, 40))
    params = SamplingParams(max_tokens=1, temperature=0, logprobs=3)
    [completion] = Generator(model, None, EngineConfig(kv_dtype="int8")).generate([prompt], params)
    truth = naive_logits(model, prompt)[-1].log_softmax(-1)
    for token, logprob in completion.logprobs[0]:
        assert abs(float(truth[token]) - logprob) < 0.1


@pytest.mark.parametrize(
    ("name", "device", "message"),
    [
        ("fp8", "cpu", "kv-dtype fp8 needs a CUDA device of compute capability 8.9 or later; int8 runs on a CPU"),
        ("bf16", "cpu", "kv-dtype bf16 with a model in fp32; allowed: auto, fp32, int8, fp8"),
    ],
)
def test_what_the_device_lacks_is_one_line(built, name, device, message):
    with pytest.raises(InputError, match=message):
        kv_dtype_of(name, torch.float32, device)
    with pytest.raises(InputError, match=message):
        Generator(built["llama"], None, EngineConfig(kv_dtype=name))


def test_old_devices_have_no_fp8(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(InputError, match=r"fp8 needs compute capability 8\.9; cuda has 8\.0; use int8"):
        kv_dtype_of("fp8", torch.bfloat16, "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert kv_dtype_of("fp8", torch.bfloat16, "cuda") == torch.float8_e4m3fn
    assert kv_dtype_of("int8", torch.bfloat16, "cpu") == torch.int8
    assert kv_dtype_of("auto", torch.bfloat16, "cpu") == kv_dtype_of("bf16", torch.bfloat16, "cpu") == torch.bfloat16


def test_an_unknown_name_is_refused():
    with pytest.raises(InputError, match="kv_dtype is 'int4'; allowed: auto, fp32"):
        EngineConfig(kv_dtype="int4")
