"""Models of folders and hub ids: loaded, or read from their files anew in every pass."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch

from causalcone.engine.compute import Compute
from causalcone.engine.encoding import PromptForm
from causalcone.engine.errors import CausalconeError, ModelError, one_of
from causalcone.engine.models import family_of
from causalcone.engine.models.base import Architecture
from causalcone.engine.run.model_files import model_place
from causalcone.engine.run.session import Session

Weights = Literal["resident", "stream"]
"""Where a model's weights are: on the device, or in their files, from which every pass reads them."""


def open_session(path: str, compute: Compute, weights: str = "resident", form: PromptForm | None = None) -> Session:
    """A session on the model of a folder or hub id; its weights are kept in the dtype to compute in, as saved by
    default."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    one_of("weights", weights, get_args(Weights))
    with opening(path) as folder:
        config = AutoConfig.from_pretrained(folder)
        family_of(config.model_type)  # refuses what is not supported before anything is loaded
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model: Any
        architecture: Architecture | None = None
        if weights == "stream":
            from causalcone.engine.streaming.loading import open_streamed

            architecture = open_streamed(folder, config, compute.dtype, compute.device or torch.device("cpu"))
            model = architecture.model
        else:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=compute.dtype or "auto")
    if compute.device is not None and architecture is None:
        model = model.to(compute.device)
    return Session(model, tokenizer, compute, architecture, form)


@contextmanager
def opening(path: str, what: str = "model") -> Iterator[str]:
    """The path as transformers takes it; what goes wrong there is a ``ModelError``."""
    from safetensors import SafetensorError

    place = path
    try:
        place = model_place(path)
        yield place
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        if isinstance(error, CausalconeError):
            raise
        raise ModelError(f"no {what} can be loaded from {place!r}: {error}") from error
