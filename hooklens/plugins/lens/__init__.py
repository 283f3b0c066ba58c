"""Lenses: what each layer's stream would say, which parts write the answer, and how far that may be trusted."""

# Every module is imported here, so that where one is called as its function is, the name is the function's for good.
from hooklens.plugins.lens.affine_lens import TunedLensTraining, fit_tuned_lens, train_tuned_lens, tuned_lens
from hooklens.plugins.lens.calibration import Calibration, measure_calibration
from hooklens.plugins.lens.layer_lens import LogitLens, lens_logits, logit_lens
from hooklens.plugins.lens.logit_attribution import LogitAttribution, direct_logit_attribution
from hooklens.plugins.lens.trajectory import Trajectory, trace_predictions
from hooklens.plugins.lens.translators import TunedLens

__all__ = [
    "Calibration",
    "LogitAttribution",
    "LogitLens",
    "Trajectory",
    "TunedLens",
    "TunedLensTraining",
    "direct_logit_attribution",
    "fit_tuned_lens",
    "lens_logits",
    "logit_lens",
    "measure_calibration",
    "trace_predictions",
    "train_tuned_lens",
    "tuned_lens",
]
