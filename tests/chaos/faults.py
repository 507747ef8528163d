"""Makes one fault happen, and mends what does not mend by itself: stopped goes on, cut is joined, a server starts."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from storage.failpoints import Point
from tests.chaos.schedule import AT_POINT, Act, Fault
from tests.chaos.service import Service

REACH_S = 12.0
"""A point that no process reaches in this time is left for a later turn."""
LOOK_S = 0.02
SERVERS = ("database", "store", "broker")


@dataclass(frozen=True)
class Struck:
    """A fault that happened.

    Attributes:
        role: to which role of process; empty if nothing was there, or nobody came by the point.
        result_after_s: when the next result came to any client, from the moment the fault was over.
    """

    fault: Fault
    role: str = ""
    result_after_s: float = 0.0

    @property
    def happened(self) -> bool:
        """Whether anything was disturbed."""
        return bool(self.role)


def strike(service: Service, fault: Fault) -> Struck:
    """Make it happen; returns once the disturbed may go on."""
    if fault.act in AT_POINT:
        return _strike_at_point(service, fault)
    if fault.act in (Act.CUT, Act.HOLD):
        return _strike_link(service, fault)
    if service.servers is not None and fault.target in SERVERS:
        return _strike_server(service, fault)
    if fault.act is Act.EMPTY:
        service.empty_broker()
        return Struck(fault, fault.target)
    return _strike_process(service, fault)


def _strike_process(service: Service, fault: Fault) -> Struck:
    processes = service.processes(fault.target)
    if not processes:
        return Struck(fault)
    _signal(processes[fault.which % len(processes)], fault)
    return Struck(fault, fault.target)


def _signal(process: psutil.Process, fault: Fault) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        if fault.act is Act.KILL:
            process.kill()
        else:
            process.send_signal(signal.SIGSTOP)
            time.sleep(fault.lasts_s)
            process.send_signal(signal.SIGCONT)


def _strike_link(service: Service, fault: Fault) -> Struck:
    link = service.links[fault.target]
    if fault.act is Act.CUT:
        link.cut()
    else:
        link.hold()
    time.sleep(fault.lasts_s)
    link.mend()
    return Struck(fault, f"link to {fault.target}" if fault.target in SERVERS else "link of clients")


def _strike_server(service: Service, fault: Fault) -> Struck:
    assert service.servers is not None
    server = service.servers.process(fault.target)
    if fault.act is Act.STOP:
        server.send(signal.SIGSTOP)
        time.sleep(fault.lasts_s)
        server.send(signal.SIGCONT)
    else:
        server.kill()
        service.servers.restart(fault.target, empty=fault.act is Act.EMPTY)
    return Struck(fault, fault.target)


def _strike_at_point(service: Service, fault: Fault) -> Struck:
    """Arm it, wait until a process has come by, and let it go on when it was stopped."""
    action = {Act.POINT_KILL: "kill", Act.POINT_STOP: "stop", Act.POINT_PAUSE: f"pause {fault.lasts_s}"}[fault.act]
    roles = service.roles()
    with contextlib.ExitStack() as clean:
        service.arm(Point(fault.target), action)
        clean.callback(_forget, service.points, fault.target)
        pid = _await_fired(service.points, fault.target)
        if pid is None:
            return Struck(fault)
        role = roles.get(pid) or service.roles().get(pid) or "a process that is gone"
        if fault.act is Act.POINT_STOP:
            time.sleep(fault.lasts_s)
            with contextlib.suppress(psutil.NoSuchProcess):
                psutil.Process(pid).send_signal(signal.SIGCONT)
        elif fault.act is Act.POINT_PAUSE:
            time.sleep(fault.lasts_s)
        return Struck(fault, role)


def _await_fired(points: Path, point: str) -> int | None:
    """The process that took the order away; None if nobody came, and the order is withdrawn."""
    deadline = time.monotonic() + REACH_S
    while not (fired := _fired(points, point)):
        if time.monotonic() > deadline:
            try:
                (points / point).unlink()
            except FileNotFoundError:  # somebody came in the last moment
                continue
            return None
        time.sleep(LOOK_S)
    return int(fired[0].name.rpartition("-")[2])


def _forget(points: Path, point: str) -> None:
    for path in _fired(points, point):
        path.unlink()


def _fired(points: Path, point: str) -> Sequence[Path]:
    return list(points.glob(f"{point}.fired-*"))
