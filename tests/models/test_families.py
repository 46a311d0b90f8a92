# SPDX-License-Identifier: Apache-2.0
import re

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from lissom.models.families import FAMILIES
from lissom.models.names import select
from lissom.models.stream import BlockStream
from lissom.models.taps import ExpertsTap, Seen
from lissom.models.tiny import build_tiny, tiny_inputs
from lissom.models.walk import UnsupportedModelError, describe, packing_obstacles

ROUTED = [
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "gpt_oss",
    "deepseek_v2",
    "deepseek_v3",
    "jamba",
]
TEXT = [family for family in FAMILIES if family not in ("vit", "clip_vision_model")]
# Matrices inside blocks that are no linear layer to prune: depthwise convolutions and state matrices of
# mixers, routers, and the gate of a shared expert.
NOT_COVERED = re.compile(r".*\.(conv1d\.weight|A_log|(gate|router)\.weight|shared_expert_gate\.weight)")


class _Products(TorchFunctionMode):
    """Notes what every weight is multiplied with, whoever does it: by the address of the weight."""

    def __init__(self, weights):
        super().__init__()
        self.seen = {weight.data_ptr(): [] for weight in weights}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name == "linear":
            self._note(args[1], args[0])
        elif name == "addmm":
            self._note(args[2], args[1])
        elif name in ("matmul", "__matmul__"):
            self._note(args[1], args[0])
            self._note(args[0], args[1].transpose(-1, -2))
        return func(*args, **(kwargs or {}))

    def _note(self, weight, states):
        if weight.data_ptr() in self.seen and weight.dim() == 2:
            self.seen[weight.data_ptr()].append(states.detach().clone().reshape(-1, states.shape[-1]))


def _given(family, side=None):
    given = tiny_inputs(family, sequences=5, length=20)
    if side:
        mask = torch.ones_like(given["input_ids"])
        for row, length in enumerate((20, 13, 9, 17, 1)):
            mask[row, slice(length, None) if side == "right" else slice(0, 20 - length)] = 0
        given["attention_mask"] = mask
    return given


def _products(model, given):
    """The input of each linear in one plain forward pass of the model, experts run one by one; and, of the
    routed ones, the numbers of their tokens.
    """
    refs = describe(model).linears()
    called = {}
    handles = [
        module.register_forward_pre_hook(lambda m, args: called.__setitem__(m, (args[0].clone(), args[1])))
        for module in {ref.module for ref in refs if ref.routed}
    ]
    model.config._experts_implementation = "eager"
    with _Products([ref.weight() for ref in refs]) as products, torch.no_grad():
        model(**given)
    for handle in handles:
        handle.remove()
    inputs, numbers = {}, {}
    for ref in refs:
        calls = products.seen[ref.weight().data_ptr()]
        assert len(calls) == 1 or (ref.routed and not calls), (ref.name, len(calls))
        inputs[ref.name] = calls[0] if calls else torch.zeros(0, ref.shape[1])
        if ref.routed:
            # The loop over experts takes the tokens that chose one first, then those that chose it second.
            states, choice = called[ref.module]
            numbers[ref.name] = torch.where((choice == ref.expert).t())[1]
            assert "down" in ref.name or torch.equal(inputs[ref.name], states[numbers[ref.name]])
    return inputs, numbers


def _shown(model, given, batch=2):
    """What the taps show in a whole pass of the stream."""
    stream = BlockStream(model, describe(model), given, batch=batch)
    shown = {}
    while stream.index < len(stream.parts.blocks):
        for inputs in stream.inputs(stream.groups(), advance=True):
            for group, tokens in inputs.items():
                shown.setdefault(group, []).append(tokens.clone())
    return {group: torch.cat(parts) for group, parts in shown.items()}, stream


# Attention that masks with the least float64 overflows in its float32 softmax where a whole row is padding.
@pytest.mark.parametrize(
    "side, dtype, tolerance",
    [(None, torch.float64, 1e-8), ("left", torch.float32, 2e-4), ("right", torch.float32, 2e-4)],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_taps_show_what_each_weight_is_multiplied_with(family, side, dtype, tolerance):
    given = _given(family, side if family in TEXT else None)
    shown, stream = _shown(build_tiny(family, dtype=dtype), given)
    model = build_tiny(family, dtype=dtype)
    expected, numbers = _products(model, given)
    mask = given.get("attention_mask", torch.ones(stream.tokens))
    real = mask.bool().flatten()
    for ref in describe(model).linears():
        tokens = expected[ref.name]
        if ref.routed:
            order = numbers[ref.name].sort().values
            tokens = tokens[numbers[ref.name].argsort()][real[order]]
        else:
            tokens = tokens[real]
            assert len(tokens) == stream.tokens == int(real.sum())
        assert tokens.shape[1] == ref.shape[1]
        torch.testing.assert_close(
            shown[ref.group],
            tokens,
            rtol=tolerance,
            atol=tolerance,
            msg=lambda text, ref=ref: f"{ref.name}: {text}",
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_views_of_the_model(family):
    model = build_tiny(family)
    given = _given(family)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    shown, _ = _shown(model, given)
    with torch.no_grad():
        before = model(**given)[0]
        for ref in describe(model).linears():
            weight = ref.weight()
            assert weight.shape == ref.shape
            kept = weight.clone()
            weight.zero_()
            touched = [name for name, tensor in model.state_dict().items() if not tensor.equal(state[name])]
            assert ref.stored in touched
            assert {id(model.get_parameter(name)) for name in touched} == {id(ref.parameter)}
            assert torch.equal(model(**given)[0], before) == (len(shown[ref.group]) == 0), ref.name
            weight.copy_(kept)
        assert torch.equal(model(**given)[0], before)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_left_is_no_linear(family):
    model = build_tiny(family)
    parts = describe(model)
    covered = {ref.stored for ref in parts.linears()}
    inside = tuple(f"{block.name}." for block in parts.blocks)
    left = {
        name
        for name, parameter in model.named_parameters()
        if name.startswith(inside) and name not in covered and parameter.squeeze().dim() > 1
    }
    assert all(NOT_COVERED.fullmatch(name) or name.endswith("proj_bias") for name in left), left
    per_expert = {}
    for ref in parts.linears():
        if ref.routed:
            per_expert.setdefault(ref.stored, []).append(ref.expert)
    for stored, numbers in per_expert.items():
        assert numbers == list(range(len(model.get_parameter(stored))))


def test_blocks_of_one_model_differ():
    names = [{ref.name.split(".")[3] for ref in b.linears} for b in describe(build_tiny("jamba")).blocks]
    assert names == [{"mamba", "feed_forward"}, {"self_attn", "feed_forward"}] + 2 * [
        {"mamba", "feed_forward"}
    ]
    routed = [any(ref.routed for ref in b.linears) for b in describe(build_tiny("qwen2_moe")).blocks]
    assert routed == [True, False, True]
    low_rank, full = (
        {ref.name.rpartition(".")[2] for ref in describe(build_tiny(f)).blocks[0].linears}
        for f in ("deepseek_v3", "deepseek_v2")
    )
    assert low_rank - full == {"q_a_proj", "q_b_proj"}
    assert full - low_rank == {"q_proj"}


@pytest.mark.parametrize("family", ROUTED)
def test_every_token_reaches_top_k_experts(family):
    model = build_tiny(family)
    given = _given(family, "left")
    shown, stream = _shown(model, given)
    pools = {}
    for ref in stream.parts.linears():
        assert (ref.pool is not None) == ref.routed == (ref.expert is not None)
        if ref.routed:
            assert ref.pool == ref.stored
            assert ref.name == ref.group == f"{ref.pool}.{ref.expert}"
            pools[ref.pool] = pools.get(ref.pool, 0) + len(shown[ref.group])
    assert set(pools.values()) == {2 * stream.tokens}


def test_some_groups_of_the_experts_alone():
    model = build_tiny("mixtral")
    given = _given("mixtral")
    whole, _ = _shown(model, given, batch=5)
    stream = BlockStream(model, describe(model), given, batch=5)
    wanted = [f"model.layers.0.mlp.experts.{name}" for name in ("gate_up_proj.1", "down_proj.4")]
    (shown,) = stream.inputs(wanted)
    assert list(shown) == wanted
    assert all(torch.equal(tokens, whole[group]) for group, tokens in shown.items())


def _experts_tap(model):
    return next(tap for tap in describe(model).blocks[0].taps if isinstance(tap, ExpertsTap))


def test_expert_without_tokens_shows_none():
    tap = _experts_tap(build_tiny("mixtral"))
    states, choice = torch.randn(3, 32), torch.tensor([[3, 1], [1, 3], [4, 1]])
    shown = tap.read(Seen((states, choice), None, 3, None), tap.groups)
    assert [len(tokens) for tokens in shown.values()] == [0, 0, 3, 3, 0, 0, 2, 2, 1, 1]
    assert shown[tap.groups[0]].shape == (0, 32)
    assert shown[tap.groups[5]].shape == (0, 48)
    assert torch.equal(shown[tap.groups[1]], states)
    assert torch.equal(shown[tap.groups[3]], states[:2])
    none = tap.read(Seen((states, choice), None, 3, torch.zeros(3, dtype=torch.bool)), tap.groups)
    assert all(len(tokens) == 0 for tokens in none.values())


def test_token_routed_to_no_expert_of_this_module_is_an_error():
    tap = _experts_tap(build_tiny("mixtral"))
    with pytest.raises(RuntimeError, match="routed to expert 5 of 5"):
        tap.read(Seen((torch.randn(2, 32), torch.tensor([[0, 1], [5, 2]])), None, 2, None), tap.groups)


def test_transposed_experts_are_seen_as_out_in():
    model = build_tiny("gpt_oss")
    ref = next(ref for ref in describe(model).linears() if ref.name.endswith("gate_up_proj.3"))
    assert ref.module.gate_up_proj.shape == (5, 32, 96)
    assert ref.shape == (96, 32)
    ref.weight()[90, 7] = 123.0
    assert ref.module.gate_up_proj[3, 7, 90] == 123.0


def test_names_of_experts_can_be_chosen():
    refs = [ref.name for ref in describe(build_tiny("olmoe")).linears()]
    chosen, _ = select(refs, [r"re:.*\.experts\.down_proj\..*"], [r"re:.*\.0\.mlp.*", r"re:.*\.[1-5]"])
    assert chosen == [f"model.layers.{block}.mlp.experts.down_proj.0" for block in (1, 2)]


def test_experts_shared_between_blocks_are_told():
    model = build_tiny("mixtral")
    model.model.layers[2].mlp.experts.down_proj = model.model.layers[0].mlp.experts.down_proj
    shared = {ref.name: ref.shared_with for ref in describe(model).linears() if ref.shared_with}
    assert len(shared) == 10
    assert shared["model.layers.2.mlp.experts.down_proj.4"] == "model.layers.0.mlp.experts"


@pytest.mark.parametrize("family", ["mamba", "falcon_mamba", "jamba"])
def test_time_step_projection_is_set_aside(family):
    model = build_tiny(family)
    aside = {ref.name: ref for ref in describe(model).linears() if ref.aside}
    assert aside
    assert all(name.endswith("dt_proj") for name in aside)
    assert packing_obstacles(model) == {name: ref.packing_obstacle() for name, ref in aside.items()}
    assert "without calling it" in next(iter(aside.values())).aside


def test_packing_obstacles_of_other_layers():
    model = build_tiny("mixtral")
    reasons = {ref.name: ref.packing_obstacle() for ref in describe(model).linears()}
    assert reasons["model.layers.0.self_attn.q_proj"] is None
    assert (
        "expert 3 of the fused weight model.layers.0.mlp.experts.down_proj"
        in (reasons["model.layers.0.mlp.experts.down_proj.3"])
    )
    assert packing_obstacles(model) == packing_obstacles(nn.Linear(2, 2)) == {}


@pytest.mark.parametrize("family", ["mamba", "mamba2", "llama"])
def test_stream_keeps_the_type_that_the_model_gives_it(family):
    model = build_tiny(family, dtype=torch.bfloat16)
    parts = describe(model)
    given = _given(family)
    seen = []
    handle = parts.blocks[2].module.register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    with torch.no_grad():
        model(**given)
    handle.remove()
    stream = BlockStream(model, parts, given, batch=5)
    for _ in range(2):
        stream.advance()
    assert stream.hidden.dtype == (torch.bfloat16 if family == "llama" else torch.float32)
    assert torch.equal(stream.hidden, seen[0][0])
    stream.advance()
    assert torch.equal(stream.hidden, seen[0][1])


def test_inputs_of_a_post_norm_block_are_not_overwritten_while_they_are_shown():
    model = build_tiny("bert")
    parts = describe(model)
    stream = BlockStream(model, parts, _given("bert"), batch=2)
    group = parts.blocks[0].linears[0].group
    before = stream.hidden.clone().flatten(0, 1)
    shown = torch.cat([tokens[group].clone() for tokens in stream.inputs([group], advance=True)])
    assert torch.equal(shown, before)


def test_composed_model_names_its_parts():
    from transformers import CLIPConfig, CLIPModel

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(text_config={**small, "vocab_size": 11}, vision_config={**small, "image_size": 32})
    model = CLIPModel(config)
    with pytest.raises(UnsupportedModelError, match=r"pass model\.vision_model or model\.text_model"):
        describe(model)
    for part in (model.text_model, model.vision_model):
        assert len(describe(part).linears()) == 6


@pytest.mark.parametrize(
    "wrapper", ["CLIPTextModelWithProjection", "BertForMaskedLM", "ViTForImageClassification"]
)
def test_encoder_inside_a_task_model(wrapper):
    import transformers

    family = {"C": "clip_text_model", "B": "bert", "V": "vit"}[wrapper[0]]
    model = getattr(transformers, wrapper)(build_tiny(family).config).eval()
    parts = describe(model)
    assert parts.base in ("text_model", "bert", "vit")
    assert parts.head is None
    stream = BlockStream(model, parts, _given(family))
    assert stream.hidden.shape[2] == 32


def test_block_without_its_linears_is_refused():
    model = build_tiny("llama")
    model.model.layers[1] = nn.Identity()
    with pytest.raises(UnsupportedModelError, match=r"layers\.1 \(Identity\) has none of the linear layers"):
        describe(model)


def test_model_without_blocks_is_refused():
    model = build_tiny("llama")
    model.model.layers = nn.ModuleList()
    with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM has no blocks at model\.layers"):
        describe(model)


def test_linear_that_is_missing_beside_its_group_is_refused():
    model = build_tiny("deepseek_v3")
    del model.model.layers[2].mlp.shared_experts.up_proj
    with pytest.raises(UnsupportedModelError, match=r"layers\.2\.mlp\.shared_experts\.up_proj is missing"):
        describe(model)


def test_experts_in_another_form_are_refused():
    model = build_tiny("mixtral")
    experts = model.model.layers[1].mlp.experts
    experts.gate_up_proj = nn.Parameter(experts.gate_up_proj[0].detach())
    with pytest.raises(
        UnsupportedModelError, match=r"layers\.1\.mlp\.experts \(MixtralExperts\) does not hold"
    ):
        describe(model)
    model.model.layers[1].mlp.experts = nn.ModuleList([nn.Linear(32, 48) for _ in range(5)])
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.mlp\.experts\.0 is a linear layer that"):
        describe(model)


def test_quantised_experts_are_not_read_as_dense():
    model = build_tiny("mixtral")
    experts = model.model.layers[0].mlp.experts
    experts.down_proj = nn.Parameter(experts.down_proj.detach().to(torch.int8), requires_grad=False)
    ref = next(ref for ref in describe(model).linears() if ref.name.endswith("0.mlp.experts.down_proj.2"))
    with pytest.raises(
        UnsupportedModelError, match=r"down_proj\.2 has no dense weight to read: MixtralExperts"
    ):
        ref.weight()
