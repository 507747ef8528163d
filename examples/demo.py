"""The main job from nothing: start the service, fine-tune a base model with the official SDK, stop everything.

Runs in the service's environment and uses only the standard library; the script that fine-tunes is `supervised.py`,
run in the client's own environment as any user would.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).parents[1]
PIECEWORK = ROOT / ".venv" / "bin" / "piecework"
CLIENT_PYTHON = ROOT / ".venv-client" / "bin" / "python"
START_S = 120.0
STOP_S = 30.0
LOOK_S = 0.1
HOST = "127.0.0.1"


def parse_args() -> tuple[argparse.Namespace, list[str]]:
    """What to run; arguments that are not known here go to `supervised.py`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--base-model", default="starter", help="starter, a Hugging Face id or a local directory")
    parser.add_argument("--device", default="auto", help="cpu, cuda:0 …")
    parser.add_argument("--data-dir", type=Path, help="keep the service's data here (else it is thrown away)")
    return parser.parse_known_args()


def say(text: str) -> None:
    """A heading between the outputs of the programs that run."""
    print(f"\n— {text}", flush=True)


@contextlib.contextmanager
def data_directory(given: Path | None) -> Iterator[Path]:
    """The directory that was given, or one that is gone afterwards unless something failed."""
    if given is not None:
        yield given.absolute()
        return
    directory = Path(tempfile.mkdtemp(prefix="piecework-demo-"))
    try:
        yield directory
    except KeyboardInterrupt:
        shutil.rmtree(directory, ignore_errors=True)
        raise
    except BaseException:
        print(f"the service's logs are in {directory / 'logs'}", file=sys.stderr)
        raise
    shutil.rmtree(directory, ignore_errors=True)


def piecework(data_dir: Path, *arguments: str) -> str:
    """Run an administrative command; what it says on standard error is shown."""
    command = [str(PIECEWORK), *arguments, "--json", "--data-dir", str(data_dir)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"`piecework {' '.join(arguments)}` failed")
    return done.stdout


def add_base_model(data_dir: Path, base_model: str) -> str:
    """Make sure that the service has the base model; returns the name it is served under."""
    served = {
        model["source"]: model["name"] for model in json.loads(piecework(data_dir, "models", "list"))["base_models"]
    }
    known = served.get(base_model) or served.get(str(Path(base_model).expanduser().resolve()))
    return known or json.loads(piecework(data_dir, "models", "add", base_model))["name"]


def make_key(data_dir: Path) -> str:
    """An API key of the account `demo`."""
    accounts = json.loads(piecework(data_dir, "accounts", "list"))["accounts"]
    if all(account["name"] != "demo" for account in accounts):
        piecework(data_dir, "accounts", "create", "demo")
    key: str = json.loads(piecework(data_dir, "keys", "create", "--account", "demo"))["api_key"]
    return key


def free_port() -> int:
    """A port at which nothing listens."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
    return port


@contextlib.contextmanager
def service(data_dir: Path, device: str) -> Iterator[str]:
    """`piecework serve` on a free port for the length of the block; yields its address.

    It gets a session of its own, so that Ctrl-C ends the script first and the service in order.
    """
    port = free_port()
    command = [str(PIECEWORK), "serve", "--host", HOST, "--port", str(port), "--data-dir", str(data_dir)]
    log = data_dir / "logs" / "serve.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--device", device], stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        wait_until_ready(process, f"http://{HOST}:{port}", log)
        yield f"http://{HOST}:{port}"
    finally:
        stop(process)


def wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Return when operations can be accepted."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/api/v1/healthz", timeout=5):
            return
        time.sleep(LOOK_S)
    sys.exit(f"the service did not start:\n{log.read_text(errors='replace')}")


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the service in order, by force if that takes too long; its processes die with it."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def interrupt(_number: int, _frame: object) -> NoReturn:
    """Treat a signal as Ctrl-C, so that everything started is ended."""
    raise KeyboardInterrupt


def main() -> int:
    """Run the demo.

    Returns:
        The exit status of the script that fine-tunes.
    """
    args, more = parse_args()
    for program, target in ((PIECEWORK, "install"), (CLIENT_PYTHON, "client")):
        if not program.exists():
            sys.exit(f"{program} is missing: run `make {target}` first")
    began = time.monotonic()
    with data_directory(args.data_dir) as data_dir:
        say(f"base model {args.base_model}")
        name = add_base_model(data_dir, args.base_model)
        key = make_key(data_dir)
        say("starting the service")
        with service(data_dir, args.device) as url:
            say(f"examples/supervised.py against {url}")
            environment = {**os.environ, "TINKER_BASE_URL": url, "TINKER_API_KEY": key}
            script = [str(CLIENT_PYTHON), str(ROOT / "examples" / "supervised.py"), "--base-model", name, *more]
            status = subprocess.run(script, env=environment, check=False).returncode
            say("stopping the service")
        if status:
            raise SystemExit(status)
    say(f"done in {time.monotonic() - began:.0f} s, and nothing is left running")
    return 0


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
