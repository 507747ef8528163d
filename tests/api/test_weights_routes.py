"""Checkpoints: saved through the queue, listed, shared, expired, deleted and downloaded by their own account."""

from __future__ import annotations

import dataclasses
import io
import tarfile
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import pytest

from api.services import Services
from jobs import operations
from jobs.operations import LoadState, LoraConfig, Outcome, Saved
from storage import checkpoints, journal, keys, uploads
from storage.ids import CheckpointPath
from storage.open import Storage
from tests.api.conftest import MODEL, Account

FILES = {"adapter_config.json": b'{"r": 4}', "adapter_model.safetensors": b"w" * 700}


@pytest.fixture
def publish(storage: Storage) -> Callable[..., CheckpointPath]:
    """Play the worker: store weights and give them a name."""

    def store(
        account: Account, run: str, kind: str = "weights", name: str = "a", *, files: bool = False
    ) -> CheckpointPath:
        path = CheckpointPath(run, kind, name)
        stored = {file: keys.checkpoint_key(run, kind, name, file) for file in (FILES if files else ())}
        weights = keys.checkpoint_key(run, kind, name, "state.safetensors")
        with storage.database.begin() as tx:
            now = storage.database.now(tx)
            for key in (weights, *stored.values()):
                uploads.announce(tx, key, now=now, expires_at=now + timedelta(hours=1))
        for file, key in stored.items():
            storage.objects.put(key, FILES[file])
        with storage.database.begin() as tx:
            checkpoints.publish(
                tx,
                account_id=account.id,
                path=path,
                base_model=MODEL,
                lora=dataclasses.asdict(LoraConfig(rank=4, train_mlp=False)),
                object_key=weights,
                files={file: {"key": key, "size": len(FILES[file])} for file, key in stored.items()},
                size_bytes=1234,
                user_metadata={"step": "7"},
                now=storage.database.now(tx),
                expires_at=None,
                overwrite=False,
            )
        return path

    return store


def body_of(storage: Storage, request_id: str) -> Any:
    with storage.database.read() as tx:
        return operations.decode(storage.payloads.get(journal.get_operation(tx, request_id).payload))


class TestSaving:
    @pytest.mark.parametrize(
        ("route", "fields", "saved", "expected"),
        [
            (
                "save_weights",
                {"path": "ck", "overwrite": False, "type": "save_weights"},
                Saved(path="tinker://r/weights/ck"),
                {"path": "tinker://r/weights/ck", "type": "save_weights"},
            ),
            (
                "save_weights_for_sampler",
                {"sampling_session_seq_id": 0, "kind": "snapshot"},
                Saved(sampling_session_id="S:sample:0"),
                {"sampling_session_id": "S:sample:0", "type": "save_weights_for_sampler"},
            ),
            (
                "save_weights_external",
                {"path": "ck", "ttl_seconds": 3600},
                Saved(path="p", size_bytes=5),
                {"path": "p", "size_bytes": 5, "type": "save_weights_external"},
            ),
        ],
    )
    def test_is_accepted_and_resolves(  # noqa: PLR0917, one per column
        self,
        route: str,
        fields: dict[str, Any],
        saved: Saved,
        expected: dict[str, Any],
        alice: Account,
        complete: Callable[[str, Outcome], None],
    ) -> None:
        run = alice.run()
        request_id = alice.post(route, {"model_id": run, "seq_id": 1} | fields).json()["request_id"]
        complete(request_id, saved)
        assert alice.retrieve(request_id).json() == expected

    @pytest.mark.parametrize("fields", [{"path": "a/b"}, {"path": ""}, {"path": "a", "ttl_seconds": 5}, {}])
    def test_under_a_bad_name_fails_through_the_future(self, fields: dict[str, Any], alice: Account) -> None:
        run = alice.run()
        request_id = alice.post("save_weights", {"model_id": run, "seq_id": 1} | fields).json()["request_id"]
        assert alice.retrieve(request_id).json()["category"] == "user"

    def test_an_ephemeral_save_repeated_with_another_session_number_is_the_same_operation(self, alice: Account) -> None:
        run = alice.run()
        body = {"model_id": run, "seq_id": 1, "sampling_session_seq_id": 0}
        first = alice.post("save_weights_for_sampler", body).json()
        assert alice.post("save_weights_for_sampler", body | {"sampling_session_seq_id": 5}).json() == first


class TestLoading:
    def test_in_place_keeps_the_path_for_the_worker_to_look_up(self, alice: Account, storage: Storage) -> None:
        run = alice.run()
        body = {"model_id": run, "seq_id": 1, "path": f"tinker://{run}/weights/a", "optimizer": True}
        request_id = alice.post("load_weights", body).json()["request_id"]
        assert body_of(storage, request_id) == LoadState(body["path"], True)

    @pytest.mark.parametrize(
        ("path", "complaint"),
        [("nonsense", "tinker://RUN/"), ("tinker://r/sampler_weights/a", "hold no optimizer state")],
    )
    def test_in_place_of_what_is_no_checkpoint_fails_through_the_future(
        self, path: str, complaint: str, alice: Account
    ) -> None:
        body = {"model_id": alice.run(), "seq_id": 1, "path": path, "optimizer": True}
        failure = alice.retrieve(alice.post("load_weights", body).json()["request_id"]).json()
        assert complaint in failure["error"]

    def test_into_a_new_run_takes_the_checkpoints_lora(
        self, alice: Account, storage: Storage, publish: Callable[..., CheckpointPath]
    ) -> None:
        # given
        path = publish(alice, alice.run())
        session = alice.session()
        # when
        body = {"session_id": session, "model_seq_id": 3, "path": str(path), "optimizer": True, "type": "load_weights"}
        answer = alice.post("load_weights", body).json()
        # then
        assert answer["model_id"] == f"{session}:train:3"
        loaded = body_of(storage, answer["request_id"])
        assert (loaded.path, loaded.with_optimizer) == (str(path), True)
        assert loaded.object_key is not None
        assert alice.post("get_info", {"model_id": answer["model_id"]}).json()["lora_rank"] == 4

    def test_another_accounts_checkpoint_fails_as_one_that_does_not_exist(
        self, alice: Account, bob: Account, publish: Callable[..., CheckpointPath]
    ) -> None:
        path = publish(alice, alice.run())
        session = bob.session()
        errors = []
        for number, name in enumerate(["a", "b"]):
            body = {"session_id": session, "model_seq_id": number, "path": f"tinker://{path.run}/weights/{name}"}
            failure = bob.retrieve(bob.post("load_weights", body).json()["request_id"]).json()
            assert failure["category"] == "user"
            errors.append(failure["error"].replace(f"/{name}'", "/?'"))
        assert errors[0] == errors[1]
        assert "no checkpoint" in errors[0]

    def test_with_the_owners_token_it_loads(
        self, alice: Account, bob: Account, storage: Storage, publish: Callable[..., CheckpointPath]
    ) -> None:
        path = publish(alice, alice.run())
        body = {"session_id": bob.session(), "model_seq_id": 0, "path": str(path), "weights_access_token": alice.secret}
        request_id = bob.post("load_weights", body).json()["request_id"]
        assert body_of(storage, request_id).path == str(path)


class TestListing:
    def test_of_run_and_account_newest_first(self, alice: Account, publish: Callable[..., CheckpointPath]) -> None:
        run = alice.run()
        first, second = publish(alice, run), publish(alice, run, "sampler_weights", "b")
        of_run = alice.get(f"training_runs/{run}/checkpoints").json()["checkpoints"]
        assert [row["tinker_path"] for row in of_run] == [str(second), str(first)]
        assert of_run[1] | {"time": None} == {
            "checkpoint_id": "weights/a",
            "checkpoint_type": "training",
            "time": None,
            "tinker_path": str(first),
            "size_bytes": 1234,
            "public": False,
            "user_metadata": {"step": "7"},
            "expires_at": None,
        }
        page = alice.get("checkpoints?limit=1&offset=1").json()
        assert [row["tinker_path"] for row in page["checkpoints"]] == [str(first)]
        assert page["cursor"] == {"offset": 1, "limit": 1, "total_count": 2}
        listed = alice.get(f"training_runs/{run}").json()
        assert listed["last_checkpoint"]["tinker_path"] == str(first)
        assert listed["last_sampler_checkpoint"]["tinker_path"] == str(second)

    def test_and_everything_else_is_404_for_another_account(
        self, alice: Account, bob: Account, publish: Callable[..., CheckpointPath]
    ) -> None:
        run = alice.run()
        path = publish(alice, run, "external_weights", files=True)
        at = f"training_runs/{run}/checkpoints"
        for method, route, body in [
            ("GET", at, None),
            ("DELETE", f"{at}/{path.checkpoint_id}", None),
            ("POST", f"{at}/{path.checkpoint_id}/publish", None),
            ("DELETE", f"{at}/{path.checkpoint_id}/publish", None),
            ("PUT", f"{at}/{path.checkpoint_id}/ttl", {"ttl_seconds": None}),
            ("GET", f"{at}/{path.checkpoint_id}/external_weights_urls", None),
            ("GET", f"{at}/{path.checkpoint_id}/archive", None),
            ("POST", "weights_info", {"tinker_path": str(path)}),
        ]:
            assert bob.request(method, route, json=body).status_code == 404, route
        assert bob.get("checkpoints").json()["checkpoints"] == []


class TestChanging:
    def test_published_weights_are_readable_by_all_until_unpublished(
        self, alice: Account, bob: Account, publish: Callable[..., CheckpointPath]
    ) -> None:
        path = publish(alice, alice.run())
        at = f"training_runs/{path.run}/checkpoints/{path.checkpoint_id}/publish"
        for _ in range(2):  # the second time changes nothing, and is no conflict
            assert alice.request("POST", at).status_code == 204
        info = bob.post("weights_info", {"tinker_path": str(path)}).json()
        assert (info["base_model"], info["lora_rank"], info["train_mlp"]) == (MODEL, 4, False)
        assert alice.request("DELETE", at).status_code == 204
        assert bob.post("weights_info", {"tinker_path": str(path)}).status_code == 404

    def test_a_ttl_is_set_and_removed(self, alice: Account, publish: Callable[..., CheckpointPath]) -> None:
        path = publish(alice, alice.run())
        at = f"training_runs/{path.run}/checkpoints"
        put = f"{at}/{path.checkpoint_id}/ttl"
        assert alice.request("PUT", put, json={"ttl_seconds": 3600}).status_code == 204
        assert alice.get(at).json()["checkpoints"][0]["expires_at"] is not None
        assert alice.request("PUT", put, json={"ttl_seconds": None}).status_code == 204
        assert alice.get(at).json()["checkpoints"][0]["expires_at"] is None
        refused = alice.request("PUT", put, json={"ttl_seconds": 1})
        assert (refused.status_code, "3600" in refused.json()["detail"]) == (400, True)

    def test_a_deleted_checkpoint_is_gone(self, alice: Account, publish: Callable[..., CheckpointPath]) -> None:
        path = publish(alice, alice.run())
        at = f"training_runs/{path.run}/checkpoints/{path.checkpoint_id}"
        assert alice.request("DELETE", at).status_code == 204
        assert alice.request("DELETE", at).status_code == 404
        assert alice.get("checkpoints").json()["checkpoints"] == []


class TestDownloading:
    def test_links_need_no_key_and_end(
        self, alice: Account, services: Services, publish: Callable[..., CheckpointPath]
    ) -> None:
        path = publish(alice, alice.run(), "external_weights", files=True)
        links = alice.get(f"training_runs/{path.run}/checkpoints/{path.checkpoint_id}/external_weights_urls").json()
        assert sorted(links["urls"]) == sorted(FILES)
        for name, url in links["urls"].items():
            answer = alice.http.get(url)
            assert answer.content == FILES[name]
            assert answer.headers["content-length"] == str(len(FILES[name]))
        # and: neither another object nor a later end can be had with the same signature
        parts = urlsplit(links["urls"]["adapter_config.json"]).path.split("/")
        other = urlsplit(links["urls"]["adapter_model.safetensors"]).path.split("/")
        for forged in ([*parts[:6], *other[6:]], [*parts[:4], str(int(parts[4]) + 9), *parts[5:]]):
            assert alice.http.get("/".join(forged)).status_code == 404

    def test_the_archive_is_a_plain_tar_behind_a_redirect(
        self, alice: Account, publish: Callable[..., CheckpointPath]
    ) -> None:
        path = publish(alice, alice.run(), "sampler_weights", files=True)
        answer = alice.get(f"training_runs/{path.run}/checkpoints/{path.checkpoint_id}/archive")
        assert (answer.status_code, answer.headers["expires"].endswith("GMT")) == (302, True)
        data = alice.http.get(answer.headers["location"])
        assert data.headers["content-length"] == str(len(data.content))
        with tarfile.open(fileobj=io.BytesIO(data.content)) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}  # type: ignore[union-attr]
        assert members == FILES | {"checkpoint_complete": b""}

    def test_weights_without_files_say_how_to_get_some(
        self, alice: Account, publish: Callable[..., CheckpointPath]
    ) -> None:
        path = publish(alice, alice.run())
        answer = alice.get(f"training_runs/{path.run}/checkpoints/{path.checkpoint_id}/archive")
        assert answer.status_code == 400
        assert "save_weights_external" in answer.json()["detail"]


def test_a_sampler_of_a_checkpoint_keeps_its_weights(
    alice: Account, storage: Storage, publish: Callable[..., CheckpointPath]
) -> None:
    path = publish(alice, alice.run(), "sampler_weights")
    body = {"session_id": alice.session(), "sampling_session_seq_id": 0, "model_path": str(path)}
    sampler = alice.post("create_sampling_session", body).json()["sampling_session_id"]
    found = alice.get(f"samplers/{sampler}").json()
    assert found == {"sampler_id": sampler, "base_model": MODEL, "model_path": str(path)}
