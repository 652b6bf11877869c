"""What fuzz.py reads: for each kind of file a scene, bytes to put there, and its reader."""

import json
import typing
from pathlib import Path

import export
import prepare
import sample
import self_reward
import tasks
import train_dpo
import train_grpo
import train_pretrain
import train_reward
import train_sft
from gosling import data, engine, metrics, runs, token_files, tokenizer, tune, weights
from model import RWKV, RWKVConfig

import numpy as np
import odd
import torch

RUN = runs.Run(0, 1, torch.device("cpu"), torch.float32)
BYTES = tokenizer.load_tokenizer("bytes")
SMALL = dict(init_from="base.pth", tokenizer="bytes", device="cpu", lr=1e-3)
SMALL |= dict(micro_bsz=2, global_bsz=2, eval_every=0, save_every=0)


class Target(typing.NamedTuple):
    file: str  # what is written, and named in errors
    payloads: list  # bytes
    read: typing.Callable  # () -> anything
    names: tuple = ()  # errors may have one of these instead


def base():
    """base.pth and scored.pth in the current folder, small networks -> the first one"""
    if not Path("base.pth").exists():
        torch.manual_seed(0)
        model = RWKV(RWKVConfig(n_layer=2, n_embd=64, vocab_size=257))
        model.save_pretrained("base.pth")
        Path("config.json").write_text('{"tokenizer": "bytes"}')
        model.add_score()
        model.save_pretrained("scored.pth")
    return RWKV.from_pretrained("base.pth")


# ----------------------------------------------------------------------------------------------
# JSON Lines

CHAT = {"messages": [{"role": r, "content": "hi"} for r in ("system", "user", "assistant")]}
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]}
TOOL = {"messages": [{"role": "user", "content": "hi"}, CALL], "tools": [{"name": "f"}]}
SAID = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}
TEXTS = [{"text": "plain"}, {"text": "more"}, {"prompt": "hi ", "completion": "there"}]
EXAMPLES = [CHAT, TOOL, SAID, *TEXTS, {"text": [5, 6, 7], "mask": [0, 1, 1]}]
ASKED = [{"role": "user", "content": "reverse abc"}]
PAIRS = [{"prompt": ASKED, "chosen": "a", "rejected": "b", "margin": 1}]
PAIRS += [{"prompt": "once ", "responses": ["upon a time", "more", "in"], "scores": [5, 1, 3]}]
PAIRS += [{"chosen": CHAT["messages"], "rejected": [*CHAT["messages"][:2], CALL]}]
PROMPTS = [{"prompt": ASKED, "answer": "x"}, {"prompt": "text"}]
SCORED = [{"prompt": "q", "completion": "a"}, {"prompt": "q", "completions": ["a", {"text": "b"}]}]
SAMPLED = [{"prompt": ASKED, "completions": [{"text": "cba"}, "abc"], "skill": "reverse"}]


def read_preferences(file):
    rows = data.read_preferences(file, BYTES, 64)
    model = RWKV.from_pretrained("scored.pth")
    groups = [(row.prompt, row.answers) for row in rows]
    rewards = train_reward.score_answers(model, groups, RUN.device)
    for of_row, row in zip(rewards, rows, strict=True):
        assert train_reward.row_loss(of_row, row, train_reward.Config()).isfinite()


def score(file):
    train_reward.write_scores(train_reward.Config(score=file, init_from="scored.pth"), RUN)


def batch(rows, out="new.jsonl"):
    if out == "new.jsonl":
        Path(out).unlink(missing_ok=True)
    cfg = sample.BatchConfig(rows=rows, out=out, model="base.pth", device="cpu", max_new_tokens=2)
    sample.batch(cfg)


LINES = {  # rows, and a reader of a file of them
    "sft": (EXAMPLES, lambda f: data.read_examples(f, BYTES, 64)),
    "preferences": (PAIRS, read_preferences),
    "prompts": (PROMPTS, lambda f: data.read_prompts(f, BYTES, 64, unique=True)),
    "spin": ([CHAT, TOOL, TEXTS[2]], lambda f: data.read_replies(f, BYTES)),
    "show": (EXAMPLES, lambda f: prepare.main(["show", f, "--tokenizer=bytes"])),
    "pairs": (PAIRS, lambda f: prepare.main(["pairs", f, "--tokenizer=bytes"])),
    "tasks_pairs": (SAMPLED, lambda f: tasks.pairs(tasks.PairsConfig(f, "tasks"))),
    "prepare": (TEXTS[:2], lambda f: prepare.main([f, "--out=p", "--tokenizer=bytes"])),
    "score": (SCORED, score),
    "batch": (PROMPTS, batch),
}


def lines_target(name):
    """A function like those below, of one of LINES."""
    rows, read = LINES[name]

    def make(rng, n):
        base()
        return Target("bad.jsonl", odd.lines(rows, rng, n), lambda: read("bad.jsonl"))

    return make


# ----------------------------------------------------------------------------------------------
# other files: each function prepares the current folder


def idx(rng, n):
    Path("t.bin").write_bytes(np.arange(1, 101, dtype="<u2").tobytes())
    good, pack = token_files.index_bytes([40, 10, 50], np.dtype("<u2")), token_files.HEADER.pack
    heads = [pack(token_files.MAGIC, 1, 8, i, j) for i in odd.SIZES for j in odd.SIZES]
    files = [good, *(head + good[len(head) :] for head in heads), *odd.damaged(good, rng, n)]

    def read():
        tokens = token_files.TokenFile("t")
        tokens.check_vocab(257)
        assert [len(tokens.doc(i)) for i in range(len(tokens))] == [40, 10, 50]

    return Target("t.idx", files, read, ("t.bin",))


def sidecar(rng, n):
    Path("t.bin").write_bytes(np.arange(1, 101, dtype="<u2").tobytes())
    Path("t.idx").write_bytes(token_files.index_bytes([100], np.dtype("<u2")))
    good = {"tokenizer": "bytes", "tokenizer_digest": BYTES.digest, "vocab_size": 257}
    good |= {"documents": 1, "tokens": 100, "bytes": 99, "bytes_per_token": 1}
    model, cfg = base(), train_pretrain.Config(ctx_len=16, micro_bsz=2)

    def read():
        tokens = token_files.TokenFile("t")
        tokens.check_vocab(257)
        token_files.tokenizer_of_data([tokens])
        train_pretrain.evaluate(model, tokens, cfg, RUN)

    return Target("t.json", odd.files(good, rng, n), read, ("t.bin", "t has"))


def load(file):
    return lambda: engine.load(file, "cpu", torch.float32)


def pth(rng, n):
    good = {name: p.detach() for name, p in base().named_parameters()}
    return Target("m.pth", odd.torch_files(good, rng, n), load("m.pth"))


def safetensors(rng, n):
    base().save_pretrained("m.safetensors")
    good = Path("m.safetensors").read_bytes()
    return Target("m.safetensors", odd.safetensors(good, rng, n), load("m.safetensors"))


def hub_config(rng, n):
    base()
    if not Path("hub").exists():
        export.main(["hub", "--model=base.pth", "--out=hub"])
    good = json.loads(Path("hub/config.json").read_text())
    return Target("hub/config.json", odd.files(good, rng, n), load("hub"))


def write_lora():
    model = base()
    about = {"model": "base.pth", "fingerprint": weights.fingerprint(model), "tokenizer": "bytes"}
    model.set_tune("lora", r=4, targets=("att.key",))
    return tune.write_tuned(model, ".", "final", about=about)


def lora(rng, n):
    path = write_lora()
    cfg = train_sft.Config(**SMALL, tune="lora", adapter=path.name)
    read = load(path.name)
    files = odd.safetensors(path.read_bytes(), rng, n)
    return Target(path.name, files, lambda: [read(), tune.load_to_tune(cfg, RUN)])


def peft(rng, n):
    ours = weights.read_weights(write_lora())
    theirs = {f"base_model.model.{name}.weight": w for name, w in ours.items()}
    Path("peft").mkdir(exist_ok=True)
    Path("peft/config.json").write_text('{"tokenizer": "bytes"}')
    weights.save_file(theirs, "peft/adapter_model.safetensors")
    good = {"peft_type": "LORA", "lora_alpha": 8, "use_rslora": False, "use_dora": False}
    good |= {"init_lora_weights": True, "base_model_name_or_path": "../base.pth"}
    return Target("peft/adapter_config.json", odd.files(good, rng, n), load("peft"), ("peft",))


def write_state():
    model = base()
    made = dict(model="base.pth", fingerprint=weights.fingerprint(model), tokenizer="bytes")
    model.set_tune("state", shift=True)
    with torch.no_grad():
        model.tuned[0].att_shift += 0.5
    model.add_score()
    tune.save_state(model, "s.pth", **made)


def read_state():
    sample.load(sample.Config(state=("s.pth",), device="cpu"))
    engine.load("s.pth", "cpu", torch.float32)


def state(rng, n):
    write_state()
    good = torch.load("s.pth", weights_only=True)
    return Target("s.pth", odd.torch_files(good, rng, n), read_state)


def state_json(rng, n):
    write_state()
    good = json.loads(Path("s.json").read_text())
    return Target("s.json", odd.files(good, rng, n), read_state, ("s.pth",))


def config_json(rng, n):
    base().save_pretrained("w/rwkv-final.pth")
    Path("w/vocab.txt").write_text("1 'a' 1\n2 'b' 1\n")
    good = {"tokenizer": "bytes", "tokenizer_digest": BYTES.digest, "n_layer": 1}
    return Target("w/config.json", odd.files(good, rng, n), load("w/rwkv-final.pth"))


def vocab(rng, n):
    good = b"1 'a' 1\n2 'b' 1\n3 b'\\xff' 1\n4 '\\n' 1\n5 'ab' 2\n"
    files = [good, *odd.VOCAB, *odd.damaged(good, rng, n)]
    files += [b"\0" * 1000, b"a" * 5_000_000, b"\n".join(b"%d" % i for i in range(300000))]

    def read():
        read_vocab = tokenizer.load_tokenizer("vocab.txt")
        read_vocab.decode([1, 2, 3, 4, 5, 99])
        assert len(read_vocab.digest) == 32

    return Target("vocab.txt", files, read)


def tokenizer_json(rng, n):
    text = tokenizer.train_bpe(iter(["hello there you", "some more text here"] * 5), 280).text

    def read():
        hub = tokenizer.load_tokenizer("tokenizer.json")
        hub.decode(hub.encode("hello <|endoftext|> there é") + [0, 1, 5, 270, 999999, -1])
        assert len(hub.digest) == 32

    return Target("tokenizer.json", odd.files(json.loads(text), rng, n), read)


def npy(rng, n):
    np.save("good.npy", np.arange(100).reshape(4, 25) % 7)
    files = [Path("good.npy").read_bytes()]
    files += [*odd.damaged(files[0], rng, n), *odd.damaged(files[0][:128], rng, n)]
    command = ["bad.npy", "--out=p", "--tokenizer=integers:9"]
    return Target("bad.npy", files, lambda: prepare.main(command))


def metrics_jsonl(rng, n):
    rows = [{"step": i, "time": 1.0 * i, "loss": 1 / i} for i in range(1, 9)]
    cfg = train_pretrain.Config(out_dir=".")

    def read():
        resumed = metrics.Metrics(cfg, RUN, first_step=6)
        resumed.log(7, loss=0.5)
        resumed.plot("loss")

    return Target("metrics.jsonl", odd.lines(rows, rng, n), read)


def letters(prompts, completions, **_):
    return [sum(map(ord, text)) % 97 / 97 for text in completions]


def last_of(script, name, rng, n, **settings):
    """last.pt of a script's run of one step, that goes on to the second one."""
    base()
    cfg = script.Config(**SMALL, data="rows.jsonl", out_dir=name, max_steps=1, **settings)
    if not Path(name).exists():
        script.main(cfg)
    good = torch.load(f"{name}/last.pt", weights_only=True)
    cfg.max_steps, cfg.resume = 2, True

    def read():
        Path(f"{name}/last.previous.pt").unlink(missing_ok=True)
        script.main(cfg)

    return Target(f"{name}/last.pt", odd.torch_files(good, rng, n, nested=True), read)


def last_sft(rng, n):
    Path("rows.jsonl").write_text(json.dumps(CHAT) + "\n")
    return last_of(train_sft, "sft", rng, n, tune="lora", lora_targets=("att.key",))


def last_grpo(rng, n):
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS * 2))
    settings = dict(reward=letters, num_generations=2, steps_per_generation=2)
    settings |= dict(max_completion_length=4, tune="lora", lora_targets=("att.key",))
    return last_of(train_grpo, "grpo", rng, n, **settings)


def ref(rng, n):
    Path("pairs.jsonl").write_text(json.dumps(PAIRS[0]) + "\n")
    model, pairs = base().eval(), data.read_preferences("pairs.jsonl", BYTES, 64)
    cfg = train_dpo.Config(data="pairs.jsonl")

    def read():
        logps = train_dpo.cached_reference(cfg.data, model, pairs, [[0]], cfg, RUN)
        train_dpo.evaluate(model, pairs, logps, cfg, RUN)
        assert logps.shape == (1, 2)

    read()
    good = torch.load("pairs.jsonl.ref.pt", weights_only=True)
    return Target("pairs.jsonl.ref.pt", odd.torch_files(good, rng, n, nested=True), read)


def stage_target(file):
    """A function like those above, of a file of a self_reward round, which is run again.

    The round is complete; for its candidates and scores it is not, and the training is left out.
    """

    def make(rng, n):
        base()
        Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
        stages = [dict(kind="external_reward", micro_bsz=2, global_bsz=2, max_steps=1)]
        out = f"sr_{Path(file).stem}"
        made = dict(out_dir=out, prompts="prompts.jsonl", init_from="base.pth", device="cpu")
        made |= dict(max_completion_length=20, temperature=2.0, top_p=1.0, seed=1)
        cfg = self_reward.Config(stages, reward=letters, **made)
        if not Path(out).exists():
            self_reward.main(cfg)
        folder = Path(out) / "01-external_reward"
        kept = {path: path.read_bytes() for path in folder.glob("*.json*") if path.name != file}

        def read():
            for path, content in kept.items():
                path.write_bytes(content)
            if file in ("candidates.jsonl", "scores.jsonl"):
                (folder / "done.json").unlink(missing_ok=True)
                self_reward.train = trained
            self_reward.main(cfg)

        good = (folder / file).read_text()
        if file.endswith(".jsonl"):
            rows = [json.loads(line) for line in good.splitlines()]
            return Target(str(folder / file), odd.lines(rows, rng, n), read)
        return Target(str(folder / file), odd.files(json.loads(good), rng, n), read)

    return make


def trained(*_, **settings):
    return "base.pth"


def run_json(rng, n):
    good = {"id": "abc", "checkpoints": ["rwkv-1.pth", "a/state-7.pth"]}
    cfg = train_sft.Config(out_dir="r")
    Path("r").mkdir(exist_ok=True)

    def read():
        runs.prune("r/rwkv-100.pth", 1)
        metrics.settings_of(cfg)

    return Target("r/run.json", odd.files(good, rng, n), read)


def batch_out(rng, n):
    Path("in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    base()
    batch("in.jsonl", "out.jsonl")
    rows = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    return Target("out.jsonl", odd.lines(rows, rng, n), lambda: batch("in.jsonl", "out.jsonl"))


def batch_note(rng, n):
    batch_out(rng, 0)
    good = json.loads(Path("out.jsonl.json").read_text())
    return Target("out.jsonl.json", odd.files(good, rng, n), lambda: batch("in.jsonl", "out.jsonl"))


OTHERS = (idx, sidecar, pth, safetensors, hub_config, lora, peft, state, state_json, config_json)
OTHERS += (vocab, tokenizer_json, npy, metrics_jsonl, last_sft, last_grpo, ref)
OTHERS += (run_json, batch_out, batch_note)
TARGETS = {name: lines_target(name) for name in LINES}
TARGETS |= {make.__name__: make for make in OTHERS}
STAGE_FILES = ("stage.json", "done.json", "candidates.jsonl", "scores.jsonl", "pairs.jsonl")
TARGETS |= {f"stage_{Path(file).stem}": stage_target(file) for file in STAGE_FILES}
