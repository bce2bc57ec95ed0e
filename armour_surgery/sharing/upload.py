"""`push`: look at a saved folder, put its card right, and send what is the model's in one commit."""

import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from armour_surgery import __version__
from armour_surgery.errors import FolderError, LicenseError, PushError, UsageError
from armour_surgery.hosts.hub_errors import endpoint
from armour_surgery.hosts.hub_upload import check_repository, find_token, open_repository, upload
from armour_surgery.notes import ArmourWarning
from armour_surgery.records import SurgeryPlan
from armour_surgery.saving.folder import save
from armour_surgery.saving.licenses import check_license, license_of, with_license
from armour_surgery.saving.model_card import model_card, named
from armour_surgery.saving.occupied import is_saved_folder
from armour_surgery.saving.reading import check_whole
from armour_surgery.saving.staging import CARD, PLAN, WEIGHTS, stays_inside
from armour_surgery.sharing.contents import LeftOut, sort_files

__all__ = ["Pushed", "SentFile", "push"]


@dataclass(frozen=True)
class SentFile:
    """A file as it is, or would be, in the repository."""

    name: str
    bytes: int


@dataclass(frozen=True)
class Pushed:
    """What was sent, or with `dry_run` would be.

    `commit` is the id of the commit that holds it, None without one; `changed` whether that one is new. `private` is
    what the repository is, or without one what was asked for. `card` is the README.md that is in the repository.
    """

    model: str
    repo: str
    revision: str
    url: str
    private: bool
    license: str
    files: tuple[SentFile, ...]
    left_out: tuple[LeftOut, ...]
    card: str
    plan: SurgeryPlan
    commit: str | None
    changed: bool
    dry_run: bool
    seconds: float

    @property
    def name(self) -> str:
        """What `load` and the command line call it."""
        return _name(self.repo, self.revision)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it: without card and plan, which are files of their own."""
        found = {key: value for key, value in vars(self).items() if key not in ("card", "plan")}
        return {
            **found,
            "files": [asdict(file) for file in self.files],
            "left_out": [asdict(file) for file in self.left_out],
            "bytes": sum(file.bytes for file in self.files),
        }


def push(
    model: nn.Module | str | Path,
    repo: str,
    *,
    license: str | None = None,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    include: Sequence[str] = (),
    dry_run: bool = False,
) -> Pushed:
    """Send a converted model to the hub, in one commit, so that `load("hf-hub:ORG/NAME")` gives it back.

    The repository is made if it is not there. The folder stays as it is: the card that is sent says `hf-hub:ORG/NAME`
    where the folder's says how to load it from here, and names `license` where it names none. Sent again, only what is
    different is; after an interruption the same call goes on. The token is the one of `hf auth login` or HF_TOKEN.

    Args:
        model: a folder that `save` or the command line wrote, or a converted model.
        repo: ORG/NAME.
        license: of the model that was converted, where its card does not name one: a name of the hub's or its own.
        private: make the repository private. One that is there and public is refused.
        revision: a branch, which is made if it is not there; default: main.
        message: of the commit.
        include: patterns of more files of the folder to send, such as `onnx/*`.
        dry_run: send nothing, ask the hub nothing, and return what would be sent.

    Raises:
        UsageError: a name, a license or a pattern that cannot be.
        FolderError: `model` is no folder of ours, or does not load (SchemaError, CorruptFileError say why); or it is a
            model that cannot be saved.
        LicenseError: nothing says what license the original has, or the card and `license` differ.
        TokenError: there is no token, or the hub does not let it write there.
        HubOutageError: the hub did not answer, or is out of order.
        PushError: the name is taken, the repository is public or holds another model, or the hub refused.
    """
    started = time.perf_counter()
    check_repository(repo, revision)
    named_license = check_license(license) if license is not None else None
    if message is not None and not message.strip():
        raise UsageError("--message is empty, and a commit has to have one; leave it out for the usual one")
    with _folder_of(model, repo) as folder:
        document, weights = check_whole(folder)
        branch = revision or "main"
        card = _card(folder, document.plan, repo, branch, named_license)
        _warn_of_places(document.plan)
        others, left_out = sort_files(folder, include)
        files: dict[str, Path | bytes] = {
            CARD: card.encode("utf-8"),
            WEIGHTS: weights,
            PLAN: (folder / PLAN).read_bytes(),
            **others,
        }
        private_there, commit, changed = private, None, False
        # The sizes are told as they were before anything was sent.
        sizes = tuple(SentFile(name, _size(files[name])) for name in sorted(files))
        if not dry_run:
            token = find_token()
            repository = open_repository(repo, token, private=private, revision=revision)
            if WEIGHTS in repository.files and PLAN not in repository.files:
                raise PushError(
                    f"{repo} holds another model ({WEIGHTS} without {PLAN}), so nothing was sent; name another REPO, "
                    "or a new branch with --revision"
                )
            commit = upload(
                repository,
                token,
                files,
                message=message or _message(document.plan),
                digests={WEIGHTS: document.sha256},
            )
            private_there, changed = repository.private, commit != repository.commit
    url = f"{endpoint()}/{repo}" + ("" if branch == "main" else f"/tree/{branch}")
    return Pushed(
        model=str(model) if isinstance(model, str | Path) else type(model).__name__,
        repo=repo,
        revision=branch,
        url=url,
        private=private_there,
        license=license_of(card) or "",
        files=sizes,
        left_out=tuple(left_out),
        card=card,
        plan=document.plan,
        commit=commit,
        changed=changed,
        dry_run=dry_run,
        seconds=round(time.perf_counter() - started, 3),
    )


@contextmanager
def _folder_of(model: nn.Module | str | Path, repo: str) -> Iterator[Path]:
    """The folder to send; a model is saved to one that is gone afterwards."""
    if isinstance(model, nn.Module):
        with tempfile.TemporaryDirectory() as place:
            yield save(model, Path(place) / repo.rpartition("/")[2])
        return
    if not isinstance(model, str | Path):
        raise UsageError(f"model is {model!r}, and has to be a folder that save wrote, or a converted model")
    folder = Path(model).expanduser()
    if not folder.is_dir():
        there = "lies on the hub already" if is_saved_folder(model) else "is not a folder here"
        raise FolderError(
            f"{model} {there}, and push takes one that convert or save wrote; to make one: armour-surgery convert MODEL"
        )
    yield folder


def _card(folder: Path, plan: SurgeryPlan, repo: str, revision: str, license: str | None) -> str:
    """The card as it is to be in the repository: the folder's own, which its owner may have written more into."""
    path = folder / CARD
    if path.exists() and not stays_inside(folder, path):
        raise FolderError(f"{path} is a link out of its folder, which is not followed; copy the file itself")
    try:
        card = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        card = model_card(plan, repo.rpartition("/")[2])
    except (OSError, ValueError) as error:
        raise FolderError(f"{path} cannot be read as UTF-8 text ({error}); correct it, or remove it") from error
    if license is not None:
        card = with_license(card, license)
    if license_of(card) is None:
        origin = plan.source.name if plan.source is not None else "the original"
        raise LicenseError(
            f"{path} does not say under which license {origin} is, so nothing was sent: look it up, and give it as "
            "--license ID (the folder stays as it is), or write it into the file"
        )
    return named(card, _name(repo, revision))


def _warn_of_places(plan: SurgeryPlan) -> None:
    """Of what the user may not want to show: where the original lay."""
    origin = plan.source.name if plan.source is not None else ""
    if Path(origin.rpartition(":")[2]).is_absolute():
        warnings.warn(
            f"README.md and {PLAN} name a place on this machine, {origin}; convert again from a relative path, if "
            "nobody is to see it",
            ArmourWarning,
            stacklevel=3,
        )


def _name(repo: str, revision: str) -> str:
    return f"hf-hub:{repo}" + ("" if revision == "main" else f"@{revision}")


def _message(plan: SurgeryPlan) -> str:
    origin = plan.source.name if plan.source is not None else "a model"
    return f"{origin} after Armour surgery ({plan.mode}, {plan.init}), armour-surgery {__version__}"


def _size(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size
