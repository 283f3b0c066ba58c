"""Its being here puts this folder on the import path, so that tests in every folder can `from families import tiny`."""
