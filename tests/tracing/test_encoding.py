"""Which tokens are the subject, which the target, and what a token's text is."""

import copy
from pathlib import Path

import pytest
from helpers.compare import assert_same, assert_table_close
from helpers.models import FACTS, gpt2, tokenizer as make_tokenizer
from oracles import tracing as oracle
from tokenizers.processors import TemplateProcessing
from transformers import GPT2Tokenizer

import causalcone as cc

OPTIONS = {"states": (("hidden", 1),), "samples": 2, "sigma": 0.5}
GPT2_TOKENIZER = Path(__file__).parents[3] / "shared" / "data" / "gpt2-tokenizer"


@pytest.fixture(scope="module")
def shallow():
    return gpt2(1)


def spans(model, tokenizer, facts):
    """(subject_start, subject_end, prompt_tokens) of each fact."""
    rows = cc.Tracer(model, tokenizer).trace(facts, **OPTIONS).to_pylist()
    return {row["fact_id"]: (row["subject_start"], row["subject_end"], row["prompt_tokens"]) for row in rows}


def texts(model, tokenizer, fact):
    rows = cc.Tracer(model, tokenizer).trace([fact], **OPTIONS).to_pylist()
    return [row["token_text"] for row in sorted(rows, key=lambda row: row["token"])]


def test_spans_of_words(shallow, tokenizer):
    """In words that the vocabulary holds whole, the space before the subject belongs to its first token."""
    assert spans(shallow, tokenizer, FACTS) == {
        "start": (0, 2, 7),
        "middle": (7, 10, 16),
        "end": (11, 12, 12),
        "only": (0, 3, 3),
        "one token": (6, 7, 9),
        "many tokens": (4, 13, 14),
    }


@pytest.mark.parametrize(
    ("prompt", "subject", "span"),
    [
        ("{} is", "Bo", (0, 2)),
        ("see {}", "Bo", (4, 6)),
        ("at {} now", "B", (3, 4)),
        ("{}", "Zoë", (0, 4)),  # two bytes for the last letter
        ("ö {}!", "日本", (3, 9)),  # three bytes a character
        ("{}'s", "😀", (0, 4)),
        ("Bo met {} and Bo", "Bo", (7, 9)),  # the template's place counts, not the first occurrence
        ("(A {})", " B ", (3, 6)),
    ],
)
def test_spans_of_bytes(shallow, prompt, subject, span):
    """With one token per byte, the span can be counted by hand."""
    fact = cc.Fact("0", prompt, subject, "x")
    found = spans(shallow, make_tokenizer(vocabulary=257), [fact])
    assert found == {"0": (*span, len(fact.text.encode()))}


def test_a_token_shared_with_the_template_belongs_to_the_subject(shallow, tokenizer):
    """ " Rome" is one token, of which the subject is only a part."""
    assert texts(shallow, tokenizer, cc.Fact("0", "the Ro{}", "me", "x"))[-1] == "Rome"
    fact = cc.Fact("0", "In Ro{} they", "me", "x")
    (span,) = spans(shallow, tokenizer, [fact]).values()
    assert texts(shallow, tokenizer, fact)[span[0] : span[1]] == ["Rome"]


def test_token_texts_join_to_the_prompt(shallow, tokenizer):
    for fact in FACTS:
        assert "".join(texts(shallow, tokenizer, fact)) == fact.text


def test_special_tokens_come_first_and_move_the_span(shallow, tokenizer):
    plain = spans(shallow, tokenizer, FACTS)
    with_bos = spans(shallow, make_tokenizer(bos=True), FACTS)
    assert with_bos == {name: (start + 1, end + 1, length + 1) for name, (start, end, length) in plain.items()}


@pytest.mark.parametrize(
    ("target", "length"), [("golf", 1), (" golf", 1), ("in Seattle", 2), ("sporty", 3), ("Zoë", 5), ("golf is in", 3)]
)
def test_targets(shallow, tokenizer, target, length):
    fact = cc.Fact("0", "{} plays", "Ann Lee", target)
    assert len(oracle.encode(shallow, tokenizer, fact, "label").target) == length
    table = cc.Tracer(shallow, tokenizer).trace([fact], **OPTIONS)
    assert_same(table, oracle.trace(shallow, tokenizer, [fact], **OPTIONS))


def test_no_special_token_comes_between_prompt_and_target(shallow):
    tokenizer = make_tokenizer(bos=True)
    fact = FACTS[3]
    case = oracle.encode(shallow, tokenizer, fact, "label")
    assert case.prompt + case.target == tokenizer(fact.text + " " + fact.target_true)["input_ids"]
    table = cc.Tracer(shallow, tokenizer).trace([fact], **OPTIONS)
    assert_same(table, oracle.trace(shallow, tokenizer, [fact], **OPTIONS))


def test_an_end_of_text_token_does_not_stand_before_the_target(shallow, tokenizer):
    ending = copy.deepcopy(tokenizer)
    end = ending.eos_token
    template = TemplateProcessing(single=f"$A {end}", special_tokens=[(end, ending.eos_token_id)])
    ending.backend_tokenizer.post_processor = template
    assert ending("Rome is")["input_ids"][-1] == ending.eos_token_id
    table = cc.Tracer(shallow, ending).trace(FACTS, **OPTIONS)
    assert_table_close(table, cc.Tracer(shallow, tokenizer).trace(FACTS, **OPTIONS))


@pytest.mark.skipif(not GPT2_TOKENIZER.exists(), reason="the vocabulary of GPT-2 is not beside this checkout")
def test_the_real_vocabulary():
    tokenizer = GPT2Tokenizer(vocab=str(GPT2_TOKENIZER / "vocab.json"), merges=str(GPT2_TOKENIZER / "merges.txt"))
    fact = cc.Fact("0", "The mother tongue of {} is", "Danielle Darrieux", "French")
    model = gpt2(1, vocab_size=len(tokenizer))
    assert spans(model, tokenizer, [fact]) == {"0": (4, 8, 9)}
    words = "The| mother| tongue| of| Danielle| Dar|rie|ux| is"
    assert texts(model, tokenizer, fact) == words.split("|")
