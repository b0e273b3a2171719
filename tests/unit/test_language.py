"""Texts use the field's terms, function docstrings open with a verb, lines of prose in Markdown are short.

`python tests/unit/test_language.py [ROOM ...]` prints what the checks find, in these rooms or everywhere.
When a docstring opens with a verb that `VERBS` lacks, add the verb.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parents[2]
MAX_PROSE_CHARACTERS = 100
MAX_FRACTION_WITHOUT_VERB = 0.05

# What a text must not say -> what it says instead.
REPLACEMENTS = {
    r"\bforetold\b|\bforetells?\b|\bforetelling\b": "estimated, estimate",
    r"\banew\b|\bonce more\b": "again",
    r"\bmend(s|ed|ing)?\b": "fix",
    r"\bwanted\b": "expected",
    r"\bfor ever\b": "indefinitely",
    r"\bfor good\b(?! reason)": "permanently",
    r"\b(of|every|after|at most|at least) so (many|much|large|long|few)\b": "N, at most N, num_...",
    r"\bnobody measured\b": "not measured",
    r"\bholds? to\b": "follows",
    r"\b(go|goes|going|went) on from\b": "resume, continue from",
    r"\bstands in\b(?! for)": "is in",
    r"\bpassed over\b": "skipped",
    r"\bthings? that (is|are) (not )?there\b|\babsent things?\b": "present target, absent target",
    r"\bis no (valid|multiple|whole|finite)\b": "is not a valid ..., is not a multiple",
    r"\bis no (setting|number|file|folder|list|mapping|checkpoint|image|box)\b": "is not a ...",
    r"\ba training(?=[.,;:)]|$|\s+(that|which|is|was|ends|has|lasts|goes|started|stops|runs|in|from|and)\b)": (
        "a training run"
    ),
}
# "there is no file" is right, "it is no file" is not.
FORBIDDEN = [
    (re.compile(f"(?<![Tt]here )(?:{expression})", re.IGNORECASE), better)
    for expression, better in REPLACEMENTS.items()
]
ANY_FORBIDDEN = re.compile("|".join(f"(?:{expression})" for expression in REPLACEMENTS), re.IGNORECASE)
"""Finds whatever one of FORBIDDEN finds, and more, in one search per text: nearly all texts have none of them."""

# Verbs that a function docstring may open with.
VERBS = """
Abort Accept Accumulate Acquire Activate Add Adjust Advance Align Allocate Allow Annotate Announce Answer Append Apply
Approximate Arrange Ask Assemble Assert Assign Attach Attend Augment Average Await Backpropagate Balance Begin Bind
Block Bound Branch Break Broadcast Build Bundle Cache Calculate Call Cancel Cap Cast Catch Center Centre Change Check
Choose Clamp Classify Clean Clear Clip Clone Close Coalesce Collapse Collate Collect Combine Compare Compile Complete
Compress Compute Concatenate Configure Confirm Connect Consolidate Construct Consume Continue Convert Copy Correct
Count Cover Create Crop Cut Decide Declare Decode Decorate Decrease Deduplicate Defer Define Delegate Delete Deliver
Derive Describe Deserialize Detach Detect Determine Disable Discard Disconnect Distribute Divide Download Draw Drop
Dump Embed Emit Enable Encode End Enforce Enlarge Ensure Enter Enumerate Erase Escape Estimate Evaluate Examine
Exchange Exclude Execute Exit Expand Expect Explain Export Expose Extend Extract Fail Feed Fetch Fill Filter Find
Finish Fit Fix Flatten Flip Flush Fold Follow Force Fork Format Forward Free Freeze Fuse Gather Generate Get Give Go
Group Guarantee Guard Guess Halt Handle Hash Hide Highlight Hold Identify Ignore Implement Import Include Increase
Increment Index Infer Inherit Initialize Inject Insert Inspect Install Instantiate Interpolate Interrupt Intersect
Invert Invoke Issue Iterate Join Judge Keep Kill Label Launch Leave Let Limit Link List Listen Load Locate Lock Log Look
Lower Make Map Mark Mask Match Materialize Measure Merge Mirror Mix Move Multiply Name Narrow Negate Normalize Note
Notify Number Obtain Offer Offload Omit Open Order Override Overwrite Pack Pad Parse Partition Pass Paste Pause Pick
Pin Place Plan Play Point Poll Pop Populate Position Postpone Predict Prefetch Prefix Prepare Prepend Preprocess
Preserve Prevent Print Probe Process Produce Project Propagate Propose Prove Provide Prune Publish Pull Push Put Query
Queue Quote Raise Randomize Rank Read Rebuild Receive Recognise Recognize Recompute Record Recover Redirect Reduce
Refer Refuse Register Reject Release Reload Remember Remove Rename Render Reopen Reorder Repeat Replace Replay Reply
Report Represent Request Require Reserve Reset Reshape Reshard Resize Resolve Respond Restart Restore Restrict Resume
Retrieve Retry Return Reuse Reverse Revert Rewrite Rotate Round Route Run Sample Save Scale Scan Schedule Score Search
Select Send Separate Serialize Serve Set Shard Show Shrink Shuffle Shut Sign Signal Simplify Simulate Skip Slice Sort
Spawn Specify Split Squash Stack Stage Start State Stop Store Stream Strip Submit Substitute Subtract Suggest Sum
Summarise Summarize Supply Survey Suspend Swap Switch Sync Synchronise Synchronize Tag Take Tell Terminate Test Time
Toggle Tokenize Track Train Transfer Transform Translate Trim Truncate Try Turn Unfold Unpack Unwrap Update Upload Use
Validate Verify Visit Wait Walk Warn Watch Weight Wrap Write Yield Zero
"""


class Text(NamedTuple):
    """A comment, docstring, literal, or line of a document."""

    room: str
    place: str  # file:line
    text: str


def room_of(path: Path) -> str:
    """Return the room of a source file, or the name of a document without its ending and language."""
    parts = path.relative_to(REPOSITORY).parts
    if path.suffix == ".md":
        return "/".join(parts).removesuffix(".md").removesuffix("_zh").removesuffix("/README")
    if parts[0] == "cogvlm_ft" and len(parts) > 1:
        return parts[1].removesuffix(path.suffix)
    return parts[0]


@cache
def files(*endings: str) -> list[Path]:
    """List the shipped files with these endings; links inside cogvlm_ft/ are not followed."""
    found = [
        path
        for folder in ("cogvlm_ft", "launch", "shards", "configs", "slurm")
        for path in (REPOSITORY / folder).rglob("*")
        if path.suffix in endings and not any(part.is_symlink() for part in path.parents if part != REPOSITORY)
    ]
    return sorted(found)


@cache
def documents() -> list[Path]:
    return sorted(
        path
        for pattern in ("*.md", "docs/*.md", "slurm/*.md", "bench/*.md", "docs/*/*.md")
        for path in REPOSITORY.glob(pattern)
    )


@cache
def nodes(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def comments_and_literals(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of every comment and every string, docstrings and parts of f-strings too."""
    source = path.read_text(encoding="utf-8")
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in nodes(path):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, re.sub(r"\s+", " ", node.value)


def english_texts() -> Iterator[Text]:
    for path in files(".py"):
        for line, text in comments_and_literals(path):
            yield Text(room_of(path), f"{path.relative_to(REPOSITORY)}:{line}", text)
    pages = files(".html", ".js", ".css", ".yaml", ".json", ".sbatch", ".sh")
    for path in [*pages, *(path for path in documents() if not path.stem.endswith("_zh"))]:
        for line, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            yield Text(room_of(path), f"{path.relative_to(REPOSITORY)}:{line}", text)


def forbidden_words() -> Iterator[Text]:
    """Yield every text with a word that has a replacement, as `what was found -> what to write`."""
    for room, place, text in english_texts():
        if not ANY_FORBIDDEN.search(text):
            continue
        for expression, better in FORBIDDEN:
            for found in expression.finditer(text):
                around = text[max(0, found.start() - 30) : found.end() + 30].strip()
                yield Text(room, place, f"{found[0]!r} -> {better}: ... {around} ...")


def opens_with_a_verb(docstring: str) -> bool:
    """Decide by the first word; in `Name of a sample` and `Rank 0` it is a noun."""
    words = re.match(r"([A-Z][a-z]+)\b(?! of\b| \d)(?!['’])", docstring.lstrip())
    return words is not None and words[1] in VERBS.split()


@cache
def function_docstrings() -> list[Text]:
    """List `name: first line` of every function that has a docstring, properties aside: these name a value."""
    found = []
    for path in files(".py"):
        for node in nodes(path):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            is_property = any("property" in ast.unparse(decorator) for decorator in node.decorator_list)
            if not is_property and (docstring := ast.get_docstring(node)):
                place = f"{path.relative_to(REPOSITORY)}:{node.lineno}"
                found.append(Text(room_of(path), place, f"{node.name}: {docstring.splitlines()[0]}"))
    return found


def docstrings_without_a_verb() -> list[Text]:
    return [found for found in function_docstrings() if not opens_with_a_verb(found.text.partition(": ")[2])]


def long_lines() -> Iterator[Text]:
    """Yield the lines of prose that are too long: not tables, code, the targets of links, or a single word."""
    for path in documents():
        in_code = False
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            in_code ^= line.lstrip().startswith("```")
            shown = re.sub(r"\]\([^)]*\)", "]", line.rstrip())
            if in_code or line.lstrip().startswith(("|", "```", "<")) or " " not in line.strip():
                continue
            if len(shown) > MAX_PROSE_CHARACTERS:
                yield Text(room_of(path), f"{path.relative_to(REPOSITORY)}:{number}", f"{len(shown)} characters")


def with_places(texts: Iterable[Text]) -> list[str]:
    return [f"{place}: {text}" for _, place, text in texts]


def test_every_text_uses_the_fields_terms() -> None:
    found = with_places(forbidden_words())
    assert not found, "\n".join(found)


def test_function_docstrings_open_with_a_verb() -> None:
    num_functions = len(function_docstrings())
    found = with_places(docstrings_without_a_verb())
    assert len(found) <= MAX_FRACTION_WITHOUT_VERB * num_functions, (
        f"{len(found)} of {num_functions} function docstrings do not open with a verb\n" + "\n".join(found)
    )


def test_lines_of_prose_in_markdown_are_short() -> None:
    found = with_places(long_lines())
    assert not found, "\n".join(found)


def test_the_checks_find_what_they_are_for() -> None:
    bad = "We foretell it anew. Mended. found 1, wanted 2. of so many images. Kept for ever. It is no multiple of 3."
    assert sum(len(expression.findall(bad)) for expression, _ in FORBIDDEN) == 7
    good = "There is no file, and it stands in for a training run. Recommended, amended, for good reason; share, said."
    assert not any(expression.search(good) for expression, _ in FORBIDDEN)
    for opening in ("Return the newest one.", "Save it in the background.", "Yield each."):
        assert opens_with_a_verb(opening)
    for opening in (
        "Returns one.",
        "The newest.",
        "Name of a sample.",
        "What it takes.",
        "float32[n].",
        "Collective. Save.",
    ):
        assert not opens_with_a_verb(opening)


def print_what_is_left(rooms: list[str]) -> None:
    """Print what the checks find in these rooms, or in all of them, and how many docstrings that is by room."""
    docstrings = docstrings_without_a_verb()
    for room, place, text in [*forbidden_words(), *long_lines(), *docstrings]:
        if not rooms or room in rooms:
            print(f"{place}: {text}")
    for name in rooms or sorted({room for room, _, _ in function_docstrings()}):
        total = sum(room == name for room, _, _ in function_docstrings())
        print(f"{name}: {sum(room == name for room, _, _ in docstrings)} of {total} docstrings without a verb")


if __name__ == "__main__":
    print_what_is_left(sys.argv[1:])
