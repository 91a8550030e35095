"""The commands on the pages of docs/ do what the pages say, with the demo model and its world in place of others."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from helpers.page_commands import ROOT, blocks, commands
from typer.testing import CliRunner

from causalcone.runners.commands.app import app
from causalcone.runners.demo.model import demo_world

DOCS = ROOT / "docs"

ELSEWHERE = {
    "analysis.md": "test_analyze.py",
    "architectures.md": "test_architectures_llama.py",  # a test of a family, as these files have
    "embedding.md": "test_embedding.py",
    "cluster.md": "test_sweep_cluster.py",
    "performance.md": "test_bench.py",  # the script, at toy size
    "editors.md": "test_registry.py",
    "smollm2.md": "test_smollm2_study.py",  # sweeps of hours; the last command's tables
}
"""Pages whose blocks other tests run."""

OWN = {
    **dict.fromkeys(("gpt2-xl", "counterfact.json", "counterfact.jsonl", "wikipedia.txt", "known_1000.json"), "demo"),
    **dict.fromkeys(("hase2023-gptj", "rome2022-gpt2xl", "rome2022-gpt2xl-edits"), "demo"),
    **{f"facts={name}": "facts=demo" for name in ("counterfact.json", "counterfact.jsonl", "known_1000.json")},
    "5,17,29": "0,1", "17": "1", "15": "2", "mlp:10": "mlp:3", "--known": None, "652": None,
}  # fmt: skip
"""What stands for what a user has; what is left out."""

MADE = ("counterfact.json", "zsre_mend_eval.json", "mine.csv")
"""Files that are there."""

SMALL_SWEEP = (
    *("limit=3", "edit.facts=1", "edit.layers=[0]", "edit.generation=false", "edit.references=none"),
    *('edit.problems=["error_injection"]', "gradients=none", "sever=none"),
)


def smaller(arguments):
    """Options that make a command a short one."""
    if arguments[0] == "sweep":
        return [part for change in SMALL_SWEEP for part in ("--set", change)]
    if arguments[0] == "analyze":
        return ["--no-figures", "--draws", "100"]
    if arguments[0] == "report":
        return ["--draws", "100"]
    if arguments[0] == "tune":
        return ["--limit", "2", "--moments", "demo", "--preset", "demo"]
    return ["--limit", "2"] if "--facts" in arguments else []


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder with a user's files, where commands are run."""
    monkeypatch.chdir(tmp_path)
    demo_world().write(tmp_path / "counterfact.json")
    record = (
        '{"src": "What is the home of Ann?", "subject": "Ann", "answers": ["%s"], "alt": "Rome", '
        '"rephrase": "Where is Ann at home?", "loc": "nq question: who is Bob", "loc_ans": "a man"}'
    )
    records = ", ".join(record % answer for answer in ("Oslo", "Lima"))
    (tmp_path / "zsre_mend_eval.json").write_text(f"[{records}]")
    (tmp_path / "mine.csv").write_text("".join(blocks("docs/data.md", "csv")))
    hub = ModuleType("datasets")  # nothing is downloaded by tests
    hub.load_dataset = lambda name, config, **options: json.loads((tmp_path / "counterfact.json").read_text())
    monkeypatch.setitem(sys.modules, "datasets", hub)
    return tmp_path


@pytest.mark.demo
@pytest.mark.parametrize("page", ["index.md", "sweeps.md", "reproducing.md", "data.md", "editing.md", "streaming.md"])
def test_commands_run(page, files):
    found = commands(f"docs/{page}")
    assert found
    for arguments in found:
        is_data = arguments[0] == "data"
        swapped = [word if is_data and word in MADE else OWN.get(word, word) for word in arguments]
        given = [word for word in swapped if word is not None]
        result = CliRunner().invoke(app, [*given, *smaller(given)])
        assert result.exit_code == 0, (arguments, result.output, result.exception)


def test_every_page_with_blocks_is_tested():
    pages = {page.name for page in DOCS.glob("*.md") if "```" in page.read_text(encoding="utf-8")}
    own = {"index.md", "sweeps.md", "reproducing.md", "data.md", "editing.md", "streaming.md"}
    assert pages == own | set(ELSEWHERE) | {"architecture.md"}  # whose blocks are maps, and run nothing
    tests = {file.name for file in Path(__file__).parents[1].rglob("test_*.py")}
    assert tests >= set(ELSEWHERE.values())


def test_the_configuration_of_the_page_is_one(tmp_path):
    from causalcone.runners.sweep.config import load_sweep

    (text,) = blocks("docs/sweeps.md", "toml")
    (tmp_path / "mine.toml").write_text(text)
    assert load_sweep(str(tmp_path / "mine.toml")).edit.generation == ("error_injection",)
