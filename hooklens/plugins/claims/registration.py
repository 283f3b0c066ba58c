"""A claim written down before the run: what would confirm it, hashed so that it cannot be fitted to what came out."""

import hashlib
import json
import math
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from hooklens.core.errors import FileRefused, InputError
from hooklens.core.files import check_writable, read_json, reading, write_atomically
from hooklens.result import Result

SIDES = ("above", "below")
_LEAST_DIGITS = 8


@dataclass(frozen=True, eq=False)
class Registration(Result):
    """A hypothesis, and what will be held against it.

    >>> plan = Registration("L5H1 moves names", "logit_diff", "random heads of layer 5", threshold=0.05, n=64)
    >>> len(plan.digest), plan.written
    (64, '')

    The claim holds if, over `n` prompts, the effect on `metric` lies more than `threshold` above (or below) 0 and
    beyond what the `control` gives. `model` may be left open. Only a plan that was written to a file counts:
    `plan = plan.write("plan.json")` before the run, which sets the time `written` (UTC), or `Registration.read` of it.
    `digest` is the SHA-256 of all fields, time included, as canonical JSON.
    """

    hypothesis: str
    metric: str
    control: str
    threshold: float
    n: int
    side: str = "above"
    model: str = ""
    written: str = ""

    def __post_init__(self) -> None:
        for name in ("hypothesis", "metric", "control"):
            if not getattr(self, name).strip():
                raise InputError(f"a registration names its {name} before the run, got {getattr(self, name)!r}")
        if not (math.isfinite(self.threshold) and self.threshold >= 0):
            raise InputError(f"threshold is a distance from 0, at least 0, got {self.threshold}")
        if self.n < 2:
            raise InputError(f"n is the number of prompts, at least 2 for an interval, got {self.n}")
        if self.side not in SIDES:
            raise InputError(f"side is 'above' or 'below', got {self.side!r}")

    @property
    def digest(self) -> str:
        """What identifies the registration: publish that of the written one, where others see when, before the run."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def write(self, path: str | Path) -> "Registration":
        """Keep the registration as JSON, with the time and the digest, and return it as it was written.

        A file that is there already is not overwritten, and a plan that was written is not written again.
        """
        path = Path(path)
        check_writable(path)
        if self.written or path.exists():
            seen = f"this one was written at {self.written}" if self.written else f"{path} exists"
            raise InputError(f"a registration is written once, before the run, and {seen}; make another plan or name")
        made = replace(self, written=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"))
        with write_atomically(path) as aside:
            aside.write_text(json.dumps({**asdict(made), "digest": made.digest}, indent=1) + "\n", encoding="utf-8")
        return made

    @classmethod
    def read(cls, path: str | Path, *, digest: str | None = None) -> "Registration":
        """The registration in a file; one that was edited after it was written is refused.

        The digest in the file shows an accident. An edit with a digest recomputed shows only against the `digest` that
        was published (8 digits of it or more).
        """
        with reading(path, "a registration"):
            held = read_json(path, "a registration")
            own = str(held.pop("digest"))
            found = cls(**held)
        if digest is not None and len(digest) < _LEAST_DIGITS:
            raise InputError(f"a published digest is at least {_LEAST_DIGITS} digits long, got {digest!r}")
        for what, asked in (("its digest is", own), ("the published digest is", digest or own)):
            if not found.digest.startswith(asked):
                raise FileRefused(
                    f"{path} was changed after it was registered: {what} {asked[:12]}, its text gives "
                    f"{found.digest[:12]}"
                )
        return found
