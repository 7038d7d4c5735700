"""Which tensors a checkpoint of a given config holds, under which names, and which of them we fuse into one matrix.

Names are those of Hugging Face checkpoints; readers of other formats translate into them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .config import ModelConfig

EMBEDDING, POSITIONS, FINAL_NORM, HEAD = "embedding", "positions", "final_norm", "head"
_TOP = {
    "mpt": {
        EMBEDDING: "transformer.wte",
        POSITIONS: "transformer.wpe",
        FINAL_NORM: "transformer.norm_f",
        HEAD: "lm_head",
    },
    "llama": {EMBEDDING: "model.embed_tokens", FINAL_NORM: "model.norm", HEAD: "lm_head"},
}


@dataclass(frozen=True)
class LinearPart:
    """Rows ``start:stop`` of a fused matrix, and the module of the checkpoint that they come from."""

    name: str
    start: int
    stop: int
    path: str


@dataclass(frozen=True)
class FusedLinear:
    """One matrix of ours, ``[out_features, in_features]``, made of a checkpoint's matrices stacked along their rows."""

    name: str
    in_features: int
    parts: tuple[LinearPart, ...]
    has_bias: bool

    @property
    def out_features(self) -> int:
        return self.parts[-1].stop


def top_path(config: ModelConfig, what: str) -> str:
    """Module path of the embedding, learned positions, final norm or output projection."""
    return _TOP["mpt" if config.architecture == "mpt" else "llama"][what]


def layer_linears(config: ModelConfig, layer_id: int) -> tuple[FusedLinear, ...]:
    """The linear layers of one block in the order in which they run."""
    c, mpt = config, config.architecture == "mpt"
    prefix = f"transformer.blocks.{layer_id}." if mpt else f"model.layers.{layer_id}."
    attn, mlp = (prefix + "attn.", prefix + "ffn.") if mpt else (prefix + "self_attn.", prefix + "mlp.")
    heads = ((c.num_heads, "q"), (c.num_kv_heads, "k"), (c.num_kv_heads, "v"))
    if c.fused_qkv_checkpoint:
        qkv = [("Wqkv", c.qkv_size)]
    else:
        qkv = [((f"W{letter}" if mpt else f"{letter}_proj"), count * c.head_dim) for count, letter in heads]
    out_name = "out_proj" if mpt else "o_proj"
    up = [("up_proj", c.intermediate_size)]
    if c.mlp != "gelu":
        up.insert(0, ("gate_proj", c.intermediate_size))
    return (
        FusedLinear("qkv", c.hidden_size, _parts(attn, qkv), c.qkv_bias),
        FusedLinear("o", c.num_heads * c.head_dim, _parts(attn, [(out_name, c.hidden_size)]), c.out_bias),
        FusedLinear("up" if c.mlp == "gelu" else "gate_up", c.hidden_size, _parts(mlp, up), c.mlp_bias),
        FusedLinear("down", c.intermediate_size, _parts(mlp, [("down_proj", c.hidden_size)]), c.mlp_bias),
    )


def _parts(prefix: str, sizes: list[tuple[str, int]]) -> tuple[LinearPart, ...]:
    parts, start = [], 0
    for name, size in sizes:
        parts.append(LinearPart(name, start, start + size, prefix + name))
        start += size
    return tuple(parts)


def layer_norms(config: ModelConfig, layer_id: int) -> dict[str, tuple[str, int]]:
    """The norms of one block: our name -> (module path, width)."""
    c = config
    if c.architecture == "mpt":
        prefix = f"transformer.blocks.{layer_id}."
        norms = {"attn_norm": (prefix + "norm_1", c.hidden_size), "mlp_norm": (prefix + "norm_2", c.hidden_size)}
        q_path, k_path = prefix + "attn.q_ln", prefix + "attn.k_ln"
    else:
        prefix = f"model.layers.{layer_id}."
        norms = {
            "attn_norm": (prefix + "input_layernorm", c.hidden_size),
            "mlp_norm": (prefix + "post_attention_layernorm", c.hidden_size),
        }
        q_path, k_path = prefix + "self_attn.q_norm", prefix + "self_attn.k_norm"
    if c.qk_norm is not None:
        full = c.qk_norm == "full"
        norms["q_norm"] = (q_path, c.num_heads * c.head_dim if full else c.head_dim)
        norms["k_norm"] = (k_path, c.num_kv_heads * c.head_dim if full else c.head_dim)
    return norms


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that a checkpoint of this config must hold."""
    return dict(_expected(config))


def _expected(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    c = config
    yield top_path(c, EMBEDDING) + ".weight", (c.vocab_size, c.hidden_size)
    if c.position == "learned":
        yield top_path(c, POSITIONS) + ".weight", (c.max_context, c.hidden_size)
    for layer_id in range(c.num_layers):
        for path, width in layer_norms(c, layer_id).values():
            yield path + ".weight", (width,)
            if c.norm_bias:
                yield path + ".bias", (width,)
        for fused in layer_linears(c, layer_id):
            for part in fused.parts:
                yield part.path + ".weight", (part.stop - part.start, fused.in_features)
                if fused.has_bias:
                    yield part.path + ".bias", (part.stop - part.start,)
    yield top_path(c, FINAL_NORM) + ".weight", (c.hidden_size,)
    if c.norm_bias:
        yield top_path(c, FINAL_NORM) + ".bias", (c.hidden_size,)
    if not c.tied_embeddings:
        yield top_path(c, HEAD) + ".weight", (c.vocab_size, c.hidden_size)


def num_parameters(config: ModelConfig) -> int:
    """Parameters of the whole model; times the bytes of a dtype it is what the weights will occupy."""
    total = 0
    for shape in expected_tensors(config).values():
        size = 1
        for n in shape:
            size *= n
        total += size
    return total
