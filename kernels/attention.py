"""Attention of short dense segments: ``m`` queries of a run over its ``K`` keys, for many runs at once."""

import torch
import torch.nn.functional as F
from torch import Tensor

from causalcone.kernels.log_sums import capped


def attend(
    queries: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scale: float, softcap: float | None = None
) -> Tensor:
    """Softmax attention, accumulated in float32 or better; ``softcap`` bounds the scores.

    queries (B, m, H, d); keys, values (B, K, G, d), each of whose G heads serves H / G query heads; visible (m, K), or
    (B, m, K) where runs differ, bool, true where a query sees a key. Returns (B, m, H, d) in the queries' dtype.
    """
    if softcap is not None:
        return _attend_capped(queries, keys, values, visible, scale, softcap)
    B, m, H, d = queries.shape
    G = keys.shape[2]
    R = H // G  # the query heads of a key head are queries more, which reads its keys and values once
    query = queries.view(B, m, G, R, d).transpose(1, 2).flatten(2, 3) if R > 1 else queries.transpose(1, 2)
    seen = visible.repeat_interleave(R, dim=-2) if R > 1 else visible
    mask = seen if seen.ndim == 2 else seen[:, None]
    key, value = keys.transpose(1, 2), values.transpose(1, 2)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    return out.unflatten(2, (m, R)).transpose(1, 2).reshape(B, m, H, d) if R > 1 else out.transpose(1, 2)


def _attend_capped(
    queries: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scale: float, softcap: float
) -> Tensor:
    """With capped scores, which torch's own attention has not; on CPUs by key head, two to three times as fast as over
    all heads, whose operands it would have to copy. In float32 at least: narrower products are no faster at this size,
    and oneDNN would compile and keep one for every shape."""
    if queries.device.type != "cpu" or (torch.is_grad_enabled() and (queries.requires_grad or keys.requires_grad)):
        return _attend_functional(queries, keys, values, visible, scale, softcap)
    dtype, wide = queries.dtype, torch.promote_types(queries.dtype, torch.float32)
    B, m, H, d = queries.shape
    groups = keys.shape[2]
    queries, keys, values = queries.to(wide), keys.to(wide), values.to(wide)
    hidden = torch.zeros(visible.shape, dtype=wide).masked_fill_(~visible, float("-inf"))
    out = torch.empty_like(queries)
    by_key_head = (tensor.chunk(groups, 2) for tensor in (queries, out))  # one's query heads are queries more
    for group, (query, group_out) in enumerate(zip(*by_key_head, strict=True)):
        scores = torch.bmm(query.reshape(B, -1, d), keys[:, :, group].transpose(1, 2)).mul_(scale)
        weights = capped(scores, softcap).view(B, m, H // groups, -1).add_(hidden.unsqueeze(-2)).softmax(-1)
        group_out.copy_(torch.bmm(weights.view(B, -1, weights.shape[-1]), values[:, :, group]).view(group_out.shape))
    return out.to(dtype)


def _attend_functional(
    queries: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scale: float, softcap: float
) -> Tensor:
    """With capped scores, in plain operations that change nothing in place: for gradients, and on CUDA."""
    dtype, wide = queries.dtype, torch.promote_types(queries.dtype, torch.float32)
    query = queries.to(wide).unflatten(2, (keys.shape[2], -1))
    scores = torch.einsum("bmghd,bkgd->bghmk", query, keys.to(wide)) * scale
    scores = softcap * torch.tanh(scores / softcap)
    seen = visible if visible.ndim == 2 else visible[:, None, None]
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("bghmk,bkgd->bmghd", weights, values.to(wide)).flatten(2, 3).to(dtype)
