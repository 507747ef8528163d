"""Claims queued samples, as many as the engine has room for, and brings what they need into memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence

import structlog

from billing import budgets, pauses
from billing.dimensions import Dimensions
from jobs import operations
from jobs.operations import Category, Failure
from storage import claims, failpoints, runs, suspects
from storage.failpoints import Point
from storage.journal import Operation
from storage.open import Storage
from worker.residency import BaseModels, SamplingAdapters
from worker.sample_turn import ClaimedSample, Drawable, SampleTurn

log = structlog.get_logger()

POLL_S = 1.0
"""So often it looks for samples by itself; and for spent caps, where it has no room for more samples."""


class SuspectTurns:
    """When a worker draws a suspect: alone, and between two of them others have as long as the first one took.

    So neither waits for ever, however many of the others there are.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._begun_at: float | None = None
        self._due_at = 0.0

    def begin(self) -> None:
        """A suspect is drawn from now on."""
        self._begun_at = self._now()

    def note_end(self) -> None:
        """No suspect is being drawn."""
        if self._begun_at is not None:
            now = self._now()
            self._due_at, self._begun_at = now + (now - self._begun_at), None

    @property
    def is_due(self) -> bool:
        """Whether the others have had their time."""
        return self._now() >= self._due_at


class SampleFeeder(threading.Thread):
    """A thread between journal and engine. It also looks by itself now and then, so no lost message stalls samples."""

    def __init__(
        self,
        storage: Storage,
        models: BaseModels,
        adapters: SamplingAdapters,
        samples: SampleTurn,
        *,
        worker_id: str,
        claim_s: float,
        samples_max: int,
        in_use: Callable[[], set[str]],
    ) -> None:
        super().__init__(name="samples", daemon=True)
        self._storage = storage
        self._models = models
        self._adapters = adapters
        self._samples = samples
        self._worker_id = worker_id
        self._claim_s = claim_s
        self._samples_max = samples_max
        self._in_use = in_use
        self._suspects = SuspectTurns()
        self._looked_at = float("-inf")
        self._wanted = threading.Event()
        self._stopping = threading.Event()

    def notify(self) -> None:
        """Samples may be queued, or there is room again."""
        self._wanted.set()

    def stop(self) -> None:
        """Claim no more. What has been claimed and is not in the engine is given up with all other claims."""
        self._stopping.set()
        self._wanted.set()

    def run(self) -> None:
        """Claim until stopped."""
        while not self._stopping.is_set():
            self._wanted.wait(POLL_S)
            self._wanted.clear()
            try:
                while not self._stopping.is_set() and self._feed():
                    pass
            except Exception as error:  # what was claimed is free again once its claim expires
                log.warning("claiming_failed", error=str(error), exc_info=not getattr(error, "retryable", False))
                self._stopping.wait(POLL_S)

    def _feed(self) -> bool:
        self._give_back_withheld()
        held = self._samples.claims()
        if any(operation.suspect for operation in held.values()):
            return False  # it is being drawn, alone
        self._suspects.note_end()
        room = self._samples_max - len(held)
        if room <= 0 and time.monotonic() < self._looked_at + POLL_S:
            return False
        mark = self._samples.caps.mark
        with self._storage.database.read() as tx:
            now = self._storage.database.now(tx)
            spent = budgets.exhausted_caps(tx, now=now)
            unpaused = pauses.unpaused_by({cap.scope for cap in spent}, now=now)
            suspect = room > 0 and claims.samples_wait(tx, suspect=True, among=unpaused)
            others = room > 0 and claims.samples_wait(tx, among=unpaused)
        self._samples.caps.replace(spent, since=mark)
        self._looked_at = time.monotonic()
        if suspect and (self._suspects.is_due or not others):
            return not held and self._bring(self._claim_suspect)
        return others and self._bring(lambda: self._claim(room))

    def _bring(self, claim: Callable[[], Sequence[Operation]]) -> bool:
        """Claim samples and load them; False if others were quicker."""
        failpoints.reach(Point.CLAIM_BEGUN)
        claimed = claim()
        failpoints.reach(Point.CLAIMED)
        self._samples.expect(claimed)
        num_arrived = 0
        try:
            payers = self._payers(claimed)
            for operation in claimed:
                self._samples.arrive(self._load(operation, payers[str(operation.sampling_session_id)]))
                num_arrived += 1
        except Exception:
            self._give_back(claimed[num_arrived:])
            raise
        finally:
            self._samples.forget(claimed)
        return bool(claimed)

    def _give_back(self, claimed: Sequence[Operation]) -> None:
        """Let others try; else the claims would expire, as if a worker had died with them."""
        with self._storage.database.begin() as tx:
            claims.give_back(tx, claimed, worker_id=self._worker_id)

    def _give_back_withheld(self) -> None:
        """Let samples wait, in the journal, for room under their caps; until then their claims are renewed."""
        withheld = self._samples.withheld()
        if withheld:
            self._give_back(withheld)
            self._samples.note_given_back(withheld)

    def _payers(self, claimed: Sequence[Operation]) -> Mapping[str, Dimensions]:
        if not claimed:
            return {}
        with self._storage.database.read() as tx:
            return pauses.payers(tx, {str(operation.sampling_session_id) for operation in claimed})

    def _claim(self, limit: int) -> Sequence[Operation]:
        database = self._storage.database
        with database.begin() as tx:
            return claims.claim_samples(
                tx,
                worker_id=self._worker_id,
                limit=limit,
                now=database.now(tx),
                expires_at=database.after(tx, self._claim_s),
                skip_locked=not database.is_sqlite,
                among=pauses.unpaused(tx, now=database.now(tx)),
            )

    def _claim_suspect(self) -> Sequence[Operation]:
        database = self._storage.database
        with database.begin() as tx:
            claimed = claims.claim_suspect(
                tx,
                worker_id=self._worker_id,
                now=database.now(tx),
                expires_at=database.after(tx, self._claim_s),
                skip_locked=not database.is_sqlite,
                among=pauses.unpaused(tx, now=database.now(tx)),
            )
        self._suspects.begin()
        return [] if claimed is None else [claimed]

    def _load(self, operation: Operation, payer: Dimensions) -> ClaimedSample:
        """Bring a sample into memory; whatever is wrong with it is its own failure, unless trying again may help."""
        with self._storage.database.read() as tx:
            session = runs.get_sampling_session(tx, str(operation.sampling_session_id))
        if suspects.is_condemned(operation.blame):
            condemned = Failure(suspects.sentence(operation.blame), Category.SERVER)
            return ClaimedSample(operation, session, payer, condemned)
        try:
            body = operations.decode(self._storage.payloads.get(operation.payload))
            model = self._models.get(session.base_model, in_use=self._in_use())
            drawable = Drawable(body, model, self._adapters.get(session, model.base))
        except Exception as error:
            if getattr(error, "retryable", False):
                raise
            log.warning("sample_unloadable", request=operation.request_id, error=str(error))
            return ClaimedSample(operation, session, payer, Failure(str(error), Category.SERVER))
        return ClaimedSample(operation, session, payer, drawable)
