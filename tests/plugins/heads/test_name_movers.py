"""Name movers in a model set by hand, in which it is known what each head does."""

import torch

import hooklens as hl
from hooklens.data.prompt_pairs import PromptPairs
from hooklens.model.config import Biases, Softmax
from hooklens.plugins.heads.mover_result import Criteria, by_group
from hooklens.plugins.heads.name_movers import _unembedded, find_name_movers
from hooklens.testing import tiny_model

FILLERS, NAMES = 4, 12
VOCAB, POSITIONS = FILLERS + NAMES, 7


def known_model() -> hl.HookedTransformer:
    """L0H0 notes the subject at the end, L1H0 moves the other name, L1H1 writes its opposite, L1H2 that of the subject.

    L0H1 copies but looks at the first position.
    """
    model = hl.HookedTransformer(
        hl.HookedTransformerConfig(
            n_layers=2,
            d_model=3 * VOCAB + POSITIONS,
            n_ctx=POSITIONS,
            n_heads=3,
            d_head=VOCAB + 1,
            d_vocab=VOCAB,
            attn_only=True,
            score_fn=Softmax(scale=1.0),
            normalization_type=None,
            biases=Biases(qkv=False, o=False, mlp=False),
            positional_embedding_type="learned",
            model_name="known",
        )
    )
    token, subject, out = (slice(i * VOCAB, (i + 1) * VOCAB) for i in range(3))
    place, eye = 3 * VOCAB, torch.eye(VOCAB)
    sharp = 20.0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.W_E[:, token] = eye
        model.W_pos[:, place:] = torch.eye(POSITIONS)
        model.W_U[out] = eye
        first, second = (block.attn for block in model.blocks)
        _look(first, 0, place, key=5, sharp=sharp)
        _look(first, 1, place, key=0, sharp=sharp)
        first.W_V[0, token, :VOCAB], first.W_O[0, :VOCAB, subject] = eye, eye
        first.W_V[1, token, :VOCAB], first.W_O[1, :VOCAB, out] = eye, eye
        for head, weight in ((0, 1.0), (1, -0.25)):
            second.W_Q[head, subject, :VOCAB] = -2 * sharp * eye
            second.W_K[head, token, :VOCAB] = eye
            second.W_Q[head, place + 6, VOCAB] = sharp
            second.W_K[head, FILLERS:VOCAB, VOCAB] = 1.0
            second.W_V[head, token, :VOCAB] = eye
            second.W_O[head, :VOCAB, out] = weight * eye
        _look(second, 2, place, key=5, sharp=sharp)
        second.W_V[2, token, :VOCAB], second.W_O[2, :VOCAB, out] = eye, -eye
    return model


def _look(attn, head: int, place: int, *, key: int, sharp: float) -> None:
    attn.W_Q[head, place + 6, 0] = sharp
    attn.W_K[head, place + key, 0] = 1.0


def known_pairs(*, turned: bool = False) -> PromptPairs:
    """Eight pairs of numbers; `turned`: labels that call the subject the indirect object."""
    couples = [(4, 5), (6, 7)]
    roles = [(a, b, order) for x, y in couples for a, b in ((x, y), (y, x)) for order in ("ABBA", "BABA")]
    clean = torch.tensor([[0, *((a, 1, b) if o == "ABBA" else (b, 1, a)), 2, b, 3] for a, b, o in roles])
    corrupted = clean.clone()
    answer, wrong = (torch.tensor([role[i] for role in roles]) for i in (0, 1))
    corrupted[:, 5] = answer
    first = torch.tensor([order == "ABBA" for *_, order in roles])
    io, s1 = torch.where(first, 1, 3), torch.where(first, 3, 1)
    io = s1 if turned else io
    columns = {"io": io, "end": torch.full((8,), 6)}
    return PromptPairs(
        clean, corrupted, answer=answer, wrong_answer=wrong, group=[0, 0, 0, 0, 1, 1, 1, 1], columns=columns
    )


def test_the_only_name_mover_is_the_head_that_was_set_to_be_one():
    found = find_name_movers(known_model(), known_pairs(), criteria=Criteria(top_k=1))
    assert found.name_movers == [(1, 0)]
    called = found.verdict()
    assert called[1][:2] == ["name mover", "lowers the logit difference"]
    assert called[1][2] == "restores the logit difference"
    assert called[0] == ["little direct effect"] * 3


def test_each_number_is_the_one_that_was_set():
    found = find_name_movers(known_model(), known_pairs(), criteria=Criteria(top_k=1))
    # L1H0 adds 1 to the indirect object's logit in the clean run and to the subject's in the corrupted one, L1H1 takes
    # away a quarter of that, L1H2 takes 1 from the name that is repeated: the difference is 2 (1 - 0.25 + 1) = 3.5
    torch.testing.assert_close(found.gap, torch.full((8,), 3.5), atol=1e-4, rtol=0)
    shares = torch.tensor([[0, 0, 0], [2 / 3.5, -0.5 / 3.5, 2 / 3.5]])
    torch.testing.assert_close(found.share, shares, atol=1e-4, rtol=0)
    assert bool((found.attention[:, 1, :2] > 0.99).all()) and bool((found.margin[:, 1, 2] < -0.99).all())
    assert found.copying.tolist() == [[0, 1, 0], [1, 0, 0]]
    assert found.suppressing[1].tolist() == [0, 1, 1]


def test_each_of_the_three_can_say_no():
    pairs = known_pairs()
    assert find_name_movers(known_model(), known_pairs(turned=True), criteria=Criteria(top_k=1)).name_movers == []
    deaf = known_model()
    with torch.no_grad():
        deaf.blocks[1].attn.W_O[0] = deaf.blocks[1].attn.W_O[0].roll(1, 0)  # copies every name into the next one
    assert find_name_movers(deaf, pairs, criteria=Criteria(top_k=1)).name_movers == []
    assert find_name_movers(known_model(), pairs, criteria=Criteria(top_k=1, least_direct=0.9)).name_movers == []


def test_a_model_that_does_not_do_the_task_has_no_name_movers():
    found = find_name_movers(tiny_model(n_layers=1, d_vocab=VOCAB), known_pairs())
    assert not found.defined or not found.name_movers
    idle = known_model()
    with torch.no_grad():
        idle.W_U.zero_()
    found = find_name_movers(idle, known_pairs(), criteria=Criteria(top_k=1))
    assert not found.defined and found.name_movers == []
    assert {name for row in found.verdict() for name in row} == {"little direct effect"}


def test_the_direct_effect_is_a_hooked_run_in_which_later_layers_are_held():
    model, pairs = (
        tiny_model(d_vocab=VOCAB, n_key_value_heads=1, normalization_type="RMS", dtype=torch.float64),
        known_pairs(),
    )
    found = find_name_movers(model, pairs)
    metric = pairs.metric_of(model)
    _, clean = model.run_with_cache(pairs.clean, ["result"])
    names = ["attn_out", "mlp_out", "result"]
    logits, held = model.run_with_cache(pairs.corrupted, names)
    layer, head = 0, 1

    def write(act, hook):
        return act + (clean["result", layer] - held["result", layer])[:, :, head]

    def hold(act, hook):
        return held[hook.name]

    later = ["blocks.0.hook_mlp_out", "blocks.1.hook_attn_out", "blocks.1.hook_mlp_out"]
    patched = model.run_with_hooks(pairs.corrupted, fwd_hooks=[("blocks.0.hook_attn_out", write), (later, hold)])
    expected = metric(patched) - metric(logits)
    torch.testing.assert_close(found.direct[:, layer, head], expected, atol=1e-10, rtol=0)


def test_the_ranks_are_those_of_the_full_ov_circuit_with_grouped_values():
    model = tiny_model(
        d_vocab=VOCAB, n_heads=4, d_head=4, n_key_value_heads=2, normalization_type="RMS", dtype=torch.float64
    )
    pairs = known_pairs()
    found = find_name_movers(model, pairs)
    _, cache = model.run_with_cache(pairs.clean, ["blocks.0.hook_resid_post"])
    answer = torch.tensor(pairs.answer)
    names = answer.unique()
    x = cache["blocks.0.hook_resid_post"][torch.arange(8), pairs["io"]]
    for row, name in enumerate(names):
        mean = x[answer == name].mean(0)
        read = model.blocks[1].ln1(mean)
        for head in range(4):
            wrote = read @ model.blocks[1].attn.W_V[head // 2] @ model.blocks[1].attn.W_O[head]
            logits = (wrote * model.ln_final.weight) @ model.W_U
            assert int(found.rank[row, 1, head]) == int((logits > logits[name]).sum())


def test_groups_are_averaged():
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0], [10.0, 20.0]])
    assert by_group(values, torch.tensor([7, 7, 2])).tolist() == [[10.0, 20.0], [2.0, 3.0]]


def test_a_forbidden_token_is_no_number_that_ranks_are_lost_to():
    """Minus a bias of -inf its logit was NaN."""
    model = tiny_model(biases=Biases(unembed=True))
    x = torch.randn(2, 3, model.cfg.d_model, generator=torch.Generator().manual_seed(0))
    allowed = _unembedded(model, x)
    with torch.no_grad():
        model.b_U[7] = float("-inf")
    logits = _unembedded(model, x)
    assert logits[..., 7].isneginf().all()
    assert torch.equal(logits[..., :7], allowed[..., :7]) and torch.equal(logits[..., 8:], allowed[..., 8:])
