"""Sending files to a repository of the hub in one commit, patiently, and what to do where it does not go."""

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from armour_surgery.errors import LicenseError, PushError, TokenError, UsageError
from armour_surgery.hosts.hub import PREFIX, bars_for_people, quiet
from armour_surgery.hosts.hub_errors import endpoint, how_to_log_in, passes, shortened, status_of, told

if TYPE_CHECKING:
    from huggingface_hub import HfApi

__all__ = ["Repository", "check_repository", "find_token", "open_repository", "upload"]

Answer = TypeVar("Answer")
# Seconds between tries of a request that huggingface_hub sends only once. The others it tries again by itself.
WAITS = (1.0, 2.0, 4.0)
# One answer to a small question, in seconds.
TIMEOUT = 20.0


@dataclass(frozen=True)
class Repository:
    """A model repository as it is before something is sent: its newest commit in `revision`, and the files there."""

    name: str
    revision: str
    private: bool
    commit: str | None
    files: frozenset[str]


def check_repository(name: str, revision: str | None) -> None:
    """Make sure that a repository and a branch may be called so; nothing is asked of the hub.

    Raises:
        UsageError: they may not, or no account or organization is named.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, and not in __all__

    example = "write ORG/NAME, such as my-account/deit-armour"
    plain = name.removeprefix(PREFIX)
    if plain != name or "://" in name:
        raise UsageError(f"REPO {name!r} is an address, and a name is wanted: {example}")
    if name.count("/") != 1:
        raise UsageError(f"REPO {name!r} is not the name of an account or organization and of a model; {example}")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UsageError(f"REPO {name!r} may not be called so ({' '.join(str(error).split())}); {example}") from error
    if revision is not None and (not revision.strip() or re.fullmatch(r"[0-9a-f]{40}", revision)):
        raise UsageError(f"--revision {revision!r} is no branch, and only to a branch something can be added")


def find_token() -> str:
    """The user's token from where the hub's own tools keep it: HF_TOKEN, or what `hf auth login` wrote.

    Raises:
        TokenError: there is none, or it cannot be one.
    """
    from huggingface_hub import get_token

    try:
        with quiet():
            token = get_token()
    except Exception as error:
        # Tokens of a CI are asked for over the network, and it may have no answer.
        raise TokenError(f"no token for the hub could be had ({type(error).__name__}); {how_to_log_in()}") from error
    if not token:
        raise TokenError(f"there is no token for the hub, so nothing was sent; {how_to_log_in()}")
    if not re.fullmatch(r"[!-~]+", token):
        # The HTTP client would refuse it in a message that shows it.
        raise TokenError(
            f"what HF_TOKEN or `hf auth login` gives is no token (it has odd letters in it); {how_to_log_in()}"
        )
    return token


def open_repository(name: str, token: str, *, private: bool, revision: str | None) -> Repository:
    """The repository and branch to send to, made where they are not there yet.

    Raises:
        PushError: it is public and was asked to be private, or the name is taken by something else.
        TokenError, HubOutageError: see `upload`.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with told(name), quiet():
        found = _info(api, name, None)
        if found is None:
            _create(api, name, private)
            found = _info(api, name, None)
        if found is None:
            raise PushError(_taken(api, name))
        if private and not found.private:
            raise PushError(
                f"{name} is there already and public, which --private does not change, so nothing was sent; make it "
                f"private at {endpoint()}/{name}/settings, or name another REPO"
            )
        if revision is None:
            return _repository(name, "main", found)
        branch = _info(api, name, revision)
        if branch is not None:
            return _repository(name, revision, branch)
        _patiently(lambda: api.create_branch(name, branch=revision, exist_ok=True))
    # What it began with is not what somebody put there, so there is nothing to take care of.
    return Repository(name, revision, bool(found.private), found.sha, frozenset())


def upload(
    repository: Repository, token: str, files: Mapping[str, Path | bytes], *, message: str, digests: Mapping[str, str]
) -> str:
    """Send files in one commit and return its id: that of the newest commit, where nothing is different.

    Contents that the hub has are not sent again, so that after an interruption the same call goes on. `files` are by
    their names in the repository; `digests` are the sha256 that some of them have to have when they are read.

    Raises:
        TokenError: the hub does not take the token, or does not let it write there.
        HubOutageError: no answer, or an outage, several times.
        LicenseError: the hub knows no such license as the card names.
        PushError: the hub refused it otherwise, or a file was changed meanwhile.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(token=token)
    name, revision = repository.name, repository.revision
    with told(name), bars_for_people():
        if "README.md" in files:
            _check_card(_text(files["README.md"]))
        for wait in (*WAITS, None):
            # New ones for each try: they note what the hub has, and a commit whose answer was lost is done.
            additions = [CommitOperationAdd(path, content) for path, content in files.items()]
            api.preupload_lfs_files(name, additions, revision=revision, free_memory=False)
            for addition in additions:
                wanted = digests.get(addition.path_in_repo)
                if wanted is not None and addition.upload_info.sha256.hex() != wanted:
                    raise PushError(f"{addition.path_in_repo} was changed while it was sent; run the command again")
            try:
                commit = api.create_commit(name, additions, commit_message=message, revision=revision)
                break
            except Exception as error:
                if wait is None or not passes(error):
                    raise
                time.sleep(wait)
        _check_arrived(api, name, commit.oid, files)
    return str(commit.oid)


def _check_arrived(api: "HfApi", name: str, commit: str, files: Mapping[str, Path | bytes]) -> None:
    """Make sure that the hub left nothing out, as it does with what a `.gitignore` in a repository names."""
    try:
        arrived = api.model_info(name, revision=commit, timeout=TIMEOUT)
    except Exception:
        return  # the commit is made, and that the hub cannot be asked about it now does not undo it
    missing = sorted(set(files) - _names(arrived))
    if missing:
        raise PushError(
            f"{name} has no {', '.join(missing)} after the commit {commit}; is there a .gitignore in it that leaves "
            "that out?"
        )


def _text(content: Path | bytes) -> str:
    raw = content if isinstance(content, bytes) else content.read_bytes()
    return raw.decode("utf-8", errors="replace")


def _repository(name: str, revision: str, info: Any) -> Repository:
    return Repository(name, revision, bool(info.private), info.sha, _names(info))


def _names(info: Any) -> frozenset[str]:
    return frozenset(sibling.rfilename for sibling in info.siblings or ())


def _info(api: "HfApi", name: str, revision: str | None) -> Any:
    """What the hub tells of a model repository, or of a branch of it; None where there is none."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        return _patiently(lambda: api.model_info(name, revision=revision, timeout=TIMEOUT))
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        # 401 goes by the same class, and is about the token.
        if status_of(error) != 404:
            raise
        return None


def _create(api: "HfApi", name: str, private: bool) -> None:
    from huggingface_hub.errors import HfHubHTTPError

    try:
        # None leaves it to the organization, whose default may be private.
        _patiently(lambda: api.create_repo(name, private=private or None))
    except HfHubHTTPError as error:
        # Made in the meantime, or by the try before, whose answer was lost; or there is something else of that name.
        if status_of(error) != 409:
            raise


def _taken(api: "HfApi", name: str) -> str:
    """What to say of a name that the hub does not give to a model."""
    from huggingface_hub.errors import HfHubHTTPError

    what = "something that is no model, or that your token may not see"
    for kind in ("dataset", "space"):
        try:
            api.repo_info(name, repo_type=kind, timeout=TIMEOUT)
            what = f"a {kind}"
            break
        except HfHubHTTPError:
            continue
    return f"the name {name} is taken: the hub has {what} there, so nothing was sent; name another REPO"


def _check_card(card: str) -> None:
    """Have the hub look at the card's metadata before anything large is sent."""
    from huggingface_hub import ModelCard

    try:
        _patiently(lambda: ModelCard(card, ignore_metadata_errors=True).validate())
    except ValueError as error:
        found = re.findall(r'"message":\s*"((?:[^"\\]|\\.)*)"', str(error)) or [str(error)]
        said = found[0].replace('\\"', '"')
        kind = LicenseError if "license" in said else PushError
        raise kind(
            f"the hub does not take the metadata of README.md ({shortened(said)}), so nothing was sent; correct what "
            "stands between its lines ---, see https://huggingface.co/docs/hub/model-cards"
        ) from error


def _patiently(request: Callable[[], Answer]) -> Answer:
    """The answer to a request that does no harm twice, tried again where waiting may help."""
    for wait in WAITS:
        try:
            return request()
        except Exception as error:
            if not passes(error):
                raise
            time.sleep(wait)
    return request()
