"""Runs of training scripts, one after the other in the same processes: several.py runs.json

Each is {"script": name, "config": {field: value}}; a run's functions come from its "file", and
after so many steps as "stop" says it gets a SIGTERM.
"""

import gc
import importlib
import json
import os
import sys

sys.path[:0] = [os.getcwd(), os.path.dirname(__file__)]
from gosling import config, runs  # noqa: E402

import torch.distributed as dist  # noqa: E402
from helpers import kill_after  # noqa: E402

if __name__ == "__main__":
    dist.init_process_group("gloo")
    with open(sys.argv[1], encoding="utf-8") as f:
        wanted = json.load(f)
    for one in wanted:
        script = importlib.import_module(one["script"])
        values = one["config"].items()
        cfg = script.Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in values})
        for key, value in config.read_config_file(one["file"], script.Config).items():
            setattr(cfg, key, value)
        if one.get("stop"):
            kill_after(cfg, one["stop"], script.main)
        else:
            script.main(cfg)
        runs.gather([])
    gc.collect()
    dist.destroy_process_group()
