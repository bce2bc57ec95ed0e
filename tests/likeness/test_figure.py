"""The figure shows the layer and all layers, and no text lies on another."""

from dataclasses import replace

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from tiny_hosts import CASES
from torch import nn

from armour_surgery.likeness.compare import compare_layers
from armour_surgery.likeness.figure import redundancy_figure
from armour_surgery.likeness.pairs import differences


def texts(figure: Figure) -> list[Text]:
    """What can be read in a figure, after drawing; ticks outside an axis have labels too, which are not drawn."""
    FigureCanvasAgg(figure).draw()
    hidden: list[Text] = []
    for axes in figure.findobj(Axes):
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            hidden += [tick.label1 for tick in axis.get_major_ticks() if not low <= tick.get_loc() <= high]
    return [one for one in figure.findobj(Text) if one.get_text().strip() and one.get_visible() and one not in hidden]


def overlapping(figure: Figure) -> list[tuple[str, str]]:
    written = [(one.get_text(), one.get_window_extent()) for one in texts(figure)]
    inside = figure.bbox
    assert all(inside.x0 <= box.x0 and box.x1 <= inside.x1 and box.y0 >= inside.y0 for _, box in written)
    return [
        (a, b)
        for place, (a, first) in enumerate(written)
        for b, second in written[place + 1 :]
        if first.shrunk(0.98, 0.9).overlaps(second.shrunk(0.98, 0.9))
    ]


def test_the_figure_shows_the_layer_and_all_layers(vit: nn.Module) -> None:
    sites, layer = compare_layers(vit, layer="blocks.1.attn", example_input=CASES["vit"].example(), threshold=0.02)
    figure = redundancy_figure(sites, layer.fqn, layer.weights, 0.02, "tiny $ViT, blocks.1.attn")
    assert overlapping(figure) == []
    written = [one.get_text() for one in texts(figure)]
    share = sites[1].pairs["qk"]
    assert f"{share.share:.1f} % below 0.02, by chance {share.share_by_chance:.1f} %" in written
    assert r"tiny \$ViT, blocks.1.attn" in written
    images = [axes.images[0].get_array() for axes in figure.findobj(lambda one: bool(getattr(one, "images", None)))]
    assert [image.shape for image in images] == [(48, 48)] * 3
    shown = differences(layer.weights, "qk").permute(1, 0, 2).reshape(48, 48)
    assert torch.equal(torch.as_tensor(images[0]), shown)


def test_many_layers_with_long_names_do_not_overlap(vit: nn.Module) -> None:
    sites, layer = compare_layers(vit, example_input=CASES["vit"].example())
    first = replace(sites[0], pairs={"kv": sites[0].pairs["kv"]}, skipped=dict.fromkeys(("qk", "qv"), "word " * 30))
    many = [first, *(replace(sites[1], fqn=f"stages.{number % 5}.odd{number}.attention") for number in range(60))]
    title = "some-organization/a-model-with-a-long-name-that-goes-on_patch16_clip_224.source_in21k_ft_in1k"
    figure = redundancy_figure(many, first.fqn, layer.weights, 0.0125, f"{title}\n(random weights)")
    assert overlapping(figure) == []
