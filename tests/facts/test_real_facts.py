"""The real facts that come with causalcone, and counterfactual subjects that are found among them."""

from collections import Counter

import pytest
from helpers.models import gpt2, tokenizer

import causalcone as cc
from causalcone.runners.names import path_of


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CAUSALCONE_CACHE", str(tmp_path_factory.mktemp("cache")))
        return cc.load_facts(path_of("smollm2", "facts"))


def test_there_are_enough_of_every_kind(facts):
    by_relation = Counter(fact.relation_id for fact in facts)
    assert len(facts) >= 400
    assert len(by_relation) >= 12
    assert min(by_relation.values()) >= 20
    first = sum(fact.prompt.startswith("{}") for fact in facts)
    assert first == pytest.approx(len(facts) / 2, abs=len(by_relation))
    few = facts[: 2 * len(by_relation)]  # which have all kinds, and five subjects of eight first
    assert {fact.relation_id for fact in few} == set(by_relation)
    assert sum(fact.prompt.startswith("{}") for fact in few) == pytest.approx(5 / 8 * len(few), abs=2)


def test_each_has_what_edits_need(facts):
    answers = {}
    for fact in facts:
        answers.setdefault(fact.relation_id, {})[fact.subject] = {fact.target_true, *fact.target_true_aliases}
    for fact in facts:
        own, known = answers[fact.relation_id][fact.subject], answers[fact.relation_id]
        assert fact.target_new not in own
        assert any(fact.target_new in each for each in known.values())
        assert fact.target_true.lower() not in fact.subject.lower()
        assert len(fact.paraphrase_prompts) == len(fact.generation_prompts) == 2
        texts = [fact.text, *fact.paraphrase_prompts, *fact.generation_prompts]
        assert all(fact.subject in text and "{" not in text and text == text.strip() for text in texts)
        assert len({*fact.paraphrase_prompts, fact.text}) == 3
        asked = [*fact.neighborhood_prompts, *(probe.prompt for probe in fact.probes)]
        assert 1 <= len(asked) <= 5
        assert fact.text not in asked
        told = {fact.prompt.replace("{}", subject): accepted for subject, accepted in known.items()}
        assert all(fact.target_true in told[text] for text in fact.neighborhood_prompts)
        assert all(set(probe.answers) == told[probe.prompt] for probe in fact.probes)
        assert all(fact.target_new in told[text] for text in fact.attribute_prompts)


def test_another_subject_of_the_relation_has_as_many_tokens(facts):
    """Where a fact names none; without one of its relation it is refused, and one that is named stays."""
    tracer, chosen = cc.Tracer(gpt2(), tokenizer()), [fact for fact in facts if fact.relation_id == "continent"]
    by_text = {fact.subject: fact for fact in chosen}
    with pytest.warns(cc.SkippedFacts):
        table = tracer.trace(chosen, [("mlp", 1)], noise="counterfactual", tokens=[0], on_error="skip")
    traced = {name.partition("/")[2] for name in table["fact_id"].to_pylist()}
    sizes = {subject: len(tokenizer()(fact.text)["input_ids"]) for subject, fact in by_text.items()}

    def others(fact):
        prompts = (fact.prompt.replace("{}", each.subject) for each in chosen if each.target_true != fact.target_true)
        return [text for text in prompts if len(tokenizer()(text)["input_ids"]) == sizes[fact.subject]]

    assert traced == {subject for subject, fact in by_text.items() if others(fact)}
    assert len(traced) > 1
