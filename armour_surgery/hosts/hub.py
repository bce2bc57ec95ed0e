"""Reaching the hub, or finding out quickly that it cannot be reached, without a word on stderr."""

import logging
import sys
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from armour_surgery.errors import HubUnreachableError, UnknownModelError

__all__ = [
    "bars_for_people",
    "cached_folder",
    "fetch_file",
    "hub_or_cache",
    "offline",
    "quiet",
    "repository_of",
    "require_url",
    "unreachable",
]

# timm's grammar: hf-hub:ORG/NAME, or hf-hub:ORG/NAME@REVISION.
PREFIX = "hf-hub:"

# One attempt with this limit decides. The libraries would retry for about 25 s per candidate file name, and timm asks
# for three names.
PROBE_SECONDS = 5.0


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the warnings, log lines and loading bars of the model libraries; download bars stay."""
    loggers = [logging.getLogger(name) for name in ("huggingface_hub", "timm", "transformers", "torchvision")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def bars_for_people() -> Iterator[None]:
    """Inside, huggingface_hub draws its bars where somebody watches, and does not fill a log with them."""
    from huggingface_hub import utils

    bars: Any = utils  # its own list of names leaves these out
    hide = not sys.stderr.isatty() and not bars.are_progress_bars_disabled()
    with quiet():  # a switch in the environment wins, and both say so
        if hide:
            bars.disable_progress_bars()
        try:
            yield
        finally:
            if hide:
                bars.enable_progress_bars()


@contextmanager
def offline() -> Iterator[None]:
    """Inside, huggingface_hub answers from its cache or fails at once; afterwards it is as it was before."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@contextmanager
def hub_or_cache(repo: str) -> Iterator[bool]:
    """Inside, the hub is used if it answers for this repository, else its cache alone. Yields which it is."""
    if _hub_answers(repo):
        yield True
    else:
        with offline():
            yield False


def unreachable(name: str, what: str) -> HubUnreachableError:
    """The one-line error for a model whose `what` (weights, config) is neither here nor reachable."""
    return HubUnreachableError(
        f"cannot fetch the {what} of {name}: not in the local cache, and the hub did not answer. Use --no-pretrained "
        "for random weights, --checkpoint FILE for weights you have, or local-dir:DIR / hf:DIR for a downloaded folder"
    )


def require_url(url: str, name: str) -> None:
    """Return if the file at `url` is in torch.hub's cache or its server answers.

    Raises:
        HubUnreachableError: neither is the case.
    """
    import torch

    if (Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]).is_file():
        return
    request = urllib.request.Request(url, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=PROBE_SECONDS).close()
    except urllib.error.HTTPError as error:
        # A server that refuses HEAD has answered.
        error.close()
    except OSError as error:
        raise unreachable(name, "weights") from error


def cached_folder(repo: str, revision: str | None, filenames: tuple[str, ...]) -> Path | None:
    """The folder of the cached copy of the first of these files, or None when none is cached.

    It is called as the commit that they came from.
    """
    from huggingface_hub import try_to_load_from_cache

    for filename in filenames:
        path = try_to_load_from_cache(repo, filename, revision=revision)
        if isinstance(path, str):
            # <cache>/models--ORG--NAME/snapshots/<commit>/<filename>
            return Path(path).parent
    return None


def repository_of(name: str) -> tuple[str, str | None] | None:
    """The repository and revision of hf-hub:ORG/NAME or hf-hub:ORG/NAME@REVISION; None for other names."""
    if not name.startswith(PREFIX):
        return None
    repo, _, revision = name.removeprefix(PREFIX).partition("@")
    return repo, revision or None


def fetch_file(repo: str, filename: str, revision: str | None) -> Path | None:
    """A file of a repository in the local cache, downloaded if it is not there; None where the repository has none.

    It lies in a folder that is called as the commit that it is of.

    Raises:
        UnknownModelError: there is no such repository or revision, or none that may be read.
        HubUnreachableError: the file is not in the cache and the hub did not answer.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        with bars_for_people():
            return Path(hf_hub_download(repo, filename, revision=revision, etag_timeout=PROBE_SECONDS))
    except EntryNotFoundError as error:
        if not isinstance(error, LocalEntryNotFoundError):
            return None
        raise _not_fetched(repo, revision, error) from error
    except Exception as error:
        # The HTTP client, and with it the exceptions for "no network", differs between versions of huggingface_hub.
        raise _not_fetched(repo, revision, error) from error


def _not_fetched(repo: str, revision: str | None, error: Exception) -> UnknownModelError | HubUnreachableError:
    from huggingface_hub.errors import HFValidationError, RevisionNotFoundError

    name = f"{PREFIX}{repo}" + (f"@{revision}" if revision else "")
    if isinstance(error, HFValidationError):
        return UnknownModelError(f"{name}: {repo!r} is no name of a repository; write hf-hub:ORG/NAME")
    if isinstance(error, RevisionNotFoundError):
        return UnknownModelError(f"{name}: the hub has {repo}, but no branch, tag or commit {revision!r} of it")
    # An answer other than an outage: 401, 403 or 404.
    status = getattr(getattr(error, "response", None), "status_code", 500)
    if status < 500:
        return UnknownModelError(
            f"{name}: the hub has no repository {repo!r} that you may read ({status}); check the name, or log in with "
            "`hf auth login`"
        )
    return HubUnreachableError(
        f"cannot fetch {name}: it is not in the local cache, and the hub did not answer, or the "
        "connection was cut; run it again (what is here is not fetched twice), or name a downloaded folder"
    )


def _hub_answers(repo: str) -> bool:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    try:
        get_hf_file_metadata(hf_hub_url(repo, "config.json"), timeout=PROBE_SECONDS)
    except HfHubHTTPError as error:
        # 404 and 401 are answers, and the loader will say the same again with more detail; 5xx is an outage.
        return error.response is None or error.response.status_code < 500
    except Exception:
        # The HTTP client, and with it the exceptions for "no network", differs between versions of huggingface_hub.
        return False
    return True
