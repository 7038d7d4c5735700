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
