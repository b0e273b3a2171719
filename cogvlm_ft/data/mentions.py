"""Detect texts that an augmentation would make wrong.

In doubt the answer is yes: that costs a little variety, a wrong answer costs accuracy.
"""

from __future__ import annotations

import re

# Words, not parts of words: "right" is in "bright". An underscore or a digit ends a word too: "bottom_right", "left2".
_WORD = r"(?<![a-z])(?:{})(?![a-z])"

_SIDES_EN = re.compile(
    _WORD.format(
        r"(?:top|bottom|upper|lower|cent(?:er|re)|middle|mid|far|back|front)?[- ]?(?:left|right)"
        r"(?:most|wards?|hand|handed|er|side)?s?"
        r"|[lr]|[lr]hs|lft|rgt|rt"
        r"|(?:north|south)?[- ]?(?:east|west)(?:ern|erly|wards?|bound|ernmost)?"
        r"|(?:counter|anti)?[- ]?clockwise|o['’]? ?clock|mirror(?:ed|s)?|port ?side|starboard"
        r"|(?:driver|passenger)['’]?s?[- ]side"
        r"|the (?:first|last)|second|third|fourth|fifth|sixth|seventh|eighth|ninth|tenth|\d(?:st|nd|rd|th)"
    ),
    re.IGNORECASE,
)
_SIDES_ZH = re.compile(
    r"[左右东西東]|[时時]针|時針|[点點时時][钟鐘]?方向|镜|鏡|驾驶|副驾|駕駛|副駕|第[一二三四五六七八九十几\d]|倒数"
)
_HARMLESS_ZH = re.compile(
    r"东西(?![向走两侧部方边])|西(?:瓜|装|服|红柿|兰花|餐|葫芦|柚|芹)|第[一二三四五六七八九十\d]+步"
)

_PLACES_EN = re.compile(
    _WORD.format(
        r"top(?:most)?|bottom(?:most)?|upper(?:most)?|lower(?:most)?|middle|cent(?:er|re|ral)|corners?|edges?|half"
    ),
    re.IGNORECASE,
)
_PLACES_ZH = re.compile(
    r"[上下][方面边侧部半角]|最[上下]|[顶底][部端]|中[间間央部心]|正中|边缘|角落|[四边一]角|半[边部]"
)

_COLOURS_EN = re.compile(
    _WORD.format(
        r"(?:dark|light)?[- ]?(?:red|orange|yellow|green|blue|purple|violet|pink|brown|black|white|gr[ae]y|gold|golden"
        r"|silver|beige|tan|maroon|navy|teal|turquoise|cyan|magenta|cream|khaki|crimson|scarlet|indigo|lime|olive"
        r"|lavender|burgundy|amber|ivory|bronze|copper|blonde?|brunette|ginger)(?:d?ish|s|y)?"
        r"|colou?r(?:s|ed|ful|less)?|rainbow"
    ),
    re.IGNORECASE,
)
_COLOURS_ZH = re.compile(r"[红橙黄绿青蓝紫粉棕褐黑白灰金银米彩色紅黃綠藍銀]")


_RANKS_EN = re.compile(
    _WORD.format(
        r"(?:larg|bigg|small|tini|tall|short|long|wid|near|clos|furth|farth|high|low|old|young|new|bright|dark|thick"
        r"|thinn?)e(?:r|st)"
        r"|most|least|other|others|another|last|lightest"
        r"|foreground|background|in (?:the )?(?:front|back|rear)|behind"
    ),
    re.IGNORECASE,
)
_RANKS_ZH = re.compile(
    r"最|另[一外]|其[他它余]|[更较][大小高矮低长短宽窄远近老新亮暗深浅粗细厚薄胖瘦多少靠]|前景|背景|[前后]面"
)


def mentions_side(text: str) -> bool:
    """Detect what mirroring changes: left, clockwise, east, the second (in a row); 左, 顺时针, 东, 第二."""
    return bool(_SIDES_EN.search(text) or _SIDES_ZH.search(_HARMLESS_ZH.sub("", text)))


def mentions_place(text: str) -> bool:
    """Detect a side or another place in the image, which cropping may change."""
    return mentions_side(text) or bool(_PLACES_EN.search(text) or _PLACES_ZH.search(text))


def mentions_colour(text: str) -> bool:
    """Detect the name of a colour, or the word colour itself."""
    return bool(_COLOURS_EN.search(text) or _COLOURS_ZH.search(text))


def compares_in_image(text: str) -> bool:
    """Detect what means another object in a part of the image: a place, or a rank among all, such as the largest."""
    return mentions_place(text) or bool(_RANKS_EN.search(text) or _RANKS_ZH.search(text))
