"""The errors a user can cause. Each message names the item at fault and the fix."""

from collections.abc import Collection


class CausalconeError(ValueError):
    """Base of all errors raised for bad input; the command line prints its message and exits with code 2."""


class FactError(CausalconeError):
    """A fact or fact file that cannot be used."""


class ModelError(CausalconeError):
    """A model that cannot be read or computed exactly."""


class ExperimentError(CausalconeError):
    """An argument of an experiment (states, samples, sigma, tokens, ...) that makes no sense."""


class MemoryBudgetError(CausalconeError):
    """A memory budget too small for even the smallest part of a fact."""


def one_of(name: str, value: object, known: Collection[object], error: type[CausalconeError] = ExperimentError) -> None:
    """Refuse an option's value that is none of those that are known; None, where it may be left out, is not named."""
    if value not in known:
        raise error(f"{name} is {value!r}; choose from {', '.join(str(each) for each in known if each is not None)}")
