"""An editing study made from the command line's options: everything is checked, facts are filtered and texts sampled,
but no edit is made yet."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from causalcone.engine.edit.editor import Editor
from causalcone.engine.edit.methods.registry import methods
from causalcone.engine.edit.moments.moments import Moments
from causalcone.engine.edit.moments.sampled import SOURCE
from causalcone.engine.edit.requests.problems import make_requests
from causalcone.engine.edit.requests.requests import ERROR_INJECTION, FACT_AMPLIFICATION, NOISY, Request
from causalcone.engine.edit.texts.contexts import Contexts
from causalcone.engine.encoding import prompt_record
from causalcone.engine.errors import ExperimentError, FactError
from causalcone.engine.facts import Fact, usable
from causalcone.engine.localize.prompt_runs import Prompt
from causalcone.runners.edits.moments import collected
from causalcone.runners.edits.presets import AUTO, load_preset, preset_of
from causalcone.runners.edits.settings import EditPlan, parse_layers, plan_of, read_contexts
from causalcone.runners.edits.study import EditStudy
from causalcone.runners.inputs.fingerprints import facts_fingerprint
from causalcone.runners.inputs.inputs import Inputs, open_inputs
from causalcone.runners.inputs.reference_texts import ReferenceTexts, load_reference_texts
from causalcone.runners.inputs.running_text import RunningText, open_texts
from causalcone.runners.names import path_of
from causalcone.runners.options import (
    EditedOptions,
    EditingOptions,
    EditMethodOptions,
    PromptOutputOptions,
    ScoringOptions,
    SequenceOptions,
)
from causalcone.runners.results.folder import MOMENTS, refuse_occupied


@dataclass(frozen=True)
class TextInputs:
    """Contents of the files that options name. running: text to collect moments over."""

    contexts: Contexts | None
    references: ReferenceTexts | None
    running: RunningText | None


def editing(
    source: EditedOptions,
    choice: EditingOptions,
    scoring: ScoringOptions,
    output: PromptOutputOptions,
    sequence: SequenceOptions,
) -> EditStudy:
    """The study of the options; moments are collected, if requested."""
    if sequence.sequential:
        if source.prompt is not None or output.out is None or scoring.keep_deltas:
            raise ExperimentError(
                "--sequential edits --facts into the folder --out, and keeps its changes there: leave out --prompt and "
                "--keep-deltas"
            )
    elif given := [name for name, value in vars(sequence).items() if value != getattr(SequenceOptions, name)]:
        raise ExperimentError(f"--{given[0].replace('_', '-')} goes with --sequential; give that, or leave it out")
    elif output.out is not None:
        refuse_occupied(output.out, output.overwrite)
    elif scoring.keep_deltas:
        raise ExperimentError("--keep-deltas writes files: give --out with a folder for them, or leave it out")
    choice, known = _with_preset(_completed(choice, source), source.model)
    layers = None if choice.layers is None else parse_layers(choice.layers)
    plan = plan_of(choice, choice.problem or ERROR_INJECTION, layers, scoring.aggregate)
    texts = read_texts(choice, plan, scoring)
    inputs = open_inputs(source)
    if inputs.single:
        inputs = replace(inputs, every=[_answered(inputs, source)])
        only = isinstance(plan.layers, tuple) and len(plan.layers) == 1
        plan = replace(plan, layers=plan.layers if only else layers or (inputs.session.sizes.depth // 4,))
    elif choice.problem is None and all(fact.target_new == fact.target_true for fact in inputs.facts):
        plan = plan_of(choice, FACT_AMPLIFICATION, layers, scoring.aggregate)
        warnings.warn(_TOWARDS_TRUE.format(source.facts), stacklevel=2)
    if not known:
        plan = _guessed(plan, layers is not None, inputs.session.sizes.depth, source.model)
    editor = editor_of(inputs, choice, plan, texts.contexts)
    kept_moments = Path(output.out or "") / MOMENTS
    if sequence.sequential and texts.running is not None and kept_moments.exists() and not output.overwrite:
        moments: Moments | None = Moments.load(kept_moments)  # of the sequence that goes on
    else:
        moments = moments_of(inputs, choice, plan, texts.running, output.quiet)
    study = prepared_edits(editor, moments, inputs, choice, plan, scoring, texts.references)
    if sequence.sequential:
        kept = {name: value for name, value in vars(sequence).items() if name != "sequential"}
        kept["facts_fingerprint"] = facts_fingerprint([request.fact for request in study.requests])
        study = replace(study, options={**study.options, "sequence": kept})
    return replace(study, collected=None if texts.running is None else moments)


_TOWARDS_TRUE = (
    "the new answer of all facts of {} is the true one: the problem is fact_amplification, which trains towards it. "
    "Meng et al. edit so whether or not the model knows a fact; --no-filter does that"
)


def _completed(choice: EditingOptions, source: EditedOptions) -> EditingOptions:
    """The options with the method that a single prompt is edited by, whether the model knows its answer or not."""
    if source.prompt is None:
        if not choice.method:
            raise ExperimentError(f"--method is missing: give one or more of {', '.join(methods())}")
        return choice
    if choice.problem in (None, ERROR_INJECTION) and source.new is None:
        raise ExperimentError("--new is missing: give what the edited model is to answer, such as --new Rome")
    if source.model == "demo" and not choice.method and choice.texts is None:
        choice = replace(choice, moments=choice.moments or "demo")
    return replace(choice, method=choice.method or ["rome"], filtered=False)


def _with_preset(choice: EditingOptions, model: str) -> tuple[EditingOptions, bool]:
    """The options with the preset that "auto" stands for; whether there is one, or none was asked for."""
    preset = preset_of(model)
    if choice.preset != AUTO:
        if choice.preset is None and preset is not None and load_preset(preset).windows:
            warnings.warn(f"there are published settings for {model}: --preset {preset}", stacklevel=3)
        return choice, True
    if preset is not None:
        warnings.warn(f"--preset {AUTO} is {preset}, by the model's name", stacklevel=3)
    return replace(choice, preset=preset), preset is not None


def _guessed(plan: EditPlan, chosen: bool, depth: int, model: str) -> EditPlan:
    """The plan for a model without a preset: where layers are not ``chosen``, they are guessed, which is said."""
    plan = plan if chosen else plan.guessed(depth)
    at = [f"{setting} at layer {setting.layers[0]}" for setting in plan.settings if setting.layers]
    layers = f"layers are a guess, by their relative depth in other models ({', '.join(at)}), and " if at else ""
    warnings.warn(
        f"no preset is known by the name of {model}: {layers}hyperparameters are the defaults, published for GPT-J; "
        "causalcone tune finds better ones",
        stacklevel=3,
    )
    return plan


def _answered(inputs: Inputs, source: EditedOptions) -> Fact:
    """The fact of a prompt, with its new answer; the model's likeliest token must be what its text stands for."""
    (fact,) = inputs.every
    if source.answer is None:
        asked: tuple[Fact | Prompt, ...] = fact, Prompt(fact.text)
        of_text, of_token = (inputs.tracer.run([each], [])[0].clean.p.item() for each in asked)
        if not math.isclose(of_text, of_token, rel_tol=1e-3):
            raise ExperimentError(
                f"--answer is missing: the model goes on with {fact.target_true!r}, which is no answer of its own"
            )
    return replace(fact, target_new=source.new)


def read_texts(choice: EditMethodOptions, plan: EditPlan, scoring: ScoringOptions) -> TextInputs:
    """Read before the model is."""
    contexts = None if choice.contexts is None else read_contexts(choice.contexts)
    references = None if scoring.references is None else load_reference_texts(scoring.references)
    if choice.moments is not None and choice.texts is not None:
        raise ExperimentError("--moments and --texts are both given; give one of the two")
    running = open_texts(choice.texts) if plan.of_moments and choice.moments is None else None
    return TextInputs(contexts, references, running)


def prepared_edits(
    editor: Editor,
    moments: Moments | None,
    inputs: Inputs,
    choice: EditMethodOptions,
    plan: EditPlan,
    scoring: ScoringOptions,
    references: ReferenceTexts | None = None,
) -> EditStudy:
    """The plan made ready: requests that have passed all checks, and the options to keep."""
    editor.moments = None if moments is None else moments.with_ridge(choice.ridge)
    requests, skipped, unposed = make_requests(
        editor.session, inputs.facts, plan.problem, editor.sigma,
        filtered=choice.filtered, on_error=inputs.on_error, compat=choice.compat, seed=editor.seed,
    )  # fmt: skip
    contexts = [getattr(editor.contexts, str(setting.definition.contexts)) for setting in plan.of_contexts]
    requests, more = usable(
        requests,
        lambda request: editor.evaluator.check(request, scoring.essence, scoring.generation, references, contexts),
        lambda request: request.fact.id,
        inputs.on_error,
    )
    inputs.leave_out([*skipped, *more])
    filtered = [fact.reason for fact in unposed]
    _warn(plan, inputs, requests, filtered, scoring)
    prompts = editor.session.prompts
    evaluate = {name: getattr(scoring, name) for name in ("essence", "accuracy", "generation", "answers")}
    options = {
        **inputs.configuration,
        "prompts": vars(prompts.form) | prompt_record([prompts.fact(request.fact) for request in requests]),
        "preset": choice.preset,
        "set": list(choice.changes or ()),
        "moments_given": choice.moments or choice.texts or (SOURCE if plan.of_moments else None),
        "contexts_given": None if choice.contexts is None else str(choice.contexts),
        "sigma": editor.sigma if plan.problem in NOISY else None,
        "filtered": choice.filtered,
        "facts_filtered": len(filtered),
        "compat": choice.compat,
        **evaluate,
        "references": None if scoring.references is None else str(scoring.references),
        "keep_deltas": scoring.keep_deltas,
    }
    study = EditStudy(
        editor=editor,
        requests=requests,
        plan=plan,
        evaluate={**evaluate, "references": references},
        keep_deltas=scoring.keep_deltas,
        options=options,
        filtered=filtered,
    )
    study.check()
    return study


def editor_of(inputs: Inputs, choice: EditMethodOptions, plan: EditPlan, contexts: Contexts | None) -> Editor:
    """Without moments yet; the level of the noise is that of all facts of the file."""
    sigma = inputs.noise_level(plan.sigma) if plan.problem in NOISY else plan.sigma
    return Editor.on(inputs.session, contexts=contexts, sigma=sigma, seed=choice.seed)


def moments_of(
    inputs: Inputs,
    choice: EditMethodOptions,
    plan: EditPlan,
    texts: RunningText | None,
    quiet: bool,
    resume: Path | None = None,
) -> Moments | None:
    """The moments of the layers that are edited, where a method needs them. resume: a file that keeps a collection
    under way."""
    depth = inputs.session.sizes.depth
    layers = sorted({layer for setting in plan.of_moments for layer in setting.edited(plan.layers, depth)})
    if not layers:
        return None
    if texts is not None:
        return collected(inputs.session, texts, layers, Console(), quiet, resume=resume)
    return Moments.load(path_of(str(choice.moments), "moments"), layers)


def _warn(
    plan: EditPlan, inputs: Inputs, requests: Sequence[Request], filtered: Sequence[str], scoring: ScoringOptions
) -> None:
    """Warn of facts that are not edited or not scored; an error where none is edited."""
    if filtered:
        warnings.warn(
            f"{plan.problem} is not posed for {len(filtered)} of {len(inputs.facts)} facts, which run.json lists; "
            f"{filtered[0]}",
            stacklevel=2,
        )
    if not requests:
        more = "; --no-filter edits facts that the model does not know too" if filtered else ""
        raise FactError(f"none of the facts of {inputs.source.facts or '--prompt'} can be edited{more}")
    lacking = {
        kind: sum(not getattr(request.fact, f"{kind}_prompts") for request in requests)
        for kind in ("paraphrase", "neighborhood", *(["generation"] if scoring.generation else []))
    }
    notes = [f"{count} have no {kind} prompts" for kind, count in lacking.items() if count]
    if notes and not inputs.single:
        warnings.warn(
            f"of {len(requests)} facts, {' and '.join(notes)}: they are edited, but those scores are missing",
            stacklevel=2,
        )
