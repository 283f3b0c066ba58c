"""describe(): every number against the model itself and against torch's own counter."""

import math
import re
from fractions import Fraction
from xml.etree import ElementTree

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hooklens.anatomy.description import describe, formula, position_figure
from hooklens.core.errors import InputError
from hooklens.model.attention import differentiable_attention
from hooklens.model.config import HookedTransformerConfig
from hooklens.model.transformer import HookedTransformer
from hooklens.testing import tiny_model

SIZES = {"n_layers": 2, "d_model": 8, "n_ctx": 32, "n_heads": 2, "d_vocab": 11}
MODELS = {
    "gpt2": {},
    "llama": {
        "positional_embedding_type": "rotary",
        "normalization_type": "RMS",
        "qk_norm": "RMS",
        "gated_mlp": True,
        "n_heads": 4,
        "n_key_value_heads": 2,
        "d_head": 6,
        "d_mlp": 20,
    },
    "tied": {"tie_word_embeddings": True},
    "attention only": {"attn_only": True, "positional_embedding_type": "none"},
    "sandwich": {"block": "sandwich"},
    "post": {"block": "post", "positional_embedding_type": "sinusoidal"},
    "parallel": {"block": "parallel", "n_layers": 1},
}


@pytest.fixture(params=MODELS, name="model")
def a_model(request):
    return tiny_model(**MODELS[request.param])


def test_parameters_are_all_counted_once(model):
    assert describe(model).parameters == sum(p.numel() for p in model.parameters())
    assert describe(model.cfg).parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("n", [1, 7])
def test_flops_are_those_that_torch_counts(model, n):
    with differentiable_attention(), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.ones(1, n, dtype=torch.long))
    assert describe(model, n=n).flops == counter.get_total_flops()


def test_vector_inputs_are_counted_too():
    model = tiny_model(embed={"part": "vectors", "d_in": 3})
    with differentiable_attention(), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.ones(1, 5, 3))
    assert describe(model, n=5).flops == counter.get_total_flops()


def test_shapes_are_those_of_a_forward_pass(model):
    described = {stage.point: stage.shape for stage in describe(model, n=5).stages}
    _, cache = model.run_with_cache(torch.ones(1, 5, dtype=torch.long), names=lambda name: True)
    seen = {name.replace("blocks.0.", "blocks.N."): list(act.shape) for name, act in cache.items() if ".1." not in name}
    assert described == seen


@pytest.mark.parametrize("n", [3, 5])
def test_activation_bytes_are_those_of_a_full_cache(model, n):
    _, cache = model.run_with_cache(torch.ones(1, n, dtype=torch.long))
    components = {c.name: c.bytes for c in describe(model, n=n).components}
    assert sum(components.values()) == cache.nbytes
    assert components["attn.scores"] == sum(
        cache[name].nbytes for name in cache if "scores" in name or "pattern" in name
    )


def test_formulas_in_n_and_d_give_their_numbers(model):
    described = describe(model, n=7)
    letters = described.sizes
    for part in described.components:
        for text, number in ((part.flops_formula, part.flops), (part.memory_formula, part.bytes // 4)):
            assert not set(text) & set("gem"), text
            total = Fraction(0)
            for term in text.split(" + ") if text else []:
                factors = [
                    Fraction(f) if f[0].isdigit() else letters[f[0]] ** (1 + "_²³".find(f[-1]) if f[1:] else 1)
                    for f in term.split()
                ]
                total += math.prod(factors)
            assert total == number, (part.name, text)


def test_scores_overtake_exactly_from_the_crossover(model):
    found = describe(model)

    def work(n):
        flops = {c.name: c.flops for c in describe(model, n=n).components}
        projections = sum(flops[f"attn.{x}"] for x in "qkvo")
        return flops["attn.scores"] + flops["attn.z"], projections, sum(v for k, v in flops.items() if k[:3] == "mlp")

    for at, with_mlp in ((found.crossover, 0), (found.crossover_layer, 1)):
        before, after = work(math.ceil(at) - 1), work(math.floor(at) + 1)
        assert before[0] < before[1] + with_mlp * before[2]
        assert after[0] > after[1] + with_mlp * after[2]


def test_a_known_answer_gpt2_small():
    cfg = tiny_model().cfg.replace(
        n_layers=12, d_model=768, n_heads=12, d_head=64, d_mlp=3072, n_ctx=1024, d_vocab=50257, d_vocab_out=50257,
        n_key_value_heads=12, tie_word_embeddings=True,
    )  # fmt: skip
    found = describe(cfg, n=1024)
    assert found.parameters == 124_439_808  # the published 124M
    assert (found.crossover, found.crossover_layer) == (1536, 4608)
    assert {c.name: c.flops_formula for c in found.components}["mlp.in_"] == "8 L n d²"


def test_timing_stands_beside_its_formula():
    found = describe(tiny_model(), lengths=(4, 8, 16)).timing
    assert found.lengths.tolist() == [4, 8, 16] and bool((found.projections > 0).all() and (found.scores > 0).all())
    ratio = found.scores_formula[1:] / found.scores_formula[:-1]
    assert torch.allclose(ratio, torch.full((2,), 4.0, dtype=torch.float64))
    assert len(found.table()) == 3
    assert len(found.figure().data) == 4


def test_the_measured_curves_stood_twice_in_a_notebook():
    """Once as an SVG of their own, and once as the figure."""
    timed = describe(tiny_model(), lengths=(4, 8))
    assert "scores ms" in timed.to_html() and "<polyline" not in timed.to_html()
    assert "text/html" in timed._repr_mimebundle_()


def test_the_diagram_is_well_formed_and_escaped():
    model = HookedTransformer(tiny_model().cfg.replace(model_name="<script>&"))
    found = describe(model, n=3)
    root = ElementTree.fromstring(found.diagram())
    texts = [t.text for t in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "<script>&" in texts and "× 2 layers" in texts and "1 × 2 × 3 × 3" in texts
    assert "<script>" not in found.to_html()
    ElementTree.fromstring(found.to_html())


def test_it_shows_and_saves_itself(tmp_path):
    found = describe(tiny_model(), n=3, lengths=(2, 4))
    assert len(found.table()) == len(found.components) + 1
    assert len(found.stage_table()) == len(found.stages)
    found.save(tmp_path / "d.safetensors")
    assert str(type(found).load(tmp_path / "d.safetensors").table()) == str(found.table())


def test_positions_are_drawn_as_they_are():
    model = tiny_model(positional_embedding_type="sinusoidal")
    drawn = position_figure(model, n=4).data[0].z
    assert torch.allclose(torch.as_tensor(drawn), model.W_pos[:4])
    with pytest.raises(InputError, match="no position embedding"):
        position_figure(tiny_model(positional_embedding_type="rotary"))


def test_what_cannot_be_described_is_refused():
    with pytest.raises(InputError, match="at least 1"):
        describe(tiny_model(), n=0)
    with pytest.raises(InputError, match="pass a model"):
        describe(tiny_model().cfg, lengths=(4,))
    with pytest.raises(InputError, match="lengths="):
        describe(tiny_model()).figure()
    assert formula([], {}) == ""


SMOLLM2 = {
    "n_layers": 30, "d_model": 576, "n_heads": 9, "n_key_value_heads": 3, "d_head": 64, "d_mlp": 1536, "d_vocab": 49152,
    "d_vocab_out": 49152, "gated_mlp": True, "normalization_type": "RMS", "positional_embedding_type": "rotary",
    "tie_word_embeddings": True, "model_name": "smollm2-135m-instruct", "n_ctx": 8192,
}  # fmt: skip


@pytest.mark.parametrize("changes", [*MODELS.values(), SMOLLM2], ids=[*MODELS, "smollm2"])
def test_the_printed_table_was_105_columns_wide_with_factors_such_as_0_6667(changes):
    told = str(describe(HookedTransformerConfig(**(SIZES | changes))))
    assert max(map(len, told.splitlines())) <= 80, told
    assert not re.search(r"\d\.\d+ L", told), told


def test_factors_are_the_fractions_that_they_are():
    flops = {c.name: c.flops_formula for c in describe(HookedTransformerConfig(**(SIZES | SMOLLM2))).components}
    assert (flops["attn.k"], flops["mlp.gate"], flops["attn.q"]) == ("2/3 L n d²", "16/3 L n d²", "2 L n d²")
    assert formula(["L n m"], {"m": 1013, "d": 1009}) == "1.004 L n d"  # 1013/1009 says less
