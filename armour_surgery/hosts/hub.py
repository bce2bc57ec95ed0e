"""Reaching the hub, or finding out quickly that it cannot be reached, without a word on stderr."""

import logging
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from armour_surgery.errors import HubUnreachableError

__all__ = ["cached_folder", "hub_or_cache", "offline", "quiet", "require_url", "unreachable"]

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
