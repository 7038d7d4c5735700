"""The decoder and the sentence encoder on a CUDA device against themselves on the CPU in fp32."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from checkpoints import llama_dict, mpt_dict, save_folder
from specialize.engine.batch import Batch
from specialize.engine.embedder import Embedder
from specialize.engine.generator import Generator
from specialize.engine.model import Model
from specialize.engine.sampler import SamplingParams
from specialize.engine.scheduler import EngineConfig
from specialize.engine.shapes import SHAPES
from test_model import Pages, random_sequences

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SIZES = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 192}
MPT_SIZES = {"d_model": 192, "n_heads": 6}
CASES = {
    "llama": llama_dict(**SIZES),
    "qwen3": llama_dict(**SIZES, model_type="qwen3", head_dim=64),
    "qwen2 window": llama_dict(
        **SIZES, model_type="qwen2", use_sliding_window=True, sliding_window=7, max_window_layers=1
    ),
    "mpt": mpt_dict(**MPT_SIZES),
    "mpt clip, qk_ln, biases": mpt_dict(**MPT_SIZES, attn={"clip_qkv": 0.5, "qk_ln": True}, no_bias=False),
    "mpt multi-query": mpt_dict(**MPT_SIZES, attn={"attn_type": "multiquery_attention"}),
    "mpt learned": mpt_dict(**MPT_SIZES, attn={"alibi": False}, logit_scale=0.5),
    "mpt rope": mpt_dict(**MPT_SIZES, attn={"alibi": False, "rope": True}),
}  # fmt: skip
BOUNDS = {torch.float32: 2e-3, torch.bfloat16: 16 * 2.0**-8, torch.float16: 16 * 2.0**-11}


def worst_row(got: torch.Tensor, truth: torch.Tensor) -> float:
    return ((got.double().cpu() - truth).norm(dim=1) / truth.norm(dim=1)).max().item()


@pytest.mark.parametrize("dtype", list(BOUNDS), ids=str)
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_device_equals_cpu(name, dtype, tmp_path):
    save_folder(tmp_path, CASES[name])
    sequences = random_sequences(97, (1, 40, 17))
    exact = Model.from_pretrained(tmp_path, dtype=torch.float64, backend="torch")
    truth = exact.logits(exact.forward(Batch.packed(sequences)))
    model = Model.from_pretrained(tmp_path, dtype=dtype, device="cuda")
    logits = model.logits(model.forward(Batch.packed(sequences, "cuda")))
    assert worst_row(logits, truth) < BOUNDS[dtype]


@pytest.mark.parametrize("name", CASES)
@torch.inference_mode()
def test_cached_steps_on_the_device(name, tmp_path):
    save_folder(tmp_path, CASES[name])
    a, b = sequences = random_sequences(97, (9, 30))
    exact = Model.from_pretrained(tmp_path, dtype=torch.float64, backend="torch")
    truth = exact.logits(exact.forward(Batch.packed(sequences))).split([9, 30])
    model = Model.from_pretrained(tmp_path, dtype=torch.bfloat16, device="cuda")
    pages = Pages(model, 2, 32, page_size=16)
    plan = [[(0, 0, a[:7]), (1, 0, b[:3])], [(0, 7, a[7:8]), (1, 3, b[3:29])], [(0, 8, a[8:]), (1, 29, b[29:])]]
    for chunks in plan:
        logits = model.logits(model.forward(pages.batch(chunks), pages))
        wanted = torch.cat([truth[s][first : first + len(tokens)] for s, first, tokens in chunks])
        assert worst_row(logits, wanted) < BOUNDS[torch.bfloat16]


def test_embedder_on_the_device(minilm):
    texts = [f"Sentence {i} about the heart." * (i + 1) for i in range(20)]
    truth = Embedder.from_pretrained(minilm).embed(texts)
    rough = Embedder.from_pretrained(minilm, torch.bfloat16, "cuda").embed(texts)
    assert (truth * rough).sum(1).min() > 0.999


@pytest.mark.parametrize("name", ["llama", "mpt clip, qk_ln, biases"])
@torch.inference_mode()
def test_recorded_decodes_equal_launched_ones(name, tmp_path):
    from specialize.engine.decode_graph import RECORD_AT_USE, DecodeGraphs
    from specialize.engine.rows import Rows, StepPlan

    save_folder(tmp_path, CASES[name])
    model = Model.from_pretrained(tmp_path, dtype=torch.bfloat16, device="cuda")
    sequences = random_sequences(97, (40, 33, 47, 21, 60, 10, 29))
    plain, recorded = (Pages(model, len(sequences), 64, page_size=16) for _ in range(2))
    graphs = DecodeGraphs(model, recorded, max_context=64)
    rows = Rows(len(sequences), 64, 16)
    rows.page_table[:] = recorded.table.numpy()
    for s, ids in enumerate(sequences):
        rows.tokens[s, : len(ids)] = ids
    for pages in (plain, recorded):
        model.forward(pages.batch([(s, 0, ids[:10]) for s, ids in enumerate(sequences)]), pages)
    used = 0
    for at in range(10, 60):
        live = [s for s, ids in enumerate(sequences) if len(ids) > at]
        if not live:
            break
        chunks = [(s, at, [sequences[s][at]]) for s in live]
        expected = model.logits(model.forward(plain.batch(chunks), plain))
        graph = graphs.find(len(live), at + 1, 0, None, draws=at % 2 == 0)
        if graph is None:
            logits = model.logits(model.forward(recorded.batch(chunks), recorded))
        else:
            decodes = rows.decode_set([], np.asarray(live), None)
            place = np.full(len(live), at)
            graph.fill(StepPlan(decodes, place, [], [], place + 1, decodes.serials, decodes.settings), rows)
            logits, *draws = (out[: len(live)] for out in graph.replay())
            if draws:  # the rows' temperature is 0
                assert (logits.gather(1, draws[0][:, None])[:, 0] == logits.max(-1).values).all()
            used += 1
        assert worst_row(logits, expected.double().cpu()) < 2.0**-6
    assert used > 20 and RECORD_AT_USE == 3


def test_a_generator_that_is_gone_leaves_its_memory_to_the_next():
    """Its KV cache stays in torch's pool, which a cap on the process would otherwise still count. What libraries keep
    for the process, workspaces of products above all, does count."""
    pages = []
    for _ in range(3):
        model = Model.random(SHAPES["smollm2-135m"], 0, dtype=torch.bfloat16, device="cuda")
        generator = Generator(model, None, EngineConfig(memory_bytes=3 << 30))
        generator.generate([[5, 9, 11]], SamplingParams(max_tokens=4, ignore_eos=True))
        pages.append(generator.plan.num_pages)
        del generator, model
    assert pages[0] > 1000 and pages[1] == pages[2] > 0.4 * pages[0]
