"""Full-parameter fine-tuning of CogVLM for visual grounding; the tour of the code is in CONTRIBUTING.md."""

__version__ = "0.2.0"
