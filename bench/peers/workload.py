"""The work all peers do: abstracts with a question, as prompts of token ids."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from specialize.errors import InputError

from ..generate import Workload, made_up_text, read_prompts

LONGEST = 512
# Tokens of the first 32 PubMedQA abstracts with their questions, cut at LONGEST: the stand-in has the same.
PUBMEDQA_LENGTHS = (
    512, 478, 241, 308, 439, 318, 348, 315, 361, 431, 512, 292, 297, 419, 174, 297,
    373, 387, 379, 364, 433, 399, 315, 244, 292, 452, 352, 506, 410, 226, 438, 330,
)  # fmt: skip


def peers_workload(
    source: Path | None, encode: Callable[[str], list[int]], new_tokens: int, count: int | None = None
) -> Workload:
    """The inputs of a task file (.json; each cut at 512 tokens), the prompts of a .jsonl file, or made-up findings.

    ``count``: how many prompts; for a task file and made-up ones 32 if left out, for a .jsonl file all.
    """
    if source is None:
        lengths = (PUBMEDQA_LENGTHS * (-(-(count or 0) // len(PUBMEDQA_LENGTHS)) or 1))[: count or None]
        prompts = [encode(made_up_text(2 * length + 8, place))[:length] for place, length in enumerate(lengths)]
        return Workload("made-up findings, lengths of PubMedQA", prompts, new_tokens)
    if not source.is_file():
        raise InputError(f"{source}: no such file; give a task file (.json) or prompts (.jsonl)")
    if source.suffix == ".json":
        try:
            inputs = [str(example["input"]) for example in json.loads(source.read_text(encoding="utf-8"))["examples"]]
        except (ValueError, KeyError, TypeError):
            raise InputError(f'{source}: not a task file with "examples", each with an "input"') from None
        if not inputs:
            raise InputError(f"{source}: holds no examples")
        prompts = [encode(text)[:LONGEST] for text in inputs[: count or len(PUBMEDQA_LENGTHS)]]
        return Workload(source.stem, prompts, new_tokens)
    workload = read_prompts(source, encode, new_tokens)
    return Workload(workload.name, workload.prompts[: count or None], new_tokens)
