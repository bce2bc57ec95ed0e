"""The license in a card: found where it is, written where it is not, and never replaced."""

from dataclasses import replace

import pytest
import yaml
from calibrated_plans import calibrated_plan
from small_models import refused

from armour_surgery.errors import LicenseError, UsageError
from armour_surgery.records import Source
from armour_surgery.saving.licenses import check_license, license_lines, license_of, split_card, with_license
from armour_surgery.saving.model_card import model_card, named


def card(head: str) -> str:
    return f"---\n{head}\n---\n# model\n\nLicense of the base model: unknown.\n"


@pytest.mark.parametrize(
    ("head", "found"),
    [
        ("license: mit", "mit"),
        ("license: 'MIT'", "MIT"),
        ("tags: [a]\nlicense:   apache-2.0  # the base's", "apache-2.0"),
        ("license:\n- mit\n- apache-2.0", "mit, apache-2.0"),
        ("license: other\nlicense_name: dinov3-license", "dinov3-license"),
        ("license: other", None),
        ("license: other\nlicense_name: unknown", None),
        ("license: unknown", None),
        ("license:", None),
        ("license: ''", None),
        ("license: []", None),
        ("license: [mit, other]", None),
        ("tags: [license]", None),
        ("- license: mit", None),
        ("", None),
    ],
)
def test_what_metadata_says(head: str, found: str | None) -> None:
    assert license_of(card(head)) == found
    assert license_of(card(head).replace("\n", "\r\n")) == found


def test_cards_without_metadata() -> None:
    for text in ("", "# model\n", "license: mit\n", "# a\n---\nlicense: mit\n---\n", "---\nlicense: mit\n"):
        assert license_of(text) is None
    assert split_card("---\n---\ntext") == ("", "text")


def test_metadata_that_is_no_yaml() -> None:
    assert "is not YAML" in refused(LicenseError, lambda: license_of(card("license: [mit")))


@pytest.mark.parametrize(
    "head",
    [
        "",
        "license: other",
        "license: unknown\nlibrary_name: armour-surgery",
        "library_name: armour-surgery\nlicense: other\nlicense_name: unknown\ntags: [a, b]",
        "'license': other\ntags:\n- a\n- b",
        "license:\n  - other\ntags:\n  - a",
        "license_link: https://x\nlanguage: en\nlicense:\n\n# of the base\n",
    ],
)
@pytest.mark.parametrize("name", ["mit", "dinov3-license"])
def test_it_is_written_where_it_is_missing(head: str, name: str) -> None:
    made = with_license(card(head), name)
    assert license_of(made) == name
    before, after = yaml.safe_load(head) or {}, yaml.safe_load(split_card(made)[0] or "")
    drop = ("license", "license_name", "license_link")
    assert {key: value for key, value in after.items() if key not in drop} == {
        key: value for key, value in before.items() if key not in drop
    }
    assert split_card(made)[1] == f"# model\n\nLicense of the base model: {name}.\n"
    assert with_license(made, name) == made


def test_a_card_without_metadata_gets_some() -> None:
    assert with_license("# mine\n", "mit") == "---\nlicense: mit\n---\n# mine\n"


def test_another_license_stays() -> None:
    message = refused(LicenseError, lambda: with_license(card("license: cc-by-nc-4.0"), "mit"))
    assert "is cc-by-nc-4.0, and --license mit does not replace it" in message


def test_metadata_that_nothing_can_be_written_into() -> None:
    """One line in braces is YAML too."""
    message = refused(LicenseError, lambda: with_license(card("{license: other}"), "mit"))
    assert "by hand" in message


@pytest.mark.parametrize("name", ["", " ", "other", "Unknown", "none", "two words", "mit\nevil: yes", "-x", "a: b"])
def test_what_is_no_name_of_a_license(name: str) -> None:
    assert "is no name of a license" in refused(UsageError, lambda: check_license(name))


def test_names_of_licenses() -> None:
    assert [check_license(name) for name in ("MIT", " apache-2.0 ", "dinov3-license")] == [
        "mit",
        "apache-2.0",
        "dinov3-license",
    ]
    assert license_lines("Apache-2.0") == ["license: apache-2.0"]
    assert license_lines("unknown") == license_lines(None) == ["license: other"]
    evil = 'x"\nlicense: mit'
    assert yaml.safe_load("\n".join(license_lines(evil))) == {"license": "other", "license_name": evil}


@pytest.mark.parametrize(
    ("license", "found", "said"),
    [
        ("apache-2.0", "apache-2.0", "apache-2.0"),
        # As timm has it for weights of which nobody knows, and for those whose license the hub does not list.
        ("unknown", None, "unknown"),
        ("dinov3-license", "dinov3-license", "dinov3-license"),
        (None, None, "unknown"),
    ],
)
def test_the_card_of_a_model_names_what_its_plan_does(license: str | None, found: str | None, said: str) -> None:
    source = Source("timm", "vit", {}, {}, "vit", None, license)
    text = model_card(replace(calibrated_plan(), source=source), "x")
    assert license_of(text) == found
    assert f"License of the base model: {said}." in text


def test_a_card_gets_another_name_for_the_folder() -> None:
    text = model_card(calibrated_plan(), 'a "b" \\1')
    moved = named(text, "hf-hub:me/x")
    assert 'model = load("hf-hub:me/x")  #' in moved
    assert named(moved, 'a "b" \\1') == text
    assert named("no such line", "x") == "no such line"
