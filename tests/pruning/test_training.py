# SPDX-License-Identifier: Apache-2.0
"""A pruned weight stays zero, whatever trains the model."""

from __future__ import annotations

import copy
import functools
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lissom.pruning import masks, training
from lissom.pruning.training import keep_masks


def make_net(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 8)).to(dtype)


@torch.no_grad()
def set_two_four(model):
    """Half of each linear to zero, in place; returns where."""
    masks = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            order = module.weight.abs().reshape(-1, 4).argsort(-1)
            pruned = torch.zeros(len(order), 4, dtype=torch.bool).scatter_(1, order[:, :2], True)
            masks[name] = pruned.view(module.weight.shape)
            module.weight.masked_fill_(masks[name], 0)
    return masks


def gradients(model, seed=1):
    weight = next(model.parameters())
    batch = torch.randn(32, 16, generator=torch.Generator().manual_seed(seed)).to(weight.dtype)
    loss = (model(batch) - batch[:, :8].sin()).square().mean()
    loss.backward()
    return loss


# --- whatever the optimiser


class Langevin(torch.optim.Optimizer):
    """Adds noise to every weight."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                noise = torch.randn_like(parameter) * group["lr"]
                parameter.data.add_(noise - group["lr"] * parameter.grad)


class RoundsAtRandom(torch.optim.Optimizer):
    """Momentum on bfloat16 weights with stochastic rounding: 16 random low bits are added, then cut off."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter.grad))
                momentum.mul_(0.9).add_(parameter.grad)
                exact = parameter.float() - group["lr"] * momentum
                bits = exact.view(torch.int32) + torch.randint(1 << 16, exact.shape, dtype=torch.int32)
                parameter.copy_((bits & -(1 << 16)).view(torch.float32))


class SharpnessAware(torch.optim.Optimizer):
    """SAM: climbs first, takes the gradient there, and steps from where it was."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})
        self.base = torch.optim.SGD(self.param_groups, lr=lr, momentum=0.9)

    @torch.no_grad()
    def step(self, closure):
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        start = [parameter.data.clone() for parameter in parameters]
        for parameter in parameters:
            parameter.add_(parameter.grad, alpha=0.05)
        with torch.enable_grad():
            closure()
        for parameter, old in zip(parameters, start, strict=True):
            parameter.data = old
        self.base.step()


class KeepsCopies(torch.optim.Optimizer):
    """As mixed-precision optimisers do: an inner one steps float64 copies, which are written back inside step."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})
        self.ours = [p for group in self.param_groups for p in group["params"]]
        self.copies = [p.detach().double().requires_grad_() for p in self.ours]
        self.inner = torch.optim.SGD(self.copies, lr=lr, momentum=0.9)

    @torch.no_grad()
    def step(self, closure=None):
        for mine, double in zip(self.ours, self.copies, strict=True):
            double.grad = mine.grad.double()
        self.inner.step()
        for mine, double in zip(self.ours, self.copies, strict=True):
            mine.copy_(double)

    @torch.no_grad()
    def copy_in(self):
        for mine, double in zip(self.ours, self.copies, strict=True):
            double.copy_(mine)


OPTIMISERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "coupled decay": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "fused adamw": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "muon": lambda p: torch.optim.Muon([w for w in p if w.ndim == 2], lr=0.01),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=4),
    "noise": lambda p: Langevin(p, lr=0.01),
    "stochastic rounding": lambda p: RoundsAtRandom(p, lr=0.1),
    "sam": lambda p: SharpnessAware(p, lr=0.1),
    "copies": lambda p: KeepsCopies(p, lr=0.1),
}
# Masked gradients alone would not keep the zeros of these: warm momentum, mixed or noisy updates.
NEED_MORE = [kind for kind in OPTIMISERS if kind not in ("sgd", "lbfgs")]


def warm_then_prune(kind):
    """An optimiser with a history from before the model was pruned."""
    model = make_net(torch.bfloat16 if kind == "stochastic rounding" else torch.float32)
    optimizer = OPTIMISERS[kind](list(model.parameters()))
    for seed in range(3):
        train_step(model, optimizer, seed)
    masks = set_two_four(model)
    if kind == "lbfgs":  # it remembers the loss and the gradient at its last point, which is no more
        optimizer = OPTIMISERS[kind](list(model.parameters()))
    if kind == "copies":
        optimizer.copy_in()
    return model, optimizer, masks


def train_step(model, optimizer, seed):
    def closure():
        optimizer.zero_grad()
        return gradients(model, seed)

    closure()
    optimizer.step(closure)


@pytest.mark.parametrize("kind", OPTIMISERS)
def test_mask_survives(kind):
    model, optimizer, masks = warm_then_prune(kind)
    before = {name: model.get_submodule(name).weight.detach().clone() for name in masks}
    with keep_masks(model, "zeros") as keeper:
        for seed in range(6):
            train_step(model, optimizer, seed)
            for name, pruned in masks.items():
                assert not model.get_submodule(name).weight[pruned].any()
    assert keeper.names == ("0", "2")
    for name, pruned in masks.items():
        moved = model.get_submodule(name).weight != before[name]
        assert moved[~pruned].float().mean() > 0.8, "the kept weights must train"
        assert torch.equal(keeper.masks()[name], pruned)


@pytest.mark.parametrize("kind", NEED_MORE)
def test_masked_gradients_are_not_enough(kind, monkeypatch):
    """The test above would notice a keeper that only masks gradients."""
    monkeypatch.setattr(training, "_impose", lambda *_: None)
    model, optimizer, masks = warm_then_prune(kind)
    keeper = keep_masks(model, masks)
    train_step(model, optimizer, 0)
    with pytest.raises(RuntimeError, match=r"^0: \d+ pruned weights are not zero \(2 of 2 layers"):
        keeper.check()
    keeper.remove()


def test_compiled_step():
    model, optimizer, masks = warm_then_prune("momentum")
    with keep_masks(model, masks):
        step = torch.compile(optimizer.step, backend="aot_eager")
        for seed in range(3):
            optimizer.zero_grad()
            gradients(model, seed)
            step()
            assert not model[0].weight[masks["0"]].any()


def test_one_optimiser_for_each_parameter_inside_backward(monkeypatch):
    model, _, masks = warm_then_prune("sgd")
    keeper = keep_masks(model, masks)
    imposed = []
    impose = training._impose
    monkeypatch.setattr(training, "_impose", lambda some: (imposed.append(len(some)), impose(some)))

    def step_now(optimizer, _):
        optimizer.step()
        optimizer.zero_grad()

    for parameter in model.parameters():
        optimizer = torch.optim.Adam([parameter], lr=0.01)
        parameter.register_post_accumulate_grad_hook(functools.partial(step_now, optimizer))
    gradients(model)
    assert sorted(imposed) == [0, 0, 1, 1], "a step masks only what it stepped"
    keeper.check()


def test_writes_outside_the_optimiser_are_found_and_mended():
    model = make_net()
    masks = set_two_four(model)
    row, column = masks["2"].nonzero()[0]
    keeper = keep_masks(model, masks)
    model[2].weight.data[row, column] = torch.nan
    with pytest.raises(RuntimeError, match=r"^2: 1 pruned weights are not zero \(1 of 2 layers are so\)"):
        keeper.check()
    with pytest.raises(RuntimeError, match=r"^2: 1 pruned"), keeper:
        pass  # leaving it checks, and lets go all the same
    gradients(model)
    assert model[0].weight.grad[masks["0"]].any()
    keeper.apply()
    keeper.check()


def test_an_error_inside_is_not_hidden_by_the_check():
    model = make_net()
    with pytest.raises(ZeroDivisionError), keep_masks(model, set_two_four(model)):
        raise ZeroDivisionError(model[0].weight.data.fill_(1))


def test_moving_average_from_before_the_pruning():
    model = make_net()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    average.update_parameters(model)
    masks = set_two_four(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with keep_masks(model, masks) as keeper:
        for seed in range(3):
            train_step(model, optimizer, seed)
            average.update_parameters(model)
        with pytest.raises(RuntimeError, match="pruned weights are not zero"):
            keeper.check(average)
        keeper.apply(average)
        keeper.check(average)
    assert not average.module[0].weight[masks["0"]].any()


# --- gradients


def test_gradients_are_masked_as_they_accumulate():
    model = make_net()
    masks = set_two_four(model)
    gradients(model, 1)
    gradients(model, 2)
    wanted = {
        name: model.get_submodule(name).weight.grad.masked_fill(pruned, 0) for name, pruned in masks.items()
    }
    model.zero_grad()
    keeper = keep_masks(model, masks)
    gradients(model, 1)
    assert not model[0].weight.grad[masks["0"]].any()
    gradients(model, 2)
    for name in masks:
        torch.testing.assert_close(model.get_submodule(name).weight.grad, wanted[name])
    keeper.remove()
    gradients(model, 1)
    assert model[0].weight.grad[masks["0"]].any(), "the hooks must be gone"


def test_pruned_infinities_do_not_reach_clipping():
    layer = nn.Linear(8, 4, bias=False)
    masks = set_two_four(nn.Sequential(layer))
    with keep_masks(layer, {"weight": masks["0"]}):
        scale = torch.where(masks["0"], torch.inf, 1.0)
        (layer.weight * scale).sum().backward()
        norm = nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
    assert norm == pytest.approx(16**0.5)


def test_weights_unfrozen_or_replaced_later():
    model = make_net()
    masks = set_two_four(model)
    model.requires_grad_(False)
    model[2].requires_grad_(True)
    with keep_masks(model, masks):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        train_step(model, optimizer, 0)
        model.requires_grad_(True)
        train_step(model, optimizer, 1)
        gradients(model, 2)
        assert not model[0].weight.grad[masks["0"]].any()
        model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
        model.requires_grad_(True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        train_step(model, optimizer, 3)
        assert not model[0].weight[masks["0"]].any()
        model.to(torch.bfloat16)
        train_step(model, torch.optim.SGD(model.parameters(), lr=0.1), 4)


# --- wrapped models


@pytest.fixture
def process_group():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("keep_first", [True, False])
@pytest.mark.parametrize("bucket_view", [True, False])
def test_distributed_data_parallel(process_group, keep_first, bucket_view):
    model = make_net()
    masks = set_two_four(model)
    keeper = keep_masks(model, masks) if keep_first else None
    parallel = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=bucket_view)
    keeper = keeper or keep_masks(parallel, masks)
    optimizer = torch.optim.Adam(parallel.parameters(), lr=0.01)
    for seed in range(3):
        with parallel.no_sync():
            gradients(parallel, seed)
        gradients(parallel, seed + 1)
        assert not model[0].weight.grad[masks["0"]].any()
        optimizer.step()
        keeper.check()
        optimizer.zero_grad()


def one_of_two(rank, folder):
    store = torch.distributed.FileStore(str(folder / "store"), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    model = make_net()
    masks = set_two_four(model)
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.Adam(parallel.parameters(), lr=0.01)
    with keep_masks(parallel, masks):
        for seed in range(3):
            optimizer.zero_grad()
            gradients(parallel, 10 * seed + rank)
            assert not model[0].weight.grad[masks["0"]].any()
            optimizer.step()
    torch.save(model.state_dict(), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_stay_equal(tmp_path):
    torch.multiprocessing.spawn(one_of_two, (tmp_path,), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name, weight in first.items():
        assert torch.equal(weight, second[name])
    assert (first["0.weight"] == 0).float().mean() == 0.5


@pytest.mark.parametrize("keep_first", [True, False])
def test_compiled_model(keep_first):
    model = make_net()
    masks = set_two_four(model)
    keeper = keep_masks(model, masks) if keep_first else None
    compiled = torch.compile(model, backend="aot_eager")
    keeper = keeper or keep_masks(compiled, masks)
    optimizer = torch.optim.AdamW(compiled.parameters(), lr=0.01)
    for seed in range(3):
        train_step(compiled, optimizer, seed)
        keeper.check()
        assert not model[0].weight.grad[masks["0"]].any()


def test_accelerate_with_accumulation():
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed (extra `dev`)")
    model = make_net()
    masks = set_two_four(model)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    wrapped, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    before = model[0].weight.detach().clone()
    with keep_masks(wrapped, masks):
        for seed in range(4):
            with accelerator.accumulate(wrapped):
                batch = torch.randn(8, 16, generator=torch.Generator().manual_seed(seed))
                accelerator.backward(wrapped(batch).square().mean())
                optimizer.step()
                optimizer.zero_grad()
    assert not torch.equal(before, model[0].weight)


# --- life and death


def test_the_keeper_lives_and_dies_with_the_model():
    model = make_net()
    masks = set_two_four(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    keep_masks(model, masks)  # nobody holds the handle
    train_step(model, optimizer, 0)
    assert not model[0].weight[masks["0"]].any()
    gone = weakref.ref(model)
    del model, optimizer
    assert gone() is None
    other = make_net()
    train_step(other, torch.optim.Adam(other.parameters(), lr=0.1), 0)


def test_a_copy_of_the_model_is_free():
    model = make_net()
    masks = set_two_four(model)
    keeper = keep_masks(model, masks)
    twin = copy.deepcopy(model)
    train_step(twin, torch.optim.Adam(twin.parameters(), lr=0.1), 0)
    assert twin[0].weight[masks["0"]].all()
    keeper.check()
    keeper.remove()
    train_step(model, torch.optim.Adam(model.parameters(), lr=0.1), 0)
    assert model[0].weight[masks["0"]].all()


# --- the mask's bits


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float8_e4m3fn]),
    transposed=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_clearing_is_exact(shape, dtype, transposed, seed):
    random = torch.Generator().manual_seed(seed)
    mask = torch.rand(shape, generator=random) < 0.5
    bits = masks.pack(mask)
    assert bits.numel() == -(-mask.numel() // 8)
    assert torch.equal(masks.unpack(bits, mask.shape), mask)
    weight = torch.randn(shape, generator=random)
    weight[torch.rand(shape, generator=random) < 0.2] = torch.nan
    weight[torch.rand(shape, generator=random) < 0.2] = -0.0
    weight = (weight.mT.contiguous().mT if transposed and len(shape) > 1 else weight).to(dtype)
    wanted = torch.where(mask, 0.0, weight.float())
    masks.clear_(weight, bits)
    torch.testing.assert_close(weight.float(), wanted, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(weight.float().signbit(), wanted.signbit())


def test_clearing_goes_through_pieces():
    mask = torch.rand((1 << 17) + 5, generator=torch.Generator().manual_seed(0)) < 0.5
    weight = torch.ones(mask.shape)
    version = weight._version
    masks.clear_(weight, masks.pack(mask))
    assert torch.equal(weight == 0, mask)
    assert weight._version > version, "autograd must notice a weight that changed under a graph"
