"""The benchmark of sweeps at toy size: it runs, and compares what it says. No time is judged."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from causalcone.runners.sweep.inputs.units import Unit

BENCH = Path(__file__).parents[2] / "bench"
SIZES = ("--facts", "12", "--unit", "4", "--prompts", "4", "--prompts-unit", "2", "--threads", "1")


def run(out, study):
    command = [sys.executable, BENCH / "sweep.py", "--toy", "--studies", study, "--out", out, *SIZES]
    done = subprocess.run(command, cwd=out, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("*.json")
    (result,) = json.loads(path.read_text())["results"]
    return result, done.stdout


@pytest.mark.demo
def test_long(tmp_path):
    result, text = run(tmp_path, "long")
    assert (result["facts"], result["compared"]) == (12, 6)
    names = ["filter", "trace restore", "zero zero", "edit error_injection/rome-1", "edit error_injection/finetune-1"]
    assert [stage["name"] for stage in result["stages"]] == names
    for stage in result["stages"]:
        assert min(value for name, value in stage.items() if name != "name") > 0
        assert f"| {stage['name']} | " in text


@pytest.mark.slow
def test_cluster(tmp_path):
    pytest.importorskip("ray")
    result, text = run(tmp_path, "cluster")
    assert result["workers"] == 2
    assert result["largest_difference"] < 1e-6
    assert f"{result['ratio']:.0%} of it" in text


def test_the_first_and_the_last_are_compared(bench):
    sweep = bench("sweep")
    steps = [sweep.Step(Unit("trace", "", k, (0, 1), 2), 1.0 + k, 100 * (k + 1)) for k in range(4)]
    assert sweep.taken(steps, 3) == steps[:2]
    found = sweep.ends(steps, 3)
    assert (found["first_seconds_per_fact"], found["last_seconds_per_fact"]) == (0.75, 1.75)
    assert (found["first_peak_bytes"], found["last_peak_bytes"], found["all_peak_bytes"]) == (200, 400, 400)
