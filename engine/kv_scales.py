"""Which type the KV cache holds, and the scales of 8-bit pages.

An 8-bit page holds k / k_scale and v / v_scale with a scale per layer and key/value head, since the kernels take one
per head. They come from one forward pass, at start-up, over a text that is part of this file, not over the first
prompts: so a model's scales, and with them its tokens, are the same in every run, in whatever order requests come.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from specialize.errors import InputError

from .batch import Batch
from .cache import KVCache
from .config import ModelConfig
from .model import Model

FLOAT_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
EIGHT_BIT = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
# The largest magnitude that a page can hold, over the largest one seen; more is cut off.
HEADROOM = 1.25
CALIBRATION_TOKENS = 512

# Prose, a dialogue, a list, code, numbers and names: what widens the range of keys and values differs between them.
CALIBRATION_TEXT = """The heart is a muscle that pumps blood through the body. When a valve leaks, some flows back.
Patients with a leak of the mitral valve are often short of breath on exertion, and a murmur is heard over the apex.

### Instruction:
Name three causes of fever in a child of 4 years, and say for each what speaks for it.

### Response:
1. Otitis media: ear pain, a red and bulging drum.
2. Urinary tract infection: pain on passing urine, leucocytes in the strip test.
3. Pneumonia: cough, fast breathing (> 40/min), an infiltrate on the X-ray.

"Where did you put the keys?" she asked. "On the table, I think - or were they in the blue coat?" He was not sure.

def area(width: float, height: float) -> float:
    if width < 0 or height < 0:
        raise ValueError(f"negative: {width} x {height}")
    return width * height

| year | patients | deaths | rate |
| 1998 | 12,408 | 317 | 2.55 % |
| 2004 | 15,961 | 289 | 1.81 % |

Le chat dort sur le canapé. Der Zug nach München fährt um 17:45 Uhr ab. See https://example.org/a?b=1&c=2 for more.
"""


def kv_dtype_of(name: str, model_dtype: torch.dtype, device: torch.device | str) -> torch.dtype:
    """The cache's type for `EngineConfig.kv_dtype`. Raises InputError for what the device or the model cannot do."""
    device = torch.device(device)
    own = next((n for n, dtype in FLOAT_DTYPES.items() if dtype == model_dtype), str(model_dtype))
    if name in ("auto", own):
        return model_dtype
    if name in FLOAT_DTYPES:
        raise InputError(f"kv-dtype {name} with a model in {own}; allowed: auto, {own}, {', '.join(EIGHT_BIT)}")
    if name == "fp8":
        if device.type != "cuda":
            raise InputError("kv-dtype fp8 needs a CUDA device of compute capability 8.9 or later; int8 runs on a CPU")
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 9):
            raise InputError(
                f"kv-dtype fp8 needs compute capability 8.9; {device} has {'.'.join(map(str, capability))}; use int8"
            )
    return EIGHT_BIT[name]


def calibration_ids(config: ModelConfig, encoded: Sequence[int] | None) -> list[int]:
    """What the scales are taken from: the text's tokens, or, without a tokenizer, ids spread over the vocabulary."""
    length = min(CALIBRATION_TOKENS, config.max_context)
    if encoded:
        return list(encoded)[:length]
    return [(7 + 7919 * i) % config.vocab_size for i in range(length)]


@torch.inference_mode()
def calibrate(model: Model, token_ids: Sequence[int], dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(k_scale, v_scale) f32 [K] of each layer for pages of ``dtype``: the range over ``token_ids``, with headroom."""
    count, device = len(token_ids), model.device
    page_size = 16
    num_pages = -(-count // page_size)
    seen = KVCache(model.config, num_pages, page_size, model.dtype, device)
    places = torch.arange(count, device=device)
    batch = Batch(
        token_ids=torch.tensor(list(token_ids), dtype=torch.int64, device=device),
        positions=places,
        query_starts=torch.tensor([0, count], dtype=torch.int32, device=device),
        context_lens=torch.tensor([count], dtype=torch.int32, device=device),
        max_query_len=count,
        max_context_len=count,
        slots=places,
        page_table=torch.arange(num_pages, dtype=torch.int32, device=device)[None],
    )
    model.forward(batch, seen)
    scales = []
    for layer_id in range(model.config.num_layers):
        k, v = (
            cache.flatten(0, 1)[:count].float().abs().amax(dim=(0, 2)).clamp(min=1e-6) * (HEADROOM / LARGEST[dtype])
            for cache in seen.layer(layer_id)[:2]
        )
        scales.append((k, v))
    return scales
