"""Numbers and times that clients name, within what can be reckoned with and stored."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

from pydantic import AfterValidator, AwareDatetime, Field

FIRST_YEAR, LAST_YEAR = 1970, 9998


def _within_years(moment: datetime) -> datetime:
    if not FIRST_YEAR <= moment.year <= LAST_YEAR:
        raise ValueError(f"a time must be in the years {FIRST_YEAR} to {LAST_YEAR}")
    return moment


Moment = Annotated[AwareDatetime, AfterValidator(_within_years)]
"""A time with a zone, with room on both sides: another zone and the next hour can be told of it."""

Offset = Annotated[int, Field(ge=0, le=2**62)]
"""How many are left out of what is listed."""
