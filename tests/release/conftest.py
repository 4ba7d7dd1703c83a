from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture
def audit() -> dict[str, Any]:
    return {
        "epsilon_lower": 0.4,
        "ceiling": 3.49,
        "confidence": 0.95,
        "method": "ptm",
        "claimed_epsilon": 3.3,  # of which the mechanism in `claims` spends as much as noise that is rounded upwards lets it
        "attacks": [{"name": "nearest", "tpr_at_fpr": {"0.01": {"tpr": 0.02}}}],
        "broken_arm": {"caught": True, "epsilon_lower": 3.0},
        "copies": {"exact": 0, "images": 12},
        "power": True,
        "site": "a name that is not quoted",
    }
