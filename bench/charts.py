"""Pictures of results: bars with their spread, and the floors they are measured against."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

OURS, OTHERS, FLOOR = "#0072b2", "#999999", "#d55e00"  # told apart by colour-blind readers, and in grey


@dataclass(frozen=True)
class Bar:
    """A measured median with its 20th and 80th percentile."""

    label: str
    median: float
    p20: float
    p80: float
    ours: bool = False


def bar_chart(
    bars: Sequence[Bar], path: Path, *, title: str, unit: str, floors: Sequence[tuple[str, float]] = (), note: str = ""
) -> list[Path]:
    """Horizontal bars, longest first, and a dashed line a floor.

    Writes ``path`` with the suffixes .png and .svg; the same bars give the same bytes.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ordered = sorted(bars, key=lambda bar: bar.median)
    with matplotlib.rc_context({"svg.hashsalt": "specialize", "svg.fonttype": "none", "font.size": 10}):
        figure, axes = pyplot.subplots(figsize=(8.0, 1.7 + 0.42 * len(ordered)), layout="constrained")
        try:
            axes.barh(
                [bar.label for bar in ordered], [bar.median for bar in ordered],
                color=[OURS if bar.ours else OTHERS for bar in ordered], height=0.62,
                xerr=[[bar.median - bar.p20 for bar in ordered], [bar.p80 - bar.median for bar in ordered]],
                error_kw={"elinewidth": 1.0, "capsize": 3.0},
            )  # fmt: skip
            reach = max([bar.p80 for bar in ordered] + [value for _, value in floors])
            for place, bar in enumerate(ordered):
                axes.annotate(
                    f"{bar.median:,.0f}", (bar.p80, place), xytext=(4, 0), textcoords="offset points", va="center"
                )
            for place, (label, value) in enumerate(floors):
                style = ("--", ":", "-.")[place % 3]
                axes.axvline(value, color=FLOOR, linestyle=style, linewidth=1.2, label=f"{label}: {value:,.0f}")
            if floors:
                figure.legend(loc="outside lower center", frameon=False, ncols=len(floors), fontsize=9)
            axes.set_xlim(0, 1.1 * reach)
            axes.set_xlabel(unit)
            figure.suptitle(title, x=0.02, ha="left")
            if note:
                axes.set_title(textwrap.fill(note, 90), loc="left", fontsize=8, color="#444444")
            axes.spines[["top", "right"]].set_visible(False)
            path.parent.mkdir(parents=True, exist_ok=True)
            written = [path.with_suffix(".png"), path.with_suffix(".svg")]
            figure.savefig(written[0], dpi=120, metadata={"Software": None})
            figure.savefig(written[1], metadata={"Date": None})
        finally:
            pyplot.close(figure)
    return written
