"""The pass that computes equal tokens once gives the logits and gradients of the model's own pass."""

from dataclasses import dataclass

import pytest
import torch

import hooklens as hl
from hooklens.core.errors import HooklensError
from hooklens.model.attention import Attention
from hooklens.model.config import Causal
from hooklens.model.shared_tokens import last_logits, shares_tokens
from hooklens.testing import tiny_model
from hooklens.training import AdamW, Constant, CrossEntropy, Settings

DATA = hl.data.modular_arithmetic(7, fraction=0.6)
EPS = torch.finfo(torch.float32).eps
KINDS = {
    "plain": {"normalization_type": None},
    "normed": {"normalization_type": "LN"},
    "post": {"block": "post"},
    "sandwich": {"block": "sandwich", "normalization_type": "RMS"},
    "parallel": {"block": "parallel"},
    "rotary": {"positional_embedding_type": "rotary"},
    "grouped": {"n_heads": 4, "n_key_value_heads": 2},
    "capped": {"score_fn": {"part": "softmax", "soft_cap": 0.5}},
    "linear": {"score_fn": "linear", "mask": "none"},
    "no MLP": {"attn_only": True, "d_mlp": 0},
    "own norm of q and k": {"qk_norm": "RMS"},
}


def prompts(p: int, n: int = 200) -> torch.Tensor:
    pairs = torch.randint(0, p, (n, 2), generator=torch.Generator().manual_seed(1))
    return torch.cat([pairs, torch.full((n, 1), p)], 1)


def one_layer(p: int, seed: int = 0, dtype: torch.dtype = torch.float32, **fields) -> hl.HookedTransformer:
    fields = {"n_heads": 2, "d_mlp": 32, "act_fn": "relu", **fields}
    cfg = hl.HookedTransformerConfig(n_layers=1, d_model=16, d_head=8, d_vocab=p + 1, n_ctx=3, **fields)
    return hl.HookedTransformer(cfg, seed=seed).to(dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(2))
def test_its_logits_are_those_of_the_hooked_pass_to_eight_epsilons_of_the_largest(kind, seed):
    model, tokens = one_layer(11, seed, **KINDS[kind]), prompts(11)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
        assert shares_tokens(model, tokens)
        logits = model(tokens)[:, -1:]
        assert (last_logits(model, tokens) - logits).abs().max() <= 8 * EPS * logits.abs().max()


@pytest.mark.slow
def test_at_the_size_of_the_paper_run_its_logits_are_those_of_the_hooked_pass_to_eight_epsilons():
    data = hl.data.modular_arithmetic(113)
    cfg = hl.HookedTransformerConfig(
        **{"n_layers": 1, "d_model": 128, "n_heads": 4, "d_head": 32, "d_mlp": 512, "n_ctx": 3},
        **{"act_fn": "relu", "normalization_type": None, "d_vocab": 114, "d_vocab_out": 113},
    )
    model = hl.HookedTransformer(cfg, seed=0)
    settings = Settings(batch=3830, evaluate=1, checkpoints=2, schedule=Constant(), optimizer=AdamW(lr=3e-3))
    tokens = data.examples(torch.cartesian_prod(torch.arange(113), torch.arange(113))).inputs
    for steps in (1, 50):
        hl.train(model, data, steps=steps, settings=settings)
        with torch.no_grad():
            logits = model(tokens, logits_at=-1)
            assert (last_logits(model, tokens) - logits).abs().max() <= 8 * EPS * logits.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_its_gradients_are_those_of_the_hooked_pass(kind):
    assert_same_gradients(one_layer(11, dtype=torch.float64, **KINDS[kind]), prompts(11))


@pytest.mark.parametrize("kind", ["plain", "normed"])
def test_scores_of_a_range_whose_exponentials_would_underflow_give_the_gradients_of_the_hooked_pass(kind):
    model, tokens = one_layer(11, dtype=torch.float64, **KINDS[kind]), prompts(11)
    with torch.no_grad():
        model.blocks[0].attn.q.weight.mul_(9e3)
    _, cache = model.run_with_cache(tokens, names="blocks.0.attn.hook_attn_scores")
    scores = cache["blocks.0.attn.hook_attn_scores"][:, :, -1]
    assert scores.amax() - scores.amin() > 1500  # exp(-750) is 0 in float64
    assert_same_gradients(model, tokens)


def assert_same_gradients(model: hl.HookedTransformer, tokens: torch.Tensor) -> None:
    weight = torch.randn(len(tokens), 1, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    of_both = []
    for logits in (model(tokens)[:, -1:], last_logits(model, tokens)):
        grads = torch.autograd.grad((logits * weight).sum(), list(model.parameters()), allow_unused=True)
        of_both.append([grad for grad in grads if grad is not None])
    assert len(of_both[0]) == len(of_both[1]) > 5
    largest = max(float(grad.abs().max()) for grad in of_both[0])  # that of a key's bias is 0 but for rounding
    for theirs, ours in zip(*of_both, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-13 * largest)


def test_a_token_outside_the_vocabulary_is_refused_as_in_the_hooked_pass():
    model, tokens = one_layer(11), prompts(11)
    tokens[0, 0] = 12  # at another position its number would be that of a token there
    with pytest.raises(HooklensError, match="between 0 and 11 here, got 0 to 12"):
        last_logits(model, tokens)


@dataclass(frozen=True)
class Others(Causal):
    name = "others of the tests of equal tokens"

    def allows(self, query_pos, key_pos):
        return key_pos < query_pos.clamp_min(1)


def dropped_in_a_block() -> hl.HookedTransformer:
    model = one_layer(11)
    model.blocks[0].dropout.p = 0.5
    return model.train()


@pytest.mark.parametrize(
    "model",
    [
        tiny_model(n_layers=2, d_vocab=12),
        one_layer(11, mask={"part": "sliding_window", "window": 2}),
        one_layer(11).to(torch.bfloat16),
        one_layer(11, dropout=0.1).train(),
        dropped_in_a_block(),
        one_layer(11, mask=Others()),
    ],
    ids=["two layers", "window", "bfloat16", "dropout", "dropout of a block", "mask from outside"],
)
def test_models_whose_logits_it_does_not_compute(model):
    assert not shares_tokens(model, prompts(11))


def test_few_prompts_or_different_last_tokens_are_left_to_the_model():
    model, tokens = one_layer(11), prompts(11)
    assert not shares_tokens(model, tokens[:20])
    assert not shares_tokens(model, torch.cat([tokens, tokens.roll(1, 1)]))


def test_after_100_steps_in_float64_the_loss_is_that_of_the_loop_with_a_hook_to_1e_9():
    data = hl.data.modular_arithmetic(13, fraction=0.5)
    settings = Settings(
        **{"batch": 200, "evaluate": 4, "checkpoints": 2, "schedule": "constant"},
        **{"optimizer": AdamW(lr=1e-2, weight_decay=1.0, betas=(0.9, 0.98)), "loss": CrossEntropy(double=True)},
    )
    runs, losses = [], ([], [])
    for hooked, kept in zip((False, True), losses, strict=True):
        model = one_layer(13, dtype=torch.float64, normalization_type=None)
        hooks = [("hook_embed", lambda act, hook: None)] if hooked else []
        with model.hooks(hooks):
            after = lambda step, loss, kept=kept: kept.append(loss)  # noqa: E731  # the record rounds to float32
            runs.append(hl.train(model, data, steps=100, settings=settings, after_step=after))
    assert losses[0][99] < 0.7 * losses[0][0]
    assert max(abs(ours - theirs) for ours, theirs in zip(*losses, strict=True)) < 1e-9
    for run in runs:
        assert run.accuracy[-1] > run.accuracy[0] and run.held_out_accuracy.shape == (5,)
    assert (runs[0].held_out_accuracy == runs[1].held_out_accuracy).all()


class Tripled(hl.HookedTransformer):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs) * 3


class TripledAttention(Attention):
    def mix(self, *args):
        return super().mix(*args) * 3


def of_a_subclass(model):
    model.__class__ = Tripled


def with_attention_of_a_subclass(model):
    model.blocks[0].attn.__class__ = TripledAttention


def with_a_hook_before_the_backward_pass(model):
    model.blocks[0].attn.register_full_backward_pre_hook(lambda module, grads: tuple(grad * 0 for grad in grads))


def with_a_replaced_method(model):
    before = model.blocks[0].attn.forward
    model.blocks[0].attn.forward = lambda *args: before(*args) * 3


CHANGES = [
    *(of_a_subclass, with_attention_of_a_subclass),
    *(with_a_hook_before_the_backward_pass, with_a_replaced_method),
]


def losses_of_training(change, *, after: int, shares: bool) -> list[float]:
    """The losses of four steps of a model that is changed after so many; an open hook rules sharing out."""
    model, losses = one_layer(7), []
    if not after:
        change(model)

    def note(step: int, loss: float) -> None:
        losses.append(loss)
        if step == after:
            change(model)

    with model.hooks([] if shares else [("hook_embed", lambda act, hook: None)]):
        hl.train(model, DATA, steps=4, settings=Settings(batch=200, evaluate=1, checkpoints=1), after_step=note)
    return losses


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("after", [0, 1])
def test_a_model_that_does_not_run_as_defined_trained_as_if_it_did(change, after):
    ours, theirs = (losses_of_training(change, after=after, shares=shares) for shares in (True, False))
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_a_hook_on_every_module_of_torch_saw_no_attention_in_training():
    seen = []
    with torch.nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module))):
        hl.train(one_layer(7), DATA, steps=1, settings=Settings(batch=200, evaluate=1, checkpoints=1))
    assert Attention in seen


def test_a_mask_derived_from_the_causal_one_held_at_one_position_only():
    model, tokens = one_layer(11, mask=Others()), prompts(11, 5)
    assert not torch.allclose(model(tokens)[:, -1], one_layer(11)(tokens)[:, -1])
    assert torch.allclose(model(tokens)[:, -1:], model(tokens, logits_at=-1), atol=1e-6)


def test_prompts_longer_than_the_context_ran_or_failed_inside_torch():
    model = one_layer(11, positional_embedding_type="none")
    tokens = prompts(11)
    assert shares_tokens(model, tokens)
    assert not shares_tokens(model, torch.cat([tokens[:, :2], tokens], 1))  # left to the model, which refuses them
