"""Traces facts with streamed weights in a fresh process, writes the table and prints the bytes that its memory grew by:
``SMALL_FOLDER FOLDER BUDGET_MIB TABLE``. What comes with the first model (code, threads) is there before."""

from __future__ import annotations

import sys

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from helpers.models import FACTS
from memory_growth import Peak

import causalcone as cc


def trace(folder: str, memory: str | None = None, weights: str = "stream") -> pa.Table:
    tracer = cc.Tracer.from_pretrained(folder, weights=weights, memory=memory)
    return tracer.trace(FACTS[:2], states=("hidden:1",), samples=2, sigma=0.1, tokens="subject_last")


def main(small: str, folder: str, budget_mib: str, table: str) -> None:
    torch.set_num_threads(1)
    trace(small, f"{budget_mib}MiB")
    before = psutil.Process().memory_info().rss
    with Peak() as peak:
        traced = trace(folder, f"{budget_mib}MiB")
    print(peak.bytes - before)
    pq.write_table(traced, table)


if __name__ == "__main__":
    main(*sys.argv[1:])
