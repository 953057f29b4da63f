"""A recipe: one YAML file that says everything a hardening run does. Unknown keys are refused, with the nearest known one."""

from __future__ import annotations

import difflib
from collections.abc import Hashable
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, ValidationError, model_validator

from model_store.errors import TwogateError
from model_store.pixels import PixelRule

PACKAGE_PREFIX = "package:"
ROLES = ("auxiliary", "victim", "bmp")
KEY_BLOCK = 4
"""Side in pixels of the blocks that a keyed encoder scrambles."""
SSLMethod = Literal["simclr", "moco", "nnclr", "byol", "swav", "vicreg", "barlowtwins", "supcon", "supervised"]


class RecipeError(TwogateError):
    """The recipe cannot be read or asks for something impossible."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Splits(_Part):
    """Shares of `train/`, drawn once per class with a seed of their own and written down. They are scaled to sum to 1."""

    public: float = Field(default=0.0, ge=0, description="pre-trains stand-ins for public encoders; never used locally")
    local: float = Field(default=0.6, gt=0, description="adversarial tuning, and all that a BMP trained here ever sees")
    validation: float = Field(default=0.08, gt=0, description="chooses the epoch; seen by no gradient")
    fit: float = Field(default=0.16, gt=0, description="heads and detector evidence: images that no encoder was tuned on")
    calibration: float = Field(
        default=0.16, ge=0, description="the score's quantile table; not drawn where the data has a folder calibration/"
    )
    unused: float = Field(default=0.0, ge=0, description="left out, to make a run smaller")
    seed: int = Field(default=0, ge=0, description="of the draw; apart from the recipe's, so that seeds share their test")


class Pretrain(_Part):
    """Pre-training, self-supervised with lightly or supervised."""

    method: SSLMethod
    split: Literal["public", "local"] = "local"
    epochs: int = Field(default=100, ge=1)
    batch_size: int = Field(default=256, ge=8)
    learning_rate: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=1e-4, ge=0)


class EncoderSpec(_Part):
    """Where an encoder comes from."""

    architecture: str = Field(description="a name of `hardening.architectures`, or of timm")
    weights: str | None = Field(
        default=None,
        description="a file (.pth, .pt, .ckpt, .safetensors), `package:NAME` for a Python package that ships one, "
        "`timm` for timm's own download; nothing starts from random weights",
    )
    keys: Literal["exact", "order"] = Field(
        default="exact",
        description="how the file's keys meet the architecture's: by name (solo-learn's `backbone.` is removed), or one "
        "after the other where names differ but order and shapes agree",
    )
    mean: tuple[float, float, float] | None = Field(
        default=None,
        description="of the normalisation that the weights want; timm's own for `weights: timm`, else ImageNet's",
    )
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = None
    pretrain: Pretrain | None = None
    keyed: bool = Field(
        default=False,
        description="for `bmp`, with `pretrain`: it sees pictures through a secret block-wise transform, drawn anew for each "
        "run, so that an attacker's stand-in for it is no twin",
    )

    @model_validator(mode="after")
    def _starts_somewhere(self) -> EncoderSpec:
        if self.weights is None and self.pretrain is None:
            raise ValueError("an encoder needs `weights`, or `pretrain` to make them")
        if self.keyed and self.pretrain is None:
            raise ValueError("`keyed` needs `pretrain`: no public weights can read pictures behind a secret key")
        return self


class Finetune(_Part):
    """Adversarial fine-tuning (ZePAD section 3, Gen-AF stage 1); with `epsilon: 0`, fine-tuning on clean images."""

    epochs: int = Field(default=20, ge=0, description="0 keeps the encoder as it is")
    batch_size: int = Field(default=64, ge=2)
    epsilon: float = Field(default=8.0, ge=0, le=64, description="L-infinity budget, in 1/255 of the pixel range")
    steps: int = Field(default=3, ge=1, description="PGD steps")
    ramp: float = Field(
        default=0.4, gt=0, le=1, description="share of the training over which epsilon grows to its full size"
    )
    learning_rate: float = Field(default=1e-4, gt=0)
    head_learning_rate: float = Field(default=5e-3, gt=0)
    weight_decay: float = Field(default=8e-4, ge=0)
    clean_weight: float = Field(default=0.3, ge=0, description="weight of the cross-entropy on clean images")
    anchor_weight: float = Field(
        default=1.0, ge=0, description="weight of 1 - cos between the tuned and the public encoder's features"
    )
    relation: Literal["features", "genaf_logits"] = "features"
    relation_weight: float = Field(default=1.0, ge=0)
    interpolation: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="share of the tuned weights in those that are kept, the rest being the public ones: less gives up some "
        "robustness for clean accuracy, and works for mildly tuned encoders only",
    )
    flip: bool = Field(default=True, description="mirror images left to right at random; not for digits or signs")
    crop: float = Field(default=0.7, gt=0, le=1, description="smallest share of the picture's side that a crop keeps")


class Sentinel(_Part):
    """The network that is trained to see perturbations, on the split `local`; only for `detector: sentinel`."""

    epochs: int = Field(default=12, ge=1)
    batch_size: int = Field(default=64, ge=4, description="half of them attacked")
    learning_rate: float = Field(default=4e-3, gt=0)
    width: int = Field(
        default=24, ge=4, description="channels of its first convolution; the last ones have four times as many"
    )


class Evaluate(_Part):
    """What the card says of the bundle on `test/`: the words, and how hard attacks try, are those of `twogate evaluate`."""

    images: int = Field(default=1000, ge=20, description="test images at most")
    epsilon: int = Field(default=10, ge=1, le=64, description="L-infinity budget, in 1/255, of pictures in 8 bits")
    attacks: tuple[str, ...] = Field(default=("noise", "pgd", "uap"), min_length=1, description="on the public victim")


class Recipe(_Part):
    """One hardening run."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$", description="the bundle's name")
    description: str = ""
    data_licence: str = Field(default="not stated", description="of the images; goes into the card")
    weights_licence: str = Field(default="not stated", description="of the public weights; goes into the card")
    seed: int = Field(default=0, ge=0, lt=2**32)
    pixels: PixelRule
    splits: Splits = Splits()
    victim: EncoderSpec = Field(description="the public encoder whose applications are to be protected")
    auxiliary: EncoderSpec = Field(description="a second public encoder, of another SSL method or architecture")
    bmp: EncoderSpec = Field(description="the encoder of the BMP branch: trained on local data, or public weights")
    finetune: Finetune = Finetune()
    bmp_finetune: Finetune = Field(
        default=Finetune(epsilon=0, epochs=4),
        description="on clean images, or with an `epsilon`: who knows the method attacks the branch that gives way first",
    )
    detector: Literal["consistency", "sentinel", "paper"] = "consistency"
    sentinel: Sentinel = Sentinel()
    quiet_on_changes: bool = Field(
        default=False,
        description="calibrate so that after JPEG, noise, a text overlay and other honest changes, each on its own, at most "
        "twice max_fpr are flagged; fewer clean pictures are, and of tiny pictures fewer attacked ones",
    )
    evaluate: Evaluate = Evaluate()

    @model_validator(mode="after")
    def _parts_fit(self) -> Recipe:
        if self.victim.keyed or self.auxiliary.keyed:
            raise ValueError("only `bmp` can be keyed: the others are public encoders")
        if self.bmp.keyed and (self.pixels.height % KEY_BLOCK or self.pixels.width % KEY_BLOCK):
            raise ValueError(f"bmp.keyed needs a height and a width that are multiples of {KEY_BLOCK}")
        for role in ("victim", "auxiliary", "bmp"):
            spec: EncoderSpec = getattr(self, role)
            if spec.pretrain and spec.pretrain.split == "public" and self.splits.public == 0:
                raise ValueError(f"{role}.pretrain asks for the split `public`, but splits.public is 0")
        return self


class _Loader(yaml.SafeLoader):
    """YAML whose mappings say each key once: of two, PyYAML keeps the later without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """See the class."""
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(problem=f"`{key.value}` stands twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def load_recipe(path: Path) -> Recipe:
    """Read a recipe. RecipeError says which key or value is wrong, and which key was probably meant."""
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror})") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}, line {mark.line + 1}, column {mark.column + 1}" if mark else path
        raise RecipeError(f"{where}: this cannot be read as YAML ({error.problem})") from None
    except RecursionError:
        raise RecipeError(f"{path}: is nested too deep for a recipe") from None
    except (yaml.reader.ReaderError, UnicodeDecodeError):
        raise RecipeError(f"{path}: is not UTF-8, or has characters that YAML does not know") from None
    if not isinstance(raw, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys to values")
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        lines = [_explain(item["loc"], item["type"], item["msg"]) for item in error.errors()]
        raise RecipeError("\n".join([f"{path}:", *lines])) from None


def _explain(loc: tuple[int | str, ...], kind: str, message: str) -> str:
    where = ".".join(str(part) for part in loc)
    if kind != "extra_forbidden":
        return f"  {where or 'recipe'}: {message.removeprefix('Value error, ')}"
    close = difflib.get_close_matches(str(loc[-1]), _keys_at(loc[:-1]), n=1, cutoff=0.5)
    hint = f"did you mean `{close[0]}`?" if close else f"known are {', '.join(_keys_at(loc[:-1]))}"
    return f"  {where}: there is no such key; {hint}"


def _keys_at(loc: tuple[int | str, ...]) -> list[str]:
    """The keys that the schema knows at a place in the recipe."""
    model: Any = Recipe
    for part in loc:
        annotation = model.model_fields[str(part)].annotation
        model = next((t for t in (annotation, *get_args(annotation)) if hasattr(t, "model_fields")), Recipe)
    return list(model.model_fields)
