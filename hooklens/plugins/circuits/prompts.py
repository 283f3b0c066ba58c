"""Which prompts a circuit was found on: digests, so that an evaluation can say whether its own are new."""

from collections.abc import Sequence

from hooklens.core.envelope import digest
from hooklens.data.prompts import Pairs


def marks_of(groups: Sequence[Pairs]) -> list[str]:
    """A short digest of every clean prompt's tokens, in the order in which the pairs were given."""
    found = {}
    for group in groups:
        for index, row in zip(group.index, group.clean.tolist(), strict=True):
            found[index] = digest([str(row)])[:16]
    return [found[i] for i in sorted(found)]
