"""The options that define the members of a run. To add one, add a field to `Settings` and use it."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace

from dreml.cli import MANY, check_ranges, data_set_name
from dreml.images import RESIZES, ImageSpec

PRECISIONS = ("fp32", "bf16", "fp16")  # what the backbone computes in
EMBEDDINGS = ("logits", "pooled")  # "logits" is the method
ALL_CLASSES = 0  # --meta_class_size all, until train.py knows how many there are

# For each optimizer (docs/METHOD.md, step 4): its learning rate, and the shares of the epochs when it is divided by 10.
LEARNING_RATES = {"adam": 1e-4, "sgd": 1e-2}  # sgd: as in the authors' code, with momentum 0.9
MILESTONES = {"adam": (0.5, 0.7), "sgd": (0.5, 0.8)}


def number_of_meta_classes(text: str) -> int:
    """argparse type: a positive integer, or "all", which is ALL_CLASSES."""
    if text == "all":
        return ALL_CLASSES
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a positive integer nor all")
    return int(text)


def option(
    default: object,
    in_name: Callable[[object], str],
    help_text: str,
    metavar: str | None = None,
    type: Callable | None = None,
    choices: tuple[str, ...] | None = None,
    limits: tuple[float, float] | None = None,
) -> object:
    """Define a field of `Settings`: its default, its form in the run's name, and its command line option.

    `limits`: the smallest and the largest value.
    """
    argument = {"help": help_text, "metavar": metavar, "type": type, "choices": choices}
    return field(default=default, metadata={"in_name": in_name, "argument": argument, "limits": limits})


ALWAYS_IN_NAME = ("data_name", "backbone", "meta_class_size", "num_epochs", "seed")  # others if not at default
META_CLASSES_HELP = "meta-classes of a member, or all: each class is one (default: 12)"
SCHEDULE_HELP = "steps (default), or onecycle, which goes up and then down to 0"
PRECISION_HELP = "fp32, bf16 or fp16 (default: auto, bf16 or fp16 where the device is fast in it)"


@dataclass(frozen=True)
class Settings:
    """The settings that define the members of a run. Changing any of them makes another run folder."""

    data_name: str = option(
        "car", "{}".format, "data set: car (default), cub, sop, isc, or your own", "NAME", data_set_name
    )
    backbone: str = option(
        "resnet18",
        lambda name: name.replace(":", "-"),  # Windows allows no colons in file names
        "network of torchvision, or timm:NAME (default: resnet18)",
        "NAME",
    )
    meta_class_size: int = option(12, "D{}".format, META_CLASSES_HELP, "D", number_of_meta_classes, limits=(0, MANY))
    num_epochs: int = option(12, "e{}".format, "epochs of each member (default: 12)", "E", int, limits=(1, MANY))
    seed: int = option(0, "s{}".format, "start of all random draws (default: 0)", "N", int, limits=(0, 2**32 - 1))
    image_size: int = option(
        256, "i{}".format, "side of the square crops in pixels (default: 256)", "S", int, limits=(1, 2048)
    )
    resize: str = option("crop", "{}".format, "crop (default), or squash, which cuts nothing off", "R", choices=RESIZES)
    batch_size: int = option(128, "b{}".format, "images of a step (default: 128)", "B", int, limits=(2, MANY))
    optimizer: str = option(
        "adam", "{}".format, "adam (default), or sgd with momentum 0.9 and later decay", "O", choices=tuple(MILESTONES)
    )
    schedule: str = option("steps", "{}".format, SCHEDULE_HELP, "S", choices=("steps", "onecycle"))
    lr: float | None = option(
        None, "lr{!r}".format, "learning rate (default: 1e-4; of sgd 0.01)", "LR", float, limits=(1e-30, 1e30)
    )
    weights: str = option(
        "imagenet",
        lambda tag: "" if tag.startswith("imagenet") else f"w{tag.removeprefix('sha256:')[:8]}",
        "initial weights: imagenet (default), none, or a file of your own",
        "W",
    )
    flip: bool = option(True, "noflip".format, "do not mirror images, where a mirror image is another class")
    scale_min: float = option(
        1.0, "scale{!r}".format, "crop windows of M * S to S pixels (default: 1.0)", "M", float, limits=(1e-9, 1)
    )
    mixup: bool = option(False, "mixup".format, "mix each image and its class with another one of its batch")
    precision: str = option("auto", "{}".format, PRECISION_HELP, "P", choices=("auto", *PRECISIONS))

    def __post_init__(self):
        if self.lr is None:
            object.__setattr__(self, "lr", LEARNING_RATES[self.optimizer])

    @property
    def image_spec(self) -> ImageSpec:
        """Size and resize of the images, which select the cache."""
        return ImageSpec(self.image_size, self.resize)

    def run_name(self) -> str:
        """Return `<data>_<backbone>_D<D>_e<epochs>_s<seed>` and a tag for each other setting not at its default.

        Call it after `weights` is replaced by its tag (`backbones.weights_tag`), and before "auto" by a precision.
        """
        defaults = replace(Settings(), lr=LEARNING_RATES[self.optimizer])
        tags = []
        for each in fields(self):
            value = getattr(self, each.name)
            if each.name in ALWAYS_IN_NAME or value != getattr(defaults, each.name):
                tags.append(each.metadata["in_name"](value))
        return "_".join(tag for tag in tags if tag)


def add_settings(group: argparse._ArgumentGroup) -> None:
    """Add the option of every setting to a parser: --FIELD, or --no_FIELD for one that is true by default."""
    for each in fields(Settings):
        argument = {key: value for key, value in each.metadata["argument"].items() if value is not None}
        if each.default is True:
            group.add_argument(f"--no_{each.name}", dest=each.name, action="store_false", **argument)
        elif each.default is False:
            group.add_argument(f"--{each.name}", action="store_true", **argument)
        else:
            group.add_argument(f"--{each.name}", default=each.default, **argument)


def settings_of(args: argparse.Namespace) -> Settings:
    """Make the settings from parsed options. Raises InputError for a number outside its limits."""
    limits = {each.name: each.metadata["limits"] for each in fields(Settings)}
    check_ranges(args, **{name: limit for name, limit in limits.items() if limit})
    return Settings(**{each.name: getattr(args, each.name) for each in fields(Settings)})
