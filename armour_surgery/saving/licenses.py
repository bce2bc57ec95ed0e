"""The license of the base model, as a model card names it: in the metadata that the hub reads, and in a sentence."""

import json
import re
from contextlib import suppress
from typing import Any

import yaml

from armour_surgery.errors import LicenseError, UsageError

__all__ = ["check_license", "known", "license_lines", "license_of", "license_sentence", "split_card", "with_license"]

# https://huggingface.co/docs/hub/repositories-licenses. A card with any other word is refused; what is not here goes by
# "other" and a name, which the hub always takes, so that the list may be behind.
_WORDS = """
afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5
cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0
cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 etalab-2.0
eupl-1.1 eupl-1.2 fair-noncommercial-research-license gemma gfdl gpl gpl-2.0 gpl-3.0 h-research intel-research isc
lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 lppl-1.3c mit mpl-2.0 ms-pl ncsa
odbl odc-by ofl-1.1 openmdw-1.0 openrail openrail++ osl-3.0 pddl postgresql unlicense wtfpl zlib
"""
HUB_LICENSES = frozenset(_WORDS.split())
# Words that stand where a license is missing. timm has "unknown" for some of its weights.
NO_LICENSE = frozenset(["", "none", "other", "unknown"])
# Keys of the metadata that are about it.
KEYS = ("license", "license_name", "license_link")
SENTENCE = "License of the base model: "


def known(name: str | None) -> str | None:
    """The license's name, or None for a word that stands where there is none."""
    return None if name is None or name.strip().lower() in NO_LICENSE else name.strip()


def check_license(name: str) -> str:
    """What a user calls a license, as cards have it.

    Raises:
        UsageError: it is no name of one.
    """
    lower = name.strip().lower()
    if known(lower) is None or not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", lower):
        raise UsageError(
            f"--license {name!r} is no name of a license; write one of https://huggingface.co/docs/hub/"
            "repositories-licenses, such as apache-2.0, or the license's own, such as dinov3-license"
        )
    return lower


def license_lines(name: str | None) -> list[str]:
    """The lines of a card's metadata for a license, known to the hub or not, or for none."""
    found = known(name)
    if found is None:
        return ["license: other"]
    if found.lower() in HUB_LICENSES:
        return [f"license: {found.lower()}"]
    # The name may come from a file, and JSON's strings are YAML's too.
    return ["license: other", f"license_name: {json.dumps(found)}"]


def license_sentence(name: str | None) -> str:
    """The sentence of a card about it."""
    return f"{SENTENCE}{known(name) or 'unknown'}."


def split_card(card: str) -> tuple[str | None, str]:
    """The metadata of a card without its fences, None where there is none, and the text."""
    found = re.match(r"\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", card, re.DOTALL | re.MULTILINE)
    return (found[1], card[found.end() :]) if found else (None, card)


def license_of(card: str) -> str | None:
    """The license that the metadata of a card names; None where it names none.

    Raises:
        LicenseError: the metadata cannot be read.
    """
    head, _ = split_card(card)
    try:
        metadata: Any = yaml.safe_load(head or "")
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise LicenseError(f"the metadata of README.md, between its lines ---, is not YAML: {reason}") from error
    if not isinstance(metadata, dict):
        return None
    named = metadata.get("license")
    if named == "other":
        named = metadata.get("license_name")
    names = [known(str(name)) for name in (named if isinstance(named, list) else [named])]
    return ", ".join(filter(None, names)) if names and all(names) else None


def with_license(card: str, name: str) -> str:
    """The card with a license in it, in the metadata and in the sentence, where it names none or this one.

    Raises:
        LicenseError: the card names another, or its metadata is written so that nothing can be added to it.
    """
    there = license_of(card)
    if there is not None and there.lower() != name:
        raise LicenseError(
            f"README.md says that the license is {there}, and --license {name} does not replace it; leave --license "
            "out, or correct README.md"
        )
    if there is not None:
        return card
    head, text = split_card(card)
    lines = [*license_lines(name), *_without_license(head or "")]
    said = re.sub(rf"^{re.escape(SENTENCE)}unknown\.$", license_sentence(name), text, flags=re.MULTILINE)
    made = "\n".join(["---", *lines, "---", said])
    with suppress(LicenseError):
        if license_of(made) is not None:
            return made
    raise LicenseError(
        f"license: {name} could not be added to the metadata of README.md; write it between its lines --- by hand"
    )


def _without_license(head: str) -> list[str]:
    """The lines of the metadata but those about the license, with what belongs to each: what is indented, or a list."""
    kept, dropping = [], False
    for line in head.splitlines():
        if re.match(r"[^\s#-]", line):
            dropping = line.partition(":")[0].strip(" \"'") in KEYS
        if not dropping:
            kept.append(line)
    return kept
