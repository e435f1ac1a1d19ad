"""Settings all tests share: reproducible hypothesis runs without deadlines (two slow cores must not fail a test)."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

settings.register_profile(
    "quick", deadline=None, max_examples=30, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("quick")
