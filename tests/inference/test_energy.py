"""Energy counters against a tree of files like that of Linux."""

import math
import os
import tempfile
from pathlib import Path

import pytest

from xlstm_scaling.inference.energy import LEAST_READINGS, find_meter, find_rapl, per_token_j


def make_zone(root, folder, name, energy_uj, range_uj=262_143_328_850):
    path = root / folder
    path.mkdir(parents=True)
    (path / "name").write_text(f"{name}\n")
    (path / "energy_uj").write_text(f"{energy_uj}\n")
    (path / "max_energy_range_uj").write_text(f"{range_uj}\n")
    return path / "energy_uj"


@pytest.fixture
def powercap(tmp_path):
    root = tmp_path / "powercap"
    (root / "intel-rapl").mkdir(parents=True)  # the control type itself
    counters = {
        "package-0": make_zone(root, "intel-rapl:0", "package-0", 1_000_000, 10_000_000),
        "core": make_zone(root, "intel-rapl:0:0", "core", 500_000),
        "dram": make_zone(root, "intel-rapl:0:1", "dram", 7_000_000),
        "package-1": make_zone(root, "intel-rapl:1", "package-1", 9_500_000, 10_000_000),
        "psys": make_zone(root, "intel-rapl:2", "psys", 3_000_000),
        "again": make_zone(root, "intel-rapl-mmio:0", "package-0", 1_000_000, 10_000_000),
    }
    return root, counters


def test_packages_and_memory_are_counted_once_and_counters_start_again(powercap):
    root, counters = powercap
    meter, reason = find_rapl(root)
    assert reason == "" and [zone.name for zone in meter.zones] == ["package-0", "dram", "package-1"]
    before = meter.read()
    counters["package-0"].write_text("3500000")  # 2.5 J
    counters["dram"].write_text("7250000")  # 0.25 J
    counters["package-1"].write_text("1000000")  # 1.5 J beyond the end of its range
    counters["core"].write_text("99000000")
    counters["psys"].write_text("99000000")
    counters["again"].write_text("99000000")
    assert meter.used_j(before, meter.read()) == pytest.approx(2.5 + 0.25 + 1.5)


def test_without_a_counter_there_is_a_reason(tmp_path, powercap):
    for root in (tmp_path / "nowhere", tmp_path):
        meter, reason = find_meter("cpu", root)
        assert meter is None and str(root) in reason
    root, counters = powercap
    for name in ("package-0", "dram", "package-1"):
        counters[name].write_text("garbage")
    assert find_rapl(root)[0] is None


def test_counters_that_only_root_may_read_are_said():
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        root.chmod(0o755)
        make_zone(root, "intel-rapl:0", "package-0", 1).chmod(0o400)
        user = os.geteuid()
        try:
            if user == 0:
                os.seteuid(65534)
            else:
                (root / "intel-rapl:0" / "energy_uj").chmod(0)
            meter, reason = find_rapl(root)
        finally:
            os.seteuid(user)
    assert meter is None and "root only" in reason


def test_energy_of_a_token_needs_a_time_that_the_counter_resolves():
    energies, interval = [2.0, 4.0], 1e-3
    long = [LEAST_READINGS * interval / 2] * 2
    assert per_token_j(energies, long, 30, interval) == pytest.approx(0.1)  # 6 J over 60 tokens
    assert math.isnan(per_token_j(energies, [x * 0.9 for x in long], 30, interval))
    assert math.isnan(per_token_j([], long, 30, interval))


def test_a_gpu_without_nvml_is_no_error():
    meter, reason = find_meter("cuda:0")
    assert meter is not None or "NVML" in reason
