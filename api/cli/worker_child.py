"""A worker under supervision: how it is started, what its death sets off, and the fork server that makes it."""

from __future__ import annotations

import secrets
import socket
import threading
from collections.abc import Callable, Mapping

from api.cli.child import COSTLY_BACKOFF_S, ChildSpec, Death
from api.cli.process import adopt_orphans, python
from api.cli.supervisor import FORKSERVER
from storage.settings import StorageSettings
from storage.supervision import SUPERVISED

FREEING_S = 5.0
UNFIT = 3
"""Exit status of a fork server whose children could not work; says `worker/forkserver.py`."""


class DeadWorkers:
    """Hands on what dead workers held, each in a thread of its own: nothing may keep the supervisor waiting."""

    def __init__(self, settings: StorageSettings, say: Callable[[str], None]) -> None:
        self._settings = settings
        self._say = say
        self._threads: list[threading.Thread] = []
        self._oom_kills: int | None = None

    def get_ready(self) -> None:
        """Load and try out, once, what a death will need: the first use of these libraries takes a second.

        Whenever a worker begins, what the kernel has killed before is no longer held against it.
        """
        self._begin(self._count if self._threads else self._rehearse)

    def free(self, death: Death) -> None:
        """Begin to hand a dead worker's work on."""
        self._begin(lambda: self._free(death))

    def finish(self) -> None:
        """Before the supervisor ends: wait a little for what is under way."""
        for thread in self._threads:
            thread.join(FREEING_S)

    def _begin(self, work: Callable[[], None]) -> None:
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        self._threads = [thread, *(one for one in self._threads if one.is_alive())]

    def _count(self) -> None:
        from storage.deaths import count_oom_kills

        self._oom_kills = count_oom_kills()

    def _rehearse(self) -> None:
        from api.cli.dead_worker import rehearse
        from storage.deaths import count_oom_kills

        self._oom_kills = count_oom_kills()
        rehearse(self._settings)

    def _free(self, death: Death) -> None:
        from api.cli.dead_worker import free_worker
        from storage.deaths import Cause, cause_of_exit, count_oom_kills

        now = count_oom_kills()
        before, self._oom_kills = self._oom_kills, now
        cause = cause_of_exit(death.code, oom_kills_before=now if before is None else before, oom_kills_now=now)
        worker_id = death.environment["PIECEWORK_WORKER_ID"]
        free_worker(self._settings, worker_id, self._say, Cause.STOPPED if death.stopped else cause)


def worker_child(
    name: str,
    variables: Mapping[str, str],
    dead_workers: DeadWorkers,
    *,
    worker_name: str = "",
    must_start: bool = False,
) -> ChildSpec:
    """How a worker is run.

    Args:
        name: of the place; unique among the supervisor's children.
        variables: environment of every start.
        dead_workers: told of deaths.
        worker_name: id of the first process, and what the ids of the next ones begin with; empty: the host and
            `name`. Each has an id of its own, so that freeing what the last one held never touches the next.
        must_start: whether a first start that fails ends the supervisor.
    """
    prefix = worker_name or f"{socket.gethostname()}-{name.rpartition('-')[2]}"

    ids = iter([worker_name] if worker_name else [])

    def environment() -> Mapping[str, str]:
        return {**variables, "PIECEWORK_WORKER_ID": next(ids, "") or f"{prefix}-{secrets.token_hex(4)}"}

    return ChildSpec(
        "worker",
        name,
        (*python("worker"), SUPERVISED),
        environment,
        on_begun=dead_workers.get_ready,
        on_death=dead_workers.free,
        speaks=True,
        forked=True,
        awaits_fork=True,
        must_start=must_start,
    )


def forkserver_children(variables: Mapping[str, str], *modules: str, wanted: bool) -> list[ChildSpec]:
    """What stands before workers among the supervisor's children: the process that makes them, where there can be one.

    Args:
        variables: environment that what it makes has in common.
        modules: of other parts that it is to make, beside workers.
        wanted: whether there is to be one.
    """
    if not wanted or not adopt_orphans():
        return []
    argv = (*python("worker"), "--forkserver", *modules)
    return [
        ChildSpec(FORKSERVER, FORKSERVER, argv, lambda: variables, speaks=True, backoff_s=COSTLY_BACKOFF_S, unfit=UNFIT)
    ]
