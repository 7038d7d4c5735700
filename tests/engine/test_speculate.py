"""What is drafted, and when a sequence stops drafting."""

from __future__ import annotations

import numpy as np
import pytest
from specialize.engine.rows import Sequence
from specialize.engine.sampler import SamplingParams
from specialize.engine.speculate import MAX_DRAFT_TOKENS, PromptLookup, make_drafter

from specialize.errors import InputError


def propose(drafter: PromptLookup, tokens: list[int], room: int = 99, sequence: Sequence | None = None) -> list[int]:
    array = np.asarray(tokens, np.int32)
    sequence = sequence or Sequence(0, 0, SamplingParams(), array, len(tokens), 0)
    return drafter.propose(sequence, array, room).tolist()


@pytest.mark.parametrize(
    ("tokens", "draft"),
    [
        ([1, 2, 3, 4, 5, 9, 1, 2, 3], [4, 5, 9, 1, 2, 3]),
        ([7, 2, 3, 4, 8, 2, 3], [4, 8, 2, 3]),  # two tokens do where three were never together
        ([1, 2, 3, 4, 1, 2, 3, 5, 1, 2, 3], [5, 1, 2, 3]),  # the latest place
        ([6, 6, 6, 6], [6]),
        ([1, 2, 3, 4], []),
        ([5], []),
        ([5, 5], []),
        ([], []),
    ],
)
def test_what_followed_the_last_tokens_before(tokens, draft):
    assert propose(PromptLookup(sparing=False), tokens) == draft
    assert propose(PromptLookup(sparing=False), tokens, room=2) == draft[:2]
    assert propose(PromptLookup(sparing=False), tokens, room=0) == []


def test_drafts_have_a_limit():
    assert len(propose(PromptLookup(sparing=False), [*range(50), 0, 1, 2])) == MAX_DRAFT_TOKENS


def test_a_sequence_whose_drafts_are_wrong_rests_a_while():
    drafter, tokens = PromptLookup(sparing=True), [1, 2, 3, 4, 1, 2, 3]
    sequence = Sequence(0, 0, SamplingParams(), np.asarray(tokens), 7, 0)
    assert propose(drafter, tokens, sequence=sequence)
    sequence.num_drafted, sequence.num_accepted = 40, 4
    assert propose(drafter, tokens, sequence=sequence) == []
    assert propose(PromptLookup(sparing=False), tokens, sequence=sequence)
    later = [0] * 100 + tokens
    assert propose(drafter, later, sequence=sequence)
    sequence.num_drafted, sequence.num_accepted = 40, 30
    assert propose(drafter, later, sequence=sequence)


def test_modes():
    assert make_drafter("off") is None and make_drafter("auto") is not None
    with pytest.raises(InputError, match="speculation is 'no'"):
        make_drafter("no")
