"""Prices, papers and who is told. Read once per process from `PIECEWORK_…`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class BillingSettings(BaseSettings):
    """Where the rate card is, what invoices are printed in, and how webhooks are told."""

    model_config = SettingsConfigDict(env_prefix="PIECEWORK_", extra="ignore")

    rate_card: Path | None = Field(
        None,
        description="TOML file of prices, in force from the next start on; none: the one that ships with piecework",
    )
    invoice_font: Path | None = Field(
        None,
        description="TrueType font of invoices as PDF; none: Helvetica, Latin-1 letters alone; others show as ?",
    )
    webhook_timeout_s: float = Field(
        10.0, gt=0, le=60, description="so long a receiver of a webhook has to answer; then the attempt has failed"
    )
    webhook_private_addresses: bool = Field(
        False, description="webhooks may be on this machine and in private networks; else only at public addresses"
    )
    event_source: str = Field("/piecework", description="`source` of usage events: says which deployment they are from")
    export_daily: Literal["csv", "parquet", "cloudevents"] | None = Field(
        None,
        description="every day's usage is put into the object store as csv, parquet or cloudevents; none: it is not",
    )
    export_kept_days: int = Field(
        30, gt=0, le=36500, description="exports are deleted from the object store after so many days"
    )
