# SPDX-License-Identifier: Apache-2.0
import os
import socket
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lissom.pruning.parallel import Ranks

PREAMBLE = """
import os, sys, time
import torch
import torch.distributed as dist
from lissom.pruning.parallel import RankError, Ranks

torch.set_num_threads(1)
folder = sys.argv[1]

def refused(call, *kinds):
    try:
        call()
    except kinds as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"
"""


@pytest.fixture
def launch(tmp_path):
    """Run a program in some processes, as torchrun would; gives exit status and stderr of each, and the time."""
    started = []

    def run(size, program, seconds=120):
        script = tmp_path / "program.py"
        script.write_text(PREAMBLE + textwrap.dedent(program))
        with socket.socket() as door:
            door.bind(("127.0.0.1", 0))
            port = door.getsockname()[1]
        common = {**os.environ, "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        began = time.monotonic()
        for rank in range(size):
            started.append(
                subprocess.Popen(
                    [sys.executable, str(script), str(tmp_path)],
                    env={**common, "RANK": str(rank)},
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        ends = [process.communicate(timeout=seconds) for process in started]
        return [(process.returncode, end[1]) for process, end in zip(started, ends)], time.monotonic() - began

    yield run
    for process in started:
        process.kill()


def results(tmp_path, size):
    return [torch.load(tmp_path / f"rank-{rank}.pt") for rank in range(size)]


COLLECTIVES = """
def values(rank):
    random = torch.Generator().manual_seed(rank)
    return torch.randn(700, 700, generator=random, dtype=torch.float64) * 10.0 ** (rank * 3)

from lissom.pruning import parallel
parallel._PANEL_BYTES = 100_000      # so that there are many panels
with Ranks.join(timeout=60) as ranks:
    single = values(ranks.rank).float()
    found = {
        "whole": ranks.sum_(values(ranks.rank)),
        "strided": ranks.sum_(values(ranks.rank)[::3, ::2]),
        "float": ranks.sum_(single),
        "count": ranks.sum_(torch.tensor(ranks.rank + 1)),
        "empty": ranks.sum_(torch.zeros(0, 4)),
        "in place": single,
    }
    mine = {
        "weight": (0, torch.arange(6.0).reshape(2, 3).t()),
        "half": (1, torch.tensor([[1.5, -2.0]], dtype=torch.bfloat16)),
        "mask": (2, torch.tensor([True, False, True])),
        "kinds": (1, torch.tensor([[-1, 2]], dtype=torch.int8)),
        "none": (0, torch.zeros(0, 5)),
        "number": (2, torch.tensor(7, dtype=torch.int64)),
    }
    found["exchange"] = ranks.exchange(
        {name: each if owner == ranks.rank else None for name, (owner, each) in mine.items()}
    )
    found["objects"] = ranks.gather_objects({"rank": ranks.rank})
    found["shard"] = list(range(10))[ranks.shard(10)]
    found["size"] = ranks.size
    ranks.same("arguments", {"pattern": "2:4", "tokens": [1, 2]})
    ranks.same("tokens", torch.arange(5))
    with ranks.section("solving"):
        pass
    ranks.barrier()
torch.save(found, f"{folder}/rank-{int(os.environ['RANK'])}.pt")
"""


def test_three_ranks_of_torchrun_get_the_same_bits(tmp_path):
    script = tmp_path / "program.py"
    script.write_text(PREAMBLE + COLLECTIVES)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    ended = subprocess.run(
        [*command, str(script), str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    parts = [
        torch.randn(700, 700, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
        * 10.0 ** (rank * 3)
        for rank in range(3)
    ]
    total = parts[0] + parts[1] + parts[2]
    assert not torch.equal(total, parts[2] + parts[1] + parts[0])  # the order shows in the last bits
    rounded = (parts[0].float().double() + parts[1].float().double() + parts[2].float().double()).float()
    for rank, found in enumerate(results(tmp_path, 3)):
        assert found["size"] == 3
        assert torch.equal(found["whole"], total)
        assert torch.equal(found["strided"], total[::3, ::2])
        assert torch.equal(found["float"], rounded)
        assert torch.equal(found["in place"], rounded)
        assert found["count"].item() == 6
        assert found["empty"].shape == (0, 4)
        assert found["objects"] == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
        assert found["shard"] == [[0, 1, 2, 3], [4, 5, 6], [7, 8, 9]][rank]
        given_out = found["exchange"]
        assert list(given_out) == ["weight", "half", "mask", "kinds", "none", "number"]
        assert torch.equal(given_out["weight"], torch.arange(6.0).reshape(2, 3).t())
        assert torch.equal(given_out["half"], torch.tensor([[1.5, -2.0]], dtype=torch.bfloat16))
        assert torch.equal(given_out["mask"], torch.tensor([True, False, True]))
        assert torch.equal(given_out["kinds"], torch.tensor([[-1, 2]], dtype=torch.int8))
        assert given_out["none"].shape == (0, 5)
        assert given_out["number"].item() == 7


def test_disagreement_is_an_error_on_every_rank(launch, tmp_path):
    ends, _ = launch(
        2,
        """
        # A group of the user's own: join takes part in it and leaves it standing.
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=int(os.environ["RANK"]),
                                world_size=2)
        with Ranks.join(timeout=30) as ranks:
            rank = ranks.rank
            found = [
                refused(lambda: ranks.same("the pattern", "2:4" if rank else "4:8"), ValueError),
                refused(lambda: ranks.same("tokens", torch.full((2,), rank)), ValueError),
                refused(lambda: ranks.sum_(torch.zeros(2 + rank)), ValueError),
                refused(lambda: ranks.exchange({"w": torch.ones(1)}), ValueError),
                refused(lambda: ranks.exchange({"w": None}), ValueError),
                refused(lambda: ranks.exchange({f"w{rank}": None}), ValueError),
            ]
            def fail():
                with ranks.section("solving block 3"):
                    if rank == 1:
                        raise KeyError("no such group")
            found.append(refused(fail, KeyError, RankError))
            ranks.barrier()
        assert dist.get_world_size() == 2
        torch.save(found, f"{folder}/rank-{rank}.pt")
        """,
    )
    assert [status for status, _ in ends] == [0, 0], ends
    first, second = results(tmp_path, 2)
    assert first[:-1] == second[:-1]
    assert first[0].startswith(
        "ValueError: the pattern must be the same on all ranks: rank 0 has '4:8', rank 1 has"
    )
    assert "tokens must be the same" in first[1]
    assert "rank 0 has '[2] torch.float32', rank 1 has '[3] torch.float32'" in first[2]
    assert first[3] == "ValueError: w must be on one rank, it is on 2 of 2"
    assert first[4] == "ValueError: w must be on one rank, it is on 0 of 2"
    assert first[5] == "ValueError: exchange needs the same names on all ranks"
    assert first[6] == "RankError: solving block 3: rank 1 failed with KeyError: 'no such group'"
    assert second[6] == "KeyError: 'no such group'"


@pytest.mark.parametrize("end", ["os._exit(3)", "raise ValueError('bad weights')"])
def test_a_rank_that_dies_ends_the_others_at_once(launch, end):
    ends, seconds = launch(
        2,
        f"""
        with Ranks.join(timeout=600) as ranks:
            if ranks.rank == 1:
                {end}
            ranks.sum_(torch.ones(3))
        """,
    )
    assert ends[1][0] != 0
    assert ends[0][0] != 0
    assert (
        "RankError: rank 0, exchanging values: another rank failed or was more than 600 s late" in ends[0][1]
    )
    assert seconds < 50


def test_a_rank_that_hangs_is_waited_for_no_longer_than_asked(launch):
    ends, _ = launch(
        2,
        """
        open(f"{folder}/ready-{os.environ['RANK']}", "w").close()
        while not all(os.path.exists(f"{folder}/ready-{rank}") for rank in range(2)):
            time.sleep(0.02)  # a loaded machine may start them more than a second apart
        with Ranks.join(timeout=1) as ranks:
            if ranks.rank == 1:
                time.sleep(5)
                os._exit(0)
            began = time.monotonic()
            try:
                ranks.barrier()
            finally:
                print("waited", time.monotonic() - began, file=sys.stderr)
        """,
    )
    status, errors = ends[0]
    assert status != 0
    assert "RankError: rank 0, waiting: another rank failed or was more than 1 s late" in errors
    assert 0.5 < float(errors.split("waited ")[1].split()[0]) < 4.5


def test_one_process_makes_no_call_of_torch_distributed(monkeypatch):
    import torch.distributed as dist

    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for name in dir(dist):
        if (
            name.islower()
            and callable(getattr(dist, name))
            and name not in ("is_available", "is_initialized")
        ):
            monkeypatch.setattr(dist, name, lambda *_, name=name, **__: pytest.fail(f"{name} was called"))
    weight = torch.randn(2, 3)
    with Ranks.join() as ranks:
        assert (ranks.rank, ranks.size) == (0, 1)
        assert ranks.sum_(weight) is weight
        assert ranks.exchange({"w": weight})["w"] is weight
        assert ranks.gather_objects("a") == ["a"]
        ranks.same("a", {"b": 1})
        ranks.barrier()
        with pytest.raises(KeyError, match="mine"), ranks.section("alone"):
            raise KeyError("mine")
        with pytest.raises(ValueError, match="w must be on one rank, it is on 0 of 1"):
            ranks.exchange({"w": None})


@pytest.mark.parametrize(
    "environment, message",
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK is not set"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR is not set"),
        ({"WORLD_SIZE": "two"}, "number of processes, got 'two'"),
    ],
)
def test_half_an_environment_is_refused(monkeypatch, environment, message):
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        Ranks.join()


def of(rank, size):
    ranks = Ranks()
    ranks.rank, ranks.size = rank, size
    return ranks


@given(count=st.integers(0, 300), size=st.integers(1, 40))
def test_shards_cover_all_samples_once_and_evenly(count, size):
    parts = [list(range(count))[of(rank, size).shard(count)] for rank in range(size)]
    assert [sample for part in parts for sample in part] == list(range(count))
    lengths = [len(part) for part in parts]
    assert max(lengths) - min(lengths) <= 1
    assert lengths == sorted(lengths, reverse=True)


@given(costs=st.lists(st.integers(0, 1000).map(float), max_size=60), size=st.integers(1, 8))
def test_owners_are_the_same_everywhere_and_near_the_best_split(costs, size):
    owners = of(0, size).owners(costs)
    assert owners == of(size - 1, size).owners(costs)
    loads = [sum(cost for cost, owner in zip(costs, owners) if owner == rank) for rank in range(size)]
    # Graham's bound for a list schedule: the mean load and one piece on top.
    assert max(loads) <= sum(costs) / size + max(costs, default=0.0) * (1 - 1 / size) + 1e-6
    if len(costs) <= size:
        assert max(loads) == max(costs, default=0.0)


def test_owners_puts_the_dearest_pieces_first():
    assert of(0, 2).owners([3.0, 3.0, 2.0, 2.0, 2.0]) == [0, 1, 0, 1, 0]
    assert of(0, 2).owners([1.0, 1.0, 1.0, 3.0]) == [1, 1, 1, 0]
