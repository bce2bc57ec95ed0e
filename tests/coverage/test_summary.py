"""Outcomes counted, and shown."""

import json

from armour_surgery.coverage import views
from armour_surgery.coverage.outcome import Outcome, SiteKind
from armour_surgery.coverage.summary import Coverage

GOOD = SiteKind("Attention", "blocks.0.attn", 12, "qv", {"qv": 0.0, "qk-diag": None})
WRONG = SiteKind("Attention", "blocks.0.attn", 2, "qv", {"qv": 1e-3})
OTHER = SiteKind("Pool", "pool", 1, None, {"kv": 1e-16}, {"auto": "Q has 1 tokens and V has 197"})
LEFT = SiteKind("Channels", "a.b", 4, None, {}, {"auto": "a.b attends over 48 channels"})
BROKEN = SiteKind("Late", "c", 1, None, {}, {"auto": "no", "qv": "no"}, ("qv",))
STUCK = SiteKind("Stuck", "d", 1, "qv", {"qv": None}, {}, (), {"qv": "RuntimeError: no"})
OUTCOMES = [
    Outcome("timm", "good", True, (GOOD, OTHER)),
    Outcome("timm", "wrong", True, (WRONG,)),
    Outcome("timm", "pooled", True, (OTHER, LEFT)),
    Outcome("timm", "left", True, (LEFT,)),
    Outcome("timm", "convolutional"),
    Outcome("timm", "large", error="it took longer than 120 s"),
    Outcome("torchvision", "broken", True, (BROKEN, STUCK)),
]
COVERAGE = Coverage.of(OUTCOMES)


def test_counts() -> None:
    count = COVERAGE.count("timm")
    assert (count.architectures, count.with_attention) == (6, 4)
    assert (count.convert_auto, count.convert_any, count.exact) == (2, 3, 2)
    # Of what converts in no way that auto takes; the pooling of an architecture that converts is no refusal of it.
    assert count.refused == {"NAME attends over N channels": 2, "Q has N tokens and V has N": 1}
    assert count.failed == {"large": "it took longer than 120 s"}


def test_the_document_has_the_keys_of_the_contract() -> None:
    document = json.loads(json.dumps(COVERAGE.to_dict(), allow_nan=False))
    assert set(document) == {"versions", "libraries"}
    assert {"torch", "timm", "transformers", "torchvision"} <= set(document["versions"])
    keys = {"architectures", "with_attention", "convert_auto", "convert_any", "exact", "refused", "errors"}
    for library in document["libraries"].values():
        assert keys <= set(library)
    assert document["libraries"]["timm"]["errors"] == 1
    assert [entry["name"] for entry in document["libraries"]["timm"]["list"]][:2] == ["good", "wrong"]


def test_what_went_wrong_is_told_line_by_line() -> None:
    assert views.failures(COVERAGE, "timm") == [
        "wrong, blocks.0.attn (Attention): qv differs by 1.0e-03",
        "large: it took longer than 120 s",
    ]
    promised, stuck = views.failures(COVERAGE, "torchvision")
    assert "inspect says that qv fits, and convert refuses it: no" in promised
    assert "qv fits, and does not work: RuntimeError: no" in stuck


def test_classes() -> None:
    rows = {row[0]: row[1:] for row in views.class_table(COVERAGE, "timm").rows}
    assert rows == {
        "Attention": ("2", "2", "2", "NO", "qv, qk-diag"),
        "Pool": ("2", "0", "2", "yes", "kv"),
        "Channels": ("2", "0", "0", "-", ""),
    }


def test_architectures() -> None:
    rows = views.architecture_table(COVERAGE, "timm", all_of_them=True).rows
    assert rows[0] == ("good", "12 of 13", "yes", "qv, qk-diag, kv")
    assert [row[0] for row in views.architecture_table(COVERAGE, "timm", all_of_them=False).rows] == ["pooled", "left"]


def test_the_page_has_all_of_it() -> None:
    page = views.page(COVERAGE, "armour-surgery coverage", "What converts")
    assert page.startswith("# What converts\n\nMade by `armour-surgery coverage`, with python")
    assert "| timm | 6 | 4 | 2 | 50.0 % | 3 | 2 | 1 |" in page
    assert "- 2: NAME attends over N channels" in page
    assert "- large: it took longer than 120 s" in page
    assert page.endswith("|\n")
