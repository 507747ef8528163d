"""Every loss on offer, one file each; what each takes is in `jobs/losses.py`."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from jobs.losses import LOSS_SPECS
from worker.engine.losses.cispo import cispo
from worker.engine.losses.cross_entropy import cross_entropy
from worker.engine.losses.dro import dro
from worker.engine.losses.importance_sampling import importance_sampling
from worker.engine.losses.loss import Average, Formula, Loss, LossTerms
from worker.engine.losses.ppo import ppo

__all__ = ["LOSSES", "Average", "Loss", "LossTerms"]

_FORMULAS: Mapping[str, Formula] = {
    "cross_entropy": cross_entropy,
    "importance_sampling": importance_sampling,
    "ppo": ppo,
    "cispo": cispo,
    "dro": dro,
}

LOSSES: Mapping[str, Loss] = MappingProxyType(
    {name: Loss(LOSS_SPECS[name], formula) for name, formula in _FORMULAS.items()}
)
"""Description and formula of each loss, by `loss_fn`."""
