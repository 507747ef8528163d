"""Each part reads its settings when it starts; a command that starts parts reads them first, and says what is wrong."""

from __future__ import annotations

from api.settings import ApiSettings, SupervisorSettings
from billing import rate_cards
from billing.settings import BillingSettings
from jobs.settings import JobsSettings
from storage.settings import StorageSettings

ALL = (StorageSettings, JobsSettings, BillingSettings, ApiSettings, SupervisorSettings)
"""But for a worker's own."""


def check_settings() -> None:
    """Read all settings, and the rate card that they name.

    Raises:
        ValidationError: one is not what it may be.
        RateCardError: the card cannot be read, or holds what is not a price.
    """
    for settings in ALL:
        settings()
    rate_cards.read_card()
