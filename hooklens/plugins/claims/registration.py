"""A claim written down before the run: what would confirm it, hashed so that it cannot be fitted to what came out."""

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from hooklens.core.errors import FileRefused, InputError
from hooklens.core.files import write_atomically
from hooklens.result import Result

SIDES = ("above", "below")


@dataclass(frozen=True, eq=False)
class Registration(Result):
    """A hypothesis, and what will be held against it.

    >>> plan = Registration("L5H1 moves names", "logit_diff", "random heads of layer 5", threshold=0.05, n=64)
    >>> plan.digest[:8], len(plan.digest)
    ('...', 64)

    The claim holds if, over `n` prompts, the effect on `metric` lies more than `threshold` above (or below) 0 and
    beyond what the `control` gives. `digest` is the SHA-256 of the fields as canonical JSON.
    """

    hypothesis: str
    metric: str
    control: str
    threshold: float
    n: int
    side: str = "above"

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
        """What identifies the registration: publish it before the run."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def write(self, path: str | Path) -> Path:
        """Keep the registration and its digest as JSON; a file that is there already is not overwritten."""
        path = Path(path)
        if path.exists():
            raise InputError(f"{path} exists; a registration is written once, before the run: choose another name")
        with write_atomically(path) as aside:
            aside.write_text(json.dumps({**asdict(self), "digest": self.digest}, indent=1) + "\n", encoding="utf-8")
        return path

    @classmethod
    def read(cls, path: str | Path) -> "Registration":
        """The registration in a file; one that was edited after it was written is refused."""
        try:
            held = json.loads(Path(path).read_text(encoding="utf-8"))
            digest = held.pop("digest")
            found = cls(**held)
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise FileRefused(f"{path} is not a registration that hooklens wrote: {error}") from error
        if found.digest != digest:
            raise FileRefused(
                f"{path} was changed after it was registered: its digest is {digest[:12]}, its text gives "
                f"{found.digest[:12]}"
            )
        return found
