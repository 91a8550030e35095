"""The options of the commands, in groups that several commands share."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from typer import Option


def takes(*groups: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes the fields of ``groups`` options of a command, which is called with one instance of each group, and with
    the options of its own, which follow."""

    def flat(command: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(command, eval_str=True).parameters.values())[len(groups) :]
        names = [[each.name for each in fields(group)] for group in groups]

        @wraps(command)
        def called(**values: Any) -> None:
            made = [group(**{name: values.pop(name) for name in own}) for group, own in zip(groups, names, strict=True)]
            command(*made, **values)

        parameters = [parameter for group in groups for parameter in _parameters(group)]
        parameters += [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
        called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return called

    return flat


def _parameters(group: type) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            each.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if each.default is MISSING else each.default,
            annotation=hints[each.name],
        )
        for each in fields(group)
    ]


@dataclass(frozen=True, kw_only=True)
class Source:
    """The model and the facts, and how to compute."""

    model: Annotated[str, Option(help="Model folder or hub id; 'demo' is the embedded demo model.")]
    facts: Annotated[
        str,
        Option(help="File of facts: CounterFact, zsRE or known-facts JSON, or own JSONL; 'demo' is the demo world."),
    ]
    limit: Annotated[int | None, Option(help="Only the first so many facts.", min=1)] = None
    skip_bad_facts: Annotated[bool, Option("--skip-bad-facts", help="List facts that cannot be used and go on.")] = (
        False
    )
    dtype: Annotated[
        str | None, Option(help="Compute in float64, float32, bfloat16 or float16; the model's own by default.")
    ] = None
    device: Annotated[str | None, Option(help="Compute on cpu, cuda, cuda:1, ...; cuda by default where it is.")] = None
    memory: Annotated[
        str | None, Option(help="Bytes that a pass may take, such as 4GiB; half of what is free by default.")
    ] = None


@dataclass(frozen=True, kw_only=True)
class Output:
    """Where results go."""

    out: Annotated[Path, Option(help="Folder for the results.")]
    overwrite: Annotated[bool, Option("--overwrite", help="Replace the run that the folder holds.")] = False
    quiet: Annotated[bool, Option("--quiet", help="No progress and no summary.")] = False


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The noise of the corrupted run: how much, and which."""

    samples: Annotated[int, Option(help="Noise samples to average over.")] = 10
    sigma: Annotated[
        str, Option(help="Noise level: a number, or '3sd' for 3 standard deviations of the subjects' embeddings.")
    ] = "3sd"
    seed: Annotated[int, Option(help="Seed of the noise.")] = 1


_TARGET_HELP = "'label': the fact's own target; 'argmax': the model's most likely token."
_TOKENS_HELP = "all, subject_onward, subject, subject_last, last, or indices such as 0,3,-1."


@dataclass(frozen=True, kw_only=True)
class Tracing:
    """What is restored, in which corrupted run."""

    state: Annotated[
        list[str] | None,
        Option(
            help="What to restore, KIND:WINDOW with kind hidden, mlp, attn, head.N (one head) or heads (each of them); "
            "repeat for several. By default hidden:1, mlp:10 and attn:10; with --sever hidden:1.",
            show_default=False,
        ),
    ] = None
    target: Annotated[str, Option(help=_TARGET_HELP)] = "label"
    tokens: Annotated[str, Option(help=_TOKENS_HELP)] = "all"
    joint: Annotated[bool, Option("--joint", help="Restore the chosen tokens together, not one by one.")] = False
    sever: Annotated[
        str | None,
        Option(help="Hold the token's mlp or attn outputs, or both, at their corrupted values; hidden states only."),
    ] = None
    noise: Annotated[
        str, Option(help="What corrupts the subject: gaussian, uniform, multivariate, t, or counterfactual (a prompt).")
    ] = "gaussian"
    replace_noise: Annotated[
        bool, Option("--replace-noise", help="Put the noise in the embeddings' place; it is added by default.")
    ] = False
    noise_texts: Annotated[
        Path | None, Option(help="Running text, one text a line: multivariate and t noise are like its embeddings.")
    ] = None
    dof: Annotated[float | None, Option(help="Degrees of freedom of t noise, more than 2.")] = None
    extra_tokens: Annotated[int, Option(help="Corrupt so many tokens behind the subject too.")] = 0
    compat: Annotated[
        str | None,
        Option(help="'published': severed runs and replacing noise draw and report as the published code does."),
    ] = None


@dataclass(frozen=True, kw_only=True)
class Zeroing:
    """What is set to zero."""

    state: Annotated[
        list[str] | None,
        Option(
            help="What to set to zero, KIND:WINDOW as for trace; repeat for several. By default mlp:5.",
            show_default=False,
        ),
    ] = None
    target: Annotated[str, Option(help=_TARGET_HELP)] = "label"
    tokens: Annotated[str, Option(help=_TOKENS_HELP + " All chosen ones are zeroed together.")] = "subject"


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """Which gradients are integrated, and along which path."""

    kind: Annotated[
        list[str] | None,
        Option(help="hidden, mlp or attn; repeat for several. By default all three.", show_default=False),
    ] = None
    steps: Annotated[int, Option(help="Points of the quadrature.")] = 50
    baseline: Annotated[
        str, Option(help="Where the path starts: zero, or corrupted (the state in the corrupted run).")
    ] = "zero"
    target: Annotated[str, Option(help=_TARGET_HELP)] = "argmax"
    tokens: Annotated[str, Option(help=_TOKENS_HELP)] = "all"
