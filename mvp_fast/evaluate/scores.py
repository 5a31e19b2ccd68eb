"""From predictions to what results.json says of them.

Shape legend: Q samples, C classes by likelihood.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

Z95 = 1.959963984540054  # 97.5 % of the normal distribution lie below


def wilson(correct: int, total: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927): which true shares are not at odds with what was counted.

    It says how sure the figure is for other test images, not for other seeds of training.
    """
    share, spread = correct / total, Z95**2 / total
    centre, half = share + spread / 2, math.sqrt(spread * (share * (1 - share) + spread / 4))
    low, high = ((centre + sign * half) / (1 + spread) for sign in (-1, 1))
    return max(low, 0.0), min(high, 1.0)


def scored(ranked_QC: npt.NDArray[np.int64], label_Q: npt.NDArray[np.int64], classes: list[str]) -> dict[str, Any]:
    """Accuracy with its interval, by class, and among the first five where there are ten classes or more.

    Args:
        ranked_QC: each sample's classes, the most likely first; one or more of them.
        label_Q: what is right; every class comes.
    """
    right_Q = ranked_QC[:, 0] == label_Q
    found: dict[str, Any] = {
        "accuracy": float(right_Q.mean()),
        "interval95": list(wilson(int(right_Q.sum()), len(label_Q))),
        "images": len(label_Q),
    }
    if len(classes) >= 10:
        found["accuracy_top5"] = float((ranked_QC[:, :5] == label_Q[:, None]).any(axis=1).mean())
    found["per_class"] = {name: float(right_Q[label_Q == number].mean()) for number, name in enumerate(classes)}
    return found
