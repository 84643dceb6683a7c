"""Step masks: which steps of a loop are computed, as bins of steps that take turns.

    computed  8     3     3     2     1      1
    reused       1     2     2     2      3         -> 11111111 0 111 00 111 00 11 00 1 000 1

The presets, and how they are fitted to another number of steps, are cache-dit's ``steps_mask``:
https://github.com/vipshop/cache-dit
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import zip_longest

Bins = tuple[Sequence[int], Sequence[int]]
"""How many steps in a row are computed, and then reused, in turns."""

PRESETS = ("slow", "medium", "fast", "ultra")

_OF_28: dict[str, Bins] = {
    "slow": ((8, 3, 3, 2, 1, 1), (1, 2, 2, 2, 3)),
    "medium": ((6, 2, 2, 2, 2, 1), (1, 3, 3, 3, 3)),
    "fast": ((6, 1, 1, 1, 1, 1), (1, 3, 4, 5, 4)),
    "ultra": ((4, 1, 1, 1, 1), (2, 5, 6, 7)),
}
# For distilled models.
_OF_15: dict[str, Bins] = {
    "slow": ((4, 2, 2, 2, 1), (1, 1, 1, 1)),
    "medium": ((4, 2, 1, 1, 1), (1, 1, 2, 2)),
    "fast": ((3, 1, 1, 1, 1), (1, 2, 2, 3)),
    "ultra": ((2, 1, 1, 1, 1), (1, 2, 3, 3)),
}
_OF_9: dict[str, Bins] = {
    "slow": ((5, 2, 1), (1,)),
    "medium": ((5, 1, 1), (1, 1)),
    "fast": ((4, 1, 1), (1, 2)),
    "ultra": ((3, 1, 1), (2, 2)),
}
_OF_8: dict[str, Bins] = {
    "slow": ((5, 1, 1), (1,)),
    "medium": ((4, 1, 1), (1, 1)),
    "fast": ((3, 1, 1), (1, 2)),
    "ultra": ((2, 1, 1), (2, 2)),
}


def from_bins(computed: Sequence[int], reused: Sequence[int]) -> tuple[int, ...]:
    """The mask of bins that take turns, 1 for a step that is computed, 0 for one that is reused."""
    turns = zip_longest(computed, reused, fillvalue=0)
    return tuple(bit for ones, zeros in turns for bit in (1,) * ones + (0,) * zeros)


@lru_cache(maxsize=256)
def preset(name: str, steps: int) -> tuple[int, ...]:
    """The mask of a preset for a number of steps; the last step is always computed.

    Below 8 steps all presets are alike. cache-dit has masks for 4 and 6 of these; here the others
    follow the same rule.
    """
    if steps < 8:
        bins: Bins = ((steps + 1) // 2, 1), (max(steps // 2 - 1, 0),)
    elif steps < 16:
        table = {8: _OF_8, 9: _OF_9}.get(steps, _OF_15)
        bins = _cut(table[name], steps)
    else:
        bins = _cut(_stretched(_OF_28[name], steps), steps)
    return (*from_bins(*bins)[: steps - 1], 1)


def _stretched(bins: Bins, steps: int) -> Bins:
    """Let all bins grow in proportion, one after the other, until there are steps enough."""
    computed, reused = map(list, bins)
    while True:
        for place, sizes in enumerate(zip(*bins, strict=False)):
            for grown, size in zip((computed, reused), sizes, strict=True):
                if sum(computed) + sum(reused) >= steps:
                    return computed, reused
                grown[place] += max(int(size * (steps / 28 * 0.5)), 1)
        if sum(computed) + sum(reused) < steps:
            computed[-1] += 1


def _cut(bins: Bins, steps: int) -> Bins:
    """Take steps from the last reused and the last computed bin, by turns, until they fit."""
    shrunk, surplus = [list(each) for each in bins], sum(map(sum, bins)) - steps
    for taken in range(surplus):
        last = shrunk[1 - taken % 2]
        last[-1] -= 1
        if last[-1] == 0:
            last.pop()
    return shrunk[0], shrunk[1]
