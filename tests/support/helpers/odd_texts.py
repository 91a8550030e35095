"""A sweep's folder whose texts are what pages must not run."""

from __future__ import annotations

import shutil
from pathlib import Path

import polars as pl

ODD = '</script><script>document.title="broken"</script><img src=x onerror=\'document.title="broken"\'>'


def with_odd_texts(study: Path, copy: Path) -> Path:
    """A copy of a sweep: subjects and the first tokens of all prompts are replaced."""
    shutil.copytree(study, copy)
    facts = copy / "facts.parquet"
    pl.read_parquet(facts).with_columns(subject=pl.lit(ODD)).write_parquet(facts)
    for file in (copy / "traces").rglob("*.parquet"):
        text = pl.when(pl.col("token") == 0).then(pl.lit(ODD)).otherwise("token_text")
        pl.read_parquet(file).with_columns(token_text=text).write_parquet(file)
    return copy
