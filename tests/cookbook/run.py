"""Run the unmodified `tinker-cookbook` against a service: its chat recipe and its arithmetic recipe, without a network.

Makes the cookbook's environment if it is missing, starts a service on a free port, runs both recipes, reads what they
logged, and ends everything it started.
"""

import argparse
import contextlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import recipes
from environment import lay_out_hub_cache, make_environment, offline_environment
from recipes import Check
from service import Service, end_group

ROOT = Path(__file__).parents[2]
SL_LIMIT_S = 600.0
RL_LIMIT_S = 900.0
STOP_S = 10.0
TAIL_LINES = 40


def parse_args() -> argparse.Namespace:
    """Where things are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv-cookbook", help="the cookbook's environment")
    parser.add_argument("--piecework", type=Path, default=ROOT / ".venv/bin/piecework", help="the service's command")
    parser.add_argument("--keep", type=Path, help="keep logs and metrics in this new directory")
    parser.add_argument("--environment-only", action="store_true", help="make the environment and stop")
    return parser.parse_args()


def starter_directory(piecework: Path) -> Path:
    """The starter model, made on first use; its tokenizer is what the recipes render with."""
    command = [str(piecework.parent / "python"), "-m", "worker.starter"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return Path(done.stdout.strip().splitlines()[-1])


def find_conversations(python: Path) -> Path:
    """The cookbook's packaged conversations, found without importing it."""
    look = "import importlib.util as u; print(u.find_spec('tinker_cookbook').submodule_search_locations[0])"
    package = subprocess.run([str(python), "-c", look], stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    return Path(package) / "example_data" / "conversations.jsonl"


def run_recipe(
    python: Path, recipe: tuple[str, dict[str, Any]], environment: dict[str, str], log: Path, *, limit_s: float
) -> Check:
    """Run a recipe to its end, or to the end of its time."""
    module, arguments = recipe
    command = [str(python), "-m", module, *(f"{name}={value}" for name, value in arguments.items())]
    started = time.monotonic()
    print(f"running {module}", flush=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=environment, cwd=log.parent, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status: int | str = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            status = f"stopped after {limit_s:.0f} s"
        finally:
            end_group(process, patience_s=STOP_S)
    if status != 0:
        print("\n".join(log.read_text(errors="replace").splitlines()[-TAIL_LINES:]))
    return Check("it ends well", f"{status} after {time.monotonic() - started:.0f} s", status == 0)


def run_all(python: Path, piecework: Path, folder: Path) -> Iterator[tuple[str, Check]]:
    """Both recipes against one service; yields what was checked of each."""
    model = starter_directory(piecework)
    hub = folder / "hub"
    lay_out_hub_cache(hub, recipes.MODEL_NAME, model)
    service = Service(piecework, folder, model=str(model), model_name=recipes.MODEL_NAME)
    with service:
        environment = offline_environment(hub) | {"TINKER_API_KEY": service.api_key}
        sl_path, rl_path = folder / "chat_sl", folder / "math_rl"
        chat = recipes.supervised(service.url, sl_path, find_conversations(python))
        yield "chat_sl", run_recipe(python, chat, environment, folder / "chat_sl.log", limit_s=SL_LIMIT_S)
        yield from (("chat_sl", check) for check in recipes.check_supervised(sl_path))
        arithmetic = recipes.reinforcement(service.url, rl_path)
        yield "math_rl", run_recipe(python, arithmetic, environment, folder / "math_rl.log", limit_s=RL_LIMIT_S)
        yield from (("math_rl", check) for check in recipes.check_reinforcement(rl_path))
        num_processes = len(service.status()["processes"])
    left = service.left_running()
    yield "service", Check(f"all {num_processes} processes are gone", f"{len(left)} left", not left)


def interrupt(number: int, _frame: object) -> NoReturn:
    """Treat SIGTERM as Ctrl-C, so that everything started is ended."""
    raise KeyboardInterrupt(signal.Signals(number).name)


def main() -> int:
    """Run, print the table, and count.

    Returns:
        The exit status: 0 if every check held.
    """
    args = parse_args()
    signal.signal(signal.SIGTERM, interrupt)
    started = time.monotonic()
    python = make_environment(args.venv)
    if args.environment_only:
        return 0
    checks: list[tuple[str, Check]] = []
    with contextlib.ExitStack() as stack:
        if args.keep is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="piecework-cookbook-")))
        else:
            folder = args.keep.absolute()
            folder.mkdir(parents=True)
        for recipe, check in stack.enter_context(contextlib.closing(run_all(python, args.piecework, folder))):
            checks.append((recipe, check))
            print(f"{'passed' if check.holds else 'FAILED'}  {recipe:8} {check.claim}: {check.seen}", flush=True)
    passed = sum(check.holds for _, check in checks)
    print(f"{passed} passed, {len(checks) - passed} failed, in {time.monotonic() - started:.0f} s")
    return int(passed != len(checks))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
