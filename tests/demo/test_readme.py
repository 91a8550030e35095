"""What the README shows does what it says, with the demo model in place of a downloaded one."""

import json

import pytest
from helpers.page_commands import blocks, commands
from typer.testing import CliRunner

from causalcone.runners.commands.app import app
from causalcone.runners.demo.corpus import running_texts
from causalcone.runners.demo.model import demo_folder, demo_world


@pytest.mark.demo
def test_the_python_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tracing, editing = blocks("README.md", "python")
    assert len(tracing.splitlines()) <= 11
    names = {}
    exec(tracing.replace('"gpt2"', repr(str(demo_folder(progress=False)))), names)
    assert names["table"].num_rows > 0
    assert "p_patched" in capsys.readouterr().out
    assert (tmp_path / "heatmap.png").stat().st_size > 1000

    (tmp_path / "wikipedia.txt").write_text("\n".join(running_texts(demo_world())))
    exec(editing, names)
    assert [edit.status for edit in names["edits"]] == ["done"] * 3
    printed = capsys.readouterr().out
    assert "p_post" in printed
    assert "Shaquille O'Neal plays the sport of" in printed


@pytest.mark.real
def test_the_first_command_shows_what_the_page_shows():
    """Tokens, the model's answer and its probability; cells may differ in the last digit."""
    first, (shown,) = commands("README.md")[0], blocks("README.md", "text")
    result = CliRunner().invoke(app, first, env={"COLUMNS": "100"})
    assert result.exit_code == 0
    expected, found = ([line.split()[:1] for line in text.splitlines()][:-1] for text in (shown, result.output))
    assert found == expected
    assert result.output.splitlines()[:2] == shown.splitlines()[:2]


OWN = {
    **dict.fromkeys(("gpt2-xl", "counterfact.json", "wikipedia.txt", "hase2023-gptj"), "demo"),
    "facts=counterfact.json": "facts=demo",
    "15": "3",  # a layer
}
"""What stands for what a user has."""


def smaller(arguments):
    """Options that make a command a short one."""
    if arguments[0] == "sweep":
        changes = ("limit=3", "edit.facts=1", "edit.layers=[0]", "edit.generation=false", "edit.references=none")
        return [part for change in (*changes, "gradients=none") for part in ("--set", change)]
    return ["--limit", "2"] if "--facts" in arguments else []


@pytest.mark.demo
def test_the_command_lines_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, *found = commands("README.md")  # the first has a test of its own
    assert len(found) >= 2
    for arguments in found:
        swapped = [OWN.get(word, word) for word in arguments]
        result = CliRunner().invoke(app, [*swapped, *smaller(swapped)])
        assert result.exit_code == 0, result.output
    assert list((tmp_path / "traces" / "traces").glob("*.parquet"))
    assert list((tmp_path / "edits" / "probes").glob("*.parquet"))
    assert json.loads((tmp_path / "study" / "run.json").read_text())["status"] == "complete"
