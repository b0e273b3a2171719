"""What the report calls things, in English and Chinese."""

from __future__ import annotations

from html import escape

Words = tuple[str, str]
"""English, Chinese."""

METRICS: dict[str, Words] = {
    "mean_iou": ("mean IoU", "平均 IoU"),
    "acc@0.5": ("Acc@0.5", "Acc@0.5"),
    "acc@0.75": ("Acc@0.75", "Acc@0.75"),
    "f1@0.5": ("F1 of all boxes", "所有框的 F1"),
    "not_found_acc": ("absent things recognised", "不存在的目标识别率"),
    "false_not_found": ("wrongly “not found”", "误报“未找到”"),
    "unreadable": ("unreadable answers", "无法解析的回答"),
    "chrf": ("chrF of descriptions", "描述的 chrF"),
    "probe_same": ("general questions answered as before", "通用问题的回答与此前一致"),
    "text_exact": ("free answers word for word", "自由回答完全一致"),
}
COLUMNS: dict[str, Words] = {
    "num": ("n", "n"),
    "mean_iou": ("mean IoU", "平均 IoU"),
    "ceiling": ("possible", "上限"),
    "acc@0.5": ("Acc@0.5", "Acc@0.5"),
    "acc@0.75": ("Acc@0.75", "Acc@0.75"),
    "f1@0.5": ("F1@0.5", "F1@0.5"),
    "not_found_acc": ("absent", "不存在"),
    "unreadable": ("unreadable", "无法解析"),
}
GROUPS: dict[str, Words] = {
    "share": ("By the side of the target / side of the photo", "按目标边长 / 图片边长"),
    "size": ("By COCO's sizes, in pixels of the photo", "按 COCO 尺寸(图片像素)"),
    "patches": ("By the target's area in patches", "按目标占的图像块数"),
    "targets": ("By the number of true boxes", "按真实框数"),
    "language": ("By language", "按语言"),
    "template": ("By the kind of question", "按问题类型"),
    "source": ("By source", "按数据来源"),
}
SECTIONS: dict[str, Words] = {
    "curves": ("curves", "曲线"),
    "groups": ("tables", "表格"),
    "charts": ("thresholds and sizes", "阈值与尺寸"),
    "gallery": ("photos", "图片"),
    "suspects": ("suspicious training photos", "可疑的训练图片"),
    "about": ("settings and hashes", "设置与哈希"),
}
_VALUES: dict[str, dict[str, Words]] = {
    "share": {
        "under_1": ("< 1 %", "< 1 %"),
        "1_to_3": ("1–3 %", "1–3 %"),
        "3_to_10": ("3–10 %", "3–10 %"),
        "over_10": ("> 10 %", "> 10 %"),
    },
    "size": {
        "small": ("small, < 32²", "小,< 32²"),
        "medium": ("medium", "中"),
        "large": ("large, > 96²", "大,> 96²"),
    },
    "patches": {"under_1": ("< 1", "< 1"), "1_to_4": ("1–4", "1–4"), "over_4": ("> 4", "> 4")},
    "targets": {"0": ("none", "无"), "1": ("1", "1"), "2+": ("2 or more", "2 个以上")},
    "language": {"zh": ("Chinese", "中文"), "en": ("English", "英文")},
}


def both(en: str, zh: str) -> str:
    """Plain text in both languages; the page shows one of them."""
    if en == zh:
        return escape(printable(en))
    return f'<span lang="en">{escape(printable(en))}</span><span lang="zh">{escape(printable(zh))}</span>'


def printable(text: str) -> str:
    """Bytes that are no UTF-8 as escapes: the page must be UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()


def metric_title(name: str) -> str:
    return f"<span>{both(*METRICS.get(name, (name, name)))}</span>"


def value_title(group: str, value: str) -> str:
    """HTML for the value of a group, such as share and under_1."""
    return both(*_VALUES.get(group, {}).get(value, (value, value)))
