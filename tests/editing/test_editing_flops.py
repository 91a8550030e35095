"""FLOPs of editing by formula against those of the products that are executed, but for attention's."""

from __future__ import annotations

import pytest
import torch
from helpers.command_line import running_text
from helpers.counted_flops import counted
from helpers.edited_models import dense, low_rank
from helpers.editing_cases import FULL

from causalcone import Editor
from causalcone.engine.edit.deltas.delta import Delta
from causalcone.engine.edit.methods.edits import edit_of
from causalcone.engine.edit.methods.hparams import MemitHparams
from causalcone.engine.edit.moments.moments import Moments
from causalcone.engine.edit.requests.prompts import ESSENCE, Encoder
from causalcone.engine.edit.requests.windows import Window
from causalcone.engine.edit.runs.decoding import continuations
from causalcone.engine.edit.runs.flops import Asked, Flops, Grown, Searched
from causalcone.engine.edit.runs.packed_runs import Text
from causalcone.engine.edit.scoring.probes import probes_of
from causalcone.engine.edit.texts.contexts import Contexts
from causalcone.engine.run.session import Session


@pytest.fixture(scope="module")
def editor(model, tokenizer):
    moments = Moments.collect(model, tokenizer, running_text()).with_ridge(0.1)
    editor = Editor(model, tokenizer, moments, Contexts(("They say",), ("In the city", "Bo")))
    editor.score(editor.finetune(editor.requests(FULL[:1], filtered=False), 0))  # verifies the model
    return editor


def asked(request, encoder):
    questions = probes_of(request, encoder)
    distinct = {(each.run, place) for each in questions.probes for place in range(len(each.tokens))}
    return Asked(questions.rows, sum(questions.read), len(distinct))


@pytest.mark.parametrize("rank", [1, 3, None])
@pytest.mark.parametrize("window", [(0,), (1, 2), (2, 3), (3,)])
def test_scoring(editor, model, window, rank):
    """Of changes of any rank, and of dense ones, in several layers."""
    request = editor.requests(FULL[:1], filtered=False)[0]
    of = Flops(editor.session.sizes)
    make = dense if rank is None else lambda model: low_rank(model, rank)
    edit = edit_of(
        request, "finetune", Window.of(window, 4), steps=1, loss=0.0, delta=Delta({at: make(model) for at in window})
    )
    own = asked(request, Encoder(editor.session.prompts, editor.session.sizes))
    executed = counted(lambda: editor.score([edit]))
    assert of.unedited(own, whole=window[0] == 3) + of.edited(own, window, rank) == executed


def test_joint_edits(editor):
    sizes, requests = editor.session.sizes, editor.requests(FULL[:2], filtered=False)
    encoder = Encoder(editor.session.prompts, sizes)
    texts = Searched.total(
        (
            Searched.of(
                [(len(each.text), each.lookup) for each in encoder.contexts(request, editor.contexts.memit)],
                encoder.prompted(request, ESSENCE).lookup + 1,
                len(request.target),
            ),
            1,
        )
        for request in requests
    )
    hparams = MemitHparams(steps=2, stop_loss=None)
    for layer in (1, 2):
        editor.moments.solve(layer, torch.ones(sizes.inner, 1, dtype=torch.float64))
    executed = counted(lambda: editor.memit(requests, ((1, 2),), hparams=hparams, joint=True))
    # what solves with second moments is left out: the facts' keys among themselves, and the change made of them
    n, solves = 2, 2
    executed -= solves * 2 * n * n * sizes.inner
    assert Flops(sizes).memit_joint(texts, [(1, 2)], 2) == pytest.approx(executed, rel=0.01)


@pytest.mark.parametrize("edited", [False, True])
def test_decoding(model, tokenizer, edited):
    session = Session(model, tokenizer)
    texts = [Text((5, 17, 230)), Text((5, 9, 41, 8, 99))]
    deltas = [Delta({1: low_rank(model, 2), 2: low_rank(model, 2)}) for _ in texts] if edited else None
    executed = counted(lambda: continuations(session, texts, [4, 7], deltas=deltas))
    found = Flops(session.sizes).decoding(Grown(2, 8, 11), changed=2 if edited else 0, rank=2)
    assert found == pytest.approx(executed, rel=1e-9)


def test_moments(model, tokenizer):
    executed = counted(lambda: Moments.collect(model, tokenizer, running_text(), (0, 2), tokens=200))
    sizes = Session(model, tokenizer).sizes
    found = Flops(sizes).moments(200, (0, 2))
    # products of keys are made in strips, of which small models have one: the whole square
    assert found <= executed <= found + 200 * 2 * 2 * sizes.inner**2


def test_counts_of_nothing():
    assert Grown.total([]) == Grown(0, 0, 0)
    assert Grown.total([(Grown(1, 2, 3), 2), (Grown(1, 1, 1), 0.5)]) == Grown(2.5, 4.5, 6.5)
    assert Asked.after(5, [1, 1]) == Asked(5, 1, 1)
    assert Asked.after(5, [2, 3, 1]) == Asked(13, 5, 5)


@pytest.mark.parametrize("window", [(0,), (1, 2), (2, 3)])
def test_ultraedit(editor, window):
    """But for the products of what is seen with itself."""
    sizes, requests = editor.session.sizes, editor.requests(FULL[:3], filtered=False)
    encoder = Encoder(editor.session.prompts, sizes)
    rows = sum(len(encoder.trained(request, 1)[0]) for request in requests)
    read = sum(len(request.target) for request in requests)
    executed = counted(lambda: list(editor.batches(requests, "ultraedit", [window])))
    assert Flops(sizes).one_pass(rows, read, [window]) == pytest.approx(executed, rel=0.01)
