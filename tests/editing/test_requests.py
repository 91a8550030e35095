"""Requests, contexts and drawn texts against the plain computation and what METHODS says of them."""

import copy
import dataclasses
import json
import math
import warnings

import pytest
import torch
from helpers.generated import generate_texts
from helpers.models import FACTS, ZERO_WIDTH_SPACE, gpt2, tokenizer as byte_level
from helpers.tokenizers import TOKENIZERS
from oracles import requests as oracle_requests
from oracles.editing import about_subject, target_log_p

import causalcone as cc
from causalcone.engine.compute import Compute
from causalcone.engine.edit.deltas.apply import applied
from causalcone.engine.edit.deltas.delta import Delta, LowRank
from causalcone.engine.edit.requests import problems as request_making
from causalcone.engine.edit.requests.problems import FilteredFacts
from causalcone.engine.edit.requests.requests import PROBLEMS, Request
from causalcone.engine.edit.scoring import sampled_texts
from causalcone.engine.edit.scoring.sampled_texts import essence_texts
from causalcone.engine.edit.texts import contexts
from causalcone.engine.edit.texts.contexts import Contexts, sample_contexts
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


# --- contexts ---


@pytest.fixture
def decoded(monkeypatch):
    """Whenever texts were continued: the texts, by how many tokens, the new tokens, and the options."""
    seen = []

    def continuations(session, texts, lengths, **options):
        new = original(session, texts, lengths, **options)
        seen.append((texts, lengths, new, options))
        return new

    original = contexts.continuations
    for module in (contexts, request_making, sampled_texts):
        monkeypatch.setattr(module, "continuations", continuations)
    return seen


def test_contexts(session, tokenizer, decoded):
    found = sample_contexts(session, 0)
    ((texts, lengths, new, options),) = decoded
    assert [len(text) + length for text, length in zip(texts, lengths, strict=True)] == [5] * 10 + [10] * 15
    assert {text.tokens for text in texts[:20]} == {(tokenizer.bos_token_id,)}
    assert options["top_k"] == 5
    assert len(set(options["seeds"])) == 25
    whole = [tokenizer.decode([*text.tokens, *tokens]) for text, tokens in zip(texts, new, strict=True)]
    assert [*found.rome, *found.memit] == [
        text.replace("<|endoftext|>", "").replace("{", "").replace("}", "") for text in whole
    ]
    assert [text.split()[0][:3] for text in found.memit] == ["The", "The", "Bec", "I", "You"]
    assert len(set(found.rome)) > 10


def test_contexts_are_those_of_the_seed(session):
    assert sample_contexts(session, 0) == sample_contexts(session, 0)
    assert sample_contexts(session, 0) != sample_contexts(session, 1)
    small = Session(session.model, session.tokenizer, Compute.of(memory="2MB"))
    assert sample_contexts(small, 0) == sample_contexts(session, 0)


def test_contexts_in_a_file(session):
    found = sample_contexts(session, 0)
    assert Contexts(**json.loads(json.dumps(dataclasses.asdict(found)))) == found
    with pytest.raises(ExperimentError, match="contexts"):
        Contexts(rome=(" ",), memit=("a",))


def test_white_space_is_drawn_anew(session, tokenizer, monkeypatch):
    """Braces, which texts lose, do not save a text from it."""
    space, opening, closing, letter = (tokenizer(text)["input_ids"][0] for text in (" ", "{", "}", "x"))
    calls = []

    def continuations(session, texts, lengths, *, top_k, seeds):
        calls.append(seeds)
        blank = {3} if len(calls) == 1 else {0} if len(calls) == 2 else set()
        return [(opening, space if number in blank else letter, closing) for number in range(len(texts))]

    monkeypatch.setattr(contexts, "continuations", continuations)
    found = sample_contexts(session, 0)
    assert [len(seeds) for seeds in calls] == [25, 1, 1]
    assert len({calls[0][3], calls[1][0], calls[2][0]}) == 3
    assert found.rome == ("x",) * 20
    assert found.memit == tuple(f"{word}x" for word in contexts.MEMIT_WORDS)


def test_nothing_but_white_space(session, tokenizer, monkeypatch):
    space = tokenizer(" ")["input_ids"][0]
    monkeypatch.setattr(
        contexts, "continuations", lambda session, texts, lengths, **options: [(space,) * length for length in lengths]
    )
    with pytest.raises(ExperimentError, match="nothing but white space"):
        sample_contexts(session, 0)


@pytest.mark.parametrize(
    "name", ["byte-level, bos", "bpe, always", "unigram, first", "LlamaTokenizer", "GemmaTokenizer"]
)
def test_contexts_of_tokenizers(name):
    """Words stay whole and special tokens out of the texts, whatever the decoder does to the beginning of a text."""
    tokenizer = TOKENIZERS[name]()
    found = sample_contexts(Session(gpt2(layers=1, vocab_size=len(tokenizer)), tokenizer), 0)
    assert [text[: len(word)] for text, word in zip(found.memit, contexts.MEMIT_WORDS, strict=True)] == list(
        contexts.MEMIT_WORDS
    )
    assert not any(token in text for text in (*found.rome, *found.memit) for token in tokenizer.all_special_tokens)


@pytest.mark.parametrize(("vocabulary", "match"), [(360, "neither a BOS nor an EOS"), (300, "outside the model's")])
def test_start_tokens(vocabulary, match):
    tokenizer = copy.deepcopy(byte_level())
    tokenizer.bos_token = None
    tokenizer.eos_token = None if vocabulary == 360 else tokenizer.convert_ids_to_tokens(300)
    with pytest.raises(ExperimentError, match=match):
        sample_contexts(Session(gpt2(layers=1, vocab_size=vocabulary), tokenizer), 0)


# --- texts that edits are scored on ---


@pytest.mark.parametrize(("positions", "limit"), [(64, 64), (200, 100)])
def test_essence_texts(tokenizer, positions, limit):
    session = Session(gpt2(layers=2, positions=positions), tokenizer)
    texts = essence_texts(session, FACTS[:3], 0)
    assert list(texts) == [fact.id for fact in FACTS[:3]]
    for fact in FACTS[:3]:
        own = texts[fact.id]
        assert len(set(own)) == 5
        assert all(text.startswith(f"{fact.subject} is a") for text in own)
        assert all(limit / 3 < len(tokenizer(text)["input_ids"]) <= limit for text in own)
    assert essence_texts(session, FACTS[2:3], 0) == {FACTS[2].id: texts[FACTS[2].id]}
    assert essence_texts(session, FACTS[:3], 1) != texts


PROMPTED = (
    dataclasses.replace(fact, generation_prompts=(f"{fact.subject} was seen", "They like")) for fact in FACTS[:3]
)
GENERATING = tuple(Request(fact, "fact_amplification", (5,)) for fact in PROMPTED)


@pytest.mark.parametrize(("positions", "limit"), [(64, 64), (200, 100)])
def test_generated_texts(tokenizer, positions, limit, decoded):
    session = Session(gpt2(layers=2, positions=positions), tokenizer)
    plain = generate_texts(session, GENERATING, 0)
    ((texts, lengths, _, options),) = decoded
    assert {len(text) + length for text, length in zip(texts, lengths, strict=True)} == {limit}
    assert options["top_k"] == 5
    for request, own in zip(GENERATING, plain, strict=True):
        assert all(text.startswith(p) for text, p in zip(own, request.fact.generation_prompts, strict=True))
    assert generate_texts(session, GENERATING[1:], 0) == plain[1:]
    assert generate_texts(session, GENERATING, 1) != plain


def test_generated_texts_of_edited_models(session, model):
    generator = torch.Generator().manual_seed(0)
    change = LowRank(*(torch.randn(size, 1, generator=generator, dtype=torch.float64) for size in (32, 128)))
    delta = Delta({1: change})
    plain = generate_texts(session, GENERATING, 0)
    with applied(model, delta):
        edited = generate_texts(session, GENERATING, 0)
    assert all(a != b for a, b in zip(edited, plain, strict=True))
    assert generate_texts(session, GENERATING, 0, [delta, None, delta]) == [edited[0], plain[1], edited[2]]


def test_generated_texts_under_noise(session):
    plain = generate_texts(session, GENERATING, 0)
    forcing = [dataclasses.replace(each, problem="fact_forcing", sigma=SIGMA) for each in GENERATING]
    noised = generate_texts(session, forcing, 0)
    for own, other in zip(plain, noised, strict=True):
        assert [a == b for a, b in zip(own, other, strict=True)] == [False, True]


def test_facts_without_generation_prompts(session):
    bare = Request(FACTS[0], "fact_erasure", (5,))
    assert generate_texts(session, [bare, GENERATING[0]], 0) == [[], generate_texts(session, GENERATING[:1], 0)[0]]


def test_texts_that_cannot_be_drawn(tokenizer):
    session = Session(gpt2(layers=1, positions=200), tokenizer)
    long = Fact("x", "{}", "so " * 60, "b", generation_prompts=("so " * 60,))
    with pytest.raises(FactError, match=r"'x': a prompt of .* no room for a text of 100"):
        essence_texts(session, [long], 0)
    with pytest.raises(FactError, match=r"'x': a prompt of .* no room for a text of 100"):
        generate_texts(session, [Request(long, "fact_erasure", (5,))], 0)
