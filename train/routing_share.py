"""Which expert of a mixture serves which token, counted while a model runs."""

from __future__ import annotations

from typing import Any

import torch

from ..engine.batch import Batch
from ..engine.model import Model
from ..engine.routing import Mixture, MixtureAdapters, Routed


class RoutingCounter(MixtureAdapters):
    """Serves as the mixture does and keeps count, over all forward passes that it is given to.

    Each token is routed in two half-blocks of every layer, in the order in which they run.
    """

    def __init__(self, mixture: Mixture, model: Model) -> None:
        super().__init__(mixture, model)
        self._num_halves = 2 * model.config.num_layers
        num_experts = len(mixture.experts)
        self._chosen = torch.zeros(self._num_halves, num_experts, dtype=torch.float64)
        self._weight = torch.zeros(self._num_halves, num_experts, dtype=torch.float64)
        self._half = self._tokens = 0
        self._of_tokens: list[torch.Tensor] = []

    def routed(self, hidden: torch.Tensor, batch: Batch) -> Routed:
        found = super().routed(hidden, batch)
        weights = found.weights.detach().double().cpu()
        self._chosen[self._half] += (weights > 0).sum(0)
        self._weight[self._half] += weights.sum(0)
        self._tokens += len(weights)
        self._of_tokens.append(weights)
        self._half = (self._half + 1) % self._num_halves
        return found

    def take_tokens(self) -> torch.Tensor:
        """f64 [T, N]: each token's mean weights in the last forward pass; forgets them."""
        weights, self._of_tokens = torch.stack(self._of_tokens).mean(0), []
        return weights

    def shares(self) -> dict[str, Any]:
        """``chosen``: the share of choices that fell on each expert (they sum to 1); ``weight``: its mean weight;
        ``by_layer``: the same of ``chosen``, layer by layer; ``tokens`` counted."""
        total = max(1.0, float(self._chosen.sum()))
        layers = self._chosen.view(-1, 2, self._chosen.shape[1]).sum(1)
        return {
            "tokens": self._tokens // self._num_halves,
            "chosen": [round(x, 4) for x in (self._chosen.sum(0) / total).tolist()],
            "weight": [round(x, 4) for x in (self._weight.sum(0) / max(1, self._tokens)).tolist()],
            "by_layer": [[round(x, 4) for x in row] for row in (layers / layers.sum(1, keepdim=True)).tolist()],
        }
