"""The memory that a sequence of edits takes, looked at from outside."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "support" / "sequence_memory.py"
MIB = 2**20


def growth(edits):
    """Growth of the resident set, and the bytes of the running change and the history, in MiB."""
    # freed blocks go back to the system at once, so that what is seen is what is held
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(MIB // 16)}
    command = [sys.executable, SCRIPT, str(edits)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    made, grown, held = map(int, done.stdout.split())
    assert made == edits
    return grown / MIB, held / MIB


def test_growth_is_that_of_the_change_and_the_history():
    (few, little), (many, much) = map(growth, (20, 200))
    assert much > little
    assert many - few <= much - little + 8, (few, many, little, much)
