"""Edge patching the slow way: one hooked forward pass of the whole model a layer, for tests to compare with."""

import torch
from torch import Tensor

from hooklens.plugins.circuits.graph import CircuitGraph, circuit_graph


def node_outputs(model, graph: CircuitGraph, tokens: Tensor, hooks=()) -> tuple[list[Tensor], list[Tensor]]:
    """What every node wrote in a (hooked) run, and what each group of receivers read, from the cache alone."""
    names = ["result", "attn_out", "mlp_out", "hook_embed", "hook_pos_embed", "resid_pre", "resid_mid", "resid_post"]
    names = [n for n in model.hook_names() if n.rsplit(".")[-1].removeprefix("hook_") in names or n in names]
    names += [n for n in model.hook_names() if n.endswith("ln1_post.hook_scale")]
    with model.hooks(fwd_hooks=list(hooks)):
        _, cache = model.run_with_cache(tokens, names)
    embed = cache["hook_embed"]
    nodes = [embed + cache["hook_pos_embed"] if "hook_pos_embed" in cache else embed]
    reads = []
    for layer in range(graph.n_layers):
        reads.append(cache["resid_pre", layer])
        nodes += list(_heads(model, cache, layer).unbind(2))
        if graph.mlp:
            nodes.append(cache["mlp_out", layer])
            reads.append(cache["resid_pre" if graph.parallel else "resid_mid", layer])
    return nodes, [*reads, cache["resid_post", -1]]


def _heads(model, cache, layer: int) -> Tensor:
    result, block = cache["result", layer], model.blocks[layer]
    norm = block.ln1_post
    if norm is None:
        return result
    bias = 0 if block.attn.b_O is None else block.attn.b_O / block.attn.n_heads
    share = norm.centred(result + bias)
    out = share / cache[f"blocks.{layer}.ln1_post.hook_scale"][:, :, None]
    return out if norm.gain() is None else out * norm.gain()


def ablated_values(model, graph, clean, corrupted, ablation: str) -> tuple[list[Tensor], list[Tensor]]:
    nodes, reads = node_outputs(model, graph, clean if ablation == "mean" else corrupted)
    if ablation == "corrupted":
        return nodes, reads
    if ablation == "mean":
        return [n.mean(0, keepdim=True) for n in nodes], [r.mean(0, keepdim=True) for r in reads]
    left = [read - sum(nodes[: slot.columns]) for slot, read in zip(graph.slots, reads, strict=True)]
    # what no node wrote; rounding in a place that is 0 would be blown up by the norm that reads it
    left = [torch.where(rest.abs() < 1e-12, 0.0, rest) for rest in left]
    return [torch.zeros_like(n) for n in nodes], left


def slow_logits(model, kept: Tensor, clean: Tensor, corrupted: Tensor, ablation: str = "corrupted") -> Tensor:
    """The logits of one circuit: layer by layer, every receiver's input is written by a hook."""
    graph = circuit_graph(model)
    base_nodes, base_reads = ablated_values(model, graph, clean, corrupted, ablation)
    live = [node.clone() for node in node_outputs(model, graph, clean)[0][:1]]
    kept = kept.to(clean.device).double()
    for slot, base in zip(graph.slots, base_reads, strict=True):
        block = graph.block(kept, slot).to(live[0].dtype)
        moved = [a - b for a, b in zip(live, base_nodes, strict=False)]
        reads = [base + sum(w * m for w, m in zip(row, moved, strict=False)) for row in block]
        reads = [x.expand(len(clean), -1, -1) for x in reads]
        hooks = _writing(slot, reads, graph)
        if slot.kind == "logits":
            return model.run_with_hooks(clean, fwd_hooks=hooks)
        outputs = node_outputs(model, graph, clean, hooks)[0]
        where = graph.heads_at(slot.layer) if slot.kind == "attn" else slice(graph.mlp_at(slot.layer), None)
        live += outputs[where] if slot.kind == "attn" else [outputs[where.start]]
    raise AssertionError


def _writing(slot, reads, graph) -> list:
    at = f"blocks.{slot.layer}."
    if slot.kind == "logits":
        return [(f"blocks.{slot.layer - 1}.hook_resid_post", lambda act, hook: reads[0])]
    if slot.kind == "mlp":
        return [(at + "hook_mlp_in", lambda act, hook: reads[0])]
    h, g = graph.n_heads, graph.n_kv_heads
    parts = {"q": reads[:h], "k": reads[h : h + g], "v": reads[h + g :]}
    return [
        (f"{at}hook_{name}_input", lambda act, hook, part=part: torch.stack(part, 2)) for name, part in parts.items()
    ]
