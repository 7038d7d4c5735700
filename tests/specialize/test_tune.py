"""Rows in groups of one kind, each the demonstration of those after it."""

from collections import Counter

import pytest
from domain import write_model
from specialize.engine.tokenizer import Tokenizer

from specialize.prompts import example_prompt
from specialize.records import Example
from specialize.tune import encode, encode_grouped

ROWS = [Example(f"a{i}", "seed", "a", "Name it.", f"The cat no. {i} sat.", f"cat {i}") for i in range(9)]
ROWS += [Example(f"b{i}", "corpus", "b", "Is it so?", f"We saw a dog on day {i}.", "yes") for i in range(5)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "m"
    text = "\n".join(f"{example_prompt(r.instruction, r.input)}{r.output}" for r in ROWS)
    write_model(folder, text)
    return Tokenizer.from_pretrained(folder)


def grouped(tokenizer, **changes):
    settings = {"demonstrations": 3, "few_shot": 0.7, "max_length": 1000, "seed": 5, "passes": 2} | changes
    return encode_grouped(tokenizer, ROWS, **settings)


def test_each_pass_holds_every_row_once_in_the_form_of_evaluation(tokenizer):
    texts = {row.id: row for row in ROWS}
    seen, sizes = Counter(), Counter()
    for example in grouped(tokenizer):
        ids = [i for part in reversed(example.name.split(" after ")) for i in part.split(", ")]
        rows = [texts[i] for i in ids]
        assert len({row.kind for row in rows}) == 1
        seen.update(ids)
        sizes[len(rows)] += 1
        shots = [(row.instruction, row.input, row.output) for row in rows[:-1]]
        prompt = example_prompt(rows[-1].instruction, rows[-1].input, shots)
        assert [
            *example.prompt_ids,
            *example.response_ids[: -len(encode(tokenizer, rows[-1:])[0].response_ids)],
        ] == list(tokenizer.encode(prompt))
        counted = example.counted or [True] * len(example.response_ids)
        spoken = [t for t, c in zip(example.response_ids, counted, strict=True) if c]
        answers = "".join(f"{row.output}\n" for row in rows[:-1]) + rows[-1].output
        assert tokenizer.decode(spoken).removesuffix("<end>") == answers
        assert spoken[-1] == min(tokenizer.eos_ids)
    assert seen == {row.id: 2 for row in ROWS}
    assert set(sizes) <= {1, 2, 3, 4} and len(sizes) >= 3


def test_groups_change_from_pass_to_pass_and_follow_from_the_seed(tokenizer):
    once = [e.name for e in grouped(tokenizer)]
    assert once == [e.name for e in grouped(tokenizer)]
    assert once != [e.name for e in grouped(tokenizer, seed=6)]
    first = [e.name for e in grouped(tokenizer, passes=1)]
    assert once[: len(first)] == first and set(once[len(first) :]) != set(first)


def test_no_group_is_longer_than_a_sequence_may_be(tokenizer):
    alone = encode(tokenizer, ROWS)
    limit = 2 * max(e.num_tokens for e in alone) + 12
    examples = grouped(tokenizer, few_shot=1.0, demonstrations=8, max_length=limit)
    assert max(e.num_tokens for e in examples) <= limit
    assert any(e.counted for e in examples)
    tight = grouped(tokenizer, few_shot=1.0, max_length=10, passes=1)
    assert sorted(e.name for e in tight) == sorted(row.id for row in ROWS)
    none = grouped(tokenizer, few_shot=0.0, passes=1)
    assert sorted(e.name for e in none) == sorted(row.id for row in ROWS)
