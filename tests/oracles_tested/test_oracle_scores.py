"""Plain scores and requests, against numbers by hand and the model's own predictions."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from helpers.models import FACTS, gpt2, tokenizer
from oracles import scores
from oracles.editing import Change, Task, down_weight
from oracles.requests import PROBLEMS, completes, greedy, noised_continuation, request, suits

from causalcone.engine.encoding import target_ids

FACT = dataclasses.replace(
    FACTS[4],
    target_new="in Seattle",
    paraphrase_prompts=("Bo said: in Rome they speak", "They say that in Rome, not in Rome,"),
    neighborhood_prompts=("In Seattle they speak", "Ann Lee speaks"),
    attribute_prompts=("In the city of Seattle they speak",),
)
NOISE = 0.5
IDS = {name: target_ids(name, tokenizer()) for name in ("Latin", "in Seattle")}


@pytest.fixture(scope="module")
def change(model):
    generator = torch.Generator().manual_seed(0)
    weight = down_weight(model, 1)
    return Change(0.1 * torch.randn(weight.shape, generator=generator, dtype=torch.float64), torch.ones(32))


@pytest.fixture(scope="module")
def edited(model, change):
    """The model changed for good."""
    other = copy.deepcopy(model)
    other.transformer.h[1].mlp.c_proj.weight.data += change.weight.T
    other.transformer.h[1].mlp.c_proj.bias.data += change.bias
    return other


@torch.no_grad()
def predictions(model, ids, noised=()):
    """Probabilities (T, vocabulary) after each token; one draw of noise is on these tokens."""
    embeddings = model.get_input_embeddings()(torch.tensor([ids]))
    for row, token in zip(np.random.RandomState(1).randn(len(noised), 32), noised, strict=True):
        embeddings[0, token] += NOISE * torch.from_numpy(row)
    return model(inputs_embeds=embeddings).logits[0].softmax(-1)


def by_hand(model, text, target, subject=None):
    """Probabilities of the target's tokens, and whether they are the most likely ones; the subject, if given, is noised
    where it first occurs."""
    ids = tokenizer()(text)["input_ids"]
    noised = list(range(*span(text, subject))) if subject else []
    p = predictions(model, ids + list(target), noised)[len(ids) - 1 :]
    return [p[i, t].item() for i, t in enumerate(target)], [int(p[i].argmax()) == t for i, t in enumerate(target)]


def span(text, subject):
    """The tokens of a subject where it first occurs."""
    encoding, first = tokenizer()(text), text.index(subject)
    return encoding.char_to_token(first), encoding.char_to_token(first + len(subject) - 1) + 1


TARGETS = {
    "error_injection": ("in Seattle", "Latin"),
    "fact_erasure": ("Latin", "in Seattle"),
    "fact_amplification": ("Latin", "in Seattle"),
    "fact_forcing": ("Latin", "in Seattle"),
}


@pytest.mark.parametrize("problem", TARGETS)
def test_probes(model, edited, change, problem):
    task = request(model, tokenizer(), FACT, problem, NOISE)
    target, other = (IDS[name] for name in TARGETS[problem])
    assert task == Task(FACT, problem, target, NOISE)
    texts = [FACT.text, *FACT.paraphrase_prompts, *FACT.neighborhood_prompts, *FACT.attribute_prompts]
    probes = scores.probe(model, tokenizer(), task, {1: change})
    kinds = ["rewrite", "paraphrase", "paraphrase", "neighborhood", "neighborhood", "attribute"]
    assert [(probe.kind, probe.index) for probe in probes] == list(zip(kinds, (0, 0, 1, 0, 1, 0), strict=True))
    for text, probe in zip(texts, probes, strict=True):
        subject = "Rome" if problem == "fact_forcing" and "Rome" in text else None
        readings = [
            (probe.pre, by_hand(model, text, target, subject)),
            (probe.post, by_hand(edited, text, target, subject)),
            (probe.pre_other, by_hand(model, text, other, subject)),
            (probe.post_other, by_hand(edited, text, other, subject)),
        ]
        assert abs(probe.post.p / probe.pre.p - 1) > 1e-3
        for reading, (p, likeliest) in readings:
            assert reading.p == pytest.approx(math.prod(p), rel=1e-9)
            assert reading.geometric_mean == pytest.approx(math.prod(p) ** (1 / len(p)), rel=1e-9)
            assert reading.likeliest == tuple(likeliest)


def test_fact_forcing_without_the_subject_is_clean(model, change):
    noised, clean = (
        scores.probe(model, tokenizer(), request(model, tokenizer(), FACT, problem, NOISE), {1: change})
        for problem in ("fact_forcing", "fact_amplification")
    )
    same = [a.pre == b.pre for a, b in zip(noised, clean, strict=True)]
    assert same == [False, False, False, True, True, True]


def test_other_targets():
    bare = dataclasses.replace(FACT, target_new=None)
    for problem in PROBLEMS:
        others = [scores.other_target(tokenizer(), Task(fact, problem, (7, 8))) for fact in (FACT, bare)]
        true_is_other = problem in ("error_injection", "tracing_reversal")
        assert others == ([IDS["Latin"]] * 2 if true_is_other else [IDS["in Seattle"], None])
    (probe, *_) = scores.probe(gpt2(layers=1), tokenizer(), Task(bare, "fact_erasure", (7, 8)), {})
    assert probe.pre_other is probe.post_other is None
    assert probe.pre == probe.post


def test_readings():
    reading = scores.Reading((math.log(0.5), math.log(0.125)), (True, False))
    assert (reading.p, reading.geometric_mean, reading.accuracy) == (0.0625, pytest.approx(0.25), 0.5)
    likeliest = int(predictions(gpt2(), tokenizer()(FACT.text)["input_ids"])[-1].argmax())
    task = Task(FACT, "error_injection", (likeliest, (likeliest + 1) % 360))
    probe = scores.probe(gpt2(), tokenizer(), task, {})[0]
    assert probe.pre.likeliest[0]


@pytest.mark.parametrize("problem", ["error_injection", "fact_forcing"])
@pytest.mark.parametrize("bos", [False, True])
def test_perplexity(model, edited, change, problem, bos):
    task = Task(FACT, problem, (1,), NOISE)
    texts = ("Rome is a city and Rome is famous", "Ann Lee plays golf")
    means = []
    for each in (model, edited):
        perplexities = []
        for text in texts:
            ids = tokenizer(bos)(text)["input_ids"]
            noised = (
                [i + bos for i in range(*span(text, "Rome"))] if problem == "fact_forcing" and "Rome" in text else []
            )
            p = [predictions(each, ids[:n], noised)[-1, ids[n]].item() for n in range(1 + len(noised), len(ids))]
            p += [predictions(each, ids, noised)[n, ids[n + 1]].item() for n in range(len(noised))]
            assert len(p) == len(ids) - 1
            perplexities.append(math.exp(-sum(map(math.log, p)) / len(ids)))
        means.append(sum(perplexities) / 2)
    found = scores.essence_perplexities(model, tokenizer(bos), task, texts, {1: change})
    assert found == pytest.approx(means, rel=1e-9)
    assert abs(means[1] - means[0]) > 1e-3


def test_scores_by_hand():
    assert scores.recovered(0.2, 0.6) == pytest.approx(0.5)
    assert scores.recovered(0.2, 0.1) == 0
    assert scores.erased(0.8, 0.2) == pytest.approx(0.75)
    assert scores.erased(0.8, 0.9) == 0
    assert scores.target_score("fact_erasure", 0.8, 0.2) == pytest.approx(0.75)
    assert scores.target_score("fact_forcing", 0.2, 0.6) == pytest.approx(0.5)
    assert scores.neighborhood_score(0.2, 0.6) == pytest.approx(0.5)
    assert scores.neighborhood_score(0.75, 0.0) == 0
    assert scores.neighborhood_score(0.75, 0.75) == 1
    assert scores.essence_score(20, 21) == pytest.approx(0.8)
    assert (scores.essence_score(20, 19), scores.essence_score(20, 40)) == (1, 0)


def test_reversal_trains_towards_the_noised_continuation(model):
    lengths = {}
    for fact in FACTS:
        ids = tokenizer()(fact.text)["input_ids"]
        noised, sequence = list(range(*span(fact.text, fact.subject))), list(ids)
        while len(sequence) < 12 or len(sequence) == len(ids):
            sequence.append(int(predictions(model, sequence, noised)[-1].argmax()))
        task = request(model, tokenizer(), fact, "tracing_reversal", NOISE)
        assert task.target == tuple(sequence[len(ids) :])
        lengths[len(ids)] = len(task.target)
    assert min(lengths.values()) == 1
    assert max(lengths.values()) > 1
    clean, loud = (noised_continuation(model, tokenizer(), FACTS[0], sigma) for sigma in (0.0, 3.0))
    assert clean != loud


def test_facts_that_the_model_completes(model):
    prompt = tokenizer()(FACT.text, return_tensors="pt")
    generated = model.generate(**prompt, max_new_tokens=37, min_new_tokens=37, do_sample=False)[0]
    ids = generated[prompt["input_ids"].shape[1] :]
    assert len(ids) == 37
    text, longer = tokenizer().decode(ids[:36]), tokenizer().decode(ids)
    for words, expected in {text: True, f" {text[:5].swapcase()} ": True, longer: False, "In the city": False}.items():
        assert completes(model, tokenizer(), dataclasses.replace(FACT, target_true=words)) == expected


def test_erasure_needs_something_to_erase():
    """Of facts that the model completes, erasure takes those with a probability of at least 0.02."""
    model, fact, kinds = gpt2(layers=1), FACTS[0], set()
    first, *later = greedy(model, tokenizer()(fact.text)["input_ids"], 5)
    for word in [tokenizer().decode([first]), tokenizer().decode([later[-1]]), "tennis"]:
        known = dataclasses.replace(fact, target_true=word)
        likely = math.prod(by_hand(model, fact.text, target_ids(word, tokenizer()))[0]) >= 0.02
        completed = completes(model, tokenizer(), known)
        assert suits(model, tokenizer(), known, "fact_amplification") == completed
        assert suits(model, tokenizer(), known, "fact_erasure") == (completed and likely)
        kinds.add((completed, likely))
    assert kinds == {(True, True), (True, False), (False, False)}
