"""Its being here puts this folder on the import path, so that tests in every folder can `from families import tiny`."""

import os

# Workers of `pytest -n auto` share the cores: with several threads each they wait for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
