"""What a run takes over from other runs' folders instead of making it again: equal stages, and replies.

A stage's fingerprint covers its settings and all that it builds on, and random streams follow from the item alone; so
what another run made under the same fingerprint is, byte for byte, what this one would make.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from .errors import InputError
from .files import TEMPORARY, survey
from .ledger import Ledger, Reply, Stage
from .synthesize import Job


class Donors:
    """Other runs' folders, read only. Folders that hold no usable ledger are passed over."""

    def __init__(self, folders: Iterable[Path] = ()):
        self.folders = [folder for folder in folders if (folder / "ledger.sqlite").is_file()]

    def take_stage(
        self,
        name: str,
        fingerprint: str,
        where: str,
        target: Path,
        accept: Callable[[dict[str, Any]], bool] = lambda _: True,
    ) -> dict[str, Any] | None:
        """Bring the files of a finished stage from ``where`` in a donor to ``where`` in ``target``; returns what the
        stage noted, with "taken_from", or None when no donor has it whole."""
        for donor in self.folders:
            stage, artefacts = self._finished(donor, name)
            if stage is None or stage.fingerprint != fingerprint or not accept(stage.info):
                continue
            _copy(donor / where, target / where)
            if survey(target, [where]) != artefacts:  # changed since, or made before hashes were kept
                shutil.rmtree(target / where)
                continue
            return stage.info | {"taken_from": donor.name}
        return None

    @staticmethod
    def _finished(donor: Path, name: str) -> tuple[Stage | None, list[Any]]:
        try:
            with Ledger(donor / "ledger.sqlite") as ledger:
                stage = ledger.stages().get(name)
                return (stage if stage is not None and stage.done else None), ledger.artefacts().get(name, [])
        except InputError:
            return None, []

    def take_replies(self, ledger: Ledger, jobs: Sequence[Job], stage: str = "", fingerprint: str = "") -> int:
        """Copy the replies to ``jobs`` that donors have and ``ledger`` has not; returns how many.

        With ``stage`` only donors that began it under this fingerprint are asked. Without, a job's purpose must say
        all that its reply depends on, as those of evaluations do.
        """
        taken = 0
        purposes = {job.purpose for job in jobs}
        for donor in self.folders:
            done = {purpose: ledger.reply_ids(purpose) for purpose in purposes}
            wanted = {
                purpose: {
                    i
                    for job in jobs
                    if job.purpose == purpose
                    for i in map(job.reply_id, range(job.params.n))
                    if i not in done[purpose]
                }
                for purpose in purposes
            }
            if not any(wanted.values()):
                break
            found = self._replies(donor, wanted, stage, fingerprint)
            with ledger.transaction():
                taken += sum(ledger.add_reply(reply) for reply in found)
        return taken

    @staticmethod
    def _replies(donor: Path, wanted: dict[str, set[str]], stage: str, fingerprint: str) -> list[Reply]:
        try:
            with Ledger(donor / "ledger.sqlite") as other:
                begun = other.stages().get(stage)
                if stage and (begun is None or begun.fingerprint != fingerprint):
                    return []
                return [
                    reply
                    for purpose, ids in wanted.items()
                    for replies in other.replies(purpose).values()
                    for reply in replies
                    if reply.id in ids
                ]
        except InputError:
            return []

    def meta(self, key: str) -> Any:
        """What a donor remembers under a key that says all that its value depends on."""
        for donor in self.folders:
            try:
                with Ledger(donor / "ledger.sqlite") as other:
                    value = other.meta(key)
            except InputError:
                continue
            if value is not None:
                return value
        return None


def _copy(source: Path, target: Path) -> None:
    """Copy a folder's files, without those that a write left unfinished; as links where the file system has them, for a
    run's files are replaced whole and never written to again."""
    shutil.rmtree(target, ignore_errors=True)
    for path in sorted(source.rglob("*")):
        if not path.is_file() or path.suffix in TEMPORARY:
            continue
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, place)
        except OSError:
            shutil.copy2(path, place)
