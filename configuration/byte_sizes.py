"""Sizes of memory as people write them."""

import re
from decimal import Decimal


UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {unit.replace("B", "iB"): 2 ** (10 * power) for power, unit in enumerate(("KB", "MB", "GB", "TB"), start=1)}


def bytes_of(name: str, size: int | str) -> int:
    """
    Bytes, given a whole number of them or a text such as "2GiB" or "500 MB".

    Raises:
        ValueError: It is neither; the message calls it by its `name`.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([A-Za-z]*)\s*", str(size))
    if type(size) not in (int, str) or found is None or found[2] not in UNITS:
        raise ValueError(
            f'`{name}` must be a number of bytes, 0 or more, or a text like "2GiB" with one of the units '
            f"{[unit for unit in UNITS if unit]}, but got {size!r}."
        )
    return int(Decimal(found[1]) * UNITS[found[2]])
