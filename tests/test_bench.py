"""The benchmark scripts at toy size: they run, and what they report is complete and consistent. No time is judged."""

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench"
RESULT = {
    *("model", "dtype", "facts", "restorations", "seconds", "seconds_of_repeats", "facts_per_second"),
    *("planning_seconds", "passes", "rows", "flops", "attention_flops", "naive_flops", "flops_ratio", "peak_bytes"),
    *("predicted_peak_bytes", "weight_bytes", "largest_relative_effect", "matmul", "efficiency", "naive"),
    *("ratio_to_naive_same_dtype", "ratio_to_naive_float32"),
}
NAIVE = {
    *("dtype", "restorations", "restorations_timed", "scaled", "seconds_timed", "seconds", "facts_per_second"),
    *("peak_bytes", "efficiency", "engine_difference"),
}


def run(script, out, *options):
    """What the script wrote and printed."""
    command = [sys.executable, BENCH / script, "--toy", "--samples", "2", "--threads", "1", "--out", out, *options]
    done = subprocess.run(command, cwd=out, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("*.json")
    return json.loads(path.read_text()), done.stdout


def check(report, text):
    assert {"title", "date", "machine", "versions", "tf32", "prompts", "states", "samples"} <= report.keys()
    assert {"device", "cpu", "cores", "flags", "threads"} <= report["machine"].keys()
    assert {"python", "torch", "transformers", "causalcone", "commit"} <= report["versions"].keys()
    assert "one forward of the clean and all corrupted sequences" in report["naive"]
    assert report["title"] in text
    assert report["samples"] == 2
    for result in report["results"]:
        check_result(result)
        assert f"| {result['model']} | engine, {result['dtype']} |" in text
    exact = {result["model"]: result for result in report["results"] if result["dtype"] == "float32"}
    rounded = [result for result in report["results"] if result["dtype"] == "bfloat16"]
    assert len(exact) == len(rounded) == len(report["results"]) / 2
    for result in rounded:
        reference = exact[result["model"]]
        deviation = result["deviation_from_float32"]
        assert deviation["restorations"] == min(result["restorations"], reference["restorations"])
        assert 0 < deviation["largest_relative"] < 0.1
        assert result["weight_bytes"] == reference["weight_bytes"] / 2
        per_flop = reference["naive"]["seconds"] / reference["naive_flops"]
        expected = per_flop * result["naive_flops"] / result["seconds"]
        assert result["ratio_to_naive_float32"] == pytest.approx(expected)


def check_result(result):
    assert result.keys() >= RESULT
    naive, matmul = result["naive"], result["matmul"]
    assert naive.keys() >= NAIVE
    assert all(math.isfinite(value) for value in numbers(result))
    rate = matmul["flops_per_second"]
    assert result["seconds"] > 0
    assert result["facts_per_second"] == pytest.approx(result["facts"] / result["seconds"])
    assert result["efficiency"] == pytest.approx(result["flops"] / result["seconds"] / rate)
    assert result["flops_ratio"] == pytest.approx(result["naive_flops"] / result["flops"])
    assert result["ratio_to_naive_same_dtype"] == pytest.approx(naive["seconds"] / result["seconds"])
    assert naive["dtype"] == result["dtype"]
    assert naive["restorations"] == result["restorations"]
    assert naive["scaled"] == (naive["restorations_timed"] < naive["restorations"])
    share = naive["restorations_timed"] / naive["restorations"]
    assert naive["seconds"] * share == pytest.approx(naive["seconds_timed"])
    difference = naive["engine_difference"]
    assert difference["restorations"] == naive["restorations_timed"]
    assert difference["largest"] < (1e-5 if result["dtype"] == "float32" else 1e-3)
    assert difference["largest_relative"] < (1e-3 if result["dtype"] == "float32" else 0.1)


def numbers(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for each in value for number in numbers(each)]
    return [value] if isinstance(value, int | float) else []


def test_trace(tmp_path):
    report, text = run("trace.py", tmp_path, "--prompts", "2", "--repeats", "2", "--naive-fraction", "0.1")
    check(report, text)
    assert [result["facts"] for result in report["results"]] == [2, 2]
    assert all(len(result["seconds_of_repeats"]) == 2 for result in report["results"])
    naive = report["results"][0]["naive"]
    assert naive["restorations_timed"] == round(0.1 * naive["restorations"])


def test_gpu_script_on_the_cpu(tmp_path):
    few = ("--facts", "3", "--seconds", "0.5", "--naive-seconds", "0.1")
    report, text = run("gpu.py", tmp_path, "--device", "cpu", *few)
    check(report, text)
    assert {result["model"] for result in report["results"]} == set(report["shapes"])
    assert "GPT-2's architecture" in report["note"]
    assert report["note"] in text


@pytest.mark.gpu
def test_gpu_script(tmp_path):
    report, text = run("gpu.py", tmp_path, "--facts", "20", "--seconds", "2", "--naive-seconds", "1")
    check(report, text)
    assert report["machine"]["device"] != "cpu"


@pytest.fixture
def bench(monkeypatch):
    """Imports the scripts' helpers, which lie beside them."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(BENCH)])
    return importlib.import_module


@pytest.mark.parametrize("count", [20, 40])
def test_generated_prompts_have_the_lengths_of_the_real_ones(bench, count):
    workload = bench("workload")
    found = workload.describe_prompts(*workload.generated(count, 500), "generated")
    assert found["mean_tokens"] == pytest.approx(8.4)
    assert found["mean_subject_tokens"] == pytest.approx(4.15)
    assert found["mean_subject_start"] == pytest.approx(1.6)


def test_generated_targets_are_one_token(bench):
    facts, tokenizer = bench("workload").generated(5, 500)
    assert [len(tokenizer(" " + fact.target_true)["input_ids"]) for fact in facts] == [1] * 5


def test_generated_lengths_are_those_of_the_counterfact_prompts(bench):
    workload, data = bench("workload"), BENCH.parents[1] / "shared" / "data"
    if not data.is_dir():
        pytest.skip("the CounterFact prompts are not here")
    facts, tokenizer = workload.counterfact(data, 20)
    found = []
    for fact in facts:
        single = workload.describe_prompts([fact], tokenizer, "")
        before, subject = int(single["mean_subject_start"]), int(single["mean_subject_tokens"])
        found.append((before, subject, int(single["mean_tokens"]) - before - subject))
    assert tuple(found) == workload.LENGTHS


def test_a_recorded_section_replaces_the_one_before(bench, tmp_path):
    record = bench("report").record
    page = tmp_path / "RESULTS.md"
    page.write_text("# Results\n")
    for text, name in (("old trace", "trace"), ("on a GPU", "gpu x"), ("new trace", "trace")):
        record(text, name, page)
    assert page.read_text() == (
        "# Results\n\n<!-- begin trace -->\nnew trace\n<!-- end trace -->\n\n"
        "<!-- begin gpu x -->\non a GPU\n<!-- end gpu x -->\n"
    )
