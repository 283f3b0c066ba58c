"""Linear probes: what can be read from an activation, compared with what can be read without the model."""

from hooklens.plugins.probing.confidence import Calibration
from hooklens.plugins.probing.directions import TokenProjection, project_tokens
from hooklens.plugins.probing.gathering import Activations, gather
from hooklens.plugins.probing.geometry import Geometry, measure_geometry
from hooklens.plugins.probing.labels import (
    TASKS,
    next_vowel,
    odd_first,
    part_of_speech,
    sentiment,
    subject_number,
    sum_over_50,
)
from hooklens.plugins.probing.probe_training import probe_texts, train_probe
from hooklens.plugins.probing.probe_transfer import Transfer, transfer_probe
from hooklens.plugins.probing.probe_use import CausalCheck, check_probe_use
from hooklens.plugins.probing.probes import PROBES, Logistic, MassMean, Probe, ProbeKind, Ridge, WhitenedMassMean
from hooklens.plugins.probing.study import ProbeStudy
from hooklens.plugins.probing.task import ProbeTask, read_task
from hooklens.plugins.probing.value_probe import ValueProbe, ValueStudy, train_value_probe

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
    "ValueProbe",
    "ValueStudy",
    "WhitenedMassMean",
    "check_probe_use",
    "gather",
    "measure_geometry",
    "next_vowel",
    "odd_first",
    "part_of_speech",
    "probe_texts",
    "project_tokens",
    "read_task",
    "sentiment",
    "subject_number",
    "sum_over_50",
    "train_probe",
    "train_value_probe",
    "transfer_probe",
]
