"""Lenses: what each layer's stream predicts, which components write the answer, and the controls for both."""

# All modules are imported here, so that a name shared by a module and its function always means the function.
from hooklens.plugins.lens.affine_lens import TunedLensTraining, fit_tuned_lens, train_tuned_lens, tuned_lens
from hooklens.plugins.lens.calibration import Calibration, measure_calibration
from hooklens.plugins.lens.layer_lens import LogitLens, lens_logits, logit_lens
from hooklens.plugins.lens.logit_attribution import LogitAttribution, direct_logit_attribution
from hooklens.plugins.lens.output_lens import PredictionLens, prediction_lens
from hooklens.plugins.lens.trajectory import Trajectory, trace_predictions
from hooklens.plugins.lens.translators import TunedLens

__all__ = [
    "Calibration",
    "LogitAttribution",
    "LogitLens",
    "PredictionLens",
    "Trajectory",
    "TunedLens",
    "TunedLensTraining",
    "direct_logit_attribution",
    "fit_tuned_lens",
    "lens_logits",
    "logit_lens",
    "measure_calibration",
    "prediction_lens",
    "trace_predictions",
    "train_tuned_lens",
    "tuned_lens",
]
