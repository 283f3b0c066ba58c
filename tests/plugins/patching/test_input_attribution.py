"""Attributions by token: completeness, answers that are known, and the weight-randomisation check beside them."""

import json

import pytest
import torch
from model.zoo import ZOO, vector_model, zoo_model

import hooklens as hl
from hooklens.core.errors import InputError
from hooklens.model.config import Biases
from hooklens.plugins.patching.input_attribution import InputAttribution, gradient_x_input, integrated_gradients
from hooklens.plugins.patching.weight_randomisation import randomise
from hooklens.results.statistics import rank_correlation
from hooklens.testing import and_gate, tiny_model

PROMPTS = torch.tensor([[1, 5, 2, 7], [4, 4, 9, 0]])
NO_BIASES = Biases(qkv=False, o=False, mlp=False)
BASELINE = torch.tensor([[1, 5, 8, 7], [4, 3, 9, 10]])


def metric_of(model):
    return hl.logit_diff(model, answer=[3, 1], wrong_answer=[4, 2])


# -- completeness


@pytest.mark.parametrize("name", [name for name in ZOO if "d_vocab_out" not in ZOO[name]])
def test_integrated_gradients_sum_to_the_difference_in_every_family(name):
    model = zoo_model(name, dtype=torch.float64)
    steps = 1025 if name == "no_norm" else 257  # its streams are long, and cross more of the corners of ReLU
    found = integrated_gradients(model, PROMPTS, metric_of(model), baseline=BASELINE, steps=steps, stages=0)
    with torch.no_grad():
        gap = metric_of(model)(model(PROMPTS)) - metric_of(model)(model(BASELINE))
    torch.testing.assert_close(found.gap, gap, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(found.per_token.sum(1), gap, atol=2e-5, rtol=1e-5)
    assert found.per_token[0, :2].tolist() == [0, 0]  # tokens that do not differ


@pytest.mark.parametrize("baseline", ["zero", "mean"])
def test_other_baselines_are_complete_too_and_more_steps_are_nearer(baseline):
    model = tiny_model(dtype=torch.float64)
    few, many = (
        integrated_gradients(model, PROMPTS, metric_of(model), baseline=baseline, steps=steps, stages=0)
        for steps in (9, 401)
    )
    assert many.incompleteness < 1e-6 and many.incompleteness < few.incompleteness
    assert many.n_gradients == 401 and few.n_gradients == 9


def test_gradient_x_input_does_not_promise_it():
    model = tiny_model(dtype=torch.float64)
    assert gradient_x_input(model, PROMPTS, metric_of(model), stages=0).incompleteness > 0.05


def test_in_a_linear_model_both_are_the_effect_of_the_token():
    """No norm, no MLP, uniform attention, no positions: the metric is linear in the embeddings."""
    model = tiny_model(
        attn_only=True, normalization_type=None, positional_embedding_type="none", dtype=torch.float64, seed=3
    )
    with torch.no_grad():
        for block in model.blocks:
            for linear in (block.attn.q, block.attn.k):
                for p in linear.parameters():
                    p.zero_()
    metric = metric_of(model)
    one = gradient_x_input(model, PROMPTS, metric, stages=0)
    other = integrated_gradients(model, PROMPTS, metric, baseline="zero", steps=3, stages=0)
    torch.testing.assert_close(one.per_token, other.per_token, atol=1e-12, rtol=1e-9)
    with torch.no_grad():
        for pos in range(4):

            def drop(embed, hook, pos=pos):
                embed[:, pos] = 0.0
                return embed

            lost = metric(model(PROMPTS)) - metric(model.run_with_hooks(PROMPTS, fwd_hooks=[("hook_embed", drop)]))
            torch.testing.assert_close(one.per_token[:, pos], lost, atol=1e-12, rtol=1e-9)
    assert float(one.residual.abs().max()) < 1e-12


def test_and_gate():
    """Only at the very end of the line does the gate open: the gradient at the prompt sees a third a token of
    something far too steep, integrated gradients share the 1 evenly."""
    gate, metric = and_gate(sharpness=10.0), lambda logits: logits[:, -1, 1]
    prompt, zeros = torch.tensor([[1, 1, 1]]), torch.tensor([[0, 0, 0]])
    found = integrated_gradients(gate, prompt, metric, baseline=zeros, steps=201, stages=0)
    torch.testing.assert_close(found.per_token, torch.full((1, 3), 1 / 3, dtype=torch.float64), atol=1e-3, rtol=0)
    steep = gradient_x_input(gate, prompt, metric, stages=0)
    torch.testing.assert_close(steep.per_token, torch.full((1, 3), 10 / 3, dtype=torch.float64), atol=1e-9, rtol=0)


def test_prompts_together_are_prompts_alone_whatever_the_memory_and_the_metric():
    model = tiny_model(dtype=torch.float64)
    metric, asked = metric_of(model), {"steps": 21, "stages": 0}
    together = integrated_gradients(model, PROMPTS, metric, baseline=BASELINE, **asked)
    with hl.engine(memory=1):
        apart = integrated_gradients(model, PROMPTS, metric, baseline=BASELINE, **asked)
    plain = integrated_gradients(model, PROMPTS, lambda logits: metric(logits), baseline=BASELINE, **asked)
    for other in (apart, plain):
        torch.testing.assert_close(together.per_token, other.per_token, atol=1e-12, rtol=1e-9)
    for i in range(2):
        one = metric.pairs(torch.tensor([i]))
        alone = integrated_gradients(model, PROMPTS[i : i + 1], one, baseline=BASELINE[i : i + 1], **asked)
        torch.testing.assert_close(together.per_token[i], alone.per_token[0], atol=1e-12, rtol=1e-9)


# -- the sanity check


def test_the_cascade_goes_from_the_top_down_and_leaves_the_model_alone():
    model, seen = tiny_model(n_layers=3), []

    def attribute(copy):
        seen.append(
            [torch.equal(a.attn.q.weight, b.attn.q.weight) for a, b in zip(copy.blocks, model.blocks, strict=True)]
        )
        assert torch.equal(copy.W_E, model.W_E)
        return copy.blocks[0].attn.q.weight.detach()[:2, :4]

    found = randomise(model, attribute, stages=4)
    assert found.scrambled == ["unembedding", "unembedding to L2", "unembedding to L1", "unembedding to L0"]
    assert seen == [[True] * 3, [True] * 3, [True, True, False], [True, False, False], [False] * 3]
    torch.testing.assert_close(found.signed[:3], torch.ones(3, 2))
    assert bool((found.signed[3] < 1).all())
    again = randomise(model, attribute, stages=4)
    assert torch.equal(found.signed, again.signed)  # drawn by seed


def test_scrambling_keeps_every_weights_entries():
    model = tiny_model(n_layers=1, tie_word_embeddings=True)
    kept = []

    def attribute(copy):
        kept.append({name: p.detach().clone().flatten().sort().values for name, p in copy.named_parameters()})
        return copy.W_E[:1, :4].detach()

    randomise(model, attribute, stages=1)
    before, after = kept
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_result_carries_the_correlation_with_the_scrambled_models():
    model = tiny_model(d_model=16, n_layers=2, dtype=torch.float64)
    tokens = torch.randint(11, (3, 12), generator=torch.Generator().manual_seed(0))
    metric = hl.log_prob(model, answer=3)
    found = gradient_x_input(model, tokens, metric, stages=3)
    copies = []

    def attribute(copy):
        copies.append(gradient_x_input(copy, tokens, metric, stages=0).per_token)
        return copies[-1]

    randomise(model, attribute, stages=3)
    expected = [[rank_correlation(a, b) for a, b in zip(copies[0], other, strict=True)] for other in copies[1:]]
    torch.testing.assert_close(found.sanity.signed, torch.tensor(expected, dtype=torch.float64))
    assert found.sanity.chance == pytest.approx(11**-0.5) and len(found.sanity.figure().data) == 2


def test_tokens_that_are_no_part_of_the_input_do_not_count_as_agreement():
    """One token differs from the baseline: it takes everything in any model, and there is nothing to rank."""
    model = tiny_model()
    found = integrated_gradients(model, PROMPTS[:1], hl.log_prob(model, answer=3), baseline=BASELINE[:1], steps=5)
    assert bool(found.sanity.signed.isnan().all())


# -- the result, and what is refused


def test_tables_pictures_and_files(tmp_path):
    model = tiny_model()
    for rows in (1, 2):
        metric = metric_of(model).pairs(torch.arange(rows))
        found = integrated_gradients(model, PROMPTS[:rows], metric, baseline="mean", steps=9, stages=2)
        sizes = [abs(row[-1]) for row in found.table(None).rows]
        assert sizes == sorted(sizes, reverse=True) and len(sizes) == 4 * rows and len(found.top(2)) == 2
        assert found.table(1).rows[0][2] == found.str_tokens[found.order()[0][0]][found.order()[0][1]]
        assert "missing" in found.figure().layout.title.text
        found.save(tmp_path / "found.safetensors")
        back = InputAttribution.load(tmp_path / "found.safetensors")
        assert str(back.table()) == str(found.table()) and str(back.sanity.table()) == str(found.sanity.table())
        json.dumps(found.to_json(), allow_nan=False)


def test_what_cannot_be_attributed_is_refused_in_words():
    model = tiny_model()
    metric = metric_of(model)
    with pytest.raises(InputError, match="take each length apart"):
        gradient_x_input(model, [[1, 2], [3]], metric)
    with pytest.raises(InputError, match=r"got \[1, 4\] tokens for \[2, 4\]"):
        integrated_gradients(model, PROMPTS, metric, baseline=BASELINE[:1])
    with pytest.raises(InputError, match="at least 3 gradients"):
        integrated_gradients(model, PROMPTS, metric, baseline="mean", steps=2)
    with pytest.raises(InputError, match="no gradient"):
        gradient_x_input(model, PROMPTS, lambda logits: (logits[:, -1].argmax(-1) == 3).float())
    with pytest.raises(InputError, match="reads vectors"):
        gradient_x_input(vector_model(), PROMPTS, metric)
    with pytest.raises(InputError, match="stages is a whole number of at least 1"):
        gradient_x_input(model, PROMPTS, metric, stages=-1)


def test_a_gradient_that_is_not_finite_is_named():
    """As at the zero embedding of a deep model with RMS norms and no biases, which amplifies without bound."""
    model = zoo_model("llama", n_layers=2)
    overflow = [("hook_embed", lambda grad, hook: grad * torch.inf)]
    with model.hooks(bwd_hooks=overflow), pytest.raises(InputError, match="not finite on the way from the baseline"):
        integrated_gradients(model, PROMPTS, metric_of(model), baseline="zero", stages=0)


@pytest.mark.parametrize("n_layers", [2, 3, 4])
def test_an_integral_that_misses_a_million_times_the_difference_is_refused(n_layers):
    model = tiny_model(
        n_layers=n_layers, normalization_type="RMS", positional_embedding_type="rotary", biases=NO_BIASES
    )
    with pytest.raises(InputError, match=r"prompt 0 from the baseline zero did not converge in 63 .* misses that by"):
        integrated_gradients(model, PROMPTS[:1], hl.log_prob(model, answer=5), baseline="zero", stages=0)
    found = integrated_gradients(model, PROMPTS, hl.log_prob(model, answer=5), baseline=PROMPTS, stages=0)
    assert found.residual.abs().max() < 1e-4  # a difference of 0 is missed by rounding only, which is no fault
