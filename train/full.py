"""Full fine-tuning: every weight of the model is a parameter, in the same loop.

The fp32 masters lie in one flat tensor, matrices first, then vectors (norms and biases, which do not decay). The
model's own tensors become views of a copy in its number format, in fp32 of the masters themselves: the model that was
given is the one that learns. It takes 16 to 20 bytes a parameter: for small models.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from specialize.errors import InputError

from ..engine.convert import save_model
from ..engine.staging import staging
from .parameters import ParameterGroup, Trainable, aligned


class FullParameters(Trainable):
    """All weights of ``model``; tied ones once. Raises InputError where some are quantised."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.training = True
        found = {id(tensor): (name, tensor) for name, tensor in _stored_tensors(model)}
        for name, tensor in found.values():
            if not isinstance(tensor, torch.Tensor):
                raise InputError(f"method full: {name} is quantised; load the model in fp32, bf16 or fp16, or use lora")
        # Sorting is stable: within matrices and vectors the order is the model's.
        self._leaves = sorted((tensor for _, tensor in found.values()), key=lambda tensor: tensor.dim() < 2)
        offsets, offset = [], 0
        for tensor in self._leaves:
            offsets.append(offset)
            offset = aligned(offset + tensor.numel())
        first_vector = next((o for o, t in zip(offsets, self._leaves, strict=True) if t.dim() < 2), offset)
        groups = (ParameterGroup(0, first_vector), ParameterGroup(first_vector, offset, decays=False))
        self.groups = tuple(group for group in groups if group.stop > group.start)
        self.flat = torch.zeros(offset, dtype=torch.float32, device=model.device)
        self.gradient = torch.zeros_like(self.flat)
        self._compute = self.flat if model.dtype == torch.float32 else torch.empty_like(self.flat, dtype=model.dtype)
        self._gradients = []
        for tensor, start in zip(self._leaves, offsets, strict=True):
            end = start + tensor.numel()
            self.flat[start:end].copy_(tensor.reshape(-1))
            tensor.data = self._compute[start:end].view(tensor.shape)
            tensor.requires_grad_()
            self._gradients.append(self.gradient[start:end].view(tensor.shape))
        for linear in [adapted.linear for adapted in model.adaptable] + [model.head]:
            linear.prepack = False  # packed copies would not follow the weights
            linear.replace(linear.weight, linear.bias)
        self.refresh()

    @property
    def num_parameters(self) -> int:
        return sum(tensor.numel() for tensor in self._leaves)

    @property
    def adapters(self) -> None:
        return None

    @torch.no_grad()
    def refresh(self) -> None:
        if self._compute is not self.flat:
            self._compute.copy_(self.flat)

    @torch.no_grad()
    def collect(self) -> None:
        for tensor, gradient in zip(self._leaves, self._gradients, strict=True):
            if tensor.grad is not None:
                gradient += tensor.grad
                tensor.grad = None

    def set_dropout_seed(self, seed: int) -> None:
        """Nothing to do: dropout belongs to adapters."""

    def state(self) -> dict[str, torch.Tensor]:
        return {}

    def load_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Nothing to do: the flat tensor is all there is."""

    def save(self, path: str | Path, *, base_model: str | None = None, source: str | Path | None = None) -> Path:
        """Writes a whole checkpoint, in the model's number format, into the folder."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        with staging(folder, "saving") as place:
            written = save_model(self.model, place / "model", source=source)
            for file in sorted(written.iterdir(), key=lambda file: file.name.startswith("model")):
                os.replace(file, folder / file.name)
        return folder

    def is_saved(self, path: Path) -> bool:
        return (path / "model.safetensors").exists() or (path / "model.safetensors.index.json").exists()

    def close(self) -> None:
        for tensor in self._leaves:
            tensor.requires_grad_(False)


def _stored_tensors(model: Any) -> Iterator[tuple[str, Any]]:
    """The tensors that the model holds, fused as they are."""
    yield "embedding", model.embedding
    if model.position_embedding is not None:
        yield "position_embedding", model.position_embedding
    norms = [(f"layer {layer.layer_id}", norm) for layer in model.layers
             for norm in (layer.attn_norm, layer.q_norm, layer.k_norm, layer.mlp_norm)]  # fmt: skip
    for name, norm in [*norms, ("final norm", model.final_norm)]:
        if norm is not None:
            yield f"{name} norm", norm.weight
            if norm.bias is not None:
                yield f"{name} norm bias", norm.bias
    linears = [(f"{adapted.name} of layer {adapted.layer_id}", adapted.linear) for adapted in model.adaptable]
    for name, linear in [*linears, ("output projection", model.head)]:
        yield name, linear.weight
        if linear.bias is not None:
            yield f"{name} bias", linear.bias
