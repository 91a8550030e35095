"""The figures of Hase et al. 2023 (6-22) and Meng et al. 2022 (14-16) from a sweep's folder."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import polars as pl
from matplotlib.figure import Figure

from causalcone.analysis import plot
from causalcone.analysis.papers.inputs import PUBLISHED, AnalysisInputs, AnalysisOptions
from causalcone.analysis.plot.effects import effects_by_window, peak_layers_by_window
from causalcone.analysis.plot.regressions import r2_bars, scatter_by_layer
from causalcone.analysis.scores import SCORES, edits_with_effects
from causalcone.analysis.stats.regressions import GROUP
from causalcone.analysis.sweep_results import RESTORED, ZEROED, State, Study
from causalcone.analysis.tables.names import SEVERED, in_order
from causalcone.analysis.tables.traces import TableError
from causalcone.engine.schemas import ERROR_INJECTION, FACT_FORCING

SUFFIXES = (".png", ".pdf")
MAPS = 6  # facts that there are maps of

_Draw = Callable[[], Figure]
_DRAWN = tuple(name for name in SCORES if name != "rewrite_magnitude")


def paper_figures(
    study: Study, folder: Path, options: AnalysisOptions = PUBLISHED, *, every: bool = False
) -> tuple[list[Path], list[str]]:
    """Draw all figures that the study has data for, as PNG and PDF; every: scatter plots of all problems and methods,
    not only the papers'. Returns the files, and in words which figures are missing, and why."""
    folder.mkdir(parents=True, exist_ok=True)
    written, missing = [], []
    for name, draw in _figures(AnalysisInputs(study, options), every):
        try:
            figure = draw()
        except TableError as error:
            missing.append(f"no figure {name}: {error}")
            continue
        for suffix in SUFFIXES:
            written.append(folder / f"{name}{suffix}")
            figure.savefig(written[-1], dpi=200)
            figure.set_layout_engine("none")  # it is laid out now
    return written, missing


def _figures(inputs: AnalysisInputs, every: bool) -> Iterator[tuple[str, _Draw]]:
    """Names and how to draw them; the drawing raises ``TableError`` where the study lacks what it needs."""
    study = inputs.study
    yield from _of_traces(study)
    if (sequences := study.sequences) is not None:
        yield "sequences", lambda: plot.sequence(sequences)
    states = study.states()
    if states:
        yield from _of_windows(inputs, states)
    if (edit := study.configuration.get("edit")) is None:
        return
    for problem in edit["problems"]:
        yield f"scores_{problem}", partial(_scores, study, problem)
    if states:
        yield from _of_regressions(inputs, states)
    yield from _scatters(inputs, every)


def _of_traces(study: Study) -> Iterator[tuple[str, _Draw]]:
    score = study.answer_score
    if study.has(RESTORED):
        yield "average_indirect_effect", lambda: plot.indirect_effect(study.folder / RESTORED, answer_score=score)
    if any(study.has(f"traces/sever_{part}") for part in SEVERED):
        yield "severed", lambda: plot.severed(study.folder / "traces", answer_score=score)
    if study.has(ZEROED):
        yield "zeroing", lambda: plot.zeroing(study.folder / ZEROED, answer_score=score)
    if study.has("gradients"):
        yield from _gradients(study)


def _gradients(study: Study) -> Iterator[tuple[str, _Draw]]:
    """Of the first facts; the tokens' texts are those of their traces, which may be of some tokens only."""
    table = study.scan("gradients").collect()
    for number, fact_id in enumerate(table["fact_id"].unique(maintain_order=True)[:MAPS]):

        def draw(fact_id: str = fact_id) -> Figure:
            traced = study.traces.filter(fact_id=fact_id).drop_nulls("token").unique("token")
            if traced.is_empty():
                raise TableError(f"fact {fact_id!r} is not traced, and its tokens' texts are not known")
            known = dict(traced.select("token", "token_text").rows())
            start, end, tokens = traced.select("subject_start", "subject_end", "prompt_tokens").row(0)
            texts = [known.get(token) or "" for token in range(tokens)]
            return plot.gradients(table.filter(fact_id=fact_id), fact_id, texts, (start, end))

        yield f"gradients_{number:03}", draw


def _of_windows(inputs: AnalysisInputs, states: Sequence[State]) -> Iterator[tuple[str, _Draw]]:
    sizes = [(kind, size) for kind, size in states if kind == inputs.state[0]]

    def effects() -> dict[int, pl.DataFrame]:
        return {state[1]: inputs.study.effects(state, "max", inputs.options.denominator) for state in sizes}

    yield "effects_by_window", lambda: effects_by_window(effects(), compat=inputs.compat)
    yield "peak_layers", lambda: peak_layers_by_window(effects())


def _scores(study: Study, problem: str) -> Figure:
    edits = study.scores.filter(problem=problem)
    return plot.scores(edits, [name for name in _DRAWN if edits[name].is_not_null().any()])


def _of_regressions(inputs: AnalysisInputs, states: Sequence[State]) -> Iterator[tuple[str, _Draw]]:
    """Of the main state, and of the same kind's other windows."""
    options, main = inputs.options, inputs.state
    others = [state for state in states if state[0] == main[0] and state != main]
    for kind, size in (main, *others):

        def draw(state: State = (kind, size)) -> Figure:
            return r2_bars(inputs.regressions(inputs.study.joined(state, options.at, options.denominator), "rewrite"))

        yield f"r2_{kind}_{size}", draw


def _scatters(inputs: AnalysisInputs, every: bool) -> Iterator[tuple[str, _Draw]]:
    study = inputs.study

    def scatter(table: Callable[[], pl.DataFrame], key: tuple[str, str, int], score: str, effect: str) -> _Draw:
        return lambda: scatter_by_layer(table(), *key, score, effect=effect)

    def restored() -> pl.DataFrame:
        return edits_with_effects(study.scores, inputs.largest)

    def at_subject() -> pl.DataFrame:
        return study.joined(inputs.state, "subject_last", inputs.options.denominator)

    try:
        known = in_order(study.scores.select(GROUP).unique(maintain_order=True)).rows()
    except TableError:  # which the figures of scores raise too
        return
    rome = (ERROR_INJECTION, "rome", 1)
    if rome in known:
        yield "scatter_rewrite", scatter(restored, rome, "rewrite", "tracing effect")
        yield "scatter_overall", scatter(restored, rome, "overall", "tracing effect")
        yield "scatter_last_subject", scatter(at_subject, rome, "rewrite", "tracing effect, last subject token")
        yield "scatter_unscaled", scatter(lambda: inputs.absolute, rome, "rewrite_magnitude", "absolute tracing effect")
        yield "scatter_zeroing_rewrite", scatter(lambda: inputs.zeroed, rome, "rewrite", "zeroing effect")
        yield "scatter_zeroing_overall", scatter(lambda: inputs.zeroed, rome, "overall", "zeroing effect")
    forced = (FACT_FORCING, "finetune", 5)
    if forced in known:
        yield "scatter_fact_forcing", scatter(restored, forced, "rewrite", "tracing effect")
    if every:
        for key in known:
            if key not in (rome, forced):
                yield f"scatter_{'_'.join(map(str, key))}", scatter(restored, key, "rewrite", "tracing effect")
