# SPDX-License-Identifier: Apache-2.0
"""The operators of `torch.ops.lissom`, typed and documented."""

from lissom.ops.pruning import pruning_permute
from lissom.ops.solver import (
    solver_admm_mask,
    solver_admm_step_,
    solver_masked_solve,
    solver_pcg_step_,
    solver_sparsegpt_block_,
)
from lissom.ops.sparse24 import (
    sparse24_check,
    sparse24_check_meta,
    sparse24_compress,
    sparse24_decompress,
    sparse24_grad_input,
    sparse24_linear,
    sparse24_linear_values,
    sparse24_mask_mm,
    sparse24_pack,
    sparse24_target,
    sparse24_unpack,
    sparse24_validate_meta,
)
from lissom.ops.sparse24_cutlass import (
    sparse24_from_cutlass,
    sparse24_from_torch,
    sparse24_to_cutlass,
    sparse24_to_torch,
)
from lissom.ops.sparse24_int8 import quantize_rows, sparse24_linear_int8

__all__ = [
    "pruning_permute",
    "quantize_rows",
    "solver_admm_mask",
    "solver_admm_step_",
    "solver_masked_solve",
    "solver_pcg_step_",
    "solver_sparsegpt_block_",
    "sparse24_check",
    "sparse24_check_meta",
    "sparse24_compress",
    "sparse24_decompress",
    "sparse24_from_cutlass",
    "sparse24_from_torch",
    "sparse24_grad_input",
    "sparse24_linear",
    "sparse24_linear_int8",
    "sparse24_linear_values",
    "sparse24_mask_mm",
    "sparse24_pack",
    "sparse24_target",
    "sparse24_to_cutlass",
    "sparse24_to_torch",
    "sparse24_unpack",
    "sparse24_validate_meta",
]
