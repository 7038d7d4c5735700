import json
import math

import pytest
import torch
from specialize.bench import environment as env
from specialize.bench import kernels as bench
from specialize.bench.compile import kernel_specs
from specialize.kernels import tuning

SPECS = kernel_specs()


@pytest.mark.parametrize("op", SPECS)
def test_every_specification_is_complete(op):
    spec = SPECS[op]
    assert spec.test_cases and spec.bench_cases
    for case in spec.bench_cases:
        assert spec.bytes(case) > 0 and spec.flops(case) >= 0
        assert case.get("pass", "forward") in ("forward", "backward", "both")
        assert case.get("dtype", "bf16") in bench.DTYPES
        json.dumps(dict(case))


def test_worst_row_sees_one_bad_row():
    truth = torch.randn(4096, 64)
    out = truth.clone()
    out[1234] *= 1.5
    assert bench.worst_row_error(out, truth) == pytest.approx(0.5, rel=1e-3)
    out[7, 3] = math.nan
    assert bench.worst_row_error(out, truth) == math.inf
    assert bench.worst_row_error(torch.tensor([1, 2]), torch.tensor([1, 3])) == math.inf


def test_important_cases_come_first():
    priorities = [case.get("priority", 5) for _, case in bench.cases_by_priority(SPECS.values())]
    assert priorities == sorted(priorities)


def test_without_a_device_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main([]) == 1
    assert "need a CUDA device" in capsys.readouterr().err
    assert bench.main(["--targets", "ninety", "--compile-only"]) == 2


def test_roofline_and_table(tmp_path):
    row = {
        "op": "rope", "pass": "forward", "model": "m", "shape": {"T": 1}, "ms": 0.1, "gb_s": 1000.0, "tflop_s": 2.0,
        "flops": 100, "bytes": 50, "share_of_ceiling": 0.5, "copy_gb_s": 3000.0, "gemm_tflop_s": 700.0, "device": "d",
        "commit": "c", "peers": {"torch": 0.2, "broken": None},
    }  # fmt: skip
    bench.plot_roofline([row], tmp_path / "roofline.png")
    assert (tmp_path / "roofline.png").stat().st_size > 1000
    assert "torch 2.00x broken failed" in bench.format_row(row)
    assert "WRONG" in bench.format_row(
        {**{k: row[k] for k in ("op", "pass", "model", "shape")}, "error": 1.0, "allowed": 0.1}
    )


def test_environment_names_versions_and_commit():
    body = env.environment()
    assert body["torch"] == torch.__version__ and set(body) >= {"device", "device_key", "triton", "commit"}


def test_tuned_files_answer_lookups(monkeypatch, tmp_path):
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    tuning.forget()
    default = {"rows": 1, "num_warps": 4}
    assert tuning.tuned_config("op", "64", default) == default
    tuning.write_tuned("op", "64", {"rows": 2})
    tuning.write_tuned("op", "default", {"rows": 8, "num_warps": 8})
    assert tuning.tuned_config("op", "64", default) == {"rows": 2, "num_warps": 4}
    assert tuning.tuned_config("op", "65", default) == {"rows": 8, "num_warps": 8}
    assert tuning.tuned_config("other", "64", default) == default
    with tuning.override("op", "64", {"rows": 16}):
        assert tuning.tuned_config("op", "64", default) == {"rows": 16, "num_warps": 4}
    assert tuning.tuned_config("op", "64", default)["rows"] == 2
    tuning.write_tuned("op", "64", {"stages": 2})
    with pytest.raises(ValueError, match="op: tuned configuration of bucket '64' sets 'stages'"):
        tuning.tuned_config("op", "64", default)
    tuning.forget()


def test_shipped_tuned_files_parse():
    for path in tuning.FOLDER.glob("*.json"):
        table = json.loads(path.read_text())
        assert table.pop("device")["capability"] in (80, 86, 89, 90, 100, 120)
        assert path.stem in tuning.shipped_devices(json.loads(path.read_text())["device"]["capability"])
        for op, buckets in table.items():
            assert op.isidentifier() and buckets and all(isinstance(config, dict) for config in buckets.values())


def test_lookups_for_a_device_that_is_not_here(monkeypatch, tmp_path):
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    tuning.forget()
    (tmp_path / "Some_GPU.json").write_text('{"device": {"capability": 90}, "op": {"64": {"rows": 4}}}')
    assert tuning.shipped_devices(90) == ["Some_GPU"] and tuning.shipped_devices(80) == []
    with tuning.as_device("Some_GPU"):
        assert tuning.tuned_config("op", "64", {"rows": 1}) == {"rows": 4}
    assert tuning.tuned_config("op", "64", {"rows": 1}) == {"rows": 1}
    tuning.forget()
