"""The oracle's kinds of noise, severing, joint restoring and zeroing, each against another way to the same numbers."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.models import FACTS, gpt2, tokenizer
from oracles import tracing as oracle
from oracles.facts import correlated, heaviness

LAYERS = 3
FACT = FACTS[1]
SIGMA = 0.5


@pytest.fixture(scope="module")
def model():
    return gpt2(layers=LAYERS)


@pytest.fixture(scope="module")
def case(model):
    return oracle.encode(model, tokenizer(), FACT, "argmax")


def trace(model, fact=FACT, **options):
    return oracle.trace(model, tokenizer(), [fact], **{"samples": 3, "sigma": SIGMA, "target": "argmax", **options})


def corruption(kind, replace=False, **parameters):
    return SimpleNamespace(kind=kind, replace=replace, **parameters)


def p_with(model, case, noise, replace=False):
    """The mean probability where noise (J, n, width) is on the embeddings of n tokens from the subject's first on."""
    embeddings = model.transformer.wte(torch.tensor([case.prompt] * len(noise))).detach()
    place = embeddings[:, case.start : case.start + noise.shape[1]]
    place[:] = torch.from_numpy(noise) + (0 if replace else place)
    with torch.no_grad():
        return float(model(inputs_embeds=embeddings).logits[:, -1].softmax(-1)[:, case.target[0]].mean())


def shape(model, case):
    return 3, case.end - case.start, model.config.n_embd


def values(rows, column="p_patched"):
    return np.array([row[column] for row in rows])


def same(*several):
    first, *others = (values(rows) for rows in several)
    return all(np.allclose(first, other, rtol=1e-12, atol=0) for other in others)


# Noise


@pytest.mark.parametrize("replace", [False, True])
def test_uniform_noise(model, case, replace):
    eps = np.random.RandomState(4).uniform(-1, 1, shape(model, case))
    rows = trace(model, noise=corruption("uniform", replace), seed=4, tokens="last")
    assert rows[0]["p_corrupted"] == pytest.approx(p_with(model, case, SIGMA * eps, replace), rel=1e-12)


def test_replaced_embeddings(model, case):
    eps = np.random.RandomState(1).randn(*shape(model, case))
    rows = trace(model, noise=corruption("gaussian", replace=True))
    assert rows[0]["p_corrupted"] == pytest.approx(p_with(model, case, SIGMA * eps, replace=True), rel=1e-12)
    published = trace(model, noise=corruption("gaussian", replace=True), compat="published")
    assert same(rows, published)
    assert published[0]["p_corrupted"] == trace(model)[0]["p_corrupted"] != rows[0]["p_corrupted"]


def test_a_transformed_gaussian_has_the_mean_and_covariance_it_is_given():
    mixing = np.random.RandomState(0).randn(5, 5)
    root = correlated(np.eye(5), np.zeros(5), mixing @ mixing.T)
    np.testing.assert_allclose(root.T @ root, mixing @ mixing.T, rtol=1e-10)
    np.testing.assert_allclose(correlated(np.zeros((2, 3, 5)), np.arange(5), mixing @ mixing.T)[1, 2], np.arange(5))
    # W = V sqrt(S): its columns are orthogonal, so that each direction is a multiple of one direction of the space
    squares = root @ root.T
    np.testing.assert_allclose(squares, np.diag(np.diag(squares)), atol=1e-10)


def test_multivariate_noise(model, case):
    """With a covariance of one direction only, whatever the signs of the singular vectors."""
    width = model.config.n_embd
    mean, direction = np.random.RandomState(5).randn(2, width) / 3
    noise = corruption("multivariate", mean=mean, covariance=np.outer(direction, direction))
    along = np.random.RandomState(1).randn(*shape(model, case))[:, :, :1]
    p = trace(model, noise=noise, sigma=99.0, tokens="last")[0]["p_corrupted"]
    either = [p_with(model, case, mean + sign * along * direction) for sign in (1, -1)]
    assert p == pytest.approx(min(either, key=lambda each: abs(each - p)), rel=1e-6)
    assert abs(either[0] / either[1] - 1) > 1e-3


def test_student_noise_is_gaussian_noise_with_heavier_tails(model, case):
    width = model.config.n_embd
    mean, scales = np.random.RandomState(5).randn(2, width) / 3
    parameters = {"mean": mean, "covariance": np.diag(scales**2)}
    options = {"tokens": "last", "seed": 7}
    u = np.random.RandomState(8).chisquare(4, size=3 * (case.end - case.start)).reshape(3, -1, 1)
    gaussian = correlated(np.random.RandomState(7).randn(*shape(model, case)), mean, np.diag(scales**2))
    p = trace(model, noise=corruption("t", dof=4, **parameters), **options)[0]["p_corrupted"]
    assert p == pytest.approx(p_with(model, case, gaussian * np.sqrt(2 / u)), rel=1e-12)
    nearly_gaussian = trace(model, noise=corruption("t", dof=1e12, **parameters), **options)[0]["p_corrupted"]
    plain = trace(model, noise=corruption("multivariate", dof=None, **parameters), **options)[0]["p_corrupted"]
    assert nearly_gaussian == pytest.approx(plain, rel=1e-4)
    assert np.mean(heaviness(8, (300, 300), seed=0) ** 2) == pytest.approx(1, rel=0.02)


def test_extra_tokens_are_a_longer_subject(model, case):
    fact = dataclasses.replace(FACT, prompt="The mother tongue of {} to be", subject=FACT.subject + " is known")
    longer = oracle.encode(model, tokenizer(), fact, "argmax")
    assert longer.prompt == case.prompt
    rows = trace(model, extra_tokens=longer.end - case.end)
    assert {(row["subject_start"], row["subject_end"]) for row in rows} == {(case.start, case.end)}
    assert same(rows, trace(model, fact))
    assert not same(rows, trace(model))


def test_extra_tokens_end_with_the_prompt(model, case):
    eps = np.random.RandomState(1).randn(3, len(case.prompt) - case.start, model.config.n_embd)
    rows = trace(model, extra_tokens=100, tokens="last")
    assert rows[0]["p_corrupted"] == pytest.approx(p_with(model, case, SIGMA * eps), rel=1e-12)


@pytest.mark.parametrize("target", ["argmax", "label"])
def test_the_counterfactual_run_is_the_other_prompt(model, target):
    """The target stays that of the fact; its probability after a text is the product over its tokens."""
    fact = dataclasses.replace(FACTS[0], target_true="in Seattle", counterfactual_subject="Bo Lee")
    case = oracle.encode(model, tokenizer(), fact, target)
    other = oracle.encode(model, tokenizer(), dataclasses.replace(fact, subject="Bo Lee"), "label")
    assert len(case.prompt) == len(other.prompt)
    p = 1.0
    for i, answer in enumerate(case.target):
        with torch.no_grad():
            p *= float(model(torch.tensor([other.prompt + case.target[:i]])).logits[0, -1].softmax(-1)[answer])
    rows = trace(model, fact, noise=corruption("counterfactual"), target=target)
    assert rows[0]["p_corrupted"] == pytest.approx(p, rel=1e-12, abs=0)
    assert all(row["p_patched_sd"] is None for row in rows)


def test_the_counterfactual_run_restored_everywhere_is_the_clean_run(model):
    fact = dataclasses.replace(FACTS[0], counterfactual_subject="Bo Lee")
    for row in trace(model, fact, noise=corruption("counterfactual"), states=[("hidden", 1)], joint=True):
        assert row["p_patched"] == pytest.approx(row["p_clean"], rel=1e-12)
        assert abs(row["p_corrupted"] / row["p_clean"] - 1) > 1e-3


# Severing

HIDDEN = {"states": [("hidden", 1)]}


@pytest.mark.parametrize("sever", ["mlp", "attn", "both"])
def test_there_is_nothing_to_sever_after_the_last_layer(model, sever):
    severed, plain = trace(model, **HIDDEN, sever=sever), trace(model, **HIDDEN)
    assert {row["method"] for row in severed} == {f"sever_{sever}"}
    assert {row["method"] for row in plain} == {"restore"}
    assert same(*([row for row in rows if row["layer"] == LAYERS - 1] for rows in (severed, plain)))
    assert not same(severed, plain)


@pytest.mark.parametrize(("sever", "silent"), [("mlp", "mlp"), ("attn", "attn")])
def test_what_is_constant_cannot_be_severed(sever, silent):
    model = gpt2(layers=LAYERS)
    for block in model.transformer.h:
        getattr(block, silent).c_proj.weight.data.zero_()
    assert same(trace(model, **HIDDEN, sever=sever), trace(model, **HIDDEN))


def test_severed_from_everything_a_state_only_adds_what_was_added_before(model, case):
    """At the last token: the restored state, and on top of it what the corrupted run's later layers add."""
    runs = {}
    for name, eps in (("clean", 0), ("corrupted", np.random.RandomState(1).randn(*shape(model, case)))):
        hidden = [
            block.register_forward_hook(
                lambda module, args, output, name=name: runs.setdefault(name, []).append(output)
            )
            for block in model.transformer.h
        ]
        p_with(model, case, SIGMA * eps * np.ones(shape(model, case)))
        for handle in hidden:
            handle.remove()
    for row in trace(model, **HIDDEN, tokens="last", sever="both"):
        clean, corrupted = ([output[:, -1] for output in runs[name]] for name in ("clean", "corrupted"))
        last = clean[row["layer"]] + corrupted[-1] - corrupted[row["layer"]]
        with torch.no_grad():
            p = model.lm_head(model.transformer.ln_f(last)).softmax(-1)[:, case.target[0]]
        assert row["p_patched"] == pytest.approx(float(p.mean()), rel=1e-12)


def test_severing_tokens_before_the_subject_changes_nothing(model, case):
    for row in trace(model, **HIDDEN, tokens=range(case.start), sever="both"):
        assert row["p_patched"] == pytest.approx(row["p_corrupted"], rel=1e-12)


@pytest.mark.parametrize("kind", ["gaussian", "uniform"])
def test_published_severing_draws_twice(model, case, kind):
    """Before the subject nothing is held nor restored that differs, so that the second draw shows by itself."""
    stream = np.random.RandomState(1)
    draws = [
        stream.uniform(-1, 1, shape(model, case)) if kind == "uniform" else stream.randn(*shape(model, case))
        for _ in range(2)
    ]
    first, second = (p_with(model, case, SIGMA * eps) for eps in draws)
    options = {**HIDDEN, "noise": corruption(kind), "compat": "published"}
    for row in trace(model, **options, tokens=range(case.start), sever="both"):
        assert row["p_corrupted"] == pytest.approx(first, rel=1e-12)
        assert row["p_patched"] == pytest.approx(second, rel=1e-12)
    assert same(trace(model, **options), trace(model, **HIDDEN, noise=corruption(kind)))


def test_published_severing_holds_the_first_draw(model):
    """With everything restored and held, the second draw no longer shows."""
    options = {**HIDDEN, "joint": True, "sever": "both"}
    assert same(trace(model, **options, compat="published"), trace(model, **options))


# Joint restoring, and zeroing


def test_one_token_together_is_that_token(model):
    alone, together = trace(model, tokens="subject_last"), trace(model, tokens="subject_last", joint=True)
    assert same(alone, together)
    assert {row["token"] for row in together} == {None}


def test_restored_embeddings_are_the_clean_run(model):
    """Noise is only at the subject: its tokens together are all there is to restore below attention."""
    silent = gpt2(layers=LAYERS)
    silent.transformer.h[0].attn.c_proj.weight.data.zero_()
    rows = trace(silent, states=[("hidden", 1)], tokens="subject", joint=True)
    assert rows[0]["p_patched"] == pytest.approx(rows[0]["p_clean"], rel=1e-12)
    assert abs(rows[0]["p_corrupted"] / rows[0]["p_clean"] - 1) > 1e-3


def test_erasing_nothing_changes_nothing():
    """Where an MLP puts out zeros, and in the last layer, where only the last token counts."""
    silent = gpt2(layers=LAYERS)
    for name in ("weight", "bias"):
        getattr(silent.transformer.h[1].mlp.c_proj, name).data.zero_()
    rows = oracle.zero(silent, tokenizer(), [FACT], states=[("mlp", 1), ("mlp", 5)])
    changes = [abs(row["p_patched"] / row["p_clean"] - 1) > 1e-12 for row in rows]
    assert changes == [True, False, False, True, True, True]


def test_zeroing_takes_the_subjects_tokens_together(model, case):
    first, last, both = (
        oracle.zero(model, tokenizer(), [FACT], tokens=tokens)[0]["p_patched"]
        for tokens in ([case.start], range(case.start + 1, case.end), "subject")
    )
    assert len({first, last, both}) == 3
    indices = range(case.start, case.end)
    assert same(oracle.zero(model, tokenizer(), [FACT]), oracle.zero(model, tokenizer(), [FACT], tokens=indices))
