"""How long a file takes on a device's CPU: an estimate from its operators, with an interval. Nothing runs.

The model is described in docs/prediction.md; edgeopt/prediction/parameters.toml holds what was fitted.
"""

from __future__ import annotations

from edgeopt.prediction.calibration import Calibration, Measured, calibrate, forget
from edgeopt.prediction.calibration import find as find_calibration
from edgeopt.prediction.device_report import measurement
from edgeopt.prediction.device_report import read as read_device_report
from edgeopt.prediction.estimate import OpEstimate, Prediction, predict
from edgeopt.prediction.survey import Survey, survey

__all__ = [
    "Calibration",
    "Measured",
    "OpEstimate",
    "Prediction",
    "Survey",
    "calibrate",
    "find_calibration",
    "forget",
    "measurement",
    "predict",
    "read_device_report",
    "survey",
]
