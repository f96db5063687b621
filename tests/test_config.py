"""Presets load, errors name the key and the nearest valid one, and identity covers what it must."""

from pathlib import Path

import pytest

from pipeline.common.errors import ConfigConflict, UsageError
from pipeline.config import LOSSES, NETWORKS, RunConfig, explain, load_config, preset_names
from pipeline.model.dcgan import stage_widths


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_valid(name: str) -> None:
    assert load_config(name).schedule.total_images > 0


def test_the_presets_of_the_mission_are_there() -> None:
    wanted = {"demo", "tutorial64", "paper64", "authors64", "lsun_bedroom", "faces", "best64"}
    assert wanted | {"cifar32", "imagenet32"} <= set(preset_names())
    assert stage_widths(load_config("paper64").network) == [1024, 512, 256, 128]
    assert stage_widths(load_config("tutorial64").network) == [512, 256, 128, 64]


def test_best64_is_the_papers_network_with_the_demos_steps_and_average() -> None:
    best, demo = load_config("best64").recipe, load_config("demo").recipe
    assert load_config("best64").network == load_config("lsun_bedroom").network
    assert (best.learning_rate_g, best.learning_rate_d) == (demo.learning_rate_g, demo.learning_rate_d)
    assert best.ema_half_life_images / best.batch == demo.ema_half_life_images / demo.batch


def test_overrides_win_over_file_and_preset(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("network: {width: 8}\nrecipe: {batch: 32}\n")
    config = load_config("demo", file, ["recipe.batch=48", "learning_rate_g=1e-3"])
    assert (config.network.width, config.recipe.batch, config.recipe.learning_rate_g) == (8, 48, 1e-3)


@pytest.mark.parametrize(
    ("preset", "overrides", "words"),
    [
        ("demmo", [], ["--preset demmo", "'demo'"]),
        (None, ["recipe.bach=3"], ["recipe.bach", "recipe.batch"]),
        (None, ["recipe.batch"], ["recipe.batch", "key=value"]),
        (None, ["recipe.batch=many"], ["recipe.batch", "'many'", "integer"]),
        (None, ["network.image_size=100"], ["network.image_size=100", "no network makes 100x100", "96x96, 112x112"]),
        (None, ["recipe.batch=100"], ["recipe.batch=100", "recipe.streams=16", "96"]),
        (None, ["best_metric=fid"], ["schedule.best_metric=fid", "schedule.extractor"]),
        (None, ["recipe.batch=[1"], ["recipe.batch=[1", "YAML"]),
    ],
)
def test_errors_name_the_key_and_the_remedy(preset: str | None, overrides: list[str], words: list[str]) -> None:
    with pytest.raises(UsageError) as error:
        load_config(preset, None, overrides)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["[1, 2]", "width: 3", "recipe: 3", "network: {nope: 1}", "a: [", "\x00"])
def test_a_bad_file_is_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(UsageError):
        load_config(None, file)


def test_short_keys_are_unique() -> None:
    sections = [field.annotation for field in RunConfig.model_fields.values()]
    leaves = [key for section in sections if section for key in section.model_fields]
    assert len(leaves) == len(set(leaves))


def test_identity_is_architecture_and_recipe_only() -> None:
    config, other = RunConfig(), load_config(overrides=["total_images=9", "compile=true", "loader_threads=7"])
    assert config.identity() == other.identity()
    assert config.identity() != load_config(overrides=["seed=1"]).identity()


@pytest.mark.parametrize(
    ("processes", "accumulate", "words"), [(3, 1, "the nearest process count that works: 2"), (2, 3, "64")]
)
def test_what_does_not_divide_is_refused_with_numbers(processes: int, accumulate: int, words: str) -> None:
    with pytest.raises(ConfigConflict, match=words):
        load_config(overrides=[f"accumulate={accumulate}"]).check_processes(processes)


def test_the_explained_settings_are_the_settings_and_name_every_choice(tmp_path: Path) -> None:
    config = load_config("demo", None, ["recipe.loss=hinge"])
    text = explain(config)
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    assert load_config(None, file) == config
    for choices in (NETWORKS, LOSSES):
        assert f"One of: {', '.join(choices)}." in text
    assert not [line for line in text.splitlines() if line.strip() == "#"], "a setting without a description"


@pytest.mark.parametrize("setting", ["network.architecture", "recipe.loss"])
def test_an_unknown_choice_is_refused_with_the_known_ones(setting: str) -> None:
    with pytest.raises(UsageError, match=f"{setting}='nope': expected one of "):
        load_config(None, None, [f"{setting}=nope"])
