"""Float32 products are computed in full, or in TF32 where that is asked for, whatever the process has set."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from helpers.models import FACTS, gpt2

import causalcone as cc
from causalcone.engine.run import runner as job
from causalcone.kernels.precision import each_within, float32_products

CUDA, CPU = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul


def _as_torch_comes():
    torch.set_float32_matmul_precision("highest")
    CUDA.fp32_precision = CPU.fp32_precision = torch.backends.fp32_precision = "none"


def _tf32_of_everything():
    torch.backends.fp32_precision = "tf32"


def _tf32_of_cuda():
    CUDA.fp32_precision = "tf32"


SETTINGS = {
    "as torch comes": _as_torch_comes,
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "highest": lambda: torch.set_float32_matmul_precision("highest"),
    "TF32 of everything": _tf32_of_everything,
    "TF32 of CUDA": _tf32_of_cuda,
}


@pytest.fixture(params=SETTINGS.values(), ids=SETTINGS)
def setting(request):
    _as_torch_comes()
    request.param()
    yield
    _as_torch_comes()


def state():
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:  # only the newer interface was used
        older = None
    return CUDA.fp32_precision, CPU.fp32_precision, torch.backends.fp32_precision, older


def assert_as(before):
    """All is as it was, but that the older interface may be readable now."""
    now = state()
    assert now[:3] == before[:3]
    assert before[3] in (now[3], None)


@pytest.mark.parametrize("tf32", [False, True])
def test_precision_is_what_was_asked_for_and_then_what_it_was(setting, tf32):
    before = state()
    with float32_products(tf32):
        assert CUDA.fp32_precision in (("tf32",) if tf32 else ("ieee", "none"))
        assert CPU.fp32_precision in (("tf32",) if tf32 else ("ieee", "none"))
        assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")  # both interfaces agree
    assert_as(before)


def test_precision_is_what_it_was_after_an_error(setting):
    before = state()
    with pytest.raises(ZeroDivisionError), float32_products(tf32=True):
        raise ZeroDivisionError
    assert_as(before)


@pytest.mark.parametrize("tf32", [False, True])
def test_passes_compute_as_asked_and_who_takes_their_results_sees_nothing(setting, tf32, tokenizer, monkeypatch):
    before, within = state(), []
    run_pass = job.run_pass

    def observed(*arguments):
        within.append(CUDA.fp32_precision)
        return run_pass(*arguments)

    monkeypatch.setattr(job, "run_pass", observed)
    monkeypatch.setattr("causalcone.engine.run.scheduler.MAX_ROWS_CPU", 1)
    tracer = cc.Tracer(gpt2(2, dtype=torch.float32), tokenizer, tf32=tf32)
    for _ in tracer.stream(FACTS[:2], ("hidden:1",), samples=1, sigma=0.1):
        assert_as(before)
    assert len(within) > 2
    assert set(within) <= ({"tf32"} if tf32 else {"ieee", "none"})


@pytest.mark.parametrize("asked", [{}, {"tf32": True}])
def test_edits_and_their_scores_compute_as_asked(asked, tokenizer, monkeypatch):
    from causalcone.engine.edit.runs.layers import Layers

    within, advance = [], Layers.advance

    def observed(*arguments, **options):
        within.append(CUDA.fp32_precision)
        return advance(*arguments, **options)

    monkeypatch.setattr(Layers, "advance", observed)
    torch.set_float32_matmul_precision("medium")
    try:
        editor = cc.Editor(gpt2(dtype=torch.float32), tokenizer, **asked)
        requests = editor.requests([replace(FACTS[0], target_new=FACTS[1].target_true)], filtered=False)
        edits = editor.finetune(requests, layers=(1,), hparams=cc.FinetuneHparams(steps=1))
        editor.score(edits)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        _as_torch_comes()
    assert within
    assert set(within) == ({"tf32"} if asked else {"ieee"})


def test_items_are_computed_within_and_taken_without():
    entered, closed = [], []

    @contextmanager
    def context():
        entered.append(True)
        yield
        entered.pop()

    def items():
        try:
            for number in range(3):
                assert entered
                yield number
        finally:
            closed.append(True)

    taking = each_within(context, items())
    assert next(taking) == 0
    assert not entered
    taking.close()
    assert closed
    assert list(each_within(context, items())) == [0, 1, 2]


@pytest.mark.gpu(real=True)
def test_tf32_rounds_and_float32_does_not(tokenizer):
    model = gpt2(dtype=torch.float32).cuda()
    exact = cc.Tracer(model, tokenizer, dtype="float64").trace(FACTS, samples=2)["p_patched"].to_numpy()
    torch.set_float32_matmul_precision("medium")
    try:
        full = cc.Tracer(model, tokenizer).trace(FACTS, samples=2)["p_patched"].to_numpy()
        rounded = cc.Tracer(model, tokenizer, tf32=True).trace(FACTS, samples=2)["p_patched"].to_numpy()
    finally:
        _as_torch_comes()
    assert abs(full - exact).max() < 1e-5
    assert 1e-7 < abs(rounded - exact).max() < 0.05
