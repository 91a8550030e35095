"""Requests of every problem: their targets, and which facts they are made of, against the plain computation."""

import dataclasses
import math
import warnings

import pytest
from helpers.models import FACTS, ZERO_WIDTH_SPACE, tokenizer as byte_level
from oracles import requests as oracle_requests
from oracles.editing import about_subject, target_log_p

import causalcone as cc
from causalcone.engine.edit.requests import problems as request_making
from causalcone.engine.edit.requests.problems import FilteredFacts
from causalcone.engine.edit.requests.requests import PROBLEMS
from causalcone.engine.edit.scoring.sampled_texts import essence_texts
from causalcone.engine.encoding import target_ids
from causalcone.engine.errors import ExperimentError, FactError
from causalcone.engine.facts import Fact, SkippedFacts
from causalcone.engine.run.session import Session

SIGMA = 0.7
ANSWERS = {"start": "CALLE call", "end": " hej", "one token": "hehe", "many tokens": "Calle"}
"""What the model says, in whichever case, after the prompts of some facts."""
ASKED = tuple(
    dataclasses.replace(fact, target_true=ANSWERS.get(fact.id, fact.target_true), target_new=f"golf{fact.id}")
    for fact in FACTS
)


@pytest.fixture(scope="module")
def session(model):
    return Session(model, byte_level())


def make_requests(session, facts, problem, sigma=None, seed=0, **options):
    return cc.Editor.on(session, sigma=sigma, seed=seed).requests(facts, problem, **options)


def p_true(model, tokenizer, fact):
    prompt = about_subject(model, tokenizer, fact, fact.prompt)
    return math.exp(target_log_p(model, prompt, target_ids(fact.target_true, tokenizer)).sum().item())


def filtered_requests(session, facts, problem, **options):
    """Requests, and why facts were filtered out."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        requests = make_requests(session, facts, problem, SIGMA, **options)
    reasons = [reason for warning in caught for reason in warning.message.reasons]
    assert all(isinstance(warning.message, FilteredFacts) for warning in caught)
    return requests, reasons


# --- targets ---


@pytest.mark.parametrize("problem", PROBLEMS)
def test_targets(session, model, tokenizer, problem):
    requests = make_requests(session, FACTS_WITH_NEW, problem, SIGMA, filtered=False)
    assert [request.fact for request in requests] == list(FACTS_WITH_NEW)
    for request in requests:
        task = oracle_requests.request(model, tokenizer, request.fact, problem, SIGMA)
        true, new = (target_ids(text, tokenizer) for text in (request.fact.target_true, request.fact.target_new))
        assert request.target == task.target
        assert request.other == (true if problem in ("error_injection", "tracing_reversal") else new)
        assert request.sigma == (SIGMA if problem == "fact_forcing" else None)


FACTS_WITH_NEW = tuple(dataclasses.replace(fact, target_new="volleyball") for fact in FACTS)


@pytest.mark.parametrize("problem", [problem for problem in PROBLEMS if problem != "error_injection"])
def test_facts_without_a_new_target(session, problem):
    request = make_requests(session, FACTS[:1], problem, SIGMA, filtered=False)[0]
    assert (request.other is None) == (problem != "tracing_reversal")


def test_reversal_has_twelve_tokens_or_one_more(session, model, tokenizer):
    requests = make_requests(session, FACTS, "tracing_reversal", SIGMA, filtered=False)
    prompts = [len(about_subject(model, tokenizer, fact, fact.prompt).ids) for fact in FACTS]
    assert min(prompts) < 12 < max(prompts)
    assert [len(request.target) for request in requests] == [max(1, 12 - length) for length in prompts]


def test_no_facts(session):
    assert make_requests(session, [], "tracing_reversal", SIGMA) == []


# --- which facts ---


@pytest.fixture(scope="module")
def completed(model, tokenizer):
    """The facts that the model completes by the plain computation."""
    return [fact.id for fact in ASKED if oracle_requests.completes(model, tokenizer, fact)]


@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_model_completes_the_fact(session, completed, problem, monkeypatch):
    monkeypatch.setattr(request_making, "ERASABLE", 0.0)
    requests, reasons = filtered_requests(session, ASKED, problem)
    assert [request.fact.id for request in requests] == completed == list(ANSWERS)
    assert [reason.split("'")[1] for reason in reasons] == [fact.id for fact in ASKED if fact.id not in ANSWERS]
    assert all("the model says" in reason for reason in reasons)


def test_what_is_erased_is_likely(session, model, tokenizer, monkeypatch):
    known = [fact for fact in ASKED if fact.id in ANSWERS]
    p = {fact.id: p_true(model, tokenizer, fact) for fact in known}
    middle = sorted(p.values())[1:3]
    monkeypatch.setattr(request_making, "ERASABLE", sum(middle) / 2)
    monkeypatch.setattr(oracle_requests, "ERASABLE", sum(middle) / 2)
    requests, reasons = filtered_requests(session, known, "fact_erasure")
    expected = [fact.id for fact in known if oracle_requests.suits(model, tokenizer, fact, "fact_erasure")]
    assert [request.fact.id for request in requests] == expected
    assert len(expected) == len(reasons) == 2
    assert all(
        f"p({fact.target_true!r}) is {p[fact.id]:.3g}" in "".join(reasons) for fact in known if p[fact.id] < middle[1]
    )
    everywhere, _ = filtered_requests(session, known, "fact_amplification", compat="published")
    assert [request.fact.id for request in everywhere] == expected
    assert len(filtered_requests(session, known, "fact_amplification")[0]) == 4


def test_the_least_probability_counts(session, monkeypatch):
    """Two percent are enough; published code wants more."""
    known = [fact for fact in ASKED if fact.id == "start"]
    monkeypatch.setattr(request_making, "answer_probabilities", lambda session, facts: [0.02] * len(facts))
    assert len(filtered_requests(session, known, "fact_erasure")[0]) == 1
    requests, reasons = filtered_requests(session, known, "fact_erasure", compat="published")
    assert requests == []
    assert "more than 0.02" in reasons[0]


def test_the_model_need_not_be_asked(session):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(make_requests(session, ASKED, "fact_erasure", filtered=False)) == len(ASKED)


# --- published reversal ---


def test_published_reversal(session, model, tokenizer):
    """The target is the prompt with a continuation that is drawn, other for other seeds."""
    options = {"filtered": False, "compat": "published"}
    requests = make_requests(session, FACTS, "tracing_reversal", SIGMA, **options)
    for request in requests:
        text = tokenizer.decode(request.target)
        assert text.startswith(" " + request.fact.text)
        assert len(text) > len(" " + request.fact.text)
        assert request.other == target_ids(request.fact.target_true, tokenizer)
    assert make_requests(session, FACTS[::-1], "tracing_reversal", SIGMA, **options) == requests[::-1]
    assert make_requests(session, FACTS, "tracing_reversal", SIGMA, seed=1, **options) != requests


# --- facts that cannot be used ---

LONG = Fact("long", "{} " + "plays the sport of " * 6, "Ann Lee", "tennis", "golf")
BAD = [
    (dataclasses.replace(FACTS[0], target_new=None), "error_injection", "has no target_new"),
    (dataclasses.replace(FACTS[0], target_new=" tennis"), "error_injection", "the same answer as target_true"),
    (dataclasses.replace(FACTS[0], target_new=" "), "fact_erasure", "target_new .* is empty"),
    (dataclasses.replace(FACTS[0], target_new="golf " * 60), "fact_erasure", "prompt and target need .* target_new"),
    (Fact("bad", "{} is", ZERO_WIDTH_SPACE, "golf", "tennis"), "error_injection", "overlaps no token"),
    (LONG, "error_injection", "filtered=False"),
]


@pytest.mark.parametrize(("fact", "problem", "match"), BAD)
def test_bad_facts(session, fact, problem, match):
    good = dataclasses.replace(FACTS_WITH_NEW[1], id="good", target_true="j")
    with pytest.raises(FactError, match=f"{fact.id!r}.*{match}"):
        make_requests(session, [good, fact], problem, SIGMA)
    with pytest.warns(SkippedFacts, match=match) as caught:
        requests = make_requests(session, [fact, good], problem, SIGMA, on_error="skip", filtered=fact is LONG)
    assert [request.fact.id for request in requests] == ["good"]
    assert len(caught) == 1


def test_the_level_of_noise_is_of_the_facts_that_can_be_used(session):
    bad, good = dataclasses.replace(FACTS[1], target_true="golf " * 60), FACTS_WITH_NEW[0]
    with pytest.warns(SkippedFacts, match="prompt and target need"):
        (request,) = make_requests(session, [good, bad], "fact_forcing", "3sd", filtered=False, on_error="skip")
    assert request.sigma == pytest.approx(session.noise_level("3sd", [good]))
    assert request.sigma != pytest.approx(session.noise_level("3sd", [good, FACTS[1]]))


def test_long_facts_need_not_be_asked(session):
    assert len(make_requests(session, [LONG], "error_injection", filtered=False)) == 1


def test_noise_that_changes_nothing(session):
    with pytest.raises(FactError, match=r"'start': with noise of level 1e-09 .* raise sigma"):
        make_requests(session, FACTS, "tracing_reversal", 1e-9, filtered=False)
    with pytest.warns(SkippedFacts) as caught:
        assert make_requests(session, FACTS, "tracing_reversal", 1e-9, filtered=False, on_error="skip") == []
    assert len(caught[0].message.reasons) == len(FACTS)


def test_noise_that_gives_the_answer(session, model, tokenizer):
    """What is said under noise is the true answer, which the model does not say without."""
    fact = FACTS[-1]
    for sigma in range(1, 40):
        said = oracle_requests.noised_continuation(model, tokenizer, fact, sigma)
        word = tokenizer.decode(said)
        if target_ids(word, tokenizer) == said:
            break
    with pytest.raises(FactError, match="its answer without noise too"):
        make_requests(session, [dataclasses.replace(fact, target_true=word)], "tracing_reversal", sigma, filtered=False)


def test_ids_are_unique(session):
    for function in (
        lambda facts: make_requests(session, facts, "fact_erasure"),
        lambda facts: essence_texts(session, facts, 0),
    ):
        with pytest.raises(FactError, match="two facts have the id 'start'"):
            function([FACTS[0], FACTS[0]])


@pytest.mark.parametrize(
    ("problem", "sigma", "options", "match"),
    [
        ("fact_injection", 0.1, {}, "fact_injection"),
        ("tracing_reversal", "0sd", {}, "sigma is 0"),
        ("fact_forcing", 0.0, {}, "sigma is 0"),
        ("fact_forcing", -1.0, {}, "sigma is -1.0"),
        ("fact_forcing", math.nan, {}, "sigma is nan"),
        ("fact_erasure", None, {"on_error": "ignore"}, "ignore"),
        ("fact_erasure", None, {"compat": "paper"}, "paper"),
    ],
)
def test_arguments(session, problem, sigma, options, match):
    with pytest.raises(ExperimentError, match=match):
        make_requests(session, FACTS, problem, sigma, **options)
