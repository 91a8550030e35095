"""Row-indexed attention in Triton gives what its torch form gives."""

import pytest
import torch
from helpers.kernel_cases import assert_near, devices, dtypes, random, runs_together

from causalcone.kernels import row_attention
from causalcone.kernels.backends import backends_of
from causalcone.kernels.row_attention import ScoreRule, visible_keys

TRITON = backends_of("triton", "torch")

pytest.importorskip("triton")


def runs_of(count, tokens, keys, device, seed=0):
    """Query rows (B, m) and key rows (B, K) of runs that share ancestors, among 3 * B * K packed rows."""
    generator = torch.Generator().manual_seed(seed)
    rows = 3 * max(count, 1) * keys
    ancestor = torch.randperm(rows, generator=generator)[:keys]
    own = torch.randint(rows, (count, keys), generator=generator)
    fork = torch.randint(keys + 1, (count, 1), generator=generator)
    key_rows = torch.where(torch.arange(keys) < fork, ancestor, own)
    query_rows = torch.randint(rows, (count, len(tokens)), generator=generator)
    return rows, query_rows.to(device), key_rows.to(device)


def assert_like_torch(device, dtype, heads, groups, head_dim, tokens, keys, count=3, softcap=None, window=None):
    rows, query_rows, key_rows = runs_of(count, tokens, keys, device)
    queries = random(rows, heads * head_dim, device=device, dtype=dtype)
    keys_values = random(rows, 2 * groups * head_dim, device=device, dtype=dtype, seed=1)
    scoring = ScoreRule(head_dim, 1.7 * head_dim**-0.5, softcap, window)
    index = (runs_together((query_rows, key_rows, tokens)), scoring)
    width = (count * len(tokens), heads * head_dim)
    exact = torch.empty(width, device=device)
    found = torch.full(width, torch.nan, dtype=dtype, device=device)
    row_attention.attend_rows(queries.float(), keys_values.float(), *index, exact, 16)
    TRITON.attend_rows(queries, keys_values, *index, found, 16)
    assert_near(found, exact, dtype)


@devices
@dtypes
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("tokens", [(9,), tuple(range(10))], ids=["one query", "all queries"])
def test_head_sizes(device, dtype, head_dim, tokens):
    assert_like_torch(device, dtype, 2, 2, head_dim, tokens, 10)


@devices
@dtypes
@pytest.mark.parametrize(("heads", "groups"), [(6, 2), (8, 1), (3, 3)])
@pytest.mark.parametrize("tokens", [(6,), (2, 5, 6)], ids=["one query", "queries with gaps"])
def test_grouped_queries(device, dtype, heads, groups, tokens):
    assert_like_torch(device, dtype, heads, groups, 64, tokens, 7)


@devices
@dtypes
@pytest.mark.parametrize("softcap", [None, 2.0, 50.0])
@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("tokens", [(8,), tuple(range(9))], ids=["one query", "all queries"])
def test_softcaps_and_windows(device, dtype, softcap, window, tokens):
    assert_like_torch(device, dtype, 4, 2, 64, tokens, 9, softcap=softcap, window=window)


@devices
@pytest.mark.parametrize("window", [None, 30])
@pytest.mark.parametrize("tokens", [(149,), tuple(range(40, 150))], ids=["one query", "many queries"])
def test_more_than_a_block_of_keys(device, tokens, window):
    assert_like_torch(device, torch.float32, 2, 1, 64, tokens, 150, count=2, window=window)


@devices
@pytest.mark.parametrize(("count", "tokens", "keys"), [(0, (3,), 4), (1, (0,), 1), (1, (0, 1), 2)])
def test_no_runs_and_runs_of_a_row(device, count, tokens, keys):
    assert_like_torch(device, torch.float32, 2, 2, 64, tokens, keys, count=count)


@devices
@dtypes
@pytest.mark.parametrize(("softcap", "window"), [(None, None), (2.0, 3)])
def test_batches_of_many_sizes(device, dtype, softcap, window):
    """One call for all segments of a layer: sizes come mixed, and outputs lie in the batches' order. One launch is for
    all runs of about a size, of which some leave programs without queries."""
    generator = torch.Generator().manual_seed(2)
    shapes = [(3, (4,), 5), (1, tuple(range(20)), 20), (2, (1, 3), 6), (5, (16,), 17), (2, (2, 69), 70), (4, (0,), 1)]
    shapes += [(1, tuple(range(45)), 45), (1, tuple(range(20, 38)), 40)]
    batches = [
        (
            torch.randint(50, (n, len(tokens)), generator=generator),
            torch.randint(50, (n, K), generator=generator),
            tokens,
        )
        for n, tokens, K in shapes
    ]
    batches = [(queries.to(device), keys.to(device), tokens) for queries, keys, tokens in batches]
    queries, keys_values = random(50, 6 * 16, device=device, dtype=dtype), random(50, 64, device=device, dtype=dtype)
    scoring, runs = ScoreRule(16, 0.4, softcap, window), runs_together(*batches)
    assert len(runs.alike) < len(runs.batches)
    exact, found = (torch.full((len(runs.queries), 96), torch.nan, device=device) for _ in range(2))
    found = found.to(dtype)
    row_attention.attend_rows(queries.float(), keys_values.float(), runs, scoring, exact, 16)
    TRITON.attend_rows(queries, keys_values, runs, scoring, found, 16)
    assert_near(found, exact, dtype)
    first = 0
    for batch in batches:  # and each batch gives what it gives alone
        alone = torch.empty(batch[0].numel(), 96, device=device)
        row_attention.attend_rows(queries.float(), keys_values.float(), runs_together(batch), scoring, alone, 16)
        torch.testing.assert_close(exact[first : first + len(alone)], alone)
        first += len(alone)


@devices
def test_it_writes_nothing_beside_its_slice(device):
    rows, query_rows, key_rows = runs_of(2, (3, 4), 5, device)
    queries, keys_values = random(rows, 2 * 20, device=device), random(rows, 4 * 20, device=device)
    whole = torch.full((8, 40), 7.0, device=device)
    runs = runs_together((query_rows, key_rows, (3, 4)))
    TRITON.attend_rows(queries, keys_values, runs, ScoreRule(20, 0.2), whole[2:6], 16)
    assert (whole[:2] == 7).all()
    assert (whole[6:] == 7).all()
    assert (whole[2:6] != 7).all()


@pytest.mark.gpu(real=True)
def test_rows_beyond_two_to_the_31_elements():
    rows, width = 600_000, 4096
    queries = torch.zeros(rows, width, dtype=torch.bfloat16, device="cuda")
    keys_values = torch.zeros(rows, 2 * width, dtype=torch.bfloat16, device="cuda")
    queries[-4:], keys_values[-4:] = random(4, width), random(4, 2 * width)
    index = torch.arange(rows - 4, rows, device="cuda").repeat(100_000, 1)
    scoring = ScoreRule(64, 0.125)
    out = torch.empty(100_000, width, dtype=torch.bfloat16, device="cuda")
    TRITON.attend_rows(queries, keys_values, runs_together((index[:, 3:], index, (3,))), scoring, out, 16)
    exact = torch.empty(1, width, device="cuda")
    own = torch.arange(4, device="cuda")[None]
    last = queries[-4:].float(), keys_values[-4:].float(), runs_together((own[:, 3:], own, (3,)))
    row_attention.attend_rows(*last, scoring, exact, 16)
    assert_near(out[-1:], exact, torch.bfloat16)


def test_visible_keys():
    seen = visible_keys(torch.tensor([0, 3]), 4, 2)
    assert seen.tolist() == [[True, False, False, False], [False, False, True, True]]
