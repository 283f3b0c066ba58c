"""Components by name: one parser, one printer."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from refused import refused

import hooklens as hl
from hooklens.core.component import Component, head_names
from hooklens.core.errors import HooklensError, InputError, NameNotFound
from hooklens.plugins.circuits.graph import circuit_graph
from hooklens.sweeps.nodes import read_components, read_heads, read_receivers, read_senders
from hooklens.sweeps.planning import Patch
from hooklens.testing import tiny_model

NUMBERS = st.integers(0, 200)


@st.composite
def fields(draw):
    pos = draw(st.none() | st.integers(-50, 50))
    kind = draw(st.sampled_from(["head", "q", "k", "v", "mlp", "neuron", "layer", "embed", "final"]))
    place = {"kind": kind, "pos": pos, "at": "" if pos is None else f"@{pos}"}
    if kind in ("embed", "final"):
        return place
    place["layer"] = draw(st.integers(-20, 200))
    if kind == "neuron":
        return place | {"neuron": draw(NUMBERS)}
    if kind in ("mlp", "layer"):
        return place
    return place | {"head": draw(NUMBERS), "keyed": kind != "q" and draw(st.booleans())}


@given(fields())
def test_a_name_means_the_component_that_it_was_made_of(given_fields):
    one = Component(**given_fields)
    assert Component.parse(str(one)) == one


@given(st.text(alphabet="LHGNMP.qkv@-0123456789 ", max_size=8))
def test_what_parses_prints_as_itself_but_for_leading_zeros(name):
    try:
        one = Component.parse(name)
    except InputError as error:
        assert "no component is called" in str(error)
        return
    assert Component.parse(str(one)) == one


@pytest.mark.parametrize("changes", [{}, {"n_heads": 4, "n_key_value_heads": 2}, {"attn_only": True}])
def test_paths_and_circuits_call_the_same_things_by_the_same_names(changes):
    model = tiny_model(**changes)
    graph = circuit_graph(model)
    assert [one.name for one in read_senders(model, ["embed", *graph.source_names[1:]])] == graph.source_names
    named = [one.name for one in read_receivers(model, graph.receiver_names)]
    assert named == [name.replace("logits", "final") for name in graph.receiver_names]
    heads = head_names(model.cfg.n_layers, model.cfg.n_heads)
    assert [f"L{layer}H{head}" for layer, head in read_heads(model, heads)] == heads


def test_a_position_in_the_name_is_that_of_at():
    model = tiny_model()
    given = [[1, 2, 3]], [[1, 4, 3]], hl.logit_diff(model, answer=5, wrong_answer=6)
    one = hl.path_patch(model, *given, senders=["L0H0@-1"], receivers="L1H0.q@-1")
    other = hl.path_patch(model, *given, senders=hl.patching.At("L0H0", -1), receivers=hl.patching.At(("q", 1, 0), -1))
    assert one.senders == other.senders == ["L0H0@-1"] and one.receivers == other.receivers == ["L1H0.q@-1"]
    assert one.per_pair.tolist() == other.per_pair.tolist()


def test_a_model_is_asked_by_names_tuples_and_sites():
    model = tiny_model(n_heads=4, n_key_value_heads=2)
    for asked in ("L1G0.k", "L1H0.k", ("k", 1, 0), ["k", -1, 0], Component("k", -1, 0)):
        assert [one.name for one in read_components(model, asked)] == ["L1G0.k"]
    assert [node.name for name in ("L1H1.k", "L1H2.k") for node in read_components(model, name)] == ["L1G0.k", "L1G1.k"]
    assert len(read_components(model, hl.site("k", 0))) == 2 and len(read_components(model, ("z", 0))) == 4
    assert read_components(model, ("post", 0, 3)) == read_components(model, "L0N3")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("L0H", "no component is called 'L0H'"),
        ("L0H1.z", 'its query \\("q", 9, 6\\) or "L9H6.q"'),
        ("L0N2.q", "no component is called"),
        ("L0G1.q", "no component is called"),
        ("L0G1", "no component is called"),
        (("q", 1, 2, 3), "no component is called"),
        (("resid_pre", 1), "no component is called"),
        ("L2H0", "layer 2 was asked for as a component; there are layers 0 to 1"),
        ("L-3H0", "layer -3 was asked for"),
        ("L0H4", "head 4 of layer 0 was asked for as a component; there are heads 0 to 3"),
        ("L0H4.v", "head 4 of layer 0 was asked for as a component; there are key/value heads 0 to 1"),
        ("L0N99", "neuron 99 of layer 0 was asked for as a component; there are neurons 0 to "),
    ],
)
def test_what_a_model_lacks_is_said_with_what_it_has(asked, said):
    with pytest.raises(InputError, match=said):
        read_components(tiny_model(n_heads=4, n_key_value_heads=2), asked)


def test_a_few_components_are_ablated_by_their_names():
    model = tiny_model()
    given = model, [[1, 2, 3], [4, 5, 6]], hl.logit_diff(model, answer=5, wrong_answer=6)
    with hl.engine(verify=0):
        by_name = hl.ablate(*given, patches=["L1H0", (0, 1), Patch(1, head=1)], value="zero")
        grid = hl.ablate(*given, value="zero")
        with pytest.raises(InputError, match=r"L1H0\.q was asked for as a patch of z, which has .*heads such"):
            hl.ablate(*given, patches=["L1H0.q"])
    assert by_name.labels["patch"] == ["L1H0", "L0H1", "L1H1"]
    expected = [grid.per_prompt[:, layer, head].tolist() for layer, head in ((1, 0), (0, 1), (1, 1))]
    assert by_name.per_prompt.T.tolist() == [pytest.approx(values, rel=1e-5) for values in expected]


def test_a_position_given_to_the_constructor_was_left_out_of_the_name():
    assert str(Component("q", 1, 0, pos=-1)) == "L1H0.q@-1" and Component.parse("L1H0.q@-1").name == "L1H0.q@-1"
    model = tiny_model()
    senders = [Component("head", 0, 0, pos=1), Component("head", 0, 0, pos=2)]
    metric = hl.logit_diff(model, answer=5, wrong_answer=6)
    assert hl.path_patch(model, [[1, 2, 3]], [[4, 5, 3]], metric, senders=senders).senders == ["L0H0@1", "L0H0@2"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("bogus", 1), "no kind of component named 'bogus'"),
        (("HEAD", 1, 0), "no kind of component named 'HEAD'; closest: head"),
        (("head", 1), "a component of kind 'head' needs the number of its head, got head=None"),
        (("q", 1, -1), "a component of kind 'q' needs the number of its head, got head=-1"),
        (("neuron", 1, 0), "a component of kind 'neuron' has no head, got head=0"),
        (("mlp", 1, None, 3), "a component of kind 'mlp' has no neuron, got neuron=3"),
        (("head", "1", 0), "the layer of a component is a whole number, got '1'"),
        (("head", 1, 0, None, "S2"), "pos is a whole number, or a tuple of one for each pair; got 'S2'"),
    ],
)
def test_a_component_that_cannot_be_was_made_and_failed_later(given, said):
    with refused(HooklensError, said):
        Component(*given)


@pytest.mark.parametrize("asked", [None, 3, ("q", 1, 0), Component("mlp", 0)])
def test_parsing_what_is_no_string_ended_in_a_bare_error(asked):
    with refused(InputError, "no component is called"):
        Component.parse(asked)


def test_a_neuron_without_its_number_was_taken_for_one_neuron_a_head():
    with pytest.raises(InputError, match="a component of kind 'neuron' needs the number of its neuron"):
        read_components(tiny_model(), ("post", 0))


def test_a_name_in_another_case_is_the_closest_one():
    for asked, near in (("l1h0", "L1H0"), ("l1h0.Q@-1", r"L1H0\.q@-1"), ("mlp3", "MLP3"), ("Embed", "embed")):
        with pytest.raises(InputError, match=f"no component is called '{asked}'; closest: {near}$"):
            Component.parse(asked)
    with pytest.raises(NameNotFound, match="no value to write named 'MEAN'; closest: mean"):
        hl.ablate(tiny_model(), [[1, 2, 3]], hl.logit_diff(tiny_model(), answer=5, wrong_answer=6), value="MEAN")
    with pytest.raises(NameNotFound, match="closest: resid_post"):
        tiny_model().run_with_cache([[1, 2]], names="RESID_POST")
    with pytest.raises(AttributeError, match=r"closest: hl\.logit_lens"):
        hl.LOGIT_LENS  # noqa: B018


def test_the_embedding_has_no_layer_and_a_component_is_no_name():
    with refused(InputError, "this is a Component already, L1H0"):
        Component.parse(Component("head", 1, 0))
    for kind in ("embed", "final"):
        with pytest.raises(InputError, match="has no layer, got layer=3"):
            Component(kind, 3)
