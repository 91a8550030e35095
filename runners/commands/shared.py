"""Shared by commands: options in groups, the folder of ``--out``, and what is shown at the end."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from functools import wraps
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, get_type_hints

from rich.console import Console

from causalcone.engine.errors import ExperimentError
from causalcone.runners.options import PromptOutputOptions, SinglePromptOptions

if TYPE_CHECKING:
    from causalcone.runners.results.folder import ResultFolder


def takes(*groups: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes the fields of ``groups`` options of a command, which is called with an instance of each group and, after
    these, with the options that it has itself."""

    def flat(command: Callable[..., None]) -> Callable[..., None]:
        others = list(inspect.signature(command, eval_str=True).parameters.values())[len(groups) :]

        @wraps(command)
        def called(**values: Any) -> None:
            instances = [group(**{field.name: values.pop(field.name) for field in fields(group)}) for group in groups]
            command(*instances, **values)

        parameters = [parameter for group in groups for parameter in _parameters(group)]
        parameters += [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in others]
        called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return called

    return flat


def _parameters(group: type) -> Iterator[inspect.Parameter]:
    hints = get_type_hints(group)
    for field in fields(group):
        default, annotation = field.metadata["option"], hints[field.name]
        yield inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def check_place(prompt: SinglePromptOptions, output: PromptOutputOptions) -> None:
    """Refuse results of a file of facts that have no place."""
    if prompt.prompt is None and output.out is None:
        raise ExperimentError(
            "--out is missing: give a folder for the results; only those of a single --prompt are shown without one"
        )


@contextmanager
def place_of(output: PromptOutputOptions) -> Iterator[Path]:
    """The folder of ``--out``; without one a folder that is gone once its results are shown."""
    with TemporaryDirectory(prefix="causalcone-") if output.out is None else nullcontext(output.out) as place:
        yield Path(place)


@contextmanager
def open_results(
    output: PromptOutputOptions, place: Path, configuration: Mapping[str, Any], table: str
) -> Iterator[ResultFolder]:
    """A place of results, ready for a run; says where the rows are that a run left which ended early."""
    from causalcone.runners.results.folder import ResultFolder

    with ResultFolder(place, configuration, output.overwrite) as folder:
        try:
            yield folder
        except BaseException:
            if output.out is not None:
                print_line(f"stopped; what was finished by now is in {place / table}")
            raise


def show(tables: Iterable[Any], sentence: str, figures: Iterable[Path]) -> None:
    """Print the tables of a finished run, what it did, and where its figures are."""
    for shown in (*tables, sentence, *(f"figure {path}" for path in figures)):
        print_line(shown)


def print_line(shown: Any) -> None:
    """Print a text or a table without emphasis of numbers and paths."""
    Console().print(shown, highlight=False)
