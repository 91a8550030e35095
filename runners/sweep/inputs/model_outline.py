"""The shape of a sweep's model, and its tokenizer: what there is of them without reading weights."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from causalcone.engine.errors import CausalconeError, ExperimentError, ModelError
from causalcone.engine.models import outline
from causalcone.engine.models.base import Architecture
from causalcone.engine.run.model_files import check_hub, model_place
from causalcone.runners.names import path_of
from causalcone.runners.sweep.inputs.settings import Sweep

_EXAMPLE = "--set 'shape={model_type=\"gpt2\", n_layer=48, n_embd=1600, n_head=25, vocab_size=50257}'"


def model_outline(sweep: Sweep) -> Architecture:
    """The sweep's model without weights: by the config of its folder, else by the sweep's ``shape``, else by the
    config on the hub. Raises ``ExperimentError`` naming ``shape`` where none of them can be had or used."""
    named, config = _config(sweep)
    try:
        return outline(config)
    except CausalconeError as error:
        raise ExperimentError(f"{named}: {error}") from error
    except (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError, RuntimeError) as error:
        raise ExperimentError(f"{named}: no model can be made of it: {error}") from error


def known_tokenizer(sweep: Sweep) -> Any:
    """The tokenizer of the model's folder, or of the hub where this machine keeps a copy; None where there is none."""
    from transformers import AutoTokenizer

    try:  # the hub itself is not asked: without a network that takes a minute
        tokenizer = AutoTokenizer.from_pretrained(_place(sweep), local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError, ModelError):
        return None
    return tokenizer if tokenizer.is_fast else None


def _config(sweep: Sweep) -> tuple[str, Any]:
    """Where the model's config is from, and the config."""
    if sweep.shape is not None and not _is_folder(sweep):
        return "shape", _shaped(sweep.shape)
    try:
        return f"the model {sweep.model}", _saved(_place(sweep))
    except (OSError, ValueError, KeyError, ModelError) as error:
        raise ExperimentError(
            f"the config of the model {sweep.model!r} cannot be had: {error}. To plan without it, give its shape, such "
            f"as {_EXAMPLE}"
        ) from error


def _saved(model: str) -> Any:
    """The config of a model: of its folder, of this machine's copy, or of the hub's."""
    from transformers import AutoConfig

    with suppress(OSError, ValueError):
        return AutoConfig.from_pretrained(model, local_files_only=True)
    if not Path(model).is_dir():
        check_hub()
    return AutoConfig.from_pretrained(model)


def _is_folder(sweep: Sweep) -> bool:
    try:
        return Path(_place(sweep)).is_dir()
    except ModelError:
        return False


def _place(sweep: Sweep) -> str:
    return model_place(path_of(sweep.model, "outline"))


def _shaped(shape: dict[str, Any]) -> Any:
    """The config that a ``shape`` describes; what it leaves out is as transformers has it by default."""
    from transformers import AutoConfig

    rest = dict(shape)
    kind = rest.pop("model_type", None)
    if not isinstance(kind, str):
        raise ExperimentError(f"shape: model_type is {kind!r}; give one such as gpt2, as in {_EXAMPLE}")
    try:
        usual = AutoConfig.for_model(kind)
        unknown = [key for key in rest if not hasattr(usual, key)]
        if unknown:
            raise ExperimentError(
                f"shape: a config of {kind} has no {', '.join(unknown)}; give what its config.json has"
            )
        return AutoConfig.for_model(kind, **rest)
    except (ValueError, TypeError, KeyError) as error:
        raise ExperimentError(f"shape: {error}") from error
