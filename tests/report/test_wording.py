"""What is said of a converted model follows from what was measured, and says on what."""

from dataclasses import replace

import pytest
from calibrated_plans import calibrated_plan
from page_by_hand import Page

from armour_surgery.records import Fidelity
from armour_surgery.report.page import html_report
from armour_surgery.report.wording import ENOUGH_IMAGES, GRADES, measured_on, verdict
from armour_surgery.saving.model_card import model_card

AS_IT_IS = "can be used as it is"


def fidelity(
    cosine: float = 0.999, agreement: float | None = None, images: int = 32, source: str = "photos"
) -> Fidelity:
    return Fidelity(images, source, cosine, 20.0, agreement)


@pytest.mark.parametrize(
    ("cosine", "agreement", "said"),
    [
        (1.0, 100.0, AS_IT_IS),
        (0.99, None, AS_IT_IS),
        (0.99, 95.0, AS_IT_IS),
        (0.999, 94.0, "evaluate it before you use it"),
        (0.9899, 100.0, "some accuracy may be lost"),
        (0.95, None, "close to the original"),
        (0.96, 80.0, "resembles the original"),
        (0.94, 100.0, "fine-tune it before you use it"),
        (0.8, None, "resembles the original"),
        (0.99, 10.0, "needs training"),
        (0.79, None, "needs training"),
        (-0.2, 0.0, "needs training"),
        (float("nan"), None, "needs training"),
    ],
)
def test_the_grade_follows_from_both_numbers(cosine: float, agreement: float | None, said: str) -> None:
    text = verdict(fidelity(cosine, agreement))
    assert said in text
    assert (AS_IT_IS in text) is (said == AS_IT_IS)


def test_grades_go_from_near_to_far() -> None:
    assert sorted(GRADES, key=lambda grade: -grade.cosine) == list(GRADES)
    assert sorted(GRADES, key=lambda grade: -grade.agreement) == list(GRADES)


@pytest.mark.parametrize(
    ("images", "source", "said"),
    [
        (ENOUGH_IMAGES - 1, "photos", "so few images can tell (15)"),
        (1, "synthetic", "so few images can tell (1)"),
        (ENOUGH_IMAGES, "synthetic", "On drawn images"),
        (ENOUGH_IMAGES, "synthetic,photos", AS_IT_IS),
        (ENOUGH_IMAGES, "images given in Python", AS_IT_IS),
    ],
)
def test_few_images_and_drawn_ones_are_no_proof(images: int, source: str, said: str) -> None:
    text = verdict(fidelity(images=images, source=source))
    assert said in text
    assert (AS_IT_IS in text) is (said == AS_IT_IS)


@pytest.mark.parametrize(
    ("images", "source", "said"),
    [
        (32, "synthetic", "32 held-out images, drawn and no photos"),
        (32, "/home/me/photos", "32 held-out images (photos)"),
        (1, "photos", "1 held-out image (photos)"),
        (16, "/data/photos,synthetic", "16 held-out images (photos, drawn ones)"),
        (16, "images given in Python", "16 held-out images (images given in Python)"),
    ],
)
def test_what_it_was_measured_on_is_said(images: int, source: str, said: str) -> None:
    assert measured_on(fidelity(images=images, source=source)) == said


@pytest.mark.parametrize("cosine", [0.999, 0.96, 0.85, 0.2])
def test_card_and_page_say_the_same(cosine: float) -> None:
    near = fidelity(cosine, source="/home/me/photos")
    plan = replace(calibrated_plan(0.1), fidelity=near)
    for text in (model_card(plan, "x"), Page(html_report(plan, "x")).text):
        assert verdict(near) in text
        assert "32 held-out images (photos)" in text
        assert "/home/me" not in text
