"""A saved folder that lies on the hub, as hf-hub:ORG/NAME or hf-hub:ORG/NAME@REVISION names it."""

from pathlib import Path

from armour_surgery.hosts.hub import fetch_file, repository_of
from armour_surgery.saving.staging import PLAN, WEIGHTS

__all__ = ["folder_of_plan", "whole_folder"]


def folder_of_plan(name: str) -> Path | None:
    """A folder in the hub's cache with the `surgery.json` of a repository; None where it has none, or for other names.

    Raises:
        UnknownModelError: there is no such repository or revision, or none that may be read.
        HubUnreachableError: it is not in the cache and the hub did not answer.
    """
    found = repository_of(name)
    if found is None:
        return None
    repo, revision = found
    plan = fetch_file(repo, PLAN, revision)
    return plan.parent if plan is not None else None


def whole_folder(name: str) -> Path | None:
    """The same with the weights, if the repository has them, all of one commit.

    Raises:
        UnknownModelError, HubUnreachableError: see `folder_of_plan`.
    """
    found, folder = repository_of(name), folder_of_plan(name)
    if found is None or folder is None:
        return None
    # Not `snapshot_download`: without a network it takes a folder with the plan alone for the whole. And the branch may
    # move between two downloads, while the commit, as which the folder is called, does not.
    fetch_file(found[0], WEIGHTS, folder.name)
    return folder
