"""A worker under supervision: how it is started, what its death sets off, and its spare."""

from __future__ import annotations

import secrets
import socket
import threading
from collections.abc import Callable, Mapping

from api.cli.child import ChildSpec, Death
from api.cli.parts import python
from storage.settings import StorageSettings

FREEING_S = 5.0


class DeadWorkers:
    """Hands on what dead workers held, each in a thread of its own: nothing may keep the supervisor waiting."""

    def __init__(self, settings: StorageSettings, say: Callable[[str], None]) -> None:
        self._settings = settings
        self._say = say
        self._threads: list[threading.Thread] = []
        self._rehearsed = False

    def get_ready(self) -> None:
        """Load and try out, once, what a death will need: the first use of these libraries takes a second."""
        from api.cli.dead_worker import rehearse

        if not self._rehearsed:
            self._rehearsed = True
            threading.Thread(target=rehearse, args=(self._settings,), daemon=True).start()

    def free(self, worker_id: str) -> None:
        """Begin to hand a dead worker's work on."""
        from api.cli.dead_worker import free_worker

        thread = threading.Thread(target=free_worker, args=(self._settings, worker_id, self._say), daemon=True)
        thread.start()
        self._threads.append(thread)

    def finish(self) -> None:
        """Before the supervisor ends: wait a little for what is under way."""
        for thread in self._threads:
            thread.join(FREEING_S)


def worker_child(
    name: str,
    variables: Mapping[str, str],
    dead_workers: DeadWorkers,
    *,
    worker_name: str = "",
    spare: bool,
    must_start: bool = False,
) -> ChildSpec:
    """How a worker is run.

    Args:
        name: of the place; unique among the supervisor's children.
        variables: environment of every start.
        dead_workers: told of deaths.
        worker_name: what worker ids begin with; empty: the host and `name`. Each process gets an id of its own, so
            that freeing what the last one held never touches the next.
        spare: whether a second process waits, loaded, for the death of the first.
        must_start: whether a first start that fails ends the supervisor.
    """
    prefix = worker_name or f"{socket.gethostname()}-{name.rpartition('-')[2]}"

    def environment() -> Mapping[str, str]:
        return {**variables, "PIECEWORK_WORKER_ID": f"{prefix}-{secrets.token_hex(4)}"}

    def on_death(death: Death) -> None:
        dead_workers.free(death.environment["PIECEWORK_WORKER_ID"])

    return ChildSpec(
        "worker",
        name,
        (*python("worker"), "--when-told"),
        environment,
        on_begun=dead_workers.get_ready,
        on_death=on_death,
        waits=True,
        spare=spare,
        must_start=must_start,
    )
