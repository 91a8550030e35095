"""What the guards compare with, and a copy of it to work on."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

ARTIFACTS = Path(__file__).with_name("artifacts")


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    return dict(json.loads((ARTIFACTS / "expected.json").read_text(encoding="utf-8")))


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of all artefacts, where commands are run: paths in them are relative."""
    shutil.copytree(ARTIFACTS, tmp_path / "user")
    monkeypatch.chdir(tmp_path / "user")
    return tmp_path / "user"
