"""The calibration: what it measures, and how its result is kept."""

import dataclasses
import gc
import json
import os

import pytest
import torch

from tightfit.core import calibrate as calibration
from tightfit.core import microbench
from tightfit.core.calibrate import built_in, cache_path, calibrate, coefficients


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calibration._kept.cache_clear()
    yield
    calibration._kept.cache_clear()


@pytest.fixture
def measured(monkeypatch):
    """The benchmark replaced by the built-in figures; a list with an entry per run of it."""
    runs = []

    def measure(say):
        say("operators")
        runs.append(len(runs))
        return dataclasses.replace(built_in(), measured=True, machine=calibration.machine(), fresh=1e-10 * len(runs))

    monkeypatch.setattr(calibration, "_measure", measure)
    return runs


@pytest.fixture
def small(monkeypatch):
    """A benchmark of next to nothing."""
    monkeypatch.setattr(microbench, "POOL", 1 << 14)
    monkeypatch.setattr(microbench, "SIZES", (256, 4096))
    monkeypatch.setattr(microbench, "SINGLE", (8, 16))
    monkeypatch.setattr(microbench, "BATCHED", (8, 16))
    monkeypatch.setattr(microbench, "LENGTHS", (4, 8))
    monkeypatch.setattr(microbench, "CHANNELS", 16)
    monkeypatch.setattr(microbench, "FRESH_BYTES", 1 << 12)
    monkeypatch.setattr(microbench, "WINDOW", 1e-5)
    monkeypatch.setattr(microbench, "WARM_SECONDS", 1e-5)


# -- the result -------------------------------------------------------------------------------------------------------


def test_without_a_calibration_the_built_in_figures_serve(measured):
    assert coefficients() == built_in()
    assert not coefficients().measured and not measured


def test_a_calibration_is_kept_and_found_again(measured):
    found = calibrate()
    assert cache_path().is_file()
    assert coefficients() == found and coefficients().measured
    assert calibrate(force=False) == found and len(measured) == 1
    assert calibrate() != found and len(measured) == 2  # forced
    assert coefficients().fresh == pytest.approx(2e-10)  # what was kept in memory is not what was before


def test_measuring_where_nothing_is_known(measured):
    assert coefficients(measure=True).measured
    assert len(measured) == 1


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"machine": 1}', "null"])
def test_a_damaged_cache_is_no_calibration(measured, damage):
    calibrate()
    good = json.loads(cache_path().read_text())
    cache_path().write_text(damage)
    calibration._kept.cache_clear()
    assert coefficients() == built_in()
    cache_path().write_text(json.dumps({**good, "coefficients": {}}))
    calibration._kept.cache_clear()
    assert coefficients() == built_in()


def test_another_machine_version_or_thread_count_is_another_calibration(measured, monkeypatch):
    calibrate()
    kept = json.loads(cache_path().read_text())
    for change in ({"device": "another"}, {"torch": "1.0"}, {"threads": 77}, {"format": 0}):
        cache_path().write_text(json.dumps({**kept, "machine": {**kept["machine"], **change}}))
        calibration._kept.cache_clear()
        assert not coefficients().measured
    before, threads = cache_path(), torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    assert cache_path() != before and cache_path().parent == before.parent


def test_a_cache_that_cannot_be_written_is_no_failure(measured, tmp_path):
    (tmp_path / "tightfit").write_text("a file where the folder should be")
    assert calibrate().measured
    assert not coefficients().measured


def test_a_relative_cache_folder_is_ignored(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "somewhere")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_path().is_relative_to(tmp_path / ".cache")


def test_the_collector_and_the_random_numbers_are_as_before(measured):
    state = torch.get_rng_state()
    lines = []
    calibrate(progress=lines.append)
    assert gc.isenabled() and torch.equal(torch.get_rng_state(), state)
    assert lines == ["operators"]


def test_the_headline_is_json(measured):
    found = calibrate()
    figures = json.loads(json.dumps(found.headline(), allow_nan=False))
    assert all(value > 0 for value in figures.values())
    no_faults = dataclasses.replace(found, fresh=0.0)
    assert len(no_faults.headline()) == len(figures) - 1


# -- the benchmark ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_probe_runs_and_is_timed(small, dtype):
    pools = microbench.Pools.of(dtype)
    with torch.no_grad():
        found = microbench.medians(lambda turn: calibration._probes(pools, turn), limit=0.0)
        for layout in range(3):
            assert {probe.key for probe in calibration._probes(pools, layout)} == found.keys()
    assert all(0 < seconds < 1 for seconds in found.values())


def test_all_kinds_of_the_tables_are_measured(small):
    pools = microbench.Pools.of(torch.float32)
    with torch.no_grad():
        assert {probe.key[0] for probe in microbench.kind_probes(pools)} == built_in().kinds["float32"].keys()


def test_layouts_of_a_product_are_the_same_product(small):
    pools = microbench.Pools.of(torch.float32)
    for batch in (1, 3):
        for layout in range(3):
            out = microbench._product(pools, batch, (5, 6, 7), layout)(0)
            assert out.shape == ((batch, 5, 6) if batch > 1 else (5, 6))


def test_the_median_of_the_passes_counts(monkeypatch):
    taken = iter([3.0, 1.0, 2.0, 100.0, 2.5])
    monkeypatch.setattr(microbench, "measure_probe", lambda probe: next(taken))
    one = microbench.Probe(("only",), lambda turn: None)
    assert microbench.medians(lambda turn: iter([one]), limit=60.0, passes=5) == {("only",): 2.5}


def test_slices_follow_each_other_and_come_round():
    pool = torch.arange(100.0)
    part = microbench.slices(pool, 5, 4)
    assert [int(part(turn)[0, 0]) for turn in range(6)] == [0, 20, 40, 60, 80, 0]


def test_a_grid_is_full_though_the_largest_products_are_not_run():
    sizes = (8, 32)
    found = {("single", m, n, k): m * n * k * 1e-9 for m in sizes for n in sizes for k in sizes if m * n * k < 32**3}
    grid = calibration._grid(found, "single", sizes, 1)
    assert len(grid) == 8 and all(seconds > 0 for seconds in grid.values())
    assert grid[32, 32, 32] == pytest.approx(4 * grid[8, 32, 32])


def test_curves_leave_out_what_a_call_costs_before_it_computes():
    found = {("add", microbench.SIZES[0]): 5e-6, ("add", microbench.SIZES[1]): 9e-6, ("single", 8, 8, 8): 1.0}
    assert calibration._curves(found) == {"add": [(microbench.SIZES[1], pytest.approx(4e-6))]}


@pytest.mark.slow
def test_a_whole_calibration(monkeypatch):
    import time

    start = time.perf_counter()
    found = calibrate()
    assert time.perf_counter() - start < 120  # under a minute on a machine that is not busy
    assert found.kinds.keys() == {"float32", "bfloat16"}
    assert 0 < found.dispatch["optimizer"] < found.dispatch["forward"] < 1e-3
    assert found.fresh > 0
    single = found.products["float32"]["single"]
    assert single[8, 8, 8] < single[128, 128, 128] < single[2048, 2048, 2048]
    assert os.path.getsize(cache_path()) < 100_000
