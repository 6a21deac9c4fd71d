"""Numbers as people read them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ntkit.uses.study import KernelFacts, Study


# what stands in the place of a number or a cosine that is not there
NOT_DEFINED = "not defined"


def count(value: int) -> str:
    """A whole number with thousands apart."""
    return f"{value:,}"


def percent(value: float, digits: int = 1) -> str:
    """A share as a percentage."""
    return f"{100 * value:.{digits}f}%"


def number(value: float) -> str:
    """Three significant digits, without an exponent where that stays short."""
    if math.isnan(value):
        return NOT_DEFINED
    if math.isinf(value):
        return "∞"
    if value != 0 and not 1e-3 <= abs(value) < 1e4:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa}·10{_raised(int(exponent))}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _raised(exponent: int) -> str:
    return str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def cosine(value: float | None, digits: int) -> str:
    """An agreement between kernels or with the labels; there is none where a kernel finds all examples alike."""
    return NOT_DEFINED if value is None else f"{value:.{digits}f}"


def score(study: Study, value: float) -> str:
    """A test score: per cent of right answers, or R^2; there is no R^2 of targets that are all equal."""
    if math.isnan(value):
        return NOT_DEFINED
    return percent(value) if study.score_name == "accuracy" else f"{value:.3f}"


def distance(facts: KernelFacts) -> float:
    """How far a reduced kernel is from the exact one: sampled on all training examples."""
    return 0.0 if facts.fidelity is None else facts.fidelity.error


def plus_minus(facts: KernelFacts) -> str:
    """The distance with its standard error, in per cent."""
    if facts.fidelity is None:
        return "0%"
    return f"{100 * facts.fidelity.error:.1f}±{100 * facts.fidelity.standard_error:.1f}%"


def sentence(text: str) -> str:
    """The text with a capital first letter."""
    return text[:1].upper() + text[1:]


def a_thing(thing: str) -> str:
    """The thing with its article."""
    return f"{'an' if thing[0] in 'aeiou' else 'a'} {thing}"


def signed(value: float) -> str:
    """Two decimals, with a real minus sign: a hyphen would break the line before the number."""
    return f"{value:.2f}".replace("-", "\u2212")
