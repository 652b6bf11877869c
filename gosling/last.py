"""last.pt: read, and looked through before a run goes on from it; with shard=fsdp, its shares.

What trains and its moments are then not in last.pt but in a folder that it names, shares-<step>, as
torch.distributed.checkpoint writes it: each process its own file. Any number of processes reads it.
"""

import itertools
import os
import shutil
from pathlib import Path

from gosling.config import UserError, print0
from gosling.files import (
    checked,
    digest,
    first_line,
    load_torch,
    read_json,
    sync_folder,
    write_json,
)
from gosling.optimizer import MOMENTS
from gosling.processes import gather
from gosling.schemas import Last, Optimizer, RunNotes
from gosling.shard import fill

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp


def read_last(path):
    """last.pt, or if it is damaged the one before it."""
    try:
        return load_torch(path)
    except UserError as e:
        previous = path.with_name("last.previous.pt")
        if not previous.exists():
            raise
        last = load_torch(previous)
        print0(f"{e}; going on from {previous} instead")
        return last


def check_last(last, path):
    """UserError unless a value has what every last.pt has, whatever network it is of."""
    expect(isinstance(last, dict), path, "it is no dict")
    if "same" not in last:
        raise UserError(f"{path} was written by an older version; start a new run from its weights")
    checked(last, Last, path)
    model, rng = last.get("model"), last.get("rng")
    expect(isinstance(model, dict), path, "model is no dict")
    for name, w in model.items():
        expect(isinstance(name, str) and are_numbers(w), path, f"model.{name!s:.60} has no numbers")
    try:
        torch.Generator().set_state(rng)
    except (TypeError, RuntimeError):
        expect(False, path, "rng is no state of random numbers")


def checked_optimizer(saved, opt, path):
    """An optimiser's state, as it was saved -> what this one loads.

    UserError unless it is of these parameters and settings. What follows from the device, such as
    fused, and the learning rate, which is set at every step, are as they are today.
    """
    checked(saved, Optimizer, f"{path}: optimizer")
    groups, today = saved["param_groups"], opt.state_dict()["param_groups"]
    expect(len(groups) == len(today), path, "optimizer.param_groups are of another network")
    for i, (group, ours) in enumerate(zip(groups, today, strict=True)):
        for key in ("params", "lr_scale", "betas", "eps", "weight_decay"):
            is_same = type(group.get(key)) is type(ours[key]) and group[key] == ours[key]
            expect(is_same, path, f"optimizer.param_groups.{i}.{key} is of other settings")
    parameters = [p for group in opt.param_groups for p in group["params"]]
    for number, of_parameter in saved["state"].items():
        place = f"optimizer.state.{number}"
        expect(number in range(len(parameters)), path, f"{place} is not of AdamW")
        block_size = getattr(opt, "block_size", 0)
        expected = tensors_of(parameters[number], block_size if is_8bit(of_parameter) else 0)
        expect(of_parameter.keys() == expected.keys(), path, f"{place} is not of AdamW")
        for key, w in of_parameter.items():
            dtype, shape = expected[key]
            is_good = are_numbers(w, dtype) and w.shape == shape
            expect(is_good, path, f"{place}.{key} is not of its parameter")
    return {**saved, "param_groups": today}


def is_8bit(values):
    return any(key.endswith(".codes") for key in values)


def tensors_of(p, block_size):
    """{key: (dtype, shape)} of AdamW's state for a parameter; block_size: of 8-bit moments, or 0"""
    expected = {"step": (torch.float32, ())}
    for moment in MOMENTS:
        if block_size:
            expected[f"{moment}.codes"] = (torch.uint8, p.shape)
            expected[f"{moment}.scale"] = (torch.float32, (p.numel() // block_size,))
        else:
            expected[moment] = (torch.float32, p.shape)
    return expected


def are_numbers(w, dtype=None):
    """Whether it is a tensor of numbers that are all there, and finite: floats, or of a dtype."""
    is_there = isinstance(w, torch.Tensor) and w.layout == torch.strided and w.device.type != "meta"
    if not is_there or w.untyped_storage().nbytes() < w.nbytes:
        return False
    is_right = w.is_floating_point() if dtype is None else w.dtype == dtype
    return is_right and bool(w.isfinite().all())


def expect(is_good, path, problem):
    if not is_good:
        raise UserError(
            f"{path} cannot be gone on from: {problem}; put the file back as a run wrote it, or "
            "start a new run with --init_from in another --out_dir"
        )


# ----------------------------------------------------------------------------------------------
# shares


def write_shares(trained, opt, step, out, run):
    """A folder of what trains and its moments, by all processes -> (its name, {file: digest}).

    trained: {name: parameter}. The folder is there whole or not at all.
    """
    tensors = {}
    for name, p in trained.items():
        tensors[f"model.{name}"] = p.detach()
        tensors |= {f"{key}.{name}": value for key, value in opt.state.get(p, {}).items()}
    names = (f"shares-{step}" + (f"-{i}" if i else "") for i in itertools.count())
    name = next(name for name in names if not (Path(out) / name).exists())
    name, tmp = gather([(name, f".{name}.{os.getpid()}.gosling.tmp")])[0]  # as rank 0 sees it
    tmp = Path(out) / tmp
    try:
        dcp.save(tensors, checkpoint_id=tmp, no_dist=run.world == 1)
    except Exception as e:
        raise UserError(
            f"cannot write {Path(out) / name}: {first_line(e)}; what was there before is untouched"
        ) from e
    own = sorted(tmp.glob(f"__{run.rank}_*")) + [tmp / ".metadata"] * run.main
    digests = dict(gather([(file.name, digest(file)) for file in own]))
    if run.main:
        notes = read_json(Path(out) / "run.json", RunNotes)
        notes["shares"] = [*notes.get("shares", []), name]
        write_json(Path(out) / "run.json", notes)
        sync_folder(tmp)
        os.replace(tmp, Path(out) / name)
        sync_folder(out)
    return name, digests


def remove_shares(out):
    """Delete the folders, of those that this run wrote, that no last.pt names any more."""
    notes, named = read_json(out / "run.json", RunNotes), set()
    if not notes.get("shares"):
        return
    for file in (out / "last.pt", out / "last.previous.pt"):
        if file.exists():
            named.add(load_torch(file).get("shares"))
    for name in set(notes["shares"]) - named:
        shutil.rmtree(out / name, ignore_errors=True)
    write_json(out / "run.json", {**notes, "shares": sorted(named - {None})})


def check_shares(last, out):
    """-> {name: sizes} of what is in the shares. UserError, on every process, for damage."""
    folder, problems, rank, world = Path(out) / last["shares"], [], 0, 1
    if dist.is_initialized():
        rank, world = dist.get_rank(), dist.get_world_size()
    for number, (name, expected) in enumerate(sorted(last["digests"].items())):
        if number % world == rank:
            file = folder / name
            found = digest(file) if file.is_file() else "missing"
            if found != expected:
                problems.append(f"{file} is not what was written: it is {found}, was {expected}")
    for problem in gather(problems):
        raise UserError(f"{problem}; put it back, or start a new run from the weights")
    metadata = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    return {key: getattr(value, "size", None) for key, value in metadata.items()}


def read_shares(trained, opt, folder, sizes):
    """Values for what trains and its moments, of which each process reads its part."""
    tensors = {}
    for name, p in trained.items():
        tensors[f"model.{name}"] = p.detach()
        opt.state[p] = {}
        for key in ("step", "exp_avg", "exp_avg_sq"):
            if f"{key}.{name}" in sizes:
                like = torch.zeros(()) if key == "step" else torch.zeros_like(p.detach())
                opt.state[p][key] = tensors[f"{key}.{name}"] = like
        if not opt.state[p]:
            del opt.state[p]
    dcp.load(tensors, checkpoint_id=folder, no_dist=not dist.is_initialized())


def in_shares(optimizer, opt):
    """The state of a whole optimiser, as it was saved -> of one whose parameters are in shares."""
    parameters, state = [p for group in opt.param_groups for p in group["params"]], {}
    for number, values in optimizer["state"].items():
        state[number] = {"step": values["step"]}
        for key in ("exp_avg", "exp_avg_sq"):
            state[number][key] = torch.zeros_like(parameters[number].detach())
            fill(state[number][key], values[key])
    return {**optimizer, "state": state}
