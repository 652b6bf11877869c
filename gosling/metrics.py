"""metrics.jsonl and metrics.png of a run, and what wandb, swanlab and tensorboard are sent."""

import functools
import json
import os
import secrets
import time
from pathlib import Path

from gosling.config import UserError, config_dict, print0
from gosling.files import (
    atomic_write,
    each_row,
    figure,
    primitive,
    read_json,
    whole_lines,
    write_json,
)
from gosling.schemas import Measured, RunNotes

MAX_POINTS = 350  # of a line of metrics.png
OWN_NAMES = {"step", "time", "loss", "lr", "grad_norm", "tokens_per_s"}  # of every line


class Metrics:
    """metrics.jsonl, metrics.png, and wandb, tensorboard or swanlab when asked for. Rank 0 writes.

    first_step: where a resumed run goes on; lines beyond it are of work that was lost, and go.
    """

    def __init__(self, cfg, run, first_step=0):
        self.path = Path(cfg.out_dir) / "metrics.jsonl"
        self.active, self.first_step = run.main, first_step
        self.start, self.tokens = time.monotonic(), 0
        if not self.active:
            return
        rows = [row for row in self.read() if row["step"] <= first_step] if first_step else []
        with atomic_write(self.path) as tmp:
            tmp.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        self.send = make_logger(cfg)

    def read(self):
        """The rows so far."""
        return whole_lines(self.path, Measured)

    def log(self, step, /, **values):
        """One JSON line {"step": …, "time": seconds, name: number, …}."""
        if not self.active:
            return
        values = {name: primitive(value, name) for name, value in values.items()}
        row = {"step": step, "time": round(time.monotonic() - self.start, 3), **values}
        try:
            with open(self.path, "a", encoding="utf-8") as f:
                f.write(json.dumps(row) + "\n")
        except OSError as e:
            raise UserError(
                f"cannot write {self.path}: {e.strerror}; free some space, then --resume"
            ) from e
        self.send(values, step)

    def begin(self, values):
        """The numbers from before the first step, {} for none; then the clock starts."""
        if values:
            self.log(0, **values)
            print0("before: " + " | ".join(f"{k} {v:.4f}" for k, v in values.items()))
        self.start = time.monotonic()

    def progress(self, done, max_steps, loss, lr, grad_norm, quiet=(), /, **values):
        """log, and a line on the screen without what is in `quiet`.

        Tokens per second come from self.tokens, to which the loop adds.
        """
        elapsed = max(time.monotonic() - self.start, 1e-9)
        speed, grad_norm = self.tokens / elapsed, float(grad_norm)
        left = elapsed / max(done - self.first_step, 1) * (max_steps - done)
        self.log(done, loss=loss, lr=lr, grad_norm=grad_norm, tokens_per_s=speed, **values)
        line = f"step {done}/{max_steps} | loss {loss:.4f} | lr {lr:.2e}"
        line += f" | grad norm {grad_norm:.2f} | {speed:,.0f} tokens/s | {duration(left)} left"
        shown = [f" | {name} {v:.4f}" for name, v in values.items() if name not in quiet]
        print0(line + "".join(shown))

    def plot(self, *names):
        """metrics.png: the named series over steps, each of at most MAX_POINTS or so."""
        if not self.active or not self.path.exists():
            return
        points = {name: [] for name in names}
        with open(self.path, "rb") as f:
            for row in each_row(self.path, f, Measured):  # one by one: a long run has many
                for name in points.keys() & row.keys():
                    points[name].append((row["step"], row[name]))
        with figure(self.path.with_name("metrics.png")) as ax:
            for name, series in points.items():
                if series:
                    # The picture is 700 pixels wide, and drawing more than it shows costs memory.
                    series = series[:: -(-len(series) // MAX_POINTS)] + series[-1:]
                    marker = "." if len(series) < 30 else None
                    ax.plot(*zip(*series, strict=True), label=name, marker=marker)
            ax.set_xlabel("step")
            ax.grid(alpha=0.3)
            ax.legend()


def duration(seconds):
    """3725 -> '1h02m', 65 -> '1m05s'."""
    minutes, seconds = divmod(int(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60}h{minutes % 60:02d}m"
    return f"{minutes}m{seconds:02d}s"


def make_logger(cfg):
    """cfg.log -> a function (values, step) that sends a row there.

    A resumed run goes on in the same run of wandb or swanlab; run.json in its folder has the id.
    What the process sent to before, as an earlier stage of self_reward.py, is finished.
    """
    name = Path(cfg.out_dir).name
    try:
        if cfg.log == "wandb":
            import wandb

            settings = dict(settings_of(cfg), name=name, reinit="finish_previous")
            settings["dir"] = os.environ.get("WANDB_DIR", cfg.out_dir)
            settings["settings"] = {"init_timeout": 20}  # seconds to wait for a network
            return init_or_offline(wandb, settings)
        if cfg.log == "swanlab":
            import swanlab

            settings = dict(settings_of(cfg), experiment_name=name, reinit=True)
            settings["logdir"] = os.environ.get("SWANLAB_LOG_DIR", f"{cfg.out_dir}/swanlog")
            return init_or_offline(swanlab, settings)
        if cfg.log == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            return functools.partial(log_to_tensorboard, SummaryWriter(cfg.out_dir))
    except ImportError as e:
        raise UserError(
            f"log={cfg.log} needs a package that is not installed ({e.name}): "
            f"pip install {e.name}, or --log=none"
        ) from None
    return ignore


def init_or_offline(module, settings):
    """wandb's or swanlab's init -> its function (values, step).

    Without a key or a network the run is kept on disk, and one line says so.
    """
    try:
        return module.init(**settings).log
    except Exception as e:
        why = str(e).strip().splitlines() or [type(e).__name__]
        print0(f"{module.__name__} is offline ({why[0]:.200}); what it would send is kept on disk")
        if hasattr(module, "teardown"):  # wandb's own process holds the run that failed
            module.teardown()
        return module.init(**settings, mode="offline").log


def settings_of(cfg):
    """What wandb.init and swanlab.init both take."""
    path = Path(cfg.out_dir) / "run.json"
    new_id = secrets.token_hex(11)[:21]  # swanlab wants 21 characters
    notes = {"id": new_id, **read_json(path, RunNotes)}
    write_json(path, notes)
    settings = {"project": "gosling", "config": config_dict(cfg)}
    return {**settings, "id": notes["id"], "resume": "allow"}


def log_to_tensorboard(writer, values, step):
    for name, value in values.items():
        writer.add_scalar(name, value, step)
    writer.flush()


def ignore(values, step):
    """For log="none"."""
