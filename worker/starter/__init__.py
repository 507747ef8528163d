"""The starter model: a small language model and tokenizer that piecework makes itself, so that it needs no hub."""

from worker.starter.make import ensure_starter_model, make_starter_model
from worker.starter.school import StarterModelError

__all__ = ["StarterModelError", "ensure_starter_model", "make_starter_model"]
