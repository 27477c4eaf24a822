"""Draw what a search evaluated, how a super-BERT was trained, or the results page.

    python -m glue.plot subbert/MRPC-60000000 ... [--out FILE.svg]
    python -m glue.plot superbert/MRPC            [--out FILE.svg]
    python -m glue.plot results                   [--out DIR] [--results DIR]

The picture of a search shows the score and the cost of every sub-BERT that was
evaluated, the best score at each cost, the budgets, and the sub-BERTs that the search
chose. Several directories share one picture.

The picture of a training shows the controller K, the loss, the parameters of the most
likely architecture, and theta over time. It needs log.jsonl and no other file, so it
can also be drawn while the training is still running.

The word `results` draws the pictures of glue/results/README.md from the cells that
`python -m glue.paper collect` has stored. (A directory of that name is ./results.)

The same input always gives the same bytes. The program needs matplotlib.
"""

import io
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from glue import paper, run_program
from model import read_json, user_errors_for, UserError, print_line, write_file
from yoco import Parser, read_log, read_run

try:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import EngFormatter, MaxNLocator
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
# All pictures are 850 pixels wide in a browser, which shows 96 pixels per inch.
WIDTH = 850 / 96


def plot(options):
    """Draw one picture, or those of the results page, and write them as SVG files."""
    if matplotlib is None:
        raise UserError("plots need one more package: pip install matplotlib")
    # The user's own settings of matplotlib must not change the picture.
    style = {**matplotlib.rcParamsDefault, "axes.spines.top": False,
             "axes.spines.right": False}
    # A "$" in the name of a directory is an ordinary character.
    style["text.parse_math"] = False
    # With a fixed salt, the ids in the file are no longer random.
    style["svg.hashsalt"] = "yoco"
    with matplotlib.rc_context(style):
        if options.directories == ["results"]:
            plot_results(Path(options.results), Path(options.out or options.results))
        else:
            plot_runs(options)


def plot_runs(options):
    """Draw one training, or one or more searches, into one file."""
    logs = {directory: read_records(directory) for directory in options.directories}
    is_training = any("step" in records[0] for records in logs.values() if records)
    if is_training:
        if len(logs) > 1:
            raise UserError("one picture shows several sub-BERTs, or one super-BERT: name one "
                            "directory")
        name = os.path.basename(os.path.realpath(options.directories[0]))
    else:
        runs = {directory: read_search(directory) for directory in logs}
        superberts = sorted({os.path.basename(os.path.realpath(run["superbert"]))
                             for run in runs.values()})
        # Without "-search", this would be the name of the training's picture.
        name = f"{'-'.join(superberts)}-search"
    out = Path(options.out or f"{name}.svg")
    if out.suffix != ".svg":
        raise UserError(f"--out {out}: the picture's name must end in .svg")
    save(draw_training(*logs.popitem()) if is_training else draw_searches(logs, runs), out)


def save(figure, path):
    """Write a figure as an SVG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", dpi=200, metadata={"Date": None})
    write_file(path, buffer.getvalue())
    print_line(f"wrote {path}")


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

def read_search(directory):
    """Return the run.json of a search. Raises UserError if it is that of a training."""
    run = read_run(directory)
    if "unit" not in run:
        raise UserError(f"{directory} is a super-BERT, and its log holds no training steps")
    return run


def draw_searches(logs, runs):
    """Draw score against cost, in one color for each super-BERT.

    logs: {directory: records}. runs: {directory: run.json}.
    Raises UserError if the searches differ in the unit of cost, the metric, or the data.
    """
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
    # Room for the labels of the highest stars.
    axes.margins(y=0.08)

    task_names = ", ".join(sorted({run["task"] for run in runs.values()}))
    superberts = " and ".join(sorted(searches))
    axes.set_title(f"Sub-BERTs of {superberts}: {num_evaluated:,} evaluated", pad=28)
    axes.set_ylabel(f"{METRIC_NAMES.get(metric, metric)} on the "
                    f"{DATA_NAMES[data_name]} of {task_names}, %")
    if unit == "ms":
        axes.set_xlabel("latency, milliseconds")
    else:
        axes.set_xlabel(unit)
        # 60k, 60M
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
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
    chosen = {}                         # {architecture: (cost, score, [budget as typed])}
    for run, records in searches:
        for record in records:
            evaluated[tuple(record["choices"])] = (record["cost"], record["score"])
        # Two budgets may have the same winner. It gets one star, with both budgets.
        star = chosen.setdefault(str(run["arch"]), (run["cost"], run["selection_score"], []))
        star[2].append(typed_budget(run))
    points = np.array(list(evaluated.values()))             # [n, 2]
    axes.scatter(*points.T, s=12, alpha=0.45, color=color, linewidths=0, rasterized=True,
                 label=f"{prefix}evaluated")
    front = pareto_front(points)
    # Extend the line of the best score to the right end.
    front = np.vstack([front, (points[:, 0].max(), front[-1, 1])])
    axes.plot(*front.T, drawstyle="steps-post", color=color, linewidth=1.5,
              label=f"{prefix}best at this cost or less")
    full_model = points[points[:, 0] == searches[0][0]["full_cost"]]
    if len(full_model):
        axes.plot(*full_model[0], "D", color=color, markeredgecolor="black",
                  markersize=8, zorder=3, label=f"{prefix}the full model")
    stars = np.array([star[:2] for star in chosen.values()])        # [n, 2]
    axes.plot(*stars.T, "*", color=color, markeredgecolor="black", markersize=15,
              zorder=4, label=f"{prefix}chosen by the search")
    for cost, score, budgets in chosen.values():
        axes.annotate(", ".join(dict.fromkeys(budgets)), (cost, score), (0, 9),
                      textcoords="offset points", ha="center", zorder=5, fontsize="small",
                      bbox=dict(facecolor="white", edgecolor="none", alpha=0.8, pad=0.5))
    return len(points)


def typed_budget(run):
    """Return the budget of a search as the user typed it, with commas in a plain number."""
    settings = run["settings"]
    # Each search has one budget, of one kind.
    typed = (settings["max_params"] or settings["max_flops"] or settings["max_latency"])[0]
    return f"{int(typed):,}" if typed.isdigit() else typed


def draw_budgets(axes, runs):
    """Draw a line at each budget and a dotted one at the full model, with names above them."""
    budgets = {}                                            # {text: set of costs}
    for run in runs:
        budgets.setdefault(typed_budget(run), set()).add(run["budget"])
    lines = [(text, cost, "-", 3) for text, costs in budgets.items() for cost in sorted(costs)]
    # Write "full model" higher, because a budget's name may be close to it.
    lines += [("full model", cost, ":", 14) for cost in sorted({run["full_cost"] for run in runs})]
    # Only the first line has a label, so that the legend holds one entry.
    label = "budget"
    for text, cost, linestyle, height in lines:
        axes.axvline(cost, color="0.6", linewidth=0.8, linestyle=linestyle, zorder=0, label=label)
        axes.annotate(text, (cost, 1), (0, height), xycoords=("data", "axes fraction"),
                      textcoords="offset points", ha="center", color="0.3", fontsize="small")
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

# ---- The pictures of the results page ------------------------------------------------------------

# The rows of the pictures, in plain words. The colors suit color-blind readers (Okabe
# and Ito).
ROW_NAMES = {
    "plain": "plain", "plain lr=2e-5": "plain, rate 2e-5", "truncated": "truncated",
    "truncated epochs=3": "truncated, 3 epochs", "paper": "paper", "best": "best",
    "no-reorder": "no sorting", "no-distill": "no distillation",
    "first": "keep the first layers", "progressive": "the authors' stages",
    "exploit": "only exploit", "explore": "only explore", "noise": "follow noise",
    "lr": "rate", "length": "length",
}
COLORS = {"plain": "#000000", "truncated": "#E69F00", "paper": "#0072B2", "best": "#D55E00",
          "HAT": "#009E73", "OFA": "#CC79A7"}
# The scores whose differences are drawn, {name: (the keys of the score, marker, color)}.
FOUND_ON_DEV = {"found below half of the encoder, dev": (paper.SMALLEST, "o", "#D55E00")}
FOUND = {"found below half of the encoder, hold-out": ((0.5, "holdout", "score"), "s", "#0072B2")}
DRAWN = {"mean of 20 drawn ones, hold-out": (("uniform",), "^", "#009E73")}
LARGEST = {"largest, hold-out": ((1.0, "holdout", "score"), "D", "#CC79A7")}
TABLE_TASKS = ("MRPC", "CoLA")


def plot_results(results, out):
    """Draw the pictures of the results page.

    results: the directory of the cells. out: the directory for the pictures.
    Skips a picture if its cells are missing. Raises UserError if there are no cells.
    """
    options = SimpleNamespace(results=results, tasks=None, variants=None, seeds=None,
                              precision="auto")
    cells = paper.load_cells(options)
    pictures = {"core": draw_core, "depth": draw_depth, "ablation": draw_ablation,
                "strategies": draw_strategies, "tuning": draw_tuning, "sizes": draw_sizes,
                "choice": draw_choice}
    if not cells:
        raise UserError(f"{results} holds no cells: run python -m glue.paper collect first")
    out.mkdir(parents=True, exist_ok=True)
    for name, draw in pictures.items():
        figure = Figure(figsize=(WIDTH, 4), layout="constrained")
        if draw(figure, cells):
            save(figure, out / f"{name}.svg")
    speed = results / "speed.json"
    if speed.exists():
        figure = Figure(figsize=(WIDTH, 4), layout="constrained")
        with user_errors_for(speed, "does not hold the ratios of speed"):
            draw_speed(figure, read_json(speed)["rows"])
        save(figure, out / "speed.svg")


def row_name(variant):
    """Return the name of a variant in plain words.

    >>> row_name("best no-distill"), row_name("paper lr=5e-5")
    ('best, no distillation', 'paper, rate 5e-5')
    """
    if variant in ROW_NAMES:
        return ROW_NAMES[variant]
    base, *words = variant.split()
    names = []
    for word in words:
        setting, _, value = word.partition("=")
        names.append(f"{ROW_NAMES.get(setting, setting)} {value}".strip())
    return ", ".join([base, *names])


def draw_mean(axes, mean, y, spread, color, marker="o"):
    """Draw a mean at the height y, with its spread to both sides.

    A spread of None means one seed, and the marker is then open. An arrow shows that the
    spread continues beyond the axes. A mean beyond the axes is written at the edge.
    """
    low, high = axes.get_xlim()
    if spread is not None:
        axes.plot([mean - spread, mean + spread], [y, y], color=color, linewidth=1.3, zorder=2)
    axes.plot(mean, y, marker, color=color, markersize=5.5, zorder=3,
              markerfacecolor="white" if spread is None else color)
    for edge, arrow, align, excess, is_outside in (
            (low, "<", "left", low - (mean - (spread or 0)), mean < low),
            (high, ">", "right", mean + (spread or 0) - high, mean > high)):
        if excess > 0:
            axes.plot(edge, y, arrow, color=color, markersize=4, clip_on=False, zorder=3)
        if is_outside:
            axes.annotate(f"mean {mean:.1f}", (edge, y), (0, 4), textcoords="offset points",
                          ha=align, fontsize="x-small", color=color)


def set_rows(axes, names):
    """Give the axes one horizontal row for each name, from top to bottom."""
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))


def draw_differences(axes, cells, task, rows, measures, limits=None):
    """Draw the differences between variants, with their 95% intervals.

    rows: a list of (variant, the variant that it is compared with). limits: the ends of
    the x-axis. By default, it shows all means, with margins as wide as their range.
    """
    drawn = []                                  # (difference, height, half width, color, marker)
    for y, (variant, first) in enumerate(rows):
        if len({paper.canonical_variant(task, name) for name in (variant, first)}) == 1:
            continue
        for n, (keys, marker, color) in enumerate(measures.values()):
            difference, half_width = paper.paired_difference(
                paper.field_values(cells, task, variant, keys),
                paper.field_values(cells, task, first, keys, variant))
            if difference is not None:
                height = y + 0.24 * (n - (len(measures) - 1) / 2)
                color = color or COLORS[variant.split()[0]]
                drawn.append((difference, height, half_width, color, marker))
    means = [0, *(difference for difference, *_ in drawn)]
    span = max(1, max(means) - min(means))
    axes.set_xlim(limits or (min(means) - span, max(means) + span))
    axes.axvline(0, color="0.6", linewidth=0.8, zorder=0)
    for arguments in drawn:
        draw_mean(axes, *arguments)
    set_rows(axes, [row_name(variant) for variant, _ in rows])


def draw_legend(figure, measures):
    """Draw the legend of differences below the panels."""
    handles = [Line2D([], [], marker=marker, color=color, linewidth=1.3, label=name)
               for name, (_, marker, color) in measures.items()]
    handles.append(Line2D([], [], marker="o", color="0.4", markerfacecolor="white",
                          linewidth=0, label="open: one seed, no interval"))
    handles.append(Line2D([], [], marker=">", color="0.4", markersize=4, linewidth=1.3,
                          label="arrow: the interval goes on"))
    figure.legend(handles=handles, loc="outside lower center", frameon=False, ncols=3,
                  fontsize="small")


def tasks_with(cells, variants):
    """Return the tasks that have cells of all of these variants."""
    return [task for task in paper.tasks_of(cells)
            if all(paper.precisions_of(cells, task, variant) for variant in variants)]


def draw_core(figure, cells):
    """Draw each task's scores in the upper panels, and the differences in the lower ones.

    Returns False if its cells are missing, like every function in `pictures`.
    """
    variants = paper.TABLES["core"][0]
    tasks = tasks_with(cells, variants)
    if not tasks:
        return False
    cells = {(task, variant): cell for (task, variant), cell in cells.items() if task in tasks}
    figure.set_size_inches(WIDTH, 4.6)
    scores, differences = figure.subplots(2, len(tasks) + 1, sharey=True, squeeze=False)
    for axes, task in zip(scores, [*tasks, paper.MEAN]):
        axes.set_title(task, fontsize="medium")
        draw_scores(axes, cells, task, variants)
    for axes, task in zip(differences, [*tasks, paper.MEAN]):
        rows = [(variant, "plain") for variant in variants]
        draw_differences(axes, cells, task, rows, {"": (paper.SMALLEST, "o", None)}, (-20, 12))
    names = [row_name(variant) for variant in variants]
    for axes in (*scores, *differences):
        set_rows(axes, names)
        axes.xaxis.set_major_locator(MaxNLocator(3, integer=True))
        axes.tick_params(labelsize="small")
    scores[len(tasks) // 2].set_xlabel("dev score, %: a small dot is a seed", fontsize="small")
    differences[len(tasks) // 2].set_xlabel(
        "difference from plain in points, with its 95% interval", fontsize="small")
    handles = [Line2D([], [], color="black", linestyle="--", label="plain fine-tuning"),
               Line2D([], [], color="0.5", linestyle=":", label="always the most frequent "
                      "answer (a number: it lies to the left)")]
    figure.legend(handles=handles, loc="outside lower center", frameon=False, ncols=2,
                  fontsize="small")
    return True


def draw_scores(axes, cells, task, variants):
    """Draw the dev scores of half of the encoder: each seed, the mean, and the deviation."""
    by_variant = [paper.field_values(cells, task, variant, paper.SMALLEST)
                  for variant in variants]
    values = [value for scores in by_variant for value in scores.values()]
    low, high = min(values), max(values)
    margin = 0.12 * (high - low)
    axes.set_xlim(low - margin, high + margin)
    for y, (variant, scores) in enumerate(zip(variants, by_variant)):
        color = COLORS[variant.split()[0]]
        mean, deviation = paper.mean_and_deviation(scores)
        axes.plot(list(scores.values()), [y + 0.25] * len(scores), "o", color=color,
                  markersize=2.5, linewidth=0)
        draw_mean(axes, mean, y, deviation, color)
        if variant == "plain":
            axes.axvline(mean, color="black", linestyle="--", linewidth=0.8, zorder=0)
    tasks = paper.tasks_of(cells) if task == paper.MEAN else [task]
    majority = np.mean([paper.MAJORITY.get(each, 0) for each in tasks])
    if majority > low - margin:
        axes.axvline(majority, color="0.5", linestyle=":", linewidth=1, zorder=0)
    else:
        axes.annotate(f"\N{LEFTWARDS ARROW} {majority:.3g}", (0, 1), (3, -1),
                      xycoords="axes fraction", textcoords="offset points", va="top",
                      fontsize="x-small", color="0.4")


def draw_depth(figure, cells):
    """Plot the dev and hold-out scores of random architectures and of each search's choice."""
    variants = [variant for variant in paper.MATTERS if tasks_with(cells, [variant])]
    if not variants:
        return False
    tasks = tasks_with(cells, variants)
    figure.set_size_inches(WIDTH, 7)
    panels = figure.subplots(len(variants), len(tasks), squeeze=False)
    names = {"sng": ("EE-SNG, the paper's search", "*", 13),
             "evolution": ("evolution", "P", 9), "random": ("random search", "X", 9)}
    colors = matplotlib.colormaps["plasma_r"](np.linspace(0.1, 1, 4))
    for axes_of_variant, variant in zip(panels, variants):
        for axes, task in zip(axes_of_variant, tasks):
            by_seed = paper.field_values(cells, task, variant, ())
            seed = min(by_seed)
            facts = by_seed[seed]
            drawn = np.array(facts["drawn"])                # [n, 3]: depth, hold-out, dev
            for depth, color in zip(np.unique(drawn[:, 0]), colors):
                members = drawn[drawn[:, 0] == depth]
                axes.scatter(members[:, 1], members[:, 2], s=11, color=color, alpha=0.75,
                             linewidths=0, rasterized=True, label=f"{depth:.0f} layers")
            for method, (name, marker, size) in names.items():
                found = facts["methods"][method]
                axes.plot(found["holdout"]["score"], found["dev"]["score"], marker,
                          color="white", markeredgecolor="black", markersize=size,
                          linewidth=0, label=f"found by {name}")
            recipe = variant.split()[-1]
            axes.set_title(f"{task}, recipe {recipe}, seed {seed}", fontsize="medium")
            axes.set_xlabel("hold-out score, %")
            axes.set_ylabel("dev score, %")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", frameon=False, ncols=4,
                  fontsize="small", markerscale=1.2)
    return True


def draw_difference_panels(figure, cells, rows, measures):
    """Draw one panel of differences for each task of the paper's tables.

    rows: a list of (variant, the variant that it is compared with).
    """
    figure.get_layout_engine().set(wspace=0.05)
    panels = figure.subplots(1, len(TABLE_TASKS), sharey=True)
    for axes, task in zip(panels, TABLE_TASKS):
        draw_differences(axes, cells, task, rows, measures)
        axes.set_title(task, fontsize="medium")
        axes.set_xlabel("difference in points")
    draw_legend(figure, measures)


def draw_ablation(figure, cells):
    """Draw what the recipe `best` loses without each of its parts."""
    first, *others = paper.TABLES["ablation"][0]
    if not set(TABLE_TASKS) & set(tasks_with(cells, [first, *others[:-1]])):
        return False
    figure.suptitle("difference from the recipe best", fontsize="medium")
    draw_difference_panels(figure, cells, [(other, first) for other in others],
                           FOUND_ON_DEV | FOUND | DRAWN)
    return True


def draw_strategies(figure, cells):
    """Draw other ways to sample architectures in training, against the paper's (Tab. 3, 4)."""
    rows = [(variant, first) for first, *others in paper.TABLES["4"] for variant in others]
    if not set(TABLE_TASKS) & set(tasks_with(cells, [variant for variant, _ in rows])):
        return False
    rows[len(paper.STRATEGIES):len(paper.STRATEGIES)] = [("HAT", "paper"), ("OFA", "paper")]
    figure.set_size_inches(WIDTH, 4.6)
    figure.suptitle("difference from the recipe that learns the distribution",
                    fontsize="medium")
    draw_difference_panels(figure, cells, rows, FOUND_ON_DEV | FOUND | DRAWN)
    return True


def draw_tuning(figure, cells):
    """Draw how further fine-tuning changes the score of a sub-BERT (Tab. 5)."""
    tasks = [task for task in TABLE_TASKS if task in tasks_with(cells, paper.TUNED["best"])]
    if not tasks:
        return False
    figure.set_size_inches(WIDTH, 4.8)
    panels = figure.subplots(2, len(tasks), sharex=True, sharey="row", squeeze=False)
    splits = {"dev": "dev", "holdout": "hold-out"}
    for axes_of_split, (split, split_name) in zip(panels, splits.items()):
        for axes, task in zip(axes_of_split, tasks):
            axes.axhline(0, color="0.6", linewidth=0.8, zorder=0)
            for first, variants in paper.TUNED.items():
                keys = ("smallest", split, "score")
                changes = {}
                for variant in variants:
                    change, _ = paper.paired_difference(
                        paper.field_values(cells, task, variant, keys),
                        paper.field_values(cells, task, first, keys, variant))
                    if change is not None:
                        changes[float(variant.split()[-1])] = change
                axes.plot(*zip(*sorted(changes.items())), "o-", color=COLORS[first],
                          markerfacecolor="white", linewidth=1.2, label=first)
            axes.set_xscale("log")
            axes.set_xticks(sorted(changes), [f"{rate:.0e}".replace("e-0", "e-")
                                              for rate in sorted(changes)])
            axes.minorticks_off()
            axes.set_ylabel(f"change on {split_name}, points", fontsize="small")
    for axes, task in zip(panels[0], tasks):
        axes.set_title(task, fontsize="medium")
    for axes in panels[-1]:
        axes.set_xlabel("learning rate of the further fine-tuning")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), frameon=False, ncols=4,
                  loc="outside lower center",
                  title="the sub-BERT was found in the super-BERT of (open: one seed)",
                  fontsize="small", title_fontsize="small")
    return True


def draw_sizes(figure, cells):
    """Draw the dev score of the best sub-BERT in each band of sizes (Tab. 1, Fig. 2)."""
    tasks = tasks_with(cells, paper.BANDED)
    if not tasks:
        return False
    panels = figure.subplots(1, len(tasks), squeeze=False)[0]
    for axes, task in zip(panels, tasks):
        for variant in paper.BANDED:
            recipe = variant.split()[-1]
            for seed, facts in paper.field_values(cells, task, variant, ()).items():
                points = [(scores["params"], scores["dev"]["score"])
                          for scores in facts["scores"]]
                axes.plot(*zip(*points), "o-", color=COLORS[recipe], linewidth=1.2,
                          markerfacecolor="white", label=f"recipe {recipe}, seed {seed}")
                plain = paper.field_values(cells, task, "plain", ("smallest",),
                                           variant).get(seed)
                if plain and variant == paper.BANDED[-1]:
                    axes.axhline(plain["dev"]["score"], color="black", linestyle="--",
                                 linewidth=0.8, label=f"plain, all "
                                 f"{plain['params'] / 1e6:.1f}M parameters, seed {seed}")
        axes.axhline(paper.MAJORITY.get(task, 0), color="0.5", linestyle=":", linewidth=1,
                     label="always the most frequent answer")
        axes.set_title(task, fontsize="medium")
        axes.set_xlabel("parameters of the sub-BERT")
        axes.set_ylabel("dev score, %")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center",
                  frameon=False, ncols=2, fontsize="small")
    return True


def draw_choice(figure, cells):
    """Draw what other rates and lengths change on the hold-out set."""
    rows = []
    for first, *others in [["plain", *paper.CHOICE_PLAIN], *paper.TABLES["choose"][1:]]:
        for variant in others:
            stored_names = [paper.canonical_variant(task, variant) for task in TABLE_TASKS]
            if any((task, name) in cells and name != first
                   for task, name in zip(TABLE_TASKS, stored_names)):
                rows.append((variant, first))
    if not rows:
        return False
    figure.set_size_inches(WIDTH, 6.6)
    figure.suptitle("difference from the chosen rate and length", fontsize="medium")
    draw_difference_panels(figure, cells, rows, FOUND | DRAWN | LARGEST)
    return True


def draw_speed(figure, rows):
    """Draw the ratios of speed as bars from 1, which means equally fast."""
    axes = figure.subplots()
    axes.set_xscale("log")
    for y, row in enumerate(rows):
        ratio = row["ratio"]
        axes.barh(y, ratio - 1, left=1, height=0.6, color="#0072B2" if ratio > 1 else "#E69F00")
        axes.annotate(f"{ratio:.2f}", (max(ratio, 1), y), (4, 0), textcoords="offset points",
                      va="center", fontsize="small")
    axes.axvline(1, color="black", linewidth=0.8)
    set_rows(axes, [row["label"] for row in rows])
    axes.set_xlim(0.8, 20)
    axes.set_xticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
    axes.minorticks_off()
    axes.tick_params(labelsize="small")
    axes.set_xlabel("ours divided by the other way (logarithmic axis)")


def main(argv=None):
    """Run the program and return its exit status (see `glue.run_program`)."""
    parser = Parser("glue.plot", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("directories", nargs="+", metavar="DIR",
                        help="a directory that train or search wrote, or the word results")
    parser.add_argument("--out", metavar="FILE.svg",
                        help="the picture (default: NAME.svg, named after the super-BERT), or "
                             "the directory for the pictures of results")
    parser.add_argument("--results", metavar="DIR", default=str(paper.ROOT / "glue/results"),
                        help="the directory of the collected cells (default: glue/results)")
    return run_program(parser, plot, argv)


if __name__ == "__main__":
    sys.exit(main())
