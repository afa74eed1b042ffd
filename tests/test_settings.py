"""dreml/settings.py: every setting is an option, stands in the run's name and record, and makes other members."""

import json
from dataclasses import Field, fields, replace

import pytest

import train
from dreml.cli import Parser
from dreml.files import write_record
from dreml.images import ImageSpec
from dreml.runs import FORMAT, DataRecord, RunRecord, read_run_record
from dreml.settings import LEARNING_RATES, Settings, add_settings, settings_of


def parse(*options: str) -> Settings:
    parser = Parser(prog="test")
    add_settings(parser.add_argument_group("the method"))
    return settings_of(parser.parse_args(options))


def record_of(settings: Settings, fingerprint: str = "f") -> RunRecord:
    data = DataRecord(fingerprint, [0.5] * 3, [0.2] * 3, {})
    options = {"data_path": "data"}
    return RunRecord(format=FORMAT, settings=settings, data=data, options=options, environment={})


def other_values(field: Field) -> list:
    """Values of a setting beside its default: all where they can be counted, else two."""
    if choices := field.metadata["argument"]["choices"]:
        return [choice for choice in choices if choice != field.default]
    if isinstance(field.default, bool):
        return [not field.default]
    if isinstance(field.default, int):
        return [field.default + 1, field.default + 2]
    return ["none", "other"] if isinstance(field.default, str) else [0.5, 0.25]


@pytest.mark.parametrize("field", fields(Settings), ids=lambda field: field.name)
def test_every_setting_has_an_option_a_tag_and_an_entry_and_makes_another_run(field, tmp_path):
    given = ["--lr", "0.3", "--precision", "fp32"]  # which else depend on the optimizer and on the device
    in_every_name = ["data_name", "backbone", "meta_class_size", "num_epochs", "seed", "lr", "precision"]
    plain = parse(*given)
    found, plain_tags = [plain], set(plain.run_name().split("_"))
    for value in other_values(field):
        if value == getattr(plain, field.name):
            continue
        option = [f"--{field.name}", str(value)]
        if isinstance(field.default, bool):
            option = [f"--no_{field.name}" if field.default else f"--{field.name}"]
        settings = parse(*given, *option)
        assert settings == replace(plain, **{field.name: value})
        tags = set(settings.run_name().split("_"))
        assert (len(tags - plain_tags), len(plain_tags - tags)) == (1, field.name in in_every_name)
        write_record(tmp_path / "args.json", record_of(settings))
        assert json.loads((tmp_path / "args.json").read_text())["settings"][field.name] == value
        assert read_run_record(tmp_path).settings == settings
        found.append(settings)
    assert len(found) > 1
    assert record_of(plain).settings_hash != record_of(plain, fingerprint="g").settings_hash  # other data
    for identify in (Settings.run_name, lambda settings: record_of(settings).settings_hash):
        assert len({identify(settings) for settings in found}) == len(found)


def test_without_options_the_settings_are_the_defaults():
    assert parse() == Settings()
    for optimizer, lr in LEARNING_RATES.items():
        assert parse("--optimizer", optimizer).lr == Settings(optimizer=optimizer).lr == lr
    assert Settings(image_size=64, resize="squash").image_spec == ImageSpec(64, "squash")


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ([], "tiny_resnet18_D12_e12_s0"),
        (["--ensemble_size", "48", "--recalls", "1", "--embedding", "pooled"], "tiny_resnet18_D12_e12_s0"),
        (["--backbone", "resnet50", "--meta_class_size", "5", "--num_epochs", "3"], "tiny_resnet50_D5_e3_s0"),
        (["--seed", "7", "--batch_size", "64", "--image_size", "128"], "tiny_resnet18_D12_e12_s7_i128_b64"),
        (["--lr", "3e-05", "--no_flip", "--weights", "none"], "tiny_resnet18_D12_e12_s0_lr3e-05_wnone_noflip"),
        (["--weights", "sha256:abcdef0123"], "tiny_resnet18_D12_e12_s0_wabcdef01"),
        (["--weights", "imagenet:resnet18-f37072fd.pth"], "tiny_resnet18_D12_e12_s0"),
        (["--resize", "squash", "--image_size", "64"], "tiny_resnet18_D12_e12_s0_i64_squash"),
        (["--optimizer", "sgd", "--lr", "1e-4"], "tiny_resnet18_D12_e12_s0_sgd_lr0.0001"),
        (["--scale_min", "0.5", "--mixup"], "tiny_resnet18_D12_e12_s0_scale0.5_mixup"),
    ],
)
def test_run_name(options, name):
    """Of the settings as they are when a run begins: with the tag of the weights in place of their path."""
    assert settings_of(train.parse_args(["--data_name", "tiny", *options])).run_name() == name
