# SPDX-License-Identifier: Apache-2.0
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
        ("2:4", "4:2", "line 4: steps[0].prune.pattern: pattern must be like '2:4'"),
        ("2:4", "150%", "pattern must be like '2:4'"),
        ("2:4", "50%", "output.format 'packed' needs pattern '2:4'"),
        ("2:4", "4:8", "output.format 'packed' needs pattern '2:4'"),
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


def test_yaml_tags_do_not_make_objects():
    with pytest.raises(RecipeError, match="not YAML"):
        parse_recipe("model: !!python/object/apply:os.getcwd []")


def test_fingerprint_tells_what_decides_the_weights(tmp_path):
    recipe = parse_recipe(GOOD)
    assert parse_recipe(GOOD.replace("dir: out", "dir: there")).fingerprint() == recipe.fingerprint()
    assert parse_recipe(GOOD.replace("samples: 8", "samples: 9")).fingerprint() != recipe.fingerprint()
    (tmp_path / "r.yaml").write_text(GOOD)
    assert read_recipe(tmp_path / "r.yaml") == recipe
