"""An anchor to the base: on texts that are no part of the task, the tuned model's next-token distributions shall stay
where the base's are.

The loss is the mean of KL(base ‖ tuned) over positions, as in knowledge distillation (Hinton et al., 2015) from the
model to its own tuned self (Li and Hoiem, 2016, call it learning without forgetting). Shape letters: N positions,
C channels, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from specialize.errors import InputError

from ..engine.batch import Batch


def anchor_loss(
    tuned: torch.Tensor, base: torch.Tensor, head: torch.Tensor, *, logit_scale: float = 1.0
) -> torch.Tensor:
    """Mean KL(base ‖ tuned), a scalar in fp32 (fp64 for fp64), from last hidden states [N, C] of both and the output
    projection [V, C]; differentiable in ``tuned``. Two tensors f32[N, V] are kept for the backward pass."""
    compute = torch.float64 if tuned.dtype == torch.float64 else torch.float32
    with torch.no_grad():
        wanted = ((base @ head.t()).to(compute) * logit_scale).log_softmax(-1)
    found = ((tuned @ head.t()).to(compute) * logit_scale).log_softmax(-1)
    return torch.nn.functional.kl_div(found, wanted, log_target=True, reduction="sum") / len(tuned)


class Anchor:
    """The anchor texts as token ids and what the base makes of them, computed when a text is first used."""

    def __init__(self, model: Any, texts: Sequence[Sequence[int]], *, tokens: int, seed: int) -> None:
        limit = min(tokens, model.config.max_context)
        self.texts = [list(ids)[:limit] for ids in texts if len(ids)]
        if not self.texts:
            raise InputError("anchor: above 0, but there are no anchor texts; give some or set it to 0")
        self.model, self.tokens, self.seed = model, tokens, seed
        self._base: dict[int, torch.Tensor] = {}

    def chosen(self, step: int) -> list[tuple[int, int]]:
        """(text, how many of its first tokens) of a step, which follows from the step's number alone: ``tokens`` of
        them, or all there are."""
        order = np.random.default_rng((self.seed, step)).permutation(len(self.texts))
        found, room = [], self.tokens
        for i in order.tolist():
            if room <= 0:
                break
            found.append((i, min(room, len(self.texts[i]))))
            room -= found[-1][1]
        return found

    def loss(self, step: int, adapters: Any, recompute_layers: int = 0) -> torch.Tensor:
        """The anchor loss of a step under ``adapters``."""
        parts = self.chosen(step)
        base = torch.cat([self._of_base(i)[:count] for i, count in parts])
        batch = Batch.packed([self.texts[i][:count] for i, count in parts], self.model.device)
        tuned = self.model.forward(batch, adapters=adapters, recompute_layers=recompute_layers)
        return anchor_loss(tuned, base, self.model.head_weight, logit_scale=self.model.config.logit_scale)

    @torch.no_grad()
    def _of_base(self, index: int) -> torch.Tensor:
        """The base's last hidden states [N, C] of a text, from the text alone, so that no order of steps matters."""
        if index not in self._base:
            batch = Batch.packed([self.texts[index]], self.model.device)
            self._base[index] = self.model.forward(batch).detach()
        return self._base[index]
