"""Training rows: which are kept, how they are packed, and which positions carry a loss.

A row is a prompt and a response. The rows of one optimizer step are packed best-fit into micro-batches of at most
``max_batch_tokens`` tokens; sequences stay apart by ``query_starts``, so nothing leaks between neighbours and padding
does not exist. The hidden state at position i predicts token i + 1; a loss is taken where token i + 1 is a response's.
Shape letters: T tokens, N positions with a loss.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from specialize.errors import InputError

from ..engine.batch import Batch, upload

LONG_EXAMPLES = ("truncate", "drop", "error")
NORMALISATIONS = ("tokens", "examples")


@dataclass(frozen=True)
class TrainExample:
    """Token ids of one row. ``weight`` multiplies its loss; ``name`` is how messages call it. ``counted`` says of each
    response token whether it carries a loss (empty: all do): a conversation's later prompts are read, not learned."""

    prompt_ids: Sequence[int]
    response_ids: Sequence[int]
    weight: float = 1.0
    name: str = ""
    counted: Sequence[bool] = ()

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)

    @property
    def num_targets(self) -> int:
        """Response tokens that carry a loss."""
        return sum(map(bool, self.counted)) if self.counted else len(self.response_ids)


@dataclass(frozen=True)
class FitReport:
    """What became of the rows that were longer than allowed."""

    num_examples: int
    num_truncated: int
    num_dropped: int
    longest: int


@dataclass(frozen=True)
class MicroBatch:
    """One forward and backward pass. ``weights`` already hold the row's weight and the normalisation of the whole
    optimizer step, so the weighted sum of losses over the step's micro-batches is the step's loss."""

    batch: Batch
    loss_rows: torch.Tensor  # i64[N], positions in the packed batch
    targets: torch.Tensor  # i64[N]
    weights: torch.Tensor  # f32[N]
    num_tokens: int  # of the rows, prompt and response
    num_response_tokens: int  # N
    names: tuple[str, ...]


def encode_examples(
    tokenizer: Any,
    pairs: Iterable[tuple[str, str]],
    *,
    weights: Sequence[float] | None = None,
    names: Sequence[str] | None = None,
    end: bool = True,
) -> list[TrainExample]:
    """Tokenizes (prompt, response) texts; ``end`` closes each response with the end-of-text token.

    Prompt and response are tokenized apart, so that the prompt's tokens are those the model sees when it generates.
    """
    pairs = list(pairs)
    eos = [min(tokenizer.eos_ids)] if end and tokenizer.eos_ids else []
    rows = []
    for row, (prompt, response) in enumerate(pairs):
        name = names[row] if names is not None else f"row {row + 1}"
        if not response.strip():
            raise InputError(f"{name}: the response is empty; remove the row or give it an answer")
        rows.append(
            TrainExample(
                prompt_ids=list(tokenizer.encode(prompt)),
                response_ids=list(tokenizer.encode(response, add_special_tokens=False)) + eos,
                weight=float(weights[row]) if weights is not None else 1.0,
                name=name,
            )
        )
    return rows


def fit_examples(
    examples: Sequence[TrainExample], *, max_length: int, long_examples: str = "truncate"
) -> tuple[list[TrainExample], FitReport]:
    """Checks the rows and makes each fit into ``max_length`` tokens.

    "truncate" cuts the left of the prompt and drops a row whose response alone does not fit; "drop" drops every row
    that is too long; "error" raises. Raises InputError for an empty response, a bad weight or when nothing is left.
    """
    if long_examples not in LONG_EXAMPLES:
        raise InputError(f"long_examples: {long_examples!r}; allowed: {', '.join(LONG_EXAMPLES)}")
    if not examples:
        raise InputError("no training rows were given")
    kept, truncated, dropped, longest = [], 0, 0, 0
    for row, example in enumerate(examples):
        name = example.name or f"row {row + 1}"
        prompt, response = list(example.prompt_ids), list(example.response_ids)
        if not response:
            raise InputError(f"{name}: the response is empty; remove the row or give it an answer")
        counted = tuple(map(bool, example.counted))
        if counted and (len(counted) != len(response) or not any(counted)):
            raise InputError(
                f"{name}: of {len(response)} response tokens {sum(counted)} of {len(counted)} carry a loss"
            )
        if not np.isfinite(example.weight) or example.weight < 0:
            raise InputError(f"{name}: weight {example.weight} is not a number of at least 0")
        if not prompt:  # something must predict the first token
            if len(response) < 2 or (counted and not any(counted[1:])):
                raise InputError(f"{name}: the prompt is empty and the response has one token; nothing can be learned")
            prompt, response, counted = response[:1], response[1:], counted[1:]
        length = len(prompt) + len(response)
        longest = max(longest, length)
        if length > max_length:
            if long_examples == "error":
                raise InputError(
                    f"{name}: {length} tokens, but max_length is {max_length}; shorten it or raise max_length"
                )
            room = max_length - len(response)
            if long_examples == "drop" or room < 1:
                dropped += 1
                continue
            prompt = prompt[-room:]
            truncated += 1
        kept.append(TrainExample(prompt, response, example.weight, name, counted))
    if not kept:
        raise InputError(
            f"all {len(examples)} rows are longer than max_length {max_length} (longest {longest}); raise max_length"
        )
    return kept, FitReport(len(examples), truncated, dropped, longest)


def fingerprint_examples(examples: Sequence[TrainExample]) -> str:
    """A short hash of all token ids and weights, to tell whether a checkpoint belongs to this data."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(np.asarray([len(example.prompt_ids), len(example.response_ids)], np.int64).tobytes())
        digest.update(np.asarray(example.prompt_ids, np.int64).tobytes())
        digest.update(np.asarray(example.response_ids, np.int64).tobytes())
        digest.update(np.float64(example.weight).tobytes())
        if example.counted:
            digest.update(np.asarray(example.counted, np.bool_).tobytes())
    return digest.hexdigest()[:16]


def pack(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of ``lengths`` in bins of at most ``budget``, each bin in the order given; no two bins could be one.

    Best-fit decreasing; where that needs more bins than tokens / budget rounded up, bins filled one by one by exact
    subset sums are taken if they are fewer. A length above the budget gets a bin of its own. Deterministic.
    """
    found = _best_fit(lengths, budget)
    over = sum(length > budget for length in lengths)
    if len(found) - over > -(-sum(length for length in lengths if length <= budget) // budget):
        exact = _subset_sums(lengths, budget)
        found = exact if len(exact) < len(found) else found
    return [sorted(b) for b in found]


def _best_fit(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Best-fit decreasing; ties go to the earlier index."""
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fits = [b for b, free in enumerate(room) if free >= lengths[index]]
        if fits:
            chosen = min(fits, key=lambda b: room[b])
        else:
            chosen = len(bins)
            bins.append([])
            room.append(budget)
        bins[chosen].append(index)
        room[chosen] -= lengths[index]
    return bins


def _subset_sums(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Each bin takes the longest row left and, of the others, those that fill it best (among equals the longest rows).

    The sums that the shorter rows can make are the bits of an integer: a bin costs rows · budget / 64 word operations.
    """
    left = sorted(range(len(lengths)), key=lambda i: (lengths[i], -i))
    bins: list[list[int]] = []
    while left:
        bin = [left.pop()]
        room = budget - lengths[bin[0]]
        if room > 0:
            mask, sums = (1 << (room + 1)) - 1, [1]
            for index in left:
                if lengths[index] > room:
                    break
                sums.append((sums[-1] | sums[-1] << lengths[index]) & mask)
            wanted = sums[-1].bit_length() - 1
            for place in range(len(sums) - 2, -1, -1):
                length = lengths[left[place]]
                if length <= wanted and sums[place] >> (wanted - length) & 1:
                    bin.append(left.pop(place))
                    wanted -= length
        bins.append(bin)
    return bins


def step_indices(step: int, *, num_examples: int, batch_size: int, seed: int, shuffle: bool = True) -> list[int]:
    """The rows of optimizer step ``step``: a permutation per epoch, drawn from (seed, epoch) alone, so that the place
    in the data is the step number and nothing else. The last step of an epoch may have fewer rows."""
    per_epoch = -(-num_examples // batch_size)
    epoch, place = divmod(step, per_epoch)
    order = np.random.default_rng((seed, epoch)).permutation(num_examples) if shuffle else np.arange(num_examples)
    return order[place * batch_size : (place + 1) * batch_size].tolist()


def build_micro_batches(
    examples: Sequence[TrainExample],
    *,
    max_batch_tokens: int,
    device: torch.device | str,
    normalise: str = "tokens",
    bins: Sequence[Sequence[int]] | None = None,
) -> list[MicroBatch]:
    """Packs the rows of one optimizer step. The weights of all micro-batches together sum to 1; with ``bins`` (places
    of the rows of each) only these are made, and the weights are what they would be among all.

    "tokens" gives every response token the same say, "examples" every row; a row's ``weight`` multiplies either.
    """
    if normalise == "tokens":
        per_token = [e.weight for e in examples]
    elif normalise == "examples":
        per_token = [e.weight / e.num_targets for e in examples]
    else:
        raise InputError(f"normalise: {normalise!r}; allowed: {', '.join(NORMALISATIONS)}")
    total = sum(w * e.num_targets for w, e in zip(per_token, examples, strict=True))
    scale = 1.0 / total if total > 0 else 0.0
    micro_batches = []
    for indices in pack([e.num_tokens for e in examples], max_batch_tokens) if bins is None else bins:
        sequences, loss_rows, targets, weights, start = [], [], [], [], 0
        for i in indices:
            prompt, response = list(examples[i].prompt_ids), list(examples[i].response_ids)
            sequences.append(prompt + response[:-1])  # nothing is predicted from the last token
            first = start + len(prompt) - 1
            places = np.flatnonzero(examples[i].counted) if examples[i].counted else np.arange(len(response))
            loss_rows.append(first + places)
            targets.append(np.asarray(response, np.int64)[places])
            weights.append(np.full(len(places), per_token[i] * scale, np.float32))
            start += len(sequences[-1])
        tensors = upload(
            {
                "loss_rows": np.concatenate(loss_rows).astype(np.int64),
                "targets": np.concatenate(targets),
                "weights": np.concatenate(weights),
            },
            device,
        )
        micro_batches.append(
            MicroBatch(
                batch=Batch.packed(sequences, device),
                loss_rows=tensors["loss_rows"],
                targets=tensors["targets"],
                weights=tensors["weights"],
                num_tokens=sum(examples[i].num_tokens for i in indices),
                num_response_tokens=sum(len(t) for t in targets),
                names=tuple(examples[i].name for i in indices),
            )
        )
    return micro_batches
