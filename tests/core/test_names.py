"""Names: what is asked for, in every form, and what is said where it does not exist."""

import pytest
import torch
from refused import refused

from hooklens.core.errors import InputError, NameNotFound, WrongType
from hooklens.core.names import AXES, Site, axes, parse, resolve, site

NAMES = [
    "hook_embed",
    *(
        f"blocks.{n}.{p}"
        for n in range(3)
        for p in ("hook_resid_pre", "ln1.hook_scale", "attn.hook_z", "attn.q_norm.hook_scale", "ln2.hook_scale")
    ),
    "ln_final.hook_scale",
    "unembed.hook_in",
]


@pytest.mark.parametrize(
    "where, found",
    [
        ("blocks.1.attn.hook_z", ["blocks.1.attn.hook_z"]),
        ("z", [f"blocks.{n}.attn.hook_z" for n in range(3)]),
        (("z", None), [f"blocks.{n}.attn.hook_z" for n in range(3)]),
        (("z", -1), ["blocks.2.attn.hook_z"]),
        (("z", torch.tensor(1)), ["blocks.1.attn.hook_z"]),
        (("scale", 1, "ln1"), ["blocks.1.ln1.hook_scale"]),
        (("scale", 1, "q_norm"), ["blocks.1.attn.q_norm.hook_scale"]),
        (("scale", None, "ln_final"), ["ln_final.hook_scale"]),
        ("embed", ["hook_embed"]),
        ("in", ["unembed.hook_in"]),
        (["embed", ("z", 0), ["embed"]], ["hook_embed", "blocks.0.attn.hook_z"]),
        (("embed", "z"), ["hook_embed", *(f"blocks.{n}.attn.hook_z" for n in range(3))]),
        (lambda name: "resid" in name, [f"blocks.{n}.hook_resid_pre" for n in range(3)]),
        ({"embed"}, ["hook_embed"]),
    ],
)
def test_every_form_resolves_in_firing_order(where, found):
    assert resolve(where, NAMES) == found


@pytest.mark.parametrize(
    "where, error, said",
    [
        ("blocks.0.hook_resid_prr", NameNotFound, r"no hook point named .* closest: blocks\.0\.hook_resid_pre"),
        ("zz", NameNotFound, "no site named 'zz'"),
        (("z", 3), NameNotFound, r"no site z at 3: this model has attn\.z and layers 0 to 2 \(or -3 to -1\)"),
        (("z", -4), NameNotFound, "no site z at -4"),
        (("scale", 0, "ln3"), NameNotFound, r"ln3\.scale at 0: this model has .*ln1\.scale"),
        (("z", True), WrongType, "needs an integer layer, got True"),
        (("z", 0.5), WrongType, r"hook points are selected by name"),
        (7, WrongType, "got 7"),
        (lambda name: False, InputError, "true for none of the 18 hook points"),
    ],
)
def test_what_does_not_exist_is_refused_in_words(where, error, said):
    with pytest.raises((error, TypeError) if error is WrongType else error) as caught:
        resolve(where, NAMES)
    if isinstance(caught.value, error):
        import re

        assert re.search(said, str(caught.value))


def test_a_full_name_with_a_layer_beside_it_is_refused_rather_than_half_obeyed():
    assert site("blocks.3.ln1.hook_scale") == Site("scale", 3, "ln1")
    with pytest.raises(InputError, match="the full name of a point;"):
        site("blocks.3.ln1.hook_scale", 5)


def test_names_of_wrapped_modules_are_points_without_known_axes():
    assert parse("features.0.hook_out#1") == Site("out", None, "features.0")
    assert axes("unembed.hook_out") == axes("out") == AXES["out"]
    for name in ("features.0.hook_out", "features.0.hook_in"):
        with pytest.raises(NameNotFound, match="wrapped module"):
            axes(name)


def test_axes_of_norms_inside_attention_have_a_head_axis():
    assert axes("blocks.0.attn.q_norm.hook_scale") == ("batch", "pos", "head", "one")
    assert axes("blocks.0.attn.k_norm.hook_normalized") == ("batch", "pos", "kv_head", "d_head")
    assert axes("blocks.0.ln1.hook_normalized") == ("batch", "pos", "d_model")


def test_a_layer_or_part_of_a_wrong_type_is_named():
    with refused(WrongType, "the part of site\\('z', 0\\) must be a string such as 'ln1', got 1"):
        resolve(("z", 0, 1), NAMES)
    with pytest.raises(NameNotFound, match=r"no site named 'a'.*the layer in \('z', 5\) must be a number"):
        resolve(("z", "a"), NAMES)
