"""What huggingface_hub raises while something is sent: what may pass, what happened, and what to do next."""

from collections.abc import Iterator
from contextlib import contextmanager

from armour_surgery.errors import HubOutageError, PushError, TokenError, UsageError

__all__ = ["endpoint", "how_to_log_in", "passes", "shortened", "status_of", "told"]

# Statuses of a server that may answer otherwise in a moment.
PASSING = (408, 425, 429, 500, 502, 503, 504)
# The HTTP client, and with it the exceptions for "no answer", differs between versions of huggingface_hub (requests,
# httpx, httpx2). These are the names of their bases.
NO_ANSWER = ("TransportError", "RequestException")


def endpoint() -> str:
    """The hub that is used, as HF_ENDPOINT names it."""
    from huggingface_hub import constants

    return constants.ENDPOINT


def passes(error: BaseException) -> bool:
    """Whether waiting may help."""
    return status_of(error) in PASSING or (_no_answer(error) and not _is_offline(error))


def status_of(error: BaseException) -> int | None:
    """The HTTP status that a server answered; None where it did not."""
    found = getattr(getattr(error, "response", None), "status_code", None)
    return found if isinstance(found, int) else None


def _no_answer(error: BaseException) -> bool:
    names = {cls.__name__ for cls in type(error).__mro__}
    # ConnectionError is hf_xet's, the part of huggingface_hub that sends large files.
    return status_of(error) is None and (isinstance(error, ConnectionError) or bool(names & set(NO_ANSWER)))


def _is_offline(error: BaseException) -> bool:
    from huggingface_hub.errors import OfflineModeIsEnabled

    return isinstance(error, OfflineModeIsEnabled)


@contextmanager
def told(name: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into what happened and what to do next."""
    try:
        yield
    except (PushError, UsageError):
        raise
    except Exception as error:
        # All kinds: the hub's own, the HTTP client's, ValueError for answers that make no sense, hf_xet's.
        raise _told_error(name, error) from error


def _told_error(name: str, error: Exception) -> PushError:
    again = "run the same command again: what arrived is not sent twice"
    by_hand = (
        f"without a network, take the folder to a machine that has one, or add its files by hand at {endpoint()}"
        f"/{name}/upload/main; HF_ENDPOINT names another hub"
    )
    plain = "HF_HUB_DISABLE_XET=1 sends large files the plain way"
    otherwise = plain if isinstance(error, ConnectionError) else by_hand
    reason = _reason(error)
    status = status_of(reason)
    if _is_offline(reason):
        return HubOutageError(f"HF_HUB_OFFLINE is set, so nothing was sent to {name}; unset it")
    if _no_answer(reason):
        return HubOutageError(
            f"{endpoint()} did not answer, or the connection was cut "
            f"({type(reason).__name__}: {shortened(str(reason))}), several times, "
            f"so the push to {name} is not finished; {again}; {otherwise}"
        )
    if status is None:
        return PushError(
            f"huggingface_hub could not send the files to {name} ({type(reason).__name__}: {shortened(str(reason))}); "
            f"{again}; {plain}"
        )
    answer = f"{status}: {shortened(str(getattr(reason, 'server_message', None) or 'it did not say why'))}"
    if status == 401:
        return TokenError(f"the hub does not take your token ({answer}); {how_to_log_in()}")
    if status == 403:
        return TokenError(
            f"your token may not write to {name} ({answer}); name a REPO of your own account or of an organization "
            f"that lets you, or make a token with write access at {endpoint()}/settings/tokens"
        )
    if status in PASSING:
        return HubOutageError(f"{endpoint()} is out of order or busy ({answer}), after several tries; {again}")
    return PushError(f"the hub refused to take the files for {name} ({answer}); is {endpoint()} a hub, and REPO right?")


def _reason(error: BaseException) -> BaseException:
    """Of an error and what it came from, the first that says what the hub did: threads of an upload wrap theirs."""
    at: BaseException | None = error
    while at is not None:
        if status_of(at) is not None or _no_answer(at):
            return at
        at = at.__cause__
    return error


def how_to_log_in() -> str:
    """Where a token comes from and where it goes."""
    return (
        f"make one with write access at {endpoint()}/settings/tokens, and give it to `hf auth login`, or set HF_TOKEN "
        "to it"
    )


def shortened(text: str) -> str:
    """What a server said, in one line that is not too long for a message."""
    line = " ".join(text.split())
    return line if len(line) <= 200 else f"{line[:200]}..."
