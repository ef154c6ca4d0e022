"""`tightfit calibrate`: what it prints; the benchmark itself is replaced."""

import dataclasses
import json

import pytest
from typer.testing import CliRunner

from tightfit.cli import app
from tightfit.core import calibrate as calibration


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    calibration._kept.cache_clear()
    done = []

    def measure(say):
        say("operators")
        done.append(1)
        return dataclasses.replace(calibration.built_in(), measured=True, machine=calibration.machine())

    monkeypatch.setattr(calibration, "_measure", measure)
    yield done
    calibration._kept.cache_clear()


def run(*arguments):
    result = CliRunner().invoke(app, ["calibrate", *arguments])
    assert result.exit_code == 0, result.output
    return result


def test_it_measures_once_and_says_where_the_result_is(runs):
    first = run()
    assert "GFLOP/s" in first.stdout and "expected error" in first.stdout
    assert "measuring operators" in first.stderr
    assert str(calibration.cache_path()) in first.stdout.replace("\n", "")
    run()
    assert len(runs) == 1
    run("--again")
    assert len(runs) == 2


def test_json(runs):
    found = json.loads(run("--json").stdout)
    assert found["machine"] == calibration.machine()
    assert found["path"] == str(calibration.cache_path())
    assert all(value > 0 for value in found["figures"].values())
    assert 0 < found["median_error"] < found["worst_error"] < 1


def test_a_cache_that_cannot_be_written_is_said(runs, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert "not kept" in run().stdout
    assert json.loads(run("--json").stdout)["path"] is None
