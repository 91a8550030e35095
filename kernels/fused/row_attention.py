"""Row-indexed attention that reads queries, keys and values by index; ``kernels/row_attention.py`` defines it.

A program computes one key head of one run: the queries of all its tokens, and of all query heads that this key head
serves, make the rows of a tile; keys pass by in blocks under an online softmax. Sequences are short, so that most
programs see one or two blocks, and what takes time is fetching them. Hence:

- Nothing is gathered beforehand. Programs of the heads of a run, and of runs that share ancestors, follow each other,
  so the L2 cache serves most of what several of them read.
- A tensor core's smallest tile has 16 rows, most of which few queries leave empty: runs do not share their keys, so
  that packing several into a tile would compute all scores between strangers to keep the diagonal. That costs no time
  while fetching does; what counts is that registers let an SM hold many programs. So rows and keys of a program are few
  where heads are wide, and its warps have 1,024 numbers of the tile each (512 of float32). Only a single row, in which
  tiles would take more registers, is multiplied elementwise: at 16 keys of width 64 a program does 2,000 multiply-adds
  for the 4 KB that it fetches, far below the 10 per byte at which an H100's plain float32 units would hold it up.
- Float32 is multiplied in full ("ieee"), which tensor cores do not do at all.
- Offsets are 64-bit, since rows x width passes 2^31; the grid has one axis, since the others end at 65,535.
"""

from itertools import groupby

import torch
import triton
import triton.language as tl
from torch import Tensor

from causalcone.kernels.fused.parts import INTERPRETED, power_of_two, tanh, warps_for
from causalcone.kernels.row_attention import LaunchShape, RunRows, ScoreRule


def attend_rows(
    queries: Tensor, keys_values: Tensor, runs: RunRows[Tensor], scoring: ScoreRule, out: Tensor, tile: int = 0
) -> None:
    """``out`` (sum of B * m, H * d) = the heads' outputs of query rows, as ``kernels/row_attention.py`` says; runs of
    a tile in one launch."""
    assert queries.is_contiguous()
    assert keys_values.is_contiguous()
    assert out.is_contiguous()
    d = scoring.head_dim
    groups = keys_values.shape[1] // (2 * d)
    sharing = queries.shape[1] // d // groups
    padded, first = power_of_two(d, 16), 0

    def tile_of(alike: LaunchShape) -> tuple[bool, int, int, int, int]:
        return _tile(alike.queries * sharing, alike.keys, padded, queries.dtype)

    for (dot, rows, keys, warps, blocks), alike in groupby(runs.alike, tile_of):
        count = sum(shape.runs for shape in alike)
        _attend[(count * groups * blocks,)](
            queries, keys_values, runs.queries, runs.keys, runs.tokens, runs.table[first:], out,
            scoring.scale, scoring.softcap or 0.0, scoring.window or 0, blocks,
            HEAD_DIM=d, PADDED=padded, GROUPS=groups, SHARING=sharing, ROWS=rows, KEYS=keys,
            CAPPED=scoring.softcap is not None, WINDOWED=scoring.window is not None, DOT=dot, INTERPRETED=INTERPRETED,
            num_warps=warps, num_stages=1,
        )  # fmt: skip
        first += count


def _tile(rows: int, keys: int, width: int, dtype: torch.dtype) -> tuple[bool, int, int, int, int]:
    """Whether products are those of tiles, rows and keys of a program, its warps, and the programs of a key head.

    What a program holds of keys, values and outputs has to stay in registers and in the SM's shared memory.
    """
    if rows == 1:
        return False, 1, 16, warps_for(16 * width), 1
    full = dtype == torch.float32
    most = max(16, min(32 if full else 64, 4096 // width))
    tall, seen = (min(power_of_two(size, 16), most) for size in (rows, keys))
    return True, tall, seen, max(2, tall * width // (512 if full else 1024)), triton.cdiv(rows, tall)


@triton.jit(do_not_specialize=["window", "blocks"])
def _attend(queries, keys_values, query_rows, key_rows, tokens, table, out, scale, softcap, window, blocks,
            HEAD_DIM: tl.constexpr, PADDED: tl.constexpr, GROUPS: tl.constexpr, SHARING: tl.constexpr,
            ROWS: tl.constexpr, KEYS: tl.constexpr, CAPPED: tl.constexpr, WINDOWED: tl.constexpr, DOT: tl.constexpr,
            INTERPRETED: tl.constexpr):  # fmt: skip
    number = tl.program_id(0).to(tl.int64)
    group = number % GROUPS
    block = number // GROUPS % blocks
    run = table + number // GROUPS // blocks * 4
    first_query = tl.load(run).to(tl.int64)
    first_key = tl.load(run + 1).to(tl.int64)
    first_token = tl.load(run + 2)
    m = tl.load(run + 3)
    width: tl.constexpr = GROUPS * SHARING * HEAD_DIM

    # row r of the tile is query r // SHARING, in the head r % SHARING of this key head
    row = block * ROWS + tl.arange(0, ROWS)
    query = row // SHARING
    head = group * SHARING + row % SHARING
    alive = query < m
    token = tl.load(tokens + first_token + query, mask=alive, other=0)
    query_row = tl.load(query_rows + first_query + query, mask=alive, other=0).to(tl.int64)
    dims = tl.arange(0, PADDED)
    inside = dims < HEAD_DIM
    here = alive[:, None] & inside[None, :]
    columns = head[:, None] * HEAD_DIM + dims[None, :]
    q = tl.load(queries + query_row[:, None] * width + columns, mask=here, other=0)

    last = tl.max(tl.where(alive, token, -1), 0) + 1  # 0 where a run has fewer queries than its launch allows for
    first = last * 0
    if WINDOWED:
        first = tl.maximum(tl.min(tl.where(alive, token, last), 0) - window + 1, 0)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, PADDED], tl.float32)
    for start in range(first, last, KEYS):
        key = start + tl.arange(0, KEYS)
        there = key < last
        key_row = tl.load(key_rows + first_key + key, mask=there, other=0).to(tl.int64)
        source = keys_values + key_row[:, None] * (2 * GROUPS * HEAD_DIM) + group * HEAD_DIM + dims[None, :]
        there_inside = there[:, None] & inside[None, :]
        k = tl.load(source, mask=there_inside, other=0)
        v = tl.load(source + GROUPS * HEAD_DIM, mask=there_inside, other=0)
        if DOT:
            if INTERPRETED:  # it multiplies the bits of bfloat16 as integers
                scores = tl.dot(q.to(tl.float32), tl.trans(k.to(tl.float32)), input_precision="ieee")
            else:
                scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        else:
            scores = tl.sum(q.to(tl.float32)[:, None, :] * k.to(tl.float32)[None, :, :], 2)
        scores *= scale
        if CAPPED:
            scores = softcap * tanh(scores / softcap)
        seen = key[None, :] <= token[:, None]
        if WINDOWED:
            seen = seen & (key[None, :] > token[:, None] - window)
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # where a row sees none of these keys nor any before
        weights = tl.exp(scores - base[:, None])
        shrinking = tl.exp(top - base)
        total = total * shrinking + tl.sum(weights, 1)
        sums *= shrinking[:, None]
        if DOT:
            if INTERPRETED:
                sums += tl.dot(weights.to(v.dtype).to(tl.float32), v.to(tl.float32), input_precision="ieee")
            else:
                sums += tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        else:
            sums += tl.sum(weights[:, :, None] * v.to(tl.float32)[None, :, :], 1)
        top = higher

    mean = sums / tl.where(total == 0, 1.0, total)[:, None]
    target = out + (first_query + query)[:, None] * width + columns
    tl.store(target, mean.to(out.dtype.element_ty), mask=here)
