"""Documents laid end to end: where they begin, known to the host and to the device.

Made once per batch, without waiting for the device: a blocking copy in every layer would stop the
host from queueing work ahead, and a CUDA graph from being captured.
"""

from itertools import pairwise
from typing import NamedTuple

import torch


class CuSeqlens(NamedTuple):
    """The borders of D documents, checked: they rise from 0 to total."""

    host: torch.Tensor  # [D + 1] int64 on the CPU
    device: torch.Tensor  # [D + 1] int32 where the tokens are, for the kernels
    total: int  # tokens


def to_device(x, device):
    """x, a tensor on the CPU, on the device; a GPU copies it while the host goes on."""
    if torch.device(device).type != "cuda":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def borders_of(cu_seqlens):
    """cu_seqlens [D + 1], a tensor or a list -> a list of integers. ValueError for floats."""
    if isinstance(cu_seqlens, torch.Tensor):
        if cu_seqlens.is_floating_point() and cu_seqlens.numel():  # an empty one is, too
            raise ValueError(f"cu_seqlens wants integers; got {cu_seqlens.dtype}")
        return (cu_seqlens if cu_seqlens.dim() == 1 else cu_seqlens.flatten()).tolist()
    if any(isinstance(border, float) for border in cu_seqlens):
        raise ValueError("cu_seqlens wants integers; got floats")
    return [int(border) for border in cu_seqlens]


def cu_seqlens_of(cu_seqlens, B, T, device):
    """cu_seqlens [D + 1] of a row of T tokens, or CuSeqlens -> CuSeqlens; None -> None.

    ValueError, in one line, if they are not of B = 1 row of T tokens.
    """
    if cu_seqlens is None:
        return None
    if isinstance(cu_seqlens, CuSeqlens):
        if B != 1 or cu_seqlens.total != T:
            raise ValueError(f"cu_seqlens is of 1 row of {cu_seqlens.total} tokens; got {B} of {T}")
        return cu_seqlens
    ends = borders_of(cu_seqlens)
    is_rising = len(ends) > 1 and ends == sorted(ends) and (ends[0], ends[-1]) == (0, T)
    if B != 1 or not is_rising:
        raise ValueError(
            f"cu_seqlens wants B = 1 and numbers rising from 0 to T = {T}; got B = {B}, {ends[:8]}…"
        )
    on_device = to_device(torch.tensor(ends, dtype=torch.int32), device)
    return CuSeqlens(torch.tensor(ends), on_device, T)


def filled_documents(borders, device):
    """A list of D + 1 borders -> of the documents with at least one token: their numbers, their
    first and their last tokens, each int64 on the device."""
    filled = [d for d, (first, end) in enumerate(pairwise(borders)) if end > first]
    first, last = [borders[d] for d in filled], [borders[d + 1] - 1 for d in filled]
    return [to_device(torch.tensor(x), device) for x in (filled, first, last)]
