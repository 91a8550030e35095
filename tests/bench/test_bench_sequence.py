"""The benchmark of sequences at toy size: both naive ways and the engine make the same changes. No time is judged."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"


def test_sequences(tmp_path):
    command = ["sequence.py", "--toy", "--edits", "5", "--batch", "3", "--out", tmp_path]
    done = subprocess.run([sys.executable, *command], cwd=BENCH, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.iterdir()
    results = json.loads(file.read_text())["results"]
    assert [result["name"] for result in results] == ["memit-seq", "alphaedit"]
    for result in results:
        assert result["edits"] == 5
        assert result["ratio_to_naive"] == pytest.approx(result["naive"] / result["seconds"])
        assert max(result["difference_to_naive"], result["difference_to_published"]) < 1e-4
