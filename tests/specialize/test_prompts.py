import jinja2
import pytest

from specialize.prompts import (
    clean_reply,
    example_prompt,
    input_prompt,
    instruction_prompt,
    parse_instruction,
    render,
    response_prompt,
)


def test_the_format_of_tuning_and_evaluation():
    assert example_prompt("Do it.", "a & b") == "### Instruction:\nDo it.\n\n### Input:\na & b\n\n### Response:\n"
    shot = "### Instruction:\nDo.\n\n### Input:\nx\n\n### Response:\ny\n\n"
    assert example_prompt("Do.", "z", [("Do.", "x", "y")]) == shot + example_prompt("Do.", "z")
    assert response_prompt("Do.", "z") == example_prompt("Do.", "z")


def test_what_a_group_shares_comes_first():
    shots = [("Do.", "x", "y"), ("Do.", "u", "v")]
    one = response_prompt("Do.", "first", shots, ["A passage."])
    other = response_prompt("Do.", "second", shots, ["Another."])
    shared = example_prompt("Do.", "x", ())[:-1] + "\ny\n\n"
    assert one.startswith(shared)
    assert other.startswith(shared)
    assert one.index("A passage.") > one.index("v\n")
    assert one.endswith("### Response:\n")


def test_other_templates_render():
    assert instruction_prompt([("Do.", "x")], "some text").endswith("Text: some text\nTask 2:")
    assert instruction_prompt([("Do.", "x")], "").endswith("Task 2\nInstruction:")
    ask = "Write the question that belongs to the abstract."
    assert input_prompt("Do.", [("m", "w")], "text", "question", "abstract") == example_prompt(
        ask, "text", [(ask, "m", "w")]
    )
    assert "Task: Do." in input_prompt("Do.", [], "text", "", "")


def test_a_missing_value_is_an_error():
    with pytest.raises(jinja2.UndefinedError):
        render("example", instruction="x", shots=())


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (" List the genes.\n\nText: more", ("List the genes.", "")),
        (" List the\n genes.\nInput: BRCA1 here\n\nTask 5\nInstruction: x", ("List the genes.", "BRCA1 here")),
        ("Instruction: Do it\nInput: y", ("Do it", "y")),
        ("", None),
        (" ... ", None),
    ],
)
def test_parsing_instructions(raw, expected):
    assert parse_instruction(raw) == expected


def test_replies_end_at_the_next_heading():
    assert clean_reply(" yes\n\n### Instruction:\nmore") == "yes"
