# SPDX-License-Identifier: Apache-2.0
"""Plans: what is touched, and that estimates follow what a run computes."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lissom.models.tiny import build_tiny
from lissom.models.walk import describe
from lissom.pruning import Options, Pattern, Ranks, Reconstruction, plan, plan_prune, prune_model
from lissom.pruning.collect import Statistics
from lissom.pruning.problem import Problem
from lissom.pruning.selection import read_pattern, select_linears
from lissom.pruning.settings import Settings
from lissom.pruning.solver import METHODS

MAP = {"re:.*down_proj": "dense", "re:.*mlp.*": "2:4", "re:.*_proj": "60%"}


@pytest.fixture(autouse=True)
def same_machine(monkeypatch):
    """Rates of one imagined machine, so that plans can be compared."""
    rates = plan._Rates(model=1e11, solve=1e11, gram=1e11, byte=1e-10, itemsize=4, threads=1)
    monkeypatch.setattr(plan._Rates, "measure", lambda dtype: rates)


@pytest.fixture(scope="module")
def model():
    return build_tiny("llama")


def test_pattern_maps_are_planned_as_they_are_run(model):
    found = plan_prune(model, pattern=MAP, samples=4, seq_len=16)
    ids = torch.randint(0, 32, (4, 16), generator=torch.Generator().manual_seed(0))
    report = prune_model(build_tiny("llama"), pattern=MAP, method="wanda", data=ids)
    assert found.touched == [layer.name for layer in report.layers]
    assert found.left == report.left
    assert found.pattern == report.pattern
    assert not any("down_proj" in name for name in found.touched)


def test_without_data_nothing_is_computed(model):
    found = plan_prune(model, method="magnitude", data=None)
    assert found.estimated_seconds == 0
    held = sum(4 * parameter.numel() for parameter in model.parameters())
    assert held < found.peak_bytes - plan._PROCESS_BYTES < 2 * held
    with pytest.raises(ValueError, match="needs calibration data"):
        plan_prune(model, method="wanda", data=None)


@pytest.mark.parametrize(
    ("less", "more"),
    [
        ({"method": "wanda", "options": Options(refit=False)}, {"method": "wanda"}),
        ({"method": "sparsegpt", "options": Options(refit=False)}, {"method": "sparsegpt"}),
        ({"method": "wanda"}, {"method": "alps"}),
        ({"blend": 0.0}, {"blend": 0.3}),
        ({}, {"permute": True}),
        ({}, {"reconstruct": Reconstruction(passes=1)}),
        ({"reconstruct": Reconstruction(passes=1)}, {"reconstruct": Reconstruction(passes=3)}),
        ({"damp": 0.01, "samples": 1}, {"samples": 1}),
        ({"samples": 8}, {"samples": 16}),
        ({"include": [r"re:.*\.0\..*"]}, {}),
    ],
)
def test_more_work_takes_longer(model, less, more):
    usual = {"samples": 8, "seq_len": 64}
    assert (
        plan_prune(model, **usual | less).estimated_seconds
        < plan_prune(model, **usual | more).estimated_seconds
    )


def test_processes_share_tokens_and_files_hold_hidden_states(model):
    usual = {"samples": 8, "seq_len": 64, "blend": 0.5}
    alone = plan_prune(model, **usual).peak_bytes
    two = Ranks()
    two.size = 2
    hidden = 2 * 8 * 64 * model.config.hidden_size * 4  # two streams of float32
    assert alone - plan_prune(model, **usual, spill_dir="spill").peak_bytes == hidden
    # The other half of what is saved is the batch: half the tokens fill it.
    assert alone - plan_prune(model, **usual, ranks=two).peak_bytes > hidden / 2


def test_an_expert_reads_only_the_tokens_that_reach_it():
    one, all_ = (build_tiny("mixtral") for _ in range(2))
    one.config.num_experts_per_tok, all_.config.num_experts_per_tok = 1, 5
    usual = {"samples": 64, "seq_len": 64}
    few, many = plan_prune(one, **usual), plan_prune(all_, **usual)
    assert few.estimated_seconds < many.estimated_seconds
    assert few.peak_bytes < many.peak_bytes


@pytest.mark.parametrize("damp", [None, 0.01])
@pytest.mark.parametrize("blend", [0.0, 0.3])
@pytest.mark.parametrize(("samples", "seq_len"), [(2, 8), (64, 1024)])
def test_sums_are_charged_as_they_are_kept(damp, blend, samples, seq_len):
    """Of a routed expert neither a sum against the dense model's inputs nor two halves."""
    model = build_tiny("mixtral", hidden_size=640, intermediate_size=1100, num_hidden_layers=1)
    settings = Settings(data="", damp=damp, blend=blend, samples=samples, seq_len=seq_len)
    parts = describe(model)
    selection = select_linears(parts, read_pattern("2:4"), strict=False)
    job = plan._Job(settings, parts, selection, 2)
    assert any(linear.routed for linear in selection.linears())
    for group in selection.steps[0].groups().values():
        kept = Statistics(group, settings, samples * seq_len, torch.device("meta"))
        sums = [*kept.gram._panels, *(kept.half._panels if kept.half else [])]
        sums += [kept._cross._sum] if kept._cross else []
        assert plan._statistics_bytes(job, group[0]) == sum(8 * panel.numel() for panel in sums)


def test_an_expert_is_solved_without_a_second_target(model):
    job = plan._Job(Settings(data="", blend=0.3), None, None, 1)
    assert plan._solve_bytes(job, 64, 64, True) < plan._solve_bytes(job, 64, 64, False)
    rates = plan._Rates.measure(torch.float32)
    assert plan._solve_seconds(job, rates, 64, 64, True) < plan._solve_seconds(job, rates, 64, 64, False)


def test_experts_that_see_few_tokens_borrow_some():
    model = build_tiny("mixtral")
    usual = {"seq_len": 16, "blend": 0.0, "damp": 0.01, "include": [r"re:.*experts.*"], "strict": False}
    few, enough = (plan_prune(model, samples=samples, **usual) for samples in (2, 200))
    job = plan._Job(Settings(data="", samples=2, seq_len=16), describe(model), None, 2)
    expert = next(linear for linear in job.parts.linears() if linear.routed)
    assert job.borrows(expert)
    assert not job.borrows(job.parts.linears()[0])
    assert not plan._Job(Settings(data="", samples=200), job.parts, None, 2).borrows(expert)
    assert few.estimated_seconds < enough.estimated_seconds


@pytest.mark.parametrize("method", ["wanda", "alps"])
@pytest.mark.parametrize(("rows", "columns"), [(96, 128), (384, 128)])
def test_solve_is_charged_for_the_products_that_it_does(model, monkeypatch, method, rows, columns):
    """Factorisations count nothing here: the flop counter does not know them (nor products in place)."""
    for routine in ("_BANDED", "_INVERSE", "_CHOLESKY"):
        monkeypatch.setattr(plan, routine, 0)
    monkeypatch.setattr(plan, "_THIN", 1)
    unit = plan._Rates(model=1.0, solve=1.0, gram=1.0, byte=0.0, itemsize=4, threads=1)
    settings = plan.Settings(data="", method=method, damp=0.01, blend=0.0, options=Options(refit=False))
    job = plan._Job(settings, None, None, 1)
    charged = plan._solve_seconds(job, unit, rows, columns)
    random = torch.Generator().manual_seed(0)
    inputs = torch.randn(columns, 4 * columns, generator=random)
    problem = Problem(
        weight=torch.randn(rows, columns, generator=random),
        hessian=inputs @ inputs.t(),
        norms=inputs.norm(dim=1),
        pattern=Pattern.parse("2:4"),
        rows=(rows,),
        frozen=None,
        options=settings.options,
    )
    with FlopCounterMode(display=False) as counter:
        METHODS[method](problem)
    error = 2 * 2 * rows * columns**2  # two products more for the error that is reported
    assert charged == pytest.approx(counter.get_total_flops() + error, rel=0.25)
