"""A few patches are run again the plain way; a sweep whose numbers differ by more than rounding raises."""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.core.arguments import seeded
from hooklens.core.errors import CheckFailed
from hooklens.core.precision import is_autocast
from hooklens.sweeps.measure import Reader
from hooklens.sweeps.protocol import Patches
from hooklens.sweeps.settings import current

# Two ways of summing differ by about what one rounding of the stream before every block moves the metric: by at most
# 0.7 of it on SmolLM2, 2.3 on tiny models of every family, in float32, bfloat16 and float16.
_ROUNDINGS = 30


def verify(
    patches: Patches,
    reader: Reader,
    worked: Collection[int],
    values: Float[Tensor, "patch pair"],
    *,
    resumed: Collection[int] = (),
    file: Any = None,
) -> tuple[float, int]:
    """Run some patches that were computed, and some that a file gave, the plain way: the largest difference, how many.

    A difference beyond rounding raises.
    """
    chosen = patches.checks(_shuffled(set(worked) - set(resumed)), current().verify, reader)
    chosen += Patches.checks(patches, _shuffled(resumed), current().verify, reader)
    if not chosen:
        return (float("nan"), 0) if worked or resumed else (0.0, 0)
    worst = 0.0
    for some in chosen:
        again = patches.plain(some, reader)
        errors = (again - values[some]).abs().amax(1)
        error = float(errors.max())
        worst = max(worst, error)
        unit = _unit(patches.model) * float(torch.maximum(again.abs(), values[some].abs()).max())
        if error <= _ROUNDINGS * unit:
            continue
        # The very same pass once more: a metric that drifts from call to call would pass for one that rounding moves.
        same = float((patches.plain(some, reader) - again).abs().max()) <= _ROUNDINGS * unit
        moved = _moved_by_rounding(patches, some, reader, again) if same else 0.0
        allowed = _ROUNDINGS * max(unit, moved)
        if not error <= allowed:  # NaN is beyond it
            number = some[int(errors.argmax())]
            seen = f"differs by {error:.3g} from a plain hooked run, and rounding explains at most {allowed:.1g}"
            raise _differs(patches, number, seen, file if number in resumed else None)
    return worst, sum(map(len, chosen))


def _shuffled(numbers: Collection[int]) -> list[int]:
    ordered = sorted(numbers)
    return [ordered[i] for i in torch.randperm(len(ordered), generator=seeded(current().seed)).tolist()]


def _moved_by_rounding(patches: Patches, some: Sequence[int], reader: Reader, exact: Tensor) -> float:
    """How far the metric moves when every number of the stream moves up or down by one rounding, before every block."""
    unit, generator = _unit(patches.model), torch.Generator().manual_seed(0)

    def nudge(act: Tensor, hook: Any) -> Tensor:
        up = torch.randint(0, 2, act.shape, generator=generator).to(act)
        return act * (1 + unit * (2 * up - 1))

    with patches.model.hooks(fwd_hooks=[("resid_pre", nudge)]):
        return float((patches.plain(some, reader) - exact).abs().max())


def _unit(model: Any) -> float:
    """The relative size of a rounding here: torch may be allowed to multiply float32 with fewer digits."""
    dtype = torch.get_autocast_dtype(model.device.type) if is_autocast(model.device) else model.dtype
    shorter = {"high": 2.0**-10, "medium": 2.0**-7}.get(torch.get_float32_matmul_precision(), 0.0)
    return max(torch.finfo(dtype).eps, shorter if dtype == torch.float32 else 0.0)


def _differs(patches: Patches, number: int, seen: str, file: Any) -> CheckFailed:
    """The error for a patch whose value is not that of the plain run; `file`: where the value was kept."""
    name = patches.name_of(number)
    if file is not None:
        return CheckFailed(
            f"the metric of {name}, kept in {file}, {seen}: the file was made by another sweep (another "
            "metric, value or model under the same key); delete it or give resume= another path"
        )
    causes = ["the metric gives other numbers when it is called again"]
    causes += [f"{part} does not match the forward pass" for part in patches.outside()]
    return CheckFailed(
        f"the metric of {name} {seen}: {', or '.join(causes)}, or the engine is wrong here; in Python, "
        "hl.engine(plain=True) runs every patch plainly, and hl.engine(verify=0) does not check"
    )
