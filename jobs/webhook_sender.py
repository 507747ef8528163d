"""Posts what webhooks are to be told of: several at once, each within a time limit, none by way of a redirect.

Attempts are claimed and committed before anything is sent, and no transaction is open meanwhile. A receiver that is
slow or dead costs its own deliveries time and no others': each webhook has its share of a pass, and passes overlap.
"""

from __future__ import annotations

import asyncio
import ipaddress
import random
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from datetime import datetime

import httpx
import structlog

from billing import webhooks
from billing.settings import BillingSettings
from billing.webhooks import Attempt
from storage.database import Database
from storage.errors import RowNotFoundError

log = structlog.get_logger()

AT_ONCE_PER_WEBHOOK = 4
WEBHOOKS_AT_ONCE = 16
FORGET_AT_ONCE = 1_000


class RefusedAddressError(Exception):
    """The receiver's address is none that may be posted to; the message says what to change."""


class WebhookSender:
    """Sends claimed attempts and writes down what came of them."""

    def __init__(
        self,
        database: Database,
        settings: BillingSettings | None = None,
        *,
        now: Callable[[], datetime] | None = None,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        """Join them.

        Args:
            now: instead of the database's clock.
            jitter: gives numbers from 0 to 1.
        """
        settings = settings or BillingSettings()
        self._database = database
        self._timeout_s = settings.webhook_timeout_s
        self._allow_private = settings.webhook_private_addresses
        self._now = now
        self._jitter = jitter

    def deliver_due(self, *, pass_s: float) -> bool:
        """Send what is due, until nothing is or the time is over.

        Returns:
            Whether nothing is left that is due.
        """
        deadline = time.monotonic() + pass_s
        while attempts := self._claim_due():
            asyncio.run(self._send_all(attempts))
            if time.monotonic() >= deadline:
                return False
        return True

    def send_now(self, webhook_id: int, event_id: str, body: str, content_type: str) -> tuple[int, str | None]:
        """Tell a webhook of a new event at once, and from here: it is claimed in the transaction that announces it.

        Returns:
            The delivery's number, and why the attempt failed; None if it did not.

        Raises:
            RowNotFoundError: there is no such webhook.
        """
        with self._database.begin() as tx:
            webhooks.get(tx, webhook_id)
            now = self._time(self._database.now(tx))
            webhooks.announce_to(tx, webhook_id, event_id, body, content_type, now=now)
            attempts = webhooks.claim(tx, self._database, webhook_id, limit=1, now=now, event_id=event_id)
        if not attempts:
            raise RowNotFoundError("webhook", webhook_id)  # removed meanwhile
        return attempts[0].id, asyncio.run(self._send_all(attempts))[0]

    def forget_old(self, *, pass_s: float, batch: int = FORGET_AT_ONCE) -> bool:
        """Delete deliveries that have been done for long, a batch per transaction.

        Returns:
            Whether none is left; if not, the time is over.
        """
        deadline = time.monotonic() + pass_s
        while True:
            with self._database.begin() as tx:
                forgotten = webhooks.forget_old(tx, now=self._time(self._database.now(tx)), limit=batch)
            if forgotten < batch:
                return True
            if time.monotonic() >= deadline:
                return False

    def _claim_due(self) -> Sequence[Attempt]:
        with self._database.read() as tx:
            due = list(webhooks.due_webhooks(tx, now=self._time(self._database.now(tx))))
        random.shuffle(due)  # none waits for others' turns for long, however many of them are dead
        claimed: list[Attempt] = []
        for webhook_id in due[:WEBHOOKS_AT_ONCE]:
            with self._database.begin() as tx:
                now = self._time(self._database.now(tx))
                claimed += webhooks.claim(tx, self._database, webhook_id, limit=AT_ONCE_PER_WEBHOOK, now=now)
        return claimed

    async def _send_all(self, attempts: Sequence[Attempt]) -> Sequence[str | None]:
        context = await asyncio.to_thread(ssl.create_default_context)
        async with httpx.AsyncClient(verify=context, trust_env=False, follow_redirects=False, timeout=None) as client:  # noqa: S113
            ended = await asyncio.gather(*(self._attempt(client, one) for one in attempts), return_exceptions=True)
        for one in ended:
            if isinstance(one, BaseException):
                raise one
        return [one for one in ended if not isinstance(one, BaseException)]

    async def _attempt(self, client: httpx.AsyncClient, attempt: Attempt) -> str | None:
        try:
            async with asyncio.timeout(self._timeout_s):
                error = await self._post(client, attempt)
        except TimeoutError:
            error = f"no answer within {self._timeout_s:g} s"
        except (httpx.HTTPError, httpx.InvalidURL, OSError, RefusedAddressError) as failure:
            error = f"{type(failure).__name__}: {failure}"
        await asyncio.to_thread(self._note, attempt, error)
        return error

    async def _post(self, client: httpx.AsyncClient, attempt: Attempt) -> str | None:
        url = httpx.URL(attempt.url)
        address = await self._address(url)
        headers = {**webhooks.signed_headers(attempt), "host": url.netloc.decode()}
        request = client.build_request(
            "POST",
            url.copy_with(host=address),  # the one that was looked at: a name may mean another the next time
            content=attempt.body.encode(),
            headers={**headers, "user-agent": "piecework"},
            extensions={"sni_hostname": url.raw_host.decode()},
        )
        answer = await client.send(request, stream=True)
        await answer.aclose()  # nobody reads what it says
        if answer.is_redirect:
            return f"HTTP {answer.status_code}: redirects are not followed, add the final URL instead"
        return None if answer.is_success else f"HTTP {answer.status_code}"

    async def _address(self, url: httpx.URL) -> str:
        port = url.port or (443 if url.scheme == "https" else 80)
        addresses = await look_up(url.raw_host, port)
        if not self._allow_private and not all(map(is_public, addresses)):
            raise RefusedAddressError(
                "its address is not public: to allow that, set PIECEWORK_WEBHOOK_PRIVATE_ADDRESSES=true"
            )
        return addresses[0]

    def _note(self, attempt: Attempt, error: str | None) -> None:
        with self._database.begin() as tx:
            now = self._time(self._database.now(tx))
            counted = webhooks.note(tx, attempt, error, now=now, jitter=self._jitter())
        if counted and error is not None:
            log.warning("webhook_failed", delivery=attempt.id, attempt=attempt.number, error=error)
            if attempt.number >= webhooks.ATTEMPTS_MAX:
                log.error("webhook_given_up", delivery=attempt.id)

    def _time(self, now: datetime) -> datetime:
        return now if self._now is None else self._now()


async def look_up(host: bytes, port: int) -> Sequence[str]:
    """The addresses of a host, as the system knows them.

    Each look-up has a thread of its own, which nobody waits for: a name server that does not answer holds up neither
    other look-ups nor whoever has given up waiting.

    Args:
        host: encoded as in the URL. As text it would be encoded again, by other rules: some names would mean others.
    """
    answer: Future[Sequence[str]] = Future()
    answer.set_running_or_notify_cancel()  # now it cannot be cancelled, so the thread may always answer

    def ask() -> None:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except Exception as error:
            answer.set_exception(error)
        else:
            answer.set_result([str(each[4][0]) for each in found])

    try:
        threading.Thread(target=ask, name="look-up", daemon=True).start()
    except RuntimeError as error:  # no more threads: there are some later
        raise OSError(str(error)) from error
    return await asyncio.wrap_future(answer)


def is_public(address: str) -> bool:
    """Whether an IP address is anybody's on the internet: not of this machine, nor of a network around it."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if inner is not None or ip in ipaddress.ip_network("64:ff9b::/96"):
            return inner is not None and is_public(str(inner))
        if ip not in ipaddress.ip_network("2000::/3"):  # nothing else is given out: RFC 4291, section 2.4
            return False
    return ip.is_global and not ip.is_multicast
