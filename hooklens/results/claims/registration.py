"""A claim written down before the run: a hashed plan, so that it cannot be adapted to the result."""

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hooklens.core.arguments import path_of
from hooklens.core.envelope import Schema, digest_of, read_envelope, write_envelope
from hooklens.core.errors import ArgumentError, FileRefused, InputError
from hooklens.core.files import check_writable, reading
from hooklens.results.result import Result

SIDES = ("above", "below")
_DIGEST = re.compile("[0-9a-f]{64}")
_SCHEMA = Schema("hooklens.registration", 1, "a registration", "Registration.write", as_json=True)


@dataclass(frozen=True, eq=False)
class Registration(Result):
    """A hypothesis, and the criterion for its confirmation.

    >>> plan = Registration("L5H1 moves names", "logit_diff", "random heads of layer 5", threshold=0.05, n=64)
    >>> len(plan.digest), plan.written
    (64, '')

    The claim holds if, over `n` prompts, the effect on `metric` lies more than `threshold` above (or below) 0 and
    beyond what the `control` gives. `model` may be left open. Only a plan that was written to a file counts: `plan =
    plan.write("plan.json")` before the run, which sets the time `written` (UTC), or `Registration.read` of it. `digest`
    is that of the file: the SHA-256 of these fields, time included, with the name of the schema. `published` is the
    digest that was made public before the run and that the file was read against; without it nothing but its author's
    clock dates the plan.
    """

    hypothesis: str
    metric: str
    control: str
    threshold: float
    n: int
    side: str = "above"
    model: str = ""
    written: str = ""
    published: str = ""

    def __post_init__(self) -> None:
        wrong = [
            f"{{{name}}} is empty, but a registration must state it; give a few words"
            for name in ("hypothesis", "metric", "control")
            if not getattr(self, name).strip()
        ]
        if not (math.isfinite(self.threshold) and self.threshold >= 0):
            wrong.append(f"{{threshold}} must be a distance from 0, at least 0, got {self.threshold}")
        if self.n < 2:
            wrong.append(f"{{n}} is the number of prompts; an interval needs at least 2, got {self.n}")
        if wrong:
            raise ArgumentError("; ".join(wrong))
        if self.side not in SIDES:
            raise InputError(f"side must be 'above' or 'below', got {self.side!r}")

    @property
    def digest(self) -> str:
        """What identifies the registration: publish that of the written one, where others see when, before the run."""
        return digest_of(_SCHEMA, self._plan)

    @property
    def _plan(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "published"}

    @property
    def dated(self) -> str:
        """How the plan is dated, with the first digits of its digest: "registered ..." or "self-dated ...".

        >>> Registration("L5H1 moves names", "logit_diff", "random heads", threshold=0.05, n=64).dated
        'unwritten ...'
        """
        if not self.written:
            return f"unwritten {self.digest[:8]}"
        return f"{'registered' if self.published else 'self-dated'} {self.written} as {self.digest[:8]}"

    def write(self, path: str | Path) -> "Registration":
        """Write the registration as JSON, with the time and the digest, and return it as written.

        An existing file is never overwritten, and a plan that was written is not written again.
        """
        path = path_of(path)
        if self.written:
            raise _once(f"this one was written at {self.written}")
        check_new(path)
        written = replace(self, written=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"))
        write_envelope(path, _SCHEMA, written._plan)
        return written

    @classmethod
    def read(cls, path: str | Path, *, digest: str | None = None) -> "Registration":
        """Read the registration in a file; a file that was edited after writing raises an error.

        The digest in the file reveals accidental changes. An edit with a recomputed digest is revealed only by the
        published `digest`, all 64 digits of it. Without it the plan is "self-dated".
        """
        if digest is not None:
            digest = _whole(digest)
        content = read_envelope(path, _SCHEMA).content
        with reading(path, _SCHEMA.what):
            if "published" in content:
                raise ValueError("a file cannot say that its digest was published")
            plan = cls(**content)
        if digest not in (None, plan.digest):
            raise FileRefused(
                f"{path} was changed after it was registered: the published digest is {digest[:12]!r}, its text gives "
                f"{plan.digest[:12]!r}"
            )
        return replace(plan, published=digest or "")


def read_plans(paths: Sequence[str | Path], digests: Sequence[str] = ()) -> list[Registration]:
    """Read the plans in these files; each is marked as published if its digest is among `digests`.

    >>> read_plans([])
    []

    A digest that belongs to none of them raises an error: its plan is another file, or was edited.
    """
    files = {path_of(path): Registration.read(path) for path in paths}
    plans, published = {plan.digest: plan for plan in files.values()}, {_whole(digest) for digest in digests}
    unmet = sorted(published - {*plans})
    if unmet:
        seen = ", ".join(f"{path} has {plan.digest[:12]}" for path, plan in files.items()) or "none"
        says = "{digest}: no plan has the published digest {0}: {1}; give the plan as it was published"
        raise ArgumentError(says, unmet[0][:12], seen)
    return [replace(plan, published=plan.digest if plan.digest in published else "") for plan in plans.values()]


def check_new(path: Path) -> None:
    """Raise if a plan cannot be written there; an existing file is never overwritten."""
    check_writable(path)
    if path.exists():
        raise _once(f"{path} exists")


def _once(seen: str) -> InputError:
    return InputError(f"a registration is written once, before the run, but {seen}; make another plan or name")


def _whole(digest: str) -> str:
    if not _DIGEST.fullmatch(digest.strip().lower()):
        raise ArgumentError("{digest} has 64 hexadecimal digits, as it was published; got {0}", f"{digest[:80]!r}")
    return digest.strip().lower()
