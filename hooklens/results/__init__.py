"""The results that methods return, their files, and the claims that they support."""

GROUP = "hooklens.plugins"  # of entry points; here, so that the registry of plugins needs no torch
