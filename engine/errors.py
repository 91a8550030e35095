"""The errors a user can cause. Each message names the item at fault and the fix."""


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
