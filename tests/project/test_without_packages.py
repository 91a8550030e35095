"""What a machine with a GPU has to have for the benchmark and the tests on it: what the engine needs, and no more."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(*command):
    bare = [sys.executable, ROOT / "tests" / "support" / "bare.py", *command]
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(bare, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_benchmark_starts():
    assert "--naive-seconds" in run("bench/gpu.py", "--help")


def test_the_tests_on_a_gpu_are_collected():
    """Of every file that has such tests; those that need more packages have none."""
    collected = run("-m", "pytest", "-m", "gpu", "--collect-only")
    files = [path for path in (ROOT / "tests").glob("*/test_*.py") if "@pytest.mark.gpu" in path.read_text()]
    marked = [path.relative_to(ROOT).as_posix() for path in files if path != Path(__file__)]
    assert len(marked) > 10
    for file in marked:
        assert f"{file}::" in collected, f"{file} needs a package that is not there"
