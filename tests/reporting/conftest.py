# SPDX-License-Identifier: Apache-2.0
"""A report such as a run writes it, made up from a fixed seed."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest

KINDS = {
    "self_attn.q_proj": 0.10,
    "self_attn.k_proj": 0.08,
    "self_attn.v_proj": 0.20,
    "self_attn.o_proj": 0.16,
    "mlp.gate_proj": 0.14,
    "mlp.up_proj": 0.15,
    "mlp.down_proj": 0.18,
}


def _layers() -> list[dict[str, Any]]:
    rng = random.Random(0)
    return [
        {
            "name": f"model.layers.{block}.{kind}",
            "shape": [576, 576],
            "pattern": "2:4",
            "sparsity": 0.5,
            "relative_error": level * (0.6 + 0.5 * block / 29) * rng.uniform(0.8, 1.25),
            "seconds": rng.uniform(0.05, 0.4),
        }
        for block in range(30)
        for kind, level in KINDS.items()
    ]


def _variant(
    name: str, label: str, prefill: float, decode: float, linears: int, shares: list[float]
) -> dict[str, Any]:
    return {
        "name": name,
        "label": label,
        "prefill_seconds": 512 / prefill,
        "prefill_tokens_per_s": prefill,
        "decode_seconds": 1 / decode,
        "decode_tokens_per_s": decode,
        "memory": None,
        "weight_bytes": {"linears": linears, "lm_head": 56_600_000, "other": 100_000},
        "decode_shares": dict(zip(("linears", "lm_head", "attention", "other"), shares, strict=True)),
        "samples": {"prefill_seconds": [], "decode_seconds": []},
    }


def _kernel_rows() -> list[dict[str, Any]]:
    rows = []
    for m, ours, dense in (
        (1, 1300, 2600),
        (4, 1350, 2700),
        (16, 4600, 8600),
        (64, 9900, 26000),
        (256, 34000, 104000),
    ):
        rows.append(
            {
                "dtype": "bfloat16",
                "M": m,
                "N": 4096,
                "K": 4096,
                "threads": 1,
                "ours_us": float(ours),
                "peers": {"oneDNN prepacked": float(dense), "F.linear": dense * 1.2},
                "ratio_best": dense / ours,
                "gflops": 2e-3 * m * 4096**2 / ours,
                "gbps": 4096**2 * 1.125e-3 / ours,
                "roofline_share": 0.9,
            }
        )
    return rows


_REPORT: dict[str, Any] = {
    "report_version": 1,
    "lissom_version": "0.1.0",
    "created": "2026-11-22T05:30:00Z",
    "seconds": 171.0,
    "model": {
        "source": "models/smollm2-135m-instruct",
        "family": "llama",
        "dtype": "bfloat16",
        "parameters": 134_515_008,
    },
    "recipe": {
        "model": "models/smollm2-135m-instruct",
        "steps": [{"prune": {"pattern": "2:4", "method": "sparsegpt"}}],
        "output": {"dir": "out", "format": "packed"},
    },
    "output": {"dir": "out", "format": "packed"},
    "prunes": [
        {
            "pattern": "2:4",
            "method": "sparsegpt",
            "layers": _layers(),
            "touched_parameters": 106_168_320,
            "total_parameters": 134_515_008,
        }
    ],
    "size": {
        "source_bytes": 269_000_000,
        "output_bytes": 176_000_000,
        "linears_source_bytes": 212_336_640,
        "linears_output_bytes": 119_439_360,
    },
    "quality": {
        "text": "prose.valid.txt",
        "protocol": "8 windows of 1024 tokens",
        "before": {"perplexity": 21.70, "nats_per_token": 3.077, "bits_per_byte": 1.033, "tokens": 8184},
        "after": {"perplexity": 52.4, "nats_per_token": 3.96, "bits_per_byte": 1.329, "tokens": 8184},
    },
    "speed": {
        "model": "smollm2",
        "dtype": "bfloat16",
        "threads": 2,
        "prompt_tokens": 512,
        "new_tokens": 16,
        "rounds": 5,
        "variants": [
            _variant(
                "dense", "dense, transformers as it comes", 410, 21.5, 212_336_640, [0.62, 0.18, 0.08, 0.12]
            ),
            _variant("onednn", "dense, oneDNN prepacked", 520, 34.0, 212_336_640, [0.46, 0.16, 0.13, 0.25]),
            _variant("packed", "2:4 packed, lissom", 900, 47.0, 119_439_360, [0.28, 0.22, 0.16, 0.34]),
        ],
        "ratios": {
            "decode": {"over_dense": 2.19, "over_onednn": 1.38},
            "prefill": {"over_dense": 2.2, "over_onednn": 1.73},
        },
        "attribution": {
            "decode": {"total": 2.19, "peer_weakness": 1.58, "sparsity": 1.38, "best_dense": "onednn"},
            "prefill": {"total": 2.20, "peer_weakness": 1.27, "sparsity": 1.73, "best_dense": "onednn"},
        },
    },
    "kernels": {
        "machine": {"gbps": 15.0, "gflops": {"float32": 174.0, "bfloat16": 174.0}},
        "rows": _kernel_rows(),
    },
    "provenance": {
        "model": "models/smollm2-135m-instruct",
        "calibration_sha256": "a17dd8b5" * 8,
        "samples": 64,
    },
    "environment": {
        "lissom": "0.1.0",
        "torch": "2.13.0+cpu",
        "cpu": "Intel(R) Xeon(R) Processor",
        "isa": "avx512x",
    },
}


@pytest.fixture
def report() -> dict[str, Any]:
    """A fresh copy that a test may change."""
    return copy.deepcopy(_REPORT)
