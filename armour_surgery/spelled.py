"""Counts, changes and names as people read them: on a terminal, on a page, in a figure."""

import os
import re
from collections.abc import Sequence

__all__ = ["MLP", "change", "grouped_names", "last_name", "millions", "names_only", "short_names", "shortened", "way"]

# What an MLP with fewer hidden channels has in the place of a mode.
MLP = "mlp"

# How timm's names of datasets begin; they have slashes and are no paths.
_DATASET = re.compile(r"(?:hfds|hfids|tfds|wds|torch)/", re.IGNORECASE)


def change(before: float, after: float, of_nothing: str = "-") -> str:
    """A relative change in percent; `of_nothing` where there was nothing before."""
    return f"{100 * (after - before) / before:+.1f} %" if before else of_nothing


def millions(count: int, digits_of_billions: int = 4) -> str:
    """A count in millions or billions, as papers print it."""
    return f"{count / 1e9:,.{digits_of_billions}f} G" if count >= 1e9 else f"{count / 1e6:,.3f} M"


def way(mode: str, rank: int | None, separator: str = ", ") -> str:
    """How a site is converted: the mode, and the rank where the site has fewer channels than it could.

    Of an MLP it is how many hidden channels stay.
    """
    if mode == MLP:
        return f"{rank} hidden channels"
    return f"{mode}{separator}rank {rank}" if rank is not None else mode


def grouped_names(names: Sequence[str]) -> str:
    """`blocks.0.attn`, `blocks.1.attn`, ... as `blocks.0-1.attn`; numbers that are not in a row stay a list."""
    # Names with the same text between their numbers belong together.
    groups: dict[tuple[str, ...], list[tuple[int, ...]]] = {}
    for name in names:
        texts = tuple(re.split(r"\d+", name))
        numbers = tuple(map(int, re.findall(r"\d+", name)))
        groups.setdefault(texts, []).append(numbers)
    return ", ".join(_group_name(texts, numbers) for texts, numbers in groups.items())


def _group_name(texts: tuple[str, ...], numbers: list[tuple[int, ...]]) -> str:
    """One name for a group. `texts` are what is before, between and after the numbers that each of its names has."""
    name = texts[0]
    for text, values in zip(texts[1:], zip(*numbers, strict=True), strict=True):
        name += _spans(sorted(set(values))) + text
    return name


def _spans(values: list[int]) -> str:
    """`0-2,5` for 0, 1, 2, 5."""
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def short_names(fqns: Sequence[str]) -> tuple[list[str], str]:
    """What tells names apart, and the pattern of the rest: `blocks.0.attn`, ... are `0`, ... of `blocks.*.attn`."""
    if len(fqns) > 1:
        # Text and numbers take turns: `blocks.0.attn` is `blocks.`, `0`, `.attn`.
        splits = [re.split(r"(\d+)", name) for name in fqns]
        texts = {tuple(parts[::2]) for parts in splits}
        if len(texts) == 1:
            return _short_numbers(splits)
        labels, pattern = _short_paths([name.split(".") for name in fqns])
        if pattern != "*":
            return labels, pattern
    return list(fqns), "attention"


def _short_numbers(splits: list[list[str]]) -> tuple[list[str], str]:
    """Names that differ in numbers alone; in each split these have the odd places."""
    pattern = list(splits[0])
    varying: list[tuple[str, ...]] = []
    for place, column in enumerate(zip(*splits, strict=True)):
        if place % 2 and len(set(column)) > 1:
            pattern[place] = "*"
            varying.append(column)
    labels = map(".".join, zip(*varying, strict=True)) if varying else [""] * len(splits)
    return list(labels), "".join(pattern)


def _short_paths(paths: list[list[str]]) -> tuple[list[str], str]:
    """Names that differ in words: what all begin and end with goes into the pattern."""
    # Something is left of every name, even of one that is the beginning of all others.
    room = min(map(len, paths)) - 1
    start = _common(paths, room)
    end = _common([path[::-1] for path in paths], room - start)
    labels = [".".join(path[start : len(path) - end]) for path in paths]
    first = paths[0]
    return labels, ".".join([*first[:start], "*", *first[len(first) - end :]])


def _common(paths: list[list[str]], most: int) -> int:
    """With how many equal words the paths begin, `most` at most."""
    count = 0
    while count < most and len({path[count] for path in paths}) == 1:
        count += 1
    return count


def shortened(text: str, width: int) -> str:
    """A text of at most `width` letters, with an ellipsis in or near its middle where it is longer.

    The ends of a module's name say more than its middle, and its numbers most: `encoder.la…0-11.attention`.
    """
    if len(text) <= width:
        return text
    left_out = len(text) - width + 1
    middle = width / 2 - 0.5

    def price(start: int) -> tuple[int, float]:
        gone = text[start : start + left_out]
        return sum(map(str.isdigit, gone)), abs(start - middle)

    start = min(range(1, width - 1), key=price, default=0)
    return f"{text[:start]}\u2026{text[start + left_out :]}"


def names_only(text: str) -> str:
    """A text from a command line without where files lie on this machine: of every path in it the last name.

    `hf:/home/me/vit` is `hf:vit`, and `/home/me/photos,synthetic` is `photos,synthetic`. What libraries and the hub
    call things (`hf:google/vit-base`, `hfds/ORG/NAME`) stays.
    """
    pieces = re.split(r"([:,;=])", text)
    return "".join(last_name(piece) if _is_path(piece) else piece for piece in pieces)


def _is_path(piece: str) -> bool:
    if not re.search(r"[/\\]", piece) or _DATASET.match(piece):
        return False
    # One slash may stand between an owner and a name of the hub, unless there is such a file here.
    return not re.fullmatch(r"[^./~\\][^/\\]*/[^/\\]+", piece) or os.path.exists(piece)


def last_name(path: str) -> str:
    """What a file or folder is called, however the way to it is written."""
    return re.split(r"[/\\]+", path.rstrip("/\\"))[-1] or path
