"""The colours of targets in drawn images and pages: Okabe and Ito's, told apart with any colour vision."""

from __future__ import annotations

TARGET_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442")
"""Colours of an image's targets, in order; they repeat when there are more targets."""
RIGHT_COLOUR, WRONG_COLOUR = "#009e73", "#d55e00"

Rgb = tuple[int, int, int]


def target_colour(number: int) -> str:
    """Return the colour of an image's target or turn, numbered from 0."""
    return TARGET_COLOURS[number % len(TARGET_COLOURS)]


def rgb(colour: str) -> Rgb:
    """Return #rrggbb as three numbers from 0 to 255."""
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def ink_on(colour: str) -> str:
    """Return black or white, whichever is easier to read on a colour (relative luminance of WCAG)."""
    linear = [(value / 255 / 12.92 if value <= 10 else ((value / 255 + 0.055) / 1.055) ** 2.4) for value in rgb(colour)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if luminance > 0.179 else "#ffffff"


def style_sheet() -> str:
    """Return CSS: the class t0 sets --t to the colour of the first target, and --on-t to that of text on it."""
    rules = [
        f".t{number} {{ --t: {colour}; --on-t: {ink_on(colour)}; }}" for number, colour in enumerate(TARGET_COLOURS)
    ]
    return "\n".join(rules) + "\n"
