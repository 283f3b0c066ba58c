"""Direct logit attribution: every sum is what it is a sum of, whatever the blocks look like."""

import pytest
import torch
from model.zoo import TOKENS, ZOO, zoo_model
from torch import nn

import hooklens as hl
from hooklens.core.errors import InputError
from hooklens.plugins.lens import direct
from hooklens.plugins.lens import logit_attribution as module
from hooklens.plugins.lens.logit_attribution import LogitAttribution, direct_logit_attribution
from hooklens.testing import induction_model, tiny_model

ADDITIVE = [name for name in ZOO if not name.startswith("post")]
ANSWER, WRONG_ANSWER = [1, 2], [3, 4]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", ADDITIVE)
def test_the_parts_sum_to_the_uncapped_logit(name, dtype):
    """Minus b_U and minus the final norm's bias through W_U, recomputed here from the weights."""
    model = zoo_model(name, dtype=dtype)
    norm, rows = model.ln_final, torch.arange(2)
    _, cache = model.run_with_cache(TOKENS)
    raw = cache["unembed.hook_out"][:, -1]
    for wrong in (None, WRONG_ANSWER):
        found = direct_logit_attribution(model, TOKENS, answer=ANSWER, wrong_answer=wrong)

        def asked(x, wrong=wrong):
            return x[rows, ANSWER] - (0 if wrong is None else x[rows, wrong])

        b_U = torch.zeros(2, model.cfg.d_vocab_out) if model.b_U is None else model.b_U.detach().expand(2, -1)
        bias = torch.zeros_like(raw) if norm is None or norm.bias is None else (norm.bias @ model.W_U).expand(2, -1)
        expected = asked(raw - b_U - bias)
        within = {"atol": TOLERANCE[dtype] * max(1, float(found.components.abs().max())), "rtol": 0}
        torch.testing.assert_close(found.total, expected.detach(), **within)
        torch.testing.assert_close(found.logit, asked(raw), **within)
        sums = found.heads.sum(-1) + found.attn_bias + found.neurons.sum(-1) + found.mlp_bias
        torch.testing.assert_close(found.layers, sums, **within)
        moved = torch.stack([one.sum(-1) for one in found.sources])
        torch.testing.assert_close(moved, found.heads, **within)
        assert found.error <= within["atol"] and "frozen" in found.frozen


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "neox", "attn_only", "sandwich_ln", "no_norm"])
def test_it_is_what_the_cache_gives(name):
    model = zoo_model(name, dtype=torch.float64)
    found = direct_logit_attribution(model, TOKENS, answer=ANSWER, wrong_answer=WRONG_ANSWER, pos=2)
    _, cache = model.run_with_cache(TOKENS)
    right, wrong = torch.tensor(ANSWER), torch.tensor(WRONG_ANSWER)
    stacks = {"components": cache.decompose_resid(pos=2), "heads": cache.stack_head_results(pos=2)}
    if model.cfg.d_mlp and model.blocks[0].mlp is not None:
        stacks["neurons"] = cache.stack_neuron_results(pos=2)
    for part, (stack, labels) in stacks.items():
        expected = cache.logit_attrs(stack, right, wrong, pos=2).T
        torch.testing.assert_close(getattr(found, part).flatten(1), expected, atol=1e-10, rtol=1e-10)
        assert part != "components" or found.labels == labels


def test_spread_is_the_deviation_over_the_vocabulary():
    model = zoo_model("gpt2_bias_everywhere", dtype=torch.float64)
    found = direct_logit_attribution(model, TOKENS, answer=ANSWER)
    _, cache = model.run_with_cache(TOKENS)
    for part, (stack, _) in {
        "spread": cache.decompose_resid(pos=-1),
        "head_spread": cache.stack_head_results(pos=-1),
    }.items():
        every = torch.stack([cache.logit_attrs(stack, [i, i], pos=-1) for i in range(model.cfg.d_vocab)])
        torch.testing.assert_close(getattr(found, part).flatten(1), every.std(0, correction=0).T, atol=1e-10, rtol=0)
    pairs = direct_logit_attribution(model, TOKENS, answer=ANSWER, wrong_answer=WRONG_ANSWER)
    torch.testing.assert_close(pairs.spread, 2**0.5 * found.spread)


def test_the_induction_head_moved_the_answer_from_behind_its_last_occurrence():
    found = direct_logit_attribution(induction_model(), [[3, 1, 4, 9, 3]], answer=1, wrong_answer=4)
    assert found.heads[0].tolist() == [[0, 0], [0, 10]]
    assert found.sources[0][1, 1].tolist() == [0, 10, 0, 0, 0]
    assert found.top_heads(1).rows[0][:2] == ("L1H1", 10.0)
    assert float(found.total) == float(found.logit) == 10


def test_a_soft_cap_is_left_out():
    model = zoo_model("gemma2", dtype=torch.float64)
    found = direct_logit_attribution(model, TOKENS, answer=ANSWER)
    capped = model(TOKENS)[torch.arange(2), -1, ANSWER]
    assert found.capped and not torch.allclose(found.logit, capped)
    torch.testing.assert_close(model.unembed.cap(found.logit), capped.detach(), atol=1e-10, rtol=0)


def test_prompts_of_different_length_are_prompts_one_by_one(monkeypatch):
    model = tiny_model(dtype=torch.float64)
    rows = [[1, 2, 3], [4, 5], [6, 7, 8], [1, 1]]
    monkeypatch.setattr(direct, "_TOKENS_AT_ONCE", 4)
    together = direct_logit_attribution(model, rows, answer=[1, 2, 3, 4], wrong_answer=[5, 6, 7, 8])
    for i, row in enumerate(rows):
        alone = direct_logit_attribution(model, [row], answer=i + 1, wrong_answer=i + 5)
        torch.testing.assert_close(together.components[i], alone.components[0], atol=1e-10, rtol=0)
        torch.testing.assert_close(together.sources[i], alone.sources[0], atol=1e-10, rtol=0)
        assert together.str_tokens[i] == alone.str_tokens[0] and together.answer[i] == str(i + 1)


class Wrapped(nn.Module):
    """A linear layer with something beside it, as LoRA adds."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear
        shape = (linear.out_features, linear.in_features)
        self.beside = 0.1 * torch.sin(torch.arange(shape[0] * shape[1], dtype=linear.weight.dtype)).view(shape)

    def forward(self, x):
        return self.linear(x) + x @ self.beside.T


def test_wrapped_layers_are_attributed_with_what_wraps_them():
    model = zoo_model("gpt2_bias_everywhere", dtype=torch.float64, tie_word_embeddings=False)
    plain = direct_logit_attribution(model, TOKENS, answer=ANSWER)
    for block in model.blocks:
        block.attn.o, block.mlp.out = Wrapped(block.attn.o), Wrapped(block.mlp.out)
    model.unembed.linear = Wrapped(model.unembed.linear)
    found = direct_logit_attribution(model, TOKENS, answer=ANSWER)
    assert found.error < 1e-10 and not torch.allclose(found.heads, plain.heads)


def test_post_norm_and_edits_that_no_part_shows_are_refused():
    with pytest.raises(InputError, match="post-norm"):
        direct_logit_attribution(zoo_model("post"), TOKENS, answer=ANSWER)
    assert "post-norm" in module.demo(zoo_model("post")).what
    model = tiny_model()
    with model.hooks(fwd_hooks=[("attn_out", lambda x, hook: 2 * x)]), pytest.raises(InputError, match="do not sum"):
        direct_logit_attribution(model, TOKENS, answer=ANSWER)
    with model.hooks(fwd_hooks=[("z", lambda z, hook: z * 0)]), pytest.raises(InputError, match="do not sum"):
        direct_logit_attribution(model, TOKENS, answer=ANSWER)  # no longer what was moved from each position
    with model.hooks(fwd_hooks=[("v", lambda v, hook: v * 0)]):  # every part shows this edit
        assert direct_logit_attribution(model, TOKENS, answer=ANSWER).heads.abs().max() == 0
    with pytest.raises(InputError, match="pos=9"):
        direct_logit_attribution(model, TOKENS, answer=1, pos=9)
    with pytest.raises(InputError, match="one per prompt, got 3 for 2"):
        direct_logit_attribution(model, TOKENS, answer=[1, 2, 3])


def test_tables_figures_files(tmp_path):
    for tokens in (TOKENS, TOKENS[:1]):
        found = direct_logit_attribution(tiny_model(), tokens, answer=1, wrong_answer=2)
        assert [row[0] for row in found.table(3).rows] == [
            found.labels[i] for i in found.components.mean(0).abs().argsort(descending=True)[:3]
        ]
        assert ("95% low" in found.table().columns) == (len(tokens) > 1)
        assert len(found.top_neurons(4)) == 4
        for figure in (found.figure(), found.component_figure(), found.source_figure(1, 0)):
            figure.to_json()
        found.save(tmp_path / "found.safetensors")
        back = LogitAttribution.load(tmp_path / "found.safetensors")
        assert torch.equal(back.sources[0], found.sources[0]) and back.error == found.error


@pytest.mark.slow
def test_smollm2s_indirect_object_is_written_by_late_heads():
    model = hl.load("smollm2-135m-instruct")
    text = "When Mary and John went to the store, John gave a drink to"
    found = direct_logit_attribution(model, text, answer=" Mary", wrong_answer=" John")
    assert found.error < 1e-3
    torch.testing.assert_close(found.total, found.logit, atol=1e-3, rtol=0)
    assert found.top_heads(1).rows[0][0] == "L23H3" and found.sources[0][23, 3].argmax() == 9  # the second John
