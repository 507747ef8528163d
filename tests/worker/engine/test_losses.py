from __future__ import annotations

import torch

from jobs.losses import LOSS_SPECS
from worker.engine.losses import LOSSES


def test_every_described_loss_is_implemented_and_no_other() -> None:
    assert set(LOSSES) == set(LOSS_SPECS)
    assert all(LOSSES[name].spec is spec and spec.name == name for name, spec in LOSS_SPECS.items())


def test_every_loss_takes_exactly_its_inputs_and_settings() -> None:
    for loss in LOSSES.values():
        # given every input and setting of the description, and a record of which are read
        read: set[str] = set()

        class Recorded(dict):  # type: ignore[type-arg]
            def __getitem__(self, name: str) -> object:
                read.add(name)  # noqa: B023
                return super().__getitem__(name)

            def get(self, name: str, default: object = None) -> object:
                read.add(name)  # noqa: B023
                return super().get(name, default)

        names = {*loss.spec.required_inputs, *loss.spec.optional_inputs} - {"target_tokens"}
        inputs = Recorded({name: torch.ones(3) for name in names})
        # when
        loss.formula(torch.zeros(3), inputs, Recorded(loss.spec.config))
        # then
        assert read == names | set(loss.spec.config)
