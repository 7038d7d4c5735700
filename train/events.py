"""Steps as TensorBoard events, for those who have it installed (extra ``tensorboard``)."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from .config import StepReport

SHOWN = ("loss", "val_loss", "grad_norm", "learning_rate", "tokens_per_s", "mfu")


class EventLog:
    """Writes one scalar a number and step into ``folder``. A run that goes on hides what an earlier process wrote for
    steps that are done again. Without TensorBoard nothing is written."""

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self._writer: Any | None = None

    @staticmethod
    def is_installed() -> bool:
        return importlib.util.find_spec("tensorboard") is not None

    def __call__(self, report: StepReport) -> None:
        if self._writer is None:
            if not self.is_installed():
                return
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._folder), purge_step=report.step)
        for name in SHOWN:
            value = getattr(report, name)
            if value is not None:
                self._writer.add_scalar(name, value, report.step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
