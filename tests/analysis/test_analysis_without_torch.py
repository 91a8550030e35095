"""The analysis reads tables only: it must work where torch and transformers cannot be imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from helpers.made_up_study import EFFECTS, SCORES, edited, traced, write_study
from helpers.trace_tables import made_up_traces

MISSING = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
"""

SCRIPT = """
import causalcone.analysis as analysis
import causalcone.analysis.page.report, causalcone.analysis.sweep_results
assert "matplotlib" not in sys.modules, "importing the analysis loaded matplotlib"

table = analysis.read_traces(sys.argv[1])
peaks = analysis.peak_layers(analysis.average_indirect_effect(table))
analysis.plot.heatmap(table, fact_id="0", kind="mlp", window=10, path=sys.argv[2])
assert "matplotlib.pyplot" not in sys.modules, "plotting loaded pyplot"
print(*peaks.filter(kind="mlp", role="last_subject")["layer"])
"""


@pytest.mark.slow
def test_analysis_without_torch(tmp_path: Path) -> None:
    made_up_traces([" Big", " Rome", " is", " in"], (0, 2), layers=8).write_parquet(tmp_path / "traces.parquet")
    done = run(SCRIPT, tmp_path / "traces.parquet", tmp_path / "map.png")
    assert done.stdout.strip() == "2"
    assert (tmp_path / "map.png").stat().st_size > 1000


@pytest.mark.slow
@pytest.mark.parametrize("command", ["analyze", "report"])
def test_commands_without_torch(command: str, tmp_path: Path) -> None:
    study = write_study(tmp_path / "study", traced(EFFECTS), [edited(SCORES)])
    done = run("from causalcone.runners.commands.app import main; main()", command, study, "--draws", 100)
    assert "edit layer" in done.stdout


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A script in a process that has no torch."""
    command = [sys.executable, "-c", MISSING + script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done
