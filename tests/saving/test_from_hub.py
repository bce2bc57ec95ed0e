"""hf-hub:ORG/NAME is a saved folder where the repository holds one, pinned to a commit, and timm's model elsewhere."""

import json
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from hub_stand_in import Hub
from huggingface_hub import constants
from saved_models import CARD, PLAN, TIMM, WEIGHTS, contents, same
from small_models import refused
from timm.models import save_for_hf
from torch import nn

from armour_surgery import load
from armour_surgery.errors import CorruptFileError, HubUnreachableError, SchemaError, UnknownModelError
from armour_surgery.hosts import load_model
from armour_surgery.saving.any_model import load_any
from armour_surgery.saving.folder import read_plan
from armour_surgery.saving.occupied import is_saved_folder

NAME = "hf-hub:me/tiny"


@pytest.fixture
def there(hub: Hub, saved: Path) -> Hub:
    """A hub with a saved folder on it."""
    hub.make("me/tiny", files={**contents(saved), "checkpoint.pt": b"large"})
    return hub


def test_a_folder_on_the_hub_is_loaded(there: Hub, saved: Path) -> None:
    assert same(load(NAME), load(saved))
    assert is_saved_folder(NAME)
    assert read_plan(NAME) == read_plan(saved)
    model, source = load_any(NAME)
    assert source is None
    assert same(model, load(saved))
    assert there.sent("checkpoint.pt") == []


def test_timm_creates_it(there: Hub, saved: Path) -> None:
    assert same(timm.create_model(NAME, pretrained=True).eval(), load(saved))
    assert there.sent("checkpoint.pt") == []


def test_looking_does_not_fetch_the_weights(there: Hub) -> None:
    assert is_saved_folder(NAME)
    read_plan(NAME)
    assert there.sent(WEIGHTS) == []


def test_a_revision_stays_what_it_is(there: Hub, saved: Path) -> None:
    repo = there.repos["me/tiny"]
    first = repo.find("main")
    repo.add("main", {PLAN: b"{}"}, "broken")
    repo.branches["v1"] = [first or ""]
    for revision in (first, "v1"):
        assert same(load(f"{NAME}@{revision}"), load(saved))
    assert "not written by armour-surgery" in refused(SchemaError, lambda: load(NAME))
    assert "no branch, tag or commit 'v2'" in refused(UnknownModelError, lambda: load(f"{NAME}@v2"))


def test_a_branch_that_moves_meanwhile_gives_one_commit(
    there: Hub, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    real = huggingface_hub.hf_hub_download

    def moved(*args: object, **kwargs: object) -> object:
        path = real(*args, **kwargs)  # type: ignore[arg-type]
        there.repos["me/tiny"].add("main", {PLAN: b"{}", WEIGHTS: b"new", CARD: b""}, "moved")
        return path

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", moved)
    assert same(load(NAME), load(saved))


def test_what_is_in_the_cache_needs_no_network(there: Hub, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(NAME)
    there.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert same(load(NAME), load(saved))
    assert same(load_any(NAME)[0], load(saved))
    assert there.requests == []
    assert "did not answer" in refused(HubUnreachableError, lambda: load("hf-hub:me/other"))


@pytest.mark.parametrize("how", [503, "cut"])
@pytest.mark.parametrize("part", ["HEAD /me/tiny", f"GET /me/tiny/resolve/main/{PLAN}", f"/{WEIGHTS}"])
def test_a_download_that_stops_is_told_and_goes_on(there: Hub, saved: Path, part: str, how: int | str) -> None:
    there.fail(part, how, times=60)
    message = refused(HubUnreachableError, lambda: load(NAME))
    assert message.startswith(f"cannot fetch {NAME}")
    there.faults.clear()
    assert same(load(NAME), load(saved))


def test_names_that_nothing_is_at(there: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no repository 'me/nope' that you may read (404)" in refused(
        UnknownModelError, lambda: load("hf-hub:me/nope")
    )
    for name in ("hf-hub:", "hf-hub:a/b/c", "hf-hub:a--b"):
        assert "write hf-hub:ORG/NAME" in refused(UnknownModelError, partial(load, name))
        assert not is_saved_folder(name)
    there.make("me/text", files={CARD: b"a poem"})
    assert "no surgery.json in it" in refused(SchemaError, lambda: load("hf-hub:me/text"))
    assert not is_saved_folder("hf-hub:me/text")
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    assert "(401)" in refused(UnknownModelError, lambda: load(NAME))


def test_a_private_folder_needs_the_token(there: Hub, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there.repos["me/tiny"].private = True
    monkeypatch.delenv("HF_TOKEN")
    assert "log in with `hf auth login`" in refused(UnknownModelError, lambda: load(NAME))
    monkeypatch.setenv("HF_TOKEN", "hf_reads")
    assert same(load(NAME), load(saved))


def test_what_comes_from_the_hub_is_not_believed(there: Hub, saved: Path) -> None:
    files = contents(saved)
    there.repos["me/tiny"].add("main", {**files, WEIGHTS: files[WEIGHTS][:-1] + b"?"}, "damaged")
    assert "its sha256 differs" in refused(CorruptFileError, lambda: load(NAME))
    document = {**json.loads(files[PLAN]), "weights": "../../secret.safetensors"}
    there.repos["me/tiny"].add("main", {**files, PLAN: json.dumps(document).encode()}, "reaching")
    assert "nothing outside" in refused(SchemaError, lambda: load(NAME))


@pytest.fixture
def timms(hub: Hub, tmp_path: Path) -> nn.Module:
    """A model of timm's, which lies on the hub as me/timm."""
    arguments = {**TIMM, "patch_size": 8}
    model = timm.create_model("vit_tiny_patch16_224", **arguments)
    save_for_hf(model, str(tmp_path / "timm"), model_args=arguments, safe_serialization=True)
    hub.make("me/timm", files=contents(tmp_path / "timm"))
    return model


def test_models_of_timm_are_still_timms(timms: nn.Module, hub: Hub) -> None:
    assert not is_saved_folder("hf-hub:me/timm")
    loaded, source = load_any("hf-hub:me/timm")
    assert source is not None
    assert (source.name, source.revision) == ("hf-hub:me/timm", hub.repos["me/timm"].find("main"))
    assert torch.equal(loaded.get_parameter("head.weight"), timms.get_parameter("head.weight"))


def test_a_revision_of_timms_is_downloaded_too(timms: nn.Module, hub: Hub) -> None:
    """With the revision in the name of the repository the probe had failed, and only the cache was looked at."""
    repo = hub.repos["me/timm"]
    first = repo.branches["v1"] = [*repo.branches["main"]]
    repo.add("main", {}, "emptied")
    for revision in ("v1", first[-1]):
        _, source = load_model(f"hf-hub:me/timm@{revision}")
        assert source.revision == first[-1]
