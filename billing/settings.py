"""Prices. Read once per process from `PIECEWORK_…`."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class BillingSettings(BaseSettings):
    """Where the rate card is."""

    model_config = SettingsConfigDict(env_prefix="PIECEWORK_", extra="ignore")

    rate_card: Path | None = Field(
        None,
        description="TOML file of prices, in force from the next start on; none: the one that ships with piecework",
    )
