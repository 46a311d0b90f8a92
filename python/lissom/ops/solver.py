# SPDX-License-Identifier: Apache-2.0
"""Inner loops of the pruning solvers on weights [R, C]: what lies between their matrix products, in one pass each.

Names that end in an underscore write into their arguments. Results do not depend on the number of threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lissom import _C  # noqa: F401  (defines torch.ops.lissom)
from lissom.reference import solver as twin

_ops = torch.ops.lissom


def solver_admm_step_(
    x: Tensor,
    u: Tensor,
    b: Tensor | None,
    rhs: Tensor,
    rho: float,
    rho_next: float,
    kept: int,
    group: int,
    forced: Tensor | None = None,
) -> Tensor:
    """One step of ADMM for min f(w) with w sparse: mask, scaled dual and the next right-hand side from a new x.

    With z = x + u, the `kept` entries of largest |z| stay in each group of `group` neighbours; among equals the first
    ones go. Then

        u   = pruned ? z rho / rho_next : 0         the scaled dual, in units of the next penalty
        rhs = b + (pruned ? -rho : rho_next) z      b + rho_next (D - u) with D = z on what is kept

    so that u and rhs are the whole state. A pruned z of 0 leaves u = -0: u alone tells the mask, see
    `solver_admm_mask`. A share of each row is `group=C`, a share of a whole layer the same on `x.view(1, -1)`. A mask
    that was chosen elsewhere is `forced` with kept = group = 1.

    Args:
        x: [..., C] float32 or float64, contiguous, free of NaN.
        u: like x, read and written. Zeros (nothing pruned) at the start.
        b: like x, or None for zero: with rho = rho_next = 1 then, rhs is z on what is kept.
        rhs: like x, written; may be x itself, which saves memory traffic.
        rho, rho_next: penalty of the step that gave x, and of the next one; positive.
        kept, group: the pattern kept:group along the last dimension.
        forced: bool like x: entries that go before all others, and all of them even where they are too many.

    Returns:
        int64 []: how many entries went from kept to pruned or back.

    Raises:
        ValueError: shapes, strides, a penalty or a pattern that does not fit. TypeError: dtypes.

    Source: Meng et al., arXiv 2406.07831 (ALPS), section 3.1.

    >>> x, u, rhs = torch.tensor([[4.0, -1.0, 2.0, 3.0]]), torch.zeros(1, 4), torch.empty(1, 4)
    >>> solver_admm_step_(x, u, None, rhs, 1.0, 2.0, 2, 4).item()
    2
    >>> u.tolist(), rhs.tolist()
    ([[0.0, -0.5, 1.0, 0.0]], [[8.0, 1.0, -2.0, 6.0]])
    """
    return _ops.solver_admm_step_(x, u, b, rhs, rho, rho_next, kept, group, forced)


def solver_admm_mask(u: Tensor) -> Tensor:
    """What `solver_admm_step_` pruned, bool like the scaled dual u: all but +0.

    >>> solver_admm_mask(torch.tensor([0.0, -0.0, 0.5])).tolist()
    [False, True, True]
    """
    return twin.admm_mask(u)


# --- shapes without data


@torch.library.register_fake("lissom::solver_admm_step_")
def _(
    x: Tensor,
    u: Tensor,
    b: Tensor | None,
    rhs: Tensor,
    rho: float,
    rho_next: float,
    kept: int,
    group: int,
    forced: Tensor | None = None,
) -> Tensor:
    twin.check_admm_step(x, u, b, rhs, rho, rho_next, kept, group, forced)
    return x.new_empty((), dtype=torch.int64)


# --- any other device: the twins

_library = torch.library.Library("lissom", "FRAGMENT")
for _name in ("admm_step_",):
    _library.impl(f"solver_{_name}", getattr(twin, _name), "CompositeExplicitAutograd")
