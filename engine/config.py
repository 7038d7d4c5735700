"""What a decoder looks like: `ModelConfig`, read from a checkpoint's own config.json or GGUF metadata.

Every value that changes the computation is either understood or refused by name; nothing is guessed from a path.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specialize.errors import InputError, parse_json

PICKLES = (".bin", ".pt", ".pth", ".ckpt")  # suffixes of checkpoints that only `convert` reads
LLAMA_FAMILY = ("llama", "mistral", "qwen2", "qwen3")
ARCHITECTURES = ("mpt", *LLAMA_FAMILY)


# Far above every model there is, and low enough that a loop or a product over a stranger's numbers ends.
MAX_LAYERS, MAX_SIZE = 10_000, 2**31 - 1


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for longer contexts.

    ``kind`` is "linear", "llama3", "yarn", or "factors" (one divisor per frequency, as GGUF files carry them).
    """

    kind: str
    factor: float = 1.0
    original_max_context: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    frequency_factors: tuple[float, ...] = ()


@dataclass(frozen=True)
class ModelConfig:
    """One decoder-only transformer. Zero in ``num_kv_heads``, ``head_dim``, ``softmax_scale`` means "the usual value",
    which is filled in when the object is made."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int = 0
    head_dim: int = 0
    max_context: int = 2048
    norm: str = "rmsnorm"  # or "layernorm"
    norm_eps: float = 1e-5
    norm_bias: bool = False
    position: str = "rope"  # or "alibi", "learned", "none"
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    alibi_bias_max: float = 8.0
    mlp: str = "swiglu"  # or "gelu", "geglu"
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: str | None = None  # "head": over each head's D; "full": over all heads together
    clip_qkv: float | None = None
    softmax_scale: float = 0.0
    logit_scale: float = 1.0
    sliding_window: int | None = None  # a query sees the last `sliding_window` positions, its own among them
    full_attention_layers: tuple[int, ...] = ()  # layers that the window does not apply to
    fused_qkv_checkpoint: bool = False  # the checkpoint stores one Wqkv matrix (mpt)
    tied_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("num_heads", "num_kv_heads", "hidden_size", "head_dim"):
            if not _is_int(getattr(self, name)):
                raise InputError(f"model config: {name} is {shown(getattr(self, name))}; it must be a positive integer")
        fill = object.__setattr__
        fill(self, "num_kv_heads", self.num_kv_heads or self.num_heads)
        fill(self, "head_dim", self.head_dim or self.hidden_size // max(self.num_heads, 1))
        fill(self, "softmax_scale", self.softmax_scale or 1.0 / math.sqrt(max(self.head_dim, 1)))
        one_of("architecture", self.architecture, ARCHITECTURES)
        one_of("norm", self.norm, ("rmsnorm", "layernorm"))
        one_of("position", self.position, ("rope", "alibi", "learned", "none"))
        one_of("mlp", self.mlp, ("swiglu", "gelu", "geglu"))
        one_of("qk_norm", self.qk_norm, (None, "head", "full"))
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_context",
        ):
            value = getattr(self, name)
            limit = MAX_LAYERS if name == "num_layers" else MAX_SIZE
            if not _is_int(value) or not 1 <= value <= limit:
                raise InputError(f"model config: {name} is {shown(value)}; it must be an integer from 1 to {limit}")
        for name in ("norm_eps", "rope_theta", "alibi_bias_max", "softmax_scale", "logit_scale"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise InputError(f"model config: {name} is {shown(value)}; it must be a finite number")
        window = self.sliding_window
        if window is not None and not (_is_int(window) and 1 <= window <= MAX_SIZE):
            raise InputError(f"model config: sliding_window is {shown(window)}; it must be a positive integer")
        for value in (*self.eos_token_ids, *(() if self.bos_token_id is None else (self.bos_token_id,))):
            if not _is_int(value) or not 0 <= value <= MAX_SIZE:
                raise InputError(f"model config: {shown(value)} is no token id")
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                f"model config: {self.num_heads} query heads cannot share {self.num_kv_heads} key/value heads evenly"
            )
        if self.position == "rope" and self.head_dim % 2:
            raise InputError(f"model config: head_dim {self.head_dim} is odd; rotary positions need an even one")

    @property
    def qkv_size(self) -> int:
        """Rows of the fused query/key/value projection."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    def window(self, layer_id: int) -> int | None:
        """The sliding window of one layer, None where it sees everything."""
        return None if layer_id in self.full_attention_layers else self.sliding_window

    def to_dict(self) -> dict[str, Any]:
        """A Hugging Face config.json of this model, which `from_dict` reads back as the same config.

        Raises InputError for rope frequency factors, which that format cannot express.
        """
        from .hf_config import write_fields

        return write_fields(self)

    @staticmethod
    def from_folder(path: str | Path) -> ModelConfig:
        """Reads a Hugging Face folder: ``config.json``, and ``generation_config.json`` for further end-of-text ids."""
        folder = Path(path)
        if folder.suffix in PICKLES and folder.is_file():
            raise InputError(
                f"{folder}: a pickle, which may run code, is not read; `specialize convert {folder.parent} NEW` writes "
                "its folder anew, with the config.json beside it, as safetensors"
            )
        if not folder.is_dir():
            raise InputError(f"{folder}: no such model folder; give a folder with config.json, or a .gguf file")
        raw = read_json(folder / "config.json")
        generation = (
            read_json(folder / "generation_config.json") if (folder / "generation_config.json").exists() else {}
        )
        return ModelConfig.from_dict(raw, generation, source=str(folder / "config.json"))

    @staticmethod
    def from_dict(raw: Mapping[str, Any], generation: Mapping[str, Any] | None = None, *, source: str) -> ModelConfig:
        """Reads an already parsed config.json; ``source`` names it in errors."""
        architecture = raw.get("model_type")
        if architecture not in ARCHITECTURES:
            raise InputError(
                f"{source}: model_type {shown(architecture)} is not supported; allowed: {', '.join(ARCHITECTURES)}"
            )
        from .hf_config import read_fields

        try:
            fields = read_fields(raw, source)
        except InputError:
            raise
        except (TypeError, ValueError, ArithmeticError, AttributeError, LookupError) as error:
            raise InputError(f"{source}: a value has a wrong type or size ({error})") from None
        eos: list[int] = []
        for value in (raw.get("eos_token_id"), (generation or {}).get("eos_token_id")):
            eos += value if isinstance(value, list) else [] if value is None else [value]
        return ModelConfig(
            architecture=architecture,
            bos_token_id=raw.get("bos_token_id"),
            eos_token_ids=tuple(i for n, i in enumerate(eos) if i not in eos[:n]),
            **fields,
        )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; InputError where it is missing or is something else."""
    try:
        raw = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"{path}: no such file; a model folder needs config.json, tokenizer.json, *.safetensors"
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(raw, dict):
        raise InputError(f"{path}: holds a {type(raw).__name__}, not a JSON object")
    return raw


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def shown(value: Any) -> str:
    """A value from a file as a message can hold it."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def one_of(name: str, value: Any, allowed: tuple[Any, ...], source: str = "model config") -> None:
    if value not in allowed:
        raise InputError(f"{source}: {name} {shown(value)} is not supported; allowed: {', '.join(map(str, allowed))}")
