"""Pictures of what was searched, or of how a super-BERT was trained. Needs matplotlib.

    python -m glue.plot subbert/MRPC-60000000 ... [--out FILE.svg]
    python -m glue.plot superbert/MRPC            [--out FILE.svg]

Of sub-BERTs: score against cost of all architectures that their searches scored; the front, the
best score for every cost; and what was found. Of a super-BERT, also one that is still training:
loss, controller K with its floor, entropy, parameters of the most likely architecture; and theta of
depth and of every layer over time. The same directories make the same bytes.
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
except ImportError:
    matplotlib = None

SEARCHED = {"choices", "score", "cost"}
TRAINED = {"step", "stage", "loss", "K", "floor", "entropy", "most_likely_params"}


def plot(options):
    """Draw one picture."""
    if matplotlib is None:
        raise UserError("plots need one more package: pip install matplotlib")
    name = os.path.basename(os.path.realpath(options.directories[0]))
    out = Path(options.out or f"{name}.svg")
    if out.suffix != ".svg":
        raise UserError(f"--out {out}: only .svg is written")
    logs = {directory: records_of(directory) for directory in options.directories}
    training = any("step" in log[0] for log in logs.values() if log)
    if training and len(logs) > 1:
        raise UserError("one picture shows sub-BERTs, or one super-BERT")
    # No settings of the user's, no time and no random names in the file.
    style = {"svg.hashsalt": "yoco", "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **style}):
        figure = draw_training(*logs.popitem()) if training else draw_searches(logs)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    write_file(out, buffer.getvalue())
    print_line(f"wrote {out}")


def records_of(directory):
    """The records of a run's log, without its first line, which holds the settings."""
    path = Path(directory) / "log.jsonl"
    if not path.exists():
        raise UserError(f"{path} does not exist: neither train nor search wrote {directory}")
    records = read_log(directory)[1:]
    if not all(SEARCHED <= set(record) or TRAINED <= set(record) for record in records):
        raise UserError(f"{path} has lines of neither train nor search")
    return records


def draw_searches(logs):
    """Score against cost, in one color for each super-BERT. logs: {directory: records}."""
    runs, pools = {directory: read_run(directory) for directory in logs}, {}
    for directory, run in runs.items():
        if "unit" not in run:
            raise UserError(f"{directory} is no search, and its log has no steps of a training")
    scales = {(run["unit"], run["metric"], run["selected_on"]) for run in runs.values()}
    if len(scales) > 1:
        raise UserError("these do not fit into one picture: "
                        + "; ".join(", ".join(scale) for scale in sorted(scales)))
    for directory, run in runs.items():
        # Several budgets share their scores, and each log has what its search asked for first.
        pools.setdefault(run["superbert"], []).append(directory)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for i, (superbert, directories) in enumerate(sorted(pools.items())):
        points = np.array([(record["cost"], record["score"])
                           for name in directories for record in logs[name]])    # [n, 2]
        if not len(points):
            raise UserError(f"{directories[0]} has no scores of its own: name the directories of "
                            "all budgets of its search")
        found = np.array([(runs[d]["cost"], runs[d]["selection_score"]) for d in directories])
        color, name = f"C{i}", Path(superbert).name
        axes.scatter(*points.T, s=8, alpha=0.4, color=color, linewidths=0, rasterized=True,
                     label=f"{name}: {len(points)} scored")
        axes.plot(*front_of(points).T, drawstyle="steps-post", color=color, label=f"{name}: front")
        axes.plot(*found.T, "*", color=color, markeredgecolor="black", markersize=12,
                  label=f"{name}: found", zorder=3)
    unit, metric, part = scales.pop()
    axes.set_xlabel(f"cost, {unit}")
    axes.set_ylabel(f"{metric}, % on {part}")
    axes.legend(loc="lower right", fontsize="small")
    return figure


def front_of(points):
    """Of points [n, 2], (cost, score), those that no other beats at the same cost or less, from the
    cheapest on.

    >>> front_of(np.array([(3, 70), (1, 60), (2, 50), (3, 80)])).tolist()
    [[1, 60], [3, 80]]
    """
    points = points[np.lexsort((-points[:, 1], points[:, 0]))]
    best_before = np.maximum.accumulate(np.concatenate([[-np.inf], points[:-1, 1]]))
    return points[points[:, 1] > best_before]


def draw_training(directory, log):
    """The curves of a log on the left, theta on the right."""
    thetas = [(record["step"], record["theta"]) for record in log if "theta" in record]
    if not thetas:
        raise UserError(f"{directory}: theta was not logged yet; wait for some steps more")
    steps, variables = [record["step"] for record in log], len(thetas[0][1])
    figure = Figure(figsize=(11, max(6, 0.55 * variables + 1)), layout="constrained")
    left, right = figure.subfigures(1, 2)
    figure.suptitle(f"{os.path.basename(os.path.realpath(directory))}: {steps[-1]} steps")
    curves = left.subplots(4, 1, sharex=True)
    for axes, name, title in zip(curves, ("loss", "K", "entropy", "most_likely_params"), (
            "loss", "controller K", "entropy, nats", "parameters of the\nmost likely")):
        axes.plot(steps, [record[name] for record in log], linewidth=1, label=name)
        axes.set_ylabel(title)
        for before, record in zip(log, log[1:]):
            if before["stage"] != record["stage"]:
                axes.axvline(before["step"], color="0.8", linewidth=0.6, zorder=0)
    curves[1].plot(steps, [record["floor"] for record in log], "--", linewidth=1, label="its floor")
    curves[1].legend(fontsize="small")
    curves[1].set_ylim(0, 1.05)
    curves[3].set_xlabel("step; grey: heads, FFN sizes, depths begin to open")
    maps = right.subplots(variables, 1, sharex=True, squeeze=False)[:, 0]
    for i, axes in enumerate(maps):
        # One column per record, from the one before to its own step.
        theta = np.array([theta[i] for _, theta in thetas]).T            # [categories, records]
        mesh = axes.pcolormesh([0] + [step for step, _ in thetas], np.arange(len(theta) + 1),
                               theta, vmin=0, vmax=1, rasterized=True)
        axes.set_yticks([])
        axes.set_ylabel("depth" if i == 0 else f"layer {i}", rotation=0, ha="right", va="center")
    maps[-1].set_xlabel("step; in each row the largest choice on top")
    right.colorbar(mesh, ax=list(maps), label="theta")
    return figure


def main(argv=None):
    """Run the program; the exit status, as `glue.run_program` has it."""
    parser = Parser("glue.plot", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("directories", nargs="+", metavar="DIR", help="what train or search wrote")
    parser.add_argument("--out", metavar="FILE.svg", help="the picture; without it NAME.svg, after "
                                                          "the first directory")
    return run_program(parser, plot, argv)


if __name__ == "__main__":
    sys.exit(main())
