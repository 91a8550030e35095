"""The commands that pages show."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def blocks(page, language=r"\w*"):
    """The blocks of code of a page, indented ones too."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^ *```{language}\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)


def commands(page):
    """Arguments of every ``causalcone`` that the page's blocks call: in a line, a script or a cluster's job."""
    lines = "\n".join(blocks(page)).replace("\\\n", " ").splitlines()
    called = [re.match(r" *(?:exec |entrypoint: )?causalcone (.*)", line) for line in lines]
    return [shlex.split(found[1], comments=True) for found in called if found]
