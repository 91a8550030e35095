"""One page of a sweep's answers, self-contained: HTML with plotly inside, to be opened from a disk, without network."""

from __future__ import annotations

import re
from importlib.resources import files

from plotly.offline import get_plotlyjs

from causalcone.analysis.page.data import Packed


def report(data: Packed) -> str:
    """The page: the answer, scores by layer and method, effects by window size, an explorer of single facts, and a
    table of all. ``data`` is what ``report_data`` gives; its texts stay texts."""
    parts = {
        "STYLE": _read("style.css"),
        "PLOTLY": get_plotlyjs(),
        "DATA": data.json(),
        "NUMBERS": data.base64(),
        "SCRIPT": _read("script.js"),
    }
    return re.sub("__(STYLE|PLOTLY|DATA|NUMBERS|SCRIPT)__", lambda found: parts[found[1]], _read("page.html"))


def _read(name: str) -> str:
    return files("causalcone.analysis").joinpath("page", name).read_text(encoding="utf-8")
