"""Sampling sessions opened, samples accepted: as failed ones if they make no sense."""

from __future__ import annotations

from typing import Any

from api.acceptance import FINISHED, facts_of, unknown_base_model
from api.errors import BadRequestError, NotFoundError
from api.services import Services
from api.wire import bodies, json_requests
from jobs.operations import Failure, Sample
from jobs.submit import Accepted
from jobs.validation import InvalidOperationError, check
from jobs.validation.sampling import check_num_samples
from storage import base_models, checkpoints, runs
from storage.errors import RowNotFoundError
from storage.ids import CheckpointPath
from storage.runs import SamplingSession


def create_session(services: Services, account_id: str, body: bodies.CreateSamplingSession) -> SamplingSession:
    """Open a sampling session, or return the one that the same `sampling_session_seq_id` opened before.

    Raises:
        RowNotFoundError: the account has no such session.
        NotFoundError: there is no such checkpoint that the account may read.
        BadRequestError: neither base model nor path is given, or the base model is not served.
    """
    if body.base_model is None and body.model_path is None:
        raise BadRequestError("one of base_model and model_path must be given")
    with services.database.begin() as tx:
        now = services.database.now(tx)
        session = runs.get_session(tx, account_id, body.session_id)
        if session.finished_at is not None:
            raise BadRequestError(FINISHED)
        path = None if body.model_path is None else _parse_path(body.model_path)
        try:
            checkpoint = None if path is None else checkpoints.get(tx, path, now=now, reader=account_id)
        except RowNotFoundError as error:
            raise NotFoundError(f"model_path: {error} that this account may read") from error
        base_model = checkpoint.base_model if checkpoint is not None else str(body.base_model)
        if base_models.find_base_model(tx, base_model) is None:
            raise BadRequestError(unknown_base_model(tx, base_model))
        return runs.create_sampling_session(
            tx,
            account_id=account_id,
            session_id=session.id,
            sampling_session_seq_id=body.sampling_session_seq_id,
            run_id=checkpoint.run_id if checkpoint is not None and checkpoint.account_id == account_id else None,
            base_model=base_model,
            now=now,
            model_path=None if path is None else str(path),
            object_key=None if checkpoint is None else checkpoint.object_key,
            lora=None if checkpoint is None else checkpoint.lora,
        )


def accept(services: Services, account_id: str, payload: dict[str, Any]) -> tuple[Accepted, int]:
    """Accept a sample; returns also how many sequences were asked for.

    Raises:
        RowNotFoundError: the account has no such sampling session.
        InvalidOperationError: it cannot be told to which sampling session it belongs, or how many sequences it wants.
    """
    where = bodies.parse(bodies.SampleAddress, payload)
    num_samples = json_requests.num_samples(payload)
    check_num_samples(num_samples)
    with services.database.read() as tx:
        session = runs.get_sampling_session(tx, where.sampling_session_id, account_id=account_id)
        finished = runs.get_session(tx, account_id, session.session_id).finished_at is not None
        model = base_models.find_base_model(tx, session.base_model)
    body: Sample | Failure
    try:
        if finished:
            raise InvalidOperationError(FINISHED)
        body = json_requests.sample(payload)
        check(body, facts_of(model, session.base_model))
    except InvalidOperationError as error:
        body = error.failure
    return services.submitter.sample(session, where.seq_id, body, num_samples=num_samples), num_samples


def _parse_path(text: str) -> CheckpointPath:
    try:
        return CheckpointPath.parse(text)
    except ValueError as error:
        raise BadRequestError(f"model_path: {error}") from error
