"""A mixture of experts over one base: which expert serves which token, and the update that comes of it.

    y = W x + Σᵢ αᵢ(h)·sᵢ Bᵢ Aᵢ x        α(h) = the k largest of softmax(Wᵣ h), the others 0

One router Wᵣ [N, C] serves all layers. A block has two halves, and h is the hidden state that a half reads, after its
norm: one routing of a token for qkv and o, one for the MLP's linears, whatever the width of their inputs. The chosen
weights are not divided by their sum: with one expert chosen its weight is its probability, which is what lets the loss
reach the router. Source: Kang et al., "Self-MoE" (2024), equation of MiXSE; it leaves open what the router reads where
a linear's input is not as wide as the model, and the halves are our answer.

Shapes: hidden [T, C], weights f32 [T, N] (N experts of all mixtures), R the sum of the experts' ranks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F

from .batch import Batch
from .linear import Linear

if TYPE_CHECKING:
    from .adapter import Adapter
    from .model import Model


@dataclass(frozen=True)
class Mixture:
    """Experts, their ``names``, the router f32 [N, C] and how many experts a token gets. ``base_model`` is a name."""

    experts: tuple[Adapter, ...]
    names: tuple[str, ...]
    router: torch.Tensor
    top_k: int
    base_model: str | None
    fingerprint: bytes


class RoutedAdapters(ABC):
    """Adapters that look at the hidden state of each token before they serve the linears that read it."""

    @abstractmethod
    def routed(self, hidden: torch.Tensor, batch: Batch) -> Any:
        """What serves the linears of the half-block that reads ``hidden`` [T, C]: a `Routed`, or the adapters
        themselves where no token has a choice."""


class _Weighted(Protocol):
    def linear(
        self,
        x: torch.Tensor,
        linear: Linear,
        layer_id: int,
        name: str,
        batch: Batch,
        weights: torch.Tensor | None = None,
    ) -> torch.Tensor: ...


@dataclass(frozen=True)
class Routed:
    """Adapters with the weights [T, N] of a half-block's tokens."""

    adapters: _Weighted
    weights: torch.Tensor

    def linear(self, x: torch.Tensor, linear: Linear, layer_id: int, name: str, batch: Batch) -> torch.Tensor:
        return self.adapters.linear(x, linear, layer_id, name, batch, self.weights)

    def take(self, rows: torch.Tensor) -> Routed:
        """The same for some of the tokens."""
        return Routed(self.adapters, self.weights.index_select(0, rows))


def routing_weights(hidden: torch.Tensor, router: torch.Tensor, top_k: int) -> torch.Tensor:
    """α [T, N] of hidden [T, C], in the router's dtype; differentiable in both."""
    probabilities = F.linear(hidden.to(router.dtype), router).softmax(-1)
    if top_k >= len(router):
        return probabilities
    values, chosen = probabilities.topk(top_k, dim=-1)
    return torch.zeros_like(probabilities).scatter(-1, chosen, values)


class ExpertStack:
    """The experts of some mixtures on the model's device, stacked along the rank: two thin products serve all, with
    the tokens' weights between them. An expert that a token did not choose is multiplied by 0, not left out: for a few
    experts of small rank this is cheaper than sorting tokens."""

    def __init__(
        self, mixtures: Sequence[Mixture], model: Model, routers: Sequence[torch.Tensor] | None = None
    ) -> None:
        """``routers`` stand in for the mixtures' own, such as one that is being trained."""
        self._mixtures = mixtures
        if routers is None:
            routers = [mixture.router.to(model.device) for mixture in mixtures]
        self._routers = routers
        experts = [expert for mixture in mixtures for expert in mixture.experts]
        place: dict[str, Any] = {"dtype": model.dtype, "device": model.device}
        self._matrices: dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        for adapted in model.adaptable:
            key = (adapted.layer_id, adapted.name)
            found = [(i, e.scaling, *e.matrices[key]) for i, e in enumerate(experts) if key in e.matrices]
            if found:
                a = torch.cat([a for _, _, a, _ in found])
                b = torch.cat([b * scaling for _, scaling, _, b in found], dim=1)
                owners = torch.tensor([i for i, _, a, _ in found for _ in range(len(a))], device=model.device)
                self._matrices[key] = (a.to(**place), b.to(**place), owners)

    def weights(self, hidden: torch.Tensor, chosen: Sequence[torch.Tensor] | None = None) -> torch.Tensor:
        """α [T, N]; with ``chosen``, a mask [T] per mixture, 0 for tokens that another one serves, or none."""
        found = []
        for number, (mixture, router) in enumerate(zip(self._mixtures, self._routers, strict=True)):
            weights = routing_weights(hidden, router, mixture.top_k)
            found.append(weights if chosen is None else weights * chosen[number][:, None])
        return found[0] if len(found) == 1 else torch.cat(found, dim=1)

    def add(self, y: torch.Tensor, x: torch.Tensor, key: tuple[int, str], weights: torch.Tensor) -> torch.Tensor:
        """y [T, out] plus the experts' updates of x [T, in]; y itself may be changed where no gradient is wanted."""
        found = self._matrices.get(key)
        if found is None:
            return y
        a, b, owners = found
        hidden = F.linear(x, a) * weights.to(x.dtype).index_select(1, owners)
        return torch.addmm(y, hidden, b.t()) if torch.is_grad_enabled() else y.addmm_(hidden, b.t())


class MixtureAdapters(RoutedAdapters):
    """One mixture for every sequence of the batch."""

    def __init__(self, mixture: Mixture, model: Model, router: torch.Tensor | None = None) -> None:
        self.mixture = mixture
        self._stack = ExpertStack([mixture], model, None if router is None else [router])

    def routed(self, hidden: torch.Tensor, batch: Batch) -> Routed:
        return Routed(self, self._stack.weights(hidden))

    def linear(
        self,
        x: torch.Tensor,
        linear: Linear,
        layer_id: int,
        name: str,
        batch: Batch,
        weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        assert weights is not None, "the linears of a mixture are reached through `routed`"
        return self._stack.add(linear(x), x, (layer_id, name), weights)
