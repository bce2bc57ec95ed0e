"""`armour-surgery push`: what it says, its JSON, its exit codes, and MODEL as hf-hub:ORG/NAME in other commands."""

import json
from pathlib import Path

import pytest
from command_line import bad, document, failed, good
from hub_stand_in import TOKEN, Hub

KEYS = {
    "model", "repo", "revision", "url", "private", "license", "files", "left_out", "bytes", "commit", "changed",
    "dry_run", "seconds",
}  # fmt: skip
SENT = ["README.md", "config.json", "model.safetensors", "surgery.json"]


@pytest.fixture(scope="module")
def converted(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted") / "mine"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(models)
        good("convert", "local-dir:tiny", "--no-pretrained", "--out", str(folder))
    return folder


@pytest.fixture
def mine(converted: Path, here: Path) -> str:
    (here / "mine").mkdir()
    for path in converted.iterdir():
        (here / "mine" / path.name).write_bytes(path.read_bytes())
    return "mine"


def test_push_and_what_it_says(mine: str, hub: Hub) -> None:
    (Path(mine) / "checkpoints").mkdir()
    (Path(mine) / "notes.txt").write_text("mine")
    result = good("push", mine, "me/tiny", "--license", "mit", "--private", "--message", "first")
    assert "mine -> me/tiny (private), branch main, license mit" in result.stdout
    assert "left out: checkpoints/ (what training goes on from)" in result.stdout
    assert "left out: notes.txt (not of the model)" in result.stdout
    assert f"Sent: {hub.url}/me/tiny (commit {hub.repos['me/tiny'].find('main')})" in result.stdout
    assert 'model = load("hf-hub:me/tiny")' in result.stdout
    assert result.stderr == ""
    assert hub.repos["me/tiny"].messages[-1] == "first"
    again = good("push", mine, "me/tiny", "--license", "mit").stdout
    assert "Nothing had changed since the commit" in again
    assert "(private)" in again
    good("push", mine, "me/tiny", "--license", "mit", "--include", "*.txt", "--revision", "more")
    assert hub.repos["me/tiny"].files("more")["notes.txt"] == b"mine"


def test_json_is_one_document(mine: str, hub: Hub) -> None:
    found = document("push", mine, "me/tiny", "--license", "mit")
    assert found.keys() == KEYS
    assert [file["name"] for file in found["files"]] == SENT
    assert found["bytes"] == sum(file["bytes"] for file in found["files"])
    assert (found["commit"], found["changed"]) == (hub.repos["me/tiny"].find("main"), True)
    assert (found["dry_run"], found["private"], found["revision"]) == (False, False, "main")
    again = document("push", mine, "me/tiny", "--license", "mit")
    assert (again["commit"], again["changed"]) == (found["commit"], False)


def test_a_dry_run_needs_no_token_and_sends_nothing(
    mine: str, hub: Hub, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    result = good("push", mine, "me/tiny", "--license", "mit", "--dry-run")
    lines = [line.split() for line in result.stdout.splitlines()]
    assert [line[0] for line in lines if line[-1:] in (["kB"], ["B"], ["MB"])] == SENT
    size = (here / mine / "surgery.json").stat().st_size
    assert ["surgery.json", f"{size / 1e3:.1f}", "kB"] in lines
    assert "    license: mit\n    library_name: armour-surgery\n" in result.stdout
    assert "Nothing was sent (--dry-run)." in result.stdout
    found = document("push", mine, "me/tiny", "--license", "mit", "--dry-run", "--private")
    assert found.keys() == KEYS
    assert (found["commit"], found["changed"], found["dry_run"], found["private"]) == (None, False, True, True)
    assert hub.requests == []


def test_what_goes_wrong_is_one_line(mine: str, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "does not say under which license" in bad("push", mine, "me/tiny")
    assert "is not the name of an account" in bad("push", mine, "tiny", code=2)
    assert "push takes one that convert or save wrote" in bad("push", "deit_tiny_patch16_224", "me/tiny")
    given = ("push", mine, "me/tiny", "--license", "mit")
    for extra in ((), ("--json",)):
        monkeypatch.setenv("HF_TOKEN", "hf_expired")
        assert "does not take your token (401" in bad(*given, *extra)
        monkeypatch.delenv("HF_TOKEN")
        assert "there is no token" in bad(*given, *extra)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.fail("PUT", "cut", times=20)
    assert "run the same command again" in failed(*given).stderr
    hub.faults.clear()
    good(*given)


def test_a_place_on_this_machine_is_pointed_out(models: Path, here: Path) -> None:
    place = f"local-dir:{models / 'tiny'}"
    good("convert", place, "--no-pretrained", "--out", "mine")
    told = good("push", "mine", "me/tiny", "--license", "mit", "--dry-run").stderr
    assert told.startswith(f"note: README.md and surgery.json name a place on this machine, {place}")


def test_the_token_is_nowhere(mine: str, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARMOUR_DEBUG", "1")
    result = good("push", mine, "me/tiny", "--license", "mit")
    assert TOKEN not in result.stdout + result.stderr
    assert all(TOKEN.encode() not in content for content in hub.repos["me/tiny"].files().values())


@pytest.mark.usefixtures("short_turns")
def test_model_may_lie_on_the_hub(mine: str, hub: Hub) -> None:
    good("push", mine, "me/tiny", "--license", "mit", "--revision", "v1")
    name = "hf-hub:me/tiny@v1"
    timed = document("bench", name, "--vs", mine, "--batch-size", "2", "--budget", "0.1", "--rounds", "2")
    assert [model["name"] for model in timed["models"]] == [name, mine]
    assert len({model["params"] for model in timed["models"]}) == 1
    for command in ("inspect", "convert"):
        assert f"{name} is converted already (from local-dir:" in bad(command, name)
    assert json.loads((Path(mine) / "surgery.json").read_text())["tool"] == "armour-surgery"
