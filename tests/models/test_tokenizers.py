"""Spans, targets and token texts with every style of tokenizer."""

import pytest
from helpers.compare import assert_same
from helpers.families import FAMILIES
from helpers.models import FACTS
from helpers.tokenizers import TOKENIZERS, bytes_of, sentencepiece
from oracles import tracing as oracle

import causalcone as cc
from causalcone.engine.encoding import PromptEncoder, target_ids, token_texts

FOREIGN = (
    cc.Fact("accent", "{} is known", "Zoë", "golf"),
    cc.Fact("accents", "They say that {} is", "Zoë Ångström", "golf"),
    cc.Fact("unknown letters", "The city of {} is", "日本", "日本 in"),
    cc.Fact("no spaces", "({})", "日本", "ö"),
    cc.Fact("emoji", "{}'s", "😀", "golf 😀"),
    cc.Fact("end", "One of them is {}", "é", "é"),
    cc.Fact("shared", "In Ro{} they", "me", "golf"),
)
ALL = (*FACTS, *FOREIGN)


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


def encoded(fact, tokenizer):
    return PromptEncoder(tokenizer, len(tokenizer), 100).fact(fact)


def places(fact, tokenizer):
    """The range of the text's bytes that each token of a prompt stands for. A space that the tokenizer put before the
    text goes with the first character."""
    end, ranges = -added_space(fact, tokenizer), []
    for part in bytes_of(encoded(fact, tokenizer).prompt, tokenizer):
        begin, end = end, end + len(part)
        ranges.append((0, 1) if part and end == 0 else (max(begin, 0), end))
    assert end == len(fact.text.encode())
    return ranges


def added_space(fact, tokenizer):
    """How many spaces stand before the text's own first character."""
    return len(b"".join(bytes_of(encoded(fact, tokenizer).prompt, tokenizer))) - len(fact.text.encode())


@pytest.mark.parametrize("fact", ALL, ids=lambda fact: fact.id)
def test_the_span_is_the_tokens_of_the_subject(tokenizer, fact):
    first = len(fact.prompt[: fact.prompt.index("{}")].encode())
    last = first + len(fact.subject.encode())
    overlapping = [i for i, (a, b) in enumerate(places(fact, tokenizer)) if a < b and a < last and b > first]
    assert encoded(fact, tokenizer).span == (overlapping[0], overlapping[-1] + 1)


@pytest.mark.parametrize("fact", ALL, ids=lambda fact: fact.id)
def test_prompt_and_target_are_the_tokens_of_the_sentence(tokenizer, fact):
    both = encoded(fact, tokenizer)
    assert both.prompt + both.target == tuple(tokenizer(joined(fact))["input_ids"])


def joined(fact):
    return fact.text + ("" if fact.target_true.startswith("日") else " ") + fact.target_true


@pytest.mark.parametrize("target", ["golf", "tennis", "in Seattle", "Zqx", "Zoë", "日本"])
def test_a_target_has_one_leading_space_in_either_spelling(tokenizer, target):
    ids = target_ids(target, tokenizer)
    assert target_ids(" " + target, tokenizer) == ids
    assert b"".join(bytes_of(ids, tokenizer)) == b" " + target.encode()


@pytest.mark.parametrize("fact", ALL, ids=lambda fact: fact.id)
def test_token_texts_keep_their_spaces(tokenizer, fact):
    """Every token shows what it stands for; bytes of a split character show as the replacement character."""
    prompt = encoded(fact, tokenizer).prompt
    words = [part.decode(errors="replace") for part in bytes_of(prompt, tokenizer)]
    texts = token_texts(prompt, tokenizer)
    assert [text for text in texts if text not in tokenizer.all_special_tokens] == [word for word in words if word]
    if "�" not in "".join(words):
        assert "".join(words) == " " * added_space(fact, tokenizer) + fact.text


def test_special_tokens_show_by_name():
    tokenizer = sentencepiece("bpe", "first")
    assert token_texts(tokenizer("Rome is")["input_ids"], tokenizer) == ["<s>", " Rome", " is"]


@pytest.mark.parametrize("space", ["always", "first", "legacy"])
def test_a_mark_of_its_own_before_the_text_belongs_to_the_first_character(space):
    """The tokenizer says so: the mark's characters are those of the first letter."""
    tokenizer = sentencepiece("bpe", space)
    fact = cc.Fact("0", "{} is", "Zoë", "golf")
    assert token_texts(encoded(fact, tokenizer).prompt, tokenizer)[:4] == ["<s>", " ", "Z", "o"]
    assert encoded(fact, tokenizer).span == (1, 6)


def test_unknown_characters_in_a_row_share_their_tokens():
    """A Unigram tokenizer gives their bytes one range of characters, so that the span takes in all of them."""
    tokenizer = sentencepiece("unigram", "first")
    fact = cc.Fact("0", "in 日{}", "本", "golf")
    assert encoded(fact, tokenizer).span[1] - encoded(fact, tokenizer).span[0] == len("日本".encode())
    precise = sentencepiece("bpe", "first")
    assert encoded(fact, precise).span[1] - encoded(fact, precise).span[0] == len("本".encode())


@pytest.mark.parametrize("name", ["LlamaTokenizer", "GemmaTokenizer", "unigram, first"])
def test_tracing_with_another_tokenizer(name):
    """The whole way, with facts whose subjects and targets fall back to bytes."""
    tokenizer = TOKENIZERS[name]()
    model = FAMILIES["llama"](2, 16, 2, vocab_size=len(tokenizer))
    facts = (FACTS[1], FACTS[3], *FOREIGN[:3])
    options = {"states": (("hidden", 1), ("mlp", 2)), "samples": 2, "sigma": "3sd"}
    table = cc.Tracer(model, tokenizer).trace(facts, **options)
    assert_same(table, oracle.trace(model, tokenizer, facts, **options))
    assert table["token_text"].to_pylist()[0] == "<s>"
