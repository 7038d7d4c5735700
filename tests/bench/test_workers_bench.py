"""What the scaling benchmark makes of its runs; pools themselves are tested in tests/specialize/test_workers.py."""

from __future__ import annotations

import click
import pytest
from specialize.bench import workers
from specialize.bench.generate import Workload

from specialize.errors import InputError


def test_pools_take_turns_and_efficiency_is_per_worker(monkeypatch, tmp_path):
    rates, order = {1: [100.0, 120.0, 110.0], 2: [180.0, 220.0, 187.0]}, []

    def timed(path, workload, *, workers, **settings):
        order.append(workers)
        return {"seconds": 1.0, "cpu_seconds": 1.0, "tokens_per_s": rates[workers][order.count(workers) - 1]}

    monkeypatch.setattr(workers, "time_pool", timed)
    settings = {"threads_each": 1, "dtype": "fp32", "device": "cpu", "rounds": 3}
    one, two = workers.scaling(tmp_path, Workload("w", [[1]], 4), [1, 2], **settings)
    assert order == [1, 2, 2, 1, 1, 2]
    assert (one["tokens_per_s"], one["efficiency"]) == (110.0, 1.0)
    assert two["tokens_per_s"] == 187.0 and two["efficiency"] == pytest.approx(0.85)


@pytest.mark.parametrize("given", ["", "0", "two", "1;2"])
def test_wrong_numbers_of_workers_are_named(given):
    with pytest.raises(click.BadParameter, match="such as 1,2,4"):
        workers.main(["--workers", given])


def test_more_workers_than_cores_is_one_line(tmp_path):
    with pytest.raises(InputError, match=r"--workers 999 of 4 threads each: the machine has \d+ cores; allowed: up to"):
        workers.main(["--model", str(tmp_path), "--device", "cpu", "--workers", "999", "--threads-each", "4"])
