"""The packages: every folder that holds Python files, wherever package-dir of pyproject.toml puts it."""

import tomllib
from pathlib import Path

from setuptools import find_packages, setup

folders = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-dir"]
below = {f"{package}.{name}" for package, folder in folders.items() for name in find_packages(folder)}
setup(packages=sorted({*folders, *below}))
