"""Guards of what users rely on: files that were written before, the public API, the command line, tables and names.

What stands in ``artifacts/`` and ``snapshots/`` was written by ``make_artifacts.py``, by an earlier state of the code.
These tests say that today's code reads those files, goes on where they end, computes the same numbers and has the same
names. They import nothing but public names, so that they hold however modules are arranged.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import io
import json
import math
import os
import re
import runpy
import shutil
import signal
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import polars as pl
import pyarrow.parquet as pq
import pytest
import torch
import typer
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import causalcone as cc
from causalcone import analysis

HERE = Path(__file__).parent
ARTIFACTS, SNAPSHOTS = HERE / "artifacts", HERE / "snapshots"
DATA_SETS = ("traces", "gradients", "edits", "probes", "metrics")
READERS = {name: getattr(analysis, f"read_{name}") for name in DATA_SETS}
MOMENT_LAYERS = (0, 2)
"""Of the collection that was interrupted."""

STATES = (("hidden", 1), ("mlp", 3))
COMMANDS = {
    "trace": "trace --model model --facts facts.jsonl --state hidden:1 --state mlp:3 --samples 2 --sigma 0.4 "
    "--dtype float64 --limit 2 --quiet --out",
    "edit": "edit --model model --facts facts.jsonl --method rome --method finetune:1 --layers 0,2 --moments "
    "moments.safetensors --contexts contexts.json --no-filter --set steps=20 --dtype float64 --limit 2 --quiet --out",
}
"""What wrote the folders ``trace`` and ``edit``, without the folder's name."""

SWEEP = ("sweep", "sweep.toml", "--out")
WITH_PRESET = (
    "edit --model model --facts facts.jsonl --method finetune:1 --preset preset.toml --layers 1 --no-filter "
    "--dtype float64 --limit 2 --quiet --out"
)
CHANGING = ("versions", "seconds", "begun", "device")
"""What run.json has of the machine and the moment."""


# --- running the command line ---


def run(*arguments: Any) -> tuple[int, str, str]:
    """``python -m causalcone`` in this process: exit code, what it printed, and its errors."""
    out, err = io.StringIO(), io.StringIO()
    before, show = signal.getsignal(signal.SIGTERM), warnings.showwarning
    argv = ["causalcone", *map(str, arguments)]
    with patch.object(sys, "argv", argv), patch.dict(os.environ, {"COLUMNS": "200"}), warnings.catch_warnings():
        try:
            with redirect_stdout(out), redirect_stderr(err):
                runpy.run_module("causalcone", run_name="__main__")
            code: Any = 0
        except SystemExit as stop:
            code = stop.code or 0
        finally:
            signal.signal(signal.SIGTERM, before)
            warnings.showwarning = show
    return code, out.getvalue(), err.getvalue()


def carried_out(*arguments: Any) -> None:
    """Run a command that must go well."""
    code, printed, error = run(*arguments)
    assert code == 0, printed + error


def app() -> typer.Typer:
    """What ``python -m causalcone`` calls."""
    found = []
    with patch.object(typer.Typer, "__call__", lambda self, *_, **__: found.append(self)):
        run()
    return found[0]


@contextmanager
def interrupted(evaluations: int) -> Iterator[list[str]]:
    """Ends the process, as Ctrl-C does, when edits are about to be scored once more than so often."""
    evaluate, calls = cc.Editor.evaluate, []

    def counted(self: cc.Editor, edits: Any, **options: Any) -> Any:
        if len(calls) == evaluations:
            raise KeyboardInterrupt
        calls.append("evaluate")
        return evaluate(self, edits, **options)

    with patch.object(cc.Editor, "evaluate", counted):
        yield calls


# --- what is measured, of files and of today's code; the same functions wrote what is expected ---


def loaded(folder: Path = ARTIFACTS) -> tuple[Any, Any]:
    """The model in float64 and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float64).eval()
    return model, AutoTokenizer.from_pretrained(folder / "model")


def texts() -> list[str]:
    return (ARTIFACTS / "texts.txt").read_text(encoding="utf-8").splitlines()


def digest(frame: pl.DataFrame) -> dict[str, Any]:
    """Of a table: rows, of columns of numbers their sum, their sum of squares and how many are null, of all others a
    hash."""
    told: dict[str, Any] = {"rows": frame.height}
    for name in frame.columns:
        column = frame[name]
        if column.dtype.is_float():
            finite = column.drop_nulls().drop_nans()
            told[name] = [float(finite.sum()), float((finite**2).sum()), frame.height - len(finite)]
        else:
            told[name] = hashlib.sha256(json.dumps(column.to_list(), default=str).encode()).hexdigest()[:16]
    return told


def parts(folder: Path) -> pl.DataFrame:
    """A data set, part by part in the order of their names; columns that all parts have."""
    frames = [pl.read_parquet(file) for file in sorted(folder.rglob("*.parquet"))]
    shared = [name for name in frames[0].columns if all(name in frame.columns for frame in frames)]
    return pl.concat([frame.select(shared) for frame in frames])


def data_sets(folder: Path) -> dict[str, pl.DataFrame]:
    """Those of a folder of results."""
    return {name: parts(folder / name) for name in DATA_SETS if list((folder / name).rglob("*.parquet"))}


def digests(folder: Path) -> dict[str, Any]:
    return {name: digest(frame) for name, frame in data_sets(folder).items()}


def numbers_of_moments(moments: cc.Moments) -> dict[str, Any]:
    """Traces, sums and norms of the matrices, and what is known of them."""
    by_layer = {}
    for layer in moments.layers:
        matrix = moments.matrix(layer)
        solved = moments.solve(layer, torch.ones(moments.width(layer), 1, dtype=torch.float64), ridge=0.01)
        values = (matrix.trace(), matrix.sum(), matrix.norm(), solved.sum())
        by_layer[str(layer)] = [moments.tokens[layer], moments.width(layer), *(value.item() for value in values)]
    return {"layers": list(moments.layers), "source": moments.source, "by layer": by_layer}


def numbers_of_delta(file: Path) -> dict[str, Any]:
    """What a change of weights is, and what the changed model says of a prompt."""
    model, tokenizer = loaded()
    delta = cc.Delta.load(file)
    prompt = tokenizer(cc.load_facts(ARTIFACTS / "facts.jsonl")[0].text, return_tensors="pt")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad(), cc.applied(model, delta):
        logits = model(**prompt).logits[0, -1]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    shapes = {str(layer): list(change.shape) for layer, change in delta.changes.items()}
    kinds = [type(change).__name__ for change in delta.changes.values()]
    said = logits.log_softmax(0)[[0, 7, 101, 202]].tolist()
    return {"layers": list(delta.layers), "shapes": shapes, "kinds": kinds, "norm": delta.norm, "said": said}


def analyses(study: Path) -> dict[str, pl.DataFrame]:
    """What the functions of analysis make of a sweep's folder."""
    from causalcone.analysis.correlations import layer_correlations
    from causalcone.analysis.joined import edits_with_effects
    from causalcone.analysis.regressions import regressions
    from causalcone.analysis.study import Study
    from causalcone.analysis.uncertainty import left_out_layers, permutation_test

    traces = analysis.read_traces(study / "traces")
    restored = traces.filter(method="restore")
    scores = analysis.scores(study / "edits", study / "probes", study / "metrics")
    averages = analysis.average_indirect_effect(restored)
    own = Study(study)
    effects = own.effects(("mlp", 3))
    joined = edits_with_effects(own.scores, effects)
    found = {
        "read_traces": traces,
        "read_gradients": analysis.read_gradients(study / "gradients"),
        "read_edits": analysis.read_edits(study / "edits"),
        "read_probes": analysis.read_probes(study / "probes"),
        "read_metrics": analysis.read_metrics(study / "metrics"),
        "with_roles": analysis.with_roles(restored),
        "restore_effects": analysis.restore_effects(restored),
        "tracing_effects": analysis.tracing_effects(restored),
        "zeroing_effects": analysis.zeroing_effects(traces.filter(method="zero")),
        "flagged_facts": analysis.flagged_facts(restored),
        "average_indirect_effect": averages,
        "peak_layers": analysis.peak_layers(averages),
        "severed_effects": analysis.severed_effects(traces),
        "zeroing_curve": analysis.zeroing_curve(traces.filter(method="zero")),
        "concentrated_facts": analysis.concentrated_facts(effects),
        "gradient_norms": analysis.gradient_norms(study / "gradients"),
        "gradient_summary": analysis.gradient_summary(study / "gradients"),
        "scores": scores,
        "mean_scores": analysis.mean_scores(scores),
        "counterfact_metrics": analysis.counterfact_metrics(study / "edits", study / "metrics"),
        "zsre_metrics": analysis.zsre_metrics(study / "edits", study / "metrics"),
        "Study.scores": own.scores,
        "Study.mean_scores": own.mean_scores,
        "Study.traces": own.traces,
        "Study.effects": effects,
        "Study.zeroing": own.zeroing(("mlp", 3)),
        "edits_with_effects": joined,
        "regressions": regressions(joined, ["rewrite", "overall"]),
        "layer_correlations": layer_correlations(joined),
        "permutation_test": permutation_test(joined, draws=100),
        "left_out_layers": left_out_layers(joined),
    }
    return found


def made_files(folder: Path) -> dict[str, Any]:
    """What ``causalcone analyze`` writes: names of files, and of tables their first lines."""
    names = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    heads = {name: (folder / name).read_text().splitlines()[0] for name in names if name.endswith(".csv")}
    return {"files": names, "heads": heads}


def arrow_schemas(folder: Path) -> dict[str, list[list[str]]]:
    """Names and types of the columns of every table below a folder; parts of a data set must have the same."""
    found: dict[str, list[list[str]]] = {}
    for file in sorted(folder.rglob("*.parquet")):
        schema = [[field.name, str(field.type)] for field in pq.read_schema(file)]
        name = file.relative_to(folder).parts[0].removesuffix(".parquet")
        assert found.setdefault(name, schema) == schema, file
    return found


def kept_run(folder: Path) -> dict[str, Any]:
    """What is kept of a run, without what is the machine's and the moment's."""

    def kept(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {key: "..." if key in CHANGING else kept(each) for key, each in value.items()}

    return dict(kept(json.loads((folder / "run.json").read_text(encoding="utf-8"))))


# --- snapshots ---


def documented_signature(thing: Any) -> list[list[str]] | str:
    """Parameters of a function or class: name, kind, annotation and default, without the modules of types."""
    try:
        signature = inspect.signature(thing)
    except (TypeError, ValueError):
        return "none"
    rows = [
        [each.name, each.kind.name, _plain(each.annotation), _plain(each.default)]
        for each in signature.parameters.values()
    ]
    return [*rows, ["return", "", _plain(signature.return_annotation), ""]]


def _plain(value: Any) -> str:
    """A text of a value or annotation that does not tell where its types live."""
    if value is inspect.Parameter.empty:
        return ""
    text = (
        value if isinstance(value, str) else inspect.formatannotation(value) if isinstance(value, type) else repr(value)
    )
    return re.sub(r"\b(?:[A-Za-z_]\w*\.)+(?=[A-Za-z_])", "", re.sub(r" at 0x[0-9a-f]+", "", text))


def api() -> dict[str, Any]:
    """Every public name: what it is, its parameters, and those of its public methods."""
    found: dict[str, Any] = {}
    for name in cc.__all__:
        thing = getattr(cc, name)
        if isinstance(thing, ModuleType):
            own = {
                key: documented_signature(value)
                for key, value in sorted(vars(thing).items())
                if inspect.isfunction(value) and not key.startswith("_") and _is_public_in(thing, key, value)
            }
            found[name] = {"kind": "module", "functions": own}
        elif inspect.isclass(thing):
            found[name] = {
                "kind": "class",
                "signature": documented_signature(thing),
                "fields": sorted(getattr(thing, "__dataclass_fields__", {})),
                "methods": {key: _member(thing, key) for key in sorted(dir(thing)) if _is_own(thing, key)},
            }
        else:
            found[name] = {"kind": "function", "signature": documented_signature(thing)}
    return {"names": list(cc.__all__), "version": cc.__version__, "members": found, "analysis": _analysis_api()}


def _analysis_api() -> dict[str, Any]:
    functions = {name: getattr(analysis, name) for name in analysis.__all__}
    own = {name: documented_signature(each) for name, each in functions.items() if inspect.isfunction(each)}
    return {"names": list(analysis.__all__), "functions": own}


def _is_public_in(module: ModuleType, name: str, function: Any) -> bool:
    """Those that the module says are public, or else its own and those it takes from other modules of analysis."""
    listed = getattr(module, "__all__", None)
    return name in listed if listed is not None else function.__module__.startswith("causalcone")


def _is_own(cls: type, name: str) -> bool:
    return not name.startswith("_") and any(
        name in vars(base) for base in cls.__mro__ if base.__module__.startswith("causalcone")
    )


def _member(cls: type, name: str) -> Any:
    member = inspect.getattr_static(cls, name)
    if isinstance(member, classmethod | staticmethod) or inspect.isfunction(member):
        return documented_signature(getattr(cls, name))
    return "attribute"


def commands() -> dict[str, Any]:
    """Every command: its arguments and options with names, types, defaults and help."""
    group: Any = typer.main.get_command(app())
    return {name: _command(command) for name, command in group.commands.items()}


def _command(command: Any) -> dict[str, Any]:
    if hasattr(command, "commands"):
        return {name: _command(each) for name, each in command.commands.items()}
    told = {}
    for each in command.params:
        told[each.name] = {
            "kind": each.param_type_name,
            "names": [*each.opts, *each.secondary_opts],
            "type": _type_of(each),
            "default": repr(each.default() if callable(each.default) else each.default),
            "required": each.required,
            "several": getattr(each, "multiple", False) or each.nargs != 1,
            "flag": getattr(each, "is_flag", False),
            "help": getattr(each, "help", None),
        }
    return {"help": " ".join((command.help or "").split()), "parameters": told}


def _type_of(parameter: Any) -> str:
    """The type of a parameter, as typer has it by itself or on top of click."""
    described = getattr(parameter, "type_descriptor", None)
    if described is None:
        return str(parameter.type.name)
    return _plain(described.annotation)


def help_texts() -> dict[str, str]:
    """What ``--help`` prints of every command, 120 columns wide, without the boxes."""
    own = app()
    group: Any = typer.main.get_command(own)

    def names(command: Any, before: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        yield before
        for name, each in getattr(command, "commands", {}).items():
            yield from names(each, (*before, name))

    env = {"COLUMNS": "120", "TERM": "dumb", "NO_COLOR": "1"}
    found = {}
    for path in names(group, ()):
        result = CliRunner().invoke(own, [*path, "--help"], env=env)
        assert result.exit_code == 0, path
        lines = (
            re.sub(" {3,}", "  ", re.sub(r"[^\x20-\x7e]", " ", line)).rstrip() for line in result.output.splitlines()
        )
        found[" ".join(path)] = "\n".join(filter(None, lines))
    return found


# --- comparing ---


def differences(found: Any, expected: Any, within: float = 1e-6, place: str = "") -> list[str]:
    """What is lost or changed of a value of JSON; keys and items may have been added. Numbers may differ by so much of
    their size, or of 0.001 where that is larger."""
    if isinstance(expected, Mapping) and isinstance(found, Mapping):
        lost = [f"{place}/{key}: gone" for key in expected if key not in found]
        both = (key for key in expected if key in found)
        return lost + [
            told for key in both for told in differences(found[key], expected[key], within, f"{place}/{key}")
        ]
    if isinstance(expected, list) and isinstance(found, list | tuple) and len(expected) <= len(found):
        if len(expected) < len(found):  # those that were there, in their order
            rest = iter(found)
            pairs = (
                (next((item for item in rest if not differences(item, old, within)), None), old) for old in expected
            )
        else:
            pairs = zip(found, expected, strict=True)
        return [told for n, pair in enumerate(pairs) for told in differences(*pair, within, f"{place}/{n}")]
    if isinstance(expected, float) and isinstance(found, int | float) and math.isfinite(expected):
        same = abs(found - expected) <= within * max(1e-3, abs(expected))
    else:
        same = found == expected
    return [] if same else [f"{place}: {expected!r} before, {found!r} now"]


def snapshot(name: str) -> Any:
    return json.loads((SNAPSHOTS / name).read_text(encoding="utf-8"))


def assert_same_tables(found: Path, expected: Path) -> None:
    """All data sets of two folders, row for row; numbers to 1e-6. Parts of before may lack columns that were added."""
    one, two = data_sets(found), data_sets(expected)
    assert one.keys() == two.keys()
    for name, table in one.items():
        other = two[name]
        assert set(table.columns) <= set(other.columns) or set(other.columns) <= set(table.columns), name
        assert table.height == other.height, name
        shared = [column for column in table.columns if column in other.columns]
        told = differences(table.select(shared).to_dict(as_series=False), other.select(shared).to_dict(as_series=False))
        assert not told, (name, told[:5])


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    return dict(json.loads((ARTIFACTS / "expected.json").read_text(encoding="utf-8")))


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of all artefacts, where commands are run: paths in them are relative."""
    shutil.copytree(ARTIFACTS, tmp_path / "user")
    monkeypatch.chdir(tmp_path / "user")
    return tmp_path / "user"


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sweep, carried out from its beginning by today's code."""
    folder = tmp_path_factory.mktemp("study") / "user"
    shutil.copytree(ARTIFACTS, folder)
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        carried_out(*SWEEP, "study", "--quiet")
    return folder / "study"


# --- files of second moments, changes, contexts, presets ---


def test_moments_are_read_and_are_those_of_a_collection_now(expected):
    """The file holds the numbers that it held, is of this model, and collecting them again gives the same ones."""
    model, tokenizer = loaded()
    kept = cc.Moments.load(ARTIFACTS / "moments.safetensors")
    assert not differences(numbers_of_moments(kept), expected["moments"])
    kept.check(model, kept.layers)
    again = cc.Moments.collect(model, tokenizer, texts(), source=kept.source, dtype="float64")
    assert not differences(numbers_of_moments(again), expected["moments"])
    assert kept.identity is not None
    assert again.identity == replace(kept.identity, name=str(ARTIFACTS / "model"))


def test_a_half_done_collection_goes_on(user, expected):
    """It does not count again what is counted, and ends with the moments of a collection in one go."""
    model, tokenizer = loaded()
    options = {"layers": MOMENT_LAYERS, "tokens": "all", "source": "lines", "dtype": "float64"}
    seen: list[int] = []
    progress = lambda done, wanted: seen.append(done)  # noqa: E731
    resumed = cc.Moments.collect(
        model, tokenizer, texts() * 3, **options, resume=user / "half.safetensors.partial", progress=progress
    )
    fresh = cc.Moments.collect(model, tokenizer, texts() * 3, **options)
    assert len(seen) == 1, "a pass was repeated, or nothing was left to do"
    assert not differences(numbers_of_moments(resumed), numbers_of_moments(fresh))
    assert not differences(numbers_of_moments(resumed), expected["half-collected moments"])


@pytest.mark.parametrize("kind", ["low_rank", "dense"])
def test_deltas_are_read_and_applied(kind, expected, tmp_path):
    """A file gives the change that it held; the changed model says what it said; saving writes the same file."""
    file = ARTIFACTS / f"{kind}.safetensors"
    assert not differences(numbers_of_delta(file), expected[kind])
    cc.Delta.load(file).save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == file.read_bytes()
    cc.Delta.load(file).save(tmp_path / "noted", {"fact": "start"})
    with safe_open(tmp_path / "noted", framework="pt") as noted:
        assert noted.metadata()["fact"] == "start"
    assert not differences(numbers_of_delta(tmp_path / "noted"), expected[kind])


def test_contexts_are_read_and_drawn_again_alike():
    """The file gives contexts, and the model and the seed still give these."""
    kept = cc.Contexts(**json.loads((ARTIFACTS / "contexts.json").read_text(encoding="utf-8")))
    model, tokenizer = loaded()
    assert cc.Editor(model, tokenizer, seed=3).contexts == kept


def test_a_tuned_preset_is_read_and_used(user, expected):
    """Its hyperparameters are those that were chosen, and edits made with it are those that were made."""
    from causalcone.runners.presets import load_hparams

    hparams = vars(load_hparams("preset.toml", "finetune", "error_injection", 1))
    assert not differences(hparams, expected["preset"]["hparams"])
    carried_out(*WITH_PRESET.split(), "edited")
    assert not differences(digests(user / "edited"), expected["preset"]["edits"])


# --- folders of results ---


@pytest.mark.parametrize("command", COMMANDS)
def test_folders_of_results_are_written_alike(command, user, expected):
    """The command writes the tables, to 1e-6, and the record that it wrote before."""
    assert not differences(digests(user / command), expected[command], 1e-12)
    carried_out(*COMMANDS[command].split(), "now")
    assert_same_tables(user / "now", user / command)
    assert not differences(arrow_schemas(user / "now"), arrow_schemas(user / command))
    assert not differences(kept_run(user / "now"), kept_run(user / command))
    files = [
        sorted(path.relative_to(user / each).as_posix() for path in (user / each).rglob("*"))
        for each in ("now", command)
    ]
    assert files[0] == files[1]


def test_folders_of_results_are_analysed(expected):
    """A folder of traces and one of edits, read by the functions of analysis, say what they said."""
    assert not differences(analysed_folders(ARTIFACTS), expected["analysed folders"])


def analysed_folders(folder: Path) -> dict[str, Any]:
    edits = folder / "edit"
    scores = analysis.scores(edits / "edits", edits / "probes", edits / "metrics")
    effects = analysis.average_indirect_effect(folder / "trace" / "traces")
    return {"effects": digest(effects), "scores": digest(scores), "means": digest(analysis.mean_scores(scores))}


# --- sweeps ---


def test_a_half_done_sweep_goes_on(user, study, expected):
    """What is done stays untouched, the rest is computed, and the whole is that of a sweep in one go."""
    half = user / "half_sweep"
    done = {file: file.read_bytes() for file in sorted(half.rglob("part-*.parquet"))}
    assert len(done) == expected["sweep"]["parts done"]
    code, printed, error = run("status", "half_sweep")
    assert (code, "stopped" in printed) == (0, True), printed + error
    with interrupted(10**9) as calls:
        carried_out(*SWEEP, "half_sweep", "--quiet")
    assert len(calls) == expected["sweep"]["evaluations"] - expected["sweep"]["evaluations done"]
    assert {file: file.read_bytes() for file in done} == done
    assert len(sorted(half.rglob("part-*.parquet"))) == expected["sweep"]["parts"]
    assert json.loads((half / "run.json").read_text())["status"] == "complete"
    assert_same_tables(half, study)
    for name, read in READERS.items():
        now, then = read(half / name), read(study / name)
        assert now.schema == then.schema, name
        for column in now.columns:  # null where a part of before cannot know it
            known = now[column].is_not_null()
            told = differences(now[column].filter(known).to_list(), then[column].filter(known).to_list())
            assert not told, (name, column, told[:5])
    with interrupted(0):
        carried_out(*SWEEP, "half_sweep", "--quiet")


def test_a_sweep_computes_what_it_computed(study, expected):
    """Tables, record and facts are those of before."""
    assert not differences(digests(study), expected["sweep"]["tables"])
    assert not differences(kept_run(study), expected["sweep"]["run"])
    assert not differences(digest(pl.read_parquet(study / "facts.parquet")), expected["sweep"]["facts"])
    assert sorted(path.relative_to(study).as_posix() for path in study.rglob("*.parquet")) == expected["sweep"]["files"]


def test_analysis_says_what_it_said(study):
    """Schemas, rows and numbers of every function of analysis."""
    found = analyses(study)
    kept = snapshot("analysis.json")
    schemas = {name: [[key, str(kind)] for key, kind in frame.schema.items()] for name, frame in found.items()}
    assert not differences(schemas, kept["schemas"])
    assert not differences({name: digest(frame) for name, frame in found.items()}, kept["digests"], 1e-5)
    assert not differences(polars_schemas(), kept["read"])


def polars_schemas() -> dict[str, Any]:
    """Those that analysis names."""
    named = {name: getattr(analysis, name) for name in analysis.__all__ if name.endswith("_SCHEMA")}
    return {name: [[key, str(kind)] for key, kind in schema.items()] for name, schema in named.items()}


def test_analyze_writes_the_same_files(study, tmp_path):
    """``causalcone analyze``: names of files, and of tables their columns."""
    carried_out("analyze", study, "--no-figures", "--draws", "100", "--out", tmp_path / "out")
    assert not differences(made_files(tmp_path / "out"), snapshot("analysis.json")["analyze"])


# --- snapshots ---


def test_the_public_api_is_still_there():
    """Names, parameters, annotations and defaults of functions, classes and their methods. What has been changed with
    intent is written anew by ``make_artifacts.py --api``."""
    told = differences(json.loads(json.dumps(api())), snapshot("api.json"))
    assert not told, "\n".join(told)


def test_the_command_line_is_still_there():
    """Commands, their options, types, defaults and help."""
    told = differences(json.loads(json.dumps(commands())), snapshot("commands.json"))
    assert not told, "\n".join(told)


def test_help_names_the_options_that_it_named():
    found = help_texts()
    for name, text in snapshot("help.json")["texts"].items():
        options = {word for word in text.split() if re.fullmatch(r"--[a-z][a-z-]*", word)}
        assert options <= set(found[name].split()), name


def test_tables_have_the_columns_that_they_had(study, user):
    """Names and types of the columns of every table on disk, that of facts that were left out and that of what failed
    included."""
    found = {"sweep": arrow_schemas(study), **rare_schemas()}
    assert not differences(found, snapshot("tables.json"))


def rare_schemas() -> dict[str, Any]:
    """Tables that are written only where something cannot be computed, in the current folder: a sweep of edits that
    are not posed, and one whose moments have been damaged."""
    drop = [part for key in ("trace", "sever", "zero", "gradients") for part in ("--set", f"{key}=none")]
    reversal = ('edit.problems=["tracing_reversal"]', 'edit.methods=["finetune:1"]', "noise.sigma=1e-12")
    asked = [part for change in reversal for part in ("--set", change)]
    carried_out("sweep", "sweep.toml", *drop, *asked, "--out", "reversal", "--quiet")
    moments = Path("half_sweep/moments.safetensors")
    moments.write_bytes(moments.read_bytes()[:-8])
    code, _, _ = run(*SWEEP, "half_sweep", "--quiet")
    assert code == 1
    left_out, failures = arrow_schemas(Path("reversal")), arrow_schemas(Path("half_sweep"))
    return {"left_out": left_out["left_out"], "failures": failures["failures"]}


def resolved(name: str) -> Any:
    """What a dotted name stands for: the longest beginning that is a module, and attributes from there on."""
    pieces = name.split(".")
    for length in range(len(pieces), 0, -1):
        module = ".".join(pieces[:length])
        try:
            thing = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not (module == error.name or module.startswith(f"{error.name}.")):
                raise
            continue
        for attribute in pieces[length:]:
            thing = getattr(thing, attribute)
        return thing
    raise ModuleNotFoundError(name)


def test_documented_names_are_there():
    """Every name that a page takes can be imported, the old ones too."""
    names = json.loads((HERE / "documented_names.json").read_text(encoding="utf-8"))["names"]
    lacking = []
    for name, places in names.items():
        try:
            resolved(name)
        except (ImportError, AttributeError) as error:
            lacking.append(f"{name} ({', '.join(places)}): {error}")
    assert len(names) > 60
    assert not lacking, "\n".join(lacking)
