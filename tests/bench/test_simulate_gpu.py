"""The simulation of GPUs at toy size: what it counts is what the engine says that it computes."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).parents[2] / "bench" / "simulate_gpu.py"
TOY = argparse.Namespace(toy=True, facts=3, samples=2, edit_facts=2)


@pytest.fixture(scope="module")
def simulation(bench):
    return bench("simulate_gpu")


@pytest.mark.parametrize("name", ["GPT2-XL", "GPT-J-6B", "Llama-3-8B"])
def test_products_of_tracing_are_those_of_the_plan(simulation, name):
    work = simulation.tracing(name, TOY)
    assert simulation.counted(work)["counted_flops"] == work.flops > 0


def test_rows_of_tracing_are_those_of_the_plan(simulation):
    """A layer's outputs are sums of two rows: three of 20 values in bfloat16 are moved, and two indices."""
    work = simulation.tracing("GPT2-XL", TOY)
    sums = [each.moved for each in work.operations if each.name == "triton_add" and "add_rows" in each.asked]
    assert len(sums) == work.about["layers"]
    assert sum(sums) == work.rows * (3 * 20 * 2 + 2 * 4)


def test_products_of_editing_are_those_of_the_formulas(simulation):
    works = list(simulation.editing("GPT-J-6B", TOY))
    assert len(works) == 6
    for work in works:
        assert simulation.counted(work)["counted_flops"] == work.flops > 0


def test_host_and_device_work_beside_each_other_until_one_waits(bench):
    gpu = bench("gpu_operations")
    small = gpu.Operation("add", "", "rows")
    large = gpu.Operation("copy", "", "rows", moved=26 * 10**9)  # 10 ms
    wait = gpu.Operation("wait", "", "host", "wait")
    assert gpu.times([small] * 3, gpu.H100).total == pytest.approx(3 * 8e-6 + 2.5e-6)
    assert gpu.times([large, *[small] * 3], gpu.H100).total == pytest.approx(8e-6 + 10e-3 + 3 * 2.5e-6)
    waited = gpu.times([large, wait, small], gpu.H100)
    assert waited.total == pytest.approx(8e-6 + 10e-3 + 8e-6 + 2.5e-6)
    assert (waited.host, waited.device) == (pytest.approx(16e-6), pytest.approx(10e-3 + 2.5e-6))


def test_a_product_takes_whole_waves_of_tiles(bench):
    gpu = bench("gpu_operations")

    def seconds(rows, out):
        return gpu.Operation("mm", "", "products", product=(rows, 4096, out)).seconds(gpu.H100)

    assert seconds(128 * 132, 256) == seconds(128, 256)
    assert seconds(128 * 132 + 1, 256) - 3e-6 == pytest.approx(2 * (seconds(128, 256) - 3e-6))
    ideal = 2 * 128 * 132 * 4096 * 256 / 800e12
    assert seconds(128 * 132, 256) - 3e-6 == pytest.approx(ideal * (4096 + 250) / 4096)


def test_the_script(tmp_path):
    measured = {"model": "GPT2-XL", "dtype": "bfloat16", "seconds_per_fact": 0.125, "efficiency": 0.5}
    report = {"title": "Measured", "date": "2030-01-02", "machine": {"device": "NVIDIA H100"}, "results": [measured]}
    (tmp_path / "gpu-nvidia-h100-2030-01-02.json").write_text(json.dumps(report))
    options = ("--toy", "--facts", "2", "--samples", "2", "--models", "GPT2-XL", "--parts", "tracing")
    done = subprocess.run(
        [sys.executable, SCRIPT, *options, "--out", tmp_path],
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("gpu-predicted-toy-*.json")
    predicted = json.loads(path.read_text())
    assert [result["device"] for result in predicted["results"]] == ["H100", "A100", "H200"]
    for result in predicted["results"]:
        assert result["counted_flops"] == result["flops"]
        assert result["device_seconds"] == pytest.approx(sum(result["parts"].values()))
        assert 0 < result["efficiency_of_first"] < result["efficiency"] < 1
        assert result["seconds"] >= 0.99 * max(result["host_seconds"], result["device_seconds"])
    rows = [line for line in done.stdout.splitlines() if line.startswith("| GPT2-XL | ")]
    assert ["0.125 (2030-01-02)" in row for row in rows] == [True, False, False]
