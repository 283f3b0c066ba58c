"""The tiny models have the answers that they promise, and the battery names the clause that a plugin breaks."""

import linecache
import random
import sys
import types

import numpy as np
import pytest
import torch

import hooklens as hl
from hooklens.core import hooks
from hooklens.core.errors import NameNotFound
from hooklens.testing import and_gate, check_plugin, induction_model, methods, or_gate, same, tiny_model

REPEATED = [[3, 1, 4, 9, 5, 2, 3, 1, 4, 9, 5, 2]]


def logit(model, tokens, **hooked):
    with torch.no_grad():
        return model.run_with_hooks(tokens, **hooked)[:, -1, 1].tolist()


def scaled(head, factor):
    def edit(z, hook):
        z[:, :, head] *= factor
        return z

    return edit


def test_the_induction_head_scores_1_and_predicts_the_repeated_token():
    model = induction_model()
    logits, cache = model.run_with_cache(REPEATED, names="pattern")
    half = len(REPEATED[0]) // 2
    # the stripe: query i looks at what followed the last time, i - half + 1
    assert cache["pattern", 1][0, 1].diagonal(1 - half)[1:].tolist() == [1.0] * half
    assert cache["pattern", 0][0, 0].diagonal(-1).tolist() == [1.0] * (2 * half - 1)
    assert logits[0, half:-1].argmax(-1).tolist() == REPEATED[0][half + 1 :]
    loss = torch.nn.functional.cross_entropy(logits[0, half:-1], torch.tensor(REPEATED[0][half + 1 :]))
    assert loss.item() < 1e-3


@pytest.mark.parametrize(("where", "breaks"), [(("z", 0), True), (("z", 1), False)])
def test_only_the_two_heads_of_the_induction_circuit_matter(where, breaks):
    model = induction_model()
    layer = where[1]
    on, off = (0, 1) if layer == 0 else (1, 0)
    whole = model(REPEATED)
    other = model.run_with_hooks(REPEATED, fwd_hooks=[(where, scaled(off, 0.0))])
    assert torch.equal(whole, other)
    without = model.run_with_hooks(REPEATED, fwd_hooks=[(where, scaled(on, 0.0))])
    assert not torch.equal(whole[0, 6:].argmax(-1), without[0, 6:].argmax(-1))


def test_the_induction_model_works_in_every_size_and_in_float64():
    model = induction_model(d_vocab=40, n_ctx=8, dtype=torch.float64)
    logits = model([[33, 39, 7, 33, 39]])
    assert logits.dtype == torch.float64
    assert logits[0, 3:].argmax(-1).tolist() == [39, 7]


def test_patching_finds_the_induction_head():
    model = induction_model()
    clean = torch.tensor([[3, 1, 4, 9, 3]])
    corrupted = torch.tensor([[3, 1, 4, 9, 1]])
    sweep = hl.patch(model, clean, corrupted, hl.logit_diff(model, answer=1, wrong_answer=4), site="z")
    assert sweep.top(1).rows[0][0] == "L1H1"
    assert sweep.recovered.tolist() == [[0.0, 0.0], [0.0, 1.0]]


def test_the_or_gate_is_redundant_and_its_gradient_is_blind():
    gate = or_gate()
    assert logit(gate, [[0]]) == [1.0]
    assert [logit(gate, [[0]], fwd_hooks=[("z", scaled(head, 0.0))]) for head in (0, 1)] == [[1.0], [1.0]]
    assert logit(gate, [[0]], fwd_hooks=[("z", lambda z, hook: z * 0)]) == [0.0]
    logits, cache = gate.run_with_cache([[0]], names="z", grads=True)
    logits[0, -1, 1].backward()
    assert cache["z_grad", 0].tolist() == [[[[0.0], [0.0]]]]


def test_the_or_gate_gives_integrated_gradients_a_half_each():
    gate, total, steps = or_gate(), torch.zeros(2), 20
    for step in range(steps):
        share = (step + 0.5) / steps
        with gate.hooks(fwd_hooks=[("z", lambda z, hook, share=share: z * share)]):
            logits, cache = gate.run_with_cache([[0]], names="z", grads=True)
        logits[0, -1, 1].backward()
        total += cache["z_grad", 0][0, 0, :, 0] / steps
    assert torch.allclose(total, torch.tensor([0.5, 0.5]), atol=1e-3)


@pytest.mark.parametrize("n", [1, 2, 5, 16])
def test_the_and_gate_says_1_only_if_all_are_ones(n):
    gate = and_gate()
    ones = torch.ones(1, n, dtype=torch.long)
    assert logit(gate, ones) == pytest.approx([1.0], abs=1e-9)
    for at in range(n):
        tokens = ones.clone()
        tokens[0, at] = 0
        assert logit(gate, tokens) == [0.0]


# -- the battery: a plugin that keeps the contract, and one that breaks each clause

GOOD = '''
"""A plugin that keeps the contract."""
from dataclasses import dataclass
from typing import Any
import torch
from hooklens.results.result import Result

@dataclass(frozen=True, eq=False)
class Sums(Result):
    sums: Any
    def figure(self):
        from hooklens.viz import bars
        return bars(self.sums)

def sums(model, tokens) -> Sums:
    """The logits, summed."""
    with torch.no_grad():
        return Sums(model(tokens)[0].sum(-1))

def demo(model):
    return sums(model, [[1, 2, 3]])
'''


def plugin(source=GOOD, **replaced):
    """A module made of GOOD with some text replaced, as if it had been imported."""
    for old, new in replaced.get("change", {}).items():
        assert old in source
        source = source.replace(old, new)
    made = types.ModuleType("made_up")
    linecache.cache["made_up.py"] = (len(source), None, source.splitlines(keepends=True), "made_up.py")
    exec(compile(source, "made_up.py", "exec"), made.__dict__)
    return made


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """Results of the made-up module can be saved, as those of a registered plugin can."""
    from hooklens.results import result_file

    monkeypatch.setattr(result_file, "_plugin_of", lambda cls: ("made_up", "made-up"))
    monkeypatch.setattr(result_file, "_class_named", lambda plugin, module, name, package: CLASSES[name])
    yield
    assert not hooks._open_scopes
    assert torch.is_grad_enabled()


CLASSES: dict = {}


def checked(change=None, source=GOOD, models=None):
    made = plugin(source, change=change or {})
    CLASSES.update({name: value for name, value in vars(made).items() if isinstance(value, type)})
    check_plugin(made, models=models)


def test_a_plugin_that_keeps_the_contract_passes():
    checked()


def taking(more):
    """The change that gives the method more parameters."""
    return {"sums(model, tokens)": f"sums(model, tokens, {more})"}


def having(*lines):
    """The change that gives the result more members."""
    return {"    def figure": "".join(f"    {line}\n" for line in lines) + "    def figure"}


@pytest.mark.parametrize("studied", ["module", "run", "points"])
def test_a_method_may_study_a_module_a_run_or_points(studied):
    checked({"sums(model, tokens)": f"sums({studied}, tokens)", "Sums(model(": f"Sums({studied}("})


def test_what_is_named_by_convention_passes():
    constants = "import torch\nfrom hooklens.results.statistics import DRAWS\nMY_DRAWS = 50  # each draw is a run\n"
    members = having("ranked_by = 'sum'", "baselines = ('base',)", "base = property(lambda self: 1.0)")
    other = "def other(model, *, draws=MY_DRAWS) -> Sums:\n    'Other sums.'\n\ndef demo("
    more = taking("*, answer=0, draws=DRAWS, seed=0, level=0.95")
    checked({"import torch\n": constants, "def demo(": other} | members | more)
    found = plugin(change=members).sums(tiny_model(), [[1, 2]])
    assert found.top(1).rows == found.table(1).rows and found.headline().startswith("base 1")


RUN = "    return sums(model, [[1, 2, 3]])"
BROKEN = {
    "no demo": ("signature", "there is no demo", {"def demo": "def show"}),
    "demo takes more": (
        "signature",
        r"demo takes the model alone, not \['model', 'k'\]",
        {"demo(model)": "demo(model, k)"},
    ),
    "model second": ("signature", "takes 'tokens' first", {"sums(model, tokens)": "sums(tokens, model)"}),
    "keywords": ("signature", r"takes \*\*options", {"sums(model, tokens)": "sums(model, tokens, **options)"}),
    "nine parameters": (
        "signature",
        "takes 9 parameters",
        {"(model, tokens)": "(model, tokens, a=1, b=1, c=1, d=1, e=1, f=1, g=1)"},
    ),
    "no method": ("signature", "no public function", {"def sums(": "def _sums(", "return sums": "return _sums"}),
    "no docstring": ("docstring", "sums has no docstring", {'    """The logits, summed."""\n': ""}),
    "no module docstring": ("docstring", "the module has no", {'"""A plugin that keeps the contract."""': ""}),
    "raises": ("runs", "demo raised ZeroDivisionError", {RUN: "    1 / 0"}),
    "needs two layers": ("runs", "one layer of one head", {RUN: "    model.blocks[1]\n" + RUN}),
    "needs gradients": (
        "runs",
        "gradients off",
        {RUN: "    model([[1]]).sum().backward()\n    model.zero_grad()\n" + RUN},
    ),
    "edits weights": ("weights", "deepcopy", {RUN: "    model.W_E.data += 1e-7\n" + RUN}),
    "leaves gradients": ("gradients", r"left \.grad", {RUN: "    model([[1]]).sum().backward()\n" + RUN}),
    "freezes": ("gradients", "requires_grad", {RUN: "    model.requires_grad_(False)\n" + RUN}),
    "leaves a handle": ("hooks", "left hooks", {RUN: "    model.add_hook('embed', lambda x, hook: None)\n" + RUN}),
    "leaves a scope": (
        "hooks",
        "open scope",
        {RUN: "    globals()['left'] = model.hooks([('embed', lambda x, hook: None)])\n    left.__enter__()\n" + RUN},
    ),
    "leaves a torch hook": ("hooks", "torch hooks", {RUN: "    model.register_forward_hook(lambda *a: None)\n" + RUN}),
    "leaves gradients off": ("grad mode", "switched on or off", {RUN: "    torch.set_grad_enabled(False)\n" + RUN}),
    "leaves gradients on": ("grad mode", "switched on or off", {RUN: "    torch.set_grad_enabled(True)\n" + RUN}),
    "draws": ("generators", "torch.Generator", {RUN: "    torch.randn(1)\n" + RUN}),
    "draws from numpy": ("generators", "numpy", {RUN: "    import numpy; numpy.random.rand()\n" + RUN}),
    "draws from random": ("generators", "random", {RUN: "    import random; random.random()\n" + RUN}),
    "eval": ("training mode", "put back", {RUN: "    model.eval()\n" + RUN}),
    "differs": (
        "same twice",
        "two different results",
        {RUN: "    runs.append(1); return Sums(torch.ones(1) * len(runs))\n\nruns = []"},
    ),
    "not a result": ("frozen", "returned a dict, not a Result", {RUN: "    return {}"}),
    "not declared": (
        "frozen",
        "not declared with",
        {"@dataclass(frozen=True, eq=False)\n": "", "    sums: Any\n": "", "Sums(model(tokens)[0].sum(-1))": "Sums()"},
    ),
    "compares": ("frozen", "not declared with", {"frozen=True, eq=False": "frozen=True"}),
    "float32": ("dtype", "result.sums is torch.float32", {"sum(-1))": "sum(-1).float())"}),
    "answer by position": ("conventions", "sums takes answer by position", taking("answer=0")),
    "seed by position": ("conventions", "takes seed by position", taking("seed=0")),
    "another seed": ("conventions", "everywhere it is seed=0", taking("*, seed=1")),
    "no default seed": ("conventions", "everywhere it is seed=0", taking("*, seed")),
    "another level": ("conventions", r"everywhere it is level=0\.95", taking("*, level=0.9")),
    "draws without a reason": ("conventions", r"a constant named \.\.\._DRAWS", taking("*, draws=50")),
    "a constant without a reason": (
        "conventions",
        "with the reason",
        taking("*, draws=MY_DRAWS") | {"import torch\n": "import torch\nMY_DRAWS = 50\n"},
    ),
    "q is a method": ("conventions", "q is a method", having("def q(self, mode): return 1.0")),
    "p without q": ("conventions", "no q", having("p = property(lambda self: self.sums.double())")),
    "narrow p": ("dtype", "p and q are float64", having("p = property(lambda self: self.sums.float())")),
    "its own top": (
        "conventions",
        "defines top.k., which every result inherits; say ranked_by",
        having("def top(self, k=10):", "    return self.table(k)"),
    ),
    "a ranking of other rows": (
        "conventions",
        r"ranking has the shape \[7\], and table\(None\) 1 rows",
        having("ranked_by = 'sum'", "ranking = property(lambda self: self.sums.new_ones(7))"),
    ),
    "a table in two orders": (
        "conventions",
        r"top\(1\) is not the first row of table\(None\)",
        having("ranked_by = 'sum'", "def table(self, n=None):", "    return Table(('sum',), [(2,), (1,)][-(n or 2):])")
        | {"def sums(": "from hooklens import Table\n\ndef sums("},
    ),
    "another level of an interval": (
        "conventions",
        r"Sums.interval has level=0\.9; everywhere",
        having("def interval(self, level=0.9): return 0.0, 1.0"),
    ),
    "another word for a baseline": (
        "conventions",
        "whole is a baseline, which is called base",
        having("whole = property(lambda self: 1.0)"),
    ),
    "another word for a baseline of each prompt": (
        "conventions",
        "whole_per_prompt is a baseline, which is called base",
        having("whole_per_prompt = property(lambda self: self.sums)"),
    ),
    "a baseline that is a tensor": (
        "conventions",
        "base is a tensor; a baseline is a number",
        having("base = property(lambda self: self.sums)"),
    ),
    "baselines that are not there": ("conventions", r"baselines names \['clean'\]", having("baselines = ('clean',)")),
    "another alpha": ("conventions", r"everywhere it is alpha=0\.05", taking("*, alpha=0.01")),
    "chance is a tensor": ("conventions", "chance is a tensor", having("chance = property(lambda self: self.sums)")),
    "a control without a word": (
        "conventions",
        "`terms` do not explain: random heads",
        having("def table(self, n=None):", "    return super().table(0) if n == 0 else Controls.head(n)")
        | {"def sums(": "from hooklens import Table\nControls = Table(('sum', 'random heads'), [(1, 2)])\n\ndef sums("},
    ),
    "no figure": ("figure", "WrongType: a Sums has no figure", {"def figure": "def picture"}),
    "empty figure": ("figure", "not a Plotly figure", {"return bars(self.sums)": "return bars"}),
    "no table": (
        "table",
        "returned str",
        {"    def figure": "    def table(self, n=None): return 'rows'\n    def figure"},
    ),
    "long table": (
        "table",
        "more than one row",
        {
            "    def figure": "    def table(self, n=None): return super().table()\n    def figure",
            "sums: Any": "sums: Any\n    more: Any = 1",
        },
    ),
    "no JSON": ("JSON", "WrongType", {"sums: Any": "sums: Any\n    more: Any = object"}),
    "not saved": (
        "saved",
        "differs from what was saved",
        {"sums: Any": "sums: Any\n    def __post_init__(self): object.__setattr__(self, 'sums', self.sums + 1)"},
    ),
}


@pytest.mark.parametrize(("clause", "says", "change"), BROKEN.values(), ids=BROKEN)
def test_each_clause_is_named_by_the_plugin_that_breaks_it(clause, says, change):
    if "random.random" in str(change) and "numpy" not in str(change) and "beartype" in sys.modules:
        pytest.skip("beartype itself draws from random")
    with pytest.raises(AssertionError, match=rf"made_up.*{says}|{says}") as caught:
        checked(change)
    assert f"breaks the clause {clause!r}" in str(caught.value)


def test_a_broken_plugin_does_not_break_what_follows():
    model = tiny_model()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    for kind in ("leaves a handle", "leaves a scope", "leaves gradients off", "eval", "freezes", "leaves a torch hook"):
        with pytest.raises(AssertionError):
            checked(BROKEN[kind][2], models={"a tiny model": model})
    assert torch.equal(states[0], torch.get_rng_state())
    assert not hooks._open_scopes
    assert torch.is_grad_enabled()


def test_models_of_ones_own_are_named_in_the_message():
    with pytest.raises(AssertionError, match="made_up on the or gate breaks the clause 'weights'"):
        checked({RUN: "    model.W_E.data += 1e-7\n    return sums(model, [[1]])"}, models={"the or gate": or_gate()})


def test_every_model_with_a_known_answer_can_be_given():
    checked({"[[1, 2, 3]]": "[[1, 0, 1]]"}, models={"induction": induction_model(), "or": or_gate(), "and": and_gate()})


def test_a_name_that_is_not_registered_and_a_thing_that_is_no_module_are_refused():
    with pytest.raises(NameNotFound, match="no plugin named 'patchin'; closest: patch"):
        check_plugin("patchin")
    with pytest.raises(TypeError):  # ours, or that of executed annotations
        check_plugin(print)


def test_methods_of_a_package_are_those_that_it_exports():
    from hooklens.plugins.patching import activation

    assert list(methods(activation)) == ["patch"]


def test_same_is_exact():
    a = hl.patch(tiny_model(), [[1, 2]], [[1, 3]], lambda logits: logits[:, -1, 0])
    b = hl.patch(tiny_model(), [[1, 2]], [[1, 3]], lambda logits: logits[:, -1, 0])
    assert same(a, b)
    assert not same(a, hl.patch(tiny_model(), [[1, 2]], [[1, 4]], lambda logits: logits[:, -1, 0]))
    assert not same(torch.tensor(0.0), torch.tensor(-0.0))
    assert not same([1, 2], [1, 2, 3])
