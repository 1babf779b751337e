"""What contenders of benchmark.py took, and what they will take where the text is longer."""

import math


USABLE_MEMORY = 0.8
GIB = 2**30


class Refused(Exception):
    """A contender is not measured; the message says why."""


class History:
    """What each contender took at shorter lengths, and what it will therefore take: by power laws up to quadratic."""

    def __init__(self, limit: float):
        self.limit = limit
        self.seconds, self.bytes = {}, {}

    def note(self, key: tuple, length: int, seconds: float, taken: int) -> None:
        """What a run took."""
        self.seconds.setdefault(key, {})[length] = seconds
        self.bytes.setdefault(key, {})[length] = taken

    def refuse(self, key: tuple, length: int, growth: float, free: int) -> None:
        """
        Raises:
            Refused: a run would take too long, or more memory than there is.
        """
        seconds = extrapolate(self.seconds.get(key, {}), length, growth)
        if seconds > self.limit:
            raise Refused(f"one run would take about {seconds:.0f} s, above the limit of {self.limit:g} s")
        taken = extrapolate(self.bytes.get(key, {}), length, growth)
        if taken > USABLE_MEMORY * free:
            raise Refused(f"it would need about {taken / GIB:.0f} GiB of memory, {free / GIB:.0f} are free")


def extrapolate(measured: dict[int, float], length: int, growth: float) -> float:
    """From the longest length measured, by the power seen between the last two, or `growth` if there is one only."""
    if not measured:
        return 0.0
    *before, last = sorted(measured)
    if before and min(measured[before[-1]], measured[last]) > 0:
        growth = math.log(measured[last] / measured[before[-1]]) / math.log(last / before[-1])
    return measured[last] * (length / last) ** min(max(growth, 1.0), 2.0)
