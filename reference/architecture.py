"""Draws architecture.png, the figure of distillation in the README and in notebook 04."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import kdlib
import matplotlib.pyplot as plt


def plot_architecture():
    """Distillation in one picture: two models, two losses, one of them trained."""
    fig, ax = plt.subplots(figsize=(10, 4.2), layout="constrained")
    ax.set(xlim=(-1, 101), ylim=(0, 44))
    ax.axis("off")

    def box(x, y, width, text, colour, dash="-"):
        ax.text(x + width / 2, y + 4, text, ha="center", va="center", fontsize=10)
        ax.add_patch(plt.Rectangle((x, y), width, 8, fill=False, ec=colour, lw=2, ls=dash))

    def arrow(*points, colour="0.3", dash="-"):
        *path, end = points
        for a, b in zip(path, path[1:], strict=False):
            ax.plot(*zip(a, b, strict=True), color=colour, ls=dash, lw=1.5)
        ax.annotate("", end, path[-1], arrowprops=dict(
            arrowstyle="-|>", color=colour, ls=dash, lw=1.5, shrinkA=0, shrinkB=0))

    blue, red, black = (kdlib.COLOURS[k] for k in ("teacher", "distilled", "hard labels"))
    box(0, 18, 12, "images\n(one view)", "0.3")
    box(20, 32, 16, "teacher\nfrozen", blue, "--")
    box(20, 18, 16, "student\ntrained", red)
    box(20, 2, 16, "hard labels", black)
    box(43, 32, 17, "softmax(logits / T)\nsoft labels", blue)
    box(43, 18, 17, "softmax(logits / T)", red)
    box(66, 25, 15, "distillation_loss\nT² · KL", "0.3")
    box(66, 2, 15, "student_loss\ncross-entropy", "0.3")
    box(86, 14, 14, "loss", "0.3")
    arrow((12, 24), (16, 24), (16, 36), (20, 36))
    arrow((12, 22), (20, 22))
    arrow((36, 36), (43, 36), colour=blue)
    arrow((36, 22), (43, 22), colour=red)
    arrow((60, 36), (73.5, 36), (73.5, 33), colour=blue)
    arrow((60, 22), (73.5, 22), (73.5, 25), colour=red)
    arrow((39, 22), (39, 8), (66, 8), colour=red)
    arrow((36, 4), (66, 4), colour=black)
    arrow((81, 29), (93, 29), (93, 22))
    arrow((81, 6), (93, 6), (93, 14))
    ax.text(83, 30.5, "× (1 − alpha)", fontsize=9)
    ax.text(83, 7.5, "× alpha", fontsize=9)
    ax.text(39.8, 12, "logits, T = 1", fontsize=9, color=red)
    ax.set_title("The gradient of the loss goes back into the student, and nowhere else")
    return fig


if __name__ == "__main__":
    plot_architecture().savefig(HERE / "architecture.png", dpi=150)
