import json
import sys
import time

import torch
from specialize.bench import gpu


def test_without_a_device_it_says_what_it_would_run(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path / "out")]) == 1
    text = capsys.readouterr().err
    assert "no CUDA device" in text and "--run-tests" in text and not (tmp_path / "out").exists()


def test_parts_share_the_time_and_always_leave_json(monkeypatch, tmp_path):
    quick = (sys.executable, "-c", f"open({str(tmp_path / 'a.json')!r}, 'w').write('[1]'); print('fine')")
    stuck = (sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)")
    failing = (sys.executable, "-c", "raise SystemExit(3)")
    parts = [
        gpu.Part("quick", 0.5, quick, "a.json"),
        gpu.Part("stuck", 0.01, stuck, "b.json"),
        gpu.Part("failing", 1.0, failing, None),
    ]
    monkeypatch.setattr(gpu, "_parts", lambda out, tests: parts)
    monkeypatch.setattr(gpu, "SHUTDOWN_SECONDS", 0)
    started = time.monotonic()
    gpu.run_all(2.0, tmp_path, tmp_path)
    assert time.monotonic() - started < 30
    done = json.loads((tmp_path / "summary.json").read_text())["parts"]
    assert [part["state"] for part in done] == ["done", "out of time", "exit code 3"]
    assert done[0]["rows"] == [1] and done[1]["rows"] is None and done[1]["tail"] == ["begun"]


def test_no_time_left_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "_parts", lambda out, tests: [gpu.Part("late", 1.0, ("true",), None)])
    assert gpu.run_all(0.0, tmp_path, tmp_path)["parts"][0]["state"].startswith("not started")


def test_test_files_run_side_by_side_and_are_counted(tmp_path):
    (tmp_path / "test_fine.py").write_text("import pytest\n@pytest.mark.gpu\ndef test_a(): pass\n")
    (tmp_path / "test_broken.py").write_text(
        "import pytest\n@pytest.mark.gpu\ndef test_a(): assert 0\n@pytest.mark.gpu\ndef test_b(): pass\n"
    )
    (tmp_path / "test_other.py").write_text("def test_c(): assert 0\n")
    result = tmp_path / "tests.json"
    assert gpu.run_tests(tmp_path, 60, result) == 1
    done = {name.rsplit("/", 1)[1]: outcome for name, outcome in json.loads(result.read_text()).items()}
    assert set(done) == {"test_fine.py", "test_broken.py"}
    assert done["test_fine.py"]["passed"] == 1 and done["test_fine.py"]["failures"] == []
    assert done["test_broken.py"]["failed"] == 1 and "test_a" in done["test_broken.py"]["failures"][0]


def test_a_file_that_hangs_or_dies_costs_that_file_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "FILE_SHARE", 0.25)
    head = "import pytest, os, time\n@pytest.mark.gpu\ndef test_a(): pass\n@pytest.mark.gpu\ndef test_b(): "
    (tmp_path / "test_hangs.py").write_text(head + "time.sleep(60)\n")
    (tmp_path / "test_dies.py").write_text(head + "os.abort()\n")
    (tmp_path / "test_fine.py").write_text(head + "pass\n")
    result = tmp_path / "tests.json"
    assert gpu.run_tests(tmp_path, 24, result) == 1
    done = {name.rsplit("/", 1)[1]: outcome for name, outcome in json.loads(result.read_text()).items()}
    assert done["test_fine.py"] == {"state": "exit code 0", "passed": 2, "failures": []}
    assert done["test_hangs.py"] == {"state": "out of time", "passed": 1, "failures": []}
    assert done["test_dies.py"]["passed"] == 1 and done["test_dies.py"]["state"].startswith("exit code -")


def test_what_never_ended_on_the_device_goes_first(tmp_path):
    files = [tmp_path / f"test_{name}.py" for name in ("passed", "failed", "stopped", "new", "large")]
    for file in files:
        file.write_text("#" * (200 if file.stem == "test_large" else 100))
    states = {"passed": "exit code 0", "failed": "exit code 1", "stopped": "out of time"}
    recorded = {str(tmp_path / f"test_{name}.py"): {"state": state} for name, state in states.items()}
    order = [file.stem[5:] for file in gpu.in_order_of_need(files, recorded)]
    assert order == ["large", "stopped", "new", "failed", "passed"]
