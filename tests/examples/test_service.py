"""What the scripts say when there is no service, and how they show what a run cost."""

import socket
from concurrent.futures import Future
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import tinker
from rich.console import Console

COST = {
    "currency": "USD",
    "rows": [
        {
            "run": "r",
            "kind": "forward_backward",
            "operations": 2,
            "device": "cpu",
            "device_seconds": "1.500000001",
            "tokens_trained": 1200,
            "tokens_prefilled": 0,
            "tokens_sampled": 0,
            "cost": "0.001234",
        },
        {
            "run": "r",
            "kind": "sample",
            "operations": 3,
            "device": "cpu",
            "device_seconds": "0.25",
            "tokens_trained": 0,
            "tokens_prefilled": 30,
            "tokens_sampled": 12,
            "cost": "0.000002",
        },
        {
            "run": None,
            "kind": "sample",
            "operations": 3,
            "device": "cpu",
            "device_seconds": "0.25",
            "tokens_trained": 0,
            "tokens_prefilled": 30,
            "tokens_sampled": 12,
            "cost": "0.000002",
        },
    ],
    "total": {"operations": 8, "device_seconds": "2.000000001", "cost": "0.001238"},
}


def shown(table: object) -> str:
    console = Console(width=80)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_the_cost_table_adds_up_every_kind_and_the_total(service: ModuleType):
    # when
    lines = shown(service.cost_table(COST)).splitlines()

    # then
    cells = {line.split()[0]: line.split()[1:] for line in lines if line.split()}
    assert cells["operation"] == ["device", "number", "device-seconds", "tokens", "USD"]
    assert cells["forward_backward"] == ["cpu", "2", "1.500", "1,200", "0.00123400"]
    assert cells["sample"] == ["cpu", "6", "0.500", "84", "0.00000400"]
    assert cells["total"] == ["8", "2.000", "1,284", "0.00123800"]


def test_on_a_gpu_the_seconds_are_gpu_seconds(service: ModuleType):
    # given
    rows = [{**row, "device": "cuda:0"} for row in COST["rows"]]

    # when and then
    assert "GPU-seconds" in shown(service.cost_table({**COST, "rows": rows}))


def test_no_address_no_key_and_no_service_each_say_what_to_do(service: ModuleType, monkeypatch: pytest.MonkeyPatch):
    # given an address at which nothing listens
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        monkeypatch.delenv("TINKER_BASE_URL", raising=False)
        monkeypatch.delenv("TINKER_API_KEY", raising=False)

        # when and then
        with pytest.raises(SystemExit, match="TINKER_BASE_URL"):
            service.reach(None)
        with pytest.raises(SystemExit, match="TINKER_API_KEY"):
            service.reach(url)
        monkeypatch.setenv("TINKER_API_KEY", "tml-test")
        with pytest.raises(SystemExit, match="Start `piecework serve`"):
            service.reach(url)


def test_a_base_model_that_is_not_offered_is_refused_with_those_that_are(service: ModuleType):
    # given a service with two base models
    models = [SimpleNamespace(model_name="small"), SimpleNamespace(model_name="large")]
    capabilities: Future[Any] = Future()
    capabilities.set_result(SimpleNamespace(supported_models=models))
    client = SimpleNamespace(get_server_capabilities=lambda: capabilities)

    # when and then
    assert service.choose_base_model(client, None) == "small"
    assert service.choose_base_model(client, "large") == "large"
    with pytest.raises(SystemExit, match="small, large"):
        service.choose_base_model(client, "huge")


@pytest.mark.parametrize("name", ["supervised", "reinforcement"])
@pytest.mark.parametrize("steps", ["-4", "0", "many"])
def test_a_count_is_a_whole_number_of_1_or_more(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    steps: str,
):
    # given
    script = request.getfixturevalue(name)
    monkeypatch.setattr("sys.argv", [f"{name}.py", "--steps", steps])

    # when and then
    with pytest.raises(SystemExit) as ended:
        script.parse_args()
    assert ended.value.code == 2
    assert f"argument --steps: {steps!r} must be a whole number of 1 or more" in capsys.readouterr().err


def test_what_the_service_refuses_is_a_sentence(service: ModuleType):
    # given
    def refused() -> None:
        raise tinker.TinkerError("learning_rate must not be negative")

    # when and then
    with pytest.raises(SystemExit, match="The service refused: learning_rate must not be negative"):
        service.run_script(refused)
