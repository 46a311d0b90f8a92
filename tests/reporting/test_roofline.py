# SPDX-License-Identifier: Apache-2.0
import pytest

from lissom.reporting.roofline import attainable, byte_ratio, dense_flops, kernel_points, linear_bytes


@pytest.mark.parametrize(("element", "ratio"), [(4, 32 / 17), (2, 16 / 9), (1, 8 / 5)])
def test_byte_ratio_is_that_of_the_format(element, ratio):
    assert byte_ratio(element) == pytest.approx(ratio)
    dense = linear_bytes(0, 64, 256, element=element, sparse=False)
    assert dense / linear_bytes(0, 64, 256, element=element, sparse=True) == pytest.approx(ratio)


def test_bytes_count_weights_input_and_output_once():
    assert linear_bytes(3, 5, 8, element=2, sparse=False) == 2 * (5 * 8 + 3 * 8 + 3 * 5)
    assert linear_bytes(1, 1, 12, element=4, sparse=True) == 6 * 4 + 2 + 4 * 13  # 3 quads fill two bytes
    assert dense_flops(3, 5, 8) == 240


def test_attainable_bends_at_the_ridge():
    assert attainable(1.0, gbps=15, gflops=150) == 15
    assert attainable(10.0, gbps=15, gflops=150) == 150
    assert attainable(99.0, gbps=15, gflops=150) == 150


def test_a_kernel_at_the_memory_line_reaches_all_of_it():
    n = k = 4096
    seconds = linear_bytes(1, n, k, element=2, sparse=True) / 15e9
    row = {
        "dtype": "bfloat16",
        "M": 1,
        "N": n,
        "K": k,
        "ours_us": seconds * 1e6,
        "peers": {"a": 9e3, "b": 5e3},
    }
    ours, peer = kernel_points([row], gbps=15, gflops=150)
    assert ours.share == pytest.approx(1.0)
    assert ours.intensity / peer.intensity == pytest.approx(16 / 9, rel=1e-3)
    assert peer.kernel == "b"
    assert peer.gflops == pytest.approx(dense_flops(1, n, k) / 5e3 / 1e3)
