"""Is path patching faster than the loop of hooked forward passes? GPT-2-small shape, 20 tokens, float32, 2 threads.

All 144 heads to the logits, and to one receiver's query, as edges and with fixed receivers (Wang et al.). The loops are
timed on every sixth head and scaled; they skip heads that come after the receiver. Needs transformer-lens==3.9.0 beside
hooklens, or --ours-only.
Run: python -m benchmarks.paths
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import hooklens as hl
from benchmarks import peers
from benchmarks.rounds import alternate, write
from benchmarks.sweeps import RIGHT, WRONG, keep, prompts
from hooklens.plugins.patching.path import Fixed, path_patch

LAYER, HEAD = 9, 9
QUERY = ("q", LAYER, HEAD)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--loop", type=int, default=24, help="of the 144 senders, those that the loops are timed on")
    options.add_argument("--ours-only", action="store_true")
    chosen = options.parse_args()
    torch.set_num_threads(2)
    torch.set_grad_enabled(False)
    model = peers.ours()
    metric = hl.logit_diff(model, answer=RIGHT, wrong_answer=WRONG)
    clean, corrupted, _ = prompts()
    senders = [(i // 12, i % 12) for i in range(144)]
    few = senders[:: 144 // chosen.loop]
    peer = None if chosen.ours_only else peers.transformer_lens(model)
    cases: dict[str, Any] = {
        "to the logits, edges": "final",
        "to the logits, fixed receivers": Fixed("final"),
        f"to L{LAYER}H{HEAD}.q, edges": QUERY,
        f"to L{LAYER}H{HEAD}.q, fixed receivers": Fixed(QUERY),
    }
    rows, raw = [], {}
    for name, receivers in cases.items():
        asked = partial(path_patch, model, clean, corrupted, metric, receivers=receivers)
        ours = partial(asked, senders=senders)
        runs: dict[str, Callable[[], Any]] = {"hooklens": partial(lambda sweep: sweep().values, ours)}
        runs["hooklens, unpacked"] = partial(unpacked, ours)
        runs["hooklens's own loop"] = partial(plain, partial(asked, senders=few))
        if peer is not None and isinstance(receivers, Fixed):
            runs["TransformerLens 3.9.0, loop"] = partial(theirs, peer, clean, corrupted, few, receivers.receivers)
        out: dict[str, Any] = {}
        runs["hooklens"]()
        seconds = alternate({key: partial(keep, out, key, run) for key, run in runs.items()}, chosen.rounds)
        rows += summary(name, seconds, out)
        raw[name] = seconds | {"senders of the loops": len(few)}
    write("paths", "Path patching against the loop", rows, raw)


def unpacked(run: Callable[[], Any]) -> torch.Tensor:
    with hl.packed_linears(enabled=False):
        return run().values


def plain(run: Callable[[], Any]) -> torch.Tensor:
    with hl.engine(plain=True, progress=False):
        return run().values


def theirs(peer: Any, clean: torch.Tensor, corrupted: torch.Tensor, senders: list, receivers: Any) -> torch.Tensor:
    """The loop as people write it: heads frozen by hooks on z, MLPs live, the receiver's q recorded and held."""
    zs = [peer.run_with_cache(tokens, names_filter=lambda n: n.endswith("hook_z"))[1] for tokens in (clean, corrupted)]
    base = float(score(peer(corrupted)))
    return torch.tensor([_one(peer, zs, corrupted, sender, receivers, base) for sender in senders])


def _one(peer: Any, zs: list, corrupted: torch.Tensor, sender: tuple, receivers: Any, base: float) -> float:
    layer, head = sender
    if receivers != "final" and layer >= LAYER:
        return base

    def freeze(z: torch.Tensor, hook: Any) -> torch.Tensor:
        z[:] = zs[1][hook.name]
        if hook.layer() == layer:
            z[:, :, head] = zs[0][hook.name][:, :, head]
        return z

    frozen, seen = [(lambda name: name.endswith("hook_z"), freeze)], {}
    if receivers == "final":
        return float(score(peer.run_with_hooks(corrupted, fwd_hooks=frozen)))

    def record(q: torch.Tensor, hook: Any) -> None:
        seen["q"] = q[:, :, HEAD].clone()

    def hold(q: torch.Tensor, hook: Any) -> torch.Tensor:
        q[:, :, HEAD] = seen["q"]
        return q

    point = f"blocks.{LAYER}.attn.hook_q"
    peer.run_with_hooks(corrupted, fwd_hooks=[*frozen, (point, record)], stop_at_layer=LAYER + 1)
    return float(score(peer.run_with_hooks(corrupted, fwd_hooks=[(point, hold)])))


def score(logits: torch.Tensor) -> torch.Tensor:
    return logits[0, -1, RIGHT] - logits[0, -1, WRONG]


def summary(name: str, seconds: dict[str, list[float]], out: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a contender: median seconds for 144 senders, how many times faster hooklens was, largest difference."""
    rows = []
    for who, each in seconds.items():
        step = 144 // len(out[who])
        scaled = [step * one for one in each]
        faster = [a / b for a, b in zip(scaled, seconds["hooklens"], strict=True)]
        row = {"paths": name, "who": who, "timed on": len(out[who]), "median s for 144": statistics.median(scaled)}
        row |= {"times hooklens (median)": statistics.median(faster), "min": min(faster), "max": max(faster)}
        apart = (out[who] - out["hooklens"][::step]).abs().max()
        rows.append(row | {"n": len(each), "largest difference": f"{float(apart):.1e}"})
    return rows


if __name__ == "__main__":
    main()
