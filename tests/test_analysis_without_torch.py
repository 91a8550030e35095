"""The analysis reads tables only: it must work where torch and transformers cannot be imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from trace_tables import made_up_traces

SCRIPT = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())

import causalcone.analysis as analysis
import causalcone.analysis.report_data, causalcone.analysis.study
assert "matplotlib" not in sys.modules, "importing the analysis loaded matplotlib"

table = analysis.read_traces(sys.argv[1])
peaks = analysis.peak_layers(analysis.average_indirect_effect(table))
analysis.plot.heatmap(table, fact_id="0", kind="mlp", window=10, path=sys.argv[2])
assert "matplotlib.pyplot" not in sys.modules, "plotting loaded pyplot"
print(*peaks.filter(kind="mlp", role="last_subject")["layer"])
"""


def test_analysis_without_torch(tmp_path: Path) -> None:
    made_up_traces([" Big", " Rome", " is", " in"], (0, 2), layers=8).write_parquet(tmp_path / "traces.parquet")
    arguments = [sys.executable, "-c", SCRIPT, str(tmp_path / "traces.parquet"), str(tmp_path / "map.png")]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "2"
    assert (tmp_path / "map.png").stat().st_size > 1000
