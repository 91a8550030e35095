"""Checks, before results are trusted, that the engine computes what the model's own forward computes."""

import numpy as np
import torch

from causalcone.engine.errors import ModelError
from causalcone.engine.models.base import Architecture
from causalcone.engine.plan.buffers import Buffers
from causalcone.engine.plan.compiler import compile_plan
from causalcone.engine.plan.cone import Shape
from causalcone.engine.plan.interventions import CLEAN, Base, Experiment, Overwrites
from causalcone.engine.run.forward import run_pass
from causalcone.engine.run.packing import Group
from causalcone.kernels.backends import TORCH, Backends
from causalcone.kernels.tiles import Tiles


def verify_model(architecture: Architecture, tokens: tuple[int, ...], tiles: Tiles, backends: Backends = TORCH) -> None:
    """Raise ``ModelError`` if the model's weights are not finite, or if the engine's log-probabilities of a prompt's
    own tokens differ from those of ``model.forward``.

    Both run in the model's own dtype and on its device; the tolerance allows for rounding in that dtype.
    """
    ids = torch.tensor(tokens if len(tokens) > 1 else tokens * 2)
    weight = architecture.unembedding()[0]
    logits = architecture.forward(ids[None].to(weight.device))[0].double().cpu()
    shape = Shape(len(ids), (0, 0), (tuple(range(len(ids))),))
    clean_only = Experiment((Base(),), np.empty(0, dtype=np.int64), Overwrites.none())
    plan = compile_plan(shape, clean_only, architecture.sizes.depth, architecture.parallel)
    targets, no_noise = ids.roll(-1), np.zeros((1, 1, 0, architecture.sizes.hidden))
    group = Group(plan=plan, tokens=ids[None, None].numpy(), targets=targets[None].numpy(), noise=no_noise)
    space = Buffers(weight.dtype, weight.device)
    (ours,) = run_pass(architecture, [group], tiles, space, backends).by_group([group])
    theirs = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    difference = (ours.log_p[0, 0, CLEAN].cpu() - theirs).abs().max().item()
    rounding = 0.02 if weight.dtype.itemsize < 4 else 1e-5  # models take norms and softmax in float32
    allowed = rounding * max(1.0, logits.abs().max().item())
    if not difference <= allowed:
        raise ModelError(
            f"this model's forward gives log-probabilities that differ by {difference:.2g} from those computed from "
            "its parameters: it does something unknown here (a changed forward, an unusual option), so it is refused"
        )
