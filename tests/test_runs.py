"""A run's folder, its metrics and its schedule."""

import datetime
import functools
import json
import os
import random
import shutil
import subprocess
import sys
import types
from dataclasses import dataclass

from gosling import files, runs
from gosling.config import UserError

import numpy as np
import pytest
import torch
from helpers import ROOT, random_model

ONE_CPU = runs.Run(0, 1, torch.device("cpu"), torch.float32)


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_run_prunes_what_it_wrote_and_nothing_else(tmp_path):
    foreign = ["rwkv-3-good.pth", "rwkv-7-base.pth", "lora-1-customerA.safetensors", "rwkv-2.pth"]
    foreign += ["rwkv-20.pth", "rwkv-final.pth"]  # of an older run, one with a higher number
    for name in foreign:
        (tmp_path / name).touch()
    for n in (3, 9, 10, 12):
        (tmp_path / f"rwkv-{n}.pth").touch()
        runs.prune(tmp_path / f"rwkv-{n}.pth", 2)
    assert names_in(tmp_path) == sorted([*foreign, "rwkv-10.pth", "rwkv-12.pth", "run.json"])
    runs.prune(tmp_path / "rwkv-10.pth", 1)  # resumed at an earlier step: 12 is newer, it stays
    assert (tmp_path / "rwkv-12.pth").exists()


def test_a_state_of_each_task_is_pruned_with_its_json_and_listed_in_the_runs_folder(tmp_path):
    for task in ("a", "b"):
        (tmp_path / task).mkdir()
        for n in (1, 2):
            (tmp_path / task / f"state-{n}.pth").touch()
            (tmp_path / task / f"state-{n}.json").touch()
            runs.prune(tmp_path / task / f"state-{n}.pth", 1, tmp_path)
        assert names_in(tmp_path / task) == ["state-2.json", "state-2.pth"]
    assert names_in(tmp_path) == ["a", "b", "run.json"]


@dataclass
class Settings:
    """What runs.open_run and runs.resume look at."""

    out_dir: str = ""
    data: str = ""
    init_from: str = ""
    resume: bool = False
    seed: int = 1
    lr: float = 0.1
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.99
    adam_eps: float = 1e-8
    lora_alpha: float = 8.0
    micro_bsz: int = 1
    max_steps: int = 3
    eval_every: int = 0
    log: str = "none"
    reward: object = None
    eval_fn: object = None
    eval_seconds: float | None = None


def settings(tmp_path, **over):
    (tmp_path / "a.jsonl").write_text("one\n")
    return Settings(**{"out_dir": str(tmp_path / "run"), "data": str(tmp_path / "a.jsonl"), **over})


def save(cfg, model, step=2, **values):
    opt = runs.make_optimizer(model, cfg, ONE_CPU)
    runs.save_last(cfg, ONE_CPU, model, opt, runs.identity(cfg, model), step=step, **values)


def resume(cfg, model):
    opt = runs.make_optimizer(model, cfg, ONE_CPU)
    return runs.resume(cfg, model, opt, runs.identity(cfg, model))


def length(prompts, completions, most):
    return []


class Scorer:
    def __call__(self, prompts, completions):
        return []


def test_resume_goes_on_with_what_may_change_and_a_file_elsewhere(tmp_path):
    model = random_model("x070", n_layer=1, n_embd=64)
    bound = [functools.partial(length, most=5), Scorer()]
    save(settings(tmp_path, reward=bound), model)
    (tmp_path / "moved.jsonl").write_text("one\n")
    again = [functools.partial(length, most=5), Scorer()]  # as in another process
    over = dict(resume=True, micro_bsz=7, max_steps=9, eval_every=5, reward=again)
    cfg = settings(tmp_path, data=str(tmp_path / "moved.jsonl"), **over)
    assert resume(cfg, model)["step"] == 2


def test_a_second_optimiser_comes_back_as_tensors(tmp_path):
    """What the Muon of docs/forks.md hands to save_last beside the step."""
    model = random_model("x070", n_layer=1, n_embd=64)
    weight = torch.nn.Parameter(torch.ones(3, 2))
    muon = torch.optim.Muon([weight], lr=0.1)
    weight.grad = torch.arange(6.0).view(3, 2)
    muon.step()
    save(settings(tmp_path), model, muon=muon.state_dict())
    again = torch.optim.Muon([weight], lr=0.1)
    again.load_state_dict(resume(settings(tmp_path, resume=True), model)["muon"])
    assert torch.equal(
        again.state[weight]["momentum_buffer"], muon.state[weight]["momentum_buffer"]
    )
    again.step()


def test_auto_goes_on_if_there_is_something(tmp_path, monkeypatch):
    model = random_model("x070", n_layer=1, n_embd=64)
    auto, never = settings(tmp_path, resume="auto"), settings(tmp_path)
    assert resume(auto, model) == {}
    start(auto, model)
    save(auto, model, step=2)
    assert resume(auto, model)["step"] == 2 and resume(never, model) == {}
    with pytest.raises(UserError, match="already holds a run; --resume"):
        start(never, model)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # a worker that torchrun has restarted
    assert resume(never, model)["step"] == 2
    start(never, model)


@pytest.mark.parametrize(
    "over, words",
    [
        (dict(data="b.jsonl"), "data was 4 bytes, digest .*, is 4 bytes, digest"),
        (dict(init_from="b.jsonl"), "init_from was none, is 4 bytes"),
        (dict(lora_alpha=64.0), "lora_alpha was 8.0, is 64.0"),
        (dict(weight_decay=0.01), "weight_decay was 0.0, is 0.01"),  # adds a group to the optimiser
        (dict(beta1=0.5, adam_eps=0.1), "beta1 was 0.9, is 0.5"),
        (dict(lr=np.float64(0.2)), "lr was 0.1, is 0.2"),
        (dict(reward=functools.partial(length, most=6)), r"reward was .*5\), is length\(most=6"),
    ],
)
def test_resume_refuses_what_changes_the_result(over, words, tmp_path):
    model = random_model("x070", n_layer=1, n_embd=64)
    save(settings(tmp_path, reward=functools.partial(length, most=5)), model)
    (tmp_path / "b.jsonl").write_text("two\n")  # of the same length
    for key in over.keys() & {"data", "init_from"}:
        over = {key: str(tmp_path / over[key])}
    given = {"reward": functools.partial(length, most=5), "resume": True, **over}
    with pytest.raises(UserError, match=words):
        resume(settings(tmp_path, **given), model)


def test_resume_reads_the_content_of_a_token_file(tmp_path):
    model = random_model("x070", n_layer=1, n_embd=64)
    (tmp_path / "t.bin").write_bytes(b"abcd")
    first = runs.identity(settings(tmp_path, data=str(tmp_path / "t")), model)
    (tmp_path / "t.bin").write_bytes(b"abce")
    assert runs.identity(settings(tmp_path, data=str(tmp_path / "t")), model) != first


def test_last_pt_holds_what_a_function_of_the_users_gave(tmp_path):
    """numpy.float64 passes for a float, and is not read back by weights_only."""
    model, group = random_model("x070", n_layer=1, n_embd=64), {"mask": np.ones(2, dtype=int)}
    group["row"] = {"day": datetime.date(2026, 1, 2), "none": None}
    save(settings(tmp_path), model, best_loss=np.mean([0.0, 1.0]), groups=[group])
    last = files.load_torch(tmp_path / "run" / "last.pt")
    assert last["best_loss"] == 0.5 and type(last["best_loss"]) is float
    assert last["groups"] == [{"mask": [1, 1], "row": {"day": "2026-01-02", "none": None}}]
    with pytest.raises(UserError, match=r"groups\[0\]\['image'\] is a object; expected numbers"):
        save(settings(tmp_path), model, groups=[{"image": object()}])


class Tokenizer:
    digest = "of bytes"

    def save(self, folder):
        return "bytes"


def start(cfg, model):
    run = runs.Run(0, 1, torch.device("cpu"), torch.float32)
    with run.held:  # its lock
        return runs.open_run(cfg, run, model, Tokenizer(), 0, 3)


def test_a_new_run_leaves_foreign_files_and_has_a_list_of_its_own(tmp_path):
    out, model = tmp_path / "run", random_model("x070", n_layer=1, n_embd=64)
    out.mkdir()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    living, gone = (f".last.pt.{pid}.gosling.tmp" for pid in (os.getppid(), dead.pid))
    notes = (".my-notes.tmp", f".notes.{dead.pid}.tmp")  # the user's
    for name in (*notes, living, gone):
        (out / name).touch()
    (out / "run.json").write_text('{"id": "old", "checkpoints": ["rwkv-1.pth"]}')
    start(settings(tmp_path), model)
    assert {path.name for path in out.glob(".*")} == {*notes, living}
    assert files.read_json(out / "run.json") == {}
    (out / "rwkv-1.pth").touch()
    with pytest.raises(UserError, match="init_from=.*rwkv-1.pth lies in out_dir"):
        start(settings(tmp_path, init_from=str(out / "rwkv-1.pth")), model)
    start(settings(tmp_path, init_from=str(out / "my-base.pth")), model)


@pytest.mark.parametrize(
    "returned, values",
    [
        (0.5, {"eval_fn": 0.5}),
        (None, {}),
        ({"a": np.float32(0.5), "b": torch.tensor([0.0, 1.0]).mean()}, {"a": 0.5, "b": 0.5}),
        ({1: 0.5}, {"1": 0.5}),
        ({"a": 10**400}, "returned {'a': 1000.*; expected {name: number}"),
        ({"a": np.arange(2)}, "returned {'a': .0, 1.}; expected {name: number}"),
        ({"a": None}, "returned {'a': None}; expected"),
        ({"a": object()}, r"what evaluate returned\['a'\] is a object"),
        ("0.5", "returned '0.5'; expected"),
    ],
)
def test_eval_fn_is_taken_or_refused_in_one_line(returned, values):
    def evaluate(model, tokenizer):
        return returned

    cfg = Settings(eval_fn=evaluate)
    if isinstance(values, dict):
        assert runs.call_eval_fn(cfg, torch.nn.Linear(1, 1), None) == values
    else:
        with pytest.raises(UserError, match=values):
            runs.call_eval_fn(cfg, torch.nn.Linear(1, 1), None)


def test_what_raises_between_two_steps_saves_first(tmp_path):
    def evaluate(model, tokenizer):
        raise RuntimeError("judge API down")

    model = random_model("x070", n_layer=1, n_embd=64)
    cfg = settings(tmp_path, eval_fn=evaluate)
    opt = runs.make_optimizer(model, cfg, ONE_CPU)
    same = runs.identity(cfg, model)
    words = "evaluate failed: RuntimeError: judge API down .*test_runs.py, line .*"
    for step in (0, 5):  # before the first step there is nothing to save
        saved = "last.pt is saved at step 5; --resume goes on" if step else r"\)$"
        with (
            pytest.raises(UserError, match=words + saved),
            runs.saving_first(cfg, ONE_CPU, model, opt, same, step=step, best_loss=1.0),
        ):
            runs.call_eval_fn(cfg, model, None)
        assert (tmp_path / "run/last.pt").exists() == (step == 5)
    with (
        pytest.raises(ZeroDivisionError),
        runs.saving_first(cfg, ONE_CPU, model, opt, same, step=6),
    ):
        raise ZeroDivisionError
    assert resume(settings(tmp_path, resume=True), model)["step"] == 6


def test_loggers_go_on_in_the_same_run_and_each_folder_has_its_own(tmp_path, monkeypatch):
    ids = []

    def init(**given):
        ids.append(given["id"])
        return types.SimpleNamespace(log=print)

    for log in ("wandb", "swanlab"):
        monkeypatch.setitem(sys.modules, log, types.SimpleNamespace(init=init))
        for folder, step in (("1-sft", 0), ("2-dpo", 0), ("1-sft", 3)):
            cfg = settings(tmp_path, out_dir=str(tmp_path / log / folder), log=log)
            runs.Metrics(cfg, ONE_CPU, first_step=step)
        assert ids[0] == ids[2] != ids[1] and len(ids[0]) == 21
        ids.clear()


def test_a_logger_without_a_network_goes_offline_and_says_so(tmp_path, monkeypatch, capsys):
    done = []

    def init(mode="online", **given):
        done.append((mode, given["id"]))
        if mode == "online":
            raise ConnectionError("no such host\nand more")
        return types.SimpleNamespace(log=print)

    module = types.SimpleNamespace(
        __name__="wandb", init=init, teardown=lambda: done.append("torn down")
    )
    monkeypatch.setitem(sys.modules, "wandb", module)
    runs.Metrics(settings(tmp_path, log="wandb"), ONE_CPU)
    (_, first_id), torn, (mode, second_id) = done
    assert (torn, mode) == ("torn down", "offline") and first_id == second_id
    assert capsys.readouterr().out.startswith("wandb is offline (no such host); ")


def test_a_number_of_eval_fn_may_be_called_as_our_arguments_are(tmp_path):
    metrics = runs.Metrics(settings(tmp_path), ONE_CPU)
    metrics.begin({"done": 1.0, "self": 2.0})
    metrics.progress(1, 2, 0.5, 0.1, 1.0, **{"done": 1.0, "quiet": 2.0, "max_steps": 3.0})
    assert [row["done"] for row in metrics.read()] == [1.0, 1.0]


def test_metrics_are_written_as_plain_numbers(tmp_path):
    metrics = runs.Metrics(settings(tmp_path), ONE_CPU)
    metrics.log(1, loss=np.float32(0.5), score=torch.tensor(2.0), n=np.int64(3))
    (row,) = metrics.read()
    assert (row["loss"], row["score"], row["n"]) == (0.5, 2.0, 3)
    with pytest.raises(UserError, match="loss is a object; expected"):
        metrics.log(2, loss=object())


def test_metrics_go_to_the_asked_logger_and_a_resumed_run_drops_lost_lines(tmp_path, monkeypatch):
    logged = []

    class FakeRun:
        def log(self, row, step):
            logged.append((step, row))

    def init(**settings):
        logged.append(settings["config"]["lr"])
        return FakeRun()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))

    @dataclass
    class Cfg:
        out_dir: str = str(tmp_path)
        log: str = "wandb"
        lr: float = 0.5

    metrics = runs.Metrics(Cfg(), ONE_CPU)
    for step in (1, 2, 3):
        metrics.log(step, loss=1.0 / step)
    assert logged == [0.5, (1, {"loss": 1.0}), (2, {"loss": 0.5}), (3, {"loss": 1 / 3})]
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"step": 4, "lo')  # a kill in the middle of a line
    metrics = runs.Metrics(Cfg(log="none"), ONE_CPU, first_step=2)
    metrics.log(3, loss=0.25)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(r["step"], r["loss"]) for r in rows] == [(1, 1.0), (2, 0.5), (3, 0.25)]
    metrics.plot("loss", "val_loss")
    assert (tmp_path / "metrics.png").read_bytes()[:4] == b"\x89PNG"


def test_steps_follow_from_the_global_batch():
    def plan(world, **over):
        given = dict(micro_bsz=4, global_bsz=16, max_steps=None, epochs=None)
        cfg = types.SimpleNamespace(**{**given, **over})
        return runs.plan_steps(cfg, types.SimpleNamespace(world=world), 100)

    assert plan(1) == (7, 4) and plan(2) == (7, 2)  # ceil(100 / 16)
    assert plan(1, epochs=2.5) == (16, 4) and plan(1, max_steps=3) == (3, 4)
    with pytest.raises(UserError, match="global_bsz=16 is not a multiple of .* = 4 x 3"):
        plan(3)
    with pytest.raises(UserError, match="max_steps and epochs are both given"):
        plan(1, max_steps=3, epochs=1.0)


def test_every_sample_comes_once_an_epoch_whatever_the_batch():
    epoch = runs.shuffled(range(10), 10, seed=1)
    assert sorted(epoch) == list(range(10))
    assert runs.shuffled(range(10, 20), 10, seed=1) != epoch
    assert runs.shuffled([3, 4], 10, seed=1) == epoch[3:5]


def test_a_loss_that_is_no_number_stops_before_the_step(tmp_path):
    cfg = types.SimpleNamespace(out_dir=str(tmp_path))
    model = torch.nn.Linear(3, 2)
    runs.check_finite(cfg, 0, 1.0, torch.tensor(1.0), model)
    with pytest.raises(UserError, match="step 3: loss nan.*before this step touched the weights"):
        runs.check_finite(cfg, 2, float("nan"), torch.tensor(1.0), model)
    with pytest.raises(UserError, match="gradient norm inf"):
        runs.check_finite(cfg, 2, 1.0, torch.tensor(float("inf")), model)
    model.bias.data[1] = float("inf")
    with pytest.raises(UserError, match="step 3: loss nan: bias has become NaN or infinite"):
        runs.check_finite(cfg, 2, float("nan"), torch.tensor(1.0), model)


def test_weights_that_are_no_numbers_are_not_saved(tmp_path):
    cfg, model = settings(tmp_path), random_model("x070", n_layer=1, n_embd=64)
    save(cfg, model, step=1)
    model.blocks[0].ffn.key.weight.data[5, 6] = float("nan")
    words = "blocks.0.ffn.key.weight has become NaN or infinite; .*last.pt stands"
    with pytest.raises(UserError, match=words):
        save(cfg, model, step=2)
    assert torch.load(tmp_path / "run/last.pt", weights_only=True)["step"] == 1
    model.blocks[0].ffn.key.weight.data[5, 6] = 1e30
    model.blocks[0].ffn.key.weight.data[5, 7] = 3e38  # large, and finite: so is no sum of them
    model.blocks[0].ffn.key.weight.data[6, 6] = 3e38
    save(cfg, model, step=3)


def test_one_flipped_bit_of_last_is_seen_and_the_one_before_is_used(tmp_path, capsys):
    model, path = random_model("x070", n_layer=1, n_embd=64), tmp_path / "run/last.pt"
    save(settings(tmp_path), model, step=1)
    save(settings(tmp_path), model, step=2)
    cfg, whole, rng = settings(tmp_path, resume=True), path.read_bytes(), random.Random(0)
    assert resume(cfg, model)["step"] == 2
    for _ in range(40):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        capsys.readouterr()
        last = resume(cfg, model)
        said = "going on from" in capsys.readouterr().out
        assert said == (last["step"] == 1)
        if not said:  # what padding holds, or a date
            assert all(
                torch.equal(last["model"][n], p)
                for n, p in model.named_parameters()
                if n in last["model"]
            )
    path.with_name("last.previous.pt").unlink()
    path.write_bytes(whole[:-300])
    with pytest.raises(UserError, match="last.pt cannot be read"):
        resume(cfg, model)


def test_killed_between_the_two_names_of_a_checkpoint(tmp_path):
    """last.pt has its second name already, and not yet its new content; the next save leaves two
    files, and no third name of theirs."""
    model, path = random_model("x070", n_layer=1, n_embd=64), tmp_path / "run/last.pt"
    save(settings(tmp_path), model, step=1)
    previous = path.with_name("last.previous.pt")
    os.link(path, previous)
    save(settings(tmp_path), model, step=2)
    steps = [torch.load(file)["step"] for file in (path, previous)]
    assert steps == [2, 1]
    assert {file.name for file in path.parent.glob("*last*")} == {path.name, previous.name}


def test_a_folder_is_for_one_run_at_a_time(tmp_path):
    """The lock is the system's: another process is refused, and a killed one leaves none."""
    hold = (
        "import sys, time; sys.path.insert(0, sys.argv[2])\n"
        "from gosling.files import locked\n"
        "with locked(sys.argv[1]): print('held', flush=True); time.sleep(60)"
    )
    words = [sys.executable, "-c", hold, str(tmp_path), str(ROOT)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="in use by another process"), files.locked(tmp_path):
            pass
        other.kill()
    with files.locked(tmp_path):
        pass


def test_a_folder_that_vanished_is_described_again(tmp_path):
    """Somebody deletes out_dir during a run: the next checkpoint has config.json beside it."""
    cfg, model = settings(tmp_path), random_model("x070", n_layer=1, n_embd=64)
    run = runs.Run(0, 1, torch.device("cpu"), torch.float32)
    with run.held:
        runs.open_run(cfg, run, model, Tokenizer(), 0, 3)
        before = (tmp_path / "run/config.json").read_bytes()
        shutil.rmtree(tmp_path / "run")
        opt = runs.make_optimizer(model, cfg, run)
        runs.save_last(cfg, run, model, opt, runs.identity(cfg, model), step=1)
    assert (tmp_path / "run/config.json").read_bytes() == before
    assert resume(settings(tmp_path, resume=True), model)["step"] == 1


def odd(last, place, value):
    """last.pt with something else at a place, a tuple of keys; None: without it."""
    *keys, key = place
    inside = last
    for k in keys:
        inside = inside[k]
    if value is None:
        del inside[key]
    else:
        inside[key] = value


ADAM = ("optimizer", "state", 0)


@pytest.mark.parametrize(
    "place, value, words",
    [
        (("step",), None, "step is missing"),
        (("step",), "3", "step is '3'; expected a valid integer"),
        (("step",), -1, "step is -1; expected greater"),
        (("best_loss",), [1], "best_loss is .1.; expected a valid number"),
        (("groups",), [{"ids": [1]}], "groups.0.number is missing"),
        (("same", "lr"), torch.zeros(3), "same is .*; expected numbers, text, lists and dicts"),
        (("model",), None, "model is no dict"),
        (("model", "emb.weight"), 5, "model.emb.weight has no numbers"),
        (("rng",), torch.zeros(3), "rng is no state of random numbers"),
        (("rng",), torch.zeros(5056, dtype=torch.uint8), "rng is no state of random numbers"),
        (("optimizer",), None, "optimizer: it is None; expected a valid dictionary"),
        (("optimizer", "param_groups"), [], "param_groups are of another network"),
        (("optimizer", "param_groups", 0, "betas"), "x", "param_groups.0.betas is of other"),
        ((*ADAM, "exp_avg"), torch.zeros(3), "optimizer.state.0.exp_avg is not of its parameter"),
        ((*ADAM, "exp_avg"), None, "optimizer.state.0 is not of AdamW"),
        ((*ADAM, "step"), torch.zeros(2), "optimizer.state.0.step is not of its parameter"),
        ((*ADAM, "step"), 7, "optimizer.state.0.step is not of its parameter"),
    ],
)
def test_a_last_pt_that_no_run_wrote_is_refused_by_the_place(place, value, words, tmp_path):
    model, cfg = random_model("x070", n_layer=1, n_embd=64), settings(tmp_path)
    opt = runs.make_optimizer(model, cfg, ONE_CPU)
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    opt.step()
    same = runs.identity(cfg, model)
    runs.save_last(cfg, ONE_CPU, model, opt, same, step=2, best_loss=1.0, groups=[])
    cfg.resume, path = True, tmp_path / "run/last.pt"
    assert runs.resume(cfg, model, opt, same)["step"] == 2
    last = torch.load(path, weights_only=True)
    odd(last, place, value)
    torch.save(last, path)
    with pytest.raises(UserError, match=f"last.pt.*{words}"):
        runs.resume(cfg, model, opt, same)


@pytest.mark.parametrize(
    "line, words",
    [
        ("5", "it is 5; expected a valid dict"),
        ('{"loss": 1}', "step is missing"),
        ('{"step": "1"}', "step is '1'; expected a valid integer"),
        ('{"step": 1, "loss": "x"}', "loss is 'x'; expected a valid number"),
        ('{"step": 1, "loss": {"a": 1}}', "loss is .'a': 1.; expected a valid number"),
    ],
)
def test_a_line_of_metrics_that_no_run_wrote_is_refused(line, words, tmp_path):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1, "loss": 1.5}}\n{line}\n')
    with pytest.raises(UserError, match=f"metrics.jsonl:2: {words}"):
        runs.Metrics(Settings(out_dir=str(tmp_path)), ONE_CPU, first_step=1)


@pytest.mark.parametrize("notes", ["x", {"checkpoints": "a"}, {"checkpoints": ["a.pth"]}])
def test_notes_of_a_run_that_no_run_wrote_are_refused(notes, tmp_path):
    (tmp_path / "run.json").write_text(json.dumps(notes))
    with pytest.raises(UserError, match="run.json: .*; mend or remove it"):
        runs.prune(tmp_path / "rwkv-1.pth", 2)


def test_a_number_of_eval_fn_may_not_be_called_as_one_of_the_runs(tmp_path):
    cfg = settings(tmp_path, eval_fn=lambda model, tokenizer: {"loss": 2.0, "step": 1})
    with pytest.raises(UserError, match="returned loss, step, names of the run's own"):
        runs.call_eval_fn(cfg, torch.nn.Linear(1, 1), None)
