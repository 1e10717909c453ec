"""Numbers and names as people read them, for every form of the report."""

from __future__ import annotations

import math
import re

TIMES = ((1.0, "ns"), (1e3, "µs"), (1e6, "ms"), (1e9, "s"))
"""Factor in nanoseconds and its unit."""

SIZES = ((1.0, "B"), (1e3, "kB"), (1e6, "MB"), (1e9, "GB"), (1e12, "TB"))
"""Factor in bytes and its unit (powers of ten)."""

NOTHING = "–"

# Characters that XML 1.0 has no place for, C1 controls, and the marks that reorder the text around them
# (a name could otherwise pass for another one).
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


def clean(text: str) -> str:
    """Text without control characters, lone surrogates and reordering marks; newlines and tabs stay."""
    return _UNPRINTABLE.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))


def absent(value: object) -> bool:
    """Whether a value of a frame stands for no value: None or NaN."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def significant(value: float) -> str:
    """About three significant digits, thousands separated."""
    if not math.isfinite(value):
        return "∞" if value > 0 else "-∞"
    size = abs(value)
    if size >= 100:
        return f"{value:,.0f}"
    if size >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if size >= 0.1 or size == 0 else f"{value:.2g}"


def count(value: float | None) -> str:
    """A whole number, thousands separated."""
    return NOTHING if absent(value) else f"{int(value):,}"


def duration(nanoseconds: float | None) -> str:
    """A time in the unit that keeps it short, from nanoseconds."""
    return _with_unit(nanoseconds, TIMES)


def size(octets: float | None) -> str:
    """A number of bytes in the unit that keeps it short."""
    return _with_unit(octets, SIZES)


def rate(octets: float | None, nanoseconds: float | None) -> str:
    """Bytes a second, from bytes and nanoseconds."""
    if absent(octets) or absent(nanoseconds) or nanoseconds <= 0:
        return NOTHING
    return f"{size(octets / nanoseconds * 1e9)}/s"


def ratio(value: float | None) -> str:
    """A factor, such as 5.21×."""
    return NOTHING if absent(value) else f"{significant(value)}×"


def share(value: float | None) -> str:
    """A part of a whole in percent; a part too small to print is never 0%."""
    if absent(value):
        return NOTHING
    if 0 < value < 1e-4:
        return "<0.01%"
    if value == 0:
        return "0%"
    said = significant(100 * value)
    return f"{said.rstrip('0').rstrip('.') if '.' in said else said}%"


def anything(value: object) -> str:
    """A value whose type the writer chose: a bar's limit, a setting."""
    if absent(value):
        return NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return count(value)
    return significant(value) if isinstance(value, float) else str(value)


def _with_unit(value: float | None, units: tuple[tuple[float, str], ...]) -> str:
    if absent(value):
        return NOTHING
    factor, unit = next(((f, u) for f, u in reversed(units) if abs(value) >= f), units[0])
    whole = factor == 1.0 and float(value).is_integer()
    return f"{int(value) if whole else significant(value / factor)} {unit}"
