"""Is an ablation sweep of all heads faster than the plain loop? GPT-2-small shape, 20 tokens, float32, 2 threads.

Run: python -m benchmarks.ablation
The loop is one hooked forward pass a head in hooklens itself, and, where transformer-lens==3.9.0 is installed, in
TransformerLens; it is timed on every sixth head and scaled. Both get the logits of every position, as a loop that
knows nothing of the metric does; "last logits only" is hooklens's own loop with `logits_at=-1`, the best that it can
be written.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch

import hooklens as hl
from benchmarks import peers
from benchmarks.rounds import alternate, machine, write
from hooklens.plugins.patching.ablation import ablate
from hooklens.plugins.patching.attribution_patching import attribution_patch
from hooklens.sweeps.replacement import Resample

N_POS, RIGHT, WRONG = 20, 1000, 2000


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--layers", type=int, default=12, help="fewer for a smoke run, which writes nothing")
    options.add_argument("--prompts", type=int, nargs="*", default=[1, 8])
    options.add_argument("--loop", type=int, default=6, help="the loops are timed on every so many heads, and scaled")
    options.add_argument("--ours-only", action="store_true")
    chosen = options.parse_args()
    torch.set_num_threads(2)
    torch.set_grad_enabled(False)
    model = peers.ours() if chosen.layers == 12 else small(chosen.layers)
    peer = None
    if chosen.layers == 12 and not chosen.ours_only and find_spec("transformer_lens"):
        peer = peers.transformer_lens(model)
    rows: list[dict[str, Any]] = []
    raw: dict[str, Any] = {}
    for n_prompts in chosen.prompts:
        for kind in ("zero", "mean", "resample"):
            if n_prompts > 1 or kind == "zero":
                rows += one(model, peer, n_prompts, kind, chosen.rounds, chosen.loop, raw)
    rows += estimate(model, chosen.rounds, raw)
    if chosen.layers == 12:
        write("ablation", "Ablation of all heads against the loop; attribution patching against patching", rows, raw)
    else:
        print(*rows, machine(), sep="\n")


def small(n_layers: int):
    from hooklens.model.config import HookedTransformerConfig
    from hooklens.model.transformer import HookedTransformer

    return HookedTransformer(HookedTransformerConfig(**peers.SIZES | {"n_layers": n_layers})).eval()


def one(model, peer, n_prompts: int, kind: str, rounds: int, step: int, raw: dict[str, Any]) -> list[dict[str, Any]]:
    """Every head, one kind: the engine against the loops."""
    tokens = torch.randint(50257, (n_prompts, N_POS), generator=torch.Generator().manual_seed(0))
    metric = hl.logit_diff(model, answer=RIGHT, wrong_answer=WRONG)
    value = {"resample": Resample(draws=1), "mean": hl.Mean(tokens)}.get(kind, kind)
    runs: dict[str, Callable[[], Any]] = {
        "hooklens ablate": lambda: ablate(model, tokens, metric, value=value).per_prompt,
        "loop of hooked forwards": partial(loop, model, tokens, kind, step),
        "loop, last logits only": partial(loop, model, tokens, kind, step, logits_at=-1),
    }
    if peer is not None:
        runs["loop in TransformerLens 3.9.0"] = partial(loop, peer, tokens, kind, step)
    out: dict[str, Any] = {}
    runs["hooklens ablate"]()  # warmed up; a loop of many seconds needs none
    seconds = alternate({name: partial(keep, out, name, run) for name, run in runs.items()}, rounds)
    what = f"{n_prompts} prompt{'s' if n_prompts > 1 else ''}, {kind}"
    raw[what] = seconds | {"the loops are timed on every": step}
    ours = seconds["hooklens ablate"]
    return [row(what, who, each, ours, out[who], out["hooklens ablate"], step) for who, each in seconds.items()]


def row(what: str, who: str, each: list[float], ours: list[float], found: Any, mine: Any, step: int) -> dict[str, Any]:
    """Median seconds for all heads, how many times faster hooklens was, and how far the numbers are apart."""
    mine, found = mine.flatten(1), found.flatten(1)
    if found.shape != mine.shape:
        each, mine = [step * seconds for seconds in each], mine[:, ::step]
    ratio = [a / b for a, b in zip(each, ours, strict=True)]
    return {
        "sweep": what,
        "who": who,
        "median s": statistics.median(each),
        "times hooklens (median)": statistics.median(ratio),
        "min": min(ratio),
        "max": max(ratio),
        "n": len(each),
        "largest difference": f"{float((found - mine).abs().max()):.1e}",
    }


def keep(out: dict[str, Any], name: str, run: Callable[[], Any]) -> None:
    out[name] = run()


def loop(model, tokens: torch.Tensor, kind: str, step: int, **options: Any) -> torch.Tensor:
    """prompt head: one hooked forward pass for every `step`-th head of the model, in either library."""
    names = [f"blocks.{layer}.attn.hook_z" for layer in range(model.cfg.n_layers)]
    values = {}
    if kind != "zero":
        # one draw of another prompt, the same that `Resample(draws=1)` makes
        source = tokens if kind == "mean" else donors(tokens)
        cache = model.run_with_cache(source, **sites(model, names))[1]
        values = {name: cache[name].mean(0, keepdim=True) if kind == "mean" else cache[name] for name in names}
    out = []
    for number in range(0, model.cfg.n_layers * model.cfg.n_heads, step):
        layer, head = divmod(number, model.cfg.n_heads)
        name = names[layer]

        def edit(z, hook, head=head, name=name):
            z[:, :, head] = values[name][:, :, head] if values else 0.0
            return z

        logits = model.run_with_hooks(tokens, fwd_hooks=[(name, edit)], **options)
        out.append(logits[:, -1, RIGHT] - logits[:, -1, WRONG])
    return torch.stack(out, 1)


def sites(model, names: list[str]) -> dict[str, Any]:
    """The argument that both libraries call differently."""
    return {"names": names} if isinstance(model, hl.HookedTransformer) else {"names_filter": names}


def donors(tokens: torch.Tensor) -> torch.Tensor:
    """The other prompts that one draw of `Resample` writes, worked out as it does."""
    from hooklens.sweeps.replacement import donors_of

    return donors_of(tokens, list(tokens), 1, torch.Generator().manual_seed(0))[0]


def estimate(model, rounds: int, raw: dict[str, Any]) -> list[dict[str, Any]]:
    """Attribution patching of all heads against exact patching, and against a forward and a backward pass."""
    clean = torch.randint(50257, (1, N_POS), generator=torch.Generator().manual_seed(0))
    corrupted = clean.clone()
    corrupted[0, 1] = (clean[0, 1] + 1) % 50257
    metric = hl.logit_diff(model, answer=RIGHT, wrong_answer=WRONG)

    def backward() -> torch.Tensor:
        with torch.enable_grad():
            x = model(corrupted, stop_at_layer=0).detach().requires_grad_()
            logits = model(x, start_at_layer=0)
            return torch.autograd.grad((logits[:, -1, RIGHT] - logits[:, -1, WRONG]).sum(), x)[0]

    runs: dict[str, Callable[[], Any]] = {
        "attribution_patching, no control": lambda: (
            attribution_patch(model, clean, corrupted, metric, site="z", exact=0).effect
        ),
        "hl.patch": lambda: hl.patch(model, clean, corrupted, metric, site="z").effect,
        "one forward and backward": backward,
    }
    out: dict[str, Any] = {}
    for run in runs.values():
        run()
    seconds = alternate({name: partial(keep, out, name, run) for name, run in runs.items()}, max(rounds, 5))
    raw["attribution"] = seconds
    ours = seconds["attribution_patching, no control"]
    return [
        {
            "sweep": "1 pair, z by head, estimated",
            "who": who,
            "median s": statistics.median(each),
            "times hooklens (median)": statistics.median([a / b for a, b in zip(each, ours, strict=True)]),
            "min": min(a / b for a, b in zip(each, ours, strict=True)),
            "max": max(a / b for a, b in zip(each, ours, strict=True)),
            "n": len(each),
            "largest difference": "an estimate",
        }
        for who, each in seconds.items()
    ]


if __name__ == "__main__":
    main()
