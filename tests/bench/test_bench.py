"""The benchmark scripts at toy size: they run, and what they report is complete and consistent. No time is judged."""

import argparse
import json
import math
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parents[2] / "bench"
BARE = (BENCH.parent / "tests" / "support" / "bare.py",)
"""Where only what the engine needs is installed, as it may be on a machine with a GPU."""
RESULT = {
    *("dtype", "facts", "restorations", "seconds", "seconds_of_repeats", "facts_per_second", "peak_bytes"),
    *("weight_bytes", "largest_relative_effect", "matmul", "efficiency", "naive", "ratio_to_naive_same_dtype"),
    *("published", "ratio_to_published_same_dtype"),
}
PLANNED = {
    *("planning_seconds", "passes", "rows", "flops", "attention_flops", "naive_flops", "flops_ratio"),
    "predicted_peak_bytes",
}
PROMPTS = {"source": "none", "mean_tokens": 1.0, "mean_subject_tokens": 1.0}
NAIVE = {
    *("dtype", "restorations", "restorations_timed", "scaled", "seconds_timed", "seconds", "facts_per_second"),
    *("peak_bytes", "efficiency", "engine_difference", "flops", "sequences", "together"),
}


def run(script, out, *options, through=()):
    """What the script wrote and printed."""
    command = [
        sys.executable,
        *through,
        BENCH / script,
        "--toy",
        "--samples",
        "2",
        "--threads",
        "1",
        "--out",
        out,
        *options,
    ]
    done = subprocess.run(command, cwd=out, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("*.json")
    return json.loads(path.read_text()), done.stdout


def check_report(report, text):
    about = {"title", "date", "machine", "versions", "tf32", "prompts", "samples", "naive", "efficiency"}
    assert about <= report.keys()
    assert {"device", "cpu", "cores", "flags", "threads"} <= report["machine"].keys()
    assert {"python", "torch", "transformers", "causalcone", "commit"} <= report["versions"].keys()
    assert report["title"] in text
    assert report["naive"] in text
    assert report["published"] in text
    assert "for many states of a fact together" in report["naive"]
    assert report["samples"] == 2


def check(report, text):
    check_report(report, text)
    assert "one forward of the clean and all corrupted sequences" in report["published"]
    assert report["states"] == [["hidden", 1], ["mlp", 10], ["attn", 10]]
    for result in report["results"]:
        assert {"model", "ratio_to_naive_float32", "ratio_to_published_float32"} | PLANNED <= result.keys()
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
        for way in ("naive", "published"):
            per_flop = reference[way]["seconds"] / reference[way]["flops"]
            expected = per_flop * result[way]["flops"] / result["seconds"]
            assert result[f"ratio_to_{way}_float32"] == pytest.approx(expected)


def check_result(result):
    assert result.keys() >= RESULT
    planned = result.keys() >= PLANNED
    assert planned or not PLANNED & result.keys()
    assert all(math.isfinite(value) for value in numbers(result))
    rate = result["matmul"]["flops_per_second"]
    assert result["seconds"] > 0
    assert result["facts_per_second"] == pytest.approx(result["facts"] / result["seconds"])
    if planned:
        assert result["efficiency"] == pytest.approx(result["flops"] / result["seconds"] / rate)
        assert result["flops_ratio"] == pytest.approx(result["naive_flops"] / result["flops"])
        more = result["naive_flops"] / result["published"]["flops"] - 1  # for the runs without any restoration
        assert 0 < more < 2 * result["facts"] / result["restorations"]
        assert result["naive"]["flops"] < result["naive_flops"]
    else:
        assert result["efficiency"] is None
    assert result["published"]["together"] is None
    assert result["naive"]["together"] >= 1
    for way in ("naive", "published"):
        check_way(result, way, planned)


def check_way(result, name, planned):
    way = result[name]
    assert way.keys() >= NAIVE
    if planned:
        rate = result["matmul"]["flops_per_second"]
        assert way["efficiency"] == pytest.approx(way["flops"] / way["seconds"] / rate)
    else:
        assert way["efficiency"] is None
    assert result[f"ratio_to_{name}_same_dtype"] == pytest.approx(way["seconds"] / result["seconds"])
    assert way["dtype"] == result["dtype"]
    assert way["restorations"] == result["restorations"]
    assert way["scaled"] == (way["restorations_timed"] < way["restorations"])
    assert way["seconds"] >= way["seconds_timed"] > 0
    difference = way["engine_difference"]
    assert difference["restorations"] == way["restorations_timed"]
    assert difference["largest"] < (1e-5 if result["dtype"] == "float32" else 1e-3)
    assert difference["largest_relative"] < (1e-3 if result["dtype"] == "float32" else 0.1)


def numbers(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for each in value for number in numbers(each)]
    return [value] if isinstance(value, int | float) else []


@pytest.mark.slow
def test_trace(tmp_path):
    report, text = run("trace.py", tmp_path, "--prompts", "2", "--repeats", "2", "--naive-fraction", "0.1")
    check(report, text)
    assert [result["facts"] for result in report["results"]] == [2, 2]
    assert all(len(result["seconds_of_repeats"]) == 2 for result in report["results"])
    published = report["results"][0]["published"]
    assert published["restorations_timed"] == round(0.1 * published["restorations"])


METHODS = {
    "severed": "severed tracing",
    "zero": "zeroing",
    "joint": "joint restoration",
    "counterfactual": "counterfactual corruption",
    "heads": "restoration of single heads",
    "gradients": "integrated gradients",
}
FAMILIES = ["gpt2", "gptj", "gpt_neox", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "opt", "phi"]
FEW = ("--naive-fraction", "0.01", "--naive-least", "4")


def check_comparison(report, text, names):
    check_report(report, text)
    assert [result["name"] for result in report["results"]] == names
    for result in report["results"]:
        check_result(result)
        assert result["dtype"] == "float32"
        assert result["published"]["restorations_timed"] == max(4, round(0.01 * result["restorations"]))
        assert {"goal", "detail"} <= result.keys()
        assert len([line for line in text.splitlines() if line.startswith(f"| {result['name']} |")]) == 2
        assert f" {result['detail']} |" in text


@pytest.mark.slow
def test_methods(tmp_path):
    report, text = run("methods.py", tmp_path, "--prompts", "2", "--methods", ",".join(METHODS), *FEW)
    check_comparison(report, text, [result["name"] for result in report["results"]])
    by_method = {result["method"]: result for result in report["results"]}
    assert list(by_method) == list(METHODS)
    assert all(by_method[key]["name"].startswith(name) for key, name in METHODS.items())
    assert {key for key, result in by_method.items() if "flops" not in result} == {"zero", "gradients"}
    tokens = 2 * report["prompts"]["mean_tokens"]
    layers, heads = report["shape"]["n_layer"], report["shape"]["n_head"]
    counted = {key: by_method[key]["restorations"] for key in ("severed", "zero", "joint", "counterfactual")}
    assert counted == {
        "severed": layers * tokens,
        "zero": 2 * (layers + 1),
        "joint": 2 * 3 * layers,
        "counterfactual": 3 * layers * tokens,
    }
    first = by_method["gradients"]["prompts"]["mean_tokens"]
    assert [by_method[key]["facts"] for key in ("heads", "gradients")] == [1, 1]
    assert by_method["heads"]["restorations"] == heads * layers * first
    assert by_method["gradients"]["restorations"] == 3 * layers * first
    effects = {key: result["largest_relative_effect"] for key, result in by_method.items()}
    assert effects.pop("gradients") is None
    assert min(effects.values()) > 1e-5
    assert by_method["gradients"]["naive"]["engine_difference"]["largest"] > 0, "only states without gradient"


@pytest.mark.slow
def test_architectures(tmp_path):
    report, text = run("architectures.py", tmp_path, "--prompts", "1", *FEW)
    check_comparison(report, text, FAMILIES)
    assert {result["goal"] for result in report["results"]} == {5.5}
    assert all(result["largest_relative_effect"] > 1e-4 for result in report["results"])
    assert len({result["naive_flops"] for result in report["results"]}) > 2


def test_what_fails_is_named_and_the_rest_is_written(bench, tmp_path, capsys):
    report, command = bench("report"), bench("command")
    about = {
        "title": "t",
        "date": "2026-01-01",
        "compared": "c",
        "detail": "d",
        "naive": "n",
        "efficiency": "e",
        "published": "p",
    }
    about |= {**report.environment(torch.device("cpu")), "note": "n", "samples": 1, "prompts": PROMPTS}
    growing = report.Growing(about, ["good", "bad"], tmp_path, "few", None)
    with pytest.raises(SystemExit, match="not measured: bad"):
        command.run_each({"bad": lambda: 1 / 0, "good": lambda: {"skipped": "on purpose"}}, growing)
    (path,) = tmp_path.glob("few-*.json")
    assert [each["name"] for each in json.loads(path.read_text())["results"]] == ["good", "bad"]
    assert "Not measured: bad: ZeroDivisionError: division by zero." in capsys.readouterr().out


def test_other_measurements_of_the_day_are_kept(bench, tmp_path):
    growing = bench("report").Growing
    for samples in (1, 2, 1):
        report = growing({"date": "2026-01-01", "samples": samples}, ["a", "b"], tmp_path, "few", None)
        report.add({"name": "a" if len(report.report["results"]) == 0 else "b"})
    found = {path.name: len(json.loads(path.read_text())["results"]) for path in tmp_path.iterdir()}
    assert found == {"few-2026-01-01.json": 2, "few-2-2026-01-01.json": 1}


def test_names_are_chosen_from_a_list(bench):
    chosen = bench("command").chosen
    assert chosen("c,a,c", ("a", "b", "c")) == ["a", "c"]
    with pytest.raises(argparse.ArgumentTypeError, match="'magic' is none of a, b"):
        chosen("a,magic", ("a", "b"))


@pytest.mark.slow
def test_gpu_script_on_the_cpu(tmp_path):
    few = ("--parts", "tracing", "--facts", "3", "--seconds", "0.5", "--naive-seconds", "0.1")
    report, text = run("gpu.py", tmp_path, "--device", "cpu", *few, through=BARE)
    check(report, text)
    assert {result["model"] for result in report["results"]} == set(report["shapes"])
    assert set(report["shapes"]) == {"GPT2-XL", "GPT-J-6B", "Llama-3-8B"}
    assert report["note"] in text


@pytest.mark.slow
def test_kernels_on_the_cpu(tmp_path):
    """There they have their torch forms alone."""
    report, text = run("gpu.py", tmp_path, "--device", "cpu", "--parts", "kernels", through=BARE)
    names = [(result["name"], result["dtype"]) for result in report["results"]]
    assert len(names) == len(set(names)) == 17
    assert set(report["matmul_flops_per_second"]) == {"float32", "bfloat16"}
    for result in report["results"]:
        (rate,) = result["bytes_per_second"].values()
        assert rate > 0
        assert f"| {result['name']} | {result['dtype']} | " in text


@pytest.mark.slow
@pytest.mark.gpu(real=True)
def test_kernels(tmp_path):
    report, _ = run("gpu.py", tmp_path, "--parts", "kernels")
    for result in report["results"]:
        assert set(result["seconds"]) == {"torch", "triton"}
        assert result["difference"] < (1e-5 if result["dtype"] == "float32" else 2e-2)


@pytest.mark.slow
@pytest.mark.gpu(real=True)
def test_gpu_script(tmp_path):
    few = ("--parts", "tracing", "--facts", "20", "--seconds", "2", "--naive-seconds", "1")
    report, text = run("gpu.py", tmp_path, *few)
    check(report, text)
    assert report["machine"]["device"] != "cpu"


def test_what_is_measured_is_kept_where_the_rest_fails(bench, capsys):
    def results():
        yield {"model": "a"}
        raise RuntimeError("the device is gone")

    within = bench("gpu").within
    found = list(within(time.perf_counter() + 60, results(), {"model": "b"}))
    assert found == [{"model": "a"}, {"model": "b", "skipped": "RuntimeError: the device is gone"}]
    assert "the device is gone" in capsys.readouterr().err
    assert list(within(time.perf_counter(), results(), {"model": "b"})) == [
        {"model": "b", "skipped": "the time was up"}
    ]
    assert list(within(time.perf_counter() + 60, iter([]), {"model": "b"})) == []


def test_what_matters_most_is_measured_on_a_gpu_first(bench, monkeypatch):
    gpu = bench("gpu")
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--toy"])
    order = [(part, *named.values()) for part, named, _ in gpu.steps(torch.device("cpu"), gpu.parse())]
    assert order[:3] == [
        ("tracing", "GPT-J-6B", "bfloat16"),
        ("tracing", "GPT2-XL", "bfloat16"),
        ("editing", "editing, bfloat16"),
    ]
    assert next(iter(gpu.EDITED_LAYERS)) == "rome"
    assert len(set(order)) == len(order) == 9


def test_a_package_that_is_not_installed_has_no_version(bench, monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    report = bench("report")
    monkeypatch.setattr(report, "version", missing)
    assert report.environment(torch.device("cpu"))["versions"]["causalcone"] is None


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


def test_counterfactual_subjects_leave_the_lengths_as_they_are(bench):
    workload = bench("workload")
    facts, tokenizer, _ = workload.prompts(Path("no such folder"), 20, 500)
    for fact in facts:
        other = fact.prompt.format(fact.counterfactual_subject)
        assert other != fact.text
        assert len(tokenizer(other)["input_ids"]) == len(tokenizer(fact.text)["input_ids"])


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


@pytest.mark.slow
def test_streaming(tmp_path):
    report, text = run("streaming.py", tmp_path, "--prompts", "2", "--repeats", "1")
    resident, streamed = report["results"]
    assert (resident["name"], streamed["name"]) == ("resident", "stream")
    assert resident["read_bytes"] == 0 < streamed["read_bytes"]
    assert report["difference"]["largest"] == 0
    assert report["difference"]["restorations"] > 0
    assert report["speed"] == pytest.approx(resident["seconds"] / streamed["seconds"])
    assert min(report["read_bytes_per_second"], report["matmul"]["flops_per_second"]) > 0
    for result in report["results"]:
        assert PLANNED - {"planning_seconds"} <= result.keys()
        assert f"| {result['name']} | " in text
