"""One rounding, from the dtype that numbers were computed in to the one that they are stored in."""

from __future__ import annotations

import torch
from torch import Tensor


def round_into(target: Tensor, wide: Tensor) -> None:
    """Copy ``wide`` into ``target`` of the same shape, to the nearest number, ties to even.

    torch rounds float64 to the 16-bit dtypes (and float8) through float32, which is twice: about one number in
    10⁵ then ends on the wrong side. Here the way through float32 is rounded to odd, which leaves
    the last rounding all it needs (Boldo and Melquiond, IEEE Trans. Comput. 57, 2008).
    """
    if wide.dtype == torch.float64 and target.dtype.itemsize < 4:
        wide = _odd_float32(wide)
    target.copy_(wide)


def rounded(wide: Tensor, dtype: torch.dtype) -> Tensor:
    """``wide`` in ``dtype``, rounded once; ``wide`` itself where that is its dtype."""
    if wide.dtype == dtype:
        return wide
    target = torch.empty_like(wide, dtype=dtype)
    round_into(target, wide)
    return target


def _odd_float32(wide: Tensor) -> Tensor:
    """float32 cut towards zero, its last bit set wherever something was cut off."""
    near = wide.to(torch.float32)
    back = near.double()
    bits = near.view(torch.int32)
    bits -= (back.abs() > wide.abs()).int()
    bits |= (back != wide).int() & wide.isfinite().int()
    return near
