"""Requests are served in order of arrival, and whoever is older never waits for whoever is younger."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.worker.sampler.requests import make_sample
from worker.sampler.blocks import BLOCK_TOKENS, BlockPool, block_keys
from worker.sampler.scheduler import Scheduler, StepPlan
from worker.sampler.sequence import Request, Sequence, Status
from worker.sampler.stops import StopTokens
from worker.sampler.work import WorkRate


def make_request(
    name: str, length: int, *, num_samples: int = 1, num_new: int = 4, scope: str | None = None
) -> Request:
    """A request that draws `num_new` tokens per sequence."""
    body = make_sample([1] * length, num_samples=num_samples, max_tokens=num_new)
    rate = WorkRate.__new__(WorkRate)  # nothing here asks for units
    keys = () if scope is None else tuple(block_keys(scope, [1] * length))
    return Request(name, body, None, num_new, lambda: StopTokens(()), [1] * length, None, rate, keys)


def make_scheduler(*, num_blocks: int = 8, sequences_max: int = 4, tokens_max: int = 64) -> Scheduler:
    """Room for a few short requests."""
    pool = BlockPool(num_blocks)
    return Scheduler(pool, sequences_max=sequences_max, tokens_max=tokens_max, chunk_tokens=32)


def pool_of(scheduler: Scheduler) -> BlockPool:
    return scheduler._pool


def carry_out(scheduler: Scheduler, plan: StepPlan) -> list[str]:
    """Do what a step does, with token 0 drawn everywhere; names of requests that finished."""
    for chunk in plan.chunks:
        if chunk.request.table.blocks:
            chunk.request.table.num_tokens = chunk.stop
        scheduler.publish(chunk)
        if chunk.is_last:
            chunk.request.last_hidden = torch.zeros(1)
    for sequence in plan.decodes:
        sequence.table.num_tokens += 1
    for sequence in plan.decodes + plan.begins:
        sequence.append(0, 0.0)
        if sequence.status is Status.FINISHED:
            scheduler.finish(sequence)
    done = []
    for request in dict.fromkeys(sequence.request for sequence in plan.decodes + plan.begins):
        if not request.has_waiting:
            request.last_hidden = None
        if request.is_finished:
            scheduler.remove(request)
            done.append(request.request_id)
    return done


def names(sequences: list[Sequence]) -> list[str]:
    return [f"{sequence.request.request_id}{sequence.index}" for sequence in sequences]


def test_a_prompt_is_prefilled_once_and_all_its_sequences_begin_together() -> None:
    # given a request for three continuations
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 20, num_samples=3))

    # when two steps are planned
    first = scheduler.plan()
    carry_out(scheduler, first)
    second = scheduler.plan()

    # then the prompt is in the first alone, and every sequence draws in both
    assert [(chunk.start, chunk.stop) for chunk in first.chunks] == [(0, 20)]
    assert names(first.begins) == ["a0", "a1", "a2"]
    assert second.chunks == []
    assert names(second.decodes) == ["a0", "a1", "a2"]
    assert len(second.reserved.copies) == 2  # the last holder of the prompt's last block writes in place


def test_a_long_prompt_is_cut_at_the_same_places_in_any_company() -> None:
    # given a prompt of 70 tokens behind one of 10, chunks of 32, and 64 prompt tokens in a step
    scheduler = make_scheduler(num_blocks=16)
    scheduler.add(make_request("short", 10))
    scheduler.add(make_request("long", 70))
    spans = []

    # when it is prefilled
    while scheduler.has_work:
        plan = scheduler.plan()
        spans += [(chunk.start, chunk.stop) for chunk in plan.chunks if chunk.request.request_id == "long"]
        carry_out(scheduler, plan)

    # then the cuts are multiples of 32
    assert spans == [(0, 32), (32, 64), (64, 70)]


def test_a_prompt_waits_for_what_an_older_one_is_computing_and_takes_it_over() -> None:
    # given three equal prompts of two and a half blocks, of which one is somebody else's
    scheduler = make_scheduler(num_blocks=16, tokens_max=256)
    for name, scope in (("a", "mine"), ("b", "mine"), ("c", "theirs")):
        scheduler.add(make_request(name, 2 * BLOCK_TOKENS + 9, num_new=9, scope=scope))
    steps = []

    # when they are prefilled, a block a step
    for _ in range(4):
        plan = scheduler.plan()
        steps.append([(chunk.request.request_id, chunk.start, chunk.stop) for chunk in plan.chunks])
        carry_out(scheduler, plan)

    # then the second computes only what is not shared, and the third everything
    end = 2 * BLOCK_TOKENS + 9
    assert steps == [
        [("a", 0, 32), ("c", 0, 32)],
        [("a", 32, 64), ("c", 32, 64)],
        [("a", 64, end), ("b", 64, end), ("c", 64, end)],
        [],
    ]
    found = {name: request.num_cached for name in ("a", "b", "c") if (request := scheduler.find(name))}
    assert found == {"a": 0, "b": 2 * BLOCK_TOKENS, "c": 0}


def test_prompt_tokens_of_a_step_are_limited() -> None:
    # given three prompts of which two fit into a step
    scheduler = make_scheduler()
    for name in ("a", "b", "c"):
        scheduler.add(make_request(name, 30))

    # when steps are planned
    first = scheduler.plan()
    carry_out(scheduler, first)
    second = scheduler.plan()

    # then the third follows while the first two draw
    assert [chunk.request.request_id for chunk in first.chunks] == ["a", "b"]
    assert [chunk.request.request_id for chunk in second.chunks] == ["c"]
    assert names(second.decodes) == ["a0", "b0"]


def test_sequences_beyond_the_seats_begin_as_seats_fall_free() -> None:
    # given two seats and a request for three continuations of two tokens
    scheduler = make_scheduler(sequences_max=2)
    scheduler.add(make_request("a", 5, num_samples=3, num_new=2))

    # when steps are carried out
    begun = []
    while scheduler.has_work:
        plan = scheduler.plan()
        begun.append(names(plan.begins))
        carry_out(scheduler, plan)

    # then the third begins after the first two, without another prefill
    assert begun == [["a0", "a1"], [], ["a2"], []]


def test_a_request_waits_until_it_has_a_seat() -> None:
    # given one seat and two requests
    scheduler = make_scheduler(sequences_max=1)
    for name in "ab":
        scheduler.add(make_request(name, 5))

    # when a step begins
    scheduler.plan()

    # then the first one is being drawn, and the second one waits; of others nothing is known
    assert [scheduler.is_waiting(name) for name in "abc"] == [False, True, False]


def test_the_youngest_is_preempted_when_blocks_run_out() -> None:
    # given three blocks and two requests that need two each before they end
    scheduler = make_scheduler(num_blocks=3)
    scheduler.add(make_request("old", BLOCK_TOKENS - 1, num_new=9))
    scheduler.add(make_request("young", BLOCK_TOKENS - 1, num_new=9))
    done, preempted = [], False

    # when steps are carried out
    while scheduler.has_work:
        plan = scheduler.plan()
        young = scheduler.find("young")
        preempted = preempted or (young is not None and young.has_waiting and not done)
        done += carry_out(scheduler, plan)

    # then both finish, the older one first
    assert done == ["old", "young"]
    assert preempted


def test_removing_a_request_gives_back_all_its_blocks() -> None:
    # given a request in the middle of drawing, and one that waits
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 40, num_samples=2))
    scheduler.add(make_request("b", 60, num_samples=4))
    for _ in range(3):
        carry_out(scheduler, scheduler.plan())

    # when both are removed
    for name in ("a", "b"):
        request = scheduler.find(name)
        assert request is not None
        scheduler.remove(request)

    # then nothing is held
    assert not scheduler.has_work
    assert pool_of(scheduler).num_free == pool_of(scheduler).num_blocks


@settings(deadline=None, max_examples=150)
@given(
    num_blocks=st.integers(3, 9),
    sequences_max=st.integers(1, 5),
    sizes=st.lists(st.tuples(st.integers(1, 90), st.integers(1, 4), st.integers(1, 40)), min_size=1, max_size=7),
    arrivals=st.lists(st.integers(0, 12), min_size=7, max_size=7),
    scope=st.sampled_from([None, "all"]),
)
def test_whatever_arrives_everything_finishes_and_no_block_is_lost(
    num_blocks: int, sequences_max: int, sizes: list[tuple[int, int, int]], arrivals: list[int], scope: str | None
) -> None:
    # given requests of any size that fits into the cache, arriving at any time
    scheduler = make_scheduler(num_blocks=num_blocks, sequences_max=sequences_max)
    fitting = [size for size in sizes if size[0] + size[2] - 1 <= num_blocks * BLOCK_TOKENS]
    coming = [
        (arrivals[place], make_request(str(place), length, num_samples=num_samples, num_new=num_new, scope=scope))
        for place, (length, num_samples, num_new) in enumerate(fitting)
    ]
    done: list[str] = []

    # when steps are carried out
    for number in range(5000):
        for arrival, request in coming:
            if arrival == number:
                scheduler.add(request)
        if number > 12 and not scheduler.has_work:
            break
        plan = scheduler.plan()
        running = plan.decodes + plan.begins
        assert len(running) <= sequences_max
        assert len({id(sequence) for sequence in running}) == len(running)
        assert plan.chunks or running or not scheduler.has_work, "a step does nothing though there is work"
        done += carry_out(scheduler, plan)

    # then all are done and every block is free
    assert sorted(done) == sorted(request.request_id for _, request in coming)
    assert pool_of(scheduler).num_free == num_blocks
