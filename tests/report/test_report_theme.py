"""The colours can be told apart, and text on them can be read, in light and in dark and with colour blindness."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from headwater.report.theme import COLOURS, LEVELS, TASK_COLOURS, VARIABLE_OF, scale_colour, text_on_scale

# Machado, Oliveira and Fernandes 2009, severity 1.0, on linear RGB.
VISION = {
    "usual": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}
# Ottosson's OKLab.
TO_LMS = [[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
          [0.0883024619, 0.2817188376, 0.6299787005]]  # fmt: skip
TO_LAB = [[0.2104542553, 0.793617785, -0.0040720468], [1.9779984951, -2.428592205, 0.4505937099],
          [0.0259040371, 0.7827717662, -0.808675766]]  # fmt: skip


def linear(colour: str) -> np.ndarray:
    channels = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def contrast(one: str, other: str) -> float:
    """WCAG 2 contrast ratio."""
    dark, light = sorted(float(linear(c) @ [0.2126, 0.7152, 0.0722]) for c in (one, other))
    return (light + 0.05) / (dark + 0.05)


def distance(one: str, other: str, vision: str) -> float:
    seen = [np.clip(np.asarray(VISION[vision]) @ linear(c), 0, 1) for c in (one, other)]
    a, b = (np.asarray(TO_LAB) @ np.cbrt(np.asarray(TO_LMS) @ s) for s in seen)
    return float(np.linalg.norm(a - b))


BOTH = pytest.mark.parametrize("dark", [0, 1], ids=["light", "dark"])


def test_every_light_colour_stands_for_one_name():
    assert len(VARIABLE_OF) == len(COLOURS)
    assert all(c == c.lower() and len(c) == 7 for pair in COLOURS.values() for c in pair)


@BOTH
@pytest.mark.parametrize("vision", VISION)
def test_task_colours_stay_apart(dark, vision):
    colours = [COLOURS[f"task-{i}"][dark] for i in range(TASK_COLOURS)]
    assert min(distance(a, b, vision) for a, b in itertools.combinations(colours, 2)) > 0.075


@BOTH
def test_colours_stand_out_from_the_paper(dark):
    paper = COLOURS["paper"][dark]
    assert all(contrast(COLOURS[f"task-{i}"][dark], paper) >= 2.95 for i in range(TASK_COLOURS))
    assert contrast(COLOURS["ink"][dark], paper) > 12
    for name in ("muted", "accent"):
        assert contrast(COLOURS[name][dark], paper) >= 4.5
        assert contrast(COLOURS[name][dark], COLOURS["panel"][dark]) >= 4.5


@BOTH
def test_numbers_on_the_scale_can_be_read(dark):
    named = {light: pair for pair in COLOURS.values() for light in pair[:1]}
    for i in range(LEVELS):
        value = 2 * i / (LEVELS - 1) - 1
        cell = named[scale_colour(value)][dark]
        assert contrast(COLOURS[text_on_scale(value)][dark], cell) >= 4.0, value


def test_scale_has_its_middle_at_zero_and_ends_at_one():
    assert scale_colour(0.0) == COLOURS[f"scale-{LEVELS // 2}"][0]
    assert scale_colour(-7) == COLOURS["scale-0"][0]
    assert scale_colour(1.0) == COLOURS[f"scale-{LEVELS - 1}"][0]


@BOTH
def test_scale_grows_away_from_the_paper_on_both_sides(dark):
    paper = COLOURS["paper"][dark]
    ratios = [contrast(COLOURS[f"scale-{i}"][dark], paper) for i in range(LEVELS)]
    middle = LEVELS // 2
    assert ratios[middle:] == sorted(ratios[middle:])
    assert ratios[: middle + 1] == sorted(ratios[: middle + 1], reverse=True)
