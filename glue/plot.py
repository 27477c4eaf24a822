"""Draw what a search evaluated, or how a super-BERT was trained.

    python -m glue.plot subbert/MRPC-60000000 ... [--out FILE.svg]
    python -m glue.plot superbert/MRPC            [--out FILE.svg]

The picture of a search shows the score and the cost of every sub-BERT that was
evaluated, the best score at each cost, the budgets, and the sub-BERTs that the search
chose. Several directories share one picture.

The picture of a training shows the controller K, the loss, the parameters of the most
likely architecture, and theta over time. It needs log.jsonl and no other file, so it
can also be drawn while the training is still running.

The same directories always give the same bytes. The program needs matplotlib.
"""

import io
import os
import sys
from pathlib import Path

import numpy as np

from glue import run_program
from model import UserError, print_line, write_file
from yoco import Parser, read_log, read_run

try:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter
except ImportError:
    matplotlib = None

# The fields that a line of a search's log has, and those of a line of a training's log.
SEARCH_FIELDS = {"choices", "score", "cost"}
TRAINING_FIELDS = {"step", "stage", "loss", "K", "floor", "most_likely_params"}
# How the axes name the metrics and the data of run.json.
METRIC_NAMES = {"f1": "F1", "accuracy+f1": "mean of accuracy and F1",
                "matthews": "Matthews correlation",
                "pearson+spearman": "mean of Pearson and Spearman correlation"}
DATA_NAMES = {"holdout": "hold-out set", "dev": "dev set"}
# Both pictures are 850 pixels wide in a browser, which shows 96 pixels per inch.
WIDTH = 850 / 96


def plot(options):
    """Draw one picture and write it as an SVG file."""
    if matplotlib is None:
        raise UserError("plots need one more package: pip install matplotlib")
    name = os.path.basename(os.path.realpath(options.directories[0]))
    out = Path(options.out or f"{name}.svg")
    if out.suffix != ".svg":
        raise UserError(f"--out {out}: the picture's name must end in .svg")
    logs = {directory: read_records(directory) for directory in options.directories}
    is_training = any("step" in records[0] for records in logs.values() if records)
    if is_training and len(logs) > 1:
        raise UserError("one picture shows several sub-BERTs, or one super-BERT: name one "
                        "directory")
    # The user's own settings of matplotlib must not change the picture.
    style = {**matplotlib.rcParamsDefault, "axes.spines.top": False,
             "axes.spines.right": False}
    # A "$" in the name of a directory is an ordinary character.
    style["text.parse_math"] = False
    # With a fixed salt, the ids in the file are no longer random.
    style["svg.hashsalt"] = "yoco"
    with matplotlib.rc_context(style):
        if is_training:
            figure = draw_training(*logs.popitem())
        else:
            figure = draw_searches(logs)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", dpi=200, metadata={"Date": None})
    write_file(out, buffer.getvalue())
    print_line(f"wrote {out}")


def read_records(directory):
    """Return the records of a run's log.

    The first line of a log holds the settings and is left out.
    Raises UserError if there is no log, or if neither train nor search wrote it.
    """
    path = Path(directory) / "log.jsonl"
    if not path.exists():
        raise UserError(f"{path} does not exist: name a directory that train or search "
                        "wrote")
    records = read_log(directory)[1:]
    if not all(SEARCH_FIELDS <= set(record) or TRAINING_FIELDS <= set(record)
               for record in records):
        raise UserError(f"{path} has lines that neither train nor search wrote")
    return records


# ---- The picture of a search ---------------------------------------------------------------------

def draw_searches(logs):
    """Draw score against cost, in one color for each super-BERT.

    logs: {directory: records}.
    Raises UserError if the searches differ in the unit of cost, the metric, or the data.
    """
    runs = {directory: read_run(directory) for directory in logs}
    for directory, run in runs.items():
        if "unit" not in run:
            raise UserError(f"{directory} is a super-BERT, and its log holds no training steps")
    scales = {(run["unit"], run["metric"], run["selected_on"]) for run in runs.values()}
    if len(scales) > 1:
        shown = " and ".join(sorted(f"({', '.join(scale)})" for scale in scales))
        raise UserError("these searches do not fit into one picture, because they measured "
                        f"{shown}: draw one picture for each")
    unit, metric, data_name = scales.pop()

    # The searches for several budgets share their scores: each score is in one of
    # their logs.
    searches = {}                                           # {super-BERT: [directory]}
    for directory, run in runs.items():
        searches.setdefault(run["superbert"], []).append(directory)

    figure = Figure(figsize=(WIDTH, 5.2), layout="constrained")
    axes = figure.subplots()
    num_evaluated = 0
    for i, (superbert, directories) in enumerate(sorted(searches.items())):
        prefix = f"{superbert}: " if len(searches) > 1 else ""
        its_searches = [(runs[directory], logs[directory]) for directory in directories]
        if not any(records for _, records in its_searches):
            raise UserError(f"the log of {directories[0]} holds no scores: name the directories "
                            "of all budgets of this search")
        num_evaluated += draw_superbert(axes, f"C{i}", prefix, its_searches)
    draw_budgets(axes, runs.values())

    task_names = ", ".join(sorted({run["task"] for run in runs.values()}))
    superberts = " and ".join(sorted(searches))
    axes.set_title(f"Sub-BERTs of {superberts}: {num_evaluated:,} evaluated", pad=20)
    axes.set_ylabel(f"{METRIC_NAMES.get(metric, metric)} on the "
                    f"{DATA_NAMES[data_name]} of {task_names}, %")
    if unit == "ms":
        axes.set_xlabel("latency, milliseconds")
    else:
        axes.set_xlabel(unit)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))    # 60k, 60M
    # Below the axes, so that the legend hides no point.
    figure.legend(loc="outside lower center", frameon=False, handletextpad=0.4,
                  ncols=5 if len(searches) == 1 else 2)
    return figure


def draw_superbert(axes, color, prefix, searches):
    """Draw the sub-BERTs that the searches of one super-BERT evaluated and chose.

    searches: a list of (run.json, records). prefix: the beginning of each label.
    Returns the number of sub-BERTs that were evaluated.
    """
    evaluated = {}                                          # {choices: (cost, score)}
    chosen = {}                                             # {architecture: (cost, score)}
    for run, records in searches:
        for record in records:
            evaluated[tuple(record["choices"])] = (record["cost"], record["score"])
        # Two budgets may have the same winner. It gets one star.
        chosen[str(run["arch"])] = (run["cost"], run["selection_score"])
    points = np.array(list(evaluated.values()))             # [n, 2]
    axes.scatter(*points.T, s=12, alpha=0.45, color=color, linewidths=0, rasterized=True,
                 label=f"{prefix}evaluated")
    front = pareto_front(points)
    # The best score stays the best up to the right end.
    front = np.vstack([front, (points[:, 0].max(), front[-1, 1])])
    axes.plot(*front.T, drawstyle="steps-post", color=color, linewidth=1.5,
              label=f"{prefix}best at this cost or less")
    full_model = points[points[:, 0] == searches[0][0]["full_cost"]]
    if len(full_model):
        axes.plot(*full_model[0], "D", color=color, markeredgecolor="black",
                  markersize=8, zorder=3, label=f"{prefix}the full model")
    stars = np.array(list(chosen.values()))                 # [n, 2]
    axes.plot(*stars.T, "*", color=color, markeredgecolor="black", markersize=15,
              zorder=4, label=f"{prefix}chosen by the search")
    return len(points)


def draw_budgets(axes, runs):
    """Draw a thin vertical line at each budget, with the budget as typed above it."""
    budgets = {}                                            # {text: set of costs}
    for run in runs:
        settings = run["settings"]
        # Each search has one budget, of one kind.
        typed = settings["max_params"] or settings["max_flops"] or settings["max_latency"]
        typed = typed[0]
        text = f"{int(typed):,}" if typed.isdigit() else typed
        budgets.setdefault(text, set()).add(run["budget"])
    # Only the first line has a label, so that the legend holds one entry.
    label = "budget"
    for text, costs in budgets.items():
        for cost in sorted(costs):
            axes.axvline(cost, color="0.6", linewidth=0.8, zorder=0, label=label)
            axes.annotate(text, (cost, 1), (0, 3), xycoords=("data", "axes fraction"),
                          textcoords="offset points", ha="center", color="0.3")
            label = None


def pareto_front(points):
    """Return the points that no other point beats at the same cost or less, cheapest first.

    points: [n, 2], each row (cost, score).

    >>> pareto_front(np.array([(3, 70), (1, 60), (2, 50), (3, 80)])).tolist()
    [[1, 60], [3, 80]]
    """
    points = points[np.lexsort((-points[:, 1], points[:, 0]))]
    best_before = np.maximum.accumulate(np.concatenate([[-np.inf], points[:-1, 1]]))
    return points[points[:, 1] > best_before]


# ---- The picture of a training -------------------------------------------------------------------

def draw_training(directory, records):
    """Draw K, the loss and the most likely size on the left, and theta on the right."""
    thetas = [(record["step"], record["theta"]) for record in records if "theta" in record]
    if not thetas:
        raise UserError(f"{directory}: theta was not logged yet, so wait for a few more steps")
    num_variables, num_steps = len(thetas[0][1]), records[-1]["step"]
    height = max(6, 0.5 * num_variables + 1.5)
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.suptitle(f"The training of a super-BERT on {task_name(directory)}: "
                    f"{num_steps:,} steps")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.05))
    curves = left.subplots(3, 1, sharex=True)
    draw_curves(curves, records)
    maps = right.subplots(num_variables, 1, sharex=True, squeeze=False)[:, 0]
    mesh = draw_thetas(maps, thetas)
    right.colorbar(mesh, ax=list(maps), label="probability theta")
    # The lines of the stages lie above the maps of theta (zorder 1) and below the
    # curves (2).
    for axes in (*curves, *maps):
        for first_step, _ in stage_starts(records)[1:]:
            axes.axvline(first_step, color="0.75", linewidth=0.8, zorder=1.5)
    for axes in (curves[0], maps[0]):
        for first_step, stage in stage_starts(records):
            axes.annotate(stage, (first_step, 1), (2, 3),
                          xycoords=("data", "axes fraction"), textcoords="offset points",
                          fontsize="small", color="0.4")
    return figure


def task_name(directory):
    """Return the name of the data that a training used.

    It is the name of the directory if the log names no data.
    """
    settings = read_log(directory)[0].get("settings", {})
    return os.path.basename(os.path.realpath(settings.get("data", directory)))


def stage_starts(records):
    """Return (first step, name) of every stage.

    Consecutive stages of the same name count as one.
    """
    starts = [(0, records[0]["stage"])]
    for before, record in zip(records, records[1:]):
        if before["stage"] != record["stage"]:
            starts.append((before["step"], record["stage"]))
    return starts


def draw_curves(curves, records):
    """Draw K with its lower bound, the loss, and the size of the most likely architecture."""
    steps = [record["step"] for record in records]
    K_axes, loss_axes, params_axes = curves
    K_axes.plot(steps, [record["K"] for record in records], linewidth=1.2, label="K")
    K_axes.plot(steps, [record["floor"] for record in records], "--", linewidth=1.2,
                label="its lower bound")
    K_axes.set_ylim(0, 1.05)
    K_axes.set_ylabel("probability K to\nsample from theta")
    K_axes.legend(loc="lower left", fontsize="small")
    loss_axes.plot(steps, [record["loss"] for record in records], linewidth=0.8)
    loss_axes.set_ylim(bottom=0)
    loss_axes.set_ylabel("training loss")
    params_axes.plot(steps, [record["most_likely_params"] for record in records],
                     linewidth=1.2, drawstyle="steps-post")
    params_axes.set_ylim(bottom=0)
    params_axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    params_axes.set_ylabel("parameters of the most\nlikely architecture")
    params_axes.set_xlabel("training step")


def draw_thetas(maps, thetas):
    """Draw theta of the depth and of every layer over time.

    thetas: a list of (step, theta). A closed choice has theta = 0 and stays white.
    Returns one of the meshes, for the color bar.
    """
    # The column of a record reaches from the step of the previous record to its own step.
    edges = [0] + [step for step, _ in thetas]
    for i, axes in enumerate(maps):
        theta = np.array([theta[i] for _, theta in thetas]).T       # [categories, records]
        mesh = axes.pcolormesh(edges, np.arange(len(theta) + 1),
                               np.ma.masked_equal(theta, 0), vmin=0, vmax=1, rasterized=True)
        axes.set_yticks([])
        axes.set_ylabel("depth" if i == 0 else f"layer {i}", rotation=0, ha="right",
                        va="center")
    maps[-1].set_xlabel("training step")
    maps[0].figure.supxlabel("a row is one choice of size, the largest on top (white: closed)",
                             fontsize="small", color="0.4")
    return mesh


def main(argv=None):
    """Run the program and return its exit status (see `glue.run_program`)."""
    parser = Parser("glue.plot", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("directories", nargs="+", metavar="DIR",
                        help="a directory that train or search wrote")
    parser.add_argument("--out", metavar="FILE.svg",
                        help="the picture (default: NAME.svg, named after the first DIR)")
    return run_program(parser, plot, argv)


if __name__ == "__main__":
    sys.exit(main())
