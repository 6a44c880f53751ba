"""Draw reference/results.png, the figure of the README, from results.csv."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import kdlib
import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns

ORIGINAL = {"teacher": 76.65, "distilled": 70.75, "scratch": 64.6}  # the original course
LABELS = {"teacher": "teacher", "distilled": "student, distilled",
          "scratch": "student, from scratch"}

table = pd.read_csv(kdlib.REFERENCE / "results.csv").query("dataset == 'cifar10'")
fig, (left, right) = plt.subplots(1, 2, figsize=(10, 2.9), layout="constrained",
                                  width_ratios=[3, 2])
for place, method in enumerate(LABELS):
    values = 100 * table[table.method == method].test_accuracy
    colour = kdlib.COLOURS[method]
    left.plot([ORIGINAL[method], values.mean()], [place, place], color="0.75", zorder=0)
    left.plot(ORIGINAL[method], place, "|", color="black", markersize=14, markeredgewidth=2)
    left.plot(values, [place] * len(values), kdlib.MARKERS[method], color=colour, alpha=0.6)
    left.text(values.max() + 0.8, place, f"{values.mean():.2f} %", va="center", color=colour)
    patient = 100 * table[table.method == f"{method}-100-epochs"].test_accuracy
    if len(patient):
        left.plot(patient, [place + 0.3] * len(patient), kdlib.MARKERS[method], color=colour,
                  fillstyle="none")
        left.text(patient.max() + 0.8, place + 0.3, f"{patient.mean():.2f} % (100 epochs)",
                  va="center", color=colour, fontsize=9)
    left.text(ORIGINAL[method], place - 0.2, f"{ORIGINAL[method]} %", ha="center", fontsize=9)
left.set(yticks=range(3), yticklabels=LABELS.values(), ylim=(2.6, -0.65), xlim=(60, 103),
         xticks=range(60, 101, 10),
         xlabel="test accuracy (%)",
         title="CIFAR-10: the original course (bar), this course (symbols)")
pairs = 100 * table.pivot_table(index="seed", columns="method", values="test_accuracy")
for _, pair in pairs[["scratch", "distilled"]].dropna().iterrows():
    right.plot(["scratch", "distilled"], pair, color="0.75", zorder=0)
    for method in ("scratch", "distilled"):
        right.plot(method, pair[method], kdlib.MARKERS[method], color=kdlib.COLOURS[method],
                   markersize=8)
right.margins(x=0.4)
right.set(ylabel="test accuracy (%)", title="Five pairs (axis enlarged)")
for ax in (left, right):
    sns.despine(ax=ax)
fig.savefig(kdlib.REFERENCE / "results.png", dpi=120)
