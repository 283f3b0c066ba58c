"""In-context learning of linear regression, compared with gradient descent and other learners."""

from hooklens.plugins.algorithmic.icl.attention_regression import AttentionRegression, regress_attention
from hooklens.plugins.algorithmic.icl.best_steps import (
    BestStep,
    best_constant_steps,
    best_gd_plus_plus,
    best_preconditioner,
    best_step,
    best_step_schedules,
)
from hooklens.plugins.algorithmic.icl.constructions import FirstKeys, construct_descent
from hooklens.plugins.algorithmic.icl.expected_errors import DepthGap, ExpectedError, expected_error, measure_depth_gap
from hooklens.plugins.algorithmic.icl.input_moments import (
    InputMoments,
    independent_moments,
    moments_of,
    normal_moments,
    uniform_moments,
)
from hooklens.plugins.algorithmic.icl.kernel_smoothing import (
    KernelComparison,
    compare_with_kernel,
    kernel_weights,
    smooth,
)
from hooklens.plugins.algorithmic.icl.learner_comparison import LearnerComparison, compare_learners, sensitivity_of
from hooklens.plugins.algorithmic.icl.learners import (
    Averaging,
    GDPlusPlus,
    GradientDescent,
    Learner,
    LeastSquares,
    PreconditionedStep,
    Ridge,
    Zero,
)
from hooklens.plugins.algorithmic.icl.rank_collapse import (
    RankCollapse,
    collapse_bound,
    composite_norm,
    measure_rank_collapse,
    residual_to_rank_one,
)
from hooklens.plugins.algorithmic.icl.regression_prompts import (
    RegressionPrompts,
    draw_prompts,
    predict,
    prompts_of,
    task_of,
)
from hooklens.plugins.algorithmic.icl.shifted_prompts import ShiftErrors, measure_shifts
from hooklens.plugins.algorithmic.icl.weight_interpolation import (
    WeightInterpolation,
    WeightProducts,
    interpolate_weights,
    weight_products,
)

__all__ = [
    "AttentionRegression",
    "Averaging",
    "BestStep",
    "DepthGap",
    "ExpectedError",
    "FirstKeys",
    "GDPlusPlus",
    "GradientDescent",
    "InputMoments",
    "KernelComparison",
    "Learner",
    "LearnerComparison",
    "LeastSquares",
    "PreconditionedStep",
    "RankCollapse",
    "RegressionPrompts",
    "Ridge",
    "ShiftErrors",
    "WeightInterpolation",
    "WeightProducts",
    "Zero",
    "best_constant_steps",
    "best_gd_plus_plus",
    "best_preconditioner",
    "best_step",
    "best_step_schedules",
    "collapse_bound",
    "compare_learners",
    "compare_with_kernel",
    "composite_norm",
    "construct_descent",
    "draw_prompts",
    "expected_error",
    "independent_moments",
    "interpolate_weights",
    "kernel_weights",
    "measure_depth_gap",
    "measure_rank_collapse",
    "measure_shifts",
    "moments_of",
    "normal_moments",
    "predict",
    "prompts_of",
    "regress_attention",
    "residual_to_rank_one",
    "sensitivity_of",
    "smooth",
    "task_of",
    "uniform_moments",
    "weight_products",
]
