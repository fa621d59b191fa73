"""A random permutation is drawn here entry by entry, so that its first entries cost only themselves."""

from collections.abc import Iterator

import torch


def permutation(count: int, generator: torch.Generator) -> Iterator[int]:
    """Yield the numbers from 0 to `count` - 1 in random order, each drawn when it is asked for.

    They come in the order of `torch.randperm(count, generator=generator)`, which shuffles forward (Fisher and Yates):
    position i changes places with a random one from i on. Here only the numbers that were moved are kept, so the first
    k entries take time and memory for k. The order is torch's below 214,748,364 numbers. From there on torch's first
    entry depends on its last draw, so nothing cheaper than the whole permutation could repeat it.

    Args:
        count: how many numbers.
        generator: a random generator on the CPU, read once for every number.
    """
    moved: dict[int, int] = {}  # position → the number that stands there, where it is not the position's own
    for position in range(count):
        other = position + int(torch.randint(count - position, (1,), generator=generator))
        own = moved.pop(position, position)
        yield own if other == position else moved.get(other, other)
        if other != position:
            moved[other] = own
