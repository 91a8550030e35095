"""Plain ROME and MEMIT, and what all plain editors share, against what is known without them: definitions by hand, and
other ways to the same numbers."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from helpers.families import EVERY_FAMILY, FAMILIES
from helpers.models import FACTS, gpt2, tokenizer
from oracles.editing import (
    Change,
    Task,
    about_subject,
    at_lookup,
    at_tokens,
    changed,
    down,
    down_weight,
    key_site,
    run,
    second_moment,
    training_prompts,
    value_site,
)
from oracles.memit import memit
from oracles.model import precision, sites
from oracles.requests import PROBLEMS
from oracles.rome import loss_function, optimise, rome

from causalcone.engine.edit.methods.hparams import MemitHparams, RomeHparams
from causalcone.engine.encoding import target_ids

FACT = FACTS[4]
CONTEXTS = ("They {say}", "One of the famous players", "Bo plays the sport of golf")
TASK = Task(FACT, "error_injection", target_ids("in Seattle", tokenizer()), sigma=0.5)
TASKS = {problem: dataclasses.replace(TASK, problem=problem) for problem in PROBLEMS}
ROME = RomeHparams(steps=6)
MEMIT = MemitHparams(steps=6, covariance_weight=3.0)


@pytest.fixture(scope="module", params=EVERY_FAMILY)
def family(request):
    return build(request.param)


@pytest.fixture(scope="module")
def edits(family):
    """One edit by each method."""
    moments = {layer: moment(down_weight(family, 0).shape[1], layer) for layer in (0, 1)}
    edit = rome(family, tokenizer(), TASK, CONTEXTS, 1, moments[1], ROME)
    return edit, memit(family, tokenizer(), [TASK], CONTEXTS, (0, 1), moments, MEMIT)


def build(name):
    """A random float64 model of a family. OPT's ReLU would make its gradients jump."""
    smooth = {"activation_function": "gelu"} if name == "opt" else {}
    return FAMILIES[name](layers=3, width=16, heads=2, **smooth)


def moment(inner, seed):
    root = torch.randn(inner, inner, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return root @ root.T / inner + 0.1 * torch.eye(inner, dtype=torch.float64)


def bare(model, fact=FACT):
    return about_subject(model, tokenizer(), fact, fact.prompt)


def lookup(model, site, task=TASK):
    with precision(model, lift=True):
        return at_lookup(model, task, bare(model, task.fact), site)


def close(actual, expected, rtol=1e-9):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol * float(expected.abs().max()))


def test_a_value_is_linear_in_its_key(family):
    """And a key is the derivative of a value with respect to a row of the weight."""
    weight, bias = down(family, 1).weight, down(family, 1).bias
    key, value = (at_tokens(family, bare(family).ids, site(family, 1)) for site in (key_site, value_site))
    close(value, key @ down_weight(family, 1).T + (0 if bias is None else bias.detach()))
    seen = []
    run(family, bare(family).ids, [(value_site(family, 1), lambda values: seen.append(values[0, -1, 3]))])
    (gradient,) = torch.autograd.grad(seen[0], weight)
    close((gradient if isinstance(down(family, 1), torch.nn.Linear) else gradient.T)[3], key[-1])


@pytest.mark.parametrize("bos", [False, True])
def test_second_moment(bos):
    model, texts = gpt2(layers=2), ("Ann Lee plays golf in Seattle", "Bo is")
    keys = [at_tokens(model, tokenizer(bos)(text)["input_ids"], key_site(model, 1)) for text in texts]
    total = keys[0].T @ keys[0] + keys[1].T @ keys[1]
    close(second_moment(model, tokenizer(bos), texts, 1), total / sum(len(tokenizer(bos)(t).input_ids) for t in texts))


@pytest.mark.parametrize("bos", [False, True])
def test_contexts(bos):
    prompts = training_prompts(gpt2(layers=1), tokenizer(bos), FACT, CONTEXTS)
    texts = ["", "They say. ", "One of the famous players. ", "Bo plays the sport of golf. "]
    assert [each.ids for each in prompts] == [tokenizer(bos)(t + FACT.text)["input_ids"] for t in texts]
    assert [tokenizer().decode(each.ids[slice(*each.span)]) for each in prompts] == ["Rome"] * 4


def test_noise_is_each_prompts_own():
    """In Fact Forcing a prompt is the model on noisy embeddings, wherever its subject is."""
    model, task = gpt2(layers=2), TASKS["fact_forcing"]
    task = dataclasses.replace(task, fact=dataclasses.replace(FACT, subject="Danielle Darrieux"))
    for prompt in training_prompts(model, tokenizer(), task.fact, CONTEXTS):
        start, end = prompt.span
        embeddings = model.get_input_embeddings()(torch.tensor([prompt.ids])).detach()
        embeddings[0, start:end] += 0.5 * torch.from_numpy(np.random.RandomState(1).randn(1, end - start, 32)[0])
        seen = []
        handle = down(model, 1).register_forward_hook(lambda module, args, output, seen=seen: seen.append(output))
        model(inputs_embeds=embeddings)
        handle.remove()
        close(at_lookup(model, task, prompt, value_site(model, 1)), seen[0][0, end - 1].detach())


def test_the_model_is_left_as_it_was(family, edits):
    _, edit = edits
    with changed(family, edit.changes):
        assert not down_weight(family, 1).equal(down_weight(build(family.config.model_type), 1))
    before = build(family.config.model_type).state_dict()
    assert all(value.equal(before[name]) for name, value in family.state_dict().items())
    assert all(parameter.grad is None for parameter in family.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in family.modules())


def test_rome_maps_the_lookup_key_to_v_star(family, edits):
    edit, _ = edits
    site = value_site(family, 1)
    close(lookup(family, site), edit.v)
    close(lookup(family, key_site(family, 1)), edit.k)
    with changed(family, {1: Change(edit.weight)}):
        close(lookup(family, site), edit.v_star)
    assert (edit.v_star - edit.v).norm() > 0.03 * edit.v.norm()
    assert edit.updates == 5


def test_romes_direction(family, edits):
    """The key is the mean over prompts, and the direction its image under the inverse of the moment."""
    edit, _ = edits
    prompts = training_prompts(family, tokenizer(), FACT, CONTEXTS)
    with precision(family, lift=True):
        keys = [at_tokens(family, prompt.ids, key_site(family, 1))[prompt.lookup] for prompt in prompts]
    close(edit.k_star, sum(keys) / 4)
    image = moment(len(edit.u), 1) @ edit.u
    close(image / image.norm(), edit.k_star / edit.k_star.norm())
    assert float(edit.u.norm()) == pytest.approx(1)
    close(edit.weight, edit.Lambda[:, None] * edit.u)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_loss_by_hand(problem):
    model, task = gpt2(layers=3), TASKS[problem]
    start, delta = lookup(model, value_site(model, 1), task), torch.randn(32, dtype=torch.float64)
    found = loss_function(model, tokenizer(), task, CONTEXTS, value_site(model, 1), start, ROME)(delta)
    prompts = training_prompts(model, tokenizer(), FACT, CONTEXTS)
    essence = about_subject(model, tokenizer(), FACT, "{} is a")
    hand, places = copy.deepcopy(model), iter([prompt.lookup for prompt in [*prompts, essence]])

    def add(module, args, output):
        return output + delta * (torch.arange(output.shape[1])[:, None] == next(places))

    hand.transformer.h[1].mlp.c_proj.register_forward_hook(add)

    def logits(of, prompt, target=()):
        embeddings = of.get_input_embeddings()(torch.tensor([prompt.ids + list(target[:-1])]))
        if problem == "fact_forcing":
            embeddings[0, prompt.lookup] += 0.5 * torch.from_numpy(np.random.RandomState(1).randn(32))
        return of(inputs_embeds=embeddings).logits[0]

    nlls = []
    for prompt in prompts:
        predicted = logits(hand, prompt, task.target)[len(prompt.ids) - 1 :]
        nlls.append(torch.nn.functional.cross_entropy(predicted, torch.tensor(task.target)))
    mean = sum(nlls) / 4
    new, old = (logits(of, essence)[essence.lookup].softmax(0) for of in (hand, model))
    expected = torch.exp(-mean) if problem == "fact_erasure" else mean
    expected = expected + 0.0625 * (new * (new / old).log()).sum() + 0.5 * delta.norm() / start.norm().square()
    close(found.detach(), expected.detach(), rtol=1e-10)


@pytest.mark.parametrize("problem", ["error_injection", "fact_erasure"])
@pytest.mark.parametrize("kind", ["value", "hidden"])
def test_gradients_by_finite_differences(family, problem, kind):
    site = value_site(family, 1) if kind == "value" else sites(family)[1]["hidden"]
    start = lookup(family, site)
    generator = torch.Generator().manual_seed(1)
    delta, way = torch.randn(2, len(start), generator=generator, dtype=torch.float64)
    delta.requires_grad_()
    with precision(family, lift=True):
        loss = loss_function(family, tokenizer(), TASKS[problem], CONTEXTS[:1], site, start, ROME)
        (gradient,) = torch.autograd.grad(loss(delta), delta)
        difference = (loss(delta + 1e-5 * way) - loss(delta - 1e-5 * way)) / 2e-5
    assert gradient.norm() > 1e-6
    assert float(difference.detach()) == pytest.approx(
        float(gradient @ way), rel=1e-5, abs=1e-6 * float(gradient.norm())
    )


@pytest.mark.parametrize("clamp", [4.0, 0.2])
def test_adam_by_hand(clamp):
    model, hparams = gpt2(layers=3), dataclasses.replace(ROME, clamp=clamp)
    site, start = value_site(model, 1), lookup(model, value_site(model, 1))
    loss = loss_function(model, tokenizer(), TASK, CONTEXTS, site, start, hparams)
    delta, first, second, losses = torch.zeros_like(start), 0, 0, []
    for step in range(1, 6):
        value = loss(delta.requires_grad_())
        losses.append(value.item())
        (gradient,) = torch.autograd.grad(value, delta)
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        step_size = (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
        delta = delta.detach() - 0.5 * step_size
        delta = delta * min(1.0, clamp * float(start.norm() / delta.norm()))
    final = float(loss(delta).detach())
    found = optimise(model, tokenizer(), TASK, CONTEXTS, site, hparams)
    close(found.delta, delta)
    assert (found.updates, found.loss) == (5, pytest.approx(final))
    assert final < losses[0]
    stopped = optimise(
        model, tokenizer(), TASK, CONTEXTS, site, dataclasses.replace(hparams, stop_loss=losses[0] - 1e-9)
    )
    assert (stopped.updates, stopped.loss) == (1, pytest.approx(losses[1]))
    longer = optimise(
        model, tokenizer(), TASK, CONTEXTS, site, dataclasses.replace(hparams, steps=5), last_updates=True
    )
    assert (longer.updates, longer.loss) == (5, pytest.approx(losses[4]))
    close(longer.delta, delta)


def test_only_romes_fact_erasure_updates_in_the_last_step():
    model, moments = gpt2(layers=2), {0: moment(128, 0)}
    for problem, task in TASKS.items():
        edit = rome(model, tokenizer(), task, (), 0, moments[0], dataclasses.replace(ROME, steps=2, stop_loss=None))
        assert edit.updates == (2 if problem == "fact_erasure" else 1)
        spread = memit(
            model, tokenizer(), [task], (), (0,), moments, dataclasses.replace(MEMIT, steps=2, stop_loss=None)
        )
        assert spread.optima[0].updates == 1


def test_a_vector_that_reaches_no_target_stays_zero(family):
    site = sites(family)[2]["hidden"]
    with precision(family, lift=True):
        found = optimise(family, tokenizer(), TASK, CONTEXTS, site, ROME)
        ending = dataclasses.replace(TASK, fact=FACTS[2])
        reaching = optimise(family, tokenizer(), ending, CONTEXTS, site, ROME)
    assert not found.delta.any()
    assert found.updates == 5
    assert reaching.delta.norm() > 0.1


def test_one_memit_edit_has_a_closed_form(family, edits):
    _, edit = edits
    z = edit.optima[0].start + edit.optima[0].delta
    for layer, change in edit.changes.items():
        k, r = edit.keys[layer][:, 0], edit.residuals[layer][:, 0]
        C = 3.0 * moment(len(k), layer)
        explicit = torch.outer(r, k) @ torch.linalg.inv(C + torch.outer(k, k))
        image = torch.linalg.inv(C) @ k
        close(change.weight, explicit)
        close(change.weight, torch.outer(r, image) / (1 + k @ image))
    close(edit.residuals[0][:, 0], edit.optima[0].delta / 2)
    with changed(family, {0: edit.changes[0]}):
        close(edit.residuals[1][:, 0], z - lookup(family, sites(family)[1]["hidden"]))
        prompts = training_prompts(family, tokenizer(), FACT, CONTEXTS)
        with precision(family, lift=True):
            keys = [at_tokens(family, each.ids, key_site(family, 1))[each.lookup] for each in prompts]
        close(edit.keys[1][:, 0], keys[0] / 2 + sum(keys[1:]) / 6)
    assert edit.changes[1].weight.norm() > 1e-3


@pytest.mark.parametrize("name", ["gpt2", "gptj"])
def test_joint_memit(name):
    """It solves the normal equations, here as a least-squares problem; and with hardly any covariance weight and no
    contexts every fact's state reaches its z."""
    model = build(name)
    tasks = [TASK, *(Task(fact, "fact_amplification", target_ids("golf", tokenizer())) for fact in FACTS[:2])]
    moments = {layer: moment(down_weight(model, 0).shape[1], layer) for layer in (0, 1)}
    edit = memit(model, tokenizer(), tasks, CONTEXTS, (0, 1), moments, MEMIT)
    for layer, change in edit.changes.items():
        K, R = edit.keys[layer], edit.residuals[layer]
        assert K.shape[1] == R.shape[1] == torch.linalg.matrix_rank(change.weight) == 3
        known = math.sqrt(3.0) * torch.linalg.cholesky(moments[layer]).T
        rows = torch.cat([K.T, known])
        wanted = torch.cat([R.T, torch.zeros(len(known), len(R), dtype=torch.float64)])
        close(change.weight.T, torch.linalg.lstsq(rows, wanted).solution)
    tiny = dataclasses.replace(MEMIT, covariance_weight=1e-12)
    edit = memit(model, tokenizer(), tasks, (), (0, 1), moments, tiny)
    with changed(model, edit.changes):
        for task, optimum in zip(tasks, edit.optima, strict=True):
            assert optimum.delta.norm() > 0.1
            close(lookup(model, sites(model)[1]["hidden"], task), optimum.start + optimum.delta, rtol=1e-8)
