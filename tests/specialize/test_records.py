import json

import pytest

from specialize.errors import InputError
from specialize.records import file_fingerprint, fingerprint, read_seeds, read_tasks, read_training_rows

GOOD = '{"instruction": "Do.", "input": "x", "output": "y"}'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("\n\n", "is empty"),
        (GOOD + "\n{oops\n", ":2: not JSON"),
        (GOOD + "\n[1]\n", ":2: a list where"),
        ('{"input": "x", "output": "y"}', ':1: no "instruction"'),
        ('{"instruction": "Do.", "input": "x", "output": " "}', ':1: "output" is empty'),
        ('{"instruction": 5, "input": "x", "output": "y"}', ':1: "instruction" is a int'),
        (GOOD + "\n\n" + GOOD, ":3: the same instruction and input as line 1"),
        (b"\xff\xfe\x00bad", "not UTF-8"),
    ],
)
def test_bad_seeds_name_file_and_line(text, message, tmp_path):
    path = tmp_path / "seeds.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError) as caught:
        read_seeds(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_seeds_without_a_task_or_input(tmp_path):
    path = tmp_path / "seeds.jsonl"
    path.write_text('\ufeff{"instruction": "Say hello.", "output": "hello"}\n\n', encoding="utf-8")
    [seed] = read_seeds(path)
    assert (seed.kind, seed.input, seed.output) == ("Say hello.", "", "hello")


TASK = {"name": "t", "instruction": "Do.", "metric": "f1", "shots": [], "examples": [{"input": "x", "outputs": ["y"]}]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metric": "bleu"}, 'metric "bleu" is unknown; known: token_f1, entity_f1, rouge_l'),
        ({"examples": []}, "no examples"),
        ({"examples": [{"input": "x"}]}, 'examples[0]: "outputs" must be a list'),
        ({"examples": [{"input": "x", "outputs": []}]}, 'examples[0]: "outputs" must be'),
        ({"shots": [{"input": "x"}]}, 'shots[0]: no "output"'),
        ({"instruction": ""}, '"instruction" is empty'),
        ({"labels": "yes"}, '"labels" must be a list'),
        ({"shots": {}}, '"shots" must be a list'),
    ],
)
def test_bad_tasks(change, message, tmp_path):
    (tmp_path / "t.json").write_text(json.dumps(TASK | change))
    with pytest.raises(InputError) as caught:
        read_tasks(tmp_path)
    assert "t.json" in str(caught.value)
    assert message in str(caught.value)


def test_task_folders(tmp_path):
    with pytest.raises(InputError, match=r"no \.json file"):
        read_tasks(tmp_path)
    (tmp_path / "a.json").write_text('{"name": \n oops')
    with pytest.raises(InputError, match=r"a\.json:2: not JSON"):
        read_tasks(tmp_path)
    (tmp_path / "a.json").write_text(json.dumps(TASK))
    (tmp_path / "b.json").write_text(json.dumps(TASK))
    with pytest.raises(InputError, match='two tasks named "t"'):
        read_tasks(tmp_path)
    [task] = read_tasks(tmp_path / "a.json")
    assert (task.metric, task.examples[0].outputs) == ("token_f1", ("y",))


def test_training_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(GOOD + '\n{"prompt": "p", "response": "r"}\n')
    assert read_training_rows(path)[1] == {"prompt": "p", "response": "r"}
    path.write_text('{"prompt": "p"}')
    with pytest.raises(InputError, match=':1: no "response"'):
        read_training_rows(path)


def test_fingerprints_change_with_content(tmp_path):
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1}) != fingerprint({"a": 1, "b": 3})
    (tmp_path / "f").write_text("one")
    before = file_fingerprint(tmp_path)
    (tmp_path / "f").write_text("two")
    assert file_fingerprint(tmp_path) != before


def test_every_byte_of_a_large_file_counts(tmp_path):
    path = tmp_path / "weights"
    content = bytearray(9 << 20)
    path.write_bytes(content)
    before, ends = file_fingerprint(tmp_path), file_fingerprint(tmp_path, whole=False)
    content[5 << 20] = 1
    path.write_bytes(content)
    assert file_fingerprint(tmp_path) != before
    assert file_fingerprint(tmp_path, whole=False) == ends  # what runs of earlier versions hold
