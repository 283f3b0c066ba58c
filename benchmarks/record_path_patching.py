"""Records path patching written by hand with TransformerLens 3.9.0's hooks, for tests/sweeps/test_paths_parity.py.

TransformerLens has no path patching of its own. Run where transformer_lens==3.9.0 is installed, from the repository
root: python benchmarks/record_path_patching.py > tests/sweeps/recorded_paths.py
"""

import torch
from record_patching_parity import CLEAN, CORRUPTED, metric
from record_transformer_lens import build

FLAGS = {"use_attn_result": True, "use_split_qkv_input": True, "use_hook_mlp_in": True}
#: By model: receivers as (kind, layer, head), recorded in each semantics.
RECEIVERS = {
    "learned": [[("final", 1, 0)], [("q", 1, 0)], [("k", 1, 1), ("v", 1, 0)], [("mlp_in", 0, 0), ("q", 1, 1)]],
    "rotary": [[("final", 1, 0)], [("mlp_in", 1, 0)]],  # its q input is not that of its heads there: keys are grouped
    "attn_only": [[("final", 1, 0)], [("q", 1, 1)], [("v", 1, 0)]],
}


def point(kind: str, layer: int) -> str:
    if kind == "final":
        return f"blocks.{layer}.hook_resid_post"
    return f"blocks.{layer}.hook_mlp_in" if kind == "mlp_in" else f"blocks.{layer}.hook_{kind}_input"


def sender_change(model, sender, caches):
    kind, layer, head = sender
    name = f"blocks.{layer}.attn.hook_result" if kind == "head" else f"blocks.{layer}.hook_mlp_out"
    clean, corrupted = (cache[name] for cache in caches)
    return (clean - corrupted)[:, :, head] if kind == "head" else clean - corrupted


def reads(sender, receiver) -> bool:
    """Does the receiver come after the sender?"""
    if receiver[0] == "final":
        return True
    return sender[1] < receiver[1] or (sender[1] == receiver[1] and sender[0] == "head" and receiver[0] == "mlp_in")


def edges(model, sender, receivers, caches):
    """Add the sender's change to what each receiver reads, in one pass."""
    change, hooks = sender_change(model, sender, caches), []
    for kind, layer, head in receivers:
        if not reads(sender, (kind, layer, head)):
            continue

        def add(act, hook, head=head):
            if act.ndim == 3:
                return act + change
            act[:, :, head] += change
            return act

        hooks.append((point(kind, layer), add))
    return metric(model.run_with_hooks(CORRUPTED, fwd_hooks=hooks))


def fixed(model, sender, receivers, caches, freeze_mlps: bool):
    """Wang et al. (2022), appendix B: record with the other heads frozen, then hold."""
    corrupted = caches[1]
    frozen, seen = [], {}
    for layer in range(model.cfg.n_layers):

        def freeze(act, hook, layer=layer):
            kept = corrupted[hook.name].clone()
            if sender[0] == "head" and sender[1] == layer:
                kept[:, :, sender[2]] = caches[0][hook.name][:, :, sender[2]]
            return kept

        def freeze_mlp(act, hook, layer=layer):
            return caches[0 if sender[:2] == ("mlp", layer) else 1][hook.name]

        frozen.append((f"blocks.{layer}.attn.hook_z", freeze))
        if not model.cfg.attn_only and (freeze_mlps or sender[:2] == ("mlp", layer)):
            frozen.append((f"blocks.{layer}.hook_mlp_out", freeze_mlp))

    def keep(act, hook):
        seen[hook.name] = act.clone()

    names = [point(kind, layer) for kind, layer, _ in receivers]
    model.run_with_hooks(CORRUPTED, fwd_hooks=frozen + [(name, keep) for name in dict.fromkeys(names)])

    def holding(head):
        def hold(act, hook):
            if act.ndim == 3:
                return seen[hook.name]
            act[:, :, head] = seen[hook.name][:, :, head]
            return act

        return hold

    held = [(name, holding(head)) for name, (_, _, head) in zip(names, receivers, strict=True)]
    return metric(model.run_with_hooks(CORRUPTED, fwd_hooks=held))


def record(name: str, receivers: list) -> dict[str, list[float]]:
    """The metric after each sender: heads in order, then MLPs."""
    flags = FLAGS if name != "rotary" else FLAGS | {"use_split_qkv_input": False}
    model = build(name, **{k: v for k, v in flags.items() if k != "use_hook_mlp_in" or name != "attn_only"})
    with torch.no_grad():
        caches = [model.run_with_cache(tokens)[1] for tokens in (CLEAN, CORRUPTED)]
        layers = range(model.cfg.n_layers)
        senders = [("head", layer, head) for layer in layers for head in range(model.cfg.n_heads)]
        senders += [] if model.cfg.attn_only else [("mlp", layer, 0) for layer in layers]
        found = {
            "edges": [edges(model, s, receivers, caches) for s in senders],
            "fixed": [fixed(model, s, receivers, caches, False) for s in senders],
            "frozen": [fixed(model, s, receivers, caches, True) for s in senders],
        }
    return {key: [round(float(x), 6) for x in values] for key, values in found.items()}


def main() -> None:
    print('"""Path patching by hand in TransformerLens 3.9.0; written by benchmarks/record_path_patching.py."""\n')
    print("# By model and receivers (kind, layer, head): the metric after each sender, heads first, then MLPs.")
    print("# fmt: off")
    print("RECORDED = {")
    for name, sets in RECEIVERS.items():
        for receivers in sets:
            print(f'    ("{name}", {tuple(receivers)}): {{'.replace("'", '"'))
            for key, values in record(name, receivers).items():
                print(f'        "{key}": {values},')
            print("    },")
    print("}")


if __name__ == "__main__":
    main()
