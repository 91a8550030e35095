"""How prompts are put to the model, from the command line; and ``causalcone data --check``."""

import json

import polars as pl
import pytest
import torch
from helpers.models import gpt2, tokenizer as byte_level
from oracles.facts import answer_ids, encode_prompt

import causalcone as cc

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}<answer>\n{% endif %}"
)
FACTS = [
    cc.Fact("first", "{} plays", "Ann Lee", "golf"),
    cc.Fact("cut", "They say that {} plays ", "Bo", "golf"),
    cc.Fact("quote", 'They call {} "', "Rome", "Latin"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the files model and facts.jsonl."""
    folder = tmp_path_factory.mktemp("prompts")
    tokenizer = byte_level(bos=False)
    chatting = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, bos_token=tokenizer.bos_token)
    chatting.chat_template = TEMPLATE
    chatting.save_pretrained(folder / "model")
    gpt2(2).save_pretrained(folder / "model")
    cc.save_facts(FACTS, folder / "facts.jsonl")
    return folder


def zeroed(run, place, out, *options):
    code, _, error = run(
        "zero", "--model", place / "model", "--facts", place / "facts.jsonl", "--state", "mlp:1", "--out", out, *options
    )
    assert code == 0, error
    table = pl.read_parquet(out / "traces").unique("fact_id")
    record = json.loads((out / "run.json").read_text(encoding="utf-8"))
    return dict(table.select("fact_id", "p_clean").iter_rows()), record["prompts"], error


@pytest.mark.parametrize(
    "form",
    [{}, {"chat": True}, {"chat": True, "system": "Be brief."}, {"bos": "always"}, {"keep_space": True}],
    ids=str,
)
def test_prompts_have_the_form_of_the_options(run, place, tmp_path, form):
    options = []
    for name, value in form.items():
        options += [f"--{name.replace('_', '-')}", *([] if value is True else [value])]
    found, record, error = zeroed(run, place, tmp_path / "out", *options)
    tracer = cc.Tracer.from_pretrained(str(place / "model"), **form)
    table = pl.DataFrame(tracer.zero(FACTS, ["mlp:1"])).unique("fact_id")
    assert found == pytest.approx(dict(table.select("fact_id", "p_clean").iter_rows()), rel=1e-9)
    assert {name: record[name] for name in form} == form
    spaces = not (form.get("chat") or form.get("keep_space"))
    assert record["cut"] == (["cut"] if spaces else [])
    assert ("end in spaces, which were cut" in error) == spaces
    assert record["joiner"] == ({"none": 3} if form.get("chat") else {"space": 1 + spaces, "none": 2 - spaces})


def test_forms_that_cannot_be(run, place, tmp_path):
    fixed = ("zero", "--model", place / "model", "--facts", place / "facts.jsonl", "--out", tmp_path / "out")
    for options, reason in (
        (("--system", "x"), "give chat=True (--chat) too"),
        (("--bos", "perhaps"), "bos is 'perhaps'; choose from auto, always, never"),
        (("--chat", "--bos", "never"), "leave out bos"),
    ):
        code, _, error = run(*fixed, *options)
        assert (code, reason in error) == (2, True), error


def probability(model, prompt, answer):
    with torch.no_grad():
        log_p = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return float(log_p[range(len(answer)), answer].sum().exp())


def test_answers_that_want_another_joiner_are_named(run, place, tmp_path):
    """Those that the model finds ten times likelier so, by plain forwards; nothing is written."""
    model, tokenizer = gpt2(2), byte_level()
    words = ("golf", "tennis", "Latin", "French", "in Seattle", "Q", "x", "7", "is", "lay", "Z", "known")
    facts = [
        cc.Fact(f"{number} {word}", prompt, "Bo", word)
        for number, prompt in enumerate(("They say that {} plays", 'They call {} "', "In {} they", "{}'s"))
        for word in words
    ]
    cc.save_facts(facts, tmp_path / "facts.jsonl")
    named = []
    for fact in facts:
        other = {"space": "none", "none": "space"}["none" if fact.prompt.endswith('"') else "space"]
        both = [fact, cc.Fact(fact.id, fact.prompt, fact.subject, fact.target_true, joiner=other)]
        prompt = encode_prompt(tokenizer, fact)[0]
        p, p_other = (probability(model, prompt, answer_ids(tokenizer, each, prompt)) for each in both)
        if p_other >= 10 * p:
            named.append(fact.id)
    assert 0 < len(named) < len(facts)
    code, printed, error = run("data", tmp_path / "facts.jsonl", "--model", place / "model", "--check")
    assert (code, error) == (0, "")
    assert [line.split("'")[1] for line in printed.splitlines() if line.startswith("fact '")] == named
    assert f"{len(named)} of {len(facts)} facts" in printed
    assert list(tmp_path.iterdir()) == [tmp_path / "facts.jsonl"]
    code, _, error = run("data", tmp_path / "facts.jsonl", "--check")
    assert (code, "name it with --model" in error) == (2, True)
