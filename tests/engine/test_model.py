"""Our decoder against transformers, a plain implementation of MPT's options, and itself with a cache."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checkpoints import LLAMA, llama_dict, mpt_dict, save_folder, save_transformers
from specialize.engine.batch import Batch
from specialize.engine.config import ModelConfig
from specialize.engine.model import Model
from specialize.engine.weights import open_checkpoint

LENGTHS = (1, 40, 17)


def random_sequences(vocab_size: int, lengths=LENGTHS, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab_size, (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def our_logits(model: Model, sequences: list[list[int]]) -> torch.Tensor:
    return model.logits(model.forward(Batch.packed(sequences)))


@torch.no_grad()
def their_logits(model: Any, sequences: list[list[int]]) -> torch.Tensor:
    return torch.cat([model(torch.tensor([ids])).logits[0] for ids in sequences])


def scaled(kind: str, **parameters: Any) -> tuple[str, dict[str, Any]]:
    return kind, {"rope_scaling": {"original_max_position_embeddings": 32, **parameters}}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("Llama", {}),
        ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
        ("Llama", {"num_key_value_heads": 6, "head_dim": 12, "rope_theta": 500000.0}),
        scaled("Llama", rope_type="linear", factor=4.0),
        scaled("Llama", rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0),
        scaled("Llama", rope_type="yarn", factor=4.0),
        ("Mistral", {"sliding_window": 5, "head_dim": 16}),
        ("Mistral", {"sliding_window": None}),
        ("Qwen2", {}),
        ("Qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
        ("Qwen3", {"head_dim": 16}),
        ("Qwen3", {"head_dim": 8, "attention_bias": True, "tie_word_embeddings": True}),
    ],
)
def test_llama_family_equals_transformers(kind, options, tmp_path):
    theirs = save_transformers(kind, tmp_path, **{**LLAMA, **options})
    sequences = random_sequences(97)
    difference = our_logits(Model.from_pretrained(tmp_path), sequences) - their_logits(theirs, sequences)
    assert difference.abs().max() < 1e-4


@pytest.mark.parametrize(
    "options",
    [
        {"n_heads": 4},
        {"n_heads": 6},
        {"n_heads": 3, "attn_config": {"clip_qkv": 0.3}},
        {"n_heads": 1, "attn_config": {"softmax_scale": 0.4}},
        {"n_heads": 12, "layer_norm_epsilon": 1e-2},
        {"n_heads": 4, "tie_word_embeddings": False},
    ],
)
def test_mpt_equals_transformers(options, tmp_path):
    theirs = save_transformers("Mpt", tmp_path, d_model=48, n_layers=2, max_seq_len=64, vocab_size=97, **options)
    sequences = random_sequences(97)
    difference = our_logits(Model.from_pretrained(tmp_path), sequences) - their_logits(theirs, sequences)
    assert difference.abs().max() < 1e-4


def test_weights_written_by_us_load_in_transformers(tmp_path):
    from transformers import AutoModelForCausalLM

    save_folder(tmp_path, llama_dict())
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    sequences = random_sequences(97)
    difference = our_logits(Model.from_pretrained(tmp_path), sequences) - their_logits(theirs, sequences)
    assert difference.abs().max() < 1e-4


class PlainMPT:
    """MPT as its definition reads, one sequence at a time, from the raw config and tensors: no code of ours."""

    def __init__(self, raw: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        self.raw, self.attn, self.t = raw, raw["attn_config"], {k: v.double() for k, v in tensors.items()}

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        weight, bias = self.t[name + ".weight"], self.t.get(name + ".bias")
        if "rms" in self.raw.get("norm_type", ""):
            return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight
        return F.layer_norm(x, (x.shape[-1],), weight, bias, 1e-5)

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, self.t[name + ".weight"], self.t.get(name + ".bias"))

    def slopes(self, heads: int) -> list[float]:
        power = 1
        while power < heads:
            power *= 2
        all_slopes = [2.0 ** -(self.attn.get("alibi_bias_max", 8) * i / power) for i in range(1, power + 1)]
        return all_slopes if power == heads else (all_slopes[1::2] + all_slopes[::2])[:heads]

    def rotate(self, x: torch.Tensor) -> torch.Tensor:  # [T, heads, D]
        half = x.shape[-1] // 2
        out = x.clone()
        factor = self.attn.get("rope_hf_config", {}).get("factor", 1.0)
        for t in range(x.shape[0]):
            for i in range(half):
                angle = t / factor * self.attn.get("rope_theta", 10000) ** (-2 * i / x.shape[-1])
                a, b = x[t, :, i], x[t, :, i + half]
                out[t, :, i] = a * math.cos(angle) - b * math.sin(angle)
                out[t, :, i + half] = b * math.cos(angle) + a * math.sin(angle)
        return out

    def attention(self, x: torch.Tensor, at: str) -> torch.Tensor:
        heads = self.raw["n_heads"]
        size = self.attn.get("head_dim") or self.raw["d_model"] // heads
        groups = self.attn.get("kv_n_heads", 1 if "query" in self.attn.get("attn_type", "") else heads)
        if self.attn.get("fused_qkv", True):
            qkv = self.linear(x, at + "attn.Wqkv")
        else:
            qkv = torch.cat([self.linear(x, at + "attn.W" + letter) for letter in "qkv"], -1)
        if self.attn.get("clip_qkv"):
            qkv = qkv.clamp(-self.attn["clip_qkv"], self.attn["clip_qkv"])
        q, k, v = qkv.split([heads * size, groups * size, groups * size], -1)
        if self.attn.get("qk_ln"):
            q, k = self.norm(q, at + "attn.q_ln"), self.norm(k, at + "attn.k_ln")
        q, k, v = (z.unflatten(-1, (-1, size)) for z in (q, k, v))
        if self.attn.get("qk_gn"):
            q, k = self.norm(q, at + "attn.q_ln"), self.norm(k, at + "attn.k_ln")
        if self.attn.get("rope"):
            q, k = self.rotate(q), self.rotate(k)
        scale = self.attn.get("softmax_scale") or size**-0.5
        window = self.attn.get("sliding_window_size", -1)
        rows = []
        for head in range(heads):
            scores = q[:, head] @ k[:, head * groups // heads].T * scale
            for i in range(len(x)):
                for j in range(len(x)):
                    if self.attn.get("alibi"):
                        scores[i, j] -= self.slopes(heads)[head] * (i - j)
                    if j > i or (window > 0 and i - j >= window):
                        scores[i, j] = -torch.inf
            rows.append(scores.softmax(-1) @ v[:, head * groups // heads])
        return self.linear(torch.cat(rows, -1), at + "attn.out_proj")

    def ffn(self, x: torch.Tensor, at: str) -> torch.Tensor:
        up = self.linear(x, at + "ffn.up_proj")
        if self.raw.get("ffn_config", {}).get("ffn_type") == "mptglu":
            return self.linear(F.gelu(self.linear(x, at + "ffn.gate_proj")) * up, at + "ffn.down_proj")
        return self.linear(F.gelu(up), at + "ffn.down_proj")

    def logits(self, ids: list[int]) -> torch.Tensor:
        x = self.t["transformer.wte.weight"][ids]
        if "transformer.wpe.weight" in self.t:
            x = x + self.t["transformer.wpe.weight"][: len(ids)]
        for i in range(self.raw["n_layers"]):
            at = f"transformer.blocks.{i}."
            x = x + self.attention(self.norm(x, at + "norm_1"), at)
            x = x + self.ffn(self.norm(x, at + "norm_2"), at)
        head = self.t.get("lm_head.weight", self.t["transformer.wte.weight"])
        scale = self.raw.get("logit_scale") or 1.0
        scale = self.raw["d_model"] ** -0.5 if scale == "inv_sqrt_d_model" else scale
        return self.norm(x, "transformer.norm_f") @ head.T * scale


MPT_OPTIONS = {
    "alibi_bias_max": mpt_dict(attn={"alibi_bias_max": 16}),
    "odd heads": mpt_dict(n_heads=3),
    "clip": mpt_dict(attn={"clip_qkv": 0.3}),
    "qk_ln": mpt_dict(attn={"qk_ln": True}),
    "qk_ln with biases": mpt_dict(attn={"qk_ln": True}, no_bias=False),
    "qk_gn": mpt_dict(attn={"qk_gn": True}),
    "grouped": mpt_dict(attn={"attn_type": "grouped_query_attention", "kv_n_heads": 2}),
    "grouped qk_ln": mpt_dict(attn={"attn_type": "grouped_query_attention", "kv_n_heads": 2, "qk_ln": True}),
    "multi-query": mpt_dict(attn={"attn_type": "multiquery_attention"}),
    "learned positions": mpt_dict(attn={"alibi": False}),
    "no positions": mpt_dict(attn={"alibi": False}, learned_pos_emb=False),
    "rope": mpt_dict(attn={"alibi": False, "rope": True, "rope_theta": 500}),
    "rope linear": mpt_dict(
        attn={"alibi": False, "rope": True, "rope_impl": "hf", "rope_hf_config": {"type": "linear", "factor": 2.0}}
    ),
    "softmax_scale": mpt_dict(attn={"softmax_scale": 0.4}),
    "logit_scale number": mpt_dict(logit_scale=0.25),
    "logit_scale name": mpt_dict(logit_scale="inv_sqrt_d_model"),
    "biases": mpt_dict(no_bias=False),
    "untied": mpt_dict(tie_word_embeddings=False),
    "expansion_ratio": mpt_dict(expansion_ratio=2),
    "ffn hidden size": mpt_dict(ffn_config={"ffn_type": "mptmlp", "ffn_hidden_size": 40}),
    "gated": mpt_dict(ffn_config={"ffn_type": "mptglu", "ffn_hidden_size": 40}, no_bias=False),
    "rmsnorm": mpt_dict(norm_type="low_precision_rmsnorm"),
    "window": mpt_dict(attn={"sliding_window_size": 5}),
    "unfused": mpt_dict(attn={"fused_qkv": False, "attn_type": "grouped_query_attention", "kv_n_heads": 3}),
}  # fmt: skip


@pytest.mark.parametrize("option", MPT_OPTIONS)
def test_mpt_options_equal_a_plain_implementation(option, tmp_path):
    raw = MPT_OPTIONS[option]
    save_folder(tmp_path, raw)
    plain = PlainMPT(raw, dict(open_checkpoint(tmp_path)[1]))
    sequences = random_sequences(97, (1, 19, 8))
    expected = torch.cat([plain.logits(ids) for ids in sequences])
    difference = our_logits(Model.from_pretrained(tmp_path), sequences).double() - expected
    assert difference.abs().max() < 1e-4
    assert expected.abs().max() > 0.1


class Pages:
    """A cache with pages in a shuffled order, filled step by step; the smallest thing that `Model.forward` accepts."""

    def __init__(self, model: Model, num_sequences: int, max_len: int, page_size: int = 4) -> None:
        c = model.config
        per_sequence = -(-max_len // page_size)
        self.page_size, num_pages = page_size, per_sequence * num_sequences
        shape = (num_pages, page_size, c.num_kv_heads, c.head_dim)
        place: dict[str, Any] = {"dtype": model.dtype, "device": model.device}
        self.device = model.device
        self.pairs = [
            (torch.full(shape, torch.nan, **place), torch.full(shape, torch.nan, **place)) for _ in range(c.num_layers)
        ]
        order = torch.randperm(num_pages, generator=torch.Generator().manual_seed(0))
        self.table = order.view(num_sequences, per_sequence).int()

    def layer(self, layer_id: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.pairs[layer_id]

    def batch(self, chunks: list[tuple[int, int, list[int]]]) -> Batch:
        """``chunks``: (sequence, first position, token ids), single-token decodes first."""
        ids = torch.tensor([t for *_, tokens in chunks for t in tokens])
        positions = torch.cat([torch.arange(first, first + len(tokens)) for _, first, tokens in chunks])
        rows = torch.cat([torch.full((len(tokens),), s) for s, _, tokens in chunks])
        slots = self.table[rows, positions // self.page_size].long() * self.page_size + positions % self.page_size
        lens = [len(tokens) for *_, tokens in chunks]
        decodes = [n == 1 for n in lens]
        on = self.device
        return Batch(
            token_ids=ids.to(on),
            positions=positions.to(on),
            query_starts=torch.tensor([0, *torch.tensor(lens).cumsum(0).tolist()], dtype=torch.int32).to(on),
            context_lens=torch.tensor([first + len(tokens) for _, first, tokens in chunks], dtype=torch.int32).to(on),
            max_query_len=max(lens),
            max_context_len=max(first + len(tokens) for _, first, tokens in chunks),
            num_decodes=[*decodes, False].index(False),
            slots=slots.to(on),
            page_table=self.table[[s for s, *_ in chunks]].to(on),
        )


CACHED = {
    "llama": llama_dict(), "qwen3": llama_dict(model_type="qwen3", head_dim=16),
    "window": llama_dict(model_type="mistral", sliding_window=5), "mpt": mpt_dict(),
    "mpt clip qk_ln": mpt_dict(attn={"clip_qkv": 0.3, "qk_ln": True}), "mpt learned": mpt_dict(attn={"alibi": False}),
}  # fmt: skip


@pytest.mark.parametrize("backend", [None, "torch", "triton"])
@pytest.mark.parametrize("name", CACHED)
def test_cached_steps_equal_the_whole_pass(name, backend, tmp_path):
    if backend == "triton":
        pytest.importorskip("triton")
        if name not in ("llama", "mpt", "qwen3"):
            pytest.skip("the interpreter is slow; three models cover all kernels")
    save_folder(tmp_path, CACHED[name])
    model = Model.from_pretrained(tmp_path)
    sequences = random_sequences(97, (9, 14) if backend == "triton" else (9, 30))
    expected = our_logits(model, sequences).split([len(s) for s in sequences])
    stepping = Model.from_pretrained(tmp_path, backend=backend)
    pages = Pages(model, 2, 32)
    a, b = sequences
    plan = [
        [(0, 0, a[:7]), (1, 0, b[:3])],  # two chunks of a prefill
        [(0, 7, a[7:8]), (1, 3, b[3:12])],  # a decode beside a chunk that continues
        [(0, 8, a[8:9]), (1, 12, b[12:13])],  # decodes only
        [(1, 13, b[13:])],
    ]
    for chunks in plan:
        with torch.inference_mode():
            logits = stepping.logits(stepping.forward(pages.batch(chunks), pages))
        wanted = torch.cat([expected[s][first : first + len(tokens)] for s, first, tokens in chunks])
        assert (logits - wanted).abs().max() < 1e-4


@pytest.mark.parametrize("raw", [llama_dict(), mpt_dict()], ids=["llama", "mpt"])
def test_sequences_do_not_see_each_other(raw, tmp_path):
    save_folder(tmp_path, raw)
    model = Model.from_pretrained(tmp_path)
    sequences = random_sequences(97)
    together = our_logits(model, sequences)
    alone = torch.cat([our_logits(model, [ids]) for ids in sequences])
    assert (together - alone).abs().max() < 1e-5


class TinyAdapter:
    """Rank-2 updates with gradients on every linear layer: what trains on top of a frozen model."""

    def __init__(self, model: Model) -> None:
        generator = torch.Generator().manual_seed(1)
        self.pairs = {
            (a.layer_id, a.name): (
                torch.randn(2, a.linear.in_features, generator=generator).mul_(0.1).requires_grad_(),
                torch.randn(a.linear.out_features, 2, generator=generator).mul_(0.1).requires_grad_(),
            )
            for a in model.adaptable
        }

    def linear(self, x, linear, layer_id, name, batch):
        a, b = self.pairs[layer_id, name]
        return linear(x) + F.linear(F.linear(x, a), b)


@pytest.mark.parametrize("raw", [llama_dict(), mpt_dict(attn={"qk_ln": True})], ids=["llama", "mpt"])
def test_recomputed_layers_give_the_same_gradients(raw, tmp_path):
    save_folder(tmp_path, raw)
    model = Model.from_pretrained(tmp_path, inference=False)
    batch = Batch.packed(random_sequences(97))
    gradients = []
    for recompute_layers in (0, 1, 2):
        adapter = TinyAdapter(model)
        model.forward(batch, adapters=adapter, recompute_layers=recompute_layers).pow(2).sum().backward()
        gradients.append([p.grad for pair in adapter.pairs.values() for p in pair])
    for kept, *recomputed in zip(*gradients, strict=True):
        assert kept is not None and kept.abs().max() > 0
        for gradient in recomputed:
            torch.testing.assert_close(kept, gradient)


def test_gradients_agree_with_finite_differences(tmp_path):
    save_folder(tmp_path, llama_dict(num_hidden_layers=1))
    model = Model.from_pretrained(tmp_path, dtype=torch.float64, inference=False)
    batch = Batch.packed(random_sequences(97, (3, 5)))
    adapter = TinyAdapter(model)
    adapter.pairs = {k: (a.detach().double(), b.detach().double()) for k, (a, b) in adapter.pairs.items()}
    key = (0, "qkv")
    start = adapter.pairs[key][0].clone()

    def loss(a: torch.Tensor) -> torch.Tensor:
        adapter.pairs[key] = (a, adapter.pairs[key][1])
        return model.forward(batch, adapters=adapter).pow(2).sum()

    a = start.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(a), a)
    direction = torch.randn(start.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    step = 1e-5
    slope = (loss(start + step * direction) - loss(start - step * direction)) / (2 * step)
    assert (gradient * direction).sum().item() == pytest.approx(slope.item(), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_fp32(dtype, tmp_path):
    save_folder(tmp_path, llama_dict())
    sequences = random_sequences(97)
    exact = our_logits(Model.from_pretrained(tmp_path), sequences)
    rough = our_logits(Model.from_pretrained(tmp_path, dtype=dtype), sequences).float()
    assert rough.isfinite().all()
    error = (rough - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert error.max() < 16 * torch.finfo(dtype).eps


def test_packed_bf16_weights_give_the_plain_result():
    config = ModelConfig("llama", 97, 64, 96, 2, 4)
    packed = Model.random(config, 0, dtype=torch.bfloat16, inference=True, std=0.1)
    plain = Model.random(config, 0, dtype=torch.bfloat16, inference=False, std=0.1)
    sequences = random_sequences(97, (1, 7))
    a, b = our_logits(packed, sequences).float(), our_logits(plain, sequences).float()
    assert ((a - b).norm(dim=-1) / b.norm(dim=-1)).max() < 16 * torch.finfo(torch.bfloat16).eps


def test_replaced_weights_take_effect_after_packing():
    model = Model.random(ModelConfig("llama", 97, 64, 96, 2, 4), 0, dtype=torch.bfloat16)
    ids = random_sequences(97, (5,))
    our_logits(model, ids)
    linear = model.adaptable[0].linear
    linear.replace(linear.weight * 0, linear.bias)
    x = torch.ones(3, linear.in_features, dtype=torch.bfloat16)
    with torch.no_grad():
        assert linear(x).abs().max() == 0


def test_parts_of_fused_linears_are_the_checkpoints_own(tmp_path):
    for raw in (llama_dict(attention_bias=True), mpt_dict(no_bias=False), MPT_OPTIONS["unfused"]):
        folder = save_folder(tmp_path / raw["model_type"] / str(id(raw)), raw)
        config, tensors = open_checkpoint(folder)
        model = Model(config, tensors)
        written = dict(model.tensors())
        assert set(written) == set(tensors)
        assert all(torch.equal(written[name], tensors[name]) for name in tensors)
        for adapted in model.adaptable:
            for part in adapted.parts:
                assert torch.equal(adapted.linear.weight[part.start : part.stop], tensors[part.path + ".weight"])


def test_tuned_modules_have_the_names_that_peft_uses(tmp_path):
    save_folder(tmp_path, llama_dict())
    paths = {part.path for a in Model.from_pretrained(tmp_path).adaptable for part in a.parts}
    theirs = save_transformers("Llama", tmp_path / "theirs", **LLAMA)
    names = {name for name, module in theirs.named_modules() if isinstance(module, torch.nn.Linear)}
    assert paths == names - {"lm_head"}


PROMPTS = (
    "The capital of France is", "def fibonacci(n):\n", "Once upon a time",
    "The patient presented with fever and", "1, 2, 3, 5, 8,", "Water boils at", "The mitochondrion is",
    "Dear Sir or Madam,", "SELECT name FROM", "Q: Who wrote Hamlet?\nA:", "Aspirin inhibits", "In 1969, humans",
    "The opposite of hot is", "import numpy as np\n", "Symptoms of influenza include", "Le chat",
)  # fmt: skip


@pytest.fixture(scope="module")
def smollm2_pair(smollm2: Path):
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32).eval()
    return Model.from_pretrained(smollm2), theirs


def test_smollm2_logits_equal_transformers(smollm2_pair):
    ours, theirs = smollm2_pair
    sequences = random_sequences(49152, (1, 100, 57))
    assert (our_logits(ours, sequences) - their_logits(theirs, sequences)).abs().max() < 1e-3


def test_smollm2_greedy_continuations_equal_transformers(smollm2_pair, smollm2):
    """16 prompts together in a paged cache, 48 tokens each; transformers takes one sequence at a time, uncached."""
    from specialize.engine.tokenizer import Tokenizer

    ours, theirs = smollm2_pair
    prompts = [Tokenizer.from_pretrained(smollm2).encode(text) for text in PROMPTS]
    pages = Pages(ours, 16, 80, page_size=16)
    chunks = [(s, 0, ids) for s, ids in enumerate(prompts)]
    produced: list[list[int]] = [[] for _ in prompts]
    for _ in range(48):
        with torch.inference_mode():
            hidden = ours.forward(pages.batch(chunks), pages)
            last = torch.tensor([len(tokens) for *_, tokens in chunks]).cumsum(0) - 1
            tokens = ours.logits(hidden[last]).argmax(-1).tolist()
        for ids, token in zip(produced, tokens, strict=True):
            ids.append(token)
        chunks = [(s, len(prompts[s]) + len(produced[s]) - 1, [produced[s][-1]]) for s in range(16)]
    for prompt, ids in zip(prompts, produced, strict=True):
        # Greedy means: each token is the most likely one after those before it. One pass over the result checks all 48.
        with torch.inference_mode():
            choices = theirs(torch.tensor([prompt + ids])).logits[0].argmax(-1)
        assert choices[len(prompt) - 1 : -1].tolist() == ids
