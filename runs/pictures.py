"""Pictures of the ladder, as SVG: what each stage gained, and the curve of each stage.

    python runs/pictures.py

writes docs/pictures/ladder.svg, from the results of several runs of runs/demo.py (results.jsonl of
each, one after the other in a file), and a curve for each stage of the run in out/demo.
Text and lines are grey on no background, which can be read on white and on black.
"""

import contextlib
import io
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from gosling.config import UserError, read_flags
from gosling.files import atomic_write, read_json, whole_lines

GREY, BEFORE, AFTER, CONTROL = "#808080", "#b0b0b0", "#2f8f6f", "#c08a3e"
CURVES = {  # stage: the numbers of its metrics.jsonl that its curve shows, a row of axes for each
    "pretrain": (("loss", "val_loss"),),
    "sft": (("loss", "val_loss"),),
    "more": (("loss", "val_loss"),),
    "state": (("loss",),),
    "dpo": (("loss",), ("rewards/accuracies",)),
    "reward": (("loss", "val_loss"), ("accuracy", "val_accuracy")),
    "grpo": (("reward",), ("entropy",)),
    "self_reward": (("exact_match",),),
}


@dataclass
class Config:
    results: str = "bench/results/2026-11-29-quick.jsonl"  # results.jsonl of one or more runs
    demo: str = "out/demo"  # a run's folder, for the curves
    out: str = "docs/pictures"  # folder for the pictures


@contextlib.contextmanager
def axes(height, n_rows=1):
    """`with axes(height) as (found, rows):` draw on rows[i]; then found["svg"] is the picture."""
    import matplotlib
    from matplotlib.figure import Figure

    # Text stays text; without a salt and a date the same numbers give the same file.
    style = {"svg.fonttype": "none", "svg.hashsalt": "gosling", "font.family": "sans-serif"}
    style |= dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor"), GREY)
    style |= dict.fromkeys(("xtick.color", "ytick.color"), GREY)
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(7.5, height))
        found = {}
        rows = figure.subplots(n_rows, squeeze=False)[:, 0]
        for row in rows:
            row.set_facecolor("none")
            row.spines[["top", "right"]].set_visible(False)
        yield found, rows
        buffer = io.StringIO()
        figure.savefig(
            buffer, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None}
        )
    text = buffer.getvalue()
    found["svg"] = text[text.index("<svg") :]


def by_stage(results):
    """Rows of results.jsonl, of one run or several -> {stage: its rows}, in the order of CURVES, of
    the stages that are measured in shares of right answers."""
    stages = {}
    for row in sorted(results, key=lambda row: list(CURVES).index(row["stage"])):
        if row["metric"] in ("exact_match", "val_accuracy"):
            stages.setdefault(row["stage"], []).append(row)
    return stages


def ladder_svg(results):
    """Bars of each stage, before and after; of several runs the mean, and a line from the lowest to
    the highest."""
    stages = by_stage(results)
    with axes(0.45 * len(stages) + 0.9) as (found, (ax,)):
        for y, rows in enumerate(stages.values()):
            before = [row["before"] for row in rows if row["before"] is not None]
            after = [row["after"] for row in rows]
            mean = sum(after) / len(after)
            ax.barh(y, mean, 0.62, color=CONTROL if rows[0]["is_control"] else AFTER)
            if before:
                ax.barh(y, sum(before) / len(before), 0.62, color=BEFORE)
            if len(after) > 1:
                ax.plot([min(after), max(after)], [y, y], color=GREY, linewidth=1.2)
            ax.text(max(*after, *before, mean) + 0.015, y, f"{mean:.2f}", va="center")
        ax.set_yticks(range(len(stages)), [rows[0]["what"] for rows in stages.values()])
        ax.tick_params(left=False)
        ax.invert_yaxis()
        ax.set_xlim(0, 1.08)
        ax.set_xlabel("share of right answers: before (grey), after (green), a control (brown)")
    return found["svg"]


def curve_svg(rows, name):
    """The curve of a stage from the rows of its metrics.jsonl; None if there is nothing to draw."""
    wanted = [[key for key in keys if any(key in row for row in rows)] for keys in CURVES[name]]
    wanted = [keys for keys in wanted if keys]
    if not wanted:
        return None
    with axes(1.9 * len(wanted) + 0.4, len(wanted)) as (found, each):
        for ax, keys in zip(each, wanted, strict=True):
            for key, color in zip(keys, (AFTER, CONTROL), strict=False):
                points = [(row["step"], row[key]) for row in rows if key in row]
                marker = "o" if len(points) < 8 else None
                ax.plot(*zip(*points, strict=True), color=color, label=key, marker=marker)
            ax.legend(frameon=False)
            ax.grid(alpha=0.2)
        each[-1].set_xlabel("stage" if name == "self_reward" else "step")
    return found["svg"]


def metrics_of(folder):
    """The rows of a stage's metrics.jsonl; of self-rewarding, what each of its stages came to."""
    done = [read_json(path) for path in sorted(folder.glob("*/done.json"))]
    if done:
        measured = [row["eval"] for row in done if "eval" in row]  # a judge's training is not
        return [{"step": number, **values} for number, values in enumerate(measured)]
    return whole_lines(folder / "metrics.jsonl")


def main(cfg):
    rows = whole_lines(cfg.results)
    if not rows:
        raise UserError(f"no results in {cfg.results}; runs/demo.py writes results.jsonl")
    pictures = {"ladder": ladder_svg(rows)}
    for name in set(CURVES) - {"more"}:  # which has no page
        pictures[name] = curve_svg(metrics_of(Path(cfg.demo) / name), name)
    for name, svg in sorted(pictures.items()):
        if svg is None:
            print(f"{cfg.demo}/{name} has no metrics.jsonl: no picture")
            continue
        with atomic_write(Path(cfg.out) / f"{name}.svg") as tmp:
            tmp.write_text(svg, encoding="utf-8")
        print(f"{cfg.out}/{name}.svg")


if __name__ == "__main__":
    main(read_flags(Config))
