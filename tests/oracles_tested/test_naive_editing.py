"""The naive way of editing that benchmarks are measured against: what it computes, by hand and one text at a time."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from oracles import finetune as oracle_finetune, memit as oracle_memit, rome as oracle_rome, scores as oracle_scores
from oracles.editing import Change, Task
from torch.nn.functional import kl_div

from causalcone.engine.edit.methods.hparams import FinetuneHparams, MemitHparams, RomeHparams
from causalcone.engine.facts import Fact

CONTEXTS = ("They say", "One of the famous city", "Is it", "The tongue is known to be in Rome", "Bo")
FACT = Fact(
    "ann",
    "The sport of {} is",
    "Ann Lee",
    "tennis",
    target_new="in Seattle",
    paraphrase_prompts=("They say that Ann Lee plays the sport of", "Ann Lee plays"),
    neighborhood_prompts=("The sport of Bo is", "The sport of Danielle Darrieux is", "Rome is"),
)
LAYER = 1


@pytest.fixture(scope="module")
def editing(bench):
    return bench("naive_editing")


@pytest.fixture(scope="module")
def scoring(bench):
    return bench("naive_scoring")


@pytest.fixture(autouse=True)
def unchanged(model):
    """After every test the model is bitwise as before, with its weights as trainable as they were and no hooks."""
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    yield
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name])
        assert weight.requires_grad
        assert weight.grad is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.fixture(scope="module")
def moments(model):
    """A second moment (inner, inner) for each layer, of random keys."""
    generator = torch.Generator().manual_seed(0)
    inner = 4 * model.config.hidden_size
    keys = [torch.randn(3 * inner, inner, generator=generator, dtype=torch.float64) for _ in model.transformer.h]
    return {layer: each.T @ each / len(each) for layer, each in enumerate(keys)}


def encoded(tokenizer, fact, context=None):
    """Ids of the fact's prompt, after a context if there is one, and the place of the subject's last token."""
    template = fact.prompt if context is None else f"{context}. {fact.prompt}"
    before = template.index("{}")
    encoding = tokenizer(template.replace("{}", fact.subject), return_offsets_mapping=True)
    inside = [i for i, (start, _) in enumerate(encoding["offset_mapping"]) if start < before + len(fact.subject)]
    return encoding["input_ids"], inside[-1]


def target_of(tokenizer, text):
    return tokenizer(f" {text}")["input_ids"]


def log_p(model, ids):
    """Log-probabilities (T, vocabulary) after each token of one text."""
    return model(torch.tensor([ids])).logits[0].log_softmax(-1)


def nll(model, ids, target):
    """Of the target's tokens after the ids, each by itself."""
    after = log_p(model, ids + target[:-1])[len(ids) - 1 :]
    return -torch.stack([after[place, token] for place, token in enumerate(target)])


@torch.no_grad()
def seen(model, module, tokenizer, fact, context=None):
    """What enters a module and what it puts out at the lookup of one text."""
    found = []
    handle = module.register_forward_hook(lambda _, inputs, output: found.extend([inputs[0], output]))
    ids, lookup = encoded(tokenizer, fact, context)
    model(torch.tensor([ids]))
    handle.remove()
    return [values[0, lookup].clone() for values in found]


@torch.no_grad()
def objective(model, tokenizer, module, delta, hparams):
    """The loss of a vector that is added to what the module puts out, one text at a time."""

    def adding(lookup, compute):
        def add(_, inputs, output):
            output = output.clone()
            output[0, lookup] += delta
            return output

        handle = module.register_forward_hook(add)
        result = compute()
        handle.remove()
        return result

    target = target_of(tokenizer, FACT.target_new)
    losses = []
    for context in (None, *CONTEXTS):
        ids, lookup = encoded(tokenizer, FACT, context)
        losses.append(adding(lookup, partial(nll, model, ids, target)).mean())
    ids, lookup = encoded(tokenizer, replace(FACT, prompt="{} is a"))
    before, after = log_p(model, ids)[lookup], adding(lookup, partial(log_p, model, ids))[lookup]
    divergence = kl_div(before, after, log_target=True, reduction="sum")
    start = seen(model, module, tokenizer, FACT)[1]
    decay = delta.norm() / start.norm() ** 2
    return (torch.stack(losses).mean() + hparams.kl_factor * divergence + hparams.weight_decay * decay).item()


def test_rome_makes_the_key_give_the_vector(editing, scoring, model, tokenizer, moments):
    hparams = RomeHparams(steps=8)
    edit = editing.rome(model, tokenizer, FACT, LAYER, hparams, CONTEXTS, editing.inverse(moments[LAYER]))
    module = model.transformer.h[LAYER].mlp.c_proj
    key, value = seen(model, module, tokenizer, FACT)
    with scoring.changed(model, edit.changes):
        edited_key, edited_value = seen(model, module, tokenizer, FACT)
    torch.testing.assert_close(edited_key, key)
    torch.testing.assert_close(edited_value, edit.vector)
    assert (edited_value - value).norm() > 0.1 * value.norm()


def test_rome_leaves_keys_alone_that_the_moment_tells_apart(editing, model, tokenizer, moments):
    edit = editing.rome(model, tokenizer, FACT, LAYER, RomeHparams(steps=2), CONTEXTS, moments[LAYER].inverse())
    module = model.transformer.h[LAYER].mlp.c_proj
    keys = [seen(model, module, tokenizer, FACT, context)[0] for context in (None, *CONTEXTS)]
    direction = torch.linalg.solve(moments[LAYER], torch.stack(keys).mean(0))
    weight = edit.changes[LAYER].weight
    other = torch.ones_like(direction)
    other -= other @ direction / (direction @ direction) * direction
    torch.testing.assert_close(weight @ other, torch.zeros(len(weight), dtype=weight.dtype), atol=1e-10, rtol=0)
    assert edit.changes[LAYER].bias is None


@pytest.mark.parametrize("kind", ["values", "states"])
def test_losses_are_those_of_single_texts(editing, model, tokenizer, moments, kind):
    hparams = RomeHparams(steps=6, kl_factor=0.9, stop_loss=None)
    if kind == "values":
        module = model.transformer.h[LAYER].mlp.c_proj
        edit = editing.rome(model, tokenizer, FACT, LAYER, hparams, CONTEXTS, moments[LAYER])
    else:
        module = model.transformer.h[LAYER + 1]
        hparams = MemitHparams(steps=6, kl_factor=0.9, stop_loss=None, clamp=10.0)
        edit = editing.memit(model, tokenizer, FACT, (LAYER, LAYER + 1), hparams, CONTEXTS, moments)
    start = seen(model, module, tokenizer, FACT)[1]
    delta = edit.vector - start
    assert len(edit.losses) == 6
    assert edit.losses[0] == pytest.approx(objective(model, tokenizer, module, 0 * delta, hparams), rel=1e-10)
    assert edit.losses[-1] == pytest.approx(objective(model, tokenizer, module, delta, hparams), rel=1e-10)
    assert edit.losses[-1] < edit.losses[0]


def test_the_first_step_goes_down_the_slope(editing, model, tokenizer, moments):
    """Adam's first step is the learning rate in every direction."""
    hparams = RomeHparams(steps=2, lr=1e-3)
    edit = editing.rome(model, tokenizer, FACT, LAYER, hparams, CONTEXTS, moments[LAYER])
    module = model.transformer.h[LAYER].mlp.c_proj
    delta = edit.vector - seen(model, module, tokenizer, FACT)[1]
    torch.testing.assert_close(delta.abs(), torch.full_like(delta, 1e-3), rtol=1e-2, atol=0)
    plain = replace(hparams, weight_decay=0.0)
    for place in range(4):
        little = torch.zeros_like(delta)
        little[place] = 1e-5
        up, down = (objective(model, tokenizer, module, sign * little, plain) for sign in (1, -1))
        assert delta[place].sign() == -torch.tensor(up - down).sign()


def test_the_vector_stays_near_and_stops_when_the_loss_is_low(editing, model, tokenizer, moments):
    start = seen(model, model.transformer.h[LAYER].mlp.c_proj, tokenizer, FACT)[1]
    run = partial(editing.rome, model, tokenizer, FACT, LAYER, contexts=CONTEXTS, inverse_moment=moments[LAYER])
    near = run(hparams=RomeHparams(steps=5, clamp=0.1))
    assert (near.vector - start).norm() == pytest.approx(0.1 * start.norm())
    early = run(hparams=RomeHparams(steps=5, stop_loss=1e9))
    assert len(early.losses) == 1
    torch.testing.assert_close(early.vector, start)


@pytest.mark.parametrize("layers", [(1,), (0, 2)])
def test_memit_spreads_what_is_missing_over_the_layers(editing, scoring, model, tokenizer, moments, layers):
    """Its dense systems against their closed form, with keys and states of one text at a time."""
    hparams = MemitHparams(steps=4, covariance_weight=20.0)
    edit = editing.memit(model, tokenizer, FACT, layers, hparams, CONTEXTS, moments)
    last, done = model.transformer.h[layers[-1]], {}
    for left, layer in zip(range(len(layers), 0, -1), layers, strict=True):
        with scoring.changed(model, done):
            module = model.transformer.h[layer].mlp.c_proj
            bare, *others = (seen(model, module, tokenizer, FACT, context)[0] for context in (None, *CONTEXTS))
            key = bare / 2 + sum(others) / 10
            residual = (edit.vector - seen(model, last, tokenizer, FACT)[1]) / left
        across = torch.linalg.solve(moments[layer], key)
        expected = torch.outer(residual, across / (hparams.covariance_weight + key @ across))
        assert expected.norm() > 1e-3
        torch.testing.assert_close(edit.changes[layer].weight, expected)
        done[layer] = edit.changes[layer]
    assert list(edit.changes) == list(layers)


def test_finetuning_keeps_every_weight_within_its_bound(editing, scoring, model, tokenizer):
    hparams = FinetuneHparams(steps=10, lr=5e-3, norm_constraint=8e-3)
    edit = editing.finetune(model, tokenizer, FACT, (1, 2), hparams)
    assert list(edit.changes) == [1, 2]
    for change in edit.changes.values():
        for part in (change.weight, change.bias):
            assert part.abs().max() == pytest.approx(8e-3)
    ids, target = encoded(tokenizer, FACT)[0], target_of(tokenizer, FACT.target_new)
    with torch.no_grad(), scoring.changed(model, edit.changes):
        after = nll(model, ids, target).sum().item()
    assert after < edit.losses[-1] < edit.losses[0]


def test_finetuning_steps_down_the_slope(editing, model, tokenizer):
    """Adam's first step is the learning rate for every weight."""
    edit = editing.finetune(model, tokenizer, FACT, (LAYER,), FinetuneHparams(steps=1, lr=1e-5))
    module = model.transformer.h[LAYER].mlp.c_proj
    loss = nll(model, encoded(tokenizer, FACT)[0], target_of(tokenizer, FACT.target_new)).sum()
    assert edit.losses == [pytest.approx(loss.item())]
    weight, bias = torch.autograd.grad(loss, [module.weight, module.bias])
    change = edit.changes[LAYER]
    for part, slope in ((change.weight, weight.T), (change.bias, bias)):
        expected = -1e-5 * slope / (slope.abs() + 1e-8)
        torch.testing.assert_close(part, expected, atol=1e-12, rtol=1e-6)


def test_finetuning_ends_when_the_loss_stays_low(editing, model, tokenizer):
    edit = editing.finetune(model, tokenizer, FACT, (LAYER,), FinetuneHparams(stop_loss=1e9))
    assert len(edit.losses) == 5
    assert not edit.changes[LAYER].weight.any()


def test_scores_are_those_of_single_texts(editing, scoring, model, tokenizer):
    edit = editing.finetune(model, tokenizer, FACT, (LAYER,), FinetuneHparams(steps=3, norm_constraint=0.1))
    probes = scoring.score(model, tokenizer, FACT, edit.changes)
    places = [(probe.prompt_kind, probe.prompt_index) for probe in probes]
    assert places == [("rewrite", 0), *(("paraphrase", i) for i in range(2)), *(("neighborhood", i) for i in range(3))]
    texts = ["The sport of Ann Lee is", *FACT.paraphrase_prompts, *FACT.neighborhood_prompts]

    def plain(target):
        ids = target_of(tokenizer, target)
        return [nll(model, tokenizer(text)["input_ids"], ids).sum().neg().exp().item() for text in texts]

    def probed(name):
        return [getattr(probe, name) for probe in probes]

    assert probed("p_pre") == pytest.approx(plain("in Seattle"), rel=1e-10)
    assert probed("p_pre_other") == pytest.approx(plain("tennis"), rel=1e-10)
    module, change = model.transformer.h[LAYER].mlp.c_proj, edit.changes[LAYER]
    with torch.no_grad():
        before = [module.weight.clone(), module.bias.clone()]
        module.weight += change.weight.T
        module.bias += change.bias
        assert probed("p_post") == pytest.approx(plain("in Seattle"), rel=1e-10)
        assert probed("p_post_other") == pytest.approx(plain("tennis"), rel=1e-10)
        module.weight.copy_(before[0])
        module.bias.copy_(before[1])
    assert probed("p_post")[0] > 1.01 * probed("p_pre")[0]


def test_the_oracle_finds_the_same(editing, scoring, model, tokenizer, moments):
    task = Task(FACT, "error_injection", tuple(target_of(tokenizer, FACT.target_new)))
    hparams = {"rome": RomeHparams(steps=5), "memit": MemitHparams(steps=5), "finetune": FinetuneHparams(steps=5)}
    window = (0, 1, 2)
    expected = [
        {1: Change(oracle_rome.rome(model, tokenizer, task, CONTEXTS, 1, moments[1], hparams["rome"]).weight)},
        oracle_memit.memit(model, tokenizer, [task], CONTEXTS, window, moments, hparams["memit"]).changes,
        oracle_finetune.finetune(model, tokenizer, task, window, hparams["finetune"]).changes,
    ]
    found = [
        editing.rome(model, tokenizer, FACT, 1, hparams["rome"], CONTEXTS, editing.inverse(moments[1])),
        editing.memit(model, tokenizer, FACT, window, hparams["memit"], CONTEXTS, moments),
        editing.finetune(model, tokenizer, FACT, window, hparams["finetune"]),
    ]
    for edit, changes in zip(found, expected, strict=True):
        assert edit.changes.keys() == changes.keys()
        for layer, change in changes.items():
            torch.testing.assert_close(edit.changes[layer].weight, change.weight, rtol=1e-7, atol=1e-9)
    probes = scoring.score(model, tokenizer, FACT, found[0].changes)
    for ours, theirs in zip(probes, oracle_scores.probe(model, tokenizer, task, found[0].changes), strict=True):
        assert (ours.prompt_kind, ours.prompt_index) == (theirs.kind, theirs.index)
        expected_numbers = [each.p for each in (theirs.pre, theirs.post, theirs.pre_other, theirs.post_other)]
        found_numbers = [ours.p_pre, ours.p_post, ours.p_pre_other, ours.p_post_other]
        assert found_numbers == pytest.approx(expected_numbers, rel=1e-9)


def test_windows_are_clipped(editing, model):
    assert [list(editing.about(model, layer, 5)) for layer in (0, 1, 3)] == [[0, 1, 2], [0, 1, 2, 3], [1, 2, 3]]
    assert list(editing.about(model, 2, 1)) == [2]


def test_a_part_is_timed_and_scaled(editing, model, tokenizer, moments):
    facts = [replace(FACT, id=str(number)) for number in range(3)]
    whole = editing.measure_rome(model, tokenizer, facts, (0, 2), CONTEXTS, moments, RomeHparams(steps=3))
    assert list(whole.timed) == [(fact, layer) for layer in (0, 2) for fact in "012"]
    assert whole.edits == 6
    assert whole.editing_seconds == pytest.approx(sum(each.editing_seconds for each in whole.timed.values()))
    assert whole.scoring_seconds == pytest.approx(sum(each.scoring_seconds for each in whole.timed.values()))
    single = editing.rome(model, tokenizer, FACT, 2, RomeHparams(steps=3), CONTEXTS, moments[2].inverse())
    timed = whole.timed["1", 2]
    assert timed.loss == pytest.approx(single.losses[-1])
    assert timed.norm == pytest.approx(single.changes[2].weight.norm().item())
    assert len(timed.probes) == 6

    study = (model, tokenizer, facts, (0, 2))
    part = editing.measure_memit(*study, CONTEXTS, moments, MemitHparams(steps=2), window=2, least=2, fraction=0.0)
    assert [layer for _, layer in part.timed] == [0, 2]
    assert part.edits == 6
    for name in ("editing_seconds", "scoring_seconds"):
        spent = [getattr(each, name) for each in part.timed.values()]
        assert getattr(part, name) == pytest.approx(3 * sum(spent))
    short = editing.measure_finetune(*study, FinetuneHparams(steps=2), window=3, seconds=0.0)
    assert (len(short.timed), short.edits) == (1, 6)


def test_the_workload(bench, editing):
    module, workload = bench("editing_workload"), bench("workload")
    made = module.editing_workload(Path("no such folder"), 20, 500)
    assert made.facts == module.editing_workload(Path("no such folder"), 20, 500).facts
    assert len(made.facts) == 20
    for fact in made.facts:
        assert len({fact.text, *fact.paraphrase_prompts, *fact.neighborhood_prompts}) == 13
        assert fact.target_new != fact.target_true
        for text in (fact.text, fact.target_new, *fact.paraphrase_prompts, *fact.neighborhood_prompts):
            assert made.tokenizer.decode(made.tokenizer(text)["input_ids"]) == text
    assert len(set(made.contexts.rome)) == 20
    assert len(set(made.contexts.memit)) == 5

    shape = {**workload.SHAPES["toy"], "vocab_size": 500}
    model = module.editable_model(workload.gpt2(shape), torch.float32, torch.device("cpu"))
    moments = module.second_moments(model, (0, 1))
    assert torch.equal(moments[1], module.second_moments(model, (1,))[1])
    assert all(torch.linalg.cond(moment) < 1e3 for moment in moments.values())
    fact = made.facts[2]
    run = editing.measure_rome(model, made.tokenizer, [fact], (0,), made.contexts.rome, moments, RomeHparams())
    rewrite, *others = run.timed[fact.id, 0].probes
    assert rewrite.p_post > 100 * rewrite.p_pre
    assert len(others) == 12


def test_contexts_have_the_published_lengths(bench):
    module, workload = bench("editing_workload"), bench("workload")
    if not workload.DATA.is_dir():
        pytest.skip("the CounterFact prompts are not here")
    made = module.editing_workload(workload.DATA, 20, 50257)
    lengths = [len(made.tokenizer(text)["input_ids"]) for text in (*made.contexts.rome, *made.contexts.memit)]
    assert lengths == [5] * 10 + [10] * 15
    assert all(len(made.tokenizer(f" {fact.target_new}")["input_ids"]) == 1 for fact in made.facts)
