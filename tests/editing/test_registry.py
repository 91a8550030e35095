"""The method of docs/editors.md goes through everything that edits; installed packages bring their methods."""

import os
import subprocess
import sys

import polars as pl
import pytest
import torch
from helpers.closed_form_cases import REQUESTS, SEARCH, Case, assert_plain, parts
from helpers.edit_command import arguments, read, run_json
from helpers.editing_cases import CONTEXTS, FULL, editor, random_moments
from helpers.page_commands import blocks
from helpers.sweeps import swept
from oracles import closed_forms

import causalcone as cc
from causalcone.engine.edit.methods.registry import method_named, methods, register, unregister
from causalcone.engine.errors import ExperimentError
from causalcone.runners.edits.presets import load_hparams

EXAMPLE, CLOSED_FORM = blocks("docs/editors.md", "python")
OWN = [
    "rome",
    "memit",
    "memit_joint",
    "finetune",
    "ft-m",
    "locft",
    "memit-seq",
    "memit-merge",
    "emmet",
    "alphaedit",
    "encore",
    "ultraedit",
]
PRESET = """
[mine]
edit_layers = [1, 3]
sigma = 0.4
tracing_window = 3
aggregate = "mean"
defaults.random.norm = 0.25
[mine.problems.error_injection]
random.seed = 7
"""


@pytest.fixture(scope="module", autouse=True)
def example():
    """What the page's code defines; the method is forgotten afterwards."""
    namespace = {"__name__": "example"}
    exec(EXAMPLE, namespace)
    yield namespace
    unregister("random")


@pytest.fixture
def preset(tmp_path):
    (tmp_path / "mine.toml").write_text(PRESET)
    return tmp_path / "mine.toml"


@pytest.fixture(scope="module")
def study(file, tmp_path_factory):
    """A sweep with the method beside fine-tuning."""
    out = tmp_path_factory.mktemp("study") / "out"
    changes = ('edit.methods=["finetune:1","random:2"]', 'edit.problems=["error_injection"]', 'edit.set=["norm=0.5"]')
    assert swept(file, out, *changes).status == "complete"
    return out


def test_the_editor_has_it(model, tokenizer, example):
    editor = cc.Editor(model, tokenizer)
    requests = editor.requests(FULL[:2], filtered=False)
    (first, second), _ = editor.batches(requests, "random", (0, 2), 2, example["RandomHparams"](norm=0.5))
    assert [first.method, first.window, first.layer, second.layer] == ["random", 2, 0, 2]
    assert list(first.delta.changes) == [0]
    assert list(second.delta.changes) == [1, 2]
    assert second.delta_norm == pytest.approx(0.5 * 2**0.5)
    scored = [probes.num_rows for _, probes in editor.run(requests, "random", (0, 2))]
    assert len(scored) == 4
    assert all(scored)
    with pytest.raises(ExperimentError, match="hyperparameters are RomeHparams; give RandomHparams"):
        editor.batches(requests, "random", (0,), hparams=cc.RomeHparams())


def test_hyperparameters_are_checked_by_their_types(example):
    for name, value, reason in (("norm", -1.0, "not negative"), ("seed", 0, "whole number"), ("norm", None, "finite")):
        with pytest.raises(ExperimentError, match=f"{name} is .*{reason}"):
            example["RandomHparams"](**{name: value})


def test_the_command_edit_has_it(file, preset, tmp_path, run):
    out = tmp_path / "out"
    options = {"method": "random:2", "preset": preset, "moments": None, "contexts": None, "limit": 2}
    code, printed, error = run(*arguments(file.parent, out, "--set", "random.norm=2", "--plot", **options))
    assert (code, error) == (0, "")
    (kept,) = run_json(out)["methods"]
    assert kept == {"method": "random", "window": 2, "hparams": {"norm": 2.0, "seed": 7}}
    assert (run_json(out)["moments"], run_json(out)["contexts"]) == (None, None)
    edits, probes, _ = read(out)
    assert edits.select("method", "window", "status").unique().rows() == [("random", 2, "done")]
    assert edits["layer"].unique().to_list() == [0, 2]
    assert not probes.is_empty()
    assert "Random of 2 layers: mean scores of 2 facts by layer" in printed
    unknown = arguments(file.parent, out, "--set", "random.speed=2", "--overwrite", **options)
    assert "no chosen method has that hyperparameter; there are norm, seed" in run(*unknown)[2]


def test_presets_have_it(preset):
    assert vars(load_hparams(str(preset), "random", "error_injection", 2)) == {"norm": 0.25, "seed": 7}
    preset.write_text(PRESET.replace("random.seed", "random.speed"))
    with pytest.raises(ExperimentError, match=r"error_injection\.random cannot have 'speed', only norm, seed"):
        load_hparams(str(preset), "random", "error_injection")
    preset.write_text(PRESET.replace("random.seed", "other.seed"))
    with pytest.raises(ExperimentError, match=r"cannot have 'other', only rome, memit, finetune, .*random"):
        load_hparams(str(preset), "random", "error_injection")


def test_tuning_tries_its_grid(file, tmp_path, run):
    out = tmp_path / "out"
    options = {"method": "random", "layer": 1, "moments": None, "contexts": None, "limit": 2}
    command = arguments(file.parent, out, "--quiet", "--give-up", "1", **options)
    assert run("tune", *command[1:])[0] == 0
    table = pl.read_parquet(out / "tuning.parquet")
    assert table["norm"].to_list() == [0.5, 1.0, 2.0]
    chosen = table.filter("chosen")["norm"].item()
    assert vars(load_hparams(str(out / "preset.toml"), "random", "error_injection")) == {"norm": chosen, "seed": 1}


def test_a_sweep_edits_with_it_and_its_results_are_analysed(study, tmp_path, run):
    edits = cc.analysis.read_edits(study / "edits")
    assert set(edits.select("method", "window", "status").unique().rows()) == {
        ("random", 2, "done"),
        ("finetune", 1, "done"),
    }
    code, printed, error = run("analyze", study, "--out", tmp_path / "analysis", "--no-figures", "--draws", "100")
    assert code == 0, error
    tables = "".join(file.read_text() for file in (tmp_path / "analysis").rglob("*.csv"))
    assert "random" in tables
    code, printed, error = run("report", study, "--out", tmp_path / "report.html", "--draws", "100")
    assert code == 0, printed + error
    assert "random-2" in (tmp_path / "report.html").read_text()


def test_a_sweep_is_planned_with_it(file, run):
    changes = ("--set", 'edit.methods=["random:2"]', "--set", "edit.set=[]")
    code, printed, error = run("sweep", file, "--plan", *changes)
    assert (code, error) == (0, "")
    assert "error injection" in printed
    assert "contexts" not in printed


def test_the_order_of_methods_is_that_of_the_package_first(example):
    assert list(methods()) == [*OWN, "random"]
    assert method_named("random") is example["RANDOM"]


def test_names_are_taken_once():
    other = method_named("random")
    assert register(other) is other
    with pytest.raises(ExperimentError, match="an editing method 'rome' already"):
        register(type(other)(**{**vars(other), "name": "rome"}))
    with pytest.raises(ExperimentError, match="is not a Method"):
        register("rome")


# --- a closed form ---


@pytest.fixture
def betaedit():
    """The case of the page's closed form, beside the plain one of its paper."""
    namespace = {"__name__": "closed_form"}
    exec(CLOSED_FORM, namespace)
    hparams = namespace["BetaEditHparams"](**SEARCH, covariance_weight=2.0, ridge=4.0, null_space=1.0)

    def form(moments):
        spaces = {layer: closed_forms.null_space(moment, "eigenvalue", 1.0) for layer, moment in moments.items()}

        def change(layer, K, R, H):
            P, ridge = spaces[layer], 4.0 * torch.eye(len(K), dtype=torch.float64)
            return torch.linalg.solve(P @ (K @ K.T + H + 2.0 * moments[layer].double()) + ridge, P @ K @ R.T).T

        return change

    yield Case("betaedit", hparams, form)
    unregister("betaedit")


def test_the_closed_form_of_the_page_is_that_of_its_paper(model, betaedit):
    assert len(CLOSED_FORM.splitlines()) < 80
    moments, batches = random_moments(model), parts(REQUESTS[:4], 2)
    sequence = betaedit.sequence(editor(model, moments, CONTEXTS[1:2]), REQUESTS[:4], 2)
    assert sequence.history is not None
    plain = betaedit.plain(model, moments, batches, CONTEXTS[1:2])
    for batch, expected in zip(sequence, plain, strict=True):
        assert_plain(batch.delta, expected, 1e-8)


def test_the_command_edits_in_sequence_by_it(file, betaedit, tmp_path, run):
    out = tmp_path / "out"
    options = {"method": "betaedit:2", "layers": 2, "batch": 2, "limit": 4, "set": "null_space=0.5"}
    code, printed, error = run(*arguments(file.parent, out, "--set", "steps=2", "--sequential", **options))
    assert code == 0, error
    assert "betaedit-2" in printed
    ranks = run_json(out)["results"]["notes"]["betaedit:2"]["null_space_rank"]
    rows = cc.analysis.read_checkpoints(out / "checkpoints").filter(group="model", edits=4)
    assert dict(rows.select("metric", "post").rows())["null_space_rank.2"] == ranks["2"] > 0


# --- installed packages ---


@pytest.fixture
def installed(tmp_path):
    """A folder with two packages, as an installer leaves them: one brings the method, one cannot be imported."""
    (tmp_path / "random_edits.py").write_text(EXAMPLE)
    for name, value in (("random", "random_edits:RANDOM"), ("broken", "nowhere:METHOD")):
        info = tmp_path / f"{name}_edits-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-edits\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[causalcone.editing_methods]\n{name} = {value}\n")
    return tmp_path


def test_installed_packages_bring_methods(installed):
    script = (
        "from causalcone.engine.edit.methods.registry import method_named, methods\n"
        "print(method_named('random').hparams(), *methods())\n"
        "try:\n    method_named('broken')\nexcept Exception as error:\n    print(error)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    found = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    first, second = found.stdout.splitlines()
    assert first == f"RandomHparams(norm=1.0, seed=1) {' '.join(OWN)} random"
    assert "unknown method 'broken'" in second
    assert "broken cannot be loaded from nowhere:METHOD: No module named 'nowhere'" in second
    assert "No module named 'nowhere'" in found.stderr


@pytest.mark.slow
def test_workers_of_a_cluster_have_installed_methods(file, installed, tmp_path):
    """The command starts a cluster, whose workers find the package by themselves."""
    pytest.importorskip("ray")
    out = tmp_path / "out"
    changes = ('edit.methods=["random:2"]', 'edit.problems=["error_injection"]', 'edit.set=["norm=0.5"]')
    options = [part for change in changes for part in ("--set", change)]
    command = [sys.executable, "-m", "causalcone", "sweep", file, *options, "--cluster", "local", "--workers", "2"]
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    subprocess.run([*map(str, command), "--out", str(out)], env=environment, cwd=tmp_path, check=True)
    edits, probes, _ = read(out)
    assert edits["method"].unique().to_list() == ["random"]
    assert torch.isfinite(torch.tensor(probes["p_pre"].to_list())).all()
