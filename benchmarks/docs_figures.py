"""The numbers that docs/ quotes of SmolLM2-135M, worked out anew: no speeds, only what the methods find.

Each row names the page. Run: python -m benchmarks.docs_figures
"""

from collections.abc import Iterator
from typing import Any

import torch

import hooklens as hl
from benchmarks.rounds import write
from hooklens.data.indirect_object import ioi
from hooklens.plugins.lens.affine_lens import fit_tuned_lens
from hooklens.plugins.lens.layer_lens import logit_lens
from hooklens.plugins.patching.attribution_patching import attribution_patch
from hooklens.plugins.patching.input_attribution import integrated_gradients
from hooklens.pretrained.assets import text

Row = dict[str, Any]


def main() -> None:
    torch.set_num_threads(2)
    model = hl.load("smollm2-135m-instruct")
    rows: list[Row] = []
    for page in (attribution, lens):
        for row in page(model):
            rows.append({"page": f"docs/{page.__name__}.md"} | row)
            print(rows[-1], flush=True)
    write("docs_figures", "Numbers of SmolLM2-135M that the docs quote", rows, {"rows": rows})


def attribution(model: hl.HookedTransformer) -> Iterator[Row]:
    pairs = ioi(model, 16, seed=0)
    mlps = attribution_patch(model, pairs, site="mlp_out", by="layer", exact=15)
    place = mlps.checked[:, 0].tolist()
    yield {"what": "first MLP, estimated", "value": float(mlps.estimated[place.index(0)])}
    yield {"what": "first MLP, exact", "value": float(mlps.exact[place.index(0)])}
    late = [i for i, layer in enumerate(place) if layer >= 15]
    yield {"what": "MLPs 15 to 29, correlation", "value": _correlation(mlps.estimated[late], mlps.exact[late])}
    z = attribution_patch(model, pairs, site="z", by=("layer", "head"), exact=20)
    yield {"what": "40 heads, correlation", "value": z.correlation}
    some = pairs[:4]
    for baseline in (some.corrupted, "mean"):
        found = integrated_gradients(model, some.clean, some.metric_of(model), baseline=baseline, steps=64, stages=0)
        name = baseline if isinstance(baseline, str) else "corrupted prompts"
        yield {"what": f"integrated gradients, 64 steps from {name}: missing share", "value": found.incompleteness}


def lens(model: hl.HookedTransformer) -> Iterator[Row]:
    reading = logit_lens(model, ioi(model, 16, seed=0).clean)
    kl = reading.kl.flatten(1).mean(1)
    for layer in (0, 1, 10, 20, 29):
        yield {"what": f"logit lens before block {layer}, KL in nats", "value": float(kl[layer])}
    for row, value in (("lowest", kl[:15].min()), ("highest", kl[:15].max())):
        yield {"what": f"logit lens before blocks 0 to 14, {row} KL in nats", "value": float(value)}
    ids = model.to_tokens(text("shakespeare")[1_000_000:1_012_000])[0]
    _, fit = fit_tuned_lens(model, ids[: len(ids) // 32 * 32].view(-1, 32))
    yield {"what": "fit_tuned_lens, tokens", "value": fit.train_tokens}
    for layer in (0, 1, 20, 29):
        before, after = float(fit.before[:, layer].mean()), float(fit.after[:, layer].mean())
        yield {"what": f"fit_tuned_lens before block {layer}, held-out KL in nats", "value": after, "of": before}
    yield {"what": "one fixed distribution, KL in nats", "value": float(fit.constant.mean())}
    yield {"what": "layers whose held-out KL falls", "value": int((fit.fall > 0).sum()), "of": len(fit.fall)}


def _correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


if __name__ == "__main__":
    main()
