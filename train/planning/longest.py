"""The longest sequence whose training step fits a device."""

import math
from collections.abc import Callable

_PRECISION = 1 / 32  # of the length found
_LEAST_STEP = 128  # tokens of a device


def length_unit(layout_multiple: int, num_shards: int) -> int:
    """The lengths that are tried are multiples of this: what the layout splits, in tiles that hardware likes.

    Args:
      layout_multiple: What the layout needs a length to be a multiple of.
      num_shards: Devices that share a sequence.
    """
    return math.lcm(layout_multiple, _LEAST_STEP * num_shards)


def longest(memory_at: Callable[[int], int | None], *, limit: int, start: int, unit: int, most: int = 2**30) -> int:
    """The greatest multiple of `unit` whose memory is within the limit, to about 3 %; 0 where not even one unit fits.

    Bisection between a length that fits and one that does not, steered by the straight line through the memory of the
    last two that were measured, as memory grows almost linearly.

    Args:
      memory_at: Bytes that a length needs; None where the compiler refuses without saying.
      limit: Bytes of a device.
      start: A length to begin with.
      unit: Of lengths.
      most: No longer than this.
    """
    measured: dict[int, int | None] = {}

    def fits(length: int) -> bool:
        measured[length] = memory_at(length)
        return measured[length] is not None and measured[length] <= limit

    length = max(unit, start // unit * unit)
    low, high = 0, None
    while high is None and length <= most:
        if fits(length):
            guess = _guess(measured, limit, unit) or 2 * length
            # Beyond the guess, to have both ends soon; by steps that are neither tiny nor wild.
            low, length = length, min(max(int(1.05 * guess), 5 * length // 4), 4 * length) // unit * unit
            length = max(length, low + unit)
        else:
            high = length
    if high is None:
        return low
    while high - low > max(unit, _PRECISION * low):
        guess = _guess(measured, limit, unit) or (low + high) // 2
        # Never so near to an end that a wrong line would make many small steps.
        margin = max(unit, (high - low) // 8 // unit * unit)
        middle = min(max(guess, low + margin), high - margin) // unit * unit
        if not low < middle < high:
            middle = (low + high) // 2 // unit * unit
        if not low < middle < high:
            break
        if fits(middle):
            low = middle
        else:
            high = middle
    return low


def _guess(measured: dict[int, int | None], limit: int, unit: int) -> int | None:
    """Where the line through the two measured lengths nearest to the limit meets it, a little on the safe side."""
    known = sorted(((abs(m - limit), length, m) for length, m in measured.items() if m is not None))[:2]
    if len(known) < 2:
        return None
    (_, x0, y0), (_, x1, y1) = known
    if (y1 - y0) * (x1 - x0) <= 0:
        return None
    at = x0 + (limit - y0) * (x1 - x0) / (y1 - y0)
    return max(unit, int(0.99 * at) // unit * unit)
