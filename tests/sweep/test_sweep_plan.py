"""Planning sweeps: what they take is said without weights, facts and a network, as the engine's plans say it."""

from __future__ import annotations

import importlib
import re
import socket
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.editing_cases import FULL
from helpers.families import FAMILIES
from helpers.models import gpt2, tokenizer
from helpers.sweeps import configured, write_sweep
from transformers import AutoConfig

from causalcone import Tracer
from causalcone.engine.edit.methods.edits import Edit, edit_of
from causalcone.engine.edit.requests.prompts import Encoder
from causalcone.engine.edit.requests.requests import Request
from causalcone.engine.edit.requests.windows import Window
from causalcone.engine.encoding import PromptEncoder
from causalcone.engine.errors import CausalconeError, ExperimentError
from causalcone.engine.models import families, outline, read_architecture
from causalcone.runners.facts.files import save_facts
from causalcone.runners.sweep.config import load_sweep, sweep_names
from causalcone.runners.sweep.forecast import forecast, stage_costs
from causalcone.runners.sweep.inputs.model_outline import model_outline
from causalcone.runners.sweep.inputs.planned_facts import MEASURED, SHAPES, FactLengths, facts_of, typical_facts
from causalcone.runners.sweep.stages import stages_of
from causalcone.runners.sweep.stages.counts import Counts, grouped
from causalcone.runners.sweep.stages.edit import EditCounts
from causalcone.runners.sweep.stages.stage import StageCost

TINY = "shape={ model_type = 'gpt2', n_layer = 4, n_embd = 32, n_head = 4, n_positions = 64, vocab_size = 360 }"
UNKNOWN = ("model=no/model", "facts=none.json", TINY, "edit.layers=[0,2]")
PREPARED = ("level of noise", "contexts", "second moments")


@pytest.fixture(scope="module")
def sweep(tmp_path_factory, tokenizer):
    """A small model, its facts, and the file of a sweep over them."""
    folder = tmp_path_factory.mktemp("planned")
    gpt2().save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return write_sweep(folder)


@pytest.fixture
def alone(monkeypatch, tmp_path):
    """An empty folder, and no network."""

    def refuse(*_):
        raise OSError("there is no network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.chdir(tmp_path)


def counting(file: Path, *changes: str) -> Counts:
    chosen = configured(file, *changes)
    architecture = model_outline(chosen)
    return Counts(architecture, facts_of(chosen, architecture.sizes))


def costs(file: Path, *changes: str) -> list[StageCost]:
    return stage_costs(configured(file, *changes), counting(file, *changes))


def flops(planned) -> dict[str, float]:
    return {stage.work.title: stage.flops for stage in planned.stages}


# --- models without weights ---


def test_every_architecture_has_a_family():
    assert set(FAMILIES) == set(families())


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_without_weights(family):
    model = FAMILIES[family]()
    known, found = read_architecture(model), outline(model.config)
    assert all(parameter.is_meta for parameter in found.model.parameters())
    assert (found.sizes, found.parallel) == (known.sizes, known.parallel)


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_of_the_usual_config(family):
    """Of a shape that says nothing else: the sizes that transformers gives the family, some of them billions."""
    own = {"head_dim": 128} if family == "ministral" else {}  # whose usual config leaves it open
    sizes = outline(AutoConfig.for_model(family, **own)).sizes
    assert min(vars(sizes).values()) > 0


# --- presets ---


@pytest.mark.slow
@pytest.mark.parametrize("name", sweep_names())
def test_presets_are_planned_with_nothing_at_hand(alone, name):
    chosen = load_sweep(name)
    planned = forecast(chosen, rate=300e12)
    assert planned.stages[0].work.items == (chosen.limit or 1000)
    assert all(stage.flops > 0 for stage in planned.stages if stage.work.title not in PREPARED)
    assert 0 < planned.hours < 100
    assert planned.disk > 0


def test_a_published_study_in_the_command_line(alone, run):
    code, out, _ = run("sweep", "hase2023-gptj", "--plan", "--rate", "300e12", "--known", 652)
    assert code == 0
    for text in ("causal tracing", "652 facts", "20,864 edits", "facts: 2,000 (the sweep's limit)", "--known"):
        assert text in out
    assert "typical of CounterFact" in out


# --- what the engine's plans say ---


def test_localization_is_planned_as_by_the_engine(sweep):
    taken = {each.work.stage.name: each for each in costs(sweep, "gradients=none", "edit=none")}
    tracer = Tracer.from_pretrained(str(sweep.parent / "model"))
    own = {"samples": 2, "sigma": 0.4}
    assert taken["trace"].flops == tracer.plan(FULL, ("hidden:1", "mlp:3"), **own).flops
    severed = tracer.plan(FULL, ("hidden:1",), sever="mlp", tokens="subject_last", **own)
    assert taken["sever"].flops == severed.flops
    assert taken["trace"].rows == {"traces": tracer.trace(FULL, ("hidden:1", "mlp:3"), **own).num_rows}
    assert taken["zero"].rows == {"traces": tracer.zero(FULL, ("mlp:3",)).num_rows}
    assert 0 < taken["zero"].flops < taken["trace"].flops


@pytest.mark.parametrize("problem", ["error_injection", "fact_erasure"])
def test_edits_are_counted_as_in_the_benchmark(sweep, monkeypatch, problem):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "bench")
    changes = (f'edit.problems=["{problem}"]', "edit.essence=false", "edit.accuracy=false")
    whole, stage = counting(sweep, *changes), stages_of(configured(sweep, *changes))["edit"]
    sizes = whole.architecture.sizes
    encoder = Encoder(PromptEncoder(tokenizer(), sizes.vocabulary, sizes.positions), sizes)
    benched = importlib.import_module("editing_flops").Flops(encoder)
    contexts = {"rome": ["They say", "Bo"], "memit": ["In the city"]}
    editing = EditCounts(stage, problem, whole)
    requests = [_request(fact, problem, encoder) for fact in FULL]

    def edits(method: str, window: int) -> list[Edit]:
        return [
            edit_of(request, method, Window.around(at, window, 4), steps=2, loss=0.0)
            for request in requests
            for at in (0, 2)
        ]

    rome, memit, finetune = stage.plans[problem].settings
    assert editing.making(rome) == benched.rome(edits("rome", 1), contexts["rome"], 2)
    assert editing.making(memit) == benched.memit(edits("memit", 2), contexts["memit"], 2)
    assert editing.making(finetune) == benched.finetune(edits("finetune", 1), 2)
    assert editing.scoring(rome) == benched.scoring(edits("rome", 1))


def _request(fact, problem, encoder):
    true = encoder.prompts.fact(fact).target
    new = encoder.prompts.fact(replace(fact, target_true=fact.target_new)).target
    return Request(fact, problem, *((new, true) if problem == "error_injection" else (true, new)))


# --- sanity ---


def test_twice_the_facts_take_twice_as_much(sweep):
    once, twice = (forecast(configured(sweep, *UNKNOWN, f"limit={n}"), rate=1e12) for n in (300, 600))
    for one, two in zip(once.stages, twice.stages, strict=True):
        if (
            one.work.title not in PREPARED and one.work.title != "integrated gradients"
        ):  # of which there are three facts
            assert two.work.items == 2 * one.work.items
            assert two.flops == pytest.approx(2 * one.flops)
            assert two.disk == pytest.approx(2 * one.disk, rel=0.01)


def test_hours_go_with_the_rate(sweep):
    slow, fast = (forecast(configured(sweep, *UNKNOWN), rate) for rate in (1e12, 4e12))
    assert flops(slow) == flops(fast)
    assert slow.hours == pytest.approx(4 * fast.hours)
    trace = next(stage for stage in slow.stages if stage.work.title == "causal tracing")
    assert trace.hours(1e12) == pytest.approx(trace.flops / 0.7e12 / 3600)
    edits = next(stage for stage in slow.stages if stage.work.title == "error injection")
    assert edits.hours(1e12) == pytest.approx(edits.flops / 0.4e12 / 3600)


def test_the_rate_is_measured_where_none_is_given(sweep):
    planned = forecast(configured(sweep, *UNKNOWN, "limit=2"))
    assert planned.rate > 1e6
    assert any("measured here" in line for line in planned.lines)


def test_fewer_facts_are_known(sweep):
    every, some = (forecast(configured(sweep, *UNKNOWN, "limit=100"), 1e12, known) for known in (None, 25))
    assert flops(some)["what the model knows"] == flops(every)["what the model knows"]
    assert flops(some)["causal tracing"] == pytest.approx(flops(every)["causal tracing"] / 4)
    with pytest.raises(ExperimentError, match="--known is 101; give 1 to 100"):
        forecast(configured(sweep, *UNKNOWN, "limit=100"), 1e12, 101)


def test_where_facts_and_lengths_are_from(sweep, tmp_path):
    def lines(*changes: str) -> str:
        return "\n".join(forecast(configured(sweep, *changes), 1e12).lines)

    assert f"facts: {len(FULL)} of" in lines()
    assert f"those of {len(FULL)} facts" in lines()
    assert "facts: 1,000 (a guess; set limit), since none.json is not there" in lines(*UNKNOWN)
    known = lines("model=no/model", TINY)
    assert f"facts: {len(FULL)} of" in known
    assert "typical of CounterFact in GPT-2's tokens, since no tokenizer of no/model is at hand" in known


def test_of_many_facts_some_are_measured(sweep, tmp_path):
    many = [replace(FULL[n // 2 % len(FULL)], id=str(n)) for n in range(2 * MEASURED)]  # every second one is measured
    save_facts(many, tmp_path / "many.jsonl")
    change = f"facts={tmp_path / 'many.jsonl'}"
    small, large = counting(sweep), counting(sweep, change)
    assert (large.facts.count, len(large.facts.lengths)) == (2 * MEASURED, MEASURED)
    flops = [
        next(each.flops for each in costs(sweep, *own) if each.work.stage.name == "trace") for own in ((), (change,))
    ]
    per_fact = [each / counts.facts.count for each, counts in zip(flops, (small, large), strict=True)]
    assert per_fact[1] == pytest.approx(per_fact[0], rel=0.1)


def test_facts_that_cannot_be_used(sweep, tmp_path):
    long = replace(FULL[0], id="long", prompt="{} " + "tennis golf " * 60)
    save_facts([*FULL, long], tmp_path / "long.jsonl")
    with pytest.raises(CausalconeError, match="fact 'long'"):
        counting(sweep, f"facts={tmp_path / 'long.jsonl'}")
    kept = counting(sweep, f"facts={tmp_path / 'long.jsonl'}", "skip_bad_facts=true")
    assert kept.facts.count == len(FULL)


def test_typical_facts():
    shares = dict(SHAPES)
    assert sum(shares.values()) == pytest.approx(1)
    assert sum(prompt * share for (prompt, _, _), share in SHAPES) == pytest.approx(8.3, abs=0.1)
    assert sum(subject * share for (_, _, subject), share in SHAPES) == pytest.approx(4.2, abs=0.1)
    assert all(start + subject <= prompt for (prompt, start, subject), _ in SHAPES)
    assert len(typical_facts()) == 12


def test_many_shapes_are_planned_as_some():
    like = typical_facts()[0][0]
    facts: list[tuple[FactLengths, float]] = [(replace(like, prompt=5 + n), 1.0 + n % 3) for n in range(100)]
    found = grouped(facts, 10)
    assert len(found) == 10
    assert sum(weight for _, weight in found) == pytest.approx(sum(weight for _, weight in facts))
    mean, whole = (sum(each.prompt * weight for each, weight in own) for own in (found, facts))
    assert mean == pytest.approx(whole, rel=0.02)
    assert grouped(facts * 2, 100) == [(each, 2 * weight) for each, weight in facts]


# --- what is wrong ---


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (("model=no/model",), "the config of the model 'no/model' cannot be had: .*give its shape"),
        (("model=./none",), "the config of the model './none' cannot be had: .*give its shape"),
        (("shape={ n_layer = 4 }",), "shape: model_type is None"),
        (("shape={ model_type = 'bert' }",), "shape: the architecture 'bert' is not supported"),
        (("shape={ model_type = 'nothing' }",), "shape: .*nothing"),
        (("shape={ model_type = 'gpt2', n_layers = 4 }",), "shape: a config of gpt2 has no n_layers"),
        (("shape={ model_type = 'gpt2', n_embd = 30, n_head = 4 }",), "shape: "),
        ((TINY, "edit.layers=[99]"), "edit.layers: there is no layer 99; the model has layers 0 to 3"),
        ((TINY, 'trace.states=["head.9:1"]'), "trace.states: .*head.9"),
        (("trase.states=[]",), "cannot have 'trase', only .*trace"),
        (("trace.samples=3",), "trace cannot have 'samples', only .*states"),
        (('edit.problems=["forgetting"]',), "edit.problems.* 'error_injection', 'tracing_reversal'"),
        (("noise.samples=0",), "noise.samples .*1"),
        (("units.facts=many",), "units.facts .*whole number"),
        (('trace.states=["mlp:0"]',), "trace.states: the window of mlp is 0"),
    ],
)
def test_what_is_wrong_is_named(sweep, alone, run, changes, told):
    given = ("model=no/model", *changes) if not changes[0].startswith("model") else changes
    settings = [part for change in given for part in ("--set", change)]
    code, out, err = run("sweep", sweep, *settings, "--plan", "--rate", "1e12")
    assert code == 2
    assert not out
    assert re.search(told, err), err


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--rate", "1e12"), "--rate goes with --plan"),
        (("--known", "2"), "--known goes with --plan"),
        (("--plan", "--rate", "0"), "--rate is 0; give operations per second"),
        (("--plan", "--rate", "1e12", "--known", "0"), "--known is 0; give 1 to"),
    ],
)
def test_options_that_make_no_sense(sweep, run, options, told):
    code, _, err = run("sweep", sweep, *options)
    assert code == 2
    assert told in err
