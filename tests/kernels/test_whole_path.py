"""What a GPU runs, run here: whole models generate and train through the Triton kernels, under the interpreter."""

import pytest
import torch
from safetensors.torch import load_file
from specialize.engine.config import ModelConfig
from specialize.engine.generator import Generator
from specialize.engine.model import Model
from specialize.engine.sampler import SamplingParams
from specialize.engine.scheduler import EngineConfig
from specialize.train.config import TrainConfig
from specialize.train.data import TrainExample
from specialize.train.loop import tune

LLAMA = {
    "model_type": "llama", "vocab_size": 67, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
MPT = {
    "model_type": "mpt", "vocab_size": 67, "d_model": 48, "n_heads": 3, "n_layers": 2, "expansion_ratio": 2,
    "max_seq_len": 64, "no_bias": True, "eos_token_id": 0,
    "attn_config": {"alibi": True, "attn_impl": "torch", "clip_qkv": 6.0},
}  # fmt: skip
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
EXAMPLES = [
    TrainExample(prompt_ids=[5, 9, 11 + i], response_ids=[(7 * i + j) % 60 + 3 for j in range(2 + i % 4)])
    for i in range(6)
]


def models(raw, device):
    """The same weights twice: every op through Triton, every op in torch."""
    config = ModelConfig.from_dict(raw, source="test")
    return [Model.random(config, 3, device=device, backend=b, std=0.15) for b in ("triton", "torch")]


def tuned(model, folder, steps=2):
    config = TrainConfig(
        rank=4, batch_size=3, max_batch_tokens=16, max_steps=steps, learning_rate=0.05, warmup_ratio=0.0
    )
    result = tune(model, EXAMPLES, config, folder)
    return result, load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("raw", [MPT, LLAMA], ids=["mpt", "llama"])
def test_training_agrees_with_torch(raw, device, tmp_path):
    outcomes = [tuned(m, tmp_path / str(n)) for n, m in enumerate(models(raw, device))]
    (ours, our_adapter), (expected, adapter) = outcomes
    assert ours.steps == 2 and ours.losses == pytest.approx(expected.losses, rel=1e-4)
    assert ours.grad_norms == pytest.approx(expected.grad_norms, rel=1e-3)
    assert our_adapter.keys() == adapter.keys()
    change = sum(float(t.abs().sum()) for name, t in adapter.items() if "lora_B" in name)
    assert change > 0
    for name, tensor in adapter.items():
        torch.testing.assert_close(our_adapter[name], tensor, rtol=1e-2, atol=2e-3)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("raw", [MPT, LLAMA], ids=["mpt", "llama"])
def test_generation_agrees_with_torch(raw, device, tmp_path):
    ours, theirs = models(raw, device)
    tuned(theirs, tmp_path / "a")
    tuned(theirs, tmp_path / "b", steps=1)
    prompts = [[5, 9, 11], [5, 9, 11, 14, 15, 16, 17, 21, 8], [33]]
    params = [
        SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True),
        SamplingParams(max_tokens=3, temperature=0.9, top_p=0.9, top_k=20, ignore_eos=True, seed=1),
        SamplingParams(max_tokens=4, temperature=0.7, repetition_penalty=1.2, ignore_eos=True, seed=2),
    ]
    engine = EngineConfig(page_size=4, num_pages=24, max_batch_tokens=8, max_sequences=3)
    completions = []
    for model in (ours, theirs):
        generator = Generator(model, None, engine, {"a": tmp_path / "a", "b": tmp_path / "b"})
        completions.append(generator.generate(prompts, params, adapter=["a", None, "b"]))
    assert [c.token_ids for c in completions[0]] == [c.token_ids for c in completions[1]]
    assert [len(c.token_ids) for c in completions[0]] == [4, 3, 4]
