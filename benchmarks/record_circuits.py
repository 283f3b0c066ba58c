"""Records what auto-circuit 1.0.1 computes on TransformerLens 3.9.0 models, for tests/plugins/circuits/.

Run where both are installed, from the repository root:
    python benchmarks/record_circuits.py > tests/plugins/circuits/recorded_circuits.py
"""

import sys
import types

import torch
import transformer_lens
from record_transformer_lens import build
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

# auto-circuit imports a class by the name that it had in earlier releases
moved = types.ModuleType("transformer_lens.past_key_value_caching")
vars(moved)["HookedTransformerKeyValueCache"] = TransformerLensKeyValueCache
transformer_lens.HookedTransformerKeyValueCache = TransformerLensKeyValueCache
sys.modules[moved.__name__] = moved

from auto_circuit.data import PromptPairBatch  # noqa: E402
from auto_circuit.prune_algos.ACDC import acdc_prune_scores  # noqa: E402
from auto_circuit.types import AblationType  # noqa: E402
from auto_circuit.utils.ablation_activations import src_ablations  # noqa: E402
from auto_circuit.utils.graph_utils import patch_mode, patchable_model, train_mask_mode  # noqa: E402

CLEAN = torch.tensor([[1, 5, 2, 7, 3, 0], [4, 4, 9, 10, 8, 6]])
CORRUPTED = torch.tensor([[1, 5, 6, 7, 3, 0], [4, 2, 9, 10, 1, 6]])
ABLATIONS = {"corrupted": AblationType.RESAMPLE, "zero": AblationType.ZERO}
THRESHOLDS = {"0.001": (1, -3), "0.01": (1, -2), "0.05": (5, -2)}


def metric(logits: torch.Tensor) -> torch.Tensor:
    """Mean over the pairs of logit 3 minus logit 7, at the last position."""
    return (logits[:, -1, 3] - logits[:, -1, 7]).mean()


def kept(n_edges: int, k: int) -> torch.Tensor:
    """The k-th circuit: a formula, so that no generator has to agree."""
    return torch.sin(1.7 * torch.arange(1.0, n_edges + 1) + 3 * k) > 0.8 - 0.4 * k


def names(model) -> list[str]:
    """The modules that read, in the order in which hooklens numbers edges."""
    found = []
    for layer in range(model.cfg.n_layers):
        found += [f"blocks.{layer}.hook_{which}_input" for which in "qkv"]
        found += [] if model.cfg.attn_only else [f"blocks.{layer}.hook_mlp_in"]
    return [*found, f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"]


def patchable_of(name: str):
    """A model whose edges can be cut, its reading modules, and how many edges end in each."""
    flags = {"use_attn_result": True, "use_split_qkv_input": True, "use_hook_mlp_in": name != "attn_only"}
    model = build(name, **flags)
    readers = names(model)
    patchable = patchable_model(model, factorized=True, slice_output="last_seq", separate_qkv=True)
    dests = {dest.module_name: dest for dest in patchable.dest_wrappers}
    return patchable, readers, dests, [dests[one].patch_mask.numel() for one in readers]


def record_acdc(name: str, threshold: str) -> list[int]:
    """The edges that its ACDC keeps, tried in the order in which hooklens tries them; the metric is the divergence."""
    patchable, readers, dests, sizes = patchable_of(name)
    numbers: dict = {}
    for i, one in enumerate(readers):
        places = torch.arange(sizes[i]).view_as(dests[one].patch_mask) + sum(sizes[:i])
        numbers |= {edge: int(places[edge.patch_idx]) for edge in patchable.edges if edge.dest.module_name == one}
    patchable.edges = sorted(numbers, key=numbers.__getitem__, reverse=True)
    batch = PromptPairBatch(0, 0, CLEAN, CORRUPTED, [], [])
    base, exponent = THRESHOLDS[threshold]
    scores = acdc_prune_scores(patchable, [batch], None, [exponent], [base])
    flat = torch.cat([scores[one].flatten() for one in readers])
    return flat.isinf().nonzero().flatten().tolist()


def record(name: str, ablation: str) -> dict[str, list[float]]:
    patchable, readers, dests, sizes = patchable_of(name)
    ablated = src_ablations(patchable, CORRUPTED, ABLATIONS[ablation]).clone()

    def run(cut: torch.Tensor) -> torch.Tensor:
        for one, part in zip(readers, cut.float().split(sizes), strict=True):
            dests[one].patch_mask.data = part.view_as(dests[one].patch_mask)
        with patch_mode(patchable, ablated.clone()):
            return metric(patchable(CLEAN))

    with torch.no_grad():
        values = [float(run(~kept(sum(sizes), k))) for k in range(5)]
    with train_mask_mode(patchable):
        run(torch.zeros(sum(sizes))).backward()
        # the mask goes from the live value to the ablated one, a score the other way
        scores = torch.cat([-dests[one].patch_mask.grad.flatten() for one in readers])
    return {"scores": [round(x, 6) for x in scores.tolist()], "values": [round(x, 6) for x in values]}


def main() -> None:
    print('"""What auto-circuit 1.0.1 computes; written by benchmarks/record_circuits.py."""\n')
    print("# By model and ablation: EAP scores of every edge, and the metric of five circuits.")
    print("# fmt: off")
    print("RECORDED = {")
    for name in ("learned", "attn_only"):
        for ablation in ABLATIONS:
            found = record(name, ablation)
            print(f'    ("{name}", "{ablation}"): {{')
            print(f'        "values": {found["values"]},')
            print('        "scores": [')
            for i in range(0, len(found["scores"]), 10):
                print(f"            {', '.join(map(str, found['scores'][i : i + 10]))},")
            print("        ],")
            print("    },")
    print("}")
    print("# By model and threshold: the edges that ACDC keeps, corrupted ablation, by divergence from the clean run.")
    print("ACDC = {")
    for name in ("learned", "attn_only"):
        for threshold in THRESHOLDS:
            print(f'    ("{name}", {threshold}): {record_acdc(name, threshold)},')
    print("}")


if __name__ == "__main__":
    main()
