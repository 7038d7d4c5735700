"""What a run trains, as the loop sees it: one flat fp32 tensor, its gradient, and the copies a forward pass reads.

One tensor makes clipping, the optimizer and checkpoints a few operations, whatever the number of layers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ALIGNMENT = 64  # elements: every matrix starts where vector loads and matrix units like it


@dataclass(frozen=True)
class ParameterGroup:
    """Elements ``start:stop`` of the flat tensor that share a learning rate (a factor on the run's) and whether weights
    decay."""

    start: int
    stop: int
    learning_rate_factor: float = 1.0
    decays: bool = True


class Trainable(ABC):
    """Owns ``flat`` f32[P] and ``gradient`` f32[P], the gradient that a step accumulates.

    `refresh` must follow each change of ``flat``, `collect` each backward pass. ``identity`` says what the result
    depends on beside base, rows and `TrainConfig`.
    """

    identity: str = ""

    model: Any
    flat: torch.Tensor
    gradient: torch.Tensor
    groups: tuple[ParameterGroup, ...]
    training: bool

    @property
    @abstractmethod
    def num_parameters(self) -> int: ...

    @property
    @abstractmethod
    def adapters(self) -> Any | None:
        """What `Model.forward` takes as ``adapters``."""

    @abstractmethod
    def refresh(self) -> None:
        """Makes forward passes see the present values of ``flat``."""

    @abstractmethod
    def collect(self) -> None:
        """Adds the gradients of the last backward pass to ``gradient``, in fp32."""

    @abstractmethod
    def set_dropout_seed(self, seed: int) -> None:
        """Dropout masks follow from this number and the layer alone, so recomputing a layer repeats them."""

    @abstractmethod
    def state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint needs beside ``flat`` and the optimizer's tensors."""

    @abstractmethod
    def load_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Takes what `state` gave."""

    @abstractmethod
    def save(self, path: str | Path, *, base_model: str | None = None, source: str | Path | None = None) -> Path:
        """Writes the result into the folder ``path``; each file appears whole or not at all. ``source`` is the base's
        folder or file."""

    @abstractmethod
    def is_saved(self, path: Path) -> bool:
        """Whether `save` has written to this folder."""

    @abstractmethod
    def close(self) -> None:
        """The run is over: nothing asks for gradients any more."""


def aligned(offset: int) -> int:
    return (offset + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
