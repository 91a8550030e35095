"""What is installed is what is in the folders, and its version is the one of pyproject.toml."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

import causalcone

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_a_wheel_holds_every_file_of_the_folders(tmp_path):
    expected = set()
    for package, folder in PROJECT["tool"]["setuptools"]["package-dir"].items():
        shutil.copytree(ROOT / folder, tmp_path / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        inside = [file for file in (tmp_path / folder).rglob("*") if file.is_file()]
        expected |= {f"{package.replace('.', '/')}/{file.relative_to(tmp_path / folder)}" for file in inside}
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", "wheels", "."]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=120)
    [wheel] = (tmp_path / "wheels").iterdir()
    with zipfile.ZipFile(wheel) as packed:
        assert {name for name in packed.namelist() if ".dist-info/" not in name} == expected


def test_the_lowest_versions_are_the_bounds():
    lines = (ROOT / "constraints-lowest.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    extras = PROJECT["project"]["optional-dependencies"]
    needed = [*PROJECT["project"]["dependencies"], *extras["test"], *extras["gguf"]]
    bounds = {each.name: min(each.specifier, key=str).version for each in map(Requirement, needed)}
    assert pinned.keys() == bounds.keys()
    assert {name: Version(pinned[name]) for name in pinned} == {name: Version(bounds[name]) for name in pinned}


def test_the_version():
    assert causalcone.__version__ == PROJECT["project"]["version"]
