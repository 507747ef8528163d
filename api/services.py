"""What the routes work with, joined once per process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from api.downloads import UrlSigner
from api.health import Health, broker_trouble
from api.settings import ApiSettings
from billing import rate_cards
from jobs.announcer import Announcer
from jobs.app import make_app
from jobs.backlog import Backlog
from jobs.dispatch import Dispatcher
from jobs.results import OutcomeSubscription, OutcomeWaiters
from jobs.settings import JobsSettings
from jobs.submit import Submitter
from storage import journal
from storage.database import Database
from storage.migrate import migrate
from storage.open import Storage, open_storage
from storage.retry import retrying

START_S = 60.0


@dataclass(frozen=True)
class Services:
    """Settings, storage, and the way to the workers and back.

    Attributes:
        submitter: accepts operations.
        announcer: tells workers of them; None in tests that play the worker.
        waiters: polls that wait for outcomes.
        subscription: hears of outcomes; None leaves the waiters to their safety read.
        signer: makes and checks download links.
        health: what is wrong at the moment.
    """

    settings: ApiSettings
    jobs_settings: JobsSettings
    storage: Storage
    submitter: Submitter
    waiters: OutcomeWaiters
    subscription: OutcomeSubscription | None
    signer: UrlSigner
    health: Health
    announcer: Announcer | None = None

    @property
    def database(self) -> Database:
        """The rows."""
        return self.storage.database

    def close(self) -> None:
        """Close all connections."""
        if self.subscription is not None:
            self.subscription.stop()
        if self.announcer is not None:
            self.announcer.close()
        self.storage.close()


def open_services() -> Services:
    """Join everything as set in the environment, and bring the tables up to date; a database may take a while to start.

    Raises:
        DatabaseUnavailableError: it has not come within `START_S`.
    """
    settings, jobs_settings, storage = ApiSettings(), JobsSettings(), open_storage()
    retrying(lambda: migrate(storage.database), give_up_after_s=START_S)
    with storage.database.begin() as tx:
        rate_cards.install_from_settings(tx, now=storage.database.now(tx))
    dispatcher = Dispatcher(
        make_app(jobs_settings), storage.database, message_expires_s=jobs_settings.message_expires_s
    )
    announcer = Announcer(dispatcher)
    waiters = make_waiters(storage.database, safety_read_s=jobs_settings.safety_read_s)
    subscription = OutcomeSubscription(jobs_settings.resolved_broker_url(), waiters.wake_from_thread)
    return Services(
        settings=settings,
        jobs_settings=jobs_settings,
        storage=storage,
        submitter=Submitter(storage, announcer, Backlog.of(storage.database, jobs_settings)),
        waiters=waiters,
        subscription=subscription,
        signer=UrlSigner.open(storage.settings.data_dir, key=settings.url_signing_key),
        health=Health(storage, broker_trouble(announcer, subscription)),
        announcer=announcer,
    )


def make_waiters(database: Database, *, safety_read_s: float) -> OutcomeWaiters:
    """Waiters whose safety read asks the journal."""

    def find_finished(request_ids: Sequence[str]) -> Sequence[str]:
        with database.read() as tx:
            return journal.finished_among(tx, request_ids)

    return OutcomeWaiters(find_finished, safety_read_s=safety_read_s)
