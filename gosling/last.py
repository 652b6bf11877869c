"""last.pt: read, and looked through before a run goes on from it."""

from gosling.config import UserError, print0
from gosling.files import checked, load_torch
from gosling.schemas import Last, Optimizer

import torch


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
        is_ours = number in range(len(parameters))
        is_ours = is_ours and of_parameter.keys() == {"step", "exp_avg", "exp_avg_sq"}
        expect(is_ours, path, f"{place} is not of AdamW")
        for key, w in of_parameter.items():
            shape = () if key == "step" else parameters[number].shape
            is_good = are_numbers(w) and w.shape == shape and w.dtype == torch.float32
            expect(is_good, path, f"{place}.{key} is not of its parameter")
    return {**saved, "param_groups": today}


def are_numbers(w):
    """Whether it is a tensor of floats that are all there, and finite."""
    is_there = isinstance(w, torch.Tensor) and w.layout == torch.strided and w.device.type != "meta"
    if not is_there or not w.is_floating_point() or w.untyped_storage().nbytes() < w.nbytes:
        return False
    return bool(w.isfinite().all())


def expect(is_good, path, problem):
    if not is_good:
        raise UserError(
            f"{path} cannot be gone on from: {problem}; put the file back as a run wrote it, or "
            "start a new run with --init_from in another --out_dir"
        )
