"""The command that tests of ``causalcone data`` run."""

import pytest

import causalcone as cc


@pytest.fixture
def convert(run, tmp_path):
    """Runs the command into a file; returns the exit code, what it printed, and the facts, where there are some."""

    def convert(source, *options):
        out = tmp_path / "out" / "facts.jsonl"
        code, printed, error = run("data", source, "--out", out, *options)
        assert "Traceback" not in error
        assert not out.parent.exists() or [path.name for path in out.parent.iterdir()] in ([], ["facts.jsonl"])
        return code, printed, error, cc.load_facts(out) if out.exists() else None

    return convert
