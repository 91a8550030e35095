"""States: which kind of value an experiment is about, over a window of how many layers."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from causalcone.engine.errors import ExperimentError

KINDS = ("hidden", "mlp", "attn")
HEADS = "heads"
"""The kind that stands for each of a model's heads."""


def check_kinds(kinds: Sequence[str]) -> None:
    """Raise ``ExperimentError`` unless these are one or more different kinds of whole rows."""
    if isinstance(kinds, str) or not kinds or len(set(kinds)) < len(kinds) or not set(kinds) <= set(KINDS):
        raise ExperimentError(f"kinds {kinds!r} are not one or more of {', '.join(KINDS)}, each once")


@dataclass(frozen=True)
class State:
    """A kind of value over a window of layers.

    Args:
        kind: ``"hidden"`` (block output), ``"mlp"`` or ``"attn"`` (what the module adds to the residual stream),
            ``"head.N"`` (what attention head N hands to the output projection), or ``"heads"`` (each head in turn).
        window: Number of layers.

    Raises:
        ExperimentError: The kind is unknown, or the window is not a positive number of layers.
    """

    kind: str
    window: int = 1

    def __post_init__(self) -> None:
        if self.kind not in (*KINDS, HEADS) and self.head is None:
            raise ExperimentError(
                f"unknown kind {self.kind!r}; choose from hidden, mlp, attn, head.N (one head) and heads (each of them)"
            )
        if isinstance(self.window, bool) or not isinstance(self.window, int) or self.window < 1:
            raise ExperimentError(f"the window of {self.kind} is {self.window!r}; give a number of layers from 1 up")

    @property
    def head(self) -> int | None:
        """The number of the head, where the state is one."""
        name, _, number = self.kind.partition(".") if isinstance(self.kind, str) else ("", "", "")
        return int(number) if name == "head" and number.isascii() and number.isdigit() else None

    @property
    def site(self) -> str:
        """Where in a layer the value is overwritten: one of ``interventions.SITES``."""
        return self.kind if self.head is None else "head"

    def layers(self, centre: int, depth: int) -> tuple[int, int]:
        """The half-open range of layers of the window centred on a layer, clipped to the model."""
        return max(0, centre - self.window // 2), min(depth, centre - (-self.window // 2))

    def __str__(self) -> str:
        return f"{self.kind}:{self.window}"


States = Iterable[State | str | tuple[str, int]]


def as_states(states: States) -> tuple[State, ...]:
    """States from ``State``, ``("mlp", 10)`` or ``"mlp:10"``. An error names the one that makes no sense."""
    if isinstance(states, str):
        states = [states]
    parsed = [_state(state) for state in states]
    if not parsed:
        raise ExperimentError("no states are given; give at least one, such as ('hidden', 1)")
    return _different(parsed)


def states_in(states: Iterable[State], heads: int) -> tuple[State, ...]:
    """The states in a model of so many heads, each of which the kind ``heads`` stands for."""
    expanded = [
        each
        for state in states
        for each in ([State(f"head.{n}", state.window) for n in range(heads)] if state.kind == HEADS else [state])
    ]
    for state in expanded:
        if state.head is not None and state.head >= heads:
            raise ExperimentError(f"the state {state} names a head that is not there; the model has {heads} heads")
    return _different(expanded)


def _different(states: Sequence[State]) -> tuple[State, ...]:
    if len(set(states)) < len(states):
        twice = next(state for state in states if states.count(state) > 1)
        raise ExperimentError(f"the state {twice} is given twice; give each once")
    return tuple(states)


def _state(state: State | str | tuple[str, int]) -> State:
    if isinstance(state, State):
        return state
    if isinstance(state, str):
        kind, _, size = state.partition(":")
        if not size.isascii() or not size.lstrip("-").isdigit():
            raise ExperimentError(f"the state {state!r} is not KIND:WINDOW, such as mlp:10")
        return State(kind, int(size))
    try:
        kind, window = state
    except (TypeError, ValueError):
        raise ExperimentError(f"the state {state!r} is not a pair of kind and window, such as ('mlp', 10)") from None
    return State(kind, window)
