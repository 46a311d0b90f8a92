# SPDX-License-Identifier: Apache-2.0
"""The model of the CUDA kernels as Python and the command see it; its counts are tested in tests/simt."""

import pytest
from typer.testing import CliRunner

from lissom import _C
from lissom.benchmark import predict
from lissom.cli import app

NOTE = "predicted on paper, not measured"


def test_a_row_adds_up():
    row = predict.predict("a100", "bfloat16", 4096, 4096, 4096)
    assert row["note"] == NOTE
    assert row["bound"] == "tensor cores"
    assert row["bound_share"] == pytest.approx(row["bound_us"] / row["us"])
    assert row["ratio"] == pytest.approx(row["dense_bf16_us"] / row["us"])
    # m16n8k32 for each 16 rows of W, 8 rows of x and 32 columns.
    assert row["matrix_instructions"] == (4096 // 16) * (4096 // 8) * (4096 // 32)
    assert row["us"] >= row["launch_us"] + max(row["memory_us"], row["l2_us"], row["sm_us"])


def test_small_products_move_half_the_bytes_of_dense():
    row = predict.predict("h100", "float16", 1, 8192, 8192)
    assert row["bound"] == "memory"
    assert row["bytes_moved"] == pytest.approx(0.5625 * 2 * 8192 * 8192, rel=0.01)
    assert 1 < row["ratio"] < 1 / 0.5625


def test_int8_is_half_of_bfloat16():
    small, large = (predict.predict("b200", dtype, 1024, 4096, 4096) for dtype in ("int8", "bfloat16"))
    assert 2 * small["matrix_instructions"] == large["matrix_instructions"]
    assert small["bytes_moved"] < large["bytes_moved"]


@pytest.mark.parametrize("gpu", sorted(predict.GPUS))
def test_every_size_has_a_plan(gpu):
    found = predict.run(gpu=gpu, dtypes=list(predict.ELEMENT_BYTES), shapes=[(4096, 4096), (100, 1028)])
    assert len(found["rows"]) == 3 * 2 * len(predict.ROWS)
    for row in found["rows"]:
        assert 0 < row["bound_share"] < 1, row
        assert (row["kernel"] == "gemv") == (row["tile"] is None)


def test_what_makes_no_sense_is_refused():
    for sizes in ((0, 4, 4), (1, 4, 6), (1, 4, 1 << 30)):
        with pytest.raises(ValueError, match="multiple of 4"):
            _C.sparse24_predict("a100", *sizes, 2)
    with pytest.raises(ValueError, match="a100, h100, b200, rtx50"):
        _C.sparse24_predict("a1000", 1, 4, 4, 2)


def test_the_command_never_claims_a_measurement():
    call = ["bench", "predict", "--gpu", "h100", "--rows", "16", "--shape", "4096x1024", "--dtype", "int8"]
    answer = CliRunner().invoke(app, call)
    assert answer.exit_code == 0
    out = " ".join(answer.stdout.split())
    assert out.count(NOTE) >= 2
    assert "H100" in out
    assert "…" not in out
    assert CliRunner().invoke(app, ["bench", "predict", "--gpu", "v100"]).exit_code == 2
    wrong = CliRunner().invoke(app, ["bench", "predict", "--shape", "4096"])
    assert wrong.exit_code == 2
    assert "a shape is NxK" in wrong.stderr


def test_the_short_form_is_the_same_command():
    short = CliRunner().invoke(app, ["bench", "--predict", "b200"])
    assert short.exit_code == 0
    assert short.stdout == CliRunner().invoke(app, ["bench", "predict", "--gpu", "b200"]).stdout
    assert CliRunner().invoke(app, ["bench", "--predict", "v100"]).exit_code == 2
    both = CliRunner().invoke(app, ["bench", "--predict", "a100", "tune"])
    assert both.exit_code == 2
    assert "bench tune" in both.stderr
