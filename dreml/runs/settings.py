"""The options that define the members of a run, each in one place. A new one is one field of `Settings` and its use."""

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from typing import NamedTuple

from dreml.console import data_set_name, fraction, natural_number, number_or_all, positive_float, seed_number
from dreml.data.images import RESIZES, ImageSpec

PRECISIONS = ("fp32", "bf16", "fp16")  # what the backbone computes in
EMBEDDINGS = ("logits", "pooled")  # "logits" is the method


class Recipe(NamedTuple):
    """The learning rate of an optimizer, and after which shares of the epochs it falls to a tenth."""

    lr: float
    milestones: tuple[float, float]


RECIPES = {  # docs/METHOD.md, step 4
    "adam": Recipe(lr=1e-4, milestones=(0.5, 0.7)),
    "sgd": Recipe(lr=1e-2, milestones=(0.5, 0.8)),  # of the authors' own code, whose momentum is 0.9
}


def weights_in_name(tag: str) -> str:
    """The initial weights in a run's name: "wnone", "wabcdef01" for a file, nothing for ImageNet's."""
    return "" if tag.startswith("imagenet") else f"w{tag.removeprefix('sha256:')[:8]}"


def backbone_in_name(backbone: str) -> str:
    """The backbone in a run's name: Windows allows no colon there."""
    return backbone.replace(":", "-")


def option(
    default: object,
    in_name: Callable[[object], str],
    help_text: str | None,
    metavar: str | None = None,
    type: Callable | None = None,
    choices: tuple[str, ...] | None = None,
) -> object:
    """A field of `Settings`: its default, how a value stands in the run's name, and its command line option."""
    argument = {"help": help_text, "metavar": metavar, "type": type, "choices": choices}
    return field(default=default, metadata={"in_name": in_name, "argument": argument})


ALWAYS_IN_NAME = ("data_name", "backbone", "meta_class_size", "num_epochs", "seed")  # others where not at their default
DATA_HELP = "car (default), cub, sop, isc, or another with a cache"
SCALE_HELP = "crop windows of random side, M * S to S (default: 1.0)"
SCHEDULE_HELP = "steps (default), or onecycle: up, then down to 0"
PRECISION_HELP = "auto (default: bf16, or fp16, where the device is fast in it, else fp32), fp32, bf16 or fp16"


@dataclass(frozen=True)
class Settings:
    """What defines the members of a run. Another value of any of these makes another run folder."""

    data_name: str = option("car", "{}".format, DATA_HELP, "NAME", data_set_name)
    backbone: str = option("resnet18", backbone_in_name, "of torchvision, or timm:NAME (default: resnet18)", "NAME")
    meta_class_size: int = option(12, "D{}".format, "meta-classes (default: 12), or all classes", "D", number_or_all)
    num_epochs: int = option(12, "e{}".format, "epochs a member (default: 12)", "E", natural_number)
    seed: int = option(0, "s{}".format, "start of all random draws (default: 0)", type=seed_number)
    image_size: int = option(256, "i{}".format, "crops, pixels (default: 256)", "S", natural_number)
    resize: str = option("crop", "{}".format, "crop (default), or squash: cuts nothing off", "R", choices=RESIZES)
    batch_size: int = option(128, "b{}".format, "images a step (default: 128)", "B", natural_number)
    optimizer: str = option(
        "adam", "{}".format, "adam (default), or sgd: with momentum 0.9, decay later", "O", choices=tuple(RECIPES)
    )
    schedule: str = option("steps", "{}".format, SCHEDULE_HELP, "S", choices=("steps", "onecycle"))
    lr: float | None = option(None, "lr{!r}".format, "learning rate (default: 1e-4; for sgd 0.01)", type=positive_float)
    weights: str = option("imagenet", weights_in_name, "imagenet (default), none, or the path of a state dict", "W")
    flip: bool = option(True, "noflip".format, "no mirroring: mirror images are other classes")
    scale_min: float = option(1.0, "scale{!r}".format, SCALE_HELP, "M", fraction)
    mixup: bool = option(False, "mixup".format, "mix each image and its class with another one")
    precision: str = option("auto", "{}".format, PRECISION_HELP, "P", choices=("auto", *PRECISIONS))

    def __post_init__(self):
        check_values(self)
        if self.lr is None:
            object.__setattr__(self, "lr", RECIPES[self.optimizer].lr)

    @property
    def image_spec(self) -> ImageSpec:
        """Size and resize of the images: which cache is read."""
        return ImageSpec(self.image_size, self.resize)

    def run_name(self) -> str:
        """`<data>_<backbone>_D<D>_e<epochs>_s<seed>` and a tag for each other setting that is not at its default.

        Made before "auto" becomes a precision, and after `weights` became a tag (`model.weights_tag`).
        """
        return joined_tags(self, replace(Settings(), lr=RECIPES[self.optimizer].lr), ALWAYS_IN_NAME)

    def without_seed(self) -> dict[str, object]:
        """What several seeds of one experiment share."""
        return {name: value for name, value in asdict(self).items() if name != "seed"}


# ------------------------------------------------------------------------------------------------ any kind of settings


def check_values(settings: object) -> None:
    """Raises ValueError for a value that is of another type than its default, or none of its choices.

    Settings also come from records, which may be somebody else's. A default of None stands for a float.
    """
    for each in fields(settings):
        choices, value = each.metadata["argument"]["choices"], getattr(settings, each.name)
        kinds = (float, type(None)) if each.default is None else (type(each.default),)
        if type(value) not in kinds:
            raise ValueError(f"{each.name} is {value!r}, not a {kinds[0].__name__}")
        if choices and value not in choices:
            raise ValueError(f"{each.name} is {value!r}, not one of {', '.join(choices)}")


def joined_tags(settings: object, defaults: object, always: tuple[str, ...]) -> str:
    """The tags of the fields in `always`, and of those that differ from their defaults, as a name."""
    tags = []
    for each in fields(settings):
        value = getattr(settings, each.name)
        if each.name in always or value != getattr(defaults, each.name):
            tags.append(each.metadata["in_name"](value))
    return "_".join(tag for tag in tags if tag)


def add_settings(group: argparse._ArgumentGroup, kind: type = Settings) -> None:
    """Adds the option of every field of `kind` to a parser. A field that is true at its default is --no_FIELD.

    One without a help text has no option.
    """
    for each in fields(kind):
        argument = {key: value for key, value in each.metadata["argument"].items() if value is not None}
        if each.default is True:
            group.add_argument(f"--no_{each.name}", dest=each.name, action="store_false", **argument)
        elif each.default is False:
            group.add_argument(f"--{each.name}", action="store_true", **argument)
        elif "help" in argument:
            group.add_argument(f"--{each.name}", default=each.default, **argument)


def settings_of(args: argparse.Namespace, kind: type = Settings) -> object:
    """The settings among parsed options, an instance of `kind`."""
    return kind(**{each.name: getattr(args, each.name) for each in fields(kind) if hasattr(args, each.name)})
