from __future__ import annotations

import time

import pytest

from cogvlm_ft import settings
from cogvlm_ft.grounding.metrics import score_answer, summarize
from cogvlm_ft.grounding.protocols import PROTOCOLS
from cogvlm_ft.grounding.targets import Box

SIZE = (2000, 1000)
FAR = (1900.0, 900.0, 1999.0, 999.0)


def test_every_protocol_is_a_setting() -> None:
    assert tuple(PROTOCOLS) == settings.PROTOCOLS
    assert settings.EvaluateConfig().protocol in PROTOCOLS


@pytest.mark.parametrize(
    ("protocol", "answer", "wanted"),
    [
        ("ours", "at [[100,200,300,400]]", [(201, 200.5, 601, 400.5)]),
        ("ours", "[[100,200,300,400;0,0,9,9]] [[1,2,3,4]]", 3),
        ("ours", "[[100, 200, 300, 400]]", None),
        ("grec_official", "[[100,200,300,400]]", [(200, 200, 600, 400)]),
        ("grec_official", "[[100,200,300,400;0,0,9,9]]", 2),
        ("cogvlm_authors", "[[100,200,300,400;500,100,600,300]]", [(200, 100, 1200, 400)]),
        ("cogvlm_authors", "[[1,2,3]] [[100,200,300,400]]", None),
        ("cogvlm_authors", "[[100,200,300,400]] [[0,0,9,9]]", [(200, 200, 600, 400)]),
        ("qwen_vl", "<ref>a dog</ref><box>(100,200),(999,999)</box>", [(200.2, 200.2, 2000, 1000)]),
        ("qwen_vl", "<box>(1,2),(3,4)</box><box>(5,6),(7,8)</box>", [(2.002, 2.002, 6.006, 4.004)]),
        ("qwen_vl", "<box>(1,2,3),(4,5)</box>", None),
        ("qwen_vl", "<box>(1,2,3),(4)</box>", None),
        ("qwen_vl", "a dog [[100,200,999,999;1,2,3,4]]", [(200.2, 200.2, 2000, 1000)]),
        ("qwen_vl", "(a,b),(c,d)", None),
        ("internvl", "dog[[100, 200, 300, 400]]", [(200, 200, 600, 400)]),
        ("internvl", "[0.1, 0.2, 0.3, 0.4]", [(200, 200, 600, 400)]),
        ("internvl", "[[100,200,300]]", None),
        ("internvl", "no box, none, at, all", None),
        ("shikra", "a dog [0.100,0.200,0.300,0.400].", [(200, 200, 600, 400)]),
        ("shikra", "[[100,200,300,400]]", [(200, 200, 600, 400)]),
        ("shikra", "[0.1,0.2,0.3,0.4] or [0.5,0.5,0.6,0.6]", None),
        ("shikra", "[[100,200,300,400;1,2,3,4]]", None),
        ("shikra", "", None),
    ],
)
def test_reading(protocol: str, answer: str, wanted: list[Box] | int | None) -> None:
    found = PROTOCOLS[protocol].read(answer, SIZE)
    if isinstance(wanted, int):
        assert found is not None and len(found) == wanted
    elif wanted is None:
        assert found is None
    else:
        assert found is not None
        assert [pytest.approx(box, abs=0.01) for box in wanted] == found


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("answer", ["", "?", "[[", "]]", "[[nan,nan,nan,nan]]", "[[1e999,1,2,3]]", "(,),(,)", "[,,,]"])
def test_what_cannot_be_read_is_a_miss(protocol: str, answer: str) -> None:
    score = score_answer(answer, [FAR], SIZE, (), protocol=PROTOCOLS[protocol])
    assert (score.readable, score.iou) == (False, 0)
    assert summarize([score], PROTOCOLS[protocol])["unreadable"] == 1


@pytest.mark.parametrize(
    ("protocol", "hit"), [("grec_official", 1), ("cogvlm_authors", 0), ("shikra", 0), ("internvl", 1)]
)
def test_exactly_half_is_a_hit_or_not(protocol: str, hit: int) -> None:
    """Boxes that are whole thousandths for all of them, one half of another."""
    score = score_answer("[[000,000,500,250]]", [(0, 0, 1000, 500)], SIZE, (), protocol=PROTOCOLS[protocol])
    assert score.iou == 0.5
    found = summarize([score], PROTOCOLS[protocol])
    assert found["acc@0.5"] == hit
    assert found["acc@0.75"] == 0


def test_centres_of_bins_save_small_targets() -> None:
    """A perfect answer about a target 1.2 thousandths wide: 0.5 with ours, little with the lower edges."""
    truth = (100.9, 500.9, 103.3, 503.3)
    assert score_answer("[[050,500,051,503]]", [truth], SIZE, ()).iou > 0.5
    official = score_answer("[[050,500,051,503]]", [truth], SIZE, (), protocol=PROTOCOLS["grec_official"]).iou
    assert official < 0.35


def test_the_label_of_cogvlm_s_authors_is_its_text() -> None:
    """Several true boxes are one around them, in thousandths: the same text is a perfect answer."""
    protocol = PROTOCOLS["cogvlm_authors"]
    truth = [(201.9, 200.9, 601.9, 400.9), (1000.5, 100.4, 1200.5, 300.4)]
    assert protocol.truth(truth, SIZE) == [(200, 100, 1200, 400)]
    assert score_answer("[[100,100,600,400]]", truth, SIZE, (), protocol=protocol).iou == 1
    assert protocol.truth([], SIZE) == []


def test_which_questions_are_scored() -> None:
    for name, protocol in PROTOCOLS.items():
        assert protocol.takes(None) and protocol.takes([]) and protocol.takes([FAR])
        assert protocol.takes([FAR, FAR]) == (name not in ("qwen_vl", "internvl", "shikra"))


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("piece", ["[[", "(", "[", ",", "[,", "(,", "[[,", "](", "),(", "1,", "[\n,,,"])
def test_long_nonsense_is_read_in_no_time(protocol: str, piece: str) -> None:
    start = time.thread_time()
    PROTOCOLS[protocol].read(piece * 300 + "]\n]]", SIZE)
    assert time.thread_time() - start < 2
