"""A base and an adapter written as one checkpoint, tensor by tensor: no model is built, and what is read is small."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from specialize.errors import InputError

from .adapter_format import SavedAdapter, load_modules
from .config import ModelConfig, read_json
from .convert import convert
from .digest import require_base
from .layout import layer_linears
from .quantize import quantization_of
from .weights import is_finite, open_checkpoint


def check_mergeable(source: str | Path) -> None:
    """Raises InputError where ``source`` is a folder of quantised weights."""
    config = Path(source) / "config.json"
    if config.is_file():
        stored = quantization_of(read_json(config), str(config))
        if stored is not None:
            raise InputError(f"{source}: its weights are {stored}; merge into the folder that it was made from")


def merge_checkpoint(
    source: str | Path,
    adapter: str | Path,
    target: str | Path,
    *,
    dtype: torch.dtype | None = None,
    on_tensor: Callable[[int, int], None] | None = None,
) -> Path:
    """Writes ``source`` (folder or ``.gguf`` file) with the PEFT folder ``adapter`` added as the new folder ``target``.

    W + s·B A, with DoRA's row lengths where there are some, is taken in fp32 and rounded once, to ``dtype`` or the
    source's. Raises InputError where the adapter belongs to another base, the base is quantised or the target exists.
    """
    check_mergeable(source)
    saved = load_modules(adapter)
    config, _ = open_checkpoint(source)
    require_fit(saved, config, adapter, source)

    def update(name: str, tensor: torch.Tensor) -> torch.Tensor:
        module = name.removesuffix(".weight")
        if module not in saved.parts or module == name:
            return tensor
        a, b = saved.parts[module]
        merged = torch.addmm(tensor.float(), b, a, alpha=saved.scaling)
        if module in saved.magnitudes:
            norms = torch.linalg.vector_norm(merged, dim=1).clamp(min=1e-12)
            merged *= (saved.magnitudes[module] / norms)[:, None]
        rounded = merged.to(dtype or tensor.dtype)
        if not is_finite(rounded):
            raise InputError(
                f"{adapter}: makes {name} of {source} infinite in {str(rounded.dtype).removeprefix('torch.')}; merge "
                "with --dtype bf16 or fp32, or keep the adapter beside the base"
            )
        return rounded

    return convert(source, target, dtype=dtype, update=update, on_tensor=on_tensor)


def require_fit(saved: SavedAdapter, config: ModelConfig, adapter: str | Path, source: str | Path) -> None:
    """Raises InputError unless every module of ``saved`` is one of the base ``source``, in its shape, and it was not
    trained on another."""
    shapes = {
        part.path: (fused.in_features, part.stop - part.start)
        for layer_id in range(config.num_layers)
        for fused in layer_linears(config, layer_id)
        for part in fused.parts
    }
    for module, (a, b) in saved.parts.items():
        if (a.shape[1], b.shape[0]) != shapes.get(module):
            raise InputError(
                f"{adapter}: adapts {module} with A {tuple(a.shape)} and B {tuple(b.shape)}, which {source} "
                f"{'has in another shape' if module in shapes else 'lacks'}; it belongs to another base"
            )
    require_base(saved.base, adapter, source)
