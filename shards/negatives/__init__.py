"""Absent targets: questions about what is not in the picture, so that a model learns to say so.

A first pass over all candidates fills a `Vocabulary`; in a second one `choose_absent` picks for each photo.
"""

from cogvlm_ft.shards.negatives.absent import KINDS, NegativeSettings, add_absent, choose_absent, negatives_report
from cogvlm_ft.shards.negatives.lexicon import load_words
from cogvlm_ft.shards.negatives.vocabulary import Vocabulary

__all__ = ["KINDS", "NegativeSettings", "Vocabulary", "add_absent", "choose_absent", "load_words", "negatives_report"]
