"""Calibration: the published tables, and measurements for models that have none, kept in files."""

from omni_cache.calibration.estimate import (
    calibrate,
    estimate_coefficients,
    estimate_mag_ratios,
    fit,
    measure,
)
from omni_cache.strategies.calibrations import Calibration
from omni_cache.strategies.tables import (
    MagCacheTable,
    TeaCacheTable,
    magcache_table,
    teacache_table,
)

__all__ = [
    "Calibration",
    "MagCacheTable",
    "TeaCacheTable",
    "calibrate",
    "estimate_coefficients",
    "estimate_mag_ratios",
    "fit",
    "magcache_table",
    "measure",
    "teacache_table",
]
