# SPDX-License-Identifier: Apache-2.0
import re
from pathlib import Path

import pytest

from lissom.recipe import RecipeError, build_recipe, parse_recipe, read_recipe

GOOD = """\
model: some/model
data: {source: calib.jsonl, field: text, samples: 8}
steps:
  - prune: {pattern: 2:4, method: wanda, include: ["re:.*mlp.*"]}
  - bench:
      kind: generation
      rounds: 2
evaluate: {perplexity: valid.txt}
output: {dir: out}
"""


def test_a_recipe_is_the_same_after_writing_and_reading():
    recipe = parse_recipe(GOOD)
    assert parse_recipe(recipe.to_yaml()) == recipe
    assert build_recipe(recipe.to_dict()) == recipe


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("0.5", 0.5),
        ("2:4+70%", "2:4+70%"),
        ("2:4t", "2:4t"),
        ("{'re:.*mlp.*': 2:4, lm_head: dense}", {"re:.*mlp.*": "2:4", "lm_head": "dense"}),
        ("{a: 0.25, b: null, c: 2:4+50%}", {"a": "25%", "b": "dense", "c": "2:4"}),
    ],
)
def test_patterns_and_maps_survive_writing(written, read):
    recipe = parse_recipe(GOOD.replace("2:4", written).replace("{dir: out}", "{dir: out, format: dense}"))
    assert recipe.steps[0].prune.pattern == read
    assert parse_recipe(recipe.to_yaml()) == recipe


def test_a_recipe_that_allocates_is_the_same_after_writing_and_reading():
    recipe = parse_recipe(
        GOOD.replace("pattern: 2:4", "allocate: {budget_bytes: 5e6, options: [dense, 2:4, 1:4]}")
    )
    assert recipe.steps[0].prune.pattern is None
    assert recipe.steps[0].prune.allocate.allocation.budget_bytes == 5e6
    assert parse_recipe(recipe.to_yaml()) == recipe


@pytest.mark.parametrize("number", range(3))
def test_examples_of_the_docs_are_recipes(number):
    page = Path(__file__).parents[2] / "docs" / "recipes.md"
    recipe = parse_recipe(
        re.findall(r"^```yaml\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M)[number]
    )
    assert recipe.steps[0].prune
    assert parse_recipe(recipe.to_yaml()) == recipe


def test_a_map_of_what_fits_may_be_packed():
    recipe = parse_recipe(GOOD.replace("2:4", "{a: 2:4+70%, b: 1:2, c: 2:4t, d: dense}"))
    assert recipe.output.format == "packed"


def test_unquoted_pattern_is_text_and_not_a_base_60_number():
    assert parse_recipe(GOOD).steps[0].prune.pattern == "2:4"
    assert parse_recipe("{model: m, steps: [generate: {prompt: 12:30, seed: 7}]}").steps[0].generate.seed == 7


@pytest.mark.parametrize(
    ("old", "new", "wanted"),
    [
        ("method", "metod", "line 4: steps[0].prune has no key 'metod'; did you mean 'method'?"),
        ("samples", "sampels", "line 2: data has no key 'sampels'; did you mean 'samples'?"),
        ("model:", "modle:", "line 1: the recipe has no key 'modle'; did you mean 'model'?"),
        ("rounds", "runds", "line 7: steps[1].bench has no key 'runds'; did you mean 'rounds'?"),
        ("- prune", "- prun", "line 4: steps[0] has no key 'prun'; did you mean 'prune'?"),
        ("dir: out", "dir: out, xyzzy: 1", "line 9: output has no key 'xyzzy'; it has dir, format"),
        ("samples: 8", "samples: 0", "line 2: data.samples: Input should be greater than or equal to 1"),
        ("wanda", "wonder", "line 4: steps[0].prune.method: method must be one of"),
        (
            "wanda",
            "wanda, refit: maybe",
            "line 4: steps[0].prune.refit: refit must be True, False or 'exact'",
        ),
        ("wanda", "wanda, scope: column", "line 4: steps[0].prune.scope: scope must be 'row'"),
        (
            "wanda",
            "wanda, blend: 1.5",
            "line 4: steps[0].prune.blend: Input should be less than or equal to 1",
        ),
        (
            "wanda",
            "wanda, reconstruct: {pases: 2}",
            "line 4: steps[0].prune.reconstruct has no key 'pases'; did you mean 'passes'?",
        ),
        (
            "wanda",
            "wanda, reconstruct: {passes: 0}",
            "prune.reconstruct.passes: reconstruct passes must be at",
        ),
        (
            "wanda",
            "wanda, variant: SM",
            "line 4: steps[0].prune: variant 'SM' is a choice within method 'mrp'",
        ),
        ("wanda", "wanda, act_order: true", "line 4: steps[0].prune: act_order is about the pass of method"),
        ("2:4", "4:2", "line 4: steps[0].prune.pattern: pattern '4:2': an n:m pattern keeps n of m"),
        ("2:4", "150%", "the pruned share must be at least 0 and below 1"),
        ("2:4", "[2, 4]", "line 4: steps[0].prune.pattern: pattern must be text such as '2:4' or '50%'"),
        ("2:4", "{'re:(': 2:4}", "line 4: steps[0].prune.pattern: "),
        ("2:4", "{q: 2:5x}", "prune.pattern: pattern map entry 'q': pattern '2:5x' is not understood"),
        ("2:4", "50%", "output.format 'packed' holds at most two of every four weights"),
        ("2:4", "4:8", "as pattern '2:4' leaves them, got '4:8'"),
        ("2:4", "{a: dense, b: 2:4, c: 60%}", "as pattern '2:4' leaves them, got 'c': '60%'"),
        (
            "pattern: 2:4",
            "allocate: {}",
            "prune.allocate: allocate needs one of share, budget_bytes, budget_sec",
        ),
        ("pattern: 2:4", "allocate: {shar: 1}", "prune.allocate has no key 'shar'; did you mean 'share'?"),
        ("2:4", "2:4, allocate: {share: 0.8}", "line 4: steps[0].prune: 'allocate' chooses the pattern"),
        ("pattern: 2:4", "allocate: {share: 0.5, options: [dense, 4:8]}", "leaves them, got '4:8'"),
        ("pattern: 2:4", "allocate: {share: 0.375, method: owl}", "leaves them, got '62.5%'"),
        ("calib.jsonl", "hf:c4", "line 2: data.source: hub data set 'hf:c4' is not read"),
        ("output: {dir: out}", "", "output is missing"),
        ("model: some/model\n", "", "model is missing"),
        ("data: {source: calib.jsonl, field: text, samples: 8}", "", "data is missing: method 'wanda' needs"),
        ("output: {dir: out}", "output: {dir: out}\nmodel: b", "line 10: key 'model' is there twice"),
        ("include:", "method:", "line 4: key 'method' is there twice"),
        ("  - bench", " - bench", "not YAML"),
        ("kind: generation", "kind: other", "does not match any of the expected tags"),
    ],
)
def test_errors_name_place_and_remedy(old, new, wanted):
    assert old in GOOD
    with pytest.raises(RecipeError) as caught:
        parse_recipe(GOOD.replace(old, new), name="r.yaml")
    assert wanted in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "[1, 2]", "just words", "{steps: [{}]}", "{steps: [{info: {}, eval: {}}]}"]
)
def test_what_is_no_recipe_is_refused(text):
    with pytest.raises(RecipeError):
        parse_recipe(text)


@pytest.mark.parametrize(
    ("more", "reader"), [("blend: 0.2", "blend"), ("reconstruct: {passes: 1}", "reconstruct")]
)
def test_what_reads_a_text_is_told_that_there_is_none(more, reader):
    bare = GOOD.replace("data: {source: calib.jsonl, field: text, samples: 8}\n", "")
    parse_recipe(bare.replace("wanda", "magnitude"))
    with pytest.raises(RecipeError, match=f"data is missing: {reader} needs calibration text"):
        parse_recipe(bare.replace("wanda", f"magnitude, {more}"))


def test_yaml_tags_do_not_make_objects():
    with pytest.raises(RecipeError, match="not YAML"):
        parse_recipe("model: !!python/object/apply:os.getcwd []")


def test_fingerprint_tells_what_decides_the_weights(tmp_path):
    recipe = parse_recipe(GOOD)
    assert parse_recipe(GOOD.replace("dir: out", "dir: there")).fingerprint() == recipe.fingerprint()
    assert parse_recipe(GOOD.replace("samples: 8", "samples: 9")).fingerprint() != recipe.fingerprint()
    # The first entry that means a layer counts, so the order of a map decides.
    maps = [parse_recipe(GOOD.replace("2:4", text)) for text in ("{a: 2:4, b: 1:4}", "{b: 1:4, a: 2:4}")]
    assert maps[0].fingerprint() != maps[1].fingerprint()
    (tmp_path / "r.yaml").write_text(GOOD)
    assert read_recipe(tmp_path / "r.yaml") == recipe
