"""Natural photos without a data set: about a hundred to calibrate with and about a hundred others to test on.

    apt-get download gcompris-qt-data && dpkg -x gcompris-qt-data_*.deb gcompris
    pip install scikit-image scikit-learn
    python benchmarks/photos.py gcompris photos

writes photos/calib and photos/test. Most come from the Debian package gcompris-qt-data (animals, monuments, fish,
windmills, tools; free licenses, listed in its copyright file), the rest are the samples of scikit-image and
scikit-learn, which are only tested on. No photo, and no monument, is in both.
"""

import argparse
import struct
import sys
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

# Resource files of the package, the folders in them, and where their photos go: one folder, or in turns by name.
ACTIVITIES = "usr/share/gcompris-qt/rcc"
SERIES = {
    "erase": {"resource": ("calib", "test")},
    "explore_farm_animals": {"resource/animals": ("calib",)},
    "explore_world_animals": {"resource/animals": ("test",)},
    "explore_monuments": {
        "resource/egypt": ("calib",),
        "resource/france": ("calib",),
        "resource/germany": ("calib",),
        "resource/usa": ("calib",),
        "resource/india": ("test",),
        "resource/wonders": ("test",),
    },
    "categorization": {
        "resource/images/fishes": ("calib", "test"),
        "resource/images/renewable": ("calib", "test"),
        "resource/images/tools": ("calib", "test"),
        "resource/images/others": ("calib", "test"),
    },
    "explore_world_music": {"resource/music": ("calib", "test")},
    "clickgame": {"resource": ("calib", "test")},
}
SAMPLES = {
    "skimage.data": ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg"),
    "sklearn.datasets.images": ("china.jpg", "flower.jpg"),
}
# Drawings and icons are smaller than any of the photos.
SMALLEST = 8000


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("package", type=Path, help="folder into which gcompris-qt-data was unpacked")
    parser.add_argument("out", type=Path, help="folder for calib/ and test/; nothing may be in them")
    options = parser.parse_args()
    for split in ("calib", "test"):
        folder = options.out / split
        if folder.exists() and any(folder.iterdir()):
            raise SystemExit(f"error: {folder} is not empty; remove it or name another folder")
        folder.mkdir(parents=True, exist_ok=True)
    counts = {"calib": 0, "test": 0}
    for split, name, content in [*package_photos(options.package), *samples()]:
        (options.out / split / name).write_bytes(content)
        counts[split] += 1
    print(", ".join(f"{count} photos in {options.out / split}" for split, count in counts.items()))


def package_photos(package: Path) -> Iterator[tuple[str, str, bytes]]:
    """Split, file name and content of every photo of the Debian package."""
    for activity, folders in SERIES.items():
        path = package / ACTIVITIES / f"{activity}.rcc"
        if not path.is_file():
            raise SystemExit(f"error: {path} does not exist; unpack gcompris-qt-data there (dpkg -x)")
        content = dict(resources(path.read_bytes()))
        for folder, splits in folders.items():
            prefix = f"/gcompris/src/activities/{activity}/{folder}/"
            chosen = [
                name
                for name in sorted(content)
                if name.startswith(prefix)
                and "/" not in name.removeprefix(prefix)
                and name.endswith(".webp")
                and len(content[name]) >= SMALLEST
            ]
            if not chosen:
                raise SystemExit(f"error: {path} has no photos in {folder}; GCompris 3.1 has, other versions may not")
            for index, name in enumerate(chosen):
                kind = folder.removeprefix("resource").strip("/").replace("/", "-")
                file = "-".join(part for part in (activity, kind, Path(name).name) if part)
                yield splits[index % len(splits)], file, content[name]


def resources(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Path and content of every file in a Qt resource file that holds them as they are (photos do not compress)."""
    if data[:4] != b"qres":
        raise SystemExit("error: this is not a Qt resource file; GCompris keeps its images in .rcc files")
    version, tree, contents, names = struct.unpack(">4I", data[4:20])
    node_size = 14 if version == 1 else 22

    def walk(index: int, above: str) -> Iterator[tuple[str, bytes]]:
        start = tree + index * node_size
        name_at, flags = struct.unpack(">IH", data[start : start + 6])
        path = f"{above}/{text(names + name_at)}" if index else ""
        if flags & 2:  # a folder: how many children, and the first of them
            count, first = struct.unpack(">2I", data[start + 6 : start + 14])
            for child in range(first, first + count):
                yield from walk(child, path)
        elif not flags & 5:  # not compressed
            place = contents + struct.unpack(">I", data[start + 10 : start + 14])[0]
            size = struct.unpack(">I", data[place : place + 4])[0]
            yield path, data[place + 4 : place + 4 + size]

    def text(place: int) -> str:
        length = struct.unpack(">H", data[place : place + 2])[0]
        return data[place + 6 : place + 6 + 2 * length].decode("utf-16-be")

    return walk(0, "")


def samples() -> Iterator[tuple[str, str, bytes]]:
    """Split, file name and content of the photos inside Python packages."""
    for module, names in SAMPLES.items():
        try:
            folder = files(module)
        except ModuleNotFoundError:
            print(f"without the photos of {module.partition('.')[0]}, which is not installed", file=sys.stderr)
            continue
        for name in names:
            yield "test", f"{module.partition('.')[0]}-{name}", folder.joinpath(name).read_bytes()


if __name__ == "__main__":
    main()
