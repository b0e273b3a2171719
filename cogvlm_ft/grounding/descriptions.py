"""Text similarity of free answers, in Chinese and English."""

from __future__ import annotations

import re
from collections.abc import Sequence

_CHINESE = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_UNIT = re.compile(f"[{_CHINESE}]|[^\\W_{_CHINESE}]+")  # a Chinese character, or a word of other letters and digits
_BOXES = re.compile(r"\[\[.*?\]\]", re.DOTALL)


def text_without_boxes(text: str) -> str:
    """Return an answer without its box text."""
    closed = text.rfind("]]") + 2  # after it, the search for an end would take quadratic time
    return (_BOXES.sub("", text[:closed]) + text[closed:]).strip() if closed > 1 else text.strip()


def description_metrics(answers: Sequence[str], truths: Sequence[str], languages: Sequence[str]) -> dict[str, float]:
    """Return chrf and bleu (0 to 100) over all texts together and the mean rouge_l (0 to 1); empty without texts.

    An empty answer counts as a text and scores 0.
    """
    if not answers:
        return {}
    rouge = [rouge_l(answer, truth) for answer, truth in zip(answers, truths, strict=True)]
    return {
        "chrf": corpus_chrf(answers, truths),
        "bleu": corpus_bleu(answers, truths, languages),
        "rouge_l": sum(rouge) / len(rouge),
        "empty_answers": sum(not answer.strip() for answer in answers) / len(answers),
        "num_descriptions": float(len(answers)),
    }


def corpus_chrf(answers: Sequence[str], truths: Sequence[str]) -> float:
    """Compute chrF2, 0 to 100: F-score of character n-grams up to 6, recall weighted twice."""
    from sacrebleu.metrics import CHRF

    return float(CHRF().corpus_score(list(answers), [list(truths)]).score)


def corpus_bleu(answers: Sequence[str], truths: Sequence[str], languages: Sequence[str]) -> float:
    """Compute BLEU-4, 0 to 100.

    Texts of language "zh" are split into characters by sacrebleu's `zh` tokenizer, all others by its `13a`.
    """
    from sacrebleu.metrics import BLEU
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
    from sacrebleu.tokenizers.tokenizer_zh import TokenizerZh

    cut = {True: TokenizerZh(), False: Tokenizer13a()}
    cut_answers, cut_truths = (
        [cut[language == "zh"](text.rstrip()) for text, language in zip(texts, languages, strict=True)]
        for texts in (answers, truths)
    )
    # `force` suppresses the warning that the texts are already tokenized.
    return float(BLEU(tokenize="none", force=True).corpus_score(cut_answers, [cut_truths]).score)


def rouge_l(answer: str, truth: str) -> float:
    """Compute the F1 of the longest common subsequence, 0 to 1, over Chinese characters and lower-case words."""
    a, b = _UNIT.findall(answer.lower()), _UNIT.findall(truth.lower())
    common = _longest_common(a, b)
    return 2 * common / (len(a) + len(b)) if common else 0.0


def _longest_common(a: Sequence[str], b: Sequence[str]) -> int:
    """Return the length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for unit in a:
        before = row
        row = [0]
        for i, other in enumerate(b):
            row.append(before[i] + 1 if unit == other else max(before[i + 1], row[i]))
    return row[-1]
