"""Sweeps that are killed at random moments, and run on small disks, come to the same tables in the end."""

import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers.sweeps import assert_same_tables, swept, tables

from causalcone.runners.sweep.status import status_of

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[1] / "support" / "sweep_process.py"
KILLS = int(os.environ.get("CAUSALCONE_KILLS", "6"))
"""How often; every kill costs the start of a process."""

STAGES = ("filter", "trace", "sever", "zero", "gradients", "edit")
"""Those of several units each."""


@pytest.fixture(scope="module")
def whole(file, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    swept(file, out)
    return out


def started(file, out):
    return subprocess.Popen(
        [sys.executable, SCRIPT, file, out], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def parts(out):
    return len(list(Path(out).rglob("*.parquet")))


def carried_out(out):
    """The units that a sweep's log has, in the order in which they were done."""
    log = Path(out) / "sweep.log"
    lines = log.read_text().splitlines() if log.exists() else []
    return [line.split()[2].removesuffix(":") for line in lines if re.search(r"/\d{5}: \d+ in ", line)]


def test_killed_at_random_moments(file, whole, tmp_path):
    """With some units done in between, so that the kills fall into every stage."""
    drawn, out, stages = random.Random(0), tmp_path / "out", Counter()
    order = carried_out(whole)
    for kill in range(KILLS):
        # as far as this kill's share of the way goes, and a little on; some while the process still begins
        early = kill % 5 == 4
        goal = 0 if early else max(len(carried_out(out)), int(len(order) * kill / KILLS))
        process = started(file, out)
        while process.poll() is None and len(carried_out(out)) < goal:
            time.sleep(0.001)
        time.sleep(drawn.random() * (2.0 if early else 0.03))
        ended = process.poll() is not None
        process.kill()
        process.communicate()
        if ended:
            break
        if (out / "run.json").exists():
            assert status_of(str(out)).status.startswith("interrupted")
        done = set(carried_out(out))
        stages[next(unit for unit in order if unit not in done).split("/")[0]] += 1
    print(f"killed {stages.total()} times, in the stages:", dict(stages))
    assert stages.total() >= 4
    if KILLS >= 30:
        assert stages.total() == KILLS
        assert set(stages) >= set(STAGES)
    found = status_of(str(out))
    assert found.status != "complete" or carried_out(out) == order
    process = started(file, out)
    printed, error = process.communicate()
    assert (process.returncode, printed.strip()) == (0, "complete"), error
    assert_same_tables(tables(out), tables(whole))
    assert parts(out) == parts(whole)
    assert not list((out / ".partial").iterdir())


@contextmanager
def small_disk(place, size):
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("only root may mount a small file system")
    try:
        yield
    finally:
        subprocess.run(["umount", place], check=True)


def test_a_disk_that_fills_up(file, whole, tmp_path):
    """It stops with a message, keeps what is finished, and goes on when there is room."""
    disk = tmp_path / "disk"
    with small_disk(disk, "2m"):
        out, ballast = disk / "out", disk / "ballast"
        ballast.write_bytes(bytes(2**21 - 2**18 - 2**17))
        process = started(file, out)
        _, error = process.communicate()
        assert process.returncode != 0
        assert "No space left on device; what is finished is kept" in error
        assert 0 < parts(out) < parts(whole)
        finished = {path: path.stat().st_mtime for path in out.rglob("part-*.parquet")}
        ballast.unlink()
        printed, error = started(file, out).communicate()
        assert printed.strip() == "complete", error
        assert_same_tables(tables(out), tables(whole))
        again = [path for path, when in finished.items() if path.stat().st_mtime != when]
        assert len(again) <= 2  # of the one unit that was not finished
