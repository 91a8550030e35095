"""The command line: one word per capability, the same words as the API."""

import logging
import signal
import sys
import warnings
from typing import Any

import typer

from causalcone.engine.errors import CausalconeError
from causalcone.runners.commands import analyze, data, demo, edit, export, localize, moments, sweep, tune

app = typer.Typer(
    name="causalcone",
    help="Where language models keep facts, and what editing them there does: causal tracing, zeroing, integrated "
    "gradients and model editing, computed only where an intervention reaches.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for module in (sweep, tune, analyze, data, localize, moments, edit, export, demo):
    for command, examples in module.COMMANDS.items():
        listed = "\n[bold]Examples[/bold]" + (examples or "").replace("\ncausalcone", "\n\ncausalcone")
        app.command(epilog=listed if examples else None)(command)


def main() -> None:
    """Run the command line; bad input ends with a message and exit code 2, an interruption with 130."""
    _shown.clear()
    warnings.simplefilter("always", UserWarning)
    warnings.showwarning = _show_warning  # type: ignore[assignment]
    logging.getLogger("causalcone").addHandler(_LOG_LINES)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # with what was finished written
    try:
        app(standalone_mode=True)
    except CausalconeError as error:
        print(f"causalcone: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


_shown: set[str] = set()


def _show_once(message: str) -> None:
    if message not in _shown:
        _shown.add(message)
        print(f"causalcone: {message}", file=sys.stderr)


def _show_warning(message: Warning | str, category: type[Warning], *_: Any) -> None:
    """Show a warning meant for users."""
    if issubclass(category, UserWarning):
        _show_once(str(message))


class _LogLines(logging.Handler):
    """Shows log records as warnings are shown."""

    def emit(self, record: logging.LogRecord) -> None:
        _show_once(record.getMessage())


_LOG_LINES = _LogLines()
