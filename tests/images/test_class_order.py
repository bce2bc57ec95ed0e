"""Folders are the classes that they are called after; what contradicts that is refused, and a guess is said."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from armour_surgery.errors import DataError, UsageError
from armour_surgery.hosts.class_names import ClassNames
from armour_surgery.images.class_map import read_class_map
from armour_surgery.images.class_order import ClassOrder, class_order, in_order
from armour_surgery.images.sources import Pictures, held_out


def pictures(*folders: str, by_folder: bool = True) -> Pictures:
    """Two images in each folder."""

    def read(index: int) -> tuple[Image.Image, int]:
        return Image.new("L", (2, 2)), index // 2

    return Pictures("pets", 2 * len(folders), read, str, tuple(folders), by_folder=by_folder)


def known(*names: str, said: bool = True) -> ClassNames:
    return ClassNames(names, ((),) * len(names), said)


def order(folders: tuple[str, ...], names: ClassNames | None, classes: int | None = None, **options: Any) -> ClassOrder:
    return class_order(pictures(*folders), names, classes or len(folders), options.get("class_map"))


def refused(folders: tuple[str, ...], names: ClassNames | None, classes: int | None = None, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        order(folders, names, classes, **options)
    assert "pets" in str(caught.value) or "--class-map" in str(caught.value)
    return str(caught.value)


def test_folders_are_the_classes_that_they_are_called_after() -> None:
    found = order(("ant", "bee", "cat_fish"), known("bee", "Cat Fish", "ant"))
    assert (found.numbers, found.names, found.way) == ((2, 0, 1), ("bee", "Cat Fish", "ant"), "names")
    assert found.note("pets") == ""
    images = in_order(pictures("ant", "bee", "cat_fish"), found)
    assert [images.read(index)[1] for index in range(6)] == [2, 2, 0, 0, 1, 1]
    assert images.classes == found.names
    training, judged = held_out(images, 2)
    assert sorted(part.read(index)[1] for part in (training, judged) for index in range(len(part))) == [
        0,
        0,
        1,
        1,
        2,
        2,
    ]


def test_some_names_that_match_and_others_that_do_not_are_refused() -> None:
    said = refused(("ant", "bee", "wasp"), known("ant", "bee", "cow"))
    assert "1 of the 3 class folders of pets have names that the model does not have (wasp; " in said
    assert "the names there are ant, bee, cow" in said
    assert "--class-map FILE" in said
    assert "3 of the 3" in refused(("x", "y", "z"), known("ant", "bee", "cow"))
    assert "the folders 'Ant' and 'ant', and to the model both are class 0" in refused(
        ("Ant", "ant"), known("ANT", "bee")
    )


def test_another_number_of_classes_is_refused_and_what_lacks_is_named() -> None:
    said = refused(("ant", "bee"), known("ant", "bee", "cow"), 3)
    assert "has 2 classes and the model's head has 3: there is no folder for cow; " in said
    assert "--class-map FILE" in said
    assert "has 2 classes and the model's head has 3; name the data" in refused(
        ("ant", "wasp"), known("ant", "b", "c"), 3
    )
    assert "has 3 classes and the model's head has 2; name the data" in refused(("a", "b", "c"), None, 2)


def test_where_nothing_is_known_folders_count_in_their_order_and_it_is_said() -> None:
    found = order(("ant", "bee", "cow", "dog"), None)
    assert (found.numbers, found.way) == ((0, 1, 2, 3), "folders")
    note = found.note("pets")
    assert "the folders of pets count as its classes 0 to 3 in the order of their names: ant, bee, cow, ...; " in note
    assert "--class-map FILE" in note
    assert "in which timm sorts, c10 comes elsewhere" in order(("c1", "c10", "c2"), None).note("pets")
    # As many classes as ImageNet has are a guess.
    assert order(("ant", "wasp"), known("ant", "bee", said=False)).way == "folders"
    assert order(("bee", "ant"), known("ant", "bee", said=False)).numbers == (1, 0)


def test_labels_that_are_numbers_stay() -> None:
    images = pictures("0", "1", by_folder=False)
    found = class_order(images, known("b", "a"), 2, None)
    assert (found.numbers, found.way, found.note("x")) == ((0, 1), "numbers", "")
    assert in_order(images, found) is images
    with pytest.raises(UsageError, match="labels of pets are numbers"):
        class_order(images, None, 2, Path("map.txt"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("map.txt", "bee\ncow\nant\n"),
        ("map.txt", "\ufeffbee\r\n cow \r\nant\r\n\r\n"),
        ("names.list", "bee\ncow\nant"),
        ("map.json", '["bee", "cow", "ant"]'),
        ("map.json", '{"ant": 2, "bee": 0, "cow": 1}'),
        ("map.json", '{"0": "bee", "1": "cow", "2": "ant"}'),
    ],
)
def test_class_maps(name: str, content: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    assert read_class_map(path, 3) == {"bee": 0, "cow": 1, "ant": 2}
    # They win over what the model says.
    found = order(("ant", "bee", "cow"), known("ant", "bee", "cow"), class_map=path)
    assert (found.numbers, found.names, found.way) == ((2, 0, 1), ("bee", "cow", "ant"), "class map")
    # A class may have no folder.
    assert order(("Ant",), None, 3, class_map=path).numbers == (2,)
    assert "1 of the 2 class folders of pets have names that --class-map" in refused(
        ("ant", "wasp"), None, 3, class_map=path
    )


def test_a_class_map_need_not_name_all_and_may_name_one_twice(tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    path.write_text(json.dumps({"hound": 7, "dog": 7, "cat": 2}), encoding="utf-8")
    found = order(("cat", "dog"), None, 10, class_map=path)
    assert found.numbers == (2, 7)
    assert (found.names[7], found.names[3]) == ("hound", "3")
    assert "both are class 7" in refused(("dog", "hound"), None, 10, class_map=path)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("map.txt", b"ant\nbee\n", "has 2 names, and the model 3 classes"),
        ("map.txt", b"ant\n\nbee\n", "'' for the name of class 1"),
        ("map.txt", b"ant\nbee\nant\n", "names 'ant' for the classes 0 and 2"),
        ("map.txt", b"", "has 0 names"),
        ("map.txt", b"\x80\x02\xff", "cannot be read"),
        ("map.json", b"{", "not readable JSON"),
        ("map.json", b"3", "holds int, and no names"),
        ("map.json", b"{}", "holds dict, and no names"),
        ("map.json", b"[1, 2, 3]", "1 for the name of class 0"),
        ("map.json", b'{"ant": 3}', "gives 'ant' the index 3, and the model's 3 classes are 0 to 2"),
        ("map.json", b'{"ant": -1}', "index -1"),
        ("map.json", b'{"ant": true}', "index True"),
        ("map.json", b'{"ant": 0.5}', "index 0.5"),
        ("map.json", b'{"ant": 0, "bee": "1"}', "index '1'"),
        ("map.json", b'{"x": "ant"}', "'x' for a number"),
        ("map.json", b'{"0": "ant", "1": "ant"}', "'ant' twice"),
    ],
)
def test_class_maps_that_are_none(name: str, content: bytes, told: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_class_map(path, 3)
    assert told in str(caught.value)
    assert str(path) in str(caught.value)
    assert "write one class name a line" in str(caught.value)


def test_class_maps_that_are_not_there(tmp_path: Path) -> None:
    for path in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(DataError, match=r"--class-map \S+ cannot be read"):
            read_class_map(path, 3)
    large = tmp_path / "large.txt"
    with large.open("wb") as stream:
        stream.truncate(2**24 + 1)
    with pytest.raises(DataError, match="more than 16 MiB"):
        read_class_map(large, 3)
