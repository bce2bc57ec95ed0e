"""What arrives at the hub is what was saved, in one commit, and what must not be sent is not."""

from dataclasses import replace
from pathlib import Path

import pytest
from hub_stand_in import Hub
from saved_models import CARD, FILES, PLAN, WEIGHTS, armour, contents, edit, same
from small_models import refused

from armour_surgery import load, push
from armour_surgery.errors import (
    CorruptFileError,
    FolderError,
    LicenseError,
    PushError,
    SchemaError,
    UsageError,
)
from armour_surgery.sharing.upload import Pushed

REPO = "me/tiny"


def send(folder: Path, **options: object) -> Pushed:
    return push(folder, REPO, **{"license": "apache-2.0", **options})  # type: ignore[arg-type]


# What arrives


def test_a_folder_arrives_byte_for_byte_in_one_commit(folder: Path, hub: Hub) -> None:
    before = contents(folder)
    pushed = send(folder)
    repo = hub.repos[REPO]
    arrived = repo.files()
    assert arrived.keys() == set(FILES)
    assert (arrived[PLAN], arrived[WEIGHTS]) == (before[PLAN], before[WEIGHTS])
    assert len(repo.branches["main"]) == 2  # the hub's own, and ours
    assert pushed.commit == repo.find("main")
    assert pushed.changed
    assert (pushed.private, repo.private) == (False, False)
    assert {file.name: file.bytes for file in pushed.files} == {name: len(data) for name, data in arrived.items()}
    assert contents(folder) == before
    assert "Armour surgery" in repo.messages[-1]


def test_the_card_that_arrives_names_the_license_and_how_to_load_it(folder: Path, hub: Hub) -> None:
    pushed = send(folder)
    card = hub.repos[REPO].files()[CARD].decode()
    assert card == pushed.card
    assert card.startswith("---\nlicense: apache-2.0\n")
    assert "License of the base model: apache-2.0." in card
    assert 'model = load("hf-hub:me/tiny")  #' in card
    # Nothing else is different.
    kept = set((folder / CARD).read_text().splitlines()) & set(card.splitlines())
    assert len(kept) == len(set(card.splitlines())) - 3


def test_what_was_sent_loads_again(folder: Path, hub: Hub) -> None:
    assert same(load(send(folder).name), load(folder))
    branch = send(folder, revision="later")
    assert branch.name == "hf-hub:me/tiny@later"
    assert same(load(branch.name), load(folder))


def test_a_model_is_sent_without_a_folder(hub: Hub) -> None:
    model = armour()
    pushed = push(model, REPO)
    assert pushed.license == "apache-2.0"  # timm says so of this architecture's weights
    assert pushed.model == type(model).__name__
    assert "# tiny\n" in pushed.card
    assert same(load("hf-hub:me/tiny"), model)


def test_a_second_push_sends_nothing_twice(folder: Path, hub: Hub) -> None:
    first = send(folder)
    hub.requests.clear()
    second = send(folder)
    assert (second.commit, second.changed) == (first.commit, False)
    assert hub.sent("/lfs/stored/") == hub.sent("/commit/") == []
    (folder / CARD).write_text((folder / CARD).read_text() + "\nMore.\n")
    third = send(folder)
    assert third.changed
    assert hub.sent("/lfs/stored/") == []
    assert len(hub.sent("/commit/")) == 1
    assert b"More." in hub.repos[REPO].files()[CARD]


def test_a_private_repository(folder: Path, hub: Hub) -> None:
    assert send(folder, private=True).private
    assert hub.repos[REPO].private
    assert send(folder).private  # it stays so
    assert same(load("hf-hub:me/tiny"), load(folder))


def test_a_public_repository_is_not_used_for_what_should_be_private(folder: Path, hub: Hub) -> None:
    hub.make(REPO)
    assert "there already and public" in refused(PushError, lambda: send(folder, private=True))
    assert len(hub.repos[REPO].commits) == 1
    assert hub.sent("/lfs/") == []


def test_a_branch_is_made(folder: Path, hub: Hub) -> None:
    hub.make(REPO, files={WEIGHTS: b"of another model"})
    pushed = send(folder, revision="armour/qv", message="narrower")
    repo = hub.repos[REPO]
    assert pushed.url.endswith("/me/tiny/tree/armour/qv")
    assert repo.messages[-1] == "narrower"
    assert repo.files("armour/qv").keys() == set(FILES)
    assert repo.files() == {WEIGHTS: b"of another model"}
    assert not send(folder, revision="armour/qv").changed


def test_another_model_is_not_overwritten(folder: Path, hub: Hub) -> None:
    hub.make(REPO, files={WEIGHTS: b"of another model"})
    assert "holds another model" in refused(PushError, lambda: send(folder))
    assert hub.repos[REPO].files() == {WEIGHTS: b"of another model"}


def test_other_files_of_the_repository_stay(folder: Path, hub: Hub) -> None:
    hub.make(REPO, files={"LICENSE": b"be nice", CARD: b"# mine"})
    send(folder)
    assert hub.repos[REPO].files()["LICENSE"] == b"be nice"


def test_a_dry_run_asks_nobody(folder: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    told = send(folder, dry_run=True, private=True)
    assert hub.requests == []
    assert (told.commit, told.changed, told.dry_run, told.private) == (None, False, True, True)
    monkeypatch.setenv("HF_TOKEN", "hf_writes")
    assert replace(send(folder, private=True), commit=None, changed=False, dry_run=True, seconds=0) == replace(
        told, seconds=0
    )


# What is refused before anything is asked


def test_without_a_license_nothing_is_sent(folder: Path, hub: Hub) -> None:
    message = refused(LicenseError, lambda: push(folder, REPO))
    assert "under which license vit_tiny_patch16_224" in message
    assert "--license ID" in message
    assert hub.requests == []


def test_the_license_of_the_card_is_enough(folder: Path, hub: Hub) -> None:
    card = (folder / CARD).read_text().replace("license: other", "license: mit")
    (folder / CARD).write_text(card)
    assert push(folder, REPO).license == "mit"
    assert "does not replace it" in refused(LicenseError, lambda: send(folder))


def test_a_folder_without_a_card_gets_one(folder: Path, hub: Hub) -> None:
    (folder / CARD).unlink()
    assert "does not say under which license" in refused(LicenseError, lambda: push(folder, REPO))
    assert "# tiny\n" in send(folder).card
    assert not (folder / CARD).exists()


def test_a_license_that_the_hub_does_not_know(folder: Path, hub: Hub) -> None:
    """As it does with "bsd", here: the hub's list and ours may differ."""
    message = refused(LicenseError, lambda: send(folder, license="bsd"))
    assert '"license" must be one of [apache-2.0' in message
    assert hub.sent("preupload") == hub.sent("/commit/") == []
    pushed = send(folder, license="dinov3-license")
    assert pushed.license == "dinov3-license"
    assert 'license: other\nlicense_name: "dinov3-license"\n' in pushed.card


def test_folders_that_are_not_ours_or_do_not_load(folder: Path, hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "no surgery.json" in refused(SchemaError, lambda: send(tmp_path / "empty"))
    assert "is not a folder here" in refused(FolderError, lambda: send(tmp_path / "nowhere"))
    assert "is not a folder here" in refused(FolderError, lambda: send(folder / WEIGHTS))
    whole = (folder / WEIGHTS).read_bytes()
    for damaged in (whole[:100], whole[:-1], whole[:-1] + b"?", b""):
        (folder / WEIGHTS).write_bytes(damaged)
        refused(CorruptFileError, lambda: send(folder))
    (folder / WEIGHTS).unlink()
    assert "is missing" in refused(CorruptFileError, lambda: send(folder))
    (folder / WEIGHTS).write_bytes(whole)
    edit(folder, lambda document: document["tied"].update({"head.weight": "nothing"}))
    assert "lacks nothing" in refused(CorruptFileError, lambda: send(folder))
    edit(folder, lambda document: document.update(schema_version=99))
    assert "schema version 99" in refused(SchemaError, lambda: send(folder))
    assert hub.requests == []


def test_a_card_that_is_a_link_out_or_no_text(folder: Path, hub: Hub, tmp_path: Path) -> None:
    (folder / CARD).write_bytes(b"\xff\xfe---")
    assert "cannot be read as UTF-8" in refused(FolderError, lambda: send(folder))
    (folder / CARD).unlink()
    (tmp_path / "diary.md").write_text("secret")
    (folder / CARD).symlink_to(tmp_path / "diary.md")
    assert "is a link out of its folder" in refused(FolderError, lambda: send(folder))
    assert hub.requests == []


@pytest.mark.parametrize(
    ("repo", "options", "said"),
    [
        ("tiny", {}, "is not the name of an account or organization and of a model"),
        ("me/a/b", {}, "is not the name of an account"),
        ("hf-hub:me/tiny", {}, "is an address"),
        ("https://huggingface.co/me/tiny", {}, "is an address"),
        ("me/ti--ny", {}, "may not be called so"),
        ("me/", {}, "may not be called so"),
        (REPO, {"license": "other"}, "--license 'other' is no name of a license"),
        (REPO, {"license": "My License"}, "is no name of a license"),
        (REPO, {"message": " "}, "--message is empty"),
        (REPO, {"revision": ""}, "--revision '' is no branch"),
        (REPO, {"revision": "0" * 40}, "is no branch"),
        (REPO, {"include": ("nope.txt",)}, "--include 'nope.txt' matches no file"),
    ],
)
def test_wrong_words(folder: Path, hub: Hub, repo: str, options: dict[str, object], said: str) -> None:
    given = {"license": "mit", **options}
    assert said in refused(UsageError, lambda: push(folder, repo, **given))  # type: ignore[arg-type]
    assert hub.requests == []


def test_a_model_that_is_none() -> None:
    assert "has to be a folder that save wrote" in refused(UsageError, lambda: push(None, REPO))  # type: ignore[arg-type]
