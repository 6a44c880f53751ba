"""Every comparison in words is a claim that holds, or stands in a list with a reason."""

from reference import runs  # noqa: F401, I001  isort: skip  (first: keeps TensorFlow quiet)
import re

import pytest
import scipy.stats
from claims import BEST, CLAIMS, CONTROLS, DIGITS_ALONE, IMAGES_ALONE, LENGTHS, NOTEBOOK_8
from claims import NOT_MEASURED, OTHERS, PLAIN, SHARES, TABLE, WRONG, alone, behind_j, digits_gain
from claims import common_family, few_labels_gain, floored, gained_i, gained_j, gains
from claims import limits_of_best, of_few, part_i, printed, trials_of
from claims import of_length, of_wrong, over_longer, over_scratch, own_floor, p_of_wrong, page
from claims import part_c, part_f, part_j, points
from claims import reach_in_blocks, reach_of_few, slope, steps_of_c, teachers_lead, with_images
from conftest import CIFAR10, ROOT


COMPARES = re.compile(
    r"\b(more|less|fewer|most|least|hardly|nearly|almost|better|worse|best|worst|higher|lower"
    r"|larger|smaller|greater|falls?|rises?|grows?|shrinks?|same|differs?|alike|faster|slower"
    r"|los[et]s?|beats?|within|exceeds?|twice|half|little|than|reach(?:es)?|worth|helps?|costs?"
    r"|gains?|wins?|ahead|outweighs?|largest|smallest|highest|lowest|fastest|slowest|led|won|gained"
    r"|exceeded|reached|behind|lies? between"
    r"|(?:above|below)(?= (?:chance|that|log|zero|scratch|it\b|\d)))\b", re.IGNORECASE)


def sentences(text):
    """And the rows of tables. A question compares nothing."""
    ends = r"(?<=[.!?:)*]) (?=[-A-Z*`!(\"|#])|(?<=\|) (?=\|)"
    return [each for each in re.split(ends, text) if not re.search(r"\?\W*$", each)]


def unexplained(name, claims, exceptions):
    """The comparisons of a page that are neither; the exceptions that excuse none."""
    compared = [each for each in sentences(page(name)) if COMPARES.search(each)]
    known = sorted((part for each in claims for part in sentences(each)), key=len, reverse=True)

    def unsaid(sentence):  # what no claim covers
        for part in known:
            sentence = sentence.replace(part, "")
        return sentence

    return ([each for each in compared if COMPARES.search(unsaid(each))
             and not any(part in each for part in exceptions)],
            [part for part in exceptions if not any(part in each for each in compared)])


@pytest.mark.parametrize("name, claim", [(name, each) for name in CLAIMS for each in CLAIMS[name]])
def test_claims_hold(name, claim):
    if name.endswith(".ipynb") and not CIFAR10.exists():
        pytest.skip("no cifar10.npz in KD_DATA_DIR")
    assert page(name).count(claim) == 1
    assert CLAIMS[name][claim]()


@pytest.mark.skipif(not CIFAR10.exists(), reason="no cifar10.npz in KD_DATA_DIR")
def test_what_the_test_images_alone_add():
    """The floors that the claims use are those that notebook 08 prints, and of digits."""
    assert printed(NOTEBOOK_8, r"standard error ([\d.]+) points") == [(IMAGES_ALONE,)]
    only = 100 * digits_gain(0)
    assert round(only.std() / len(only) ** 0.5, 2) == DIGITS_ALONE


@pytest.mark.parametrize("name", CLAIMS)
def test_every_comparison_is_a_claim(name):
    assert unexplained(name, CLAIMS[name], NOT_MEASURED[name]) == ([], [])


def test_the_table_of_part_a_is_that_of_the_rows():
    text = (ROOT / "reference" / "PROTOCOL.md").read_text().partition("### A. The recipe, after")[2]
    text = text.partition("### B. Does")[0]
    rows = TABLE[(TABLE.seed >= 100) & TABLE.method.str.contains("-8-epochs|scratch-20-epochs")]
    known = {f"{row.method} {row.seed}": f"{100 * row.val_accuracy:.2f}"
             for row in rows.itertuples()}
    names = {"as published": "", "weight averaging": "-average", "rate 0.03": "-rate-3e-2",
             "weight decay 0.05": "-decay-5e-2", "another shape": "-residual",
             "label smoothing 0.1": "-smoothing"}
    short = [f"{model}-8-epochs{{}} 100" for model in ("teacher", "scratch", "distilled")]
    full = [f"scratch-20-epochs{{}} {seed}" for seed in (100, 101)]
    shown = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()
             if line.startswith(tuple(f"| {name} |" for name in names))]
    assert len(shown) == 8
    for name, *cells in shown:
        arms = short if len(cells) == 3 else full
        assert cells == [known.pop(arm.format(names[name]), "") for arm in arms], name
    assert not known
    best = 100 * rows[rows.seed == 100].set_index("method").val_accuracy
    gain = best["scratch-8-epochs-smoothing"] - best["scratch-8-epochs"]
    assert f"by {gain:.2f}" in text
    full = 100 * rows.set_index(["method", "seed"]).val_accuracy
    gain = (full["scratch-20-epochs-smoothing"] - full["scratch-20-epochs"]).mean()
    assert f"Its mean gain is {gain:.2f} points" in text and gain < 0.3


def test_the_table_of_part_b_is_that_of_the_rows():
    text = (ROOT / "reference" / "PROTOCOL.md").read_text().partition("### B. Does it help")[2]
    said = re.findall(r"\| (\d) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| (-?[\d.]+) \|", text)
    methods = ["teacher", "scratch", "distilled"]
    table = TABLE[(TABLE.dataset == "cifar10") & TABLE.method.isin(methods)]
    six, val = (100 * table.pivot(index="seed", columns="method", values=column)[methods]
                for column in ("test_accuracy", "val_accuracy"))
    gain, on_val = six.distilled - six.scratch, val.distilled - val.scratch
    assert [tuple(map(float, row)) for row in said] == [
        (seed, *row.round(2)) for seed, row in six.assign(gain=gain).iterrows()]
    assert f"Mean {gain.mean():.2f} points, standard deviation {gain.std():.2f}; 95 %" in text
    for each, said in ((gain, "interval"), (gain.drop(0), "{:.2f},"), (on_val, "mean is {:.2f},")):
        low, high = scipy.stats.ttest_1samp(each, 0).confidence_interval()
        assert f"{said.format(each.mean())} {low:.2f} to {high:.2f}" in text
    low, high = scipy.stats.ttest_ind(six.distilled, six.scratch).confidence_interval()
    assert f"is narrower, {low:.2f} to {high:.2f})" in text
    assert f"The trainings took {table.seconds.sum() / 3600:.1f} hours" in text
    first, *others = table[table.method == "teacher"].sort_values("seed").seconds / 3600
    assert (f"Teacher 0 took {first:.1f} hours, the other five {min(others):.1f}\n"
            f"to {max(others):.1f} on") in text
    assert f"pair 5 lost {-on_val[5]:.2f}" in text and (on_val.drop(5) > 0).all()
    first = TABLE[(TABLE.method == "distilled-one-teacher") & (TABLE.dataset == "cifar10")]
    assert f"had {100 * first.test_accuracy.iloc[0]:.2f} instead of {six.distilled[0]:.2f}" in text


def test_the_table_of_part_c_is_that_of_the_rows():
    text = (ROOT / "reference" / "PROTOCOL.md").read_text().rpartition("### C. What the gain")[2]
    for arm in CONTROLS:
        row = f"| {arm.removeprefix('distilled-')} |"
        for found in (over_scratch(), teachers_lead()):
            each = found.loc[arm]
            p = "< 0.001" if each.holm < 0.001 else f"{each.holm:.3f}"
            row += f" {each.gain:.2f}, {each.low:.2f} to {each.high:.2f} | {p} |"
        assert row in text
    assert part_c().shape == (5, 7) and part_c().notna().all(axis=None)
    hours = TABLE[(TABLE.dataset == "cifar10") & TABLE.method.isin(CONTROLS)].seconds.sum() / 3600
    assert f"took {hours:.1f} hours (column seconds; two" in text
    on_val = part_c(part="val").sub(part_c(part="val").scratch, axis=0)[CONTROLS].mean()
    assert f"(by {-on_val.max():.2f} to {-on_val.min():.2f} points)" in text
    assert f"teacher lies below it by {-over_scratch().gain['distilled-twin']:.2f}." in text
    text = " ".join(text.split())
    if CIFAR10.exists():
        for arm in CONTROLS:
            low, high = with_images(arm)
            assert f"{low:.2f} to {high:.2f} ({arm.removeprefix('distilled-')})" in text
    test, val = (steps_of_c(part).loc["sure"] for part in ("test", "val"))
    assert (f"rises by {test.gain:.2f} on test ({test.low:.2f} to {test.high:.2f}) and by "
            f"{val.gain:.2f} on validation ({val.low:.2f} to {val.high:.2f})") in text


def test_the_table_of_part_e_is_that_of_the_rows():
    text = (ROOT / "reference" / "PROTOCOL.md").read_text().rpartition("### E. How long")[2]
    text = " ".join(text.split())
    for epochs, name in LENGTHS.items():
        known = floored(name)
        paired = of_length(epochs).index
        row = [str(epochs), str(len(paired)), *(f"{points(f'{student}{name}')[paired].mean():.2f}"
                                                for student in ("scratch", "distilled")),
               "{:.2f}, {:.2f} to {:.2f}".format(known.mean(), *known.ppf([0.025, 0.975]))]
        assert f"| {' | '.join(row)} |" in text
    pairs = sum(len(of_length(epochs)) for epochs in LENGTHS)
    found = "the gain changes by {:.2f} points, {:.2f} to {:.2f}".format(*slope())
    assert f"*Endpoint:* each time the epochs double, {found} ({pairs} pairs)" in text
    later = "{:.2f}, {:.2f} to {:.2f}".format(*slope((10, 20, 40, 100)))
    assert f"Without those of 5 epochs, which all had teacher 0, it is {later}" in text
    made = TABLE[(TABLE.dataset == "cifar10") & TABLE.method.str.fullmatch(
        "(scratch|distilled)-(10|40|100)-epochs")]
    assert f"took {made.seconds.sum() / 3600:.1f} hours (column seconds)" in text
    on_val = "{:.2f}, {:.2f} to {:.2f}".format(*slope(column="val_accuracy"))
    assert f"On validation it is {on_val}" in text
    early, late = ("{:.2f}, {:.2f} to {:.2f}".format(*slope(each))
                   for each in ((5, 10, 20), (20, 40, 100)))
    assert f"the slope is {early}, and from 20 to 100 it is {late}" in text


def test_the_table_of_part_f_is_that_of_the_rows():
    text = (ROOT / "reference" / "PROTOCOL.md").read_text().rpartition("### F. Few labels")[2]
    mean, known = part_f().mean(), few_labels_gain()
    for share in SHARES:
        row = [f"{share} %", f"{points(f'teacher-10-epochs-{share}-percent').mean():.2f}"]
        row += [f"{mean[f'{share} {arm}']:.2f}"
                for arm in ("scratch", "labelled", "own", "patient")]
        for other in ("scratch", "patient"):
            p = known.holm[other, share]
            row += [of_few(other, share), "< 0.001" if p < 0.001 else f"{p:.3f}"]
        assert f"| {' | '.join(row)} |" in text
    assert part_f().shape == (3, 17) and part_f().notna().all(axis=None)
    text = " ".join(text.split())
    longer = over_longer()
    assert (f"reaches {mean['10 longer']:.2f}. -own is {longer.gain:.2f} points better, "
            f"{longer.low:.2f} to {longer.high:.2f} (outside") in text
    spread = [f"{known.spread['scratch', share]:.2f}" for share in SHARES]
    assert f"spread by {', '.join(spread[:3])} and {spread[3]} points" in text
    val = part_f("val_accuracy").mean()
    for other, words in (("scratch", "On validation they are"), ("patient", "the steps")):
        each = [f"{val[f'{share} own'] - val[f'{share} {other}']:.2f}" for share in SHARES]
        assert f"{words} {', '.join(each[:3])} and {each[3]}" in text
    assert (f"blocks, half of the interval would be {reach_in_blocks():.2f} points instead of "
            f"{reach_of_few():.2f}, and no verdict") in text
    assert [abs(gain) > reach_in_blocks() for gain in known.gain] == (known.holm < 0.05).tolist()


def test_the_table_of_part_g_is_that_of_the_rows():
    text = (ROOT / "reference" / "PROTOCOL.md").read_text().rpartition("### G. Wrong labels")[2]
    for share in (0, *WRONG):
        label = f"-{share}-wrong" if share else ""
        arms = [points(f"{arm}{label}") for arm in ("teacher", "scratch", "distilled")]
        arms = [each[each.index < 3] for each in arms]
        assert [len(each) for each in arms] == [3, 3, 3]
        row = [f"{share} %", *(f"{each.mean():.2f}" for each in arms)]
        row[3:3] = [f"{points('scratch-40-wrong-smoothing').mean():.2f}" if share == 40 else ""]
        row += ([of_wrong(share), f"{p_of_wrong()[share]:.3f}"] if share else
                [f"{(arms[2] - arms[1]).mean():.2f}", ""])
        assert f"| {' | '.join(row)} |".replace("  ", " ") in text
    text = " ".join(text.split())
    floors = [own_floor(f"distilled-{s}-wrong", f"scratch-{s}-wrong") for s in WRONG]
    spreads = [gains(f"distilled-{s}-wrong", f"scratch-{s}-wrong").std() for s in WRONG]
    assert (f"floors are {floors[0]:.2f} and {floors[1]:.2f} points, the gains spread by "
            f"{spreads[0]:.2f} and {spreads[1]:.2f}.") in text
    val = [gains(f"distilled-{s}-wrong", f"scratch-{s}-wrong", column="val_accuracy").mean()
           for s in WRONG]
    assert f"On validation the gains are {val[0]:.2f} and {val[1]:.2f}." in text


def test_the_table_of_part_h_is_that_of_the_rows():
    text = (ROOT / "reference" / "PROTOCOL.md").read_text().rpartition("### H. The best student")[2]
    distilled, scratch, gain = points("best"), points("best-scratch"), gains(*BEST)
    for seed in range(3):
        assert (f"| {seed} | {scratch[seed]:.2f} | {distilled[seed]:.2f} | {gain[seed]:.2f} |"
                in text)
    low, high = limits_of_best()
    assert f"Mean gain {gain.mean():.2f} points, {low:.2f} to {high:.2f} with" in text
    assert f"(the gains spread by {gain.std():.2f})" in text and distilled.max() < 94.5
    a, b, c, d = (100 * TABLE[TABLE.method == f"{arm}-{name}-10-epochs"].val_accuracy.item()
                  for name in ("full", "pooled") for arm in ("scratch", "distilled"))
    assert (f"`best_student` {a:.2f} from scratch and {b:.2f} distilled,\n`best_student_pooled` "
            f"{c:.2f} and {d:.2f}.") in text and d > max(a, b, c)
    assert f"reached {points('teacher-best')[0]:.2f} on test" in text


def test_the_table_of_part_i_is_that_of_the_rows():
    text = (ROOT / "reference" / "PROTOCOL.md").read_text().rpartition("### I. Other methods, ")[2]
    mean, plain = part_i().mean(), PLAIN["cifar10"]
    for name, each in gained_i().iterrows():
        arm = OTHERS[name]
        p = "< 0.001" if each.holm < 0.001 else f"{each.holm:.3f}"
        known = [name, *(f"{trial:.2f}" for trial in trials_of(name)), f"{mean[arm]:.2f}",
                 f"{each.gain:.2f}, {each.low:.2f} to {each.high:.2f} |"]
        assert f"| {' | '.join(known)}" in text
        assert f" | {p} | {gained_i(part='val').gain[name]:.2f} |" in text
        if CIFAR10.exists():
            low, high = with_images(arm, plain)
            assert f"{known[-1]} {low:.2f} to {high:.2f} | {p} |" in text
    assert part_i().shape == (5, 5) and part_i().notna().all(axis=None)
    text = " ".join(text.split())
    assert f"Soft labels alone reach {mean[plain]:.2f}. The smallest weight won in all four" in text
    assert all(trials_of(name)[0] == max(trials_of(name)) for name in OTHERS)
    first, *rest, last = (f"{each:.2f}" for each in gained_i().spread)
    assert f"The gains spread by {first}, {', '.join(rest)} and {last} points" in text
    first, *rest, last = (f"{each:.2f}" for each in gained_i("digits").gain)
    harm = gained_i("digits").loc["decoupled logits"]
    assert harm.high < 0 and part_i("digits").shape == (5, 5)
    assert (f"the gains are {first}, {', '.join(rest)} and {last} points, and the last is below "
            f"zero (p = {harm.holm:.3f})") in text
    made = TABLE[(TABLE.dataset == "cifar10") & TABLE.method.isin(part_i().columns)]
    assert f"took {made.seconds.sum() / 3600:.1f} hours in the column" in text


def test_the_table_of_part_j_is_that_of_the_rows():
    text = (ROOT / "reference" / "PROTOCOL.md").read_text().rpartition("### J. Same and")[2]
    mean = part_j().mean()
    for arm, each in gained_j().iterrows():
        _, teacher, _, student = arm.split("-")
        row = [teacher, student, f"{mean[alone(student)]:.2f}", f"{mean[arm]:.2f}",
               f"{behind_j()[arm]:.2f}", f"{each.gain:.2f}, {each.low:.2f} to {each.high:.2f}",
               f"{each.holm:.3f}"]
        assert f"| {' | '.join(row)} |" in text
    assert part_j().shape == (3, 9) and part_j().notna().all(axis=None)
    family = common_family()
    text = " ".join(text.split())
    assert (f"interaction is {family.gain:.2f} points, {family.low:.2f} to {family.high:.2f}. So "
            "with these two teachers and two students, a common family adds at most "
            f"{family.high:.2f}") in text
    residual, vgg = points("teacher-residual")[0], points("teacher")[0]
    assert f"{residual:.2f}, the VGG-like one {vgg:.2f}" in text
    made = TABLE[(TABLE.dataset == "cifar10") & TABLE.method.isin(
        ["teacher-residual", *set(part_j()) - {"scratch"}])]
    assert f"{made.seconds.sum() / 3600:.1f} hours in the column" in text
