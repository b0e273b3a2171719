"""The layering, read from the imports: arrows point down, nothing goes in circles, files and functions stay short."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60

# The floors of the house, from the ground up (docs/architecture.md). A room may import every room of the floors below.
FLOORS: tuple[set[str], ...] = (
    {
        *("errors", "colours", "settings", "config", "run_folder", "safetensors_io", "html_page", "command_line"),
        *("pinned_memory", "terminal", "plain_files", "yaml_text", "written_values", "setting_rules"),
        *("adapter_settings", "tile_settings", "resample"),
    },
    {"grounding", "model", "runtime"},
    {"data", "checkpoints", "tracking"},
    {"build", "planning", "evaluate"},
    {"predict", "report"},
    {"train", "export", "doctor", "jobs"},
    {"rehearsal"},
    {"launch"},
)
ROOMS = set().union(*FLOORS)
MAY_IMPORT: dict[str, set[str]] = {
    room: set().union(*FLOORS[:number]) for number, floor in enumerate(FLOORS) for room in floor
} | {
    **{room: {"errors"} for room in FLOORS[0] - {"errors"}},
    "tile_settings": {"setting_rules"},
    "adapter_settings": {"errors", "setting_rules"},
    "settings": {"errors", "setting_rules", "adapter_settings", "tile_settings"},
    "config": {"errors", "settings", "adapter_settings", "run_folder", "terminal", "plain_files", "written_values"},
    "written_values": {"errors", "settings", "yaml_text"},
    "yaml_text": {"errors", "plain_files"},
    "safetensors_io": {"errors", "plain_files"},
    "html_page": {"errors", "colours"},
    "command_line": {"errors", "pinned_memory", "terminal"},
    "launch": ROOMS | {"shards"},
    "rehearsal": ROOMS - {"launch", "rehearsal"} | {"shards"},
    "shards": {
        *("errors", "colours", "settings", "html_page", "command_line", "terminal", "plain_files", "yaml_text"),
        *("grounding", "data"),
    },
}
# Packing runs where there is no torch: of data, shards/ takes what needs none.
DATA_FOR_SHARDS = {
    f"cogvlm_ft.data.{name}"
    for name in (
        "record",
        "index",
        "shard_sets",
        "tars",
        "reader",
        "pixels",
        "plan",
        "frames",
        "look",
        "cutting",
        "row_streams",
    )
}
HEAVY = ("torch", "transformers", "deepspeed")
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "shelve"}
# RefCOCO is published as pickles. This module alone reads them, after it has checked that every instruction of the
# file makes a plain value; its class refuses to import anything.
PLAIN_PICKLE = "cogvlm_ft.shards.formats.plain_pickle"
# Checkpoints of the official repository are pickles of torch. This module alone loads them, weights_only.
TORCH_PICKLE = "cogvlm_ft.checkpoints.sat"

Imports = Mapping[str, set[str]]


@cache
def sources() -> dict[str, Path]:
    """Module name -> file, of everything that is shipped."""
    files = [path for folder in ("cogvlm_ft", "launch", "shards") for path in (REPOSITORY / folder).rglob("*.py")]
    return {module_name(path): path for path in sorted(files)}


def module_name(path: Path) -> str:
    """As it is imported: launch/ and shards/ are links inside cogvlm_ft/."""
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    parts = parts if parts[0] == "cogvlm_ft" else ("cogvlm_ft", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(sources()[module].read_text(encoding="utf-8"))


def imported_names(node: ast.AST) -> Iterator[str]:
    """Every dotted name a module imports, inside functions too; `from a import b` gives a and a.b."""
    for part in ast.walk(node):
        if isinstance(part, ast.Import):
            yield from (alias.name for alias in part.names)
        elif isinstance(part, ast.ImportFrom):
            assert part.level == 0 and part.module, "imports are absolute here"
            yield part.module
            yield from (f"{part.module}.{alias.name}" for alias in part.names)


@cache
def own_imports() -> dict[str, set[str]]:
    """Module -> the modules of ours that it imports; of a package and its module, only the module."""
    found = {}
    for module in sources():
        names = {name for name in imported_names(tree(module)) if name in sources() and name != module}
        found[module] = {name for name in names if not any(other.startswith(f"{name}.") for other in names)}
    return found


def room_of(module: str) -> str:
    first, _, rest = module.partition(".")
    return rest.partition(".")[0] if first == "cogvlm_ft" and rest else first


def arrows_up(imports: Imports) -> list[str]:
    """Imports that leave their room for one they may not know."""
    return [
        f"{module} imports {name}"
        for module, names in imports.items()
        for name in sorted(names)
        if name != "cogvlm_ft"  # which holds the version
        and room_of(module) != room_of(name)
        and room_of(name) not in MAY_IMPORT.get(room_of(module), set())
    ]


def circles(imports: Imports) -> list[list[str]]:
    """Modules that import themselves by way of others: one chain for each circle that is met."""
    done: set[str] = set()
    found: list[list[str]] = []

    def visit(module: str, chain: list[str]) -> None:
        if module in chain:
            found.append([*chain[chain.index(module) :], module])
        elif module not in done:
            for name in sorted(imports.get(module, ())):
                visit(name, [*chain, module])
            done.add(module)

    for module in imports:
        visit(module, [])
    return found


def test_the_checks_find_what_they_look_for() -> None:
    bad = {"cogvlm_ft.model.a": {"cogvlm_ft.runtime.b"}, "cogvlm_ft.data.c": {"cogvlm_ft.train.d"}}
    assert arrows_up(bad) == [
        "cogvlm_ft.model.a imports cogvlm_ft.runtime.b",
        "cogvlm_ft.data.c imports cogvlm_ft.train.d",
    ]
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c", "a"]]
    assert set(imported_names(ast.parse("def f():\n    from torch import load"))) == {"torch", "torch.load"}
    assert "cogvlm_ft.model.layout" in own_imports()["cogvlm_ft.model.cogvlm"]


def test_every_module_has_a_room() -> None:
    assert {room_of(module) for module in sources()} <= set(MAY_IMPORT) | {"cogvlm_ft"}


def test_arrows_point_down() -> None:
    assert not arrows_up(own_imports())


def test_no_circles() -> None:
    assert not circles(own_imports())


def test_shards_take_only_the_light_part_of_data() -> None:
    taken = {name for module, names in own_imports().items() if room_of(module) == "shards" for name in names}
    assert {name for name in taken if room_of(name) == "data"} <= DATA_FOR_SHARDS


def test_only_runtime_knows_deepspeed() -> None:
    outside = [module for module in sources() if room_of(module) != "runtime"]
    for module in outside:
        known = {name for name in imported_names(tree(module)) if name.startswith(("deepspeed", "torch.distributed"))}
        assert not known, f"{module} imports {known}"


@pytest.mark.parametrize("room", ["grounding", "shards"])
def test_imports_no_torch(room: str) -> None:
    """Really imported, in a process of its own: what they import in turn counts too."""
    modules = [module for module in sources() if room_of(module) == room]
    modules += DATA_FOR_SHARDS if room == "shards" else []
    code = f"import sys, {', '.join(modules)}; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_remote_code_and_no_pickles() -> None:
    for module, path in sources().items():
        assert "trust_remote_code" not in path.read_text(encoding="utf-8"), path
        names = set(imported_names(tree(module))) | {
            ast.unparse(node) for node in ast.walk(tree(module)) if isinstance(node, ast.Attribute)
        }
        if module == PLAIN_PICKLE:
            names -= {"pickle", "pickle.Unpickler"}
        if module == TORCH_PICKLE:
            calls = [node for node in ast.walk(tree(module)) if isinstance(node, ast.Call)]
            loads = [ast.unparse(call) for call in calls if ast.unparse(call.func) == "torch.load"]
            assert loads and all("weights_only=True" in call for call in loads)
            names -= {"torch.load"}
        assert not names & (PICKLES | {"torch.load"}), path


def test_files_and_functions_are_short() -> None:
    for module, path in sources().items():
        num_lines = len(path.read_text(encoding="utf-8").splitlines())
        assert num_lines <= MAX_FILE_LINES, f"{path} has {num_lines} lines"
        for node in ast.walk(tree(module)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert node.end_lineno is not None
                num_lines = node.end_lineno - node.lineno + 1
                assert num_lines <= MAX_FUNCTION_LINES, f"{path}: {node.name} has {num_lines} lines"
