"""Absent targets: questions about what is not in the picture, so that a model learns to say so.

A first pass over all candidates fills a `Vocabulary`; in a second one `choose_absent` picks for each photo.
"""

from shards.negatives.absent import KINDS, NegativeSettings, add_absent, choose_absent, negatives_report
from shards.negatives.vocabulary import Vocabulary
from shards.negatives.words import load_words

__all__ = ["KINDS", "NegativeSettings", "Vocabulary", "add_absent", "choose_absent", "load_words", "negatives_report"]
