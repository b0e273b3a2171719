"""Absent targets: questions about objects that are not in the image, so that a model learns to report them as absent.

`two_passes` runs both passes of a build: the first gathers a `Vocabulary` from all candidates, the second chooses
absent targets for each image (`absent`). `lexicon`, `meaning` and `photo` decide what is certainly absent.
"""

from cogvlm_ft.shards.negatives.absent import KINDS, NegativeSettings, choose_absent
from cogvlm_ft.shards.negatives.lexicon import load_lexicon
from cogvlm_ft.shards.negatives.shortfall import negatives_report
from cogvlm_ft.shards.negatives.vocabulary import Vocabulary

__all__ = ["KINDS", "NegativeSettings", "Vocabulary", "choose_absent", "load_lexicon", "negatives_report"]
