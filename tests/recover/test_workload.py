"""A plan of batches and steps that does not come out even says so."""

import pytest
from pictures import numbered, stream

from armour_surgery.errors import DataError, UsageError
from armour_surgery.recover.loading import Layout
from armour_surgery.recover.recipe_files import load_recipe
from armour_surgery.recover.workload import count_steps, make_layout


def test_a_plan_that_does_not_come_out_even_says_so() -> None:
    def recipe(*settings: str) -> "object":
        return load_recipe("recover", settings)

    layout = make_layout(recipe("data.batch_size=24", "data.micro_batch=4"), 1, 2)  # type: ignore[arg-type]
    assert layout == Layout(24, 4, 3, 1, 2)
    for settings_, world, text in (
        (["data.batch_size=5"], 2, "does not divide among 2 processes"),
        (["data.batch_size=8", "data.micro_batch=8"], 2, "does not divide the 4 images"),
        (["data.batch_size=3", "augment.mixup=0.8"], 1, "make data.micro_batch even"),
    ):
        with pytest.raises(UsageError, match=text):
            make_layout(recipe(*settings_), 0, world)  # type: ignore[arg-type]
    per_epoch = "data.images_per_epoch=null"
    assert count_steps(numbered(33), recipe(per_epoch)) == 4  # type: ignore[arg-type]
    with pytest.raises(DataError, match="has 5 images to train on"):
        count_steps(numbered(5), recipe(per_epoch))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="data.images_per_epoch=N"):
        count_steps(stream(None), recipe(per_epoch))  # type: ignore[arg-type]
