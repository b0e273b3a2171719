"""What the documents name exists: files, links, make targets, settings, options. Both languages have the same parts."""

from __future__ import annotations

import ast
import json
import pickle
import re
import shlex
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from cogvlm_ft.config import load_config
from cogvlm_ft.grounding.wording import load_wording
from cogvlm_ft.settings import Config
from cogvlm_ft.shards.formats import FORMATS, recognise_format
from cogvlm_ft.shards.negatives import load_lexicon
from cogvlm_ft.shards.packing.candidates import Candidate
from cogvlm_ft.shards.packing.decisions import load_decisions

REPOSITORY = Path(__file__).resolve().parents[2]
READMES = [REPOSITORY / "README.md", REPOSITORY / "README_zh.md"]
DATA = [REPOSITORY / "docs/data.md", REPOSITORY / "docs/data_zh.md"]
STATED = {"coco-xywh": "coco", "coco-xyxy": "coco"}  # a format that is never recognised -> its part of the page
FORMAT_PAGES = [REPOSITORY / "docs/formats.md", REPOSITORY / "docs/formats_zh.md"]
WORDING_PAGES = [REPOSITORY / "docs/wording.md", REPOSITORY / "docs/wording_zh.md"]
METRICS = [REPOSITORY / "docs/metrics.md", REPOSITORY / "docs/metrics_zh.md"]
PERFORMANCE = [REPOSITORY / "docs/performance.md", REPOSITORY / "docs/performance_zh.md"]
PREDICT = [REPOSITORY / "docs/predict.md", REPOSITORY / "docs/predict_zh.md"]
TROUBLE = [REPOSITORY / "docs/troubleshooting.md", REPOSITORY / "docs/troubleshooting_zh.md"]
DOCUMENTS = sorted(
    path for pattern in ("*.md", "docs/*.md", "slurm/*.md", "bench/*.md") for path in REPOSITORY.glob(pattern)
)
INSTALL = [REPOSITORY / "docs/install.md", REPOSITORY / "docs/install_zh.md"]
SLURM = [REPOSITORY / "docs/slurm.md", REPOSITORY / "docs/slurm_zh.md"]
BATCH_PROGRAMS = {  # what their arguments go to
    "slurm/train.sbatch": "launch/train.py",
    "slurm/evaluate.sbatch": "launch/evaluate.py",
    "slurm/after.sbatch": "launch/best.py",
}
PRESETS = sorted(REPOSITORY.glob("configs/grounding_*.yaml"))
YOURS = ["model.path=m", "data.shards=s", "output_dir=o"]  # what a preset leaves to its user
PARAMETERS_17B = 17_639_685_376  # tests/unit/model/test_structure.py counts them

CODE_BLOCK = re.compile(r"^```[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
CODE_SPAN = re.compile(r"`([^`\n]+)`")
OWN_PATH = re.compile(
    r"(?<![\w./-])(?:(?:cogvlm_ft|launch|shards|configs|slurm|tests|docs|bench|\.ci)/[\w./*-]*"
    r"|(?:grounding|model|runtime|data|checkpoints|tracking|planning|evaluate|predict|report|train|export|doctor|jobs)"
    r"/\w+\.py)"  # short for cogvlm_ft/...
)
ROOT_FILE = re.compile(r"(?<![\w./-])(?:[A-Z][A-Za-z_]+\.md|Makefile|setup\.py|pyproject\.toml|constraints\.txt)\b")
SETTING = re.compile(r"(?<![\w./-])(?:model|data|train|evaluate|checkpoint|tracking)\.[a-z]\w*(?![\w./])")
FILE_ENDINGS = {"py", "yaml", "json", "jsonl", "md", "safetensors", "sbatch"}  # train.py is a file, not a setting


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
            is_section = any(name.startswith(f"{key}.") for name in settings())
            assert key in settings() or is_section or key.rpartition(".")[2] in FILE_ENDINGS, (
                f"there is no setting {key}"
            )


def with_options(program: Path) -> Iterator[Path]:
    """Yield the files with a program's options: its own, those of all programs, and those it imports `add_...` from."""
    yield from (program, REPOSITORY / "cogvlm_ft/command_line.py")
    for node in nodes(program) if program.suffix == ".py" else ():
        if isinstance(node, ast.ImportFrom) and any(name.name.startswith("add_") for name in node.names):
            yield REPOSITORY / f"{str(node.module).replace('.', '/')}.py"


def nodes(file: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(file.read_text("utf-8")))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_fit_their_programs(document: Path) -> None:
    """Every --option is one of the program's, and every key=value is accepted."""
    for words in commands(document):
        program = next(word for word in words if re.fullmatch(r"(launch|shards|slurm)/\w+\.(py|sbatch)", word))
        given = words[words.index(program) + 1 :]
        source = REPOSITORY / BATCH_PROGRAMS.get(program, program)
        known = {node.value for path in with_options(source) for node in nodes(path) if isinstance(node, ast.Constant)}
        options = [word for word in given if word.startswith("--")]
        assert set(options) <= known, f"{program} has no {set(options) - known}"
        if source.name in ("train.py", "doctor.py") and "--config" in given:
            config = given[given.index("--config") + 1]
            load_config(next(iter(REPOSITORY.glob(config)), config), YOURS + [word for word in given if "=" in word])


@pytest.mark.parametrize(
    "pair",
    [READMES, DATA, FORMAT_PAGES, WORDING_PAGES, METRICS, PERFORMANCE, PREDICT, TROUBLE, SLURM, INSTALL],
    ids=lambda pair: pair[0].stem,
)
def test_both_languages_have_the_same_parts(pair: list[Path]) -> None:
    english, chinese = (path.read_text(encoding="utf-8") for path in pair)
    headings = [re.findall(r"^(#+) ", CODE_BLOCK.sub("", text), re.MULTILINE) for text in (english, chinese)]
    assert headings[0] == headings[1]
    assert len(CODE_BLOCK.findall(english)) == len(CODE_BLOCK.findall(chinese))
    assert list(commands(pair[0])) == list(commands(pair[1]))
    rows = [re.findall(r"^\|.*\|$", text, re.MULTILINE) for text in (english, chinese)]
    assert len(rows[0]) == len(rows[1])


@pytest.mark.parametrize("pair", [DATA, FORMAT_PAGES, WORDING_PAGES], ids=lambda pair: pair[0].stem)
def test_the_code_blocks_about_data_are_the_same_in_both_languages(pair: list[Path]) -> None:
    """Only their comments are translated."""
    english, chinese = (
        [re.sub(r"(?m)(^|\s+)# .*$", "", block) for block in CODE_BLOCK.findall(path.read_text(encoding="utf-8"))]
        for path in pair
    )
    assert english and english == chinese


def anchors(document: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", CODE_BLOCK.sub("", document.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_to_a_heading_lead_to_one(document: Path) -> None:
    for page, anchor in re.findall(r"\]\(([\w./-]*)#([^)]+)\)", document.read_text(encoding="utf-8")):
        assert anchor in anchors(document.parent / page if page else document), f"{page}#{anchor}"


@pytest.mark.parametrize("document", FORMAT_PAGES, ids=lambda path: path.name)
def test_every_format_is_linked_from_the_table(document: Path) -> None:
    rows = re.findall(r"^\|[^|]+\| \[`([\w-]+)`\]\(#([\w-]+)\) \|", document.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(rows) == sorted((name, STATED.get(name, name)) for name in FORMATS)


def data_example(name: str) -> str:
    """The first code block below this heading."""
    text = FORMAT_PAGES[0].read_text(encoding="utf-8")
    found = re.search(rf"^#+ {re.escape(name)}\n.*?(?=^#|\Z)", text, re.DOTALL | re.MULTILINE)
    assert found, f"no part called {name}"
    return CODE_BLOCK.findall(found[0])[0]


def write_example(name: str, folder: Path) -> Path:
    """The example of a format as files; what --annotations would be."""
    text = data_example(name)
    if name == "refcoco":
        refs = json.loads(text)
        box = {"id": refs[0]["ann_id"], "image_id": refs[0]["image_id"], "bbox": [1, 2, 3, 4]}
        image = {"id": refs[0]["image_id"], "file_name": "COCO_train2014_000000000005.jpg"}
        (folder / "instances.json").write_text(json.dumps({"images": [image], "annotations": [box]}))
        (folder / "refs(unc).p").write_bytes(pickle.dumps(refs))
        return folder
    if name == "cogvlm-sft":
        for line in text.splitlines():
            path, _, content = line.partition(" ")
            (folder / path).parent.mkdir(exist_ok=True)
            (folder / path).write_text(content.strip(), encoding="utf-8")
        return folder
    if name == "yolo":
        (folder / "classes.txt").write_text("dog\ncat\nbus\n")
    endings = {"voc": "xml", "cvat": "xml", "yolo": "txt", "labelme": "json", "csv": "csv"}
    path = folder / f"example.{endings.get(name, 'json')}"
    path.write_text(text, encoding="utf-8")
    return folder if name == "yolo" else path


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in STATED])
def test_the_example_of_a_format_is_one(name: str, tmp_path: Path) -> None:
    annotations = write_example(name, tmp_path)
    assert recognise_format(annotations)[0] == name
    parts = list(FORMATS[name].read(annotations, tmp_path))
    candidates = [part for part in parts if isinstance(part, Candidate)]
    problems = [problem for candidate in candidates for problem in candidate.problems]
    assert candidates and all(problem.is_note for problem in [*problems, *set(parts).difference(candidates)]), parts
    assert all(candidate.targets or candidate.turns for candidate in candidates)
    assert len(data_example(name).splitlines()) == 3


def test_the_other_examples_about_data_can_be_used(tmp_path: Path) -> None:
    pages = (DATA[0], WORDING_PAGES[0])
    blocks = [block for page in pages for block in CODE_BLOCK.findall(page.read_text(encoding="utf-8"))]
    (tmp_path / "own").mkdir()
    (steps,) = (block for block in blocks if block.startswith("# my.yaml"))
    (mix,) = (block for block in blocks if block.startswith("# a mix"))
    (tmp_path / "own" / "report.yaml").write_text(steps.replace("\nen:", "\nzh: &texts") + "en: *texts\n")
    for name, text in (("my.yaml", steps), ("mix.yaml", mix)):
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert load_wording(tmp_path / name).max_boxes in (20, 30)
    (synonyms,) = (block for block in blocks if block.startswith("synonyms:"))
    (tmp_path / "mine.yaml").write_text(synonyms, encoding="utf-8")
    words = load_lexicon(tmp_path / "mine.yaml")
    assert words.concept("叉车") == words.concept("forklift") and words.concept("forklift") in words.relatives(
        ["vehicle"]
    )
    decisions = [block for block in blocks if block.startswith('{"decisions"')]
    for block in decisions:
        (tmp_path / "decisions.json").write_text(block, encoding="utf-8")
        assert len(load_decisions(tmp_path / "decisions.json")) == 3
    assert len(decisions) == 2


def test_every_reason_of_a_rejection_is_explained() -> None:
    """What the code calls a reason stands in the tables of both languages."""
    reasons = set()
    for path in [*REPOSITORY.glob("shards/packing/*.py"), *REPOSITORY.glob("shards/formats/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in ("Rejected", "Problem")
            ):
                reasons |= {str(word.value) for word in node.args[1:2] if isinstance(word, ast.Constant) and word.value}
    assert len(reasons) > 30
    for document in FORMAT_PAGES:
        explained = set(CODE_SPAN.findall(document.read_text(encoding="utf-8")))
        assert reasons <= explained, f"{document.name}: {sorted(reasons - explained)}"


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
