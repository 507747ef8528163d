"""What the service stands on is full or away: 503, which the SDK waits out; nothing is half there, and it recovers."""

from __future__ import annotations

import errno
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy

from api import errors
from jobs.operations import ForwardBackwardOutcome, ModelCreated, Outcome
from storage import journal
from storage.errors import ObjectStoreUnavailableError
from storage.open import Storage, open_storage
from storage.payloads import Stored
from storage.settings import StorageSettings
from tests.announcements import Announcements
from tests.api.conftest import Account
from tests.api.test_training_routes import PROTO, message

HELD_BACK_S = 0.2


@pytest.fixture
def storage(prepared_data_dir: Path, tmp_path: Path) -> Iterator[Storage]:
    """Storage in whose rows next to nothing has room, so that payloads are objects."""
    data_dir = shutil.copytree(prepared_data_dir, tmp_path / "data")
    opened = open_storage(StorageSettings(data_dir=data_dir, inline_bytes_max=10))
    yield opened
    opened.close()


@pytest.fixture(autouse=True)
def held_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "POLL_HELD_BACK_S", HELD_BACK_S)


def forward_backward(account: Account, run: str, seq: int) -> Any:
    return account.post("forward_backward", content=message(run, seq).SerializeToString(), headers=PROTO)


def step(account: Account, run: str, seq: int) -> Any:
    body = {"model_id": run, "seq_id": seq, "adam_params": {"learning_rate": 1e-3}, "type": "optim_step"}
    return account.post("optim_step", body)


def seqs(storage: Storage, run: str) -> list[int]:
    with storage.database.read() as tx:
        return [operation.seq for operation in journal.list_operations(tx, run, limit=10_000)]


def objects(storage: Storage) -> list[str]:
    return [info.key for info in storage.objects.list()]


class TestADatabaseThatIsAway:
    @pytest.fixture
    def away(self, storage: Storage, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
        """Take the database away, as a driver reports it."""

        def take() -> None:
            def fail(*_: object, **__: object) -> None:
                raise sqlalchemy.exc.OperationalError("SELECT 1", {}, Exception("server closed at 10.0.0.7"))

            monkeypatch.setattr(storage.database.engine, "connect", fail)
            monkeypatch.setattr(storage.database.engine, "begin", fail)

        return take

    @pytest.mark.parametrize(
        ("method", "path", "body"),
        [
            ("POST", "create_session", {"tags": [], "sdk_version": "0.38.0"}),
            ("POST", "optim_step", {"model_id": "r", "seq_id": 1}),
            ("POST", "asample", {"sampling_session_id": "s", "seq_id": 1}),
            ("POST", "session_heartbeat", {"session_id": "s"}),
            ("POST", "retrieve_future", {"request_id": "r"}),
            ("GET", "training_runs", None),
        ],
    )
    def test_is_503_to_try_again_and_nothing_of_it_is_told(
        self, method: str, path: str, body: Any, alice: Account, away: Callable[[], None]
    ) -> None:
        away()
        answer = alice.request(method, path, body)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert "10.0.0.7" not in answer.text

    def test_polls_that_the_sdk_repeats_at_once_are_held_back(self, alice: Account, away: Callable[[], None]) -> None:
        away()
        begun = time.monotonic()
        assert alice.retrieve("r:train:0:1").status_code == 503
        assert time.monotonic() - begun >= HELD_BACK_S / 2

    def test_loses_nothing_and_is_found_again(
        self, alice: Account, storage: Storage, away: Callable[[], None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run = alice.run()
        accepted = step(alice, run, 1).json()
        away()
        assert step(alice, run, 2).status_code == 503
        monkeypatch.undo()
        assert step(alice, run, 1).json() == accepted
        assert step(alice, run, 2).json()["request_id"] == f"{run}:2"
        assert seqs(storage, run) == [0, 1, 2]


class TestADatabaseThatIsFull:
    @pytest.fixture
    def fill(self, storage: Storage) -> Callable[[int | None], None]:
        """Let the file grow by so many pages and no more; None: as it likes."""
        pages = [2**30]

        @sqlalchemy.event.listens_for(storage.database.engine, "begin")
        def limit(connection: sqlalchemy.Connection) -> None:
            connection.exec_driver_sql(f"PRAGMA max_page_count = {pages[0]}")

        def to(room: int | None) -> None:
            with storage.database.read() as tx:
                pages[0] = 2**30 if room is None else tx.exec_driver_sql("PRAGMA page_count").scalar_one() + room

        return to

    def test_refuses_what_is_new_while_reads_go_on_and_goes_on_when_there_is_room(
        self, alice: Account, storage: Storage, fill: Callable[[int | None], None]
    ) -> None:
        # given: room for a few rows
        run = alice.run()
        fill(3)
        # when
        answers = [step(alice, run, seq).status_code for seq in range(1, 400)]
        # then: some were accepted, and from then on none
        num_accepted = answers.count(200)
        assert 0 < num_accepted < 399
        assert answers == [200] * num_accepted + [503] * (399 - num_accepted)
        assert seqs(storage, run) == list(range(num_accepted + 1))
        # and: what is there can be read, and polled for
        assert len(alice.get("training_runs").json()["training_runs"]) == 1
        assert alice.retrieve(f"{run}:1").status_code == 408
        assert alice.http.get("/api/v1/healthz").json()["database"] == "full"
        # and: once there is room the client's repetition is taken
        fill(None)
        assert step(alice, run, num_accepted + 1).status_code == 200


class TestAnObjectStore:
    def test_that_is_full_leaves_nothing_behind_and_takes_it_when_there_is_room(
        self, alice: Account, storage: Storage, announcements: Announcements, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # given
        run, before = alice.run(), objects(storage)
        announced = list(announcements.runs)

        def full(_: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("storage.atomic_file.os.fsync", full)
        # when
        answer = forward_backward(alice, run, 1)
        # then
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert (seqs(storage, run), objects(storage), announcements.runs) == ([0], before, announced)
        assert not list(storage.settings.data_dir.rglob(".unfinished-*"))
        assert alice.http.get("/api/v1/healthz").json()["object_store"] == "full"
        # and
        monkeypatch.undo()
        assert forward_backward(alice, run, 1).status_code == 200

    def test_that_cannot_be_read_keeps_a_result_waiting_and_loses_it_not(
        self,
        alice: Account,
        storage: Storage,
        complete: Callable[[str, Outcome], None],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        # given: a result that is an object
        run = alice.run()
        complete(f"{run}:0", ModelCreated(run))
        request_id = forward_backward(alice, run, 1).json()["request_id"]
        complete(request_id, ForwardBackwardOutcome((), {"loss:sum": 1.0}))
        kept = storage.objects.get

        def away(_: str) -> bytes:
            raise ObjectStoreUnavailableError("s3://10.0.0.7/bucket", "SlowDown")

        monkeypatch.setattr(storage.objects, "get", away)
        with storage.database.begin() as tx:
            outcome = journal.get_operation(tx, request_id).outcome
            _move_to_object(tx, storage, request_id, outcome)
        # when
        assert alice.retrieve(request_id).status_code == 503
        # then
        monkeypatch.setattr(storage.objects, "get", kept)
        assert alice.retrieve(request_id).json()["metrics"] == {"loss:sum": 1.0}


def _move_to_object(tx: sqlalchemy.Connection, storage: Storage, request_id: str, outcome: Stored) -> None:
    assert outcome.inline is not None
    storage.objects.put("results/moved", outcome.inline)
    row = sqlalchemy.table("operation", *(sqlalchemy.column(name) for name in ("request_id", "outcome", "outcome_key")))
    moved = sqlalchemy.update(row).where(row.c.request_id == request_id)
    tx.execute(moved.values(outcome=None, outcome_key="results/moved"))
