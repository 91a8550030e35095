"""Tables as files: CSV with all digits, Markdown and LaTeX as they are to be read."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl

from causalcone.analysis.papers.records import RECORD
from causalcone.analysis.papers.tables import Table
from causalcone.analysis.stats.regressions import PREDICTORS
from causalcone.analysis.tables.names import method_name, words

_HEADINGS = {f"{of}r2_{name}": f"{words(of)}{name}" for of in ("", RECORD) for name in PREDICTORS}


def write_table(table: Table, folder: Path) -> list[Path]:
    """``NAME.csv``, ``NAME.md`` and ``NAME.tex``."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for suffix, text in (("csv", table.frame.write_csv()), ("md", markdown(table)), ("tex", latex(table))):
        written.append(folder / f"{table.name}.{suffix}")
        written[-1].write_text(text, encoding="utf-8")
    return written


def markdown(table: Table) -> str:
    header, rows = cells(table.frame)
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = [
        f"**{table.title}**",
        "",
        f"| {' | '.join(header)} |",
        f"|{'|'.join('--:' if number else '---' for number in _numeric(table.frame))}|",
        *(f"| {' | '.join(row)} |" for row in escaped),
        "",
        *_sentences(table),
    ]
    return "\n".join(lines) + "\n"


def latex(table: Table) -> str:
    """A ``table`` environment with booktabs' rules."""
    header, rows = cells(table.frame)
    columns = "".join("r" if number else "l" for number in _numeric(table.frame))
    lines = [
        "% needs \\usepackage{booktabs}",
        "\\begin{table}",
        "\\centering",
        f"\\begin{{tabular}}{{{columns}}}",
        "\\toprule",
        " & ".join(map(_tex, header)) + " \\\\",
        "\\midrule",
        *(" & ".join(map(_tex, row)) + " \\\\" for row in rows),
        "\\bottomrule",
        "\\end{tabular}",
        f"\\caption{{{_tex(table.title)}. {_tex(' '.join(_sentences(table)))}}}",
        "\\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _sentences(table: Table) -> list[str]:
    return [f"{note[0].upper()}{note[1:]}." for note in table.notes]


def _numeric(frame: pl.DataFrame) -> list[bool]:
    return [dtype.is_numeric() for dtype in frame.select(_shown(frame)).dtypes]


def _shown(frame: pl.DataFrame) -> list[str]:
    """Columns that say something."""
    return [name for name in frame.columns if name != "window" and not frame[name].is_null().all()]


def cells(frame: pl.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Headings and rows as they are shown."""
    names = _shown(frame)
    rows = [[cell(name, row) for name in names] for row in frame.iter_rows(named=True)]
    return [_HEADINGS.get(name, words(name)) for name in names], rows


def cell(name: str, row: dict[str, Any]) -> str:
    """A value as it is shown: a method with its window, small p-values as bounds, three decimals."""
    value = row[name]
    if value is None:
        return "-"
    if name == "method":
        return method_name(value, row["window"])
    if name == "problem":
        return words(str(value))
    if isinstance(value, float):
        return p_value(value) if f"{name.removeprefix(RECORD)}_".startswith("p_") else f"{value:z.3f}"
    return str(value)


def p_value(p: float) -> str:
    return "<1e-4" if p < 1e-4 else f"{p:.3f}" if p >= 1e-3 else f"{p:.1e}"


def _tex(text: str) -> str:
    return text.translate(_TEX)


_NAMED = {"\\": "backslash", "~": "asciitilde", "^": "asciicircum", "<": "less", ">": "greater"}
_TEX = str.maketrans({c: f"\\{c}" for c in "&%$#_{}"} | {c: f"\\text{name} " for c, name in _NAMED.items()})


def index(tables: Sequence[Table], missing: Sequence[str]) -> str:
    """All tables on one page, and which are missing."""
    parts = [markdown(table) for table in tables]
    if missing:
        parts.append("**Missing**\n\n" + "".join(f"- {reason}\n" for reason in missing))
    return "\n".join(parts)
