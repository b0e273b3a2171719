"""Titles, advice and details of the kinds of suspects, in English and Chinese."""

from __future__ import annotations

from dataclasses import dataclass

Texts = dict[str, str]
"""Texts by language: "en", "zh"."""


@dataclass(frozen=True)
class Kind:
    """detail: what was found, with the placeholders of `Suspect.values`."""

    title: Texts
    advice: Texts
    detail: Texts


def _kind(title: str, title_zh: str, advice: str, advice_zh: str, detail: str, detail_zh: str) -> Kind:
    return Kind({"en": title, "zh": title_zh}, {"en": advice, "zh": advice_zh}, {"en": detail, "zh": detail_zh})


_READING = (
    "{bad} of {boxes} boxes ({bad_share}) do not fit their photo in the current reading ({as_read})."
    " Read as {reading}, {fits_share} of all boxes fit.{also}",
    "按读入方式（{as_read}），{boxes} 个框中有 {bad} 个（{bad_share}）与图片不符；"
    "若按 {reading} 解读，{fits_share} 的框都符合。{also_zh}",
)
_REBUILD = (
    "This concerns the whole source: correct the annotations or choose the matching format, then review again.",
    "这涉及整个数据源：请改正标注或选择合适的格式，然后重新检查。",
)

KINDS: dict[str, Kind] = {
    "looks_like_xywh": _kind("Looks like x, y, width, height", "像是 x、y、宽、高", *_REBUILD, *_READING),
    "looks_like_xyxy": _kind("Looks like corners, not width and height", "像是两角坐标而非宽高", *_REBUILD, *_READING),
    "looks_normalised": _kind("Looks normalised (0 to 1)", "像是归一化坐标（0 到 1）", *_REBUILD, *_READING),
    "looks_like_thousandths": _kind("Looks like 0 to 1000", "像是 0 到 1000 的坐标", *_REBUILD, *_READING),
    "looks_like_pixels": _kind("Looks like pixels", "像是像素坐标", *_REBUILD, *_READING),
    "axes_swapped": _kind("Axes look swapped", "坐标轴似乎颠倒", *_REBUILD, *_READING),
    "train_and_val": _kind(
        "Photo in train and val",
        "图片同时在训练集和验证集",
        "The validation score would be too high. Drop one of them.",
        "验证分数会虚高：请去掉其中一个。",
        "{count} identical files: {names}.{agreement}",
        "{count} 个完全相同的文件：{names}。{agreement_zh}",
    ),
    "same_photo": _kind(
        "Identical photo twice",
        "重复的图片",
        "Copies are kept in one split, but training uses each of them. Keep the better one.",
        "构建时副本会归入同一划分，但每份都会参与训练。请保留较好的一个。",
        "{count} identical files: {names}.{agreement}",
        "{count} 个完全相同的文件：{names}。{agreement_zh}",
    ),
    "near_duplicate": _kind(
        "Photos in two splits look alike",
        "两个划分中的图片几乎相同",
        "Frames of one video or edited copies make the score too high. Build with --group-by, or drop one of them."
        " For annotations, the splits are those of a build with default options.",
        "同一视频的帧或修改过的副本会使分数虚高：请用 --group-by 构建，或去掉其中一个。"
        "对于标注，划分是按默认选项构建时的划分。",
        "{names}: {bits} of 64 bits of their perceptual hashes differ",
        "{names}：感知哈希的 64 位中有 {bits} 位不同",
    ),
    "label_spelling": _kind(
        "Labels that differ only in spelling",
        "只有写法不同的标签",
        "Questions treat them as different objects. If they mean the same, give them the same words with --names.",
        "它们会被当作不同的目标提问；如果是同一种，请用 --names 给出相同的词语。",
        "{names}",
        "{names}",
    ),
    "exif_rotated": _kind(
        "EXIF rotation disagrees with the boxes",
        "EXIF 旋转与框不一致",
        "The boxes fit the photo as viewers rotate it, not as stored. Build with --exif auto or apply to rotate it.",
        "框符合查看器旋转后的图片，而不是存储的图片：用 --exif auto 或 apply 构建会将其转正。",
        "EXIF orientation {orientation}: stored {stored}, upright {upright}; {evidence}",
        "EXIF 方向 {orientation}：存储为 {stored}，转正后 {upright}；{evidence_zh}",
    ),
    "exif_unclear": _kind(
        "Rotated by EXIF: orientation of the boxes unknown",
        "有 EXIF 旋转：无法确定框的方向",
        "The numbers are not sufficient to decide. Compare both pictures, then build with --exif apply or ignore.",
        "仅凭数字无法判断。请对比两张图，再用 --exif apply 或 ignore 构建。",
        "EXIF orientation {orientation}: stored {stored}, upright {upright}; the boxes fit both",
        "EXIF 方向 {orientation}：存储为 {stored}，转正后 {upright}；两种方式框都符合",
    ),
    "size_mismatch": _kind(
        "Annotated for another size",
        "标注对应的图片尺寸不同",
        "The photo was resized or replaced after annotation; a build skips it.",
        "图片在标注后被缩放或替换；构建时会跳过。",
        "the annotation states {stated}, the file has {stored}",
        "标注写的是 {stated}，文件实际为 {stored}",
    ),
    "box_outside_image": _kind(
        "Outside the image",
        "框超出图片",
        "A build skips such a box. Edit it, or drop it.",
        "构建时会跳过这样的框。请修改或去掉。",
        "{box} extends beyond the photo of {stored} by {by}.{fits_as}",
        "{box} 超出 {stored} 的图片 {by}。{fits_as_zh}",
    ),
    "inverted_box": _kind(
        "Inverted",
        "框的坐标颠倒",
        "The second corner is before the first. Edit it, or drop it.",
        "第二个角在第一个角之前。请修改或去掉。",
        "{box} has its second corner before the first.{fits_as}",
        "{box} 的第二个角在第一个角之前。{fits_as_zh}",
    ),
    "zero_area": _kind(
        "Zero area",
        "框的面积为零",
        "The box contains no pixels. Edit it, or drop it.",
        "框内没有像素。请修改或去掉。",
        "{box} has no area inside the photo of {stored}.{fits_as}",
        "{box} 在 {stored} 的图片内没有面积。{fits_as_zh}",
    ),
    "below_one_pixel": _kind(
        "Below one pixel",
        "框不足一个像素",
        "Numbers below 1 are often fractions of the image, not pixels.",
        "小于 1 的数字往往是比例而不是像素。",
        "{box} is {width} x {height} px in a photo of {stored}.{fits_as}",
        "{box} 在 {stored} 的图片中只有 {width} x {height} 像素。{fits_as_zh}",
    ),
    "under_one_patch": _kind(
        "Under one vision patch",
        "小于一个图块（patch）",
        "The model sees patches of 14 px; objects narrower than one are hard to find. Train at a larger size, or crop.",
        "模型以 14 像素的图块看图；比图块还窄的目标很难找到。请提高训练分辨率，或裁剪图片。",
        "{width} x {height} px; its shorter side is {patches} patches at {image_size} px",
        "{width} x {height} 像素；在 {image_size} 像素下短边为 {patches} 个图块",
    ),
    "same_phrase": _kind(
        "Same phrase, different boxes in one photo",
        "同一图片中相同短语对应不同的框",
        "The same question has two answers. Put the boxes into one target, or make the phrases distinct.",
        "同一个问题有两个答案。请把框合并为一个目标，或让短语有所区别。",
        "{phrase!r} is asked twice: {first} and {second}",
        "{phrase!r} 出现两次：{first} 与 {second}",
    ),
    "wrong_language": _kind(
        "Phrase in the wrong language",
        "短语的语言不符",
        "The question would be in another language than the phrase. Edit the phrase or its language.",
        "问题会使用与短语不同的语言。请修改短语或语言。",
        "{text!r} is marked {language!r}, but {found}",
        "{text!r} 标为 {language!r}，但{found_zh}",
    ),
    "count_mismatch": _kind(
        "Text and number of boxes differ",
        "描述与框的数量不一致",
        "The model would learn to count wrongly. Edit the text, or add the missing boxes.",
        "模型会学错数量。请修改文字或补全框。",
        "{text!r} states {said}, but there are {boxes} boxes",
        "{text!r} 说的是 {said} 个，实际有 {boxes} 个框",
    ),
    "bad_box_text": _kind(
        "Unsupported form of box text",
        "框文本格式不对",
        "Asterisks, spaces or other brackets: the model was trained only on [[086,540,400,760]].",
        "有星号、空格或其他括号：模型只学过 [[086,540,400,760]] 这种写法。",
        "{detail}",
        "{detail}",
    ),
    "no_targets": _kind(
        "Nothing annotated",
        "没有标注",
        "A photo without targets or turns; a build skips it.",
        "图片没有目标，也没有对话；构建时会跳过。",
        "no target and no turn",
        "没有目标也没有对话",
    ),
    "missing_image": _kind("Photo not found", "找不到图片", "A build skips it.", "构建时会跳过。", "", ""),
    "broken_image": _kind("Photo is broken", "图片已损坏", "A build skips it.", "构建时会跳过。", "", ""),
    "joined_part": _kind(
        "Part of a group",
        "组合的一部分",
        "Its box is part of the box around the group. This is intended.",
        "它已并入整组的框，这是正常的。",
        "",
        "",
    ),
    "ignored_label": _kind(
        "Marked as not annotated",
        "标为忽略的区域",
        "Skipped while reading. This is intended.",
        "读取时已跳过，这是正常的。",
        "",
        "",
    ),
    "crowd": _kind(
        "Region around a crowd",
        "群体区域",
        "Not a single object: skipped while reading. This is intended.",
        "不是单个目标：读取时已跳过，这是正常的。",
        "",
        "",
    ),
}
"""Kinds in the order of the page, the most serious first. Other reasons of format readers have their own texts."""

NOTE = "note."
"""Prefix of the kinds of notes, before the reason."""
_OTHER_NOTE = _kind(
    "Note: {kind}",
    "说明：{kind}",
    "Nothing was left out. Check that this matches your intention.",
    "没有舍弃任何内容；请确认这符合你的意图。",
    "{detail}",
    "{detail}",
)
_OTHER_LOSS = _kind(
    "Skipped: {kind}",
    "已跳过：{kind}",
    "A build skips this part; correct it in the annotations.",
    "构建时会跳过这一部分；请在标注中改正。",
    "{detail}",
    "{detail}",
)


def texts_of(kind: str) -> Kind:
    """Return the texts of any kind, also one that only a format reader defines."""
    return KINDS.get(kind, _OTHER_NOTE if kind.startswith(NOTE) else _OTHER_LOSS)


def title_of(kind: str, language: str) -> str:
    """Return the title of any kind."""
    return texts_of(kind).title[language].format(kind=kind.removeprefix(NOTE).replace("_", " "))
