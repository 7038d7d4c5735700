"""The words of Hugging Face config.json files for what `ModelConfig` holds, read and written: llama family and mpt."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from specialize.errors import InputError

from .config import MAX_LAYERS, ModelConfig, RopeScaling, one_of, shown


def read_fields(raw: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Arguments of `ModelConfig` from a parsed config.json of a supported model_type; ``source`` names it in errors."""
    return _mpt_fields(raw, source) if raw["model_type"] == "mpt" else _llama_fields(raw, source)


def write_fields(config: ModelConfig) -> dict[str, Any]:
    """A config.json that `read_fields` reads back as the same config."""
    return _mpt_dict(config) if config.architecture == "mpt" else _llama_dict(config)


def _need(raw: Mapping[str, Any], source: str, *names: str) -> Any:
    for name in names:
        if raw.get(name) is not None:
            return raw[name]
    raise InputError(f"{source}: {names[0]} is missing")


def _layers(raw: Mapping[str, Any], source: str, *names: str) -> int:
    value = _need(raw, source, *names)
    if type(value) is not int or not 1 <= value <= MAX_LAYERS:
        raise InputError(
            f"{source}: {names[0]} (num_layers) is {shown(value)}; it must be an integer from 1 to {MAX_LAYERS}"
        )
    return value


def _known_keys(raw: Mapping[str, Any], known: set[str], what: str, source: str) -> None:
    surplus = sorted(k for k in raw if k not in known and not k.startswith("_"))
    if surplus:
        raise InputError(f"{source}: {what} has unknown keys: {', '.join(surplus)}")


def _llama_fields(raw: Mapping[str, Any], source: str) -> dict[str, Any]:
    kind = raw["model_type"]
    one_of("hidden_act", raw.get("hidden_act", "silu"), ("silu", "swish"), source)
    num_layers = _layers(raw, source, "num_hidden_layers")
    num_heads = _need(raw, source, "num_attention_heads")
    hidden_size = _need(raw, source, "hidden_size")
    max_context = _need(raw, source, "max_position_embeddings")
    attention_bias = bool(raw.get("attention_bias", False))
    if raw.get("pretraining_tp", 1) not in (None, 1) and kind == "llama":
        one_of("pretraining_tp", raw["pretraining_tp"], (1,), source)
    theta, scaling = _rope(raw, source, max_context)
    window, full_layers = _windows(raw, kind, num_layers, source)
    return {
        "vocab_size": _need(raw, source, "vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": _need(raw, source, "intermediate_size"),
        "num_layers": num_layers,
        "num_heads": num_heads,
        "num_kv_heads": raw.get("num_key_value_heads") or num_heads,
        "head_dim": raw.get("head_dim") or (128 if kind == "qwen3" else hidden_size // num_heads),
        "max_context": max_context,
        "norm_eps": raw.get("rms_norm_eps", 1e-6),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "qkv_bias": kind == "qwen2" or attention_bias,
        "out_bias": kind != "qwen2" and attention_bias,
        "mlp_bias": bool(raw.get("mlp_bias", False)),
        "qk_norm": "head" if kind == "qwen3" else None,
        "sliding_window": window,
        "full_attention_layers": full_layers,
        "tied_embeddings": bool(raw.get("tie_word_embeddings", False)),
    }


def _windows(raw: Mapping[str, Any], kind: str, num_layers: int, source: str) -> tuple[int | None, tuple[int, ...]]:
    """Mistral applies its window everywhere; qwen2/3 from layer max_window_layers on, or as layer_types says."""
    window = raw.get("sliding_window")
    if kind == "llama" or window is None:
        return None, ()
    if kind == "mistral":
        return window, ()
    if not raw.get("use_sliding_window", False):
        return None, ()
    layer_types = raw.get("layer_types")
    if layer_types is None:
        first = raw.get("max_window_layers", 28)
        layer_types = ["sliding_attention" if i >= first else "full_attention" for i in range(num_layers)]
    if len(layer_types) != num_layers:
        raise InputError(f"{source}: layer_types names {len(layer_types)} layers, num_hidden_layers says {num_layers}")
    for value in layer_types:
        one_of("layer_types entry", value, ("sliding_attention", "full_attention"), source)
    full = tuple(i for i, value in enumerate(layer_types) if value == "full_attention")
    return (None, ()) if len(full) == num_layers else (window, full)


_ROPE_KEYS = {
    "rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "low_freq_factor",
    "high_freq_factor", "beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim",
    "partial_rotary_factor",
}  # fmt: skip


def _rope(raw: Mapping[str, Any], source: str, max_context: int) -> tuple[float, RopeScaling | None]:
    """``rope_parameters`` (newer checkpoints) or ``rope_theta`` with ``rope_scaling``."""
    rope: dict[str, Any] = dict(raw.get("rope_scaling") or {})
    rope.update(raw.get("rope_parameters") or {})
    _known_keys(rope, _ROPE_KEYS, "rope scaling", source)
    theta = float(rope.get("rope_theta") or raw.get("rope_theta") or 10000.0)
    partial = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    one_of("partial_rotary_factor", 1.0 if partial is None else float(partial), (1.0,), source)
    kind = rope.get("rope_type", rope.get("type", "default"))
    one_of("rope_type", kind, ("default", "linear", "llama3", "yarn"), source)
    if kind == "default":
        return theta, None
    original = int(rope.get("original_max_position_embeddings") or max_context)
    factor = rope.get("factor")
    if factor is None and kind == "yarn":
        factor = max_context / original
    if factor is None:
        raise InputError(f"{source}: rope scaling {kind!r} lacks its factor")
    attention_factor = 1.0
    if kind == "yarn":
        attention_factor = rope.get("attention_factor")
        if attention_factor is None:
            attention_factor = yarn_attention_factor(factor, rope.get("mscale"), rope.get("mscale_all_dim"))
    return theta, RopeScaling(
        kind,
        factor=float(factor),
        original_max_context=original,
        low_freq_factor=float(rope.get("low_freq_factor", 1.0)),
        high_freq_factor=float(rope.get("high_freq_factor", 4.0)),
        beta_fast=float(rope.get("beta_fast") or 32.0),
        beta_slow=float(rope.get("beta_slow") or 1.0),
        truncate=bool(rope.get("truncate", True)),
        attention_factor=float(attention_factor),
    )


def yarn_attention_factor(factor: float, mscale: float | None = None, mscale_all_dim: float | None = None) -> float:
    """YaRN (arXiv 2309.00071) scales cos and sin by 0.1 ln(factor) + 1; two ``mscale`` values give a ratio."""

    def magnitude(m: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0

    if mscale and mscale_all_dim:
        return magnitude(mscale) / magnitude(mscale_all_dim)
    return magnitude(1.0)


_MPT_ATTN_KEYS = {
    "attn_type", "attn_pdrop", "attn_impl", "clip_qkv", "softmax_scale", "prefix_lm", "qk_ln", "qk_gn",
    "attn_uses_sequence_id", "alibi", "alibi_bias_max", "kv_n_heads", "rope", "rope_theta", "rope_impl",
    "rope_dail_config", "rope_hf_config", "sliding_window_size", "fused_qkv", "model_type", "verbose",
    "head_dim", "attn_logit_softcapping", "kv_dim", "nope", "reuse_kv_layer_idx", "reuse_kv_x_layer_idx",
    "attn_temperature_tuning", "transformers_version", "dtype", "torch_dtype", "return_dict", "output_attentions",
    "output_hidden_states", "architectures", "chunk_size_feed_forward", "id2label", "label2id", "is_encoder_decoder",
    "problem_type",
}  # fmt: skip


def _mpt_fields(raw: Mapping[str, Any], source: str) -> dict[str, Any]:
    attn = raw.get("attn_config") or {}
    _known_keys(attn, _MPT_ATTN_KEYS, "attn_config", source)
    d_model = _need(raw, source, "d_model", "hidden_size")
    num_heads = _need(raw, source, "n_heads", "num_attention_heads")
    num_layers = _layers(raw, source, "n_layers", "num_hidden_layers")
    max_context = raw.get("max_seq_len", 2048)
    attn_type = attn.get("attn_type", "multihead_attention")
    one_of("attn_type", attn_type, ("multihead_attention", "multiquery_attention", "grouped_query_attention"), source)
    kv_heads = {"multihead_attention": num_heads, "multiquery_attention": 1}.get(attn_type) or attn.get("kv_n_heads")
    if not kv_heads:
        raise InputError(f"{source}: attn_type 'grouped_query_attention' needs kv_n_heads")
    for key in (
        "prefix_lm",
        "attn_logit_softcapping",
        "kv_dim",
        "nope",
        "reuse_kv_layer_idx",
        "attn_temperature_tuning",
    ):
        if attn.get(key):
            raise InputError(f"{source}: attn_config.{key} {attn[key]!r} is not supported; it must be off")
    for key in ("block_overrides", "final_logit_softcapping"):
        if raw.get(key):
            raise InputError(f"{source}: {key} {raw[key]!r} is not supported; it must be off")
    norm_type = str(raw.get("norm_type", "low_precision_layernorm")).lower()
    one_of("norm_type", norm_type.removeprefix("low_precision_"), ("layernorm", "rmsnorm"), source)
    norm = norm_type.removeprefix("low_precision_")
    no_bias = bool(raw.get("no_bias", True))
    alibi, rope = bool(attn.get("alibi", "rope" not in attn)), bool(attn.get("rope", False))
    if alibi and rope:
        raise InputError(f"{source}: attn_config has both alibi and rope; one of them must be off")
    # ALiBi and RoPE each switch the learned positions off, whatever learned_pos_emb says.
    position = "alibi" if alibi else "rope" if rope else "learned" if raw.get("learned_pos_emb", True) else "none"
    theta, scaling = _mpt_rope(attn, source) if rope else (10000.0, None)
    if attn.get("qk_ln") and attn.get("qk_gn"):
        raise InputError(f"{source}: attn_config has both qk_ln and qk_gn; one of them must be off")
    window = attn.get("sliding_window_size", -1)
    head_dim = attn.get("head_dim") or d_model // num_heads
    mlp, intermediate_size = _mpt_mlp(raw, d_model, source)
    return {
        "vocab_size": _need(raw, source, "vocab_size"),
        "hidden_size": d_model,
        "intermediate_size": intermediate_size,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "max_context": max_context,
        "norm": norm,
        "norm_eps": raw.get("layer_norm_epsilon", 1e-5),
        "norm_bias": norm == "layernorm" and not no_bias,
        "position": position,
        "rope_theta": theta,
        "rope_scaling": scaling,
        "alibi_bias_max": float(attn.get("alibi_bias_max", 8)),
        "mlp": mlp,
        "qkv_bias": not no_bias,
        "out_bias": not no_bias,
        "mlp_bias": not no_bias,
        "qk_norm": "full" if attn.get("qk_ln") else "head" if attn.get("qk_gn") else None,
        "clip_qkv": float(attn["clip_qkv"]) if attn.get("clip_qkv") else None,
        "softmax_scale": float(attn.get("softmax_scale") or 0.0) or 1.0 / math.sqrt(head_dim),
        "logit_scale": _mpt_logit_scale(raw.get("logit_scale"), d_model, source),
        "sliding_window": window if window and window > 0 else None,
        "fused_qkv_checkpoint": bool(attn.get("fused_qkv", True)),
        "tied_embeddings": bool(raw.get("tie_word_embeddings", True)),
    }


def _mpt_logit_scale(value: Any, d_model: int, source: str) -> float:
    if value is None:
        return 1.0
    if value == "inv_sqrt_d_model":
        return 1.0 / math.sqrt(d_model)
    if isinstance(value, int | float) and not isinstance(value, bool) and value != 0:
        return float(value)
    raise InputError(f"{source}: logit_scale {value!r} is not supported; allowed: a number, 'inv_sqrt_d_model', null")


def _mpt_mlp(raw: Mapping[str, Any], d_model: int, source: str) -> tuple[str, int]:
    ffn = raw.get("ffn_config") or {}
    _known_keys(ffn, {"ffn_type", "ffn_hidden_size", "ffn_act_fn", "fc_type"}, "ffn_config", source)
    ffn_type = ffn.get("ffn_type", "mptmlp")
    one_of("ffn_type", ffn_type, ("mptmlp", "mptglu"), source)
    act = ffn.get("ffn_act_fn") or {}
    one_of("ffn_act_fn", act.get("name", "gelu"), ("gelu",), source)
    one_of("ffn_act_fn.approximate", act.get("approximate", "none"), ("none",), source)
    size = ffn.get("ffn_hidden_size") or int(d_model * raw.get("expansion_ratio", 4))
    return ("geglu" if ffn_type == "mptglu" else "gelu"), size


def _mpt_rope(attn: Mapping[str, Any], source: str) -> tuple[float, RopeScaling | None]:
    theta = float(attn.get("rope_theta", 10000))
    impl = attn.get("rope_impl", "dail")
    one_of("rope_impl", impl, ("dail", "hf"), source)
    if impl == "dail":
        one_of(
            "rope_dail_config.type", (attn.get("rope_dail_config") or {}).get("type", "original"), ("original",), source
        )
        return theta, None
    hf = attn.get("rope_hf_config") or {}
    kind = hf.get("type", "no_scaling")
    one_of("rope_hf_config.type", kind, ("no_scaling", "linear"), source)
    return theta, (None if kind == "no_scaling" else RopeScaling("linear", factor=float(hf.get("factor", 1.0))))


def _tokens_dict(c: ModelConfig) -> dict[str, Any]:
    ids = list(c.eos_token_ids)
    return {"bos_token_id": c.bos_token_id, "eos_token_id": ids[0] if len(ids) == 1 else ids or None}


def _llama_dict(c: ModelConfig) -> dict[str, Any]:
    family = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[c.architecture]
    raw: dict[str, Any] = {
        "architectures": [family + "ForCausalLM"],
        "model_type": c.architecture,
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "max_position_embeddings": c.max_context,
        "hidden_act": "silu",
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,
        "attention_bias": c.qkv_bias and c.architecture != "qwen2",
        "mlp_bias": c.mlp_bias,
        "tie_word_embeddings": c.tied_embeddings,
        "sliding_window": c.sliding_window,
        **_tokens_dict(c),
    }
    if c.sliding_window is not None and c.architecture in ("qwen2", "qwen3"):
        types = [("full" if c.window(i) is None else "sliding") + "_attention" for i in range(c.num_layers)]
        raw |= {"use_sliding_window": True, "layer_types": types}
    s = c.rope_scaling
    if s is not None:
        if s.kind == "factors":
            raise InputError(
                "rope frequency factors of a GGUF file cannot be written to a config.json; use the file itself"
            )
        raw["rope_scaling"] = {"rope_type": s.kind, "factor": s.factor}
        if s.kind != "linear":
            raw["rope_scaling"]["original_max_position_embeddings"] = s.original_max_context
        if s.kind == "llama3":
            raw["rope_scaling"] |= {"low_freq_factor": s.low_freq_factor, "high_freq_factor": s.high_freq_factor}
        if s.kind == "yarn":
            names = ("beta_fast", "beta_slow", "truncate", "attention_factor")
            raw["rope_scaling"] |= {name: getattr(s, name) for name in names}
    return raw


def _mpt_dict(c: ModelConfig) -> dict[str, Any]:
    grouped = c.num_kv_heads != c.num_heads
    attn: dict[str, Any] = {
        "attn_type": "grouped_query_attention" if grouped else "multihead_attention",
        "alibi": c.position == "alibi",
        "alibi_bias_max": int(c.alibi_bias_max) if c.alibi_bias_max.is_integer() else c.alibi_bias_max,
        "clip_qkv": c.clip_qkv,
        "qk_ln": c.qk_norm == "full",
        "softmax_scale": c.softmax_scale,
    }
    extra: dict[str, Any] = {"kv_n_heads": c.num_kv_heads} if grouped else {}
    if c.qk_norm == "head":
        extra["qk_gn"] = True
    if not c.fused_qkv_checkpoint:
        extra["fused_qkv"] = False
    if c.head_dim * c.num_heads != c.hidden_size:
        extra["head_dim"] = c.head_dim
    if c.sliding_window:
        extra["sliding_window_size"] = c.sliding_window
    if c.position == "rope":
        extra |= {"rope": True, "rope_theta": c.rope_theta}
        if c.rope_scaling is not None:
            extra |= {"rope_impl": "hf", "rope_hf_config": {"type": "linear", "factor": c.rope_scaling.factor}}
    raw: dict[str, Any] = {
        "architectures": ["MptForCausalLM"],
        "model_type": "mpt",
        "vocab_size": c.vocab_size,
        "d_model": c.hidden_size,
        "n_layers": c.num_layers,
        "n_heads": c.num_heads,
        "max_seq_len": c.max_context,
        "layer_norm_epsilon": c.norm_eps,
        "norm_type": f"low_precision_{c.norm}",
        "no_bias": not c.qkv_bias,
        "learned_pos_emb": c.position == "learned",
        "logit_scale": None if c.logit_scale == 1.0 else c.logit_scale,
        "tie_word_embeddings": c.tied_embeddings,
        "attn_config": attn | extra,
        **_tokens_dict(c),
    }
    if c.intermediate_size % c.hidden_size == 0:
        raw["expansion_ratio"] = c.intermediate_size // c.hidden_size
    if c.mlp == "geglu" or c.intermediate_size % c.hidden_size:
        kind = "mptglu" if c.mlp == "geglu" else "mptmlp"
        raw["ffn_config"] = {"ffn_type": kind, "ffn_hidden_size": c.intermediate_size}
    return raw
