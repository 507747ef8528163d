"""A run comes back whole from what is stored, or says why it cannot; what is damaged is found, and counted."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import select, update
from structlog.testing import capture_logs

from jobs import operations
from jobs.operations import (
    Failure,
    ForwardBackwardOutcome,
    Loaded,
    LoadState,
    OptimStep,
    OptimStepOutcome,
    SaveForSampler,
    SaveState,
)
from storage import billing_tables, deaths, journal, leases, replays, runs, snapshots, tables, workers
from storage.deaths import Cause
from storage.errors import DamagedObjectError
from storage.runs import Run
from storage.snapshots import Snapshot
from storage.sweeper import sweep
from storage.workers import Worker
from tests.worker.harness import WAIT_S, Engine, Service
from tests.worker.test_loop import get_run, learn
from worker import replay as replay_module
from worker import takeover
from worker.active_run import ActiveRun
from worker.engine.trainer import Trainer, TrainRequest
from worker.replay import Replay
from worker.residency import SamplingAdapters
from worker.train_turn import TrainTurn

STEP = OptimStep(learning_rate=1e-2)
BODIES = [body for step in range(4) for body in (learn(step), learn(step + 10, length=40), STEP)]


def train(service: Service, engine: Engine, run: Run, first: int, last: int) -> list[str]:
    """Submit and execute some of `BODIES`."""
    requests = [service.submit(run, seq, BODIES[seq - 1]) for seq in range(first, last + 1)]
    engine.take(run)
    service.encoded(requests)
    return requests


def written_back(service: Service, run: Run, seq: int) -> None:
    """Wait until a snapshot of this `seq` is stored."""
    deadline = time.monotonic() + WAIT_S
    while _snapshots(service, run)[:1] == [] or _snapshots(service, run)[0].seq != seq:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def _snapshots(service: Service, run: Run) -> list[Snapshot]:
    with service.storage.database.read() as tx:
        return list(snapshots.newest_first(tx, run.id))


def damage(service: Service, key: str) -> None:
    """Change one byte in the middle, which no parser notices."""
    data = bytearray(service.storage.objects.get(key))
    data[len(data) // 2] ^= 1
    service.storage.objects.put(key, bytes(data))


def forget_what_may_be(service: Service) -> None:
    """Sweep with results that are kept no longer than a replay needs them."""
    with service.storage.database.begin() as tx:  # so that `finished_at` lies before now on every clock
        long_ago = service.storage.database.now(tx) - timedelta(seconds=60)
        table = tables.operation
        tx.execute(update(table).where(table.c.finished_at.is_not(None)).values(finished_at=long_ago))
    database, objects = service.storage.database, service.storage.objects
    sweep(database, objects, result_retention_s=1.0, sampling_session_idle_s=0.0, pass_s=WAIT_S)


def die(service: Service, name: str) -> None:
    """To the database a worker is dead; it has handed nothing over."""
    with service.storage.database.begin() as tx:
        leases.release_worker(tx, name)


def die_replaying(service: Service, run: Run) -> None:
    """Play a worker that replays a run and crashes."""
    database = service.storage.database
    with database.begin() as tx:
        now = database.now(tx)
        lease = leases.acquire(tx, run.id, worker_id="dead", now=now, expires_at=now + timedelta(seconds=10))
        replays.begin(tx, lease)
        deaths.note_death(tx, "dead", Cause.FAULT, now=now)


def register(service: Service, name: str) -> None:
    with service.storage.database.begin() as tx:
        now = service.storage.database.now(tx)
        workers.register(tx, worker_id=name, host="h", pid=1, device="cpu", now=now)


def row_of(service: Service, engine: Engine) -> Worker:
    """What a worker has noted of its work by the time it has left."""
    engine.leave()
    with service.storage.database.read() as tx:
        worker = workers.find_worker(tx, engine.name)
    assert worker is not None
    return worker


@pytest.fixture
def expected(service: Service) -> list[bytes]:
    """Outcomes of an undisturbed run."""
    engine = Engine(service, "undisturbed").start()
    run = service.create_run(seed=7)
    outcomes = service.encoded(train(service, engine, run, 1, len(BODIES)))
    engine.leave()
    return outcomes


@pytest.fixture
def successor(service: Service) -> Iterator[Engine]:
    """A worker that takes over."""
    register(service, "worker-b")
    engine = Engine(service, "worker-b", writeback_s=3600.0).start()
    yield engine
    engine.leave()


def interrupted(service: Service, *, snapshots_at: tuple[int, ...], last: int) -> Run:
    """A run whose worker died after `last`, with snapshots at these operations."""
    engine = Engine(service, "worker-a", writeback_s=3600.0).start()
    run = service.create_run(seed=7)
    seq = 0
    for place in (*snapshots_at, last):
        train(service, engine, run, seq + 1, place)
        seq = place
        if place in snapshots_at:
            for active in engine.loop.roster.active():
                active.write_after = 0.0
            engine.take(run)
            written_back(service, run, place)
    die(service, "worker-a")
    for active in engine.loop.roster.active():
        active.void = True
    engine.leave()
    return run


def test_the_tail_is_computed_again_bit_for_bit_and_counted(
    service: Service, successor: Engine, expected: list[bytes]
) -> None:
    # given a run that died seven operations after its snapshot
    run = interrupted(service, snapshots_at=(2,), last=9)

    # when another worker goes on
    after = train(service, successor, run, 10, len(BODIES))

    # then nothing differs from the undisturbed run, what was replayed is counted, and none of it was billed
    assert service.encoded(after) == expected[9:]
    worker = row_of(service, successor)
    assert (worker.num_replayed, worker.num_replay_mismatches, worker.num_damaged_snapshots) == (7, 0, 0)
    with service.storage.database.read() as tx:
        usage = billing_tables.usage_record
        billed = tx.execute(select(usage.c.device_ns).where(usage.c.worker_id == "worker-b")).scalars().all()
    assert len(billed) == len(after)
    assert abs(sum(billed) + worker.overhead_ns - worker.busy_ns) <= worker.busy_ns // 1000 + 100_000
    assert worker.overhead_ns > 0


@pytest.mark.parametrize("harm", ["damaged", "missing"])
def test_what_a_replay_from_the_second_newest_snapshot_needs_is_not_swept(
    service: Service, successor: Engine, expected: list[bytes], harm: str
) -> None:
    # given two snapshots, and everything forgotten that may be, though results are kept for a second only
    run = interrupted(service, snapshots_at=(2, 8), last=9)
    forget_what_may_be(service)
    with service.storage.database.read() as tx:
        kept = [operation.seq for operation in journal.list_operations(tx, run.id, limit=99) if not operation.expired]
    assert kept == list(range(3, 10))

    # when the newer snapshot turns out to be unusable
    newest, older = _snapshots(service, run)
    if harm == "damaged":
        damage(service, newest.object_key)
    else:
        service.storage.objects.delete([newest.object_key])
    with capture_logs() as logs:
        successor.take(run)
        written_back(service, run, 9)
        after = train(service, successor, run, 10, len(BODIES))

    # then the one before it is used, which is reported and counted
    assert service.encoded(after) == expected[9:]
    (report,) = [line for line in logs if line["event"] == "snapshot_damaged"]
    assert (report["log_level"], report["run"], report["seq"]) == ("error", run.id, 8)

    # and it does not count as a snapshot to fall back on any more
    assert [snapshot.seq for snapshot in _snapshots(service, run)] == [9, older.seq]
    assert row_of(service, successor).num_damaged_snapshots == 1


def test_without_a_good_snapshot_everything_is_computed_again(
    service: Service, successor: Engine, expected: list[bytes]
) -> None:
    # given two snapshots that are damaged, and a journal that has forgotten nothing
    run = interrupted(service, snapshots_at=(2, 8), last=9)
    for snapshot in _snapshots(service, run):
        damage(service, snapshot.object_key)

    # then the run goes on all the same
    assert service.encoded(train(service, successor, run, 10, len(BODIES))) == expected[9:]
    worker = row_of(service, successor)
    assert (worker.num_replayed, worker.num_damaged_snapshots) == (9, 2)


def test_a_run_that_cannot_be_rebuilt_fails_with_a_reason_and_the_others_go_on(
    service: Service, successor: Engine
) -> None:
    # given a run whose snapshots are both damaged, and whose first operations are forgotten
    run = interrupted(service, snapshots_at=(2, 8), last=9)
    forget_what_may_be(service)
    for snapshot in _snapshots(service, run):
        damage(service, snapshot.object_key)
    other = service.create_run(seed=8)
    last = service.submit(run, 10, learn())

    # when a worker tries, until it gives up
    with pytest.raises(takeover.NoStateError, match="what was submitted is no longer kept"):
        successor.take(run)
    fresh, lease = takeover.acquire(service.storage, run.id, worker_id="worker-b", lease_s=60)
    successor.loop.roster.expect(fresh, lease)
    successor.loop.roster.arrive(takeover.without_state(fresh, lease, reason="the state cannot be rebuilt"))
    train(service, successor, other, 1, 3)

    # then its operations fail with these words
    failure = service.outcome(last)
    assert isinstance(failure, Failure)
    assert "the state cannot be rebuilt" in failure.error
    assert failure.category == "server"


def test_a_replay_that_gives_another_result_is_an_alarm(
    service: Service, successor: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given a step that is not what it was when the run was first trained
    run = interrupted(service, snapshots_at=(2,), last=6)
    genuine = replay_module.optim_step

    def other_step(*arguments: object) -> object:
        outcome = genuine(*arguments)  # type: ignore[arg-type]
        assert isinstance(outcome, OptimStepOutcome)
        return replace(outcome, metrics={**outcome.metrics, "grad_norm": outcome.metrics["grad_norm"] + 1e-12})

    monkeypatch.setattr(replay_module, "optim_step", other_step)

    # when it is replayed
    with capture_logs() as logs:
        train(service, successor, run, 7, 9)

    # then each is counted and named, and the run goes on
    assert [line["seq"] for line in logs if line["event"] == "replay_mismatch"] == [3, 6]
    worker = row_of(service, successor)
    assert (worker.num_replayed, worker.num_replay_mismatches) == (4, 2)


@pytest.mark.parametrize("is_suspect", [False, True])
def test_others_have_their_turns_during_a_replay_unless_it_is_suspect(
    service: Service, successor: Engine, monkeypatch: pytest.MonkeyPatch, is_suspect: bool
) -> None:
    # given a run whose worker has died, in a replay or not, and another one that has work
    run, other = interrupted(service, snapshots_at=(2,), last=9), service.create_run(seed=8)
    if is_suspect:
        die_replaying(service, run)
    steps: list[str] = []
    advance, take = Replay.advance, TrainTurn.take

    def noted_advance(self: Replay) -> None:
        assert get_run(service, run).replayed_by == "worker-b"
        if "replay" not in steps and not any(active.is_ready for active in successor.loop.roster.active()):
            return  # the replay begins as soon as the other run could have its turn
        steps.append("replay")
        advance(self)

    def noted_take(self: TrainTurn, runs: Sequence[ActiveRun], *, tokens_max: int) -> Any:
        steps.append("turn")
        return take(self, runs, tokens_max=tokens_max)

    monkeypatch.setattr(Replay, "advance", noted_advance)
    monkeypatch.setattr(TrainTurn, "take", noted_take)

    # when a worker takes both
    waiting = [service.submit(other, seq, BODIES[seq - 1]) for seq in (1, 2, 3)]
    successor.take(run)
    successor.take(other)
    train(service, successor, run, 10, 12)
    service.encoded(waiting)

    # then the other waits only for a replay that is suspect; and a replay that has come to its end is no more so
    last_replay = len(steps) - steps[::-1].index("replay")
    assert ("turn" in steps[steps.index("replay") : last_replay]) != is_suspect
    whole = get_run(service, run)
    assert (whole.replayed_by, whole.replays_alone, whole.replay_blame) == (None, False, 0)


def test_a_replay_that_finds_no_memory_goes_on_one_by_one(
    service: Service, successor: Engine, expected: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    # given memory for one operation at a time
    run = interrupted(service, snapshots_at=(), last=6)
    genuine, refused = Trainer.run, list[int]()

    def narrow(self: Trainer, requests: Sequence[TrainRequest], **rest: Any) -> Any:
        if len(requests) > 1:
            refused.append(len(requests))
            raise MemoryError
        return genuine(self, requests, **rest)

    monkeypatch.setattr(Trainer, "run", narrow)

    # when it is replayed
    after = train(service, successor, run, 7, 9)

    # then everything comes out as before
    assert refused
    assert service.encoded(after) == expected[6:9]
    assert row_of(service, successor).num_replay_mismatches == 0


def test_an_operation_that_fails_in_its_replay_is_an_alarm_and_frees_the_lease(
    service: Service, successor: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given a step that succeeded, and fails when it is computed again
    run = interrupted(service, snapshots_at=(2,), last=6)
    monkeypatch.setattr(replay_module, "optim_step", lambda *_: Failure("not finite"))

    # when it is replayed
    with capture_logs() as logs:
        successor.take(run)
        successor.loop.wait_idle(run.id, timeout_s=WAIT_S)

    # then that is counted, the run waits for another attempt, and not for a hot one
    (report,) = [line for line in logs if line["event"] == "replay_failed"]
    assert report["run"] == run.id
    assert successor.loop.roster.pauses(run.id)
    assert row_of(service, successor).num_replay_mismatches == 1
    assert get_run(service, run).lease_worker is None


def test_a_recorded_outcome_that_is_damaged_leaves_the_replay_unchecked_and_is_an_alarm(
    service: Service, successor: Engine, expected: list[bytes]
) -> None:
    # given an outcome in the tail that cannot be read
    run = interrupted(service, snapshots_at=(2,), last=6)
    with service.storage.database.begin() as tx:
        table = tables.operation
        tx.execute(update(table).where(table.c.run_id == run.id, table.c.seq == 4).values(outcome=b"damaged"))

    # then the run goes on as if nothing had happened, but somebody is told
    assert service.encoded(train(service, successor, run, 7, len(BODIES))) == expected[6:]
    assert row_of(service, successor).num_replay_mismatches == 1


def test_the_tail_begins_where_the_state_was_last_made_anew(service: Service, successor: Engine) -> None:
    # given a run that loaded a checkpoint and went on, and whose name means something else since
    engine = Engine(service, "worker-a", writeback_s=3600.0).start()
    run = service.create_run(seed=7)
    bodies = [learn(), SaveState("a"), STEP, LoadState(f"tinker://{run.id}/weights/a", with_optimizer=True), learn(1)]
    requests = [service.submit(run, seq, body) for seq, body in enumerate(bodies, start=1)]
    requests.append(service.submit(run, 6, SaveState("a", overwrite=True)))
    engine.take(run)
    assert isinstance([service.outcome(request) for request in requests][3], Loaded)
    die(service, "worker-a")
    for active in engine.loop.roster.active():
        active.void = True
    engine.leave()
    forget_what_may_be(service)

    # when another worker goes on
    scored = service.submit(run, 7, learn(2, forward_only=True))
    twin = service.create_run(seed=7)
    beside = service.submit(twin, 1, learn(2, forward_only=True))
    successor.take(run)
    successor.take(twin)

    # then it has computed again only what came after the load, from the weights that were loaded then
    assert service.encoded([scored]) == service.encoded([beside])
    assert row_of(service, successor).num_replayed == 1


def test_a_run_in_its_replay_lets_others_have_their_turns(
    service: Service, successor: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given a run with a tail of several passes and steps, and another with work
    run, other = interrupted(service, snapshots_at=(2,), last=9), service.create_run(seed=8)
    request = service.submit(other, 1, learn())
    turns: list[str] = []
    genuine = replay_module.Replay.advance

    def advance(replay: replay_module.Replay) -> None:
        if not turns:
            successor.take(other)
        turns.append(service.status(request))
        genuine(replay)

    monkeypatch.setattr(replay_module.Replay, "advance", advance)

    # when the first is taken over
    successor.take(run)
    service.outcome(request)
    train(service, successor, run, 10, 12)

    # then the other was done before the replay had ended
    assert turns[-1] == "completed"


def test_damaged_weights_fail_the_load_alone(service: Service, successor: Engine) -> None:
    # given a checkpoint with a byte changed that no parser notices
    run = service.create_run(seed=7)
    saved = service.submit(run, 1, SaveState("a"))
    successor.take(run)
    service.outcome(saved)
    with service.storage.database.read() as tx:
        key = tx.execute(select(tables.checkpoint.c.object_key)).scalar_one()
    damage(service, key)

    # when it is loaded
    loaded = service.submit(run, 2, LoadState(f"tinker://{run.id}/weights/a", with_optimizer=True))
    after = service.submit(run, 3, learn())
    successor.take(run)

    # then that fails, and the run goes on with the weights it had
    failure = service.outcome(loaded)
    assert isinstance(failure, Failure)
    assert "do not match its checksum" in failure.error
    assert failure.category == "server"
    assert isinstance(service.outcome(after), ForwardBackwardOutcome)


def test_damaged_weights_are_never_sampled_from(service: Service, successor: Engine) -> None:
    # given sampler weights with a byte changed
    run = service.create_run(seed=7)
    saved = service.submit(run, 1, SaveForSampler(sampling_session_seq=0))
    successor.take(run)
    service.outcome(saved)
    with service.storage.database.read() as tx:
        session_id = tx.execute(select(tables.sampling_session.c.id)).scalar_one()
        session = runs.get_sampling_session(tx, session_id)
    damage(service, str(session.object_key))

    # then they are refused
    adapters = SamplingAdapters(service.storage, num_max=1)
    with pytest.raises(DamagedObjectError):
        adapters.get(session, successor.models.get(run.base_model, in_use=()).base)


def test_a_damaged_payload_fails_alone_even_where_it_still_can_be_parsed(service: Service, successor: Engine) -> None:
    # given a large operation with a byte changed in the middle of its token ids
    run = service.create_run(seed=7)
    large = service.submit(run, 1, learn(length=400))
    with service.storage.database.read() as tx:
        key = journal.get_operation(tx, large).payload.key
    assert key is not None
    damage(service, key)
    operations.decode(service.storage.objects.get(key))
    after = service.submit(run, 2, learn())
    successor.take(run)

    # then it fails instead of being trained on
    failure = service.outcome(large)
    assert isinstance(failure, Failure)
    assert "do not match its checksum" in failure.error
    assert isinstance(service.outcome(after), ForwardBackwardOutcome)
