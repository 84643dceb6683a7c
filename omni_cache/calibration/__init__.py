"""Calibration: the published tables, and estimators for models that have none."""

from omni_cache.calibration.estimate import estimate_coefficients, estimate_mag_ratios
from omni_cache.strategies.tables import (
    MagCacheTable,
    TeaCacheTable,
    magcache_table,
    teacache_table,
)

__all__ = [
    "MagCacheTable",
    "TeaCacheTable",
    "estimate_coefficients",
    "estimate_mag_ratios",
    "magcache_table",
    "teacache_table",
]
