"""ROC curves of several scores."""

from collections.abc import Mapping

from matplotlib.ticker import FuncFormatter, NullFormatter

from unlearn.detect.roc import Roc
from unlearn.evals.report.plots import FAINT, LINES, Plot, drawing, tidy, to_plot

DASHES = ("-", (0, (5, 1.6)), (0, (1, 1.2)))
LOWEST = 1e-3
"""Where the logarithmic axis of false-positive rates begins."""


def draw_roc(curves: Mapping[str, Roc], areas: Mapping[str, float]) -> Plot:
    """Draw the share of members found against the share of non-members called by mistake.

    Twice: on plain axes, and on logarithmic ones, which show the small rates that matter when a
    call has consequences (Carlini et al. 2022, arXiv:2112.03570).
    """
    with drawing(6.4) as figure:
        plain, small = figure.subplots(2, 1)
        for axes in (plain, small):
            axes.plot([LOWEST, 1], [LOWEST, 1], color=FAINT, linewidth=1, linestyle=(0, (1, 2)))
        for place, (name, curve) in enumerate(curves.items()):
            look = {
                "color": LINES[place % len(LINES)],
                "linestyle": DASHES[place // len(LINES) % len(DASHES)],
                "linewidth": 1.7,
            }
            label = f"{name}, AUC {areas[name]:.3f}"
            plain.step(curve.fpr, curve.tpr, where="post", label=label, **look)
            small.step(curve.fpr.clip(LOWEST), curve.tpr.clip(LOWEST), where="post", **look)
        small.set_xscale("log")
        small.set_yscale("log")
        for axis in (small.xaxis, small.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, place: f"{100 * value:g} %"))
            axis.set_minor_formatter(NullFormatter())
        for axis in (plain.xaxis, plain.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, place: f"{100 * value:.0f} %"))
        small.set_xlim(LOWEST, 1)
        small.set_ylim(LOWEST, 1.1)
        plain.set_ylim(0, 1.02)
        figure.legend(loc="outside lower center", ncols=2, handlelength=2.4)
        for axes in (plain, small):
            axes.set_ylabel("members found")
            tidy(axes)
        small.set_xlabel("non-members called members")
        return to_plot(figure, "roc", "ROC curves of the membership scores")
