"""Prices and papers. Read once per process from `PIECEWORK_…`."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class BillingSettings(BaseSettings):
    """Where the rate card is, and what invoices are printed in."""

    model_config = SettingsConfigDict(env_prefix="PIECEWORK_", extra="ignore")

    rate_card: Path | None = Field(
        None,
        description="TOML file of prices, in force from the next start on; none: the one that ships with piecework",
    )
    invoice_font: Path | None = Field(
        None,
        description="TrueType font of invoices as PDF; none: Helvetica, Latin-1 letters alone; others show as ?",
    )
