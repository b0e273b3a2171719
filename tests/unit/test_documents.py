"""What the documents name exists: files, links, make targets, settings, options. The two READMEs say the same."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from cogvlm_ft.config import Config, load_config

REPOSITORY = Path(__file__).resolve().parents[2]
READMES = [REPOSITORY / "README.md", REPOSITORY / "README_zh.md"]
DOCUMENTS = sorted(
    path for pattern in ("*.md", "docs/*.md", "slurm/*.md", "bench/*.md") for path in REPOSITORY.glob(pattern)
)
PRESETS = sorted(REPOSITORY.glob("configs/grounding_*.yaml"))
YOURS = ["model.path=m", "data.shards=s", "output_dir=o"]  # what a preset leaves to its user
PARAMETERS_17B = 17_639_685_376  # tests/unit/model/test_structure.py counts them

CODE_BLOCK = re.compile(r"^```[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
CODE_SPAN = re.compile(r"`([^`\n]+)`")
OWN_PATH = re.compile(
    r"(?<![\w./-])(?:(?:cogvlm_ft|launch|shards|configs|slurm|tests|docs|bench|\.ci)/[\w./*-]*"
    r"|(?:grounding|model|runtime|data|evaluate|train)/\w+\.py)"  # short for cogvlm_ft/...
)
ROOT_FILE = re.compile(r"(?<![\w./-])(?:[A-Z][A-Za-z_]+\.md|Makefile|setup\.py|pyproject\.toml|constraints\.txt)\b")
SETTING = re.compile(r"(?<![\w./-])(?:model|data|train|evaluate|checkpoint|tracking)\.[a-z]\w*(?![\w./])")
FILE_ENDINGS = {"py", "yaml", "json", "jsonl", "md", "safetensors"}  # train.py is a file, not a setting


def code_of(document: Path) -> list[str]:
    """Code blocks, then the code spans between them."""
    text = document.read_text(encoding="utf-8")
    return CODE_BLOCK.findall(text) + CODE_SPAN.findall(CODE_BLOCK.sub("", text))


def commands(document: Path) -> Iterator[list[str]]:
    """The words of every line of every code block that is a command; a backslash goes on with the next line."""
    for block in CODE_BLOCK.findall(document.read_text(encoding="utf-8")):
        for line in block.replace("\\\n", " ").splitlines():
            if re.search(r"\b(?:launch|shards|slurm)/\w+\.(?:py|sbatch)\b", line):
                yield shlex.split(line, comments=True)


def settings(group: type = Config, prefix: str = "") -> set[str]:
    """Every key of a run: seed, train.lr, ..."""
    default = group()
    found = set()
    for field in fields(group):
        value = getattr(default, field.name)
        found |= settings(type(value), f"{prefix}{field.name}.") if is_dataclass(value) else {prefix + field.name}
    return found


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_named_files_and_links_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for name in OWN_PATH.findall(text) + ROOT_FILE.findall(text):
        name = name.rstrip(".")
        assert any((*REPOSITORY.glob(name), *(REPOSITORY / "cogvlm_ft").glob(name))), f"{name} does not exist"
    for link in re.findall(r"\]\(([^)#\s]+)", text):
        assert (document.parent / link).exists(), f"the link to {link} leads nowhere"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_named_make_targets_exist(document: Path) -> None:
    targets = re.findall(r"^([a-z-]+):.*## ", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for code in code_of(document):
        assert set(re.findall(r"\bmake ([a-z-]+)", code)) <= set(targets), code


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_named_settings_exist(document: Path) -> None:
    for code in code_of(document):
        for key in SETTING.findall(code):
            assert key in settings() or key.rpartition(".")[2] in FILE_ENDINGS, f"there is no setting {key}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_fit_their_programs(document: Path) -> None:
    """Every --option is one of the program's, and every key=value is accepted."""
    for words in commands(document):
        program = next(word for word in words if re.fullmatch(r"(launch|shards|slurm)/\w+\.(py|sbatch)", word))
        given = words[words.index(program) + 1 :]
        source = REPOSITORY / ("launch/train.py" if program.endswith(".sbatch") else program)
        known = {
            node.value for node in ast.walk(ast.parse(source.read_text("utf-8"))) if isinstance(node, ast.Constant)
        }
        options = [word for word in given if word.startswith("--")]
        assert set(options) <= known, f"{program} has no {set(options) - known}"
        if source.name == "train.py" and "--config" in given:
            config = given[given.index("--config") + 1]
            load_config(REPOSITORY / config, YOURS + [word for word in given if "=" in word])


def test_the_readmes_have_the_same_parts() -> None:
    english, chinese = (path.read_text(encoding="utf-8") for path in READMES)
    headings = [re.findall(r"^(#+) ", CODE_BLOCK.sub("", text), re.MULTILINE) for text in (english, chinese)]
    assert headings[0] == headings[1]
    assert len(CODE_BLOCK.findall(english)) == len(CODE_BLOCK.findall(chinese))
    assert list(commands(READMES[0])) == list(commands(READMES[1]))
    rows = [re.findall(r"^\|.*\|$", text, re.MULTILINE) for text in (english, chinese)]
    assert len(rows[0]) == len(rows[1])


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.name)
def test_the_defaults_in_the_table_are_the_defaults(readme: Path) -> None:
    defaults = OmegaConf.structured(Config)
    rows = re.findall(r"^\| `([a-z_.]+)` \| ([^|]+) \|", readme.read_text(encoding="utf-8"), re.MULTILINE)
    stated = [(key, value) for key, value in rows if key in settings()]
    assert len(stated) >= 10
    for key, value in stated:
        assert OmegaConf.from_dotlist([f"x={value}"]).x == OmegaConf.select(defaults, key), key


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.name)
def test_the_memory_table_is_the_arithmetic(readme: Path) -> None:
    rows = re.findall(r"^\| (\d+) \| (\d+\.\d) \|", readme.read_text(encoding="utf-8"), re.MULTILINE)
    assert [int(num_gpus) for num_gpus, _ in rows] == [4, 8, 16, 32]
    for num_gpus, gib in rows:
        assert float(gib) == round(PARAMETERS_17B * 16 / int(num_gpus) / 2**30, 1)


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_presets_load_and_tell_their_command(preset: Path) -> None:
    config = load_config(preset, YOURS)
    header = re.match(r"(?:#.*\n)+", preset.read_text(encoding="utf-8"))
    assert header and f"--config configs/{preset.name}" in header[0]
    assert config.model.image_size is not None and config.model.image_size % 14 == 0
    num_patches = (config.model.image_size // 14) ** 2
    assert config.data.max_sequence_length >= num_patches + 3 + 1000, "no room for the turns of a photo"
