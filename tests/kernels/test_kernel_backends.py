"""The choice of backends, flash-attn's form with a stand-in for its kernels, and whole traces in Triton."""

import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from helpers.editing_cases import INJECTION
from helpers.families import FAMILIES
from helpers.kernel_cases import devices, random, runs_together
from helpers.models import FACTS, gpt2, tokenizer

import causalcone as cc
from causalcone.kernels import backends, flash_attention, row_attention
from causalcone.kernels.backends import TORCH, BackendError, backends_of, choose
from causalcone.kernels.gathering import RowSum
from causalcone.kernels.row_attention import ScoreRule

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ALL_TRITON = backends_of("triton", "triton")


@pytest.fixture(autouse=True)
def nothing_forced(monkeypatch):
    monkeypatch.delenv(backends.KERNELS, raising=False)
    monkeypatch.delenv(backends.ATTENTION, raising=False)


@pytest.fixture
def installed(monkeypatch):
    """A machine that has Triton and flash-attn, and no interpreter."""
    monkeypatch.setattr(backends, "find_spec", lambda name: name)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.usefixtures("installed")
def test_choices(monkeypatch):
    assert choose(CPU, torch.float32) == TORCH
    assert choose(CUDA, torch.float32) == choose(CUDA, torch.bfloat16) == ALL_TRITON
    assert choose(CUDA, torch.float64) == choose(CUDA, torch.float64, "triton") == TORCH
    assert choose(CUDA, torch.float16, "torch") == TORCH
    assert choose(CUDA, torch.bfloat16, "flash") == backends_of("flash", "triton")
    monkeypatch.setenv(backends.KERNELS, "torch")
    assert choose(CUDA, torch.float32) == TORCH
    assert choose(CUDA, torch.float32, "triton") == ALL_TRITON
    monkeypatch.setenv(backends.ATTENTION, "triton")
    assert choose(CUDA, torch.float32) == backends_of("triton", "torch")


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("device", "dtype", "kernels", "message"),
    [
        (CPU, torch.float32, "cuda", "kernels='cuda' is not a backend; choose from torch, triton, flash"),
        (CPU, torch.float32, "triton", "TRITON_INTERPRET=1"),
        (CPU, torch.bfloat16, "flash", "runs on CUDA devices"),
        (CUDA, torch.float32, "flash", "bfloat16 and float16"),
    ],
)
def test_what_cannot_be_used_is_named(device, dtype, kernels, message):
    with pytest.raises(BackendError, match=message):
        choose(device, dtype, kernels)


@pytest.mark.parametrize(("variable", "name"), [(backends.KERNELS, "triton"), (backends.ATTENTION, "flash")])
def test_what_is_missing_is_named(monkeypatch, variable, name):
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    monkeypatch.setenv(variable, name)
    with pytest.raises(BackendError, match=f"{variable}={name}, but .* is not installed: pip install"):
        choose(CUDA, torch.bfloat16)


def test_a_tracer_that_cannot_have_its_kernels():
    with pytest.raises(cc.CausalconeError, match="choose from"):
        cc.Tracer(gpt2(), tokenizer(), kernels="best")


def test_a_kernel_that_fails_says_how_to_do_without():
    triton = pytest.importorskip("triton")
    assert triton
    with pytest.raises(AssertionError) as raised:
        ALL_TRITON.add_rows(RowSum(*[torch.ones(4, 4).T, torch.arange(2)] * 2), torch.empty(2, 4), 1)
    assert "CAUSALCONE_KERNELS=torch" in raised.value.__notes__[0]


@pytest.mark.slow
def test_the_package_does_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import causalcone.engine.run.forward, causalcone.engine.localize.tracer\n"
        "print(*(name for name in sys.modules if name.startswith('causalcone.kernels.fused')))"
    )
    assert not subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def stand_in(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_size,
             softcap, return_attn_probs):  # fmt: skip
    """What flash-attn documents of ``flash_attn_varlen_func``, in torch, sequence by sequence."""
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert max_seqlen_q == cu_seqlens_q.diff().max()
    assert max_seqlen_k == cu_seqlens_k.diff().max()
    assert (cu_seqlens_q[-1], cu_seqlens_k[-1]) == (len(q), len(k))
    out, sums = torch.empty_like(q), torch.empty(q.shape[1], len(q))
    ends = zip(*(cu.tolist() for cu in (cu_seqlens_q[:-1], cu_seqlens_q[1:], cu_seqlens_k[:-1], cu_seqlens_k[1:])),
               strict=True)  # fmt: skip
    for q0, q1, k0, k1 in ends:
        keys, values = (each[k0:k1].repeat_interleave(q.shape[1] // k.shape[1], 1) for each in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[q0:q1], keys) * softmax_scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        behind = torch.arange(q1 - q0)[:, None] + (k1 - k0) - (q1 - q0) - torch.arange(k1 - k0)
        hidden = behind < 0 if causal else torch.zeros_like(behind, dtype=torch.bool)
        if window_size != (-1, -1):
            hidden |= (behind > window_size[0]) | (-behind > window_size[1])
        scores = scores.masked_fill(hidden, float("-inf"))
        sums[:, q0:q1] = scores.logsumexp(-1)
        out[q0:q1] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)
    return out, sums, None


@pytest.mark.parametrize("window", [None, 3, 50])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("tokens", [(7,), (4, 5, 6, 7), (0, 1, 4, 7), tuple(range(8))], ids=str)
@pytest.mark.parametrize("count", [0, 1, 9])
def test_flash_attention(monkeypatch, window, softcap, tokens, count):
    """Runs of two ancestors with various forks, some of which are the same run twice."""
    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(flash_attn_varlen_func=stand_in))
    generator = torch.Generator().manual_seed(count)
    ancestors = torch.randperm(16, generator=generator).view(2, 8)[torch.arange(count) % 2]
    fork = torch.randint(9, (count, 1), generator=generator)
    own = 16 + torch.arange(count * 8).view(count, 8)
    key_rows = torch.where(torch.arange(8) < fork, ancestors, own)
    query_rows = torch.randint(100, (count, len(tokens)), generator=generator)
    queries, keys_values = random(100, 4 * 8), random(100, 2 * 2 * 8, seed=1)
    exact, found = torch.empty(2, count * len(tokens), 4 * 8)
    arguments = (
        queries,
        keys_values,
        runs_together((query_rows, key_rows, tokens)),
        ScoreRule(8, 0.7, softcap, window),
    )
    row_attention.attend_rows(*arguments, exact, 1000)
    flash_attention.attend_rows(*arguments, found)
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-6)
    monkeypatch.setattr(flash_attention, "MAX_RUNS", 4)
    found.fill_(torch.nan)
    flash_attention.attend_rows(*arguments, found)
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-6)


@devices
@pytest.mark.parametrize("name", ["gpt2", "gptj", "llama", "gemma2", "gemma3_text", "olmo2", "starcoder2"])
def test_a_whole_trace(name, device):
    """Sequential and parallel blocks, grouped queries, bounded scores, windows, norms behind as well."""
    pytest.importorskip("triton")
    model = FAMILIES[name](2, 16, 4, dtype=torch.float32).to(device)
    options = {"samples": 2, "sigma": 0.5, "tokens": "subject_last"}
    states = (("hidden", 1), ("mlp", 2), ("attn", 2), ("head.1", 1))
    found, exact = (
        cc.Tracer(model, tokenizer(), kernels=kernels).trace(FACTS[:1], states, **options).to_pydict()
        for kernels in ("triton", "torch")
    )
    for column in ("p_clean", "p_corrupted", "p_patched"):
        np.testing.assert_allclose(*(np.array(each[column], dtype=float) for each in (found, exact)), atol=1e-5)


@devices
def test_edits_and_their_scores(device):
    """Fine-tuning in a window of layers; a weight that goes the other way in one step is an error of a third."""
    pytest.importorskip("triton")
    model = gpt2(2, 16, dtype=torch.float32).to(device)
    hparams = cc.FinetuneHparams(steps=3, lr=5e-3, norm_constraint=1.2e-2, stop_loss=None)
    changes, probes = [], []
    for kernels in ("triton", "torch"):
        editor = cc.Editor(model, tokenizer(), kernels=kernels)
        edits = editor.finetune([INJECTION], (0,), 2, hparams)
        changes.append(edits[0].delta.changes)
        probes.append(np.array(editor.score(edits)["p_post"].to_pylist(), dtype=float))
    for layer, change in changes[0].items():
        torch.testing.assert_close(change.weight, changes[1][layer].weight, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(change.bias, changes[1][layer].bias, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(*probes, atol=1e-4)
