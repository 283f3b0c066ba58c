"""A plugin of somebody else's, installed as they would, is found, kept to the contract, saved and read back."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hooklens import Result
from hooklens.core.errors import Unavailable

pytestmark = pytest.mark.slow  # it is installed, and used in processes of its own
SOURCE = Path(__file__).parent / "third_party_plugin"

USE = """
import json, sys
import torch
import hooklens as hl
import hooklens_mlp_first, hooklens_more_sites
from hooklens.plugins import available, find
from hooklens.plugins.circuits import circuit_of
from hooklens.testing import check_plugin, induction_model, or_gate, tiny_model
from hooklens_median import MedianOver

info = find("attention_entropy")
check_plugin("attention_entropy")
result = info.demo()(induction_model())
result.save("entropy.safetensors")
plugin = {"listed": [i.name for i in available()], "info": vars(info), "entropy": result.entropy.tolist()}

gate, logit, value = or_gate(), lambda logits: logits[:, -1, 1], MedianOver([[0], [1], [1]])
zeroed, written = (
    hl.ablate(gate, [[0]], logit, site="attn_out", by="layer", value=each).effect.item() for each in ("zero", value)
)
sweep = hl.patch(gate, [[0]], [[1]], logit, site="z", value=value, resume="sweep.part")
again = hl.patch(gate, [[0]], [[1]], logit, site="z", value=value, resume="sweep.part")
sweep.save("sweep.safetensors")
circuit = circuit_of(gate, ["MLP0->logits"], value=value).run(gate, [[0]], None, logit)
replacement = {"zeroed": zeroed, "written": written, "circuit": circuit.per_pair.item(), "says": circuit.replacement,
               "resumed": torch.equal(sweep.per_pair, again.per_pair)}

model = tiny_model(block="mlp_first", positional_embedding_type="rotary")
clean, corrupted = torch.tensor([[1, 2, 3]]), torch.tensor([[1, 4, 3]])
metric, parts = hl.logit_diff(model, answer=5, wrong_answer=6), {}
for site in ("post", "mlp_in", "rot_q"):
    sweep = hl.patch(model, clean, corrupted, metric, site=site)
    with hl.engine(plain=True):
        plain = hl.patch(model, clean, corrupted, metric, site=site)
    parts[site] = [sweep.how, plain.how, float((sweep.values - plain.values).abs().max())]
print(json.dumps({"plugin": plugin, "replacement": replacement, "parts": parts}))
"""

READ = """
import json
from hooklens import Result
result = Result.load("entropy.safetensors")
print(json.dumps({"class": type(result).__name__, "entropy": result.entropy.tolist(), "table": str(result.table(1))}))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder into which pip installed the package, from a copy: building writes beside the source."""
    folder = tmp_path_factory.mktemp("third_party")
    shutil.copytree(SOURCE, folder / "source", ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info"))
    offline = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", "--quiet", *offline, "--target", str(folder / "site")]
    done = subprocess.run([*command, str(folder / "source")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "site"


def python(program, path, folder):
    """What a fresh interpreter prints, with the plugin's folder on its path."""
    environment = os.environ | {"PYTHONPATH": str(path)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder in which the plugin is used, and in which it leaves its files."""
    return tmp_path_factory.mktemp("used")


@pytest.fixture(scope="module")
def used(installed, folder):
    return python(USE, installed, folder)


def test_it_is_found_keeps_the_contract_and_its_result_comes_back(used, installed, folder):
    plugin = used["plugin"]
    assert {"attention_entropy", "patch"} <= set(plugin["listed"])
    assert plugin["info"]["package"] == "hooklens-attention-entropy"
    assert plugin["info"]["summary"].startswith("Attention entropy: how widely")
    assert plugin["entropy"][0][0] == 0  # the previous-token head
    read = python(READ, installed, folder)  # a process that has not imported the plugin
    assert read["class"] == "AttentionEntropy"
    assert read["entropy"] == plugin["entropy"]
    assert "L0H0" in read["table"]
    with pytest.raises(Unavailable, match="if you trust that, pip install hooklens-attention-entropy"):
        Result.load(folder / "entropy.safetensors")


def test_its_replacement_is_written_by_every_method_and_named_by_a_saved_result(used, folder):
    """Both heads of the gate write 1 on every prompt, so that their median keeps it open, and zeros do not."""
    expected = {"zeroed": -1.0, "written": 0.0, "circuit": 1.0, "says": "median over", "resumed": True}
    assert used["replacement"] == expected
    sweep = Result.load(folder / "sweep.safetensors")  # where the package is not installed
    assert sweep.replacement == "median over"


def test_its_block_kind_and_its_sites_are_swept_exactly(used):
    for how, plain, error in used["parts"].values():
        assert how == "engine" and plain.startswith("plain loop") and error < 1e-5
