"""Running text that a model writes itself, for second moments where no other text is at hand."""

import json
from collections.abc import Iterator
from itertools import count

from causalcone.engine.atomic import write_text
from causalcone.engine.cache import cache_folder
from causalcone.engine.edit.moments.identity import model_fingerprint
from causalcone.engine.edit.runs.decoding import continuations, text_seed
from causalcone.engine.edit.runs.packed_runs import Text
from causalcone.engine.edit.texts.contexts import continued, start_token
from causalcone.engine.errors import ExperimentError
from causalcone.engine.run.session import Session

SOURCE = "text sampled from the model"
TOP_K = 50
TOKENS, TOGETHER = 128, 64
"""Of a text; texts that are written at a time."""


def sampled_texts(session: Session, purpose: str = "running text") -> Iterator[str]:
    """Texts without end, others for each purpose, which are kept in the cache folder for a model and dtype: each begins
    from the token that begins texts (BOS, else EOS) and goes on for ``TOKENS`` tokens, drawn from the ``TOP_K``
    likeliest. They are without special tokens. A change of the last down-projection alone does not make another model
    here.

    Raises ``ExperimentError`` where the model writes nothing."""
    dtype = str(session.dtype).removeprefix("torch.")
    named = "sampled-text" if purpose == "running text" else f"sampled-{purpose.replace(' ', '-')}"
    folder = cache_folder() / f"{named}-{model_fingerprint(session.architecture)}-{dtype}"
    for first in count(step=TOGETHER):
        file = folder / f"{first}.json"
        if not file.exists():
            folder.mkdir(parents=True, exist_ok=True)
            write_text(file, json.dumps(_written(session, range(first, first + TOGETHER), purpose)))
        texts = json.loads(file.read_text(encoding="utf-8"))
        if not any(text.strip() for text in texts):
            raise ExperimentError("the model writes nothing but white space and special tokens; give texts of your own")
        yield from texts


def _written(session: Session, numbers: range, purpose: str) -> list[str]:
    start = (start_token(session),)
    length = min(TOKENS, session.sizes.positions)
    seeds = [text_seed(0, purpose, number) for number in numbers]
    new = continuations(session, [Text(start)] * len(numbers), [length] * len(numbers), top_k=TOP_K, seeds=seeds)
    return [continued(session, start, tokens) for tokens in new]
