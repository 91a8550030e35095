"""What a tile of logits adds to log-sum-exps over the vocabulary, and the targets' logits in it."""

import torch
from torch import Tensor


def add_tile(
    logits: Tensor, start: int, softcap: float | None, targets: Tensor, total: Tensor, target_logits: Tensor
) -> None:
    """Take up the logits (r, v) of the tokens from ``start`` on, whose values are lost.

    targets (r,), or (r, k) several of each row: token ids. In float64, changed in place: total (r,), the log-sum-exps
    so far, -inf at first, and target_logits, in the targets' shape. Inside the tile everything is float32 or better.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    logits = capped(logits.to(wide), softcap)
    column = targets - start
    inside = (column >= 0) & (column < logits.shape[1])
    of_targets = logits.gather(1, column.clamp(0, logits.shape[1] - 1).view(len(logits), -1)).view(column.shape)
    target_logits.copy_(torch.where(inside, of_targets.double(), target_logits))
    top = logits.amax(-1, keepdim=True)
    sums = logits.sub_(top).exp_().sum(-1)
    total.copy_(torch.logaddexp(total, top[:, 0].double() + sums.double().log()))


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """Logits or scores bounded by ``softcap * tanh(logit / softcap)``, in place."""
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)
