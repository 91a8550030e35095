"""The editing methods there are: those of the package, those of installed packages, and those registered here.

Another package names its ``Method`` as an entry point of the group ``causalcone.editing_methods``.
"""

import logging
from dataclasses import replace
from functools import cache
from importlib.metadata import entry_points

from causalcone.engine.edit.methods.closed_forms.alphaedit import ALPHAEDIT
from causalcone.engine.edit.methods.closed_forms.emmet import EMMET
from causalcone.engine.edit.methods.closed_forms.encore import ENCORE
from causalcone.engine.edit.methods.closed_forms.memit import MEMIT, MEMIT_JOINT, MEMIT_SEQUENCE
from causalcone.engine.edit.methods.closed_forms.memit_merge import MEMIT_MERGE
from causalcone.engine.edit.methods.closed_forms.rome import ROME
from causalcone.engine.edit.methods.fine_tuning.finetune import FINETUNE, FT_M
from causalcone.engine.edit.methods.fine_tuning.finetune_joint import LOCFT
from causalcone.engine.edit.methods.method import Method
from causalcone.engine.edit.methods.ultraedit import ULTRAEDIT
from causalcone.engine.errors import ExperimentError

GROUP = "causalcone.editing_methods"

_METHODS: dict[str, Method] = {}


def register(method: Method) -> Method:
    """Make a method known by its name, to everything that edits in this process."""
    if not isinstance(method, Method):
        raise ExperimentError(f"{method!r} is not a Method")
    if _METHODS.setdefault(method.name, method) is not method:
        raise ExperimentError(f"there is an editing method {method.name!r} already; choose another name")
    return method


for _method in (
    *(ROME, MEMIT, MEMIT_JOINT, FINETUNE, FT_M, LOCFT),
    *(MEMIT_SEQUENCE, MEMIT_MERGE, EMMET, ALPHAEDIT, ENCORE, ULTRAEDIT),
):
    register(_method)


def unregister(name: str) -> None:
    _METHODS.pop(name, None)


def methods() -> dict[str, Method]:
    _failures()
    return dict(_METHODS)


def method_named(name: str) -> Method:
    """The method of this name, or that it is an alias of; refuses another, naming what there is, or why it could not be
    loaded."""
    if name in _METHODS or name in methods():
        return _METHODS[name]
    named = {alias: (method, fixed) for method in _METHODS.values() for alias, fixed in method.aliases.items()}
    if name in named:
        method, fixed = named[name]
        return replace(method, name=name, aliases={}, fixed=fixed)
    failed = _failures().get(name)
    reason = "" if failed is None else f"; {failed}"
    raise ExperimentError(f"unknown method {name!r}; choose from {', '.join([*_METHODS, *named])}{reason}")


@cache
def _failures() -> dict[str, str]:
    """Register the methods of installed packages, once; by name, why some could not be."""
    failed: dict[str, str] = {}
    for point in entry_points(group=GROUP):
        try:
            register(point.load())
        except Exception as error:  # whatever is wrong with another package, the other methods can be used
            failed[point.name] = f"{point.name} cannot be loaded from {point.value}: {error}"
            logging.getLogger(__name__).warning("the editing method %s", failed[point.name])
    return failed
