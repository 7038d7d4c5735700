import pytest

from specialize.errors import InputError
from specialize.kinds import kinds_of
from specialize.recipe import Recipe, override, read_recipe, remembered_inputs, shipped, write_recipe
from specialize.records import read_seeds

SHIPPED = {"small": None, "demo": None, "paper": None, "biomed": 80, "finance": 56}


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_load_and_survive_a_round_trip(name, tmp_path):
    recipe, inputs = read_recipe(name)
    assert recipe.name == name
    assert set(inputs) == ({"seeds"} if SHIPPED[name] else set())
    if SHIPPED[name]:
        seeds = read_seeds(inputs["seeds"])
        assert len(seeds) == SHIPPED[name]
        assert all(len(kind.seeds) >= 5 for kind in kinds_of(seeds))
    there = str(tmp_path / "s")
    write_recipe(recipe, {"model": "m", "seeds": there}, tmp_path / "recipe.yaml")
    assert read_recipe(tmp_path / "recipe.yaml") == (recipe, {"model": "m", "seeds": there})


def test_all_shipped_recipes_are_tested():
    assert set(shipped()) == set(SHIPPED)


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("name: x\ntune:\n  rank: 8\n  rnk: 9\n", 4, 'unknown setting "tune.rnk"'),
        ("examples: 10\nexamples: 20\n", 2, "set twice"),
        ("tune:\n  rank: many\n", 2, "tune.rank must be a whole number"),
        ("tune:\n  rank: 0\n", 2, "tune.rank is 0; allowed: 1 to 1024"),
        ("filter:\n  enabled: maybe\n", 2, "true or false"),
        ("retrieval:\n  mode: google\n", 2, "allowed: bm25, dense, hybrid, off"),
        ("\n\ntune: 5\n", 3, "must be a mapping"),
        ("evaluate:\n  shots: 5\n", 2, "must be a list"),
        ("name: [x\n", 2, "not YAML"),
        ("retrieval:\n  chunk_words: 30\n  overlap_words: 30\n", 3, "must be smaller than retrieval.chunk_words (30)"),
        ("filter:\n  min_words: 70\n", 2, "filter.min_words (70) is larger than filter.max_words (60)"),
        ("tune:\n  rank: 4\n  patience: 2\n", 3, "set tune.validation to 0.1"),
        ("inputs: 3\n", 1, "inputs must be a mapping"),
        ("inputs:\n  model: m\n  seed: s\n", 3, 'unknown setting "inputs.seed"; known here: model, seeds'),
        ("inputs:\n  seeds:\n", 2, "inputs.seeds must be a path"),
    ],
)
def test_errors_name_the_line(text, line, message, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        read_recipe(path)
    assert str(caught.value).startswith(f"{path}:{line}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_scientific_numbers_are_numbers(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("tune:\n  learning_rate: 5e-4\n  alpha: 8\n")
    recipe, _ = read_recipe(path)
    assert (recipe.tune.learning_rate, recipe.tune.alpha) == (5e-4, 8.0)


def test_override():
    recipe = override(Recipe(), ["tune.rank=4", "evaluate.shots=[0, 5]", "examples=7"])
    assert (recipe.tune.rank, recipe.evaluate.shots, recipe.examples) == (4, (0, 5), 7)
    assert override(Recipe(), ["tune.patience=2", "tune.validation=0.1"]).tune.patience == 2
    for bad in (
        ["tune.patience=2"],
        ["tune.keep_best=true"],
        ["tune.init=zeros"],
        ["tune.rnk=4"],
        ["tune=4"],
        ["rank"],
        ["tune.learning_rate=5"],
        ["retrieval.overlap_words=500"],
    ):
        with pytest.raises(InputError):
            override(Recipe(), bad)


def test_unknown_recipe_lists_those_there_are():
    with pytest.raises(InputError, match="shipped: biomed, demo, finance, paper, small"):
        read_recipe("nowhere")


def test_inputs_are_remembered_whatever_the_settings(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("responses:\n  a_key_of_an_older_version: 1\ninputs:\n  model: m\n  seeds: s\n")
    assert remembered_inputs(path) == {"model": "m", "seeds": "s"}
    with pytest.raises(InputError, match="a_key_of_an_older_version"):
        read_recipe(path)


def test_an_escape_beyond_unicode_is_told(tmp_path):
    """Found by fuzzing: PyYAML raises OverflowError."""
    file = tmp_path / "recipe.yaml"
    file.write_text('name: "\\Uffffffff"\n')
    with pytest.raises(InputError, match="not YAML"):
        read_recipe(str(file))
    for value in ('"\\Uffffffff"', "[1"):
        with pytest.raises(InputError, match="the value is not YAML"):
            override(Recipe(), [f"tune.rank={value}"])
