"""Two audits of every family: each hook point is causal and fires in order; the residual identities hold."""

import pytest
import torch
from families import FAMILIES, tiny, tiny_tokens

from hooklens.pretrained.model_check import check

every_family = pytest.mark.parametrize("name", FAMILIES)


# one family for each kind of block, norm, position and cap; the others have the same points
@pytest.mark.parametrize("name", ["gpt2", "llama3", "gpt_neox", "qwen3", "gemma2"])
def test_every_point_that_is_edited_changes_the_logits(name):
    model, tokens = tiny(name, torch.float64), tiny_tokens(2, 6)
    generator = torch.Generator().manual_seed(1)

    def shake(act, hook):
        return act * (1 + 0.5 * torch.rand(act.shape, generator=generator, dtype=act.dtype))

    with torch.no_grad():
        plain = model(tokens)
        idle = [
            point
            for point in model.hook_names()
            if (model.run_with_hooks(tokens, fwd_hooks=[(point, shake)]) - plain).abs().max() < 1e-6
        ]
    assert idle == []


@every_family
def test_the_residual_stream_is_the_sum_of_what_was_written(name):
    model = tiny(name)
    with torch.no_grad():
        _, cache = model.run_with_cache(tiny_tokens(2, 9))
    for layer in range(model.cfg.n_layers):
        pre, attn, mlp = (cache[site, layer] for site in ("resid_pre", "attn_out", "mlp_out"))
        if model.cfg.block.name == "parallel":
            assert ("resid_mid", layer) not in cache
            assert torch.equal(cache["resid_post", layer], pre + attn + mlp)
        else:
            assert torch.equal(cache["resid_mid", layer], pre + attn)
            assert torch.equal(cache["resid_post", layer], cache["resid_mid", layer] + mlp)
        if layer:
            assert torch.equal(pre, cache["resid_post", layer - 1])


@every_family
def test_the_self_check_passes(name):
    """It also sees whether every hook point fires once and in order."""
    for dtype in (torch.float32, torch.bfloat16):
        report = check(tiny(name).to(dtype))
        assert report.ok, f"\n{report.table()}"


def test_the_self_check_sees_a_weight_that_is_not_finite():
    model = tiny("llama")
    with torch.no_grad():
        model.blocks[1].mlp.out.weight[3, 4] = torch.nan
    report = check(model)
    assert not report.ok
    assert report.rows[0][1:] == (1.0, 0.0, False)


def test_the_self_check_sees_a_stream_that_something_else_was_added_to():
    model = tiny("llama")
    model.add_hook(("resid_post", 1), lambda act, hook: act + 0.1)
    failed = [row[0] for row in check(model).rows if not row[3]]
    assert "resid_post against the stream + mlp_out" in failed


def test_the_self_check_table_names_what_failed():
    model = tiny("gpt2")
    model.add_hook(("z", 0), lambda act, hook: act * torch.rand(()))  # another number in each way to the logits
    assert "FAILED" in str(check(model).table())
