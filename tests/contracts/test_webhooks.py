"""Webhooks: signed, sent once per attempt, tried again ever later, given up in the end, and none harms another."""

import base64
import contextlib
import socket
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import structlog
from sqlalchemy import Connection

from billing import webhooks
from billing.settings import BillingSettings
from billing.webhooks import Attempt, Delivery, WebhookError
from jobs import webhook_sender
from jobs.webhook_sender import WebhookSender, is_public
from storage.clock import FrozenClock
from storage.database import Database
from storage.errors import RowNotFoundError
from tests.contracts.query_plans import query_plans
from tests.factories import NOW, make_account
from tests.receiver import Receiver, is_signed, receiving

BODY = '{"type":"budget.paused","data":{"spent":"1.5 €"}}'


@pytest.fixture
def clock() -> FrozenClock:
    return FrozenClock(NOW)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as ours:
        yield ours


@pytest.fixture
def account_id(database: Database) -> str:
    with database.begin() as tx:
        return make_account(tx).id


def sender(database: Database, clock: FrozenClock, *, timeout_s: float = 30.0, private: bool = True) -> WebhookSender:
    settings = BillingSettings(webhook_timeout_s=timeout_s, webhook_private_addresses=private)
    return WebhookSender(database, settings, now=clock.now, jitter=lambda: 0.5)


def add(database: Database, account_id: str, url: str) -> tuple[int, str]:
    with database.begin() as tx:
        webhook, secret = webhooks.add(tx, account_id, url, ["budget"], now=NOW)
    return webhook.id, secret


def announce(database: Database, account_id: str, event_id: str = "e", *, now: datetime = NOW) -> int:
    with database.begin() as tx:
        return webhooks.announce(
            tx,
            account_id=account_id,
            kind="budget",
            event_id=event_id,
            body=BODY,
            content_type="application/json",
            now=now,
        )


def deliveries(database: Database, webhook_id: int | None = None) -> list[Delivery]:
    with database.read() as tx:
        return list(webhooks.list_deliveries(tx, webhook_id=webhook_id, limit=1000))


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_an_event_is_delivered_once_signed_so_that_anyone_can_verify_it(
    database: Database, clock: FrozenClock, receiver: Receiver, account_id: str
) -> None:
    # Given
    _, secret = add(database, account_id, f"{receiver.url}/ok")
    assert [announce(database, account_id) for _ in range(2)] == [1, 0]
    # When
    with structlog.testing.capture_logs() as logs:
        assert [sender(database, clock).deliver_due(pass_s=60) for _ in range(2)] == [True, True]
    # Then
    (message,) = receiver.received
    assert message.body == BODY.encode()
    assert is_signed(message, secret)
    message.body += b" "
    assert not is_signed(message, secret)
    assert message.headers["webhook-timestamp"] == str(int(NOW.timestamp()))
    assert message.headers["content-type"] == "application/json"
    assert message.headers["host"] == receiver.url.removeprefix("http://")
    (delivery,) = deliveries(database)
    assert (delivery.state, delivery.attempts, delivery.delivered_at) == ("delivered", 1, NOW)
    assert secret.removeprefix("whsec_") not in str(logs)


def test_what_fails_is_tried_again_under_the_same_id_ever_later_until_it_is_given_up(
    database: Database, clock: FrozenClock, receiver: Receiver, account_id: str
) -> None:
    # Given
    _, secret = add(database, account_id, f"{receiver.url}/500")
    announce(database, account_id)
    # When
    waits = []
    with structlog.testing.capture_logs() as logs:
        for attempt in range(1, webhooks.ATTEMPTS_MAX + 1):
            sender(database, clock).deliver_due(pass_s=60)
            sender(database, clock).deliver_due(pass_s=60)  # not due yet
            (delivery,) = deliveries(database)
            assert (delivery.attempts, delivery.last_error) == (attempt, "HTTP 500")
            wait = delivery.next_at - clock.now()
            waits.append(wait.total_seconds())
            clock.advance(wait.total_seconds())
    clock.advance(10**6)
    sender(database, clock).deliver_due(pass_s=60)
    # Then
    assert waits[:7] == [5, 20, 80, 320, 1280, 5120, 20480]
    assert set(waits[7:-1]) == {webhooks.RETRY_MAX_S}
    assert deliveries(database)[0].state == "given up"
    assert len(receiver.received) == webhooks.ATTEMPTS_MAX
    assert len({message.headers["webhook-id"] for message in receiver.received}) == 1
    assert len({message.headers["webhook-timestamp"] for message in receiver.received}) == webhooks.ATTEMPTS_MAX
    assert all(is_signed(message, secret) for message in receiver.received)
    assert [one["event"] for one in logs][-1] == "webhook_given_up"
    assert secret.removeprefix("whsec_") not in str(logs)


def test_a_receiver_that_is_back_gets_what_it_missed(
    database: Database, clock: FrozenClock, receiver: Receiver, account_id: str
) -> None:
    # Given
    add(database, account_id, f"{receiver.url}/ok")
    receiver.statuses["/ok"] = [503, 429, 204]
    announce(database, account_id)
    # When
    for _ in range(4):
        sender(database, clock).deliver_due(pass_s=60)
        clock.advance(3600)
    # Then
    assert (deliveries(database)[0].state, deliveries(database)[0].last_error) == ("delivered", None)
    assert len(receiver.received) == 3


def test_slow_dead_and_redirecting_receivers_harm_no_other(
    database: Database, clock: FrozenClock, receiver: Receiver, account_id: str
) -> None:
    # Given: far more for each of them than is sent at once
    urls = {name: f"{receiver.url}/{name}" for name in ("slow", "redirect", "ok")}
    urls["dead"] = f"http://127.0.0.1:{closed_port()}/"
    ids = {name: add(database, account_id, url)[0] for name, url in urls.items()}
    num = 2 * webhook_sender.AT_ONCE_PER_WEBHOOK
    for number in range(num):
        announce(database, account_id, str(number))
    # When: one pass each
    for _ in range(2):
        sender(database, clock, timeout_s=1).deliver_due(pass_s=0)
    # Then
    states = {name: {one.state for one in deliveries(database, ids[name])} for name in ids}
    assert states == {"slow": {"waiting"}, "redirect": {"waiting"}, "ok": {"delivered"}, "dead": {"waiting"}}
    errors = {name: str(deliveries(database, ids[name])[0].last_error) for name in ids}
    assert "no answer within 1 s" in errors["slow"]
    assert "redirects are not followed" in errors["redirect"]
    assert "ConnectError" in errors["dead"]
    assert len(receiver.at("/ok")) == num


def test_a_name_that_is_looked_up_for_ever_costs_its_own_deliveries_a_timeout_and_others_nothing(
    database: Database, clock: FrozenClock, receiver: Receiver, account_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given: more names whose server does not answer than are looked up at once by default
    ended, ask = threading.Event(), socket.getaddrinfo

    def hanging(host: str | bytes, *arguments: Any, **named: Any) -> Any:
        if b"hangs" in (host if isinstance(host, bytes) else host.encode()):
            ended.wait()
        return ask(host, *arguments, **named)

    monkeypatch.setattr(socket, "getaddrinfo", hanging)
    dead = [add(database, account_id, f"http://hangs-{number}.test/")[0] for number in range(12)]
    ours, _ = add(database, account_id, f"{receiver.url}/ok")
    for number in range(webhook_sender.AT_ONCE_PER_WEBHOOK):
        announce(database, account_id, str(number))
    # When
    sending = threading.Thread(target=sender(database, clock, timeout_s=5).deliver_due, kwargs={"pass_s": 0.0})
    sending.start()
    sending.join(60)
    has_ended = not sending.is_alive()
    ended.set()
    sending.join()
    # Then: while none of them has been answered
    assert has_ended
    assert {one.state for one in deliveries(database, ours)} == {"delivered"}
    failed = [one for webhook_id in dead for one in deliveries(database, webhook_id)]
    assert {(one.state, one.last_error) for one in failed} == {("waiting", "no answer within 5 s")}


def test_the_host_that_is_looked_up_is_the_one_that_the_message_names(
    database: Database, clock: FrozenClock, receiver: Receiver, account_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given: a name that older rules take for fass.test
    looked_up, port = [], int(receiver.url.rpartition(":")[2])

    def local(name: str | bytes, *_: object, **__: object) -> Any:
        looked_up.append(name if isinstance(name, bytes) else name.encode("idna"))
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr(socket, "getaddrinfo", local)
    add(database, account_id, f"http://faß.test:{port}/ok")
    announce(database, account_id)
    # When
    sender(database, clock).deliver_due(pass_s=60)
    # Then
    (message,) = receiver.received
    assert looked_up == [b"xn--fa-hia.test"]
    assert message.headers["host"] == f"xn--fa-hia.test:{port}"


def test_a_message_goes_to_the_address_that_was_looked_at_whatever_the_name_means_next(
    database: Database, clock: FrozenClock, receiver: Receiver, account_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given: a name that is asked for once
    port = int(receiver.url.rpartition(":")[2])
    answers = [[(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]]

    def once(*_: object, **__: object) -> Any:
        if not answers:
            raise socket.gaierror(socket.EAI_NONAME, "another address")
        return answers.pop()

    monkeypatch.setattr(socket, "getaddrinfo", once)
    add(database, account_id, f"http://turns.test:{port}/ok")
    announce(database, account_id)
    # When
    sender(database, clock).deliver_due(pass_s=60)
    # Then
    assert [message.headers["host"] for message in receiver.received] == [f"turns.test:{port}"]


def test_what_is_being_sent_is_not_sent_by_another_process_as_well(
    database: Database, clock: FrozenClock, receiver: Receiver, account_id: str
) -> None:
    # Given: a receiver that has the message and has not answered
    add(database, account_id, f"{receiver.url}/slow")
    announce(database, account_id)
    sending = threading.Thread(target=sender(database, clock).deliver_due, kwargs={"pass_s": 0.0})
    sending.start()
    while not receiver.received:
        assert sending.is_alive()
    # When
    another = sender(database, clock, timeout_s=1)
    assert another.deliver_due(pass_s=0)
    # Then
    num_received = len(receiver.received)
    receiver.ended.set()
    sending.join()
    assert num_received == 1
    assert deliveries(database)[0].attempts == 1


def test_two_deliverers_never_send_the_same_attempt(
    database: Database, clock: FrozenClock, receiver: Receiver, account_id: str
) -> None:
    # Given
    add(database, account_id, f"{receiver.url}/ok")
    events = 20
    for number in range(events):
        announce(database, account_id, str(number))
    # When
    both = [
        threading.Thread(target=sender(database, clock).deliver_due, kwargs={"pass_s": 60.0}, daemon=True)
        for _ in range(2)
    ]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    # Then
    assert len(receiver.received) == events
    assert {one.attempts for one in deliveries(database)} == {1}


def test_no_transaction_is_open_while_sending(
    database: Database, clock: FrozenClock, receiver: Receiver, account_id: str
) -> None:
    # Given
    add(database, account_id, f"{receiver.url}/slow")
    announce(database, account_id)
    pool = database.engine.pool
    sending = threading.Thread(target=sender(database, clock).deliver_due, kwargs={"pass_s": 0.0})
    # When
    sending.start()
    while not receiver.received:
        assert sending.is_alive()
    # Then: the message is there, its answer is not
    assert pool.checkedout() == 0  # type: ignore[attr-defined]
    assert deliveries(database)[0].attempts == 1
    # When: another one claims it since this one is taken for dead
    clock.advance(webhooks.CLAIM_S)
    with database.begin() as tx:
        (again,) = webhooks.claim(tx, database, deliveries(database)[0].webhook_id, limit=9, now=clock.now())
    receiver.ended.set()
    sending.join()
    # Then: what came of the first attempt counts no more
    assert (again.number, deliveries(database)[0].attempts, deliveries(database)[0].last_error) == (2, 2, None)


def test_private_addresses_are_refused_unless_they_are_allowed(
    database: Database, clock: FrozenClock, receiver: Receiver, account_id: str
) -> None:
    # Given
    add(database, account_id, f"{receiver.url}/ok")
    announce(database, account_id)
    # When
    sender(database, clock, private=False).deliver_due(pass_s=60)
    # Then
    assert receiver.received == []
    assert "PIECEWORK_WEBHOOK_PRIVATE_ADDRESSES" in str(deliveries(database)[0].last_error)


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "10.1.2.3", "169.254.169.254", "192.168.0.1", "100.64.0.1", "0.0.0.0", "224.0.0.1"),
        *("::1", "::", "fe80::1%eth0", "fd00::1", "::ffff:127.0.0.1", "2002:7f00:1::", "64:ff9b::7f00:1"),
        *("fec0::1", "::127.0.0.1", "64:ff9b:1::7f00:1", "ff02::1"),
    ],
)
def test_addresses_of_this_machine_and_its_networks_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8"])
def test_addresses_of_the_internet_are_public(address: str) -> None:
    assert is_public(address)


def test_a_removed_webhook_is_told_nothing_more(
    database: Database, clock: FrozenClock, receiver: Receiver, account_id: str
) -> None:
    # Given
    webhook_id, _ = add(database, account_id, f"{receiver.url}/ok")
    announce(database, account_id, "before")
    # When
    with database.begin() as tx:
        webhooks.remove(tx, webhook_id, now=NOW)
    announced = announce(database, account_id, "after")
    sender(database, clock).deliver_due(pass_s=60)
    # Then
    assert (announced, receiver.received) == (0, [])
    assert [one.state for one in deliveries(database)] == ["given up"]
    with pytest.raises(RowNotFoundError), database.begin() as tx:
        webhooks.remove(tx, webhook_id, now=NOW)


def test_what_is_announced_while_a_webhook_is_removed_is_given_up_unsent(
    database: Database, clock: FrozenClock, receiver: Receiver, account_id: str
) -> None:
    # Given: by a transaction that had found the webhook before it was removed
    webhook_id, _ = add(database, account_id, f"{receiver.url}/ok")
    with database.begin() as tx:
        webhooks.remove(tx, webhook_id, now=NOW)
        assert webhooks.announce_to(tx, webhook_id, "e", BODY, "application/json", now=NOW)
    # When
    assert sender(database, clock).deliver_due(pass_s=60)
    # Then
    assert receiver.received == []
    assert [(one.state, one.attempts) for one in deliveries(database)] == [("given up", 0)]


def test_a_delivery_whose_every_attempt_ends_its_process_is_given_up_too(database: Database, account_id: str) -> None:
    # Given
    webhook_id, _ = add(database, account_id, "https://a.test/")
    announce(database, account_id)
    # When
    numbers = []
    for number in range(webhooks.ATTEMPTS_MAX + 2):
        now = NOW + number * timedelta(seconds=webhooks.CLAIM_S)
        with database.begin() as tx:
            numbers += [one.number for one in webhooks.claim(tx, database, webhook_id, limit=1, now=now)]
    # Then
    assert numbers == list(range(1, webhooks.ATTEMPTS_MAX + 1))
    assert [(one.state, one.attempts) for one in deliveries(database)] == [("given up", webhooks.ATTEMPTS_MAX)]


def test_a_message_that_is_sent_at_once_is_sent_alone(
    database: Database, clock: FrozenClock, receiver: Receiver, account_id: str
) -> None:
    # Given: others that wait, one of them due
    webhook_id, _ = add(database, account_id, f"{receiver.url}/ok")
    announce(database, account_id, "due")
    announce(database, account_id, "later", now=NOW + timedelta(hours=1))
    # When
    delivery_id, error = sender(database, clock).send_now(webhook_id, "now", '{"type":"test"}', "application/json")
    # Then
    (message,) = receiver.received
    assert (message.body, error) == (b'{"type":"test"}', None)
    states = {one.event_id: one.state for one in deliveries(database)}
    assert states == {"due": "waiting", "later": "waiting", "now": "delivered"}
    assert [one.event_id for one in deliveries(database) if one.id == delivery_id] == ["now"]


def test_a_message_that_is_sent_at_once_is_nobody_elses_from_the_first_moment(
    database: Database, clock: FrozenClock, receiver: Receiver, account_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given: another process sends whatever is due as soon as it can be seen
    webhook_id, _ = add(database, account_id, f"{receiver.url}/ok")
    begin, ours = database.begin, sender(database, clock)

    @contextlib.contextmanager
    def begin_and_be_seen() -> Iterator[Connection]:
        with begin() as tx:
            yield tx
        with monkeypatch.context() as alone:
            alone.setattr(database, "begin", begin)
            sender(database, clock).deliver_due(pass_s=60)

    monkeypatch.setattr(database, "begin", begin_and_be_seen)
    # When
    _, error = ours.send_now(webhook_id, "now", BODY, "application/json")
    # Then
    assert error is None
    assert len(receiver.received) == 1


def test_a_message_to_a_webhook_that_is_removed_meanwhile_is_refused(
    database: Database, clock: FrozenClock, receiver: Receiver, account_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given: it goes between the message's announcement and its claim
    webhook_id, _ = add(database, account_id, f"{receiver.url}/ok")
    announce_to = webhooks.announce_to

    def announce_and_remove(tx: Connection, *arguments: Any, **more: Any) -> bool:
        announced = announce_to(tx, *arguments, **more)
        webhooks.remove(tx, webhook_id, now=NOW)
        return announced

    monkeypatch.setattr(webhooks, "announce_to", announce_and_remove)
    # When, then
    with pytest.raises(RowNotFoundError):
        sender(database, clock).send_now(webhook_id, "now", BODY, "application/json")
    assert receiver.received == []


def test_a_webhook_of_all_accounts_is_told_of_each(database: Database, account_id: str) -> None:
    with database.begin() as tx:
        webhooks.add(tx, None, "https://all.test/", ["budget"], now=NOW)
        webhooks.add(tx, make_account(tx, "other").id, "https://other.test/", ["budget"], now=NOW)
    assert announce(database, account_id) == 1


def test_deliveries_that_are_done_are_forgotten_after_a_while_and_others_are_not(
    database: Database, clock: FrozenClock, receiver: Receiver, account_id: str
) -> None:
    # Given
    add(database, account_id, f"{receiver.url}/ok")
    receiver.statuses["/ok"] = [200, 500]
    for event_id in ("1", "2"):
        announce(database, account_id, event_id)
        sender(database, clock).deliver_due(pass_s=60)
    # When
    assert sender(database, clock).forget_old(pass_s=60)
    assert len(deliveries(database)) == 2
    clock.advance((webhooks.KEPT + timedelta(seconds=1)).total_seconds())
    assert sender(database, clock).forget_old(pass_s=60)
    # Then
    assert [one.event_id for one in deliveries(database)] == ["2"]


def test_however_many_are_old_they_are_forgotten_batch_by_batch(
    database: Database, clock: FrozenClock, account_id: str
) -> None:
    # Given seven that are given up
    webhook_id, _ = add(database, account_id, "https://a.test/")
    for number in range(7):
        announce(database, account_id, str(number))
    with database.begin() as tx:
        webhooks.remove(tx, webhook_id, now=NOW)
    clock.advance((webhooks.KEPT + timedelta(seconds=1)).total_seconds())
    # When: no time
    assert not sender(database, clock).forget_old(pass_s=0, batch=3)
    # Then: a batch
    assert len(deliveries(database)) == 4
    # When: time enough
    assert sender(database, clock).forget_old(pass_s=60, batch=3)
    # Then
    assert deliveries(database) == []


def test_old_deliveries_are_found_without_reading_others(database: Database) -> None:
    with database.begin() as tx:
        if not database.is_sqlite:
            tx.exec_driver_sql("SET LOCAL enable_seqscan = off")  # as it decides where there are many rows
        # When
        with query_plans(tx, "webhook_delivery") as plans:
            webhooks.forget_old(tx, now=NOW, limit=3)
    # Then
    (plan,) = plans
    assert "ix_webhook_delivery_created" in plan


@pytest.mark.parametrize(
    "url",
    [
        *("ftp://host/", "https://", "host/path", "https://user:word@host/", "http://host/a b", "http://host:x/"),
        *("https://a..test/", f"https://{'a' * 64}.test/"),
    ],
)
def test_what_cannot_be_told_anything_is_refused(database: Database, account_id: str, url: str) -> None:
    with pytest.raises(WebhookError, match="the URL"), database.begin() as tx:
        webhooks.add(tx, account_id, url, ["budget"], now=NOW)


def test_a_claimed_attempt_does_not_show_its_secret(database: Database, account_id: str) -> None:
    webhook_id, secret = add(database, account_id, "https://a.test/")
    announce(database, account_id)
    with database.begin() as tx:
        (attempt,) = webhooks.claim(tx, database, webhook_id, limit=1, now=NOW)
        listed = webhooks.list_webhooks(tx)
    assert secret == attempt.secret
    assert secret not in f"{attempt!r} {listed!r}"


def test_jitter_spreads_retries_around_their_time() -> None:
    assert [webhooks.retry_after_s(2, jitter) for jitter in (0.0, 0.5, 1.0)] == [10, 20, 30]


def test_the_receiver_of_the_documentation_takes_what_is_ours_and_nothing_else() -> None:
    # Given
    page = (Path(__file__).parents[2] / "docs" / "billing.md").read_text()
    example: dict[str, Any] = {}
    exec(page.partition("```python\n")[2].partition("```")[0], example)
    secret = f"whsec_{base64.b64encode(b'key').decode()}"
    now, later = datetime.now(UTC), datetime.now(UTC) - timedelta(hours=1)
    fresh, old = (Attempt(1, 1, at, "https://a.test/", secret, BODY, "application/json") for at in (now, later))
    headers, body = webhooks.signed_headers(fresh), BODY.encode()
    # Then
    assert example["is_genuine"](headers, body, secret)
    assert not example["is_genuine"](headers, body + b" ", secret)
    assert not example["is_genuine"]({**headers, "webhook-id": "msg_2"}, body, secret)
    assert not example["is_genuine"](headers, body, "whsec_b3RoZXI=")
    assert not example["is_genuine"](webhooks.signed_headers(old), body, secret)
