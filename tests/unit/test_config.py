"""Settings from defaults, a YAML file and the command line, and what is said about mistakes in them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from cogvlm_ft.config import (
    ENGINE_PRESETS,
    config_sha256,
    find_preset,
    load_config,
    load_run_config,
    save_config,
    written_settings,
)
from cogvlm_ft.errors import ConfigError
from cogvlm_ft.settings import Config
from cogvlm_ft.terminal import plain_text

MANDATORY = ["output_dir=runs/x", "model.path=models/tiny", "data.shards=shards_out"]

WriteYaml = Callable[[str], Path]


@pytest.fixture
def write_yaml(tmp_path: Path) -> WriteYaml:
    def write(text: str) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_defaults_then_yaml_then_command_line(write_yaml: WriteYaml) -> None:
    path = write_yaml(
        "train: {lr: 1e-5, epochs: 3, max_steps: 10}\ndata: {shards: from_yaml}\nmodel: {freeze: [a.*]}\n"
    )
    overrides = [
        "output_dir=runs/x",
        "model.path=models/tiny",
        "train.epochs=7",
        "train.epochs=8",
        "train.max_steps=null",
    ]
    config = load_config(path, overrides)
    assert config.train.global_batch_size == Config().train.global_batch_size == 16  # nobody said anything
    assert (config.train.lr, config.data.shards, config.model.freeze) == (1e-5, "from_yaml", ["a.*"])  # YAML
    assert (config.train.epochs, config.train.max_steps) == (8, None)  # command line, the last one
    assert (config.output_dir, config.model.path) == ("runs/x", "models/tiny")


def test_a_yaml_file_is_not_needed(write_yaml: WriteYaml) -> None:
    assert load_config(None, MANDATORY) == load_config(write_yaml(""), MANDATORY)
    assert isinstance(load_config(None, MANDATORY), Config)


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("tracking.name=a=b", ("tracking", "name", "a=b")),
        ("tracking.name=2024", ("tracking", "name", "2024")),
        ("tracking.name=中文", ("tracking", "name", "中文")),
        ("train.lr=1e-5", ("train", "lr", 1e-5)),
        ("train.lr=1", ("train", "lr", 1.0)),
        ("train.tf32=true", ("train", "tf32", True)),
        ("evaluate.max_samples=null", ("evaluate", "max_samples", None)),
        ("model.freeze=[model.vision.*,lm_head.*]", ("model", "freeze", ["model.vision.*", "lm_head.*"])),
    ],
)
def test_values_on_the_command_line(override: str, wanted: tuple[str, str, object]) -> None:
    section, name, value = wanted
    found = getattr(getattr(load_config(None, [*MANDATORY, override]), section), name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("yaml", "overrides", "wanted"),
    [
        pytest.param("train: {lrr: 1}", [], r"--config .*config\.yaml: train\.lrr.*'lr'", id="unknown in YAML"),
        pytest.param("trian: {lr: 1}", [], r"--config .*config\.yaml: trian.*'train'", id="unknown section"),
        pytest.param(
            "", ["train.epoch=1"], r"command line train\.epoch=1: train\.epoch.*'epochs'", id="unknown option"
        ),
        pytest.param("", ["trian.lr=1"], r"command line trian\.lr=1: .*'train'", id="unknown section on command line"),
        pytest.param("just some text", [], r"--config .*just some text", id="text instead of keys"),
    ],
)
def test_an_unknown_key_is_named_with_its_source_and_the_nearest(
    write_yaml: WriteYaml, yaml: str, overrides: list[str], wanted: str
) -> None:
    with pytest.raises(ConfigError, match=wanted):
        load_config(write_yaml(yaml), MANDATORY + overrides)


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("train.lr=fast", r"train\.lr: found 'fast'; expected a number, such as 1e-5"),
        ("train.epochs=2.5", r"train\.epochs: found '2\.5'; expected a whole number"),
        ("train.epochs=null", r"train\.epochs: found null or nothing; expected a whole number"),
        ("train.tf32=maybe", r"train\.tf32: found 'maybe'; expected true or false"),
        ("train.epochs=[1]", r"train\.epochs"),
        ("train=5", r"command line train=5: found 5; expected settings"),
        ("train.digit_weights=[null,1,1]", r"train\.digit_weights\[0\]: found null or nothing; expected a number"),
        (
            "output_dir=${HOME}/x",
            r"output_dir: .*'HOME' not found\. Expected .* environment variable as \$\{oc\.env:NAME\}",
        ),
        (
            "train.lr_scale.lm_head.*=0.5",
            r"train\.lr_scale=\{'lm_head': .*: expected a number for each pattern, such as",
        ),
        ("model.freeze.0=a", r"model\.freeze\.0=a: found a part of a list or mapping; expected the whole, such as"),
        ("model=null", r"model: found null or nothing; expected a value"),
        ("train.nope=5", r"train\.nope: found an unknown setting; expected one of docs/config\.md"),
        ("=5", r"command line =5"),
    ],
)
def test_a_value_of_the_wrong_type(override: str, wanted: str) -> None:
    with pytest.raises(ConfigError, match=wanted):
        load_config(None, [*MANDATORY, override])


def test_a_value_of_the_wrong_type_in_yaml_names_the_file(write_yaml: WriteYaml) -> None:
    with pytest.raises(ConfigError, match=r"--config .*train\.epochs"):
        load_config(write_yaml("train: {epochs: many}"), MANDATORY)


@pytest.mark.parametrize("override", ["train.lr", "resume", "--train.lr", ""])
def test_a_setting_without_an_equals_sign(override: str) -> None:
    with pytest.raises(ConfigError, match=r"on the command line: settings are written key=value"):
        load_config(None, [*MANDATORY, override])


def test_missing_settings_are_all_named(write_yaml: WriteYaml) -> None:
    with pytest.raises(ConfigError, match=r"no value for data\.shards, model\.path, output_dir: .*data\.shards=\.\.\."):
        load_config(None)
    with pytest.raises(ConfigError, match=r"no value for model\.path: set it .*model\.path=\.\.\."):
        load_config(write_yaml("output_dir: x\ndata: {shards: y}"))


def test_a_yaml_file_that_is_not_there(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing.yaml", tmp_path):
        with pytest.raises(ConfigError, match=rf"--config {path}: no such file"):
            load_config(path, MANDATORY)


@pytest.mark.parametrize(
    "yaml",
    [
        pytest.param("train: [1", id="open bracket"),
        pytest.param("train: lr: 1", id="two colons"),
        pytest.param("\ttrain: {}", id="tab"),
        pytest.param("train: {lr: 1, lr: 2}", id="key twice"),
        pytest.param("- train\n- data\n", id="list"),
        pytest.param("train:\n", id="empty section"),
    ],
)
def test_yaml_that_cannot_be_used_names_its_file(write_yaml: WriteYaml, yaml: str) -> None:
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        load_config(write_yaml(yaml), MANDATORY)


def test_a_reference_to_an_unknown_key_names_where_it_stands(write_yaml: WriteYaml) -> None:
    assert load_config(write_yaml("train: {lr: '${train.min_lr_ratio}'}"), MANDATORY).train.lr == 0.1
    with pytest.raises(ConfigError, match=r"train\.lr"):
        load_config(write_yaml("train: {lr: '${no.such.key}'}"), MANDATORY)


def test_yaml_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(b"output_dir: caf\xe9\n")
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        load_config(path, MANDATORY)


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("train.precision=fp16", r"train\.precision='fp16': expected one of fp32, bf16"),
        ("train.precision=BF16", r"train\.precision='BF16'"),
        ("tracking.mode=of", r"tracking\.mode='of': expected one of auto, online, offline, disabled"),
        ("evaluate.gather=all", r"evaluate\.gather='all': expected one of auto, once, layerwise"),
        ("evaluate.decoding=beam", r"evaluate\.decoding='beam': expected one of free, grammar"),
        ("evaluate.min_boxes=1", r"evaluate\.min_boxes=1: needs evaluate\.decoding=grammar"),
    ],
)
def test_choices(override: str, wanted: str) -> None:
    with pytest.raises(ConfigError, match=wanted):
        load_config(None, [*MANDATORY, override])


def test_every_choice_is_accepted() -> None:
    for precision in ("fp32", "bf16"):
        assert load_config(None, [*MANDATORY, f"train.precision={precision}"]).train.precision == precision
    for mode in ("auto", "online", "offline", "disabled"):
        assert load_config(None, [*MANDATORY, f"tracking.mode={mode}"]).tracking.mode == mode


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "least"),
    [
        ("train.epochs", 1),
        ("train.max_steps", 1),
        ("train.global_batch_size", 1),
        ("train.micro_batch_size", 1),
        ("train.lr", 0),
        ("train.min_lr_ratio", 0),
        ("train.warmup_fraction", 0),
        ("train.weight_decay", 0),
        ("train.max_grad_norm", 0),
        ("train.log_every", 1),
        ("train.patience", 1),
        ("data.num_workers", 0),
        ("data.max_turns_per_image", 1),
        ("data.max_bad_fraction", 0),
        ("evaluate.every_epochs", 1),
        ("evaluate.max_samples", 1),
        ("evaluate.batch_size", 1),
        ("evaluate.min_boxes", 0),
        ("evaluate.max_new_tokens", 1),
        ("evaluate.num_pictures", 0),
        ("checkpoint.every_steps", 1),
        ("checkpoint.keep_last", 1),
    ],
)
def test_bounds(key: str, least: int) -> None:
    load_config(None, [*MANDATORY, f"{key}={least}"])
    with pytest.raises(ConfigError, match=rf"{key}={least - 1}.*expected at least {least}"):
        load_config(None, [*MANDATORY, f"{key}={least - 1}"])


@pytest.mark.parametrize("key", ["train.lr", "train.max_grad_norm", "train.warmup_fraction"])
def test_not_a_number_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key}=nan"):
        load_config(None, [*MANDATORY, f"{key}=nan"])


def test_a_saved_config_loads_as_the_same(tmp_path: Path) -> None:
    overrides = [
        "train.lr=3e-6",
        "train.max_steps=5",
        "model.freeze=[model.vision.*]",
        'train.lr_scale={"model.vision.*": 0.1, lm_head.*: 0}',
        "tracking.name=试验",
        "resume=false",
    ]
    config = load_config(None, MANDATORY + overrides)
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert load_config(tmp_path / "config.yaml", ["train.lr=1"]).train.lr == 1


def test_a_mapping_given_later_replaces_an_earlier_one(tmp_path: Path) -> None:
    """It is not merged with it, so that `{}` clears; a key inside a mapping changes that entry alone."""
    file = tmp_path / "a.yaml"
    file.write_text("train:\n  lr_scale: {lm_head.*: 0.0}\n  monitor: {mean_iou: 1, not_found_acc: 1}\n")
    assert load_config(file, [*MANDATORY, "train.lr_scale={}"]).train.lr_scale == {}
    twice = load_config(file, [*MANDATORY, "train.lr_scale={a*: 2}", "train.lr_scale={b*: 3}", "train.lr=1"])
    assert twice.train.lr_scale == {"b*": 3} and twice.train.monitor == {"mean_iou": 1, "not_found_acc": 1}
    section = load_config(file, [*MANDATORY, "train={lr_scale: {c*: 4}, monitor: {mean_iou: 2}}"]).train
    assert (section.lr_scale, section.monitor) == ({"c*": 4}, {"mean_iou": 2})
    inside = load_config(file, [*MANDATORY, "train.monitor.mean_iou=3"]).train
    assert inside.monitor == {"mean_iou": 3, "not_found_acc": 1}


def test_the_hash_is_of_the_resolved_settings(tmp_path: Path) -> None:
    config = load_config(None, MANDATORY)
    save_config(config, tmp_path / "config.yaml")
    assert config_sha256(load_config(tmp_path / "config.yaml")) == config_sha256(config)
    assert config_sha256(load_config(None, [*MANDATORY, "train.epochs=5"])) == config_sha256(config)  # the default
    assert config_sha256(replace(config, seed=1)) != config_sha256(config)
    assert len(config_sha256(config)) == 64


def test_two_configs_share_nothing() -> None:
    first, second = load_config(None, MANDATORY), load_config(None, MANDATORY)
    first.model.freeze.append("x")
    first.train.lr = 7
    assert (second.model.freeze, second.train.lr) == ([], 5e-5)


def test_presets_are_found_by_path_and_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_config("grounding_980", MANDATORY).model.image_size == 980
    shipped = find_preset("zero3", ENGINE_PRESETS, "deepspeed=")
    assert shipped.name == "zero3.json" and Config().deepspeed == "zero3"
    monkeypatch.chdir(tmp_path)  # away from the checkout, also with the path that older configs hold
    assert load_config("configs/grounding_980.yaml", MANDATORY).model.image_size == 980
    assert find_preset("configs/deepspeed/zero3.json", ENGINE_PRESETS, "deepspeed=") == shipped
    Path("zero3").write_text("{}")
    assert find_preset("zero3", ENGINE_PRESETS, "deepspeed=") == Path("zero3")  # a file that exists wins


def test_an_unknown_preset_lists_the_names() -> None:
    with pytest.raises(ConfigError, match=r"deepspeed=zero4: no such file or preset; .*one of single_gpu, zero3, "):
        find_preset("zero4", ENGINE_PRESETS, "deepspeed=")
    with pytest.raises(ConfigError, match=r"--config absent: no such file or preset; .*grounding_490"):
        load_config("absent", MANDATORY)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.max_sequence_length=-1", "expected at least 1"),
        ("train.beta1=1.5", "expected at least 0 and less than 1"),
        ("train.beta2=1", "less than 1"),
        ("train.eps=0", "expected more than 0"),
        ("train.warmup_fraction=2", "at most 1"),
        ("train.min_lr_ratio=1.5", "at most 1"),
        ("data.max_bad_fraction=5", "at most 1"),
        ("data.augment.hue=0.6", r"at most 0\.5"),
        ("data.augment.min_crop=0.01", r"at least 0\.05"),
        ("train.lr=inf", "expected a finite number"),
        ("train.weight_decay=nan", "expected a finite number"),
        ("train.box_loss.weight=-1", "expected at least 0"),
        ("train.box_loss.kind=iou", "expected one of expected, giou"),
        ("seed=-1", "expected at least 0"),
        ("seed=9223372036854775808", r"at most 9\.223372037e\+18"),
        ("data.resize=stretch", "expected one of squash, letterbox$"),
        ("output_dir=$HOME/runs", "environment variables are not expanded"),
    ],
)
def test_values_out_of_bounds(override: str, expected: str) -> None:
    key, _, value = override.partition("=")
    with pytest.raises(ConfigError, match=rf"^{key}='?{value.replace('$', '.')}.*{expected}"):
        load_config(None, [*MANDATORY, override])


@pytest.mark.parametrize("value", ["[0,0,0]", "[1,-1,1]", "[nan,1,1]", "[4,2]", "[4,2,1,1]", "[]"])
def test_values_in_a_list_out_of_bounds(value: str) -> None:
    expected = "more than 0" if value.count(",") == 2 else "3 values"
    with pytest.raises(ConfigError, match=rf"^train\.digit_weights=\[.*\]: expected .*{expected}"):
        load_config(None, [*MANDATORY, f"train.digit_weights={value}"])
    assert load_config(None, [*MANDATORY, "train.digit_weights=[4,2,1]"]).train.digit_weights == [4, 2, 1]


def test_no_path_holds_the_character_nul(write_yaml: WriteYaml) -> None:
    with pytest.raises(ConfigError, match=r"^output_dir='a\\x00b': expected a text without the character NUL"):
        load_config(write_yaml('output_dir: "a\\0b"'), MANDATORY[1:])


def test_a_date_is_a_seed() -> None:
    assert load_config(None, [*MANDATORY, "seed=20251128"]).seed == 20251128


def test_the_environment_is_read_for_the_user_s_own_settings_and_is_written_nowhere(
    write_yaml: WriteYaml, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "s3cret")
    monkeypatch.setenv("WORKERS", "3")
    address = "https://me:${oc.env:SECRET}@host/shards"
    own = write_yaml(f"data: {{shards: '{address}', val_shards: '${{data.shards}}'}}")
    config = load_config(own, ["output_dir=o", "model.path=m", "data.num_workers=${oc.env:WORKERS}"])
    assert config.data.shards == config.data.val_shards == "https://me:s3cret@host/shards"
    assert config.data.num_workers == 3
    assert written_settings(config)["data"]["shards"] == address

    run = tmp_path / "run"
    run.mkdir()
    save_config(config, run / "config.yaml")
    (run / "run.json").touch()
    text = (run / "config.yaml").read_text()
    assert address in text and "num_workers: ${oc.env:WORKERS}" in text and "s3cret" not in text
    monkeypatch.setenv("SECRET", "another")
    assert config_sha256(load_config(own, ["output_dir=o", "model.path=m", "data.num_workers=${oc.env:WORKERS}"])) == (
        config_sha256(config)
    )

    # In a run folder, which may be somebody else's, nothing is expanded; what the command line says replaces it.
    with pytest.raises(
        ConfigError, match=r"data\.shards: .*not expanded in a run folder.*Give data\.shards="
    ) as raised:
        load_config(run / "config.yaml")
    assert "another" not in str(raised.value)
    typed = [f"data.shards={address}", "data.val_shards=null", "data.num_workers=0"]
    assert load_config(run / "config.yaml", typed).data.shards == "https://me:another@host/shards"
    shown = load_run_config(run / "config.yaml")
    assert (shown.data.shards, shown.data.num_workers) == (address, Config().data.num_workers)
    (tmp_path / "link.yaml").symlink_to(run / "config.yaml")
    with pytest.raises(ConfigError, match="not expanded in a run folder"):
        load_config(tmp_path / "link.yaml")


@pytest.mark.parametrize(
    "text", ["${oc.env:SECRET}", "x/${ oc.env:SECRET,x}", "${oc.${train.precision}:SECRET}", "${now:}"]
)
def test_no_resolver_gets_out_of_a_run_folder(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "s3cret")
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "config.yaml").write_text(f"data: {{wording: '{text}', shards: [{{path: '{text}'}}]}}")
    with pytest.raises(ConfigError, match="not expanded in a run folder"):
        load_config(tmp_path / "config.yaml", ["output_dir=o", "model.path=m"])


def test_the_environment_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "s3cret")
    for setting in ("tracking.name=${oc.env:SECRET}", "train.lr=${oc.env:SECRET}", "data.resize=${oc.env:SECRET}"):
        with pytest.raises(ConfigError, match=r"\$\{oc\.env:SECRET\}") as raised:
            load_config(None, [*MANDATORY, setting])
        assert "s3cret" not in str(raised.value)
    with pytest.raises(ConfigError, match=r"output_dir: .*'NOT_SET' not found.* Set it"):
        load_config(None, [*MANDATORY, "output_dir=${oc.env:NOT_SET}"])
    load_config(None, [*MANDATORY, "data.shards=https://host/${oc.env:SECRET}/x"])
    assert plain_text("GET https://host/s3cret/x") == "GET https://host/${oc.env:SECRET}/x"  # logs and errors, too


@pytest.mark.parametrize(
    "written",
    ["20241128_120000", "0123", "1e5", "5e10234", "12:30:00", "yes", "2024-11-28", "a: b", "{a}", "[a]", "@x"],
)
def test_text_is_taken_as_it_is_written(written: str, write_yaml: WriteYaml, tmp_path: Path) -> None:
    keys = ("output_dir", "tracking.name", "data.shards", "model.path")
    config = load_config(None, [f"{key}={written}" for key in keys])
    found = (config.output_dir, config.tracking.name, config.data.shards, config.model.path)
    if written[0] not in "[{":
        assert found == (written,) * 4
    assert found[:2] == (written, written)
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config
    if re.fullmatch(r"[\w:-]+", written):
        own = write_yaml(
            f"output_dir: {written}\ndata: {{shards: [{{path: {written}, weight: 5e-1}}]}}\nmodel: {{path: x}}"
        )
        assert load_config(own).output_dir == written
        assert load_config(own).data.shards == [{"path": written, "weight": 0.5}]


def test_what_a_comment_a_quote_and_none_mean(write_yaml: WriteYaml) -> None:
    assert load_config(None, [*MANDATORY, "output_dir=runs/a #2"]).output_dir == "runs/a #2"
    assert load_config(None, [*MANDATORY, "output_dir='0123'"]).output_dir == "0123"
    unset = ["tracking.name=None", "data.cache_dir=None", "data.resize=None", "train.patience=None"]
    config = load_config(write_yaml("evaluate: {probe: None, max_samples: none}"), [*MANDATORY, *unset])
    assert (config.tracking.name, config.data.cache_dir, config.data.resize, config.train.patience) == (None,) * 4
    assert (config.evaluate.probe, config.evaluate.max_samples) == (None, None)
    for single in ("model.freeze=model.vision.*", "model.freeze=*vision*"):
        with pytest.raises(ConfigError, match=r"model\.freeze.*(expected a list, such as|in quotes|not valid YAML)"):
            load_config(None, [*MANDATORY, single])


def test_the_home_folder_is_expanded_where_a_path_is_used_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = load_config(None, ["output_dir=~/runs/x", "model.path=~/model", "data.shards=~/shards"])
    assert (config.output_dir, config.model.path, config.data.shards) == ("~/runs/x", "~/model", "~/shards")
    assert (config.output_path, config.model.folder) == (tmp_path / "runs" / "x", tmp_path / "model")
    save_config(config, tmp_path / "config.yaml")
    assert "~/runs/x" in (tmp_path / "config.yaml").read_text() and str(tmp_path) not in config.output_dir
    assert load_config("~/config.yaml") == config
