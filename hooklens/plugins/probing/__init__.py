"""Linear probes: what can be read from an activation, compared with what can be read without the model."""

from hooklens.plugins.probing.calibration import Calibration
from hooklens.plugins.probing.causal import CausalCheck, causal_check
from hooklens.plugins.probing.directions import TokenProjection, project_tokens
from hooklens.plugins.probing.gather import Activations, gather
from hooklens.plugins.probing.geometry import Geometry, probe_geometry
from hooklens.plugins.probing.labels import (
    TASKS,
    next_vowel,
    odd_first,
    part_of_speech,
    sentiment,
    subject_number,
    sum_over_50,
)
from hooklens.plugins.probing.probes import PROBES, Logistic, MassMean, Probe, ProbeKind, Ridge, WhitenedMassMean
from hooklens.plugins.probing.study import ProbeStudy
from hooklens.plugins.probing.task import ProbeTask, read_task
from hooklens.plugins.probing.train import probe_texts, train_probe
from hooklens.plugins.probing.transfer import Transfer, transfer

__all__ = [
    "PROBES",
    "TASKS",
    "Activations",
    "Calibration",
    "CausalCheck",
    "Geometry",
    "Logistic",
    "MassMean",
    "Probe",
    "ProbeKind",
    "ProbeStudy",
    "ProbeTask",
    "Ridge",
    "TokenProjection",
    "Transfer",
    "WhitenedMassMean",
    "causal_check",
    "gather",
    "next_vowel",
    "odd_first",
    "part_of_speech",
    "probe_geometry",
    "probe_texts",
    "project_tokens",
    "read_task",
    "sentiment",
    "subject_number",
    "sum_over_50",
    "train_probe",
    "transfer",
]
