"""Guards of how workers are made, and of what becomes of them."""

from __future__ import annotations

from tests.mutations.guard import Change, Guard

_FORKS = "tests/cli/test_forkserver.py"

FORKS = (
    Guard(
        "the end with the supervisor",
        "a forked worker would outlive its supervisor and work beside the next one's",
        (
            Change(
                "worker/forkserver.py",
                "    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)\n",
                "",
            ),
        ),
        (f"{_FORKS}::test_all_die_with_a_supervisor_that_is_killed",),
    ),
    Guard(
        "the word to begin",
        "a supervisor that has given a request up would get a second worker",
        (Change("worker/forkserver.py", "    if not os.read(LINE_FD, 64):", "    if False:"),),
        (f"{_FORKS}::test_a_forked_worker_that_is_given_up_before_it_is_told_to_begin_ends",),
    ),
    Guard(
        "the look at a fork server's threads",
        "workers would be forked from a process whose children hang",
        (Change("worker/forkserver.py", "(now := _num_threads()) > num_threads", "(now := _num_threads()) < 0"),),
        (f"{_FORKS}::test_what_cannot_be_forked_is_found",),
    ),
    Guard(
        "the program after a fork that failed",
        "a worker that cannot be forked would be forked again for ever",
        (
            Change(
                "api/cli/child.py",
                "self.goes_by_itself = self.broken and self._is_forked and not was_killed",
                "self.goes_by_itself = False",
            ),
        ),
        (f"{_FORKS}::test_a_forked_worker_that_ends_before_it_is_ready_is_followed_by_a_program",),
    ),
    Guard(
        "the end of a forked worker that hangs",
        "a device would have a worker that never takes work",
        (
            Change(
                "api/cli/child.py",
                "            process.send(signal.SIGKILL)\n        return",
                "            pass\n        return",
            ),
        ),
        (f"{_FORKS}::test_a_forked_worker_that_hangs_before_it_is_ready_is_followed_by_a_program",),
    ),
    Guard(
        "the wait for orphans",
        "what others leave behind would fill the table of processes",
        (Change("api/cli/process.py", "            os.waitpid(dead.si_pid, 0)\n", "            return\n"),),
        (f"{_FORKS}::test_dead_orphans_are_reaped",),
    ),
)
