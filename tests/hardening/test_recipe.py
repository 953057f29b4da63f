from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from hardening.recipe import Recipe, RecipeError, load_recipe
from tests.conftest import REPOSITORY

RECIPES = sorted((REPOSITORY / "recipes").glob("*.yaml"))


def small(**changes: Any) -> dict[str, Any]:
    encoder = {"architecture": "resnet8_cifar", "pretrain": {"method": "simclr"}}
    content = {"name": "x", "pixels": {"height": 32, "width": 32}, "victim": encoder, "auxiliary": encoder, "bmp": encoder}
    return {**content, **changes}


def write(tmp_path: Path, content: Any) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
    return file


def refusal(tmp_path: Path, content: Any) -> str:
    file = write(tmp_path, content)
    with pytest.raises(RecipeError) as refused:
        load_recipe(file)
    assert str(file) in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: str(file.name))
def test_every_recipe_of_the_repository_loads(file: Path) -> None:
    assert load_recipe(file).name == file.stem


def test_there_are_recipes() -> None:
    assert {"photos.yaml", "smoke.yaml"} <= {file.name for file in RECIPES}


def test_defaults_fill_what_is_not_said(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, small()))
    assert isinstance(recipe, Recipe)
    assert (recipe.detector, recipe.bmp_finetune.epsilon, recipe.finetune.relation) == ("consistency", 0, "features")


@pytest.mark.parametrize(
    ("changes", "place", "nearest"),
    [
        ({"seeds": 1}, "seeds", "seed"),
        ({"finetune": {"epsilom": 4}}, "finetune.epsilom", "epsilon"),
        ({"evaluate": {"attack": ["pgd"]}}, "evaluate.attack", "attacks"),
        ({"pixels": {"height": 32, "width": 32, "resampling": "bicubic"}}, "pixels.resampling", "resample"),
        (
            {"victim": {"architecture": "resnet8_cifar", "pretrain": {"method": "byol", "epoch": 3}}},
            "victim.pretrain.epoch",
            "epochs",
        ),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(
    tmp_path: Path, changes: dict[str, Any], place: str, nearest: str
) -> None:
    assert f"{place}: there is no such key; did you mean `{nearest}`?" in refusal(tmp_path, small(**changes))


def test_where_no_key_is_near_the_known_ones_are_listed(tmp_path: Path) -> None:
    message = refusal(tmp_path, small(splits={"zzz": 1}))
    assert "splits.zzz: there is no such key; known are public, local, validation, fit, calibration" in message


def test_every_mistake_is_listed_at_once(tmp_path: Path) -> None:
    message = refusal(tmp_path, small(seed=-1, finetune={"epsilon": 400}, detektor="paper"))
    assert "seed:" in message
    assert "finetune.epsilon:" in message
    assert "did you mean `detector`?" in message


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("name: x\n  seed: 1\n", "recipe.yaml, line 2, column 7: this cannot be read as YAML"),
        ("[a]: b", "recipe.yaml, line 1, column 1: this cannot be read as YAML"),
        ("\0", "recipe.yaml: is not UTF-8, or has characters"),
        ("- a\n- b\n", "a mapping of keys to values"),
        ("", "a mapping of keys to values"),
        ("name: " + "[" * 3000, "recipe.yaml: is nested too deep"),
        ("!!python/object/apply:os.system ['exit 1']", "cannot be read as YAML"),
    ],
)
def test_what_is_no_mapping_is_refused(tmp_path: Path, content: str, said: str) -> None:
    assert said in refusal(tmp_path, content)


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path / "nowhere.yaml")


def test_an_encoder_never_starts_from_nothing(tmp_path: Path) -> None:
    message = refusal(tmp_path, small(bmp={"architecture": "resnet8_cifar"}))
    assert "bmp: an encoder needs `weights`, or `pretrain` to make them" in message


def test_public_pre_training_needs_public_images(tmp_path: Path) -> None:
    victim = {"architecture": "resnet8_cifar", "pretrain": {"method": "simclr", "split": "public"}}
    assert "splits.public is 0" in refusal(tmp_path, small(victim=victim))
    assert load_recipe(write(tmp_path, small(victim=victim, splits={"public": 0.3}))).splits.public == 0.3


def test_a_key_needs_pre_training_and_whole_blocks(tmp_path: Path) -> None:
    bmp = {"architecture": "resnet8_cifar", "keyed": True, "pretrain": {"method": "supcon"}}
    assert load_recipe(write(tmp_path, small(bmp=bmp))).bmp.keyed
    assert "multiples of 4" in refusal(tmp_path, small(bmp=bmp, pixels={"height": 30, "width": 32}))
    assert "only `bmp` can be keyed" in refusal(tmp_path, small(victim=bmp))
    assert "`keyed` needs `pretrain`" in refusal(tmp_path, small(bmp={"architecture": "a", "weights": "timm", "keyed": True}))


def test_a_name_that_cannot_be_a_bundles_name(tmp_path: Path) -> None:
    assert "name:" in refusal(tmp_path, small(name="../x"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"finetune": {"learning_rate": float("inf")}}, "finite number"),
        ({"seed": 2**63}, "less than"),
        ({"victim": {"architecture": "resnet8_cifar", "weights": "x.pt", "std": [0, 0, 0]}}, "victim.std.0"),
    ],
)
def test_numbers_that_no_training_survives_are_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    assert said in refusal(tmp_path, small(**change))


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path, small(finetune={"epochs": 1}))
    file.write_text(file.read_text() + "\nfinetune: {epochs: 2}\n")
    with pytest.raises(RecipeError, match="`finetune` stands twice"):
        load_recipe(file)
