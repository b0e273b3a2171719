"""Encodings of annotation files: GBK is read, stated or not, and a guess is reported."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cogvlm_ft.shards.formats.encodings import decode_text, decode_xml
from cogvlm_ft.shards.packing.candidates import Rejected

HANZI = "猫狗路木车人红色的安全帽水果树球工件裂纹划痕螺丝孔"
NAMES = st.lists(st.text(HANZI, min_size=1, max_size=4), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(NAMES)
def test_gbk_is_recognised(names: list[str]) -> None:
    text = "path: .\nnames:\n" + "".join(f"  {i}: {name}\n" for i, name in enumerate(names))
    found = decode_text(text.encode("gbk"))
    assert found.text == text and found.notes("data.yaml")[0].reason == "encoding_guessed"
    assert decode_text(text.encode()) == (text, None)
    assert decode_text(text.encode("utf-8-sig")) == (text, None)


@pytest.mark.parametrize(
    "text", ["dog", "names: [café, mère, Straße]", "90° bend", "90°", "дом", "a · b", "кот, дом", "γάτα", ""]
)
def test_utf8_stays_utf8(text: str) -> None:
    assert decode_text(text.encode()) == (text, None)


@pytest.mark.parametrize("name", ["gb2312", "GBK", "GB18030", "utf-8", "Big5", "Shift_JIS", "utf-16"])
def test_xml_is_read_as_it_states(name: str) -> None:
    text = f'<?xml version="1.0" encoding="{name}"?><a>人車</a>'
    data = text.encode("gbk" if name == "gb2312" else name)
    assert decode_xml(data) == (text, None)


@pytest.mark.parametrize(
    ("stated", "written"), [("utf-8", "gbk"), ("no-such", "gbk"), ("hex", "gbk"), ("GBK", "utf-8")]
)
def test_a_wrong_statement_is_reported(stated: str, written: str) -> None:
    text = f'<?xml version="1.0" encoding="{stated}"?><a>狗</a>'
    found = decode_xml(text.encode(written))
    assert found.text == text and found.guess and found.notes("a.xml")


@pytest.mark.parametrize(
    ("word", "encoding"),
    [("赤い犬", "cp932"), ("ネコ", "cp932"), ("ヘルメット", "cp932"), ("紅色卡車", "big5"), ("安全帽", "big5")],
)
def test_japanese_and_traditional_chinese_are_not_read_as_gbk(word: str, encoding: str) -> None:
    with pytest.raises(Rejected, match="perhaps Shift-JIS or Big5"):
        decode_text(f"names: [{word}]".encode(encoding))


def test_other_bytes_are_refused() -> None:
    with pytest.raises(Rejected, match="neither UTF-8 nor GBK"):
        decode_text(b"caf\xe9\n\xff\xff")
