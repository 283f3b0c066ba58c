"""Studies: several methods combined on your own prompts, with claims and a report. The command line calls them."""

from hooklens.studies.circuit import CircuitStudy, study_circuit
from hooklens.studies.head_claims import taxonomy_claims
from hooklens.studies.heads import HeadStudy, head_study
from hooklens.studies.heads_page import taxonomy_report
from hooklens.studies.ioi import IOIStudy, ioi_study
from hooklens.studies.lens import LensStudy, lens_study
from hooklens.studies.mover_claims import mover_claims
from hooklens.studies.pair import PairStudy, study_pair
from hooklens.studies.probe_claims import causal_claims
from hooklens.studies.probe_page import probe_report
from hooklens.studies.steering_claims import steering_claims
from hooklens.studies.transfer_page import transfer_report

__all__ = [
    "CircuitStudy",
    "HeadStudy",
    "IOIStudy",
    "LensStudy",
    "PairStudy",
    "causal_claims",
    "head_study",
    "ioi_study",
    "lens_study",
    "mover_claims",
    "probe_report",
    "steering_claims",
    "study_circuit",
    "study_pair",
    "taxonomy_claims",
    "taxonomy_report",
    "transfer_report",
]
