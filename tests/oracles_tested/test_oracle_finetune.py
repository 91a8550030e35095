"""Plain constrained fine-tuning, against what is known without it."""

import dataclasses

import numpy as np
import pytest
import torch
from helpers.families import EVERY_FAMILY, FAMILIES
from helpers.models import FACTS, gpt2, tokenizer
from oracles.editing import Task, about_subject, changed, down, down_weight
from oracles.finetune import finetune, training_loss
from oracles.model import precision

from causalcone.engine.edit.methods.hparams import FinetuneHparams
from causalcone.engine.encoding import target_ids

FACT = FACTS[4]
TASK = Task(FACT, "error_injection", target_ids("in Seattle", tokenizer()), sigma=0.5)
FORCING = dataclasses.replace(TASK, problem="fact_forcing")
ERASURE = dataclasses.replace(TASK, problem="fact_erasure")
HPARAMS = FinetuneHparams(steps=4, lr=5e-4, norm_constraint=1.2e-3, noise_samples=3)


@pytest.fixture(scope="module", params=EVERY_FAMILY)
def family(request):
    """A random float64 model of a family. OPT's ReLU would make its gradients jump."""
    smooth = {"activation_function": "gelu"} if request.param == "opt" else {}
    return FAMILIES[request.param](layers=3, width=16, heads=2, **smooth)


def tune(model, task=TASK, layers=(0, 2), **options):
    return finetune(model, tokenizer(), task, layers, dataclasses.replace(HPARAMS, **options))


def loss_of(model, task=TASK, samples=1):
    with precision(model, lift=True):
        return training_loss(model, tokenizer(), task, samples)


def number(loss):
    return float(loss.detach())


def test_every_element_stays_within_its_bound(family):
    before = {name: value.clone() for name, value in family.state_dict().items()}
    edit = tune(family)
    assert list(edit.changes) == [0, 2]
    assert edit.updates == 4
    for layer, change in edit.changes.items():
        assert change.weight.shape == down_weight(family, layer).shape
        assert (change.bias is None) == (down(family, layer).bias is None)
        for each in (change.weight, change.bias):
            if each is not None:
                assert each.abs().max() == pytest.approx(1.2e-3, rel=1e-9)
        assert (change.weight.abs() < 1.1e-3).any()
    assert all(value.equal(before[name]) for name, value in family.state_dict().items())
    assert all(parameter.grad is None for parameter in family.parameters())


def test_the_change_is_what_was_trained(family):
    """The loss that is evaluated last is that of the changed model one update before."""
    shorter, longer = tune(family, steps=3), tune(family, steps=4)
    with changed(family, shorter.changes):
        assert number(loss_of(family)) == pytest.approx(longer.loss, rel=1e-12)
    assert longer.loss < shorter.loss < number(loss_of(family))


def test_the_first_step_follows_finite_differences(family):
    change = tune(family, steps=1, norm_constraint=1.0).changes[0].weight
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        i, j = (int(torch.randint(size, (), generator=generator)) for size in change.shape)
        with torch.no_grad():
            losses = []
            for step in (1e-5, -2e-5):
                down_weight(family, 0)[i, j] += step
                losses.append(number(loss_of(family)))
            down_weight(family, 0)[i, j] += 1e-5
        slope = (losses[0] - losses[1]) / 2e-5
        assert float(change[i, j]) == pytest.approx(-5e-4 * slope / (abs(slope) + 1e-8), rel=1e-4, abs=1e-9)


def test_adam_and_the_bounds_by_hand():
    model = gpt2(layers=2)
    parameters = [down(model, 1).weight, down(model, 1).bias]
    originals = [each.detach().clone() for each in parameters]
    moments = [(torch.zeros_like(each), torch.zeros_like(each)) for each in originals]
    found = tune(model, layers=(1,))
    for step in range(1, 5):
        gradients = torch.autograd.grad(loss_of(model), parameters)
        for each, original, gradient, (first, second) in zip(parameters, originals, gradients, moments, strict=True):
            first += 0.1 * (gradient - first)
            second += 0.001 * (gradient**2 - second)
            size = (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
            each.data = original + (each.data - 5e-4 * size - original).clamp(-1.2e-3, 1.2e-3)
    expected = [each.detach() - original for each, original in zip(parameters, originals, strict=True)]
    torch.testing.assert_close(found.changes[1].weight, expected[0].T, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.changes[1].bias, expected[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("task", [TASK, FORCING, ERASURE], ids=lambda task: task.problem)
def test_the_loss_by_hand(task):
    model = gpt2(layers=2)
    prompt = about_subject(model, tokenizer(), FACT, FACT.prompt)
    noise = np.random.RandomState(1).randn(3, prompt.span[1] - prompt.span[0], 32)
    log_p = []
    for sample in noise if task.problem == "fact_forcing" else [0 * noise[0]]:
        embeddings = model.get_input_embeddings()(torch.tensor([prompt.ids + list(task.target[:-1])])).detach()
        embeddings[0, slice(*prompt.span)] += 0.5 * torch.from_numpy(sample)
        p = model(inputs_embeds=embeddings).logits[0].softmax(-1)
        log_p += [p[len(prompt.ids) - 1 + i, token].log().item() for i, token in enumerate(task.target)]
    assert len(log_p) == len(task.target) * (3 if task.problem == "fact_forcing" else 1)
    expected = np.exp(sum(log_p)) if task.problem == "fact_erasure" else -sum(log_p)
    assert loss_of(model, task, samples=3).item() == pytest.approx(expected, rel=1e-12)


def test_a_low_loss_takes_no_step_and_ends_it_unless_it_is_a_probability():
    model, passes = gpt2(layers=3), []
    handle = model.register_forward_hook(lambda module, args, output: passes.append(1))
    for task, expected in ((TASK, 5), (ERASURE, 9)):
        passes.clear()
        edit = tune(model, task, steps=9, stop_loss=100.0)
        assert (edit.updates, len(passes)) == (0, expected)
        assert edit.loss == pytest.approx(number(loss_of(model, task)))
        assert not edit.changes[0].weight.any()
    handle.remove()


def test_training_stops_where_the_loss_gets_below():
    model = gpt2(layers=3)
    losses = [tune(model, steps=steps).loss for steps in (1, 2, 3)]
    edit = tune(model, steps=9, stop_loss=losses[1] + 1e-9)
    assert (edit.updates, edit.loss) == (1, pytest.approx(losses[1]))
    endless = tune(model, steps=9, stop_loss=None)
    assert endless.updates == 9
