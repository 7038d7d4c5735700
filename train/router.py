"""The router of a mixture of experts as what a run trains: [N, C] numbers, the experts and the base being frozen.

The loss is the language model's on the pooled rows, and reaches the router through the weights of the experts that it
chose, nothing else (Kang et al., "Self-MoE", 2024). There is no
balancing term: rows of every domain are in the mix, and an expert that no domain needs may stay idle.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..engine.adapter_format import MIXTURE_FILE
from ..engine.mixture import mix, save_mixture
from ..engine.routing import Mixture, MixtureAdapters
from .parameters import ParameterGroup, Trainable, aligned

INITIAL_STD = 0.02


class TrainableRouter(Trainable):
    """Trains the router of ``mixture``, from small random numbers; `save` writes the mixture's folder."""

    def __init__(self, model: Any, mixture: Mixture, *, seed: int = 0) -> None:
        self.model, self.mixture, self.training = model, mixture, True
        size = mixture.router.numel()
        generator = torch.Generator().manual_seed(seed)
        self.flat = torch.zeros(aligned(size), dtype=torch.float32, device=model.device)
        self.flat[:size].copy_(torch.randn(size, generator=generator) * INITIAL_STD)
        self.gradient = torch.zeros_like(self.flat)
        self.groups = (ParameterGroup(0, len(self.flat)),)
        self._leaf = self.flat[:size].view(mixture.router.shape).requires_grad_()
        self._adapters = MixtureAdapters(mixture, model, self._leaf)
        self.identity = mixture.fingerprint.hex()

    @property
    def num_parameters(self) -> int:
        return self._leaf.numel()

    @property
    def adapters(self) -> MixtureAdapters:
        return self._adapters

    @property
    def result(self) -> Mixture:
        """The mixture with the present router."""
        return mix(self.mixture.experts, self.mixture.names, self._leaf, self.mixture.top_k)

    def refresh(self) -> None:
        """Nothing to do: the router is multiplied in fp32, as it is kept."""

    @torch.no_grad()
    def collect(self) -> None:
        if self._leaf.grad is not None:
            self.gradient[: self._leaf.numel()] += self._leaf.grad.reshape(-1)
            self._leaf.grad = None

    def set_dropout_seed(self, seed: int) -> None:
        """Nothing to do: frozen experts drop nothing."""

    def state(self) -> dict[str, torch.Tensor]:
        return {}

    def load_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Nothing to do: the flat tensor is all there is."""

    def save(self, path: str | Path, *, base_model: str | None = None, source: str | Path | None = None) -> Path:
        return save_mixture(path, self.result, self.model, base_model=base_model)

    def is_saved(self, path: Path) -> bool:
        return (path / MIXTURE_FILE).exists()

    def close(self) -> None:
        """Nothing to do: the leaf is the router's own."""
