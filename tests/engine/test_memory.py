from __future__ import annotations

import os
import subprocess
import sys

import psutil
import pytest
from specialize.engine import control_groups, memory

from specialize.errors import InputError


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GB", 24 * 10**9), ("22.5 GiB", int(22.5 * 2**30)), ("800mb", 8 * 10**8), ("5000", 5000), ("2t", 2 * 10**12)],
)
def test_sizes_with_units(text, size):
    assert memory.parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "much", "24 bananas", "-3GB", "0", "3iB"])
def test_what_is_no_size_is_one_line(text):
    with pytest.raises(InputError, match=r"write a number with a unit|above 0"):
        memory.parse_bytes(text)


def test_cards_by_name():
    assert 84e9 < memory.capacity_bytes("H100-80GB") < 85.5e9
    assert memory.capacity_bytes("80GB") == 80 * 10**9
    with pytest.raises(InputError, match="a card: a100-40gb, "):
        memory.capacity_bytes("voodoo2")


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """A made-up tree of control groups; ``put`` writes its files."""
    monkeypatch.setattr(control_groups, "_CGROUP_ROOT", tmp_path / "cgroup")
    monkeypatch.setattr(control_groups, "_PROC_CGROUP", tmp_path / "self")

    def put(folder: str, **files: object) -> None:
        place = tmp_path / "cgroup" / folder
        place.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (place / name.replace("__", ".")).write_text(f"{content}\n")

    put.belongs_to = lambda text: (tmp_path / "self").write_text(text)  # type: ignore[attr-defined]
    return put


def test_a_containers_limit_counts_in_version_2(groups):
    groups(".", memory__max=5_000_000, memory__current=1_000_000)
    assert memory.available_memory_bytes("cpu") == 4_000_000
    assert memory.total_memory_bytes("cpu") == 5_000_000


def test_the_tightest_group_above_the_process_counts(groups):
    groups.belongs_to("0::/user/job\n")
    groups("user", memory__max=3_000_000, memory__current=500_000, memory__stat="anon 1\ninactive_file 100000")
    groups("user/job", memory__max="max", memory__current=400_000)
    assert memory.available_memory_bytes("cpu") == 2_600_000  # droppable cache is free


def test_a_containers_limit_counts_in_version_1(groups):
    groups.belongs_to("7:cpu,cpuacct:/\n4:memory:/docker/abc\n0::/\n")
    groups("memory", memory__limit_in_bytes=2**63 - 4096, memory__usage_in_bytes=10_000_000)
    groups("memory/docker/abc", memory__limit_in_bytes=2_000_000, memory__usage_in_bytes=700_000)
    assert memory.available_memory_bytes("cpu") == 1_300_000


def test_without_groups_the_machine_counts(groups):
    assert memory.total_memory_bytes("cpu") == psutil.virtual_memory().total
    assert memory.process_bytes("cpu") == pytest.approx(psutil.Process().memory_info().rss, rel=0.2)


@pytest.fixture
def eight_cpus(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))


@pytest.mark.parametrize(
    ("limit", "count"), [("150000 100000", 1), ("400000 100000", 4), ("50000 100000", 1), ("max 100000", 8)]
)
def test_processors_of_a_container_in_version_2(groups, eight_cpus, limit, count):
    groups.belongs_to("0::/user/job\n")
    groups("user", cpu__max="900000 100000")
    groups("user/job", cpu__max=limit)
    assert control_groups.usable_cpus() == count


@pytest.mark.parametrize(("folder", "quota", "count"), [("cpu", 300000, 3), ("cpu,cpuacct", 250000, 2), ("cpu", -1, 8)])
def test_processors_of_a_container_in_version_1(groups, eight_cpus, folder, quota, count):
    groups.belongs_to("7:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n0::/\n")
    groups(f"{folder}/docker/abc", cpu__cfs_quota_us=quota, cpu__cfs_period_us=100000)
    assert control_groups.usable_cpus() == count


def test_processors_that_the_process_may_run_on(groups, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 5})
    groups(".", cpu__max="400000 100000")
    assert control_groups.usable_cpus() == 2


LIMITED = """
import resource
import psutil
from specialize.engine import control_groups, memory
limit = psutil.Process().memory_info().vms + (3 << 30)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
print(limit, memory.total_memory_bytes("cpu"), memory.available_memory_bytes("cpu"), psutil.Process().memory_info().vms)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="address-space limits are counted on Linux only")
def test_address_space_limit_counts():
    done = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True, check=True)
    limit, total, available, held = map(int, done.stdout.split())
    assert total <= 0.75 * limit + 1
    assert available <= max(0.75 * limit - held, 0) + (16 << 20)
