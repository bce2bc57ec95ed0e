"""A hub that refuses, stumbles or is not there: tried again where that helps, then one line that says what to do."""

import socket
from pathlib import Path
from typing import Any

import pytest
from hub_stand_in import READS, Hub
from huggingface_hub import CommitOperationAdd, HfApi, constants
from saved_models import FILES, WEIGHTS
from small_models import refused

from armour_surgery import push
from armour_surgery.errors import HubOutageError, PushError, TokenError
from armour_surgery.hosts import hub_upload
from armour_surgery.sharing.upload import Pushed

REPO = "me/tiny"
# Each request of a push to a new repository, in the order in which they are made.
REQUESTS = (
    "GET /api/models/me/tiny",
    "POST /api/repos/create",
    "POST /api/validate-yaml",
    "/preupload/main",
    "/lfs/objects/batch",
    "PUT /lfs/stored/",
    "/commit/main",
)


def send(folder: Path, **options: Any) -> Pushed:
    return push(folder, REPO, license="mit", **options)


def arrived(hub: Hub, folder: Path) -> bool:
    files = hub.repos[REPO].files()
    return files.keys() == set(FILES) and files[WEIGHTS] == (folder / WEIGHTS).read_bytes()


# What passes


@pytest.mark.parametrize("how", [503, "cut"])
@pytest.mark.parametrize("request_", REQUESTS)
def test_a_stumble_is_not_noticed(folder: Path, hub: Hub, request_: str, how: int | str) -> None:
    hub.fail(request_, how, times=2)
    assert send(folder).changed
    assert arrived(hub, folder)
    assert len(hub.repos[REPO].branches["main"]) == 2


def test_a_commit_whose_answer_is_lost_is_not_made_twice(folder: Path, hub: Hub) -> None:
    hub.fail("answer to the commit", "cut")
    assert send(folder).changed
    assert arrived(hub, folder)
    assert len(hub.repos[REPO].branches["main"]) == 2


def test_a_commit_is_done_though_nobody_can_ask_about_it(folder: Path, hub: Hub) -> None:
    hub.make(REPO)
    hub.fail("/api/models/me/tiny/revision/", 503, times=40)
    assert send(folder).changed
    assert arrived(hub, folder)


def test_a_repository_whose_answer_is_lost_is_used(folder: Path, hub: Hub) -> None:
    hub.fail("answer to the creation", "cut")
    assert send(folder).changed
    assert len(hub.sent("/api/repos/create")) == 2
    assert arrived(hub, folder)


# What lasts


@pytest.mark.parametrize(("how", "said"), [(503, r"is out of order or busy \(503: made to"), ("cut", "was cut")])
@pytest.mark.parametrize("request_", REQUESTS)
def test_an_outage_that_lasts_is_told_and_the_same_call_goes_on(
    folder: Path, hub: Hub, request_: str, how: int | str, said: str
) -> None:
    hub.fail(request_, how, times=40)
    with pytest.raises(HubOutageError, match=said) as caught:
        send(folder)
    message = str(caught.value)
    assert "run the same command again" in message
    assert hub.url in message
    assert "secret" not in message  # addresses to send to are signed
    assert 4 <= len(hub.sent(request_.partition(" ")[2] or request_)) <= 14
    assert REPO not in hub.repos or hub.repos[REPO].files() == {}
    stored = len(hub.stored)
    hub.faults.clear()
    hub.requests.clear()
    assert send(folder).changed
    assert arrived(hub, folder)
    assert len(hub.sent("PUT")) == 1 - stored


def test_no_network(folder: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    waited: list[float] = []
    monkeypatch.setattr(hub_upload, "WAITS", (1.0, 2.0, 4.0))
    monkeypatch.setattr(hub_upload.time, "sleep", waited.append)
    message = refused(HubOutageError, lambda: send(folder))
    assert waited == [1.0, 2.0, 4.0]
    for part in ("did not answer", "ConnectError", "by hand at http://127.0.0.1", "HF_ENDPOINT names another hub"):
        assert part in message


def test_told_to_stay_offline(folder: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refused(HubOutageError, lambda: send(folder))
    assert hub.requests == []


# What is refused


def test_no_token(folder: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    message = refused(TokenError, lambda: send(folder))
    assert "there is no token" in message
    assert "`hf auth login`, or set HF_TOKEN" in message
    assert hub.requests == []
    Path(constants.HF_TOKEN_PATH).write_text("hf_writes\n")
    assert send(folder).changed


@pytest.mark.parametrize("token", ["hf_wri tes", "hf_écrit"])
def test_a_token_that_is_none_is_not_shown(folder: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, token: str) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    message = refused(TokenError, lambda: send(folder))
    assert "odd letters" in message
    assert token not in message
    assert hub.requests == []


def test_a_token_that_is_not_known(folder: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    message = refused(TokenError, lambda: send(folder))
    assert "401: Invalid credentials" in message
    assert "hf_expired" not in message
    assert len(hub.requests) == 1


def test_a_token_that_may_not_write(folder: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", READS)
    for _ in ("a new repository", "one that is there"):
        message = refused(TokenError, lambda: send(folder))
        assert "403: You don't have the rights" in message
        assert "write access" in message
        hub.make(REPO)
    assert hub.repos[REPO].files() == {}


@pytest.mark.parametrize("kind", ["dataset", "space", "bucket"])
def test_a_name_that_something_else_has(folder: Path, hub: Hub, kind: str) -> None:
    hub.make(REPO, kind=kind)
    message = refused(PushError, lambda: send(folder))
    assert "the name me/tiny is taken" in message
    assert ("something that is no model" if kind == "bucket" else f"a {kind} there") in message


@pytest.mark.parametrize("request_", REQUESTS[1:])
@pytest.mark.parametrize("status", [400, 404])
def test_other_refusals_are_told_in_one_line(folder: Path, hub: Hub, request_: str, status: int) -> None:
    hub.fail(request_, status, times=40)
    message = refused(PushError, lambda: send(folder))
    assert f"made to answer {status}" in message
    assert len(hub.sent(request_.partition(" ")[2] or request_)) == 1
    assert REPO not in hub.repos or hub.repos[REPO].files() == {}


def test_a_server_that_is_no_hub(folder: Path, hub: Hub) -> None:
    hub.fail("/api/models", 404, times=40)
    assert f"is {hub.url} a hub, and REPO right?" in refused(PushError, lambda: send(folder))


@pytest.mark.parametrize(
    ("error", "kind"),
    [(ValueError("Malformed response\nfrom server"), PushError), (ConnectionError("Network error"), HubOutageError)],
)
def test_what_other_parts_of_the_library_raise(
    folder: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[PushError]
) -> None:
    """hf_xet, which sends large files to the hub's own store, has errors of its own."""

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(HfApi, "preupload_lfs_files", fail)
    message = refused(kind, lambda: send(folder))
    assert f"({type(error).__name__}: {' '.join(str(error).split())})" in message
    assert "HF_HUB_DISABLE_XET=1" in message


# What changes meanwhile


def test_weights_that_change_while_they_are_sent_are_not_committed(
    folder: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = CommitOperationAdd.__post_init__

    def changed(self: CommitOperationAdd) -> None:
        (folder / WEIGHTS).write_bytes(b"other weights")
        real(self)

    monkeypatch.setattr(CommitOperationAdd, "__post_init__", changed)
    assert "was changed while it was sent" in refused(PushError, lambda: send(folder))
    assert hub.repos[REPO].files() == {}


def test_a_gitignore_of_the_repository_is_noticed(folder: Path, hub: Hub) -> None:
    hub.make(REPO, files={".gitignore": b"model.safetensors\n"})
    message = refused(PushError, lambda: send(folder))
    assert "has no model.safetensors after the commit" in message
    assert ".gitignore" in message
