"""What is wrong with an operation."""

from __future__ import annotations

from jobs.operations import Category, Failure


class InvalidOperationError(ValueError):
    """An operation cannot be executed as it was sent; the message names the field, its value and what is allowed."""

    @property
    def failure(self) -> Failure:
        """The outcome that the operation's future carries."""
        return Failure(str(self), Category.USER)
