"""Names that the report shows, in English and Chinese."""

from __future__ import annotations

from markupsafe import Markup

from cogvlm_ft.html_page import both

Words = tuple[str, str]
"""A text in English and in Chinese."""

METRICS: dict[str, Words] = {
    "mean_iou": ("mean IoU", "平均 IoU"),
    "acc@0.5": ("Acc@0.5", "Acc@0.5"),
    "acc@0.75": ("Acc@0.75", "Acc@0.75"),
    "f1@0.5": ("F1 of all boxes", "所有框的 F1"),
    "not_found_acc": ("absent targets recognised", "目标不存在时回答“未找到”的比例"),
    "false_not_found": ("present targets reported “not found”", "目标存在时误报“未找到”的比例"),
    "unreadable": ("unreadable answers", "无法解析的回答"),
    "truncated": ("answers cut off at the token limit", "达到词元上限而被截断的回答"),
    "chrf": ("chrF of descriptions", "描述的 chrF"),
    "probe_same": ("general questions answered as before", "通用问题的回答与训练前一致的比例"),
    "probe_chrf": ("general questions, chrF / 100", "通用问题的 chrF / 100"),
    "text_exact": ("free answers that match exactly", "自由回答完全一致"),
}
COLUMNS: dict[str, Words] = {
    "num": ("n", "n"),
    "mean_iou": ("mean IoU", "平均 IoU"),
    "ceiling": ("possible", "上限"),
    "acc@0.5": ("Acc@0.5", "Acc@0.5"),
    "acc@0.75": ("Acc@0.75", "Acc@0.75"),
    "f1@0.5": ("F1@0.5", "F1@0.5"),
    "not_found_acc": ("absent", "不存在"),
    "false_not_found": ("missed", "误报未找到"),
    "unreadable": ("unreadable", "无法解析"),
}
GROUPS: dict[str, Words] = {
    "share": ("By side of the target / side of the image", "按目标边长 / 图片边长"),
    "size": ("By COCO size, in pixels of the image", "按 COCO 尺寸（图片像素）"),
    "patches": ("By area of the target in patches", "按目标覆盖的图块（patch）数"),
    "targets": ("By number of true boxes", "按真值框数"),
    "language": ("By language", "按语言"),
    "template": ("By kind of question", "按问题类型"),
    "source": ("By source", "按数据来源"),
}
SECTIONS: dict[str, Words] = {
    "gallery": ("images", "图片"),
    "phrases": ("phrases", "短语"),
    "confusions": ("confusions", "混淆"),
    "curves": ("curves", "曲线"),
    "groups": ("tables", "表格"),
    "charts": ("thresholds and sizes", "阈值与尺寸"),
    "suspects": ("suspicious training images", "可疑的训练图片"),
    "about": ("settings and hashes", "设置与哈希"),
}
GALLERY_GROUPS: dict[str, Words] = {
    "newly_wrong": ("Newly wrong", "新答错的"),
    "newly_right": ("Newly right", "新答对的"),
    "worst": ("Worst", "最差的"),
    "best": ("Best", "最好的"),
}
"""Groups in the order of the page. Changes come first: they are checked first after an epoch."""
_VALUES: dict[str, dict[str, Words]] = {
    "share": {
        "under_1": ("< 1 %", "< 1 %"),
        "1_to_3": ("1–3 %", "1–3 %"),
        "3_to_10": ("3–10 %", "3–10 %"),
        "over_10": ("> 10 %", "> 10 %"),
    },
    "size": {
        "small": ("small, < 32²", "小，< 32²"),
        "medium": ("medium", "中"),
        "large": ("large, > 96²", "大，> 96²"),
    },
    "patches": {"under_1": ("< 1", "< 1"), "1_to_4": ("1–4", "1–4"), "over_4": ("> 4", "> 4")},
    "targets": {"0": ("none", "无"), "1": ("1", "1"), "2+": ("2 or more", "2 个或更多")},
    "language": {"zh": ("Chinese", "中文"), "en": ("English", "英文")},
}


def metric_title(name: str) -> Markup:
    return Markup("<span>{}</span>").format(both(*METRICS.get(name, (name, name))))


def value_title(group: str, value: str) -> Markup:
    """Return the title of a group's value, such as share and under_1."""
    return both(*_VALUES.get(group, {}).get(value, (value, value)))
