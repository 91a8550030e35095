"""Small traces tables for the tests of the analysis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl

from causalcone.analysis import TRACE_SCHEMA


def fact_traces(
    values: Mapping[tuple[int, int], float],
    *,
    tokens: Sequence[str],
    subject: tuple[int, int],
    p_clean: float,
    p_corrupted: float,
    fact_id: str = "0",
    method: str = "restore",
    kind: str = "hidden",
    window: int = 1,
) -> pl.DataFrame:
    """One fact's rows for one state; ``values`` maps (layer, token) to p_patched."""
    shared = {"fact_id": fact_id, "method": method, "kind": kind, "window": window, "prompt_tokens": len(tokens)}
    shared |= {"subject_start": subject[0], "subject_end": subject[1], "p_clean": p_clean, "p_corrupted": p_corrupted}
    rows = [
        {
            **shared,
            "layer": layer,
            "token": token,
            "token_text": tokens[token],
            "p_patched": value,
            "p_patched_sd": None,
        }
        for (layer, token), value in values.items()
    ]
    return pl.DataFrame(rows, schema=TRACE_SCHEMA)


def made_up_traces(
    tokens: Sequence[str],
    subject: tuple[int, int],
    layers: int,
    states: Sequence[tuple[str, int]] = (("hidden", 1), ("mlp", 10), ("attn", 10)),
    fact_id: str = "0",
    p_clean: float = 0.8,
    p_corrupted: float = 0.05,
    seed: int = 0,
) -> pl.DataFrame:
    """A whole fact with an early site at the last subject token and a late site at the last token."""
    generator = np.random.default_rng(seed)
    frames = []
    for kind, window in states:
        values = {}
        for layer in range(layers):
            for token in range(len(tokens)):
                early = (token == subject[1] - 1) * np.exp(-(((layer / layers - 0.25) / 0.2) ** 2)) * (kind != "attn")
                late = (token == len(tokens) - 1) * np.exp(-(((layer / layers - 0.85) / 0.2) ** 2)) * (kind != "mlp")
                site = min(1.0, max(early, late) + 0.05 * generator.random())
                values[layer, token] = p_corrupted + (token >= subject[0]) * (p_clean - p_corrupted) * site
        frames.append(
            fact_traces(
                values,
                tokens=tokens,
                subject=subject,
                p_clean=p_clean,
                p_corrupted=p_corrupted,
                fact_id=fact_id,
                kind=kind,
                window=window,
            )
        )
    return pl.concat(frames)
