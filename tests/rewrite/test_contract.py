"""Passes are held to what they promise, and a broken promise is told."""

import itertools
from dataclasses import replace

import pytest
import torch
from own_attentions import Plain, UsesPacked, Wide, surgery_on, traced_of

from armour_surgery.errors import PostconditionError
from armour_surgery.modes import get_mode
from armour_surgery.rewrite import rewrite
from armour_surgery.rewrite.add_grouped_projection_pass import AddGroupedProjectionPass
from armour_surgery.rewrite.contract import Part, Surgery, parts_of, run_passes
from armour_surgery.rewrite.edits import KeepRows
from armour_surgery.rewrite.mask_diagonal_pass import MaskDiagonalPass
from armour_surgery.rewrite.narrow_projections_pass import NarrowProjectionsPass
from armour_surgery.rewrite.remove_dead_nodes_pass import RemoveDeadNodesPass
from armour_surgery.rewrite.restore_channels_pass import RestoreChannelsPass
from armour_surgery.rewrite.share_roles_pass import ShareRolesPass

# Parts.


@pytest.mark.parametrize(
    ("names", "own", "sizes", "expected"),
    [
        (("q",), "v", {"q": 4, "v": 4}, [("q", 0, 4)]),
        (("q", "v"), "v", {"q": 4, "v": 8}, [("q", 0, 4), ("v", 4, 8)]),
        (("q", "k", "v"), "v", {"q": 4, "k": 4, "v": 8}, [("q", 0, 4), ("k", 0, 4)]),
        (("q", "k", "v"), "v", {"q": 4, "k": 4, "v": 11}, [("q", 0, 4), ("k", 0, 4), ("v", 8, 11)]),
        (("q", "grouped"), "v", {"q": 4, "v": 8}, [("q", 0, 4), ("grouped", 4, 8)]),
        (("k",), "k", {"k": 6}, [("k", 0, 6)]),
        (("q",), "v", {"q": 4, "v": 6}, [("q", 0, 4), ("v", 4, 6)]),
    ],
)
def test_parts_fill_a_role(
    names: tuple[str, ...], own: str, sizes: dict[str, int], expected: list[tuple[str, int, int]]
) -> None:
    assert parts_of(names, own, sizes) == tuple(Part(*part) for part in expected)


class Claims:
    """A pass that says something about itself, and does what it is told."""

    def __init__(self, claim: bool, act: bool) -> None:
        self.claim, self.act = claim, act

    def requires(self, surgery: Surgery) -> None: ...

    def __call__(self, surgery: Surgery) -> bool:
        if self.act:
            surgery.graph.call_function(torch.add, (1, 2))
        return self.claim

    def ensures(self, surgery: Surgery) -> None: ...


# Promises.


@pytest.mark.parametrize(("claim", "act"), list(itertools.product([False, True], repeat=2)))
def test_a_pass_that_misreports_is_caught(claim: bool, act: bool) -> None:
    surgery = surgery_on(Plain(), "qv")
    if claim == act:
        run_passes(surgery, [Claims(claim, act)])
    else:
        with pytest.raises(PostconditionError, match="Claims misreported whether it changed the graph"):
            run_passes(surgery, [Claims(claim, act)])


def test_grouped_needs_a_plain_projection() -> None:
    surgery = surgery_on(Wide(), "grouped")
    AddGroupedProjectionPass().requires(surgery)
    role = surgery.traced.v
    surgery.traced = replace(surgery.traced, v=replace(role, producer=replace(role.producer, plain=False)))
    with pytest.raises(PostconditionError, match="qkv has no grouped form"):
        AddGroupedProjectionPass().requires(surgery)


def test_a_grouped_part_has_to_be_made() -> None:
    surgery = surgery_on(Wide(), "grouped")
    with pytest.raises(PostconditionError, match="the grouped projection was not added"):
        AddGroupedProjectionPass().ensures(surgery)
    with pytest.raises(PostconditionError, match="grouped was asked for and not made"):
        ShareRolesPass().requires(surgery)
    assert AddGroupedProjectionPass()(surgery)
    AddGroupedProjectionPass().ensures(surgery)
    ShareRolesPass().requires(surgery)


def test_channels_have_to_be_there() -> None:
    surgery = surgery_on(Plain(), "qv")
    role = surgery.traced.v
    surgery.traced = replace(surgery.traced, v=replace(role, producer=replace(role.producer, channels=20)))
    with pytest.raises(PostconditionError, match="channels of v exceed those of qkv"):
        NarrowProjectionsPass().requires(surgery)


def test_no_row_is_kept_twice() -> None:
    surgery = surgery_on(Plain(), "qv")
    surgery.edits.append(KeepRows(("qkv.weight",), (), (0, 1, 1)))
    with pytest.raises(PostconditionError, match=r"qkv\.weight would keep a row twice"):
        NarrowProjectionsPass().ensures(surgery)


def test_no_anchor_is_read_after_sharing() -> None:
    surgery = surgery_on(Plain(), "qv")
    NarrowProjectionsPass()(surgery)
    with pytest.raises(PostconditionError, match=r"still feeds"):
        ShareRolesPass().ensures(surgery)
    ShareRolesPass()(surgery)
    ShareRolesPass().ensures(surgery)


def test_restoring_needs_channels_on_one_axis() -> None:
    surgery = surgery_on(UsesPacked(), "qv")
    NarrowProjectionsPass()(surgery)
    role = surgery.traced.v
    other = replace(role.producer, axis=-2, node=next(iter(surgery.graph.nodes)))
    surgery.traced = replace(surgery.traced, v=replace(role, producer=other))
    with pytest.raises(PostconditionError, match="its projections have their channels on different axes"):
        RestoreChannelsPass().requires(surgery)


def test_a_diagonal_needs_the_same_tokens() -> None:
    surgery = surgery_on(Plain(), "qk-diag")
    MaskDiagonalPass().requires(surgery)
    surgery.traced = replace(surgery.traced, k=replace(surgery.traced.k, tokens=3))
    with pytest.raises(PostconditionError, match="there is no diagonal between different tokens"):
        MaskDiagonalPass().requires(surgery)


def test_the_diagonal_is_masked_once() -> None:
    surgery = surgery_on(Plain(), "qk-diag")
    with pytest.raises(PostconditionError, match="0 diagonal masks before"):
        MaskDiagonalPass().ensures(surgery)
    MaskDiagonalPass()(surgery)
    MaskDiagonalPass().ensures(surgery)
    MaskDiagonalPass()(surgery)
    with pytest.raises(PostconditionError, match="2 diagonal masks before"):
        MaskDiagonalPass().ensures(surgery)


def test_the_whole_list_of_passes_runs_on_every_mode() -> None:
    for model, modes in (
        (Plain, ("qv", "qk", "qk-diag", "kv")),
        (Wide, ("concat-half", "concat-full", "concat-key", "grouped")),
    ):
        for mode in modes:
            result = rewrite(traced_of(model()), get_mode(mode))
            result.graph.lint()
            assert result.edits
            assert result.shares


def test_dead_nodes_go_and_what_may_have_an_effect_stays() -> None:
    surgery = surgery_on(Plain(), "qv")
    before = len(surgery.graph.nodes)
    with surgery.graph.inserting_before(next(n for n in surgery.graph.nodes if n.op == "output")):
        effect = surgery.graph.call_function(torch.manual_seed, (0,))
    clean = RemoveDeadNodesPass(surgery.graph)
    with surgery.graph.inserting_before(effect):
        surgery.graph.call_function(torch.add, (1, 2))
    assert clean(surgery)
    clean.ensures(surgery)
    assert effect in surgery.graph.nodes
    assert len(surgery.graph.nodes) <= before + 1
    assert not any(node.target is torch.add for node in surgery.graph.nodes)
