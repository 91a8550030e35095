"""Row-indexed attention with flash-attn's kernels for sequences of various lengths; ``row_attention.py`` defines it.

Runs that begin with the same key rows see those in one sequence: all their queries over one copy of the prefix. What is
left of each run's keys is a sequence of its own, under the causal mask. The two are merged by their log-sum-exps.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from causalcone.kernels.row_attention import MAX_RUNS, RunRows, ScoreRule, by_batch


def attend_rows(
    queries: Tensor, keys_values: Tensor, runs: RunRows[Tensor], scoring: ScoreRule, out: Tensor, tile: int = 0
) -> None:
    """``out`` (B * m, H * d) = the heads' outputs of query rows, run by run, as ``row_attention.py`` says.

    In bfloat16 or float16, on CUDA devices. The host waits for the device here: it has to know how long sequences are.
    """
    d = scoring.head_dim
    heads, packed = queries.unflatten(1, (-1, d)), keys_values.unflatten(1, (2, -1, d))
    portions = (
        (*rows, tokens.tolist())
        for _, query_rows, key_rows, tokens in by_batch(runs)
        for rows in zip(query_rows.split(MAX_RUNS), key_rows.split(MAX_RUNS), strict=True)
    )
    first = 0
    for query_rows, key_rows, tokens in portions:
        results = out[first : first + query_rows.numel()].view(*query_rows.shape, *heads.shape[1:])
        first += query_rows.numel()
        for columns in _stretches(tokens) if len(query_rows) else ():
            stretch = tokens[columns]  # flash-attn's mask is that of neighbours, the last keys their own
            seen = key_rows[:, : stretch[-1] + 1]
            if scoring.window is not None and scoring.window < seen.shape[1]:
                order = torch.arange(len(seen), device=seen.device)
                prefix, new = torch.zeros_like(order), torch.ones_like(order, dtype=torch.bool)
            else:
                order, prefix, new = _prefixes(seen, stretch[0])
            attended = _attend(heads, packed, query_rows[order, columns], seen[order], prefix, new, scoring)
            results[order, columns] = attended.view(len(order), len(stretch), *heads.shape[1:])


def _attend(
    heads: Tensor, packed: Tensor, query_rows: Tensor, key_rows: Tensor, prefix: Tensor, new: Tensor, scoring: ScoreRule
) -> Tensor:
    """(B * m, H, d) of runs in order: the first ``prefix`` (B,) key rows are those of the run before, but where a
    prefix is ``new``."""
    m, K = query_rows.shape[1], key_rows.shape[1]
    key = torch.arange(K, device=key_rows.device)
    queries = heads.index_select(0, query_rows.flatten())
    lengths = torch.full_like(prefix, m)
    window = (-1, -1) if scoring.window is None or scoring.window >= K else (scoring.window - 1, 0)
    rest_rows = key_rows[key >= prefix[:, None]]
    rest = K - prefix
    outputs, output_sums = _flash(queries, packed, rest_rows, lengths, rest, scoring, causal=True, window_size=window)
    shares = prefix > 0
    if not shares.any():
        return outputs

    first = shares & new
    shared_rows = key_rows[first][key < prefix[first, None]]
    members = torch.bincount((new.cumsum(0) - 1)[shares], minlength=int(new.sum()))[shares[new]]
    asking = shares.repeat_interleave(m)
    everything = {"causal": False, "window_size": (-1, -1)}
    seen, sums = _flash(queries[asking], packed, shared_rows, members * m, prefix[first], scoring, **everything)
    total = torch.logaddexp(output_sums[asking], sums)
    weights = ((output_sums[asking] - total).exp(), (sums - total).exp())
    merged = outputs[asking].float() * weights[0][..., None] + seen.float() * weights[1][..., None]
    outputs[asking] = merged.to(outputs.dtype)
    return outputs


def _flash(
    queries: Tensor, packed: Tensor, rows: Tensor, asking: Tensor, seen: Tensor, scoring: ScoreRule, **mask: Any
) -> tuple[Tensor, Tensor]:
    """Outputs (N, H, d) and log-sum-exps (N, H) of sequences of ``asking`` queries and ``seen`` keys, one by one."""
    from flash_attn import flash_attn_varlen_func

    keys, values = packed.index_select(0, rows).unbind(1)
    ends = (torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int() for lengths in (asking, seen))
    out, sums, _ = flash_attn_varlen_func(
        queries, keys, values, cu_seqlens_q=next(ends), cu_seqlens_k=next(ends), max_seqlen_q=int(asking.max()),
        max_seqlen_k=int(seen.max()), softmax_scale=scoring.scale, softcap=scoring.softcap or 0.0,
        return_attn_probs=True, **mask,
    )  # fmt: skip
    return out, sums.T


def _stretches(tokens: Sequence[int]) -> Iterator[slice]:
    """Stretches of tokens that follow each other."""
    start = 0
    for i in range(1, len(tokens) + 1):
        if i == len(tokens) or tokens[i] != tokens[i - 1] + 1:
            yield slice(start, i)
            start = i


def _prefixes(key_rows: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """An order of runs (B,) in which those that begin alike are neighbours; of each run in that order, how many of its
    first key rows (``most`` at most) a neighbour has too, and whether the run before has not the same prefix."""
    order = key_rows.unique(dim=0, return_inverse=True)[1].argsort(stable=True)
    ordered = key_rows[order, :most]
    alike = torch.zeros(len(order) + 1, dtype=torch.int64, device=key_rows.device)
    alike[1:-1] = (ordered[1:] == ordered[:-1]).long().cumprod(1).sum(1)  # each run with the one before
    prefix = torch.maximum(alike[:-1], alike[1:])
    new = torch.ones_like(prefix, dtype=torch.bool)
    new[1:] = (prefix[1:] != prefix[:-1]) | (alike[1:-1] < prefix[1:])
    return order, prefix, new
