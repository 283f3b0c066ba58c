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

SOURCE = Path(__file__).parent / "third_party_plugin"

USE = """
import json, sys
import torch
from hooklens.plugins import available, find
from hooklens.testing import check_plugin, induction_model
info = find("attention_entropy")
check_plugin("attention_entropy")
result = info.demo()(induction_model())
result.save(sys.argv[1])
print(json.dumps({"listed": [i.name for i in available()], "info": vars(info), "entropy": result.entropy.tolist()}))
"""

WRITE = """
import json, sys
import torch
import hooklens as hl
from hooklens.plugins.circuits import circuit_of
from hooklens.testing import or_gate
from hooklens_median import MedianOver
gate, logit, value = or_gate(), lambda logits: logits[:, -1, 1], MedianOver([[0], [1], [1]])
zeroed, written = (
    hl.ablate(gate, [[0]], logit, site="attn_out", by="layer", value=each).effect.item() for each in ("zero", value)
)
sweep = hl.patch(gate, [[0]], [[1]], logit, site="z", value=value, resume=sys.argv[1] + ".part")
again = hl.patch(gate, [[0]], [[1]], logit, site="z", value=value, resume=sys.argv[1] + ".part")
sweep.save(sys.argv[1])
circuit = circuit_of(gate, ["MLP0->logits"], value=value).run(gate, [[0]], None, logit)
print(json.dumps({"zeroed": zeroed, "written": written, "circuit": circuit.per_pair.item(), "says": circuit.replacement,
                  "resumed": torch.equal(sweep.per_pair, again.per_pair)}))
"""

LABEL = """
import json, sys
from hooklens import Result
print(json.dumps(Result.load(sys.argv[1]).replacement))
"""

READ = """
import json, sys
from hooklens import Result
result = Result.load(sys.argv[1])
print(json.dumps({"class": type(result).__name__, "entropy": result.entropy.tolist(), "table": str(result.table(1))}))
"""


PARTS = """
import json, sys
import torch
import hooklens as hl
from hooklens.testing import tiny_model
import hooklens_mlp_first, hooklens_more_sites
model = tiny_model(block="mlp_first", positional_embedding_type="rotary")
clean, corrupted = torch.tensor([[1, 2, 3]]), torch.tensor([[1, 4, 3]])
metric, found = hl.logit_diff(model, answer=5, wrong_answer=6), {}
for site in ("post", "mlp_in", "rot_q"):
    sweep = hl.patch(model, clean, corrupted, metric, site=site)
    with hl.engine(plain=True):
        plain = hl.patch(model, clean, corrupted, metric, site=site)
    found[site] = [sweep.how, plain.how, float((sweep.values - plain.values).abs().max())]
print(json.dumps(found))
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


def python(program, *arguments, path):
    """What a fresh interpreter prints, with the plugin's folder on its path."""
    environment = os.environ | {"PYTHONPATH": str(path)}
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=path)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_it_is_found_keeps_the_contract_and_its_result_comes_back(installed, tmp_path):
    file = tmp_path / "entropy.safetensors"
    used = python(USE, file, path=installed)
    assert {"attention_entropy", "patch"} <= set(used["listed"])
    assert used["info"]["package"] == "hooklens-attention-entropy"
    assert used["info"]["summary"].startswith("Attention entropy: how widely")
    assert used["entropy"][0][0] == 0  # the previous-token head
    read = python(READ, file, path=installed)  # a process that has not imported the plugin
    assert read["class"] == "AttentionEntropy"
    assert read["entropy"] == used["entropy"]
    assert "L0H0" in read["table"]
    with pytest.raises(Unavailable, match="if you trust that, pip install hooklens-attention-entropy"):
        Result.load(file)


def test_its_replacement_is_written_by_every_method_and_named_by_a_saved_result(installed, tmp_path):
    """Both heads of the gate write 1 on every prompt, so that their median keeps it open, and zeros do not."""
    file = tmp_path / "sweep.safetensors"
    used = python(WRITE, file, path=installed)
    assert used == {"zeroed": -1.0, "written": 0.0, "circuit": 1.0, "says": "median over", "resumed": True}
    assert python(LABEL, file, path=tmp_path) == "median over"  # where the package is not installed


def test_its_block_kind_and_its_sites_are_swept_exactly(installed):
    for how, plain, error in python(PARTS, path=installed).values():
        assert how == "engine" and plain.startswith("plain loop") and error < 1e-5
