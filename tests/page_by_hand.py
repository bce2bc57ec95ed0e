"""Records of a conversion made by hand, the report of them, and a reader of its page."""

from dataclasses import replace
from html.parser import HTMLParser

from armour_surgery.records import Fidelity, FrontierPoint, RefusedSite, Sensitivity, SitePlan, Source, SurgeryPlan
from armour_surgery.report.page import html_report

__all__ = ["VOID", "Page", "everything", "frontier", "sensitivities", "site", "surgery"]

VOID = {"meta", "br", "path", "use", "rect", "line", "circle", "image", "hr", "img", "link"}


class Page(HTMLParser):
    """What a browser would make of a page: its elements, their attributes and the text, all closed properly."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def site(number: int, residual: float | None = 0.125, name: str = "blocks.{}.attn") -> SitePlan:
    return SitePlan(
        name.format(number), "qv", "calibrated", 5300, 3975, 71000, 53000, residual, "x", ("joint-svd", "last layer")
    )


def surgery(sites: int = 3) -> SurgeryPlan:
    return SurgeryPlan(
        mode="auto",
        init="calibrated",
        sites=tuple(site(number, 0.05 * (number + 1)) for number in range(sites)),
        refused=(RefusedSite("down.attn", "downsampling attention: Q & V differ"),),
        params_before=1_234_567,
        params_after=1_111_111,
        macs_before=7_654_321,
        macs_after=6_543_210,
        example=(("pixels", (2, 3, 56, 40), "float32"),),
        source=Source("timm", "vit_tiny", name="timm:vit_tiny.in1k", license="mit", revision="abc123"),
        fidelity=Fidelity(41, "photos", 0.9712, 13.5, 96.75),
    )


def sensitivities(sites: int = 3) -> list[Sensitivity]:
    return [
        Sensitivity(f"blocks.{number}.attn", mode, rank, 1000 + number, 0.1 * (number + 1), 0.001 * 3**number)
        for number in range(sites)
        for mode, rank in (("qv", None), ("qv", 16), ("qk", None))
    ]


def frontier() -> list[FrontierPoint]:
    ways = [(f"blocks.{number}.attn", "qv", None) for number in range(3)]
    return [
        FrontierPoint(1_234_567, 0.0, 0.0, ()),
        FrontierPoint(1_200_000, 0.01, None, tuple(ways[:1])),
        FrontierPoint(1_150_000, 0.03, 0.02, tuple(ways[:2])),
        FrontierPoint(1_111_111, 0.09, 0.06, tuple(ways)),
    ]


def everything() -> str:
    return html_report(replace(surgery(), max_loss=0.05), "my model", sensitivities(), frontier(), 'out/my "folder"')
