"""The log of a sweep: dated lines in a file beside its results."""

from __future__ import annotations

import time
from contextlib import suppress

from causalcone.runners.results.store import Store

LOG = "sweep.log"


class Log:
    """Appends lines to the log. Where files cannot be appended to, it is written anew with every line that counts."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.lines: list[str] = []
        if store.local is None and store.exists(LOG):
            with store.as_file(LOG) as file:
                self.lines = file.read_text(encoding="utf-8").splitlines()

    def __call__(self, text: str) -> None:
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        lines = [f"{stamp} {line}" for line in text.splitlines()]
        with suppress(OSError, ValueError):  # a log that cannot be written is no reason to stop
            if self.store.local is not None:
                with open(self.store.local / LOG, "a", encoding="utf-8") as file:
                    file.writelines(f"{line}\n" for line in lines)
            else:
                self.lines += lines
                self.store.write_bytes(LOG, "".join(f"{line}\n" for line in self.lines).encode())
