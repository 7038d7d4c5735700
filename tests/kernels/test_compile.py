import json

import pytest
from specialize.bench import compile as compiling
from specialize.bench import kernels as bench
from specialize.kernels.dispatch import HAS_TRITON

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed here")


def test_a_few_kernels_for_every_target():
    rows = compiling.compile_table((80, 90, 100), ["gelu", "rope"], limit=8)
    assert len(rows) == 8 and {row["target"] for row in rows} >= {80, 90}
    for row in rows:
        assert row["problems"] == [] and row["registers"] > 0 and row["spill_instructions"] == 0, row


def test_a_bad_case_is_a_row_with_its_reason(monkeypatch):
    case = compiling.kernel_specs()["gelu"].compile_cases(90)[0]
    row = compiling.compile_row("gelu", type(case)(case.name, case.kernel, {"x": "*bf16"}, {}), 90)
    assert "differ from the kernel's arguments" in row["problems"][0]


def test_the_command_fails_on_a_problem(monkeypatch, tmp_path, capsys):
    good = {"op": "a", "case": "b", "target": 90, "problems": []}
    monkeypatch.setattr(compiling, "compile_table", lambda targets, ops: [good])
    path = tmp_path / "out" / "table.json"
    assert bench.main(["--compile-only", "--targets", "90", "--json", str(path)]) == 0
    assert json.loads(path.read_text())["rows"] == [good]
    monkeypatch.setattr(compiling, "compile_table", lambda targets, ops: [good | {"problems": ["spills"]}])
    assert bench.main(["--compile-only", "--targets", "90"]) == 1
    assert "spills" in capsys.readouterr().out
    monkeypatch.setattr(compiling, "compile_table", lambda targets, ops: [])
    assert bench.main(["--compile-only"]) == 1


def test_every_op_ships_configurations():
    for op, spec in compiling.kernel_specs().items():
        for target in compiling.TARGETS:
            assert spec.compile_cases(target), f"{op} has nothing to compile for {target}"


@pytest.mark.slow
@pytest.mark.parametrize("target", compiling.TARGETS)
def test_the_whole_table(target):
    rows = compiling.compile_table((target,))
    bad = [row for row in rows if row["problems"]]
    assert rows and not bad, bad
