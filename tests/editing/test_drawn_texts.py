"""Texts that are drawn for edits: contexts, and texts that edits are scored on, as METHODS says of them."""

import copy
import dataclasses
import json

import pytest
import torch
from helpers.generated import generate_texts
from helpers.models import FACTS, gpt2, tokenizer as byte_level
from helpers.tokenizers import TOKENIZERS

from causalcone.engine.compute import Compute
from causalcone.engine.edit.deltas.apply import applied
from causalcone.engine.edit.deltas.delta import Delta, LowRank
from causalcone.engine.edit.requests import problems as request_making
from causalcone.engine.edit.requests.requests import Request
from causalcone.engine.edit.scoring import sampled_texts
from causalcone.engine.edit.scoring.sampled_texts import essence_texts
from causalcone.engine.edit.texts import contexts
from causalcone.engine.edit.texts.contexts import Contexts, sample_contexts
from causalcone.engine.errors import ExperimentError, FactError
from causalcone.engine.facts import Fact
from causalcone.engine.run.session import Session

SIGMA = 0.7


@pytest.fixture(scope="module")
def session(model):
    return Session(model, byte_level())


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


# --- contexts ---


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
