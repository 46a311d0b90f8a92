# SPDX-License-Identifier: Apache-2.0
import gc
import resource
import signal
import sys

import pytest
import torch

from lissom.models.spill import Spill

MIB = 1 << 20


def mapped():
    """Bytes of file pages in this process."""
    with open("/proc/self/status") as status:
        (line,) = [line for line in status if line.startswith("RssFile")]
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_dropped_pages_leave_memory_and_keep_their_values(tmp_path):
    spill = Spill(tmp_path)
    before = mapped()
    hidden = spill.empty((32, 1024, 512), torch.float32)
    hidden.copy_(torch.arange(32).reshape(32, 1, 1).expand(32, 1024, 512))
    assert mapped() - before > 60 * MIB
    spill.drop(hidden[:16])
    assert 28 * MIB < mapped() - before < 36 * MIB
    spill.drop(hidden)
    assert mapped() - before < 4 * MIB
    assert hidden.sum().item() == sum(range(32)) * 1024 * 512
    spill.drop(hidden[3:5])
    hidden[3] = 7
    assert hidden[2:6].mean((1, 2)).tolist() == [2, 7, 4, 5]
    assert mapped() - before > 60 * MIB
    del hidden
    gc.collect()
    assert mapped() - before < 16 * MIB  # of 64; code of torch that ran for the first time is mapped as well


def test_tensors_are_apart_and_leave_no_name_in_the_folder(tmp_path):
    spill = Spill(tmp_path)
    one, two = spill.empty((3, 5), torch.bfloat16), spill.empty((7,), torch.int64)
    nothing = spill.empty((0, 4), torch.float32)
    one.fill_(1)
    two.fill_(2)
    for tensor in (one, two, nothing, torch.ones(3)):  # the last is none of its own
        spill.drop(tensor)
    assert one.sum().item() == 15
    assert two.sum().item() == 14
    assert nothing.shape == (0, 4)
    assert one.is_contiguous()
    assert one.dtype == torch.bfloat16
    assert list(tmp_path.iterdir()) == []


def test_the_folder_is_made(tmp_path):
    assert Spill(tmp_path / "not" / "there").empty((2,), torch.float32).shape == (2,)


@pytest.mark.skipif(sys.platform != "linux", reason="posix_fallocate")
def test_a_disk_without_room_is_an_error_and_no_crash(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            Spill(tmp_path).empty((MIB,), torch.float32)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []
