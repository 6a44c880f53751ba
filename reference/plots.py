"""The pictures that several notebooks draw, and the colours of the roles.

Run as a program it draws architecture.png and results.png, the figures of the README.
"""

import json
import sys
import zlib
from pathlib import Path

if __name__ == "__main__":  # run as a file: the project's folder is not on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from reference import evidence  # isort: skip  (first: keeps TensorFlow quiet)
import kdlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from IPython.display import HTML

REFERENCE = Path(__file__).resolve().parent

# One colour a role, everywhere (Okabe and Ito's, safe for colour-blind readers), and a
# second cue for readers of a grey print.
COLOURS = {
    "hard labels": "#000000", "teacher": "#0072B2", "distilled": "#D55E00", "scratch": "#009E73"
}
DASHES = {"hard labels": ":", "teacher": "-.", "distilled": "-", "scratch": "--"}
MARKERS = {"hard labels": "x", "teacher": "s", "distilled": "o", "scratch": "^"}


def temperature_colours(count: int) -> list:
    """One sequential ramp for temperatures, cold to hot, dark enough at its light end."""
    return list(sns.color_palette("flare", count))


def images(pictures, titles=None, *, columns: int = 10, title: str = ""):
    """A grid of pictures (N, H, W, 3) with a line above each; returns the figure."""
    rows = -(-len(pictures) // columns)
    fig, axes = plt.subplots(
        rows, columns, figsize=(10, 10 / columns * rows * 1.25), squeeze=False,
        layout="constrained",
    )
    for ax in axes.flat:
        ax.axis("off")
    for k, (ax, image) in enumerate(zip(axes.flat, pictures, strict=False)):
        ax.imshow(image, interpolation="nearest")
        if titles is not None:
            ax.set_title(titles[k], fontsize=9)
    fig.suptitle(title)
    return fig


def curves(values: dict[str, list[float]], *, title: str, ylabel: str, role=None, ax=None):
    """Curves over epochs, each labelled at its end; a name that is a role has its colour.

    Other names have the colour of ``role``, and "training" is dashed.
    """
    ax = ax or plt.subplots(figsize=(7, 4), layout="constrained")[1]
    highest = max(each[-1] for each in values.values())
    for name, each in values.items():
        epochs = np.arange(1, len(each) + 1)
        (line,) = ax.plot(
            epochs, each, DASHES.get(name, "--" if name == "training" else "-"), label=name,
            color=COLOURS.get(name, COLOURS.get(role, "0.5")), marker=MARKERS.get(name),
            markersize=4,
        )
        ax.annotate(f" {name}", (epochs[-1], each[-1]), color=line.get_color(),
                    va="bottom" if each[-1] == highest else "top", annotation_clip=False)
    ax.set(title=title, xlabel="epoch", ylabel=ylabel)
    ax.margins(x=0.02)
    ax.xaxis.get_major_locator().set_params(integer=True)
    sns.despine(ax=ax)
    return ax.figure


def matrix(numbers, class_names, *, title: str, xlabel: str, ylabel: str, fmt="d",
                cmap="Blues", **settings):
    """A classes-by-classes heat map with its numbers; returns the figure."""
    fig, ax = plt.subplots(figsize=(7, 6), layout="constrained")
    sns.heatmap(numbers, annot=True, fmt=fmt, cmap=cmap, xticklabels=class_names,
                yticklabels=class_names, annot_kws={"size": 8}, ax=ax, **settings)
    ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
    ax.tick_params(axis="x", rotation=45)
    return fig


def soft_labels(image, logits, label: int, class_names, temperatures, *, axes, names=True):
    """A row: the image, its hard label, and its soft labels at each temperature."""
    classes = np.arange(len(class_names))
    axes[0].imshow(image, interpolation="nearest")
    axes[0].set_axis_off()
    axes[0].set_title(class_names[label], fontsize=10)
    axes[1].bar(classes, classes == label, color=COLOURS["hard labels"])
    axes[1].set_title("hard label", fontsize=10)
    colours = temperature_colours(len(temperatures))
    for ax, temperature, colour in zip(axes[2:], temperatures, colours, strict=True):
        ax.bar(classes, kdlib.soften(logits, temperature), color=colour)
        ax.set_title(f"T = {temperature:g}", fontsize=10)
    for ax in axes[1:]:
        ax.set(ylim=(0, 1), xticks=classes)
        ax.set_xticklabels(class_names if names else [], rotation=90, fontsize=7)
        ax.tick_params(axis="y", labelsize=7, labelleft=ax is axes[1])
        sns.despine(ax=ax)
    axes[1].set_ylabel("probability", fontsize=8)


def temperature_slider(logits, label: int, class_names) -> HTML:
    """A slider for T above the bars of a soft label, as a page that needs no kernel.

    All bars are computed here, so it also moves in a web page made from a notebook.
    """
    temperatures = 2 ** np.arange(-1, 6.01, 0.25)
    shares = [np.asarray(kdlib.soften(logits, t)).round(4).tolist() for t in temperatures]
    rows = "".join(
        f'<tr><td style="text-align:right">{f"<b>{name}</b>" if k == label else name}</td>'
        '<td style="width:20em;text-align:left"><div class="bar" style="height:1em;width:0;'
        f'background:{COLOURS["teacher"]}"></div></td><td class="share"></td></tr>'
        for k, name in enumerate(class_names))
    name = f"soft-{zlib.crc32(repr(shares).encode()):08x}"
    return HTML(f"""<div id="{name}">
<label>T = <output></output> <input type="range" min="0" max="{len(temperatures) - 1}" value="12"
 aria-label="temperature" style="width:20em;vertical-align:middle"></label>
<table>{rows}</table></div>
<script>(() => {{
  const shares = {json.dumps(shares)}, temperatures = {json.dumps(temperatures.round(2).tolist())};
  const page = document.getElementById("{name}"), slider = page.querySelector("input");
  const draw = () => {{
    page.querySelector("output").textContent = temperatures[slider.value].toFixed(2);
    page.querySelectorAll("tr").forEach((row, k) => {{
      const share = shares[slider.value][k];
      row.querySelector(".bar").style.width = 100 * share + "%";
      row.querySelector(".share").textContent = share.toFixed(3);
    }});
  }};
  slider.addEventListener("input", draw);
  draw();
}})()</script>""")


# --- the README's figures -------------------------------------------------------------

ORIGINAL = {"teacher": 76.65, "distilled": 70.75, "scratch": 64.6}  # the original course
LABELS = {"teacher": "teacher", "distilled": "student, distilled",
          "scratch": "student, from scratch"}
BEST = {"teacher": "teacher-best", "distilled": "best", "scratch": "best-scratch"}
BEST_IS = {"teacher": "of the best student", "distilled": "best small student",
           "scratch": "best small student"}



def gains(table):
    """Distilled minus scratch, test, in points: by epochs and seed. Usual students, pairs only."""
    pairs = evidence.usual_students(table).pivot(
        index=["epochs", "seed"], columns="student", values="test_accuracy")
    return 100 * (pairs.distilled - pairs.scratch).dropna()


def results():
    """The figure of the README, from results.csv: the pairs, and the teachers that taught them."""
    table = pd.read_csv(REFERENCE / "results.csv").query("dataset == 'cifar10' and seed < 100")
    found = gains(table)
    pairs = 100 * table.pivot_table(index="seed", columns="method", values="test_accuracy")[
        ["scratch", "distilled"]].dropna()
    names = table.method + "-seed" + table.seed.astype(str)
    taught = names.isin(table[table.method == "distilled"].teacher)
    paired = table.seed.isin(pairs.index) | ~table.method.isin(pairs.columns)
    table = table[taught | (table.method != "teacher") & paired]
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 2.9), layout="constrained",
                                      width_ratios=[3, 2])
    for place, method in enumerate(LABELS):
        values = 100 * table[table.method == method].test_accuracy
        colour = COLOURS[method]
        left.plot([ORIGINAL[method], values.mean()], [place, place], color="0.75", zorder=0)
        left.plot(ORIGINAL[method], place, "|", color="black", markersize=14, markeredgewidth=2)
        left.plot(values, [place] * len(values), MARKERS[method], color=colour, alpha=0.6)
        left.text(values.max() + 1.2, place, f"{values.mean():.2f} %", va="center", color=colour)
        patient = table[(table.method == f"{method}-100-epochs")
                        & table.seed.isin(found.xs(100).index)]
        for rows, height, words in ((patient, 0.3, "100 epochs"),
                                    (table[table.method == BEST[method]], -0.3, BEST_IS[method])):
            also = 100 * rows.test_accuracy
            if len(also):
                left.plot(also, [place + height] * len(also), MARKERS[method], color=colour,
                          fillstyle="none")
                left.text(also.max() + 1.2, place + height, f"{also.mean():.2f} % ({words})",
                          va="center", color=colour, fontsize=9)
        left.text(ORIGINAL[method], place - 0.2, f"{ORIGINAL[method]} %", ha="center", fontsize=9)
    left.set(yticks=range(3), yticklabels=LABELS.values(), ylim=(2.6, -0.65), xlim=(60, 114),
             xticks=range(60, 101, 10),
             xlabel="test accuracy (%)",
             title="CIFAR-10: the original course (bar), this course (symbols)")
    mean = found.groupby("epochs").mean()
    right.axhline(0, color="0.75", zorder=0)
    right.plot(found.index.get_level_values("epochs"), found, MARKERS["distilled"],
               color=COLOURS["distilled"], alpha=0.6)
    right.plot(mean.index, mean, color=COLOURS["distilled"])
    for epochs, gain in mean.items():
        right.annotate(f"{gain:+.2f}", (epochs, gain), (6, 6), textcoords="offset points")
    right.set(xscale="log", xticks=mean.index, xticklabels=mean.index, xlim=(4, 160),
              xlabel="epochs of both students", ylabel="points",
              title="gain over scratch (a dot: a pair)")
    right.minorticks_off()
    for ax in (left, right):
        sns.despine(ax=ax)
    return fig


def architecture():
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

    blue, red, black = (COLOURS[k] for k in ("teacher", "distilled", "hard labels"))
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
    architecture().savefig(REFERENCE / "architecture.png", dpi=150)
    results().savefig(REFERENCE / "results.png", dpi=120)
