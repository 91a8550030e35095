"""The stage "edit": every method edits the facts in every problem, and the edits are scored."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, Literal

import pyarrow as pa
from pydantic import Field, StrictBool, StrictInt, StrictStr

from causalcone.engine.edit.editor import Editor
from causalcone.engine.edit.moments.moments import Moments
from causalcone.engine.edit.requests.problems import make_requests
from causalcone.engine.edit.requests.requests import NOISY, Request
from causalcone.engine.edit.requests.windows import as_windows
from causalcone.engine.edit.runs.flops import Asked, EditWork, Grown
from causalcone.engine.edit.scoring.answers import ANSWER_TOKENS
from causalcone.engine.edit.scoring.sampled_texts import ESSENCE_TEXTS, TEXT_TOKENS
from causalcone.engine.edit.texts.contexts import Contexts
from causalcone.engine.errors import ExperimentError
from causalcone.engine.facts import Fact, usable
from causalcone.engine.schemas import EDIT_SCHEMA, METRIC_SCHEMA, PROBE_SCHEMA, TEXT_SCHEMA, Problem
from causalcone.runners.checked_files import CheckedTable, Count
from causalcone.runners.edits.settings import EditPlan, Setting
from causalcone.runners.inputs.reference_texts import ReferenceTexts, load_reference_texts
from causalcone.runners.names import path_of
from causalcone.runners.sweep.inputs.planned_facts import FactLengths
from causalcone.runners.sweep.inputs.resources import Resources
from causalcone.runners.sweep.inputs.settings import Names, Sweep
from causalcone.runners.sweep.inputs.units import Selection, Unit
from causalcone.runners.sweep.stages.counts import Counts
from causalcone.runners.sweep.stages.prepared import CONTEXTS, CONTEXTS_FILE, MOMENTS, MOMENTS_FILE, NOISE
from causalcone.runners.sweep.stages.stage import ResultTable, Stage, StageCost, StageUnits, errors_of

_ESSENCE_END = 2
"""Tokens of the essence prompt after the subject: "is a"."""


class EditSettings(CheckedTable):
    """Which edits are made of how many facts, and how they are scored.

    methods: as of ``causalcone edit``, such as "memit:5"; layers: "preset", "all", or numbers from 0; preset: where
    hyperparameters are from; set: what differs from these, such as "rome.steps=5"; essence, accuracy, generation,
    references, answers: as of ``causalcone edit``, generation also of some problems only, whose names are given;
    aggregate: which paraphrases and neighbours the scores shown are of.
    """

    younger = frozenset({"answers"})
    problems: Annotated[tuple[Problem, ...], Field(min_length=1)] = ("error_injection",)
    methods: Names = ("rome", "memit:5", "finetune:1", "finetune:5")
    layers: Literal["preset", "all"] | tuple[StrictInt, ...] = "all"
    preset: StrictStr | None = None
    set: tuple[StrictStr, ...] = ()
    facts: Count | None = None
    essence: StrictBool = True
    accuracy: StrictBool = False
    generation: StrictBool | tuple[Problem, ...] = False
    references: StrictStr | None = None
    answers: StrictBool = False
    aggregate: Literal["first", "mean"] | None = None

    def generates(self, problem: str) -> bool:
        """Whether models edited in a problem write texts, which are then measured."""
        if isinstance(self.generation, tuple):
            return problem in self.generation
        return self.generation or self.references is not None


class EditStage(Stage[EditSettings]):
    """Edits and their scores. plans: by problem, the methods with their hyperparameters, and the layers."""

    name, title, table, item = "edit", "edits", EditSettings, "edits"
    tables: tuple[ResultTable, ...] = (  # the last is of edits, so that none is there without its scores
        ResultTable("probes", PROBE_SCHEMA, row_bytes=30),
        ResultTable("metrics", METRIC_SCHEMA, row_bytes=16),
        ResultTable("edits", EDIT_SCHEMA, row_bytes=160),
    )
    texts = ResultTable("texts", TEXT_SCHEMA, row_bytes=100)

    def __init__(self, sweep: Sweep, options: EditSettings) -> None:
        super().__init__(sweep, options)
        if options.layers == "preset" and options.preset is None:
            raise ExperimentError(
                f"{self.name}.layers is 'preset', and no {self.name}.preset is given; give one, or the layers"
            )
        with errors_of(self.name):
            settings: dict[str, Any] = {key: getattr(options, key) for key in ("layers", "preset", "aggregate")}
            settings |= {"changes": options.set, "sigma": sweep.noise.sigma}
            self.plans = {problem: EditPlan.of(options.methods, problem, **settings) for problem in options.problems}
        plan = self.plans[options.problems[0]]
        uses = {NOISE: {*NOISY} & {*options.problems}, CONTEXTS: plan.of_contexts, MOMENTS: plan.of_moments}
        self.needs = [name for name, users in uses.items() if users]
        self.aggregate = plan.aggregate
        if options.answers or any(map(options.generates, options.problems)):
            self.tables = (self.texts, *self.tables)
        self._resources: tuple[Editor, ReferenceTexts | None] | None = None

    def layers(self, problem: Problem, setting: Setting, depth: int) -> tuple[int, ...]:
        """The layers, or centres of windows, that a problem's edits of a method are made at."""
        with errors_of(f"{self.name}.layers"):
            return self.plans[problem].layers_of(setting, depth)

    def moment_layers(self, depth: int) -> Sequence[int]:
        chosen = [(problem, setting) for problem, plan in self.plans.items() for setting in plan.of_moments]
        return [layer for each in chosen for layer in each[1].edited(self.layers(*each, depth), depth)]

    def units(self, selection: Selection, depth: int) -> list[StageUnits]:
        works = []
        for problem, plan in self.plans.items():
            facts = selection.erasable if problem == "fact_erasure" else selection.known
            facts = facts[: self.options.facts]
            units: list[Unit] = []
            for setting in plan.settings:
                layers = len(self.layers(problem, setting, depth))
                size = max(1, len(facts)) if setting.definition.joint else max(1, self.sweep.units.edits // layers)
                units += self.cut(_group(problem, setting), facts, size, layers)
            works.append(StageUnits(self, problem.replace("_", " "), tuple(units), problem))
        return works

    def fact_check(self, resources: Resources) -> Callable[[Fact], object]:
        """Refuses facts that no request can be made of, or whose prompts are too long."""
        options = self.options
        # error injection asks more of a fact than the other problems, which ask the same
        problem = "error_injection" if "error_injection" in options.problems else "fact_amplification"
        generation = any(map(options.generates, options.problems))
        references = self._references() if generation else None
        editor = Editor.on(resources.session)
        check = partial(editor.evaluator.check, essence=options.essence, generation=generation, references=references)
        return lambda fact: check(*editor.requests([fact], problem, filtered=False))

    def groups_of(self, problem: Problem) -> list[str]:
        """The folders of a problem's edits, one for each setting."""
        return [_group(problem, setting) for setting in self.plans[problem].settings]

    def prepared(self, unit: Unit, resources: Resources) -> tuple[Problem, Setting, Editor, list[Request]]:
        """What a unit is of: its problem and setting, an editor, and requests."""
        settings = ((problem, setting) for problem, plan in self.plans.items() for setting in plan.settings)
        problem, setting = next(pair for pair in settings if _group(*pair) == unit.group)
        if self._resources is None:
            self._resources = self._editor(resources), self._references()
        editor = self._resources[0]
        facts, compat = resources.facts_of(unit), self.sweep.compat
        making: dict[str, Any] = {"filtered": False, "on_error": "skip", "compat": compat, "seed": editor.seed}
        requests, skipped, _ = make_requests(editor.session, facts, problem, editor.sigma, **making)
        needed = setting.definition.contexts
        texts = [] if needed is None else [getattr(editor.contexts, needed)]
        in_contexts = partial(editor.evaluator.check, essence=False, generation=False, references=None, contexts=texts)
        requests, long = usable(requests, in_contexts, lambda request: request.fact.id, "skip")
        resources.leave_out(unit, [*skipped, *long])
        return problem, setting, editor, requests

    def scoring(self, problem: Problem) -> dict[str, Any]:
        """The options of ``Editor.evaluate``, once a unit is prepared."""
        scoring: dict[str, Any] = {name: getattr(self.options, name) for name in ("essence", "accuracy", "answers")}
        if self.options.generates(problem) and self._resources is not None:
            scoring |= {"generation": True, "references": self._resources[1]}
        return scoring

    def compute(self, unit: Unit, resources: Resources) -> Mapping[str, pa.Table]:
        """Make edits batch by batch, score them, and let them go."""
        problem, setting, editor, requests = self.prepared(unit, resources)
        layers, scoring = self.layers(problem, setting, resources.session.sizes.depth), self.scoring(problem)
        batches: dict[str, list[pa.RecordBatch]] = {table.name: [] for table in self.tables}
        for batch in editor.batches(requests, setting.method, layers, setting.window, setting.hparams):
            tables = editor.evaluate(batch, **scoring).tables
            del batch  # changes of weights, before the next are made
            for name, made in batches.items():
                made.append(tables[name])
        return {table.name: pa.Table.from_batches(batches[table.name], table.schema) for table in self.tables}

    def cost(self, units: StageUnits, counts: Counts) -> StageCost:
        problem = next(problem for problem in self.plans if problem == units.subject)
        edits = EditCounts(self, problem, counts)
        flops = edits.before() + sum(edits.making(setting) + edits.scoring(setting) for setting in edits.settings)
        return StageCost(units, flops, edits.rows(units.items))

    def _editor(self, resources: Resources) -> Editor:
        store = resources.store
        moments = None
        if MOMENTS in self.needs:
            with store.as_file(MOMENTS_FILE) as file:
                moments = Moments.load(str(file)).with_ridge(self.sweep.moments.ridge)
        contexts = Contexts(**store.read_json(CONTEXTS_FILE)) if CONTEXTS in self.needs else None
        sigma = resources.noise_level if NOISE in self.needs else None
        return Editor.on(resources.session, moments, contexts, sigma, self.sweep.seed)

    def _references(self) -> ReferenceTexts | None:
        file = self.options.references
        return None if file is None else load_reference_texts(path_of(file, "snippets"))


def _group(problem: str, setting: Setting) -> str:
    return f"{problem}/{setting.method}-{setting.window}"


class EditCounts:
    """The edits of facts in one problem."""

    def __init__(self, stage: EditStage, problem: Problem, counts: Counts) -> None:
        self.options, self.flops, self.problem = stage.options, counts.flops, problem
        self.facts, self.sizes = counts.some(stage.options.facts), counts.architecture.sizes
        self.settings = stage.plans[problem].settings
        self.layers = partial(stage.layers, problem, depth=self.sizes.depth)
        self.published = stage.sweep.compat == "published"
        self.targets = [lengths.targets(problem, self.published) for lengths, _ in self.facts]
        self.text_tokens = min(TEXT_TOKENS, self.sizes.positions)

    def before(self) -> float:
        """Texts that the unedited model writes, once for every fact: the target in Tracing Reversal, with noise and
        without; in the first problem, essence texts."""
        flops = 0.0
        if self.problem == "tracing_reversal":
            texts = Grown.total((Grown(1, fact.prompt, fact.reversed), weight) for fact, weight in self.facts)
            flops += self.flops.decoding(texts) * (1 if self.published else 2)
        if self.options.essence and self.problem == self.options.problems[0]:
            starts = ((fact.essence + _ESSENCE_END, weight * ESSENCE_TEXTS) for fact, weight in self.facts)
            flops += self.flops.decoding(Grown.total((self._grown(tokens), times) for tokens, times in starts))
        asked = ((self._answer(tokens), weight) for fact, weight in self.facts for tokens in fact.conditions)
        flops += self.flops.decoding(Grown.total(asked))
        return flops

    def making(self, setting: Setting) -> float:
        """Edits of all facts at all layers."""
        contexts, windows, noisy = setting.definition.contexts, self.windows(setting), self.problem == "fact_forcing"
        searched = self._total(lambda fact, target, other: fact.searched(contexts, target))
        trained = self._total(lambda fact, target, other: Asked.after(fact.prompt, [target]))
        work = EditWork(flops=self.flops, windows=windows, searched=searched, trained=trained, noisy=noisy)
        return setting.definition.flops(work, setting.hparams)

    def scoring(self, setting: Setting) -> float:
        """Answers, and texts where these are asked for, before and after every edit. Answers take all their tokens."""
        windows, last = self.windows(setting), self.sizes.depth - 1
        rank: float | None = setting.definition.rank
        if rank is not None and setting.definition.joint:
            rank *= sum(weight for _, weight in self.facts)
        asked = self._total(lambda fact, target, other: self._asked(fact, target, other))
        flops = self.flops.unedited(asked, whole=any(window[0] == last for window in windows))
        flops += sum(self.flops.edited(asked, window, rank) for window in windows)
        texts = Grown.total((text, weight) for fact, weight in self.facts for text in self._written(fact))
        flops += self.flops.decoding(texts)
        return flops + sum(self.flops.decoding(texts, len(window), rank) for window in windows)

    def rows(self, edits: int) -> dict[str, float]:
        """Rows by table of this many edits: metrics are two of each kind of prompt, its accuracy, and the others."""
        options, count = self.options, sum(weight for _, weight in self.facts)
        prompts, probes, texts = (
            sum(len(of(fact)) * weight for fact, weight in self.facts) / count
            for of in (lambda fact: (fact.prompt, *fact.asked), lambda fact: fact.probes, self._written)
        )
        kinds = 3 if prompts > 1 else 1
        written = 1 + (options.references is not None) if options.generates(self.problem) else 0
        metrics: float = options.essence + kinds * (2 + options.accuracy) + written
        metrics += options.accuracy * probes + options.answers * (min(kinds, 2) + probes)  # a group may have several
        return {
            "edits": edits,
            "probes": edits * (prompts + probes),
            "metrics": edits * metrics,
            "texts": edits * texts,
        }

    def windows(self, setting: Setting) -> list[tuple[int, ...]]:
        return [window.layers for window in as_windows(self.layers(setting), setting.window, self.sizes.depth)]

    def _asked(self, lengths: FactLengths, target: int, other: int | None) -> Asked:
        parts = [(lengths.answers(target, other), 1)]
        if self.options.essence:
            parts.append((Asked.after(1, [self.text_tokens - 1]), ESSENCE_TEXTS))
        asked = Asked.total(parts)
        return replace(asked, distinct=asked.distinct * (1 + self.options.accuracy))  # logits are computed once more

    def _grown(self, tokens: int) -> Grown:
        return Grown(1, tokens, max(0, self.text_tokens - tokens))

    def _answer(self, tokens: int) -> Grown:
        return Grown(1, tokens, min(ANSWER_TOKENS, self.sizes.positions + 1 - tokens))

    def _written(self, fact: FactLengths) -> list[Grown]:
        """The texts that models write about a fact, before every edit and after it."""
        texts = [self._grown(tokens) for tokens in fact.generation] if self.options.generates(self.problem) else []
        return texts + ([self._answer(tokens) for tokens in fact.open] if self.options.answers else [])

    def _total(self, of: Callable[[FactLengths, int, int | None], Any]) -> Any:
        """The sum over all facts."""
        terms = [(of(fact, *both), weight) for (fact, weight), both in zip(self.facts, self.targets, strict=True)]
        return type(terms[0][0]).total(terms)
