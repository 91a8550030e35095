"""Edits in sequence beside published code: batches of facts in one window of layers of a GPT-2-small shape.

Published code searches the vectors of a batch one fact after another, with full forwards of padded sequences, then
writes the weights, layer by layer. The naive way here searches those of a batch together. Of both one batch is timed
with a few steps of the search, and scaled to all steps and batches.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import command
import torch
from editing_methods import Setup
from editing_workload import NOWHERE, editable_model, editing_workload, second_moments
from measure import say, synchronize
from naive_editing import find_vector, look, padded
from oracles.editing import about_subject, down as down_of, down_weight, kept, training_prompts
from oracles.model import hooked, sites
from oracles.rome import divergence
from report import RESULTS, Growing, environment, where
from torch import Tensor
from workload import DATA, SHAPES, gpt2

from causalcone import Fact
from causalcone.engine.edit.methods.closed_forms.alphaedit import AlphaEditHparams
from causalcone.engine.edit.methods.hparams import MemitHparams, ValueHparams
from causalcone.engine.encoding import target_ids

TINY = {"n_layer": 4, "n_embd": 16, "n_head": 2, "vocab_size": 499}
PROMPTS = 60
STEPS = 4
"""Of a search that is timed."""

HPARAMS: dict[str, ValueHparams] = {
    "memit-seq": MemitHparams(stop_loss=None),
    "alphaedit": AlphaEditHparams(stop_loss=None, null_space=0.5, null_space_by="share"),
}


@dataclass(frozen=True)
class Timing:
    """Seconds of a batch: of one step of its searches, and of all that follows; changes (hidden, inner) by layer."""

    step: float
    solving: float
    changes: dict[int, Tensor]


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    shape, data = (TINY, NOWHERE) if options.toy else (SHAPES["GPT-2 small"], options.data)
    work = editing_workload(data, PROMPTS, shape["vocab_size"])
    model = editable_model(gpt2(shape), torch.float32, torch.device("cpu"))
    depth = model.config.n_layer
    window = tuple(range(depth // 4, depth // 4 + min(5, depth // 2)))
    facts = repeated(work.facts, options.edits)
    setup = Setup(model, work.tokenizer, facts, window, work.contexts, second_moments(model, window))
    report = {
        "title": f"{options.edits} edits in sequence, in batches of {options.batch}, GPT-2 small shape",
        **environment(torch.device("cpu")),
        "source": work.source,
        "layers": list(window),
        "steps": MemitHparams().steps,
        "steps_timed": STEPS,
    }
    growing = Growing(report, list(HPARAMS), options.out, "sequence", "sequence" if options.record else None, text)
    command.run_each({name: partial(measure, setup, name, options.batch) for name in options.methods}, growing)


def repeated(facts: Sequence[Fact], count: int) -> list[Fact]:
    """So many facts: the same prompts again, under other ids, with each other's new targets."""
    targets = sorted({fact.target_new for fact in facts})
    repeated = []
    for number, fact in enumerate(islice(cycle(facts), count)):
        others = [target for target in targets if target not in (fact.target_true, fact.target_new)]
        target = fact.target_new if number < len(facts) else others[number % len(others)]
        repeated.append(replace(fact, id=f"{number}", target_new=target))
    return repeated


def measure(setup: Setup, name: str, size: int) -> dict[str, Any]:
    """The engine's whole sequence, and both naive ways, scaled."""
    say(f"{name}: engine")
    seconds, _ = engine(setup, name, size, len(setup.facts), HPARAMS[name])
    few = replace(HPARAMS[name], steps=STEPS)
    _, ours = engine(setup, name, size, size, few)
    batches, steps = len(setup.facts) / size, HPARAMS[name].steps
    result: dict[str, Any] = {"name": name, "seconds": seconds, "edits": len(setup.facts), "batch": size}
    for way, search in (("naive", together), ("published", one_by_one)):
        say(f"{name}: {way}")
        timing = naive_batch(setup, name, setup.facts[:size], few, search)
        result[way] = batches * (steps * timing.step + timing.solving)
        result[f"ratio_to_{way}"] = result[way] / seconds
        result[f"difference_to_{way}"] = max(
            float((timing.changes[layer] - ours[layer]).norm() / ours[layer].norm()) for layer in setup.layers
        )
        say(f"  {timing.step:.2f} s a step, {timing.solving:.2f} s to solve: {result[f'ratio_to_{way}']:.1f}x")
    return result


def engine(setup: Setup, name: str, size: int, count: int, hparams: ValueHparams) -> tuple[float, dict[int, Tensor]]:
    """Seconds of the first ``count`` edits, and the changes (hidden, inner) by layer."""
    editor = setup.editor()
    requests = setup.requests(editor)[:count]
    began = time.perf_counter()
    sequence = editor.sequence(requests, name, [setup.layers], hparams=hparams, batch=size)
    for batch in sequence:
        say(f"  {(batch.number + 1) * size} edits: {time.perf_counter() - began:.1f} s")
    taken = time.perf_counter() - began
    return taken, {layer: change.rows(slice(None)) for layer, change in sequence.delta.changes.items()}


Search = Callable[[Setup, Sequence[Fact], Any, Any], Tensor]
"""The vectors (n, hidden) of facts at a site."""


def one_by_one(setup: Setup, facts: Sequence[Fact], site: Any, hparams: Any) -> Tensor:
    found = []
    for fact in facts:
        prompts = training_prompts(setup.model, setup.tokenizer, fact, setup.contexts.memit)
        found.append(find_vector(setup.model, setup.tokenizer, fact, site, prompts, hparams)[0])
    return torch.stack(found)


def together(setup: Setup, facts: Sequence[Fact], site: Any, hparams: Any) -> Tensor:
    """As ``find_vector``, of all facts in one batch of padded sequences; logits are computed where they are read."""
    model, tokenizer = setup.model, setup.tokenizer
    sequences: list[list[int]] = []
    lookups: list[int] = []
    read: list[tuple[int, int, int, int, float]] = []  # fact, sequence, token, target, weight
    essences = []
    for number, fact in enumerate(facts):
        target = list(target_ids(fact.target_new, tokenizer))
        prompts = training_prompts(model, tokenizer, fact, setup.contexts.memit)
        for prompt in prompts:
            weight = 1 / (len(target) * len(prompts))
            places = enumerate(target, len(prompt.ids) - 1)
            read += [(number, len(sequences), place, token, weight) for place, token in places]
            sequences.append(prompt.ids + target[:-1])
            lookups.append(prompt.lookup)
        essence = about_subject(model, tokenizer, fact, "{} is a")
        essences.append((len(sequences), essence.lookup))
        sequences.append(essence.ids)
        lookups.append(essence.lookup)
    each = len(sequences) // len(facts)
    owner, rows, places, targets, weights = (torch.tensor(column) for column in zip(*read, strict=True))
    ends = tuple(torch.tensor(essences).T)
    inputs = padded(model, sequences)
    delta = torch.zeros(len(facts), model.config.hidden_size, dtype=model.dtype, requires_grad=True)
    start = before = None

    def add(values: Tensor) -> None:
        nonlocal start
        if start is None:
            start = values[range(0, len(lookups), each), lookups[::each]].detach().clone()
        values[range(len(lookups)), lookups] += delta.repeat_interleave(each, dim=0)

    adam = torch.optim.Adam([delta], lr=hparams.lr)
    for step in range(1, hparams.steps + 1):
        with hooked([(site, add)], len(lookups)):
            states = model.transformer(**inputs, use_cache=False).last_hidden_state
        log_p = model.lm_head(states[rows, places]).log_softmax(dim=-1)
        nll = torch.zeros(len(facts)).index_add(0, owner, -log_p[range(len(rows)), targets] * weights)
        after = model.lm_head(states[ends]).log_softmax(dim=-1)
        before = after.detach() if before is None else before
        kl = torch.stack([divergence(*pair) for pair in zip(after, before, strict=True)])
        decay = delta.norm(dim=1) / start.norm(dim=1) ** 2
        loss = nll + hparams.kl_factor * kl + hparams.weight_decay * decay
        if step == hparams.steps:
            break
        (delta.grad,) = torch.autograd.grad(loss.sum(), delta)
        adam.step()
        limit, reached = hparams.clamp * start.norm(dim=1), delta.detach().norm(dim=1)
        delta.detach().mul_((limit / reached).clamp(max=1)[:, None])
    return start + delta.detach()


def naive_batch(setup: Setup, name: str, facts: Sequence[Fact], hparams: Any, search: Search) -> Timing:
    """The first batch of a sequence, whose history is empty; its changes are taken back."""
    model = setup.model
    state = sites(model)[setup.layers[-1]]["hidden"]
    if name == "alphaedit":  # its projectors are made beforehand
        for layer in setup.layers:
            projection(setup.moments[layer], hparams.null_space)
    began = time.perf_counter()
    goals = search(setup, facts, state, hparams)
    searched = time.perf_counter()
    prompts = [training_prompts(model, setup.tokenizer, fact, setup.contexts.memit) for fact in facts]
    every = [prompt for of_fact in prompts for prompt in of_fact]
    changes: dict[int, Tensor] = {}
    with kept(model, setup.layers):
        for done, layer in enumerate(setup.layers):
            keys = look(model, down_of(model, layer), every)[0].double().unflatten(0, (len(facts), -1))
            keys = (keys[:, 0] + keys[:, 1:].mean(1)).T / 2
            _, reached = look(model, state.module, [of_fact[0] for of_fact in prompts])
            rest = (goals - reached).double().T / (len(setup.layers) - done)
            changes[layer] = solved(name, setup.moments[layer], keys, rest, hparams).to(model.dtype)
            down_weight(model, layer).add_(changes[layer])
    synchronize(model.device)
    return Timing((searched - began) / hparams.steps, time.perf_counter() - searched, changes)


def solved(name: str, moment: Tensor, keys: Tensor, rest: Tensor, hparams: Any) -> Tensor:
    """The change (hidden, inner) by a dense solve, as published; AlphaEdit's projector is made beforehand there."""
    if name == "memit-seq":
        system = hparams.covariance_weight * moment.double() + keys @ keys.T
        return torch.linalg.solve(system, keys @ rest.T).T
    projector = projection(moment, hparams.null_space)
    system = projector @ (keys @ keys.T)
    system.diagonal().add_(hparams.ridge)
    return torch.linalg.solve(system, projector @ keys @ rest.T).T


@cache
def projection(moment: Tensor, share: float) -> Tensor:
    """Onto the smallest eigenvectors that hold a share of the trace, in float64; of a tensor made once."""
    values, vectors = torch.linalg.eigh(moment.double())
    inside = vectors[:, : int((values.cumsum(0) <= share * values.sum()).sum())]
    return inside @ inside.T


def text(report: dict[str, Any]) -> str:
    lines = [
        f"### {report['title']}",
        "",
        f"{report['date']}, {where(report['machine'])}; torch {report['versions']['torch']}, causalcone "
        f"{report['versions']['commit']}. Facts: {report['source']}, again with other targets. Layers "
        f"{', '.join(map(str, report['layers']))}; random weights; all {report['steps']} steps of every search.",
        "",
        "| method | edits | seconds | edits/s | naive, scaled | against naive | published, scaled | against published "
        "| engine to naive way |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for result in report["results"]:
        if "edits" not in result:
            continue
        cells = [
            result["name"],
            str(result["edits"]),
            f"{result['seconds']:.1f}",
            f"{result['edits'] / result['seconds']:.2f}",
            *(
                cell
                for way in ("naive", "published")
                for cell in (f"{result[way]:.0f}", f"{result[f'ratio_to_{way}']:.1f}x")
            ),
            f"{result['difference_to_naive']:.1e}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "Published: for every fact of a batch its search, at every step one forward of all contexts and the essence "
        "prompt with all logits, and one backward to the vector; then in each layer the keys, the states reached, and "
        "a dense solve in float64, once for the batch. Naive: the searches of a batch together in padded sequences, "
        f"with the logits that are read. Of both, the first batch is timed with {report['steps_timed']} steps, and "
        "scaled. Difference: the largest norm of the difference of a layer's change after a batch, relative to it.",
    ]
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edits", type=int, default=200, help="how many edits (200)")
    parser.add_argument("--batch", type=int, default=20, help="facts edited together (20)")
    command.add_names(parser, "--methods", HPARAMS)
    parser.add_argument("--threads", type=int, default=2, help="threads, for all ways (2)")
    parser.add_argument("--toy", action="store_true", help="a tiny model and made-up prompts")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of counterfact_prompts.json, gpt2-tokenizer/")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON (bench/results)")
    parser.add_argument("--record", action="store_true", help="put the table into bench/RESULTS.md")
    return parser.parse_args()


if __name__ == "__main__":
    main()
