"""Bounds of what files of others hold, and how it is shown: YAML and JSON bombs, pipes, links, control characters."""

from __future__ import annotations

import io
import logging
import os
import sys
from pathlib import Path

import pytest
import yaml
from tqdm import tqdm

from cogvlm_ft.config import load_config
from cogvlm_ft.errors import ConfigError
from cogvlm_ft.grounding.wording import load_wording
from cogvlm_ft.plain_files import copy_regular, open_new, parse_json, read_bytes, read_json, replaced_file
from cogvlm_ft.terminal import LogLines, check_encoding, lossy_stream, plain_line, plain_text, prepare_terminal, say
from cogvlm_ft.yaml_text import YamlError, parse_yaml

TENFOLD = "".join(f"k{i}: &b{i} [{','.join([f'*b{i - 1}'] * 10)}]\n" for i in range(1, 9))
MERGES = "".join(f"k{i}: &b{i} {{<<: [{','.join([f'*b{i - 1}'] * 10)}], own{i}: 1}}\n" for i in range(1, 9))
BOMBS = {
    "aliases": "k0: &b0 [x, y]\n" + TENFOLD,
    "merge keys": "k0: &b0 {x: 1}\n" + MERGES,
    "deep": "[" * 100_000,
    "endless": "a: &a {b: *a}",
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_yaml_that_describes_more_than_it_holds_is_refused_in_one_line(bomb: str, tmp_path: Path) -> None:
    for loader in (yaml.SafeLoader, yaml.BaseLoader):
        with pytest.raises(YamlError, match=r"more than 100000 values|nested more than 64 deep|value around it"):
            parse_yaml(bomb, loader)
    if len(bomb) > 10_000:
        return
    path = tmp_path / "bomb.yaml"
    path.write_text(bomb)
    for load in (lambda: load_config(path), lambda: load_wording(path)):
        with pytest.raises(ConfigError) as raised:
            load()
        assert "bomb.yaml" in str(raised.value) and "\n" not in str(raised.value)


def test_the_number_of_values_is_bounded_while_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cogvlm_ft.yaml_text.MAX_VALUES", 100)
    with pytest.raises(YamlError, match="more than 100 values"):
        parse_yaml("- x\n" * 101)


def test_aliases_and_merge_keys_of_an_honest_file_are_read(tmp_path: Path) -> None:
    assert parse_yaml("a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: *a") == {"a": {"x": 1}, "b": {"x": 1, "y": 2}, "c": {"x": 1}}
    path = tmp_path / "own.yaml"
    path.write_text(
        "data: {shards: [&one {path: a, weight: 2.0}, {<<: *one, path: b}]}\nmodel: {path: m}\noutput_dir: o"
    )
    assert load_config(path).data.shards == [{"path": "a", "weight": 2.0}, {"weight": 2.0, "path": "b"}]


def test_json_that_is_too_deep_is_an_error_of_its_file() -> None:
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json(b"[" * 200_000)


def test_a_pipe_in_place_of_a_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    for read in (read_bytes, read_json, lambda path: copy_regular(path, tmp_path / "copy")):
        with pytest.raises(OSError, match="found a named pipe; expected a regular file"):
            read(tmp_path / "pipe.yaml")
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "pipe.yaml")


def test_a_planted_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / ".tmp-report.html").symlink_to(victim)
    with replaced_file(tmp_path / "report.html", "w") as file:
        file.write("new")
    (tmp_path / "tar").symlink_to(victim)
    open_new(tmp_path / "tar").close()
    assert victim.read_text() == "precious" and (tmp_path / "report.html").read_text() == "new"
    (tmp_path / "source").symlink_to(victim)
    with pytest.raises(OSError, match="source"):
        copy_regular(tmp_path / "source", tmp_path / "copy", follow=False)
    with pytest.raises(ZeroDivisionError), replaced_file(tmp_path / "report.html", "w") as file:
        file.write(str(1 // 0))
    assert (tmp_path / "report.html").read_text() == "new" and not (tmp_path / ".tmp-report.html").exists()


# ---- what is shown


def test_terminal_lines_and_logs_show_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    hostile = "dog\x1b[2J\x1b]0;t\x07\r\u202e\x9b31m\u2028"
    say("label", hostile)
    out = capsys.readouterr().out
    assert out == "label dog\\x1b[2J\\x1b]0;t\\x07\\r\\u202e\\x9b31m\\u2028\n"
    record = logging.LogRecord("a", logging.WARNING, "f", 1, "key %s", ("x\nINFO root: all is well\x1b[0m",), None)
    assert LogLines("%(levelname)s %(message)s").format(record) == "WARNING key x\n  INFO root: all is well\\x1b[0m"
    assert plain_line("a\nb 红色") == "a\\nb 红色"


def test_passwords_and_queries_are_masked() -> None:
    shown = plain_text("GET https://me:p@ss@host:80/a?token=abc 'http://x/y' ssh://git@host/z")
    assert shown == "GET https://***@host:80/a?... 'http://x/y' ssh://git@host/z"


def test_no_terminal_ends_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    for encoding in ("gbk", "latin-1", "ascii"):
        raw = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
        monkeypatch.setattr(sys, "excepthook", sys.excepthook)
        prepare_terminal()
        say("红色的车 é 🐶", flush=True)
        assert raw.getvalue().decode(encoding).startswith(("红", "\\u7ea2"))


@pytest.mark.parametrize(("encoding", "is_good"), [("utf-8", True), ("gbk", True), ("ascii", False)])
def test_a_locale_without_chinese_file_names_is_reported(
    encoding: str, is_good: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.getfilesystemencoding", lambda: encoding)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    prepare_terminal()
    printed = capsys.readouterr().err
    assert printed == "" if is_good else f"locale: found the encoding {encoding}" in printed and "PYTHONUTF8" in printed


@pytest.mark.parametrize(
    ("encoding", "is_good"), [("UTF-8", True), ("ISO-8859-1", True), ("GBK", False), ("Big5", False)]
)
def test_a_locale_in_which_torch_cannot_read_its_files(
    encoding: str, is_good: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("locale.getpreferredencoding", lambda do_setlocale=True: encoding)
    if is_good:
        check_encoding()
    else:
        with pytest.raises(ConfigError, match=f"encoding {encoding}.*export PYTHONUTF8=1"):
            check_encoding()


def test_output_that_nobody_takes_does_not_end_a_run() -> None:
    """`train.py 2>&1 | tee log`, of which tee has ended; a log on a full disk. What can be written is."""
    reading, writing = os.pipe()
    stream = lossy_stream(writing, "ascii")
    print("图 1", file=stream)
    assert os.read(reading, 100) == b"\\u56fe 1\n"
    os.close(reading)
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        for lost in (stream, lossy_stream(full.fileno(), "utf-8")):
            print("a line", file=lost)
            for _ in tqdm(range(3), file=lost, mininterval=0):
                lost.flush()
    os.close(writing)
