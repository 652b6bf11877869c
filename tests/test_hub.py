"""Folders of export.py hub: of an RWKV-6 and rwkvtune's by tables that are written out here; and
what engines that are installed make of folders and files: logits, and 48 greedy tokens."""

import ast
import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import export
import prepare
from gosling.config import UserError
from gosling.engine import generate
from gosling.tokenizer import train_bpe
from gosling.weights import read_weights, write_state
from model import RWKV

import pytest
import torch
from helpers import CHAT, ROOT, TEXT, random_model
from safetensors.torch import load_file

IDX = torch.randint(0, 320, (1, 40), generator=torch.Generator().manual_seed(1))
TOKENIZERS = {
    "bytes": {},
    "bpe": dict(n_embd=192, n_layer=2),
    "world": dict(vocab_size=65536, n_embd=64, n_layer=2),
}
# What rwkvtune has one number for, and the ranks that llama.cpp's converter takes for granted.
SIZES = {
    "x070": dict(decay_rank=24, iclr_rank=24, value_rank=8, gate_rank=56),
    "x060": dict(mix_rank=32, decay_rank=64),
}


def run(*argv):
    export.main([str(word) for word in argv])


def saved(tmp_path, version, tokenizer, **sizes):
    """-> (our model, what load_tokenizer takes, the file a.pth)"""
    sizes = {**SIZES[version], **TOKENIZERS[tokenizer], **sizes}
    model = random_model(version, **sizes).eval()
    model.save_pretrained(tmp_path / "a.pth")
    if tokenizer == "bpe":
        train_bpe([TEXT] * 3, 300).save(tmp_path)
        tokenizer = tmp_path / "tokenizer.json"
    return model, tokenizer, tmp_path / "a.pth"


def written(tmp_path, version, tokenizer, *flags, **sizes):
    """-> (our model, its tokenizer, the file a.pth, the folder)"""
    model, name, file = saved(tmp_path, version, tokenizer, **sizes)
    folder = tmp_path / "hub"
    run("hub", f"--model={file}", f"--out={folder}", f"--tokenizer={name}", *flags)
    return model, prepare.load_tokenizer(name), file, folder


def greedy(model, ids, state=None):
    """48 tokens of our engine."""
    options = dict(max_new_tokens=48, temperature=0, stop_ids=[], state=state)
    return generate(model, [ids], **options)[0].tokens


def logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids]))[0]


def close(got, want):
    print("largest difference", float((got - want).detach().abs().max() / want.std()))
    return (got - want).abs().max() < 1e-5 * want.std()


def same(one, other):
    assert one.keys() == other.keys()
    for name, w in one.items():
        assert w.dtype == other[name].dtype and torch.equal(w, other[name]), name


# ----------------------------------------------------------------------------------------------
# RWKV-6

# Rwkv6ForCausalLM of width 128 with 3 layers, as RWKV publishes it and llama.cpp's converter reads
# it, not off export.py.
SIX_LAYER = {
    "ln1.weight": [128],
    "ln1.bias": [128],
    "ln2.weight": [128],
    "ln2.bias": [128],
    **{f"attention.time_maa_{x}": [1, 1, 128] for x in "xwkvrg"},
    "attention.time_maa_w1": [128, 160],
    "attention.time_maa_w2": [5, 32, 128],
    "attention.time_decay": [1, 1, 128],
    "attention.time_decay_w1": [128, 64],
    "attention.time_decay_w2": [64, 128],
    "attention.time_faaaa": [2, 64],
    **{
        f"attention.{x}.weight": [128, 128]
        for x in ("receptance", "key", "value", "gate", "output")
    },
    "attention.ln_x.weight": [128],
    "attention.ln_x.bias": [128],
    "feed_forward.time_maa_k": [1, 1, 128],
    "feed_forward.time_maa_r": [1, 1, 128],
    "feed_forward.receptance.weight": [128, 128],
    "feed_forward.key.weight": [448, 128],
    "feed_forward.value.weight": [128, 448],
}
SIX = {
    "rwkv.embeddings.weight": [320, 128],
    "rwkv.blocks.0.pre_ln.weight": [128],
    "rwkv.blocks.0.pre_ln.bias": [128],
    **{f"rwkv.blocks.{i}.{name}": shape for i in range(3) for name, shape in SIX_LAYER.items()},
    "rwkv.ln_out.weight": [128],
    "rwkv.ln_out.bias": [128],
    "head.weight": [320, 128],
}


def test_a_folder_of_rwkv_6(tmp_path, capsys):
    model, _, file, folder = written(tmp_path, "x060", "bytes")
    assert "llama.cpp" not in capsys.readouterr().err
    theirs = load_file(folder / "model.safetensors")
    assert {name: list(w.shape) for name, w in theirs.items()} == SIX
    ours = model.state_dict()
    assert torch.equal(
        theirs["rwkv.blocks.1.attention.time_maa_w2"], ours["blocks.1.att.time_maa_w2"]
    )
    assert torch.equal(
        theirs["rwkv.blocks.2.feed_forward.key.weight"], ours["blocks.2.ffn.key.weight"]
    )
    config = json.loads((folder / "config.json").read_text())
    facts = dict(
        architectures=["Rwkv6ForCausalLM"],
        model_type="rwkv6",
        hidden_size=128,
        attention_hidden_size=128,
        head_size=64,
        head_size_divisor=8,
        intermediate_size=448,
        num_hidden_layers=3,
        vocab_size=320,
        layer_norm_epsilon=1e-5,
        rescale_every=0,
        eos_token_id=0,
        torch_dtype="float32",
    )
    assert {key: config.get(key) for key in facts} == facts and "auto_map" not in config
    assert not (folder / "modeling_rwkv7.py").exists()
    for path in (folder, folder / "model.safetensors"):
        assert torch.equal(logits(RWKV.from_pretrained(path), IDX[0].tolist()), model(IDX)[0])
    run("hub", f"--model={folder}", f"--out={tmp_path}/b.pth")
    same(torch.load(tmp_path / "b.pth"), torch.load(file))


def test_an_rwkv_6_of_another_kind(tmp_path, capsys):
    _, _, _, folder = written(tmp_path, "x060", "bytes", head_size=32, mix_rank=16)
    assert "will not do for mix_rank=16 and decay_rank=64, not (32, 64)" in capsys.readouterr().err
    config = json.loads((folder / "config.json").read_text())
    assert config["head_size"] == 32
    for key, value in (("head_size_divisor", 1), ("layer_norm_epsilon", 1e-6)):
        (folder / "config.json").write_text(json.dumps({**config, key: value}))
        with pytest.raises(UserError, match=rf"config\.json: {key} is {value}, .* of RWKV-6"):
            read_weights(folder)


# ----------------------------------------------------------------------------------------------
# rwkvtune and rwkvserve


def test_a_folder_for_rwkvtune(tmp_path):
    model, _, file, folder = written(tmp_path, "x070", "bytes", "--to=rwkvtune")
    names = ["config.json", "generation_config.json", "model.pth", "rwkv_vocab_v20230424.txt"]
    assert sorted(path.name for path in folder.iterdir()) == [*names, "tokenizer_config.json"]
    same(torch.load(folder / "model.pth"), torch.load(file))
    config = json.loads((folder / "config.json").read_text())
    facts = dict(
        model_type="rwkv7",
        n_layer=3,
        n_embd=128,
        dim_att=128,
        dim_ffn=512,
        vocab_size=320,
        head_size_a=64,
        dim_att_lora=24,
        dim_mv_lora=8,
        dim_gate_lora=56,
        eos_token_id=0,
    )
    assert {key: config.get(key) for key in facts} == facts
    lines = (folder / "rwkv_vocab_v20230424.txt").read_text().splitlines()
    assert lines[:2] == ["0 '<|endoftext|>' 13", r"1 b'\x00' 1"] and len(lines) == 257
    assert torch.equal(RWKV.from_pretrained(folder)(IDX)[0], model(IDX)[0])
    run("hub", f"--model={folder}", f"--out={tmp_path}/b.pth")
    same(torch.load(tmp_path / "b.pth"), torch.load(file))
    run("hub", f"--model={folder}", f"--out={tmp_path}/again", "--to=rwkvtune", "--tokenizer=bytes")
    same(torch.load(tmp_path / "again/model.pth"), torch.load(file))


@pytest.mark.parametrize(
    "version, tokenizer, sizes, words",
    [
        ("x060", "bytes", {}, r"version is x060; rwkvtune has x070 there"),
        ("x070", "bytes", dict(iclr_rank=40), r"iclr_rank is 40; rwkvtune has 24 there"),
        ("x070", "bytes", dict(dim_ffn=480), r"dim_ffn is 480; rwkvtune has 512 there"),
        ("x070", "bytes", dict(n_layer=1), r"a\.pth has one layer; rwkvtune divides by"),
        ("x070", "bpe", {}, r"tokenizer\.json has no vocab file in World's format"),
    ],
)
def test_what_rwkvtune_would_load_wrongly_is_refused(version, tokenizer, sizes, words, tmp_path):
    """It loads with strict=False: what does not fit stays random there, without an error."""
    with pytest.raises(UserError, match=words):
        written(tmp_path, version, tokenizer, "--to=rwkvtune", **sizes)
    assert not (tmp_path / "hub").exists()


def test_an_older_export_leaves_nothing_that_an_engine_would_take(tmp_path):
    written(tmp_path, "x070", "bytes")
    for flag, gone in (("--to=rwkvtune", "model.safetensors"), ("--to=", "model.pth")):
        _, _, file, folder = written(tmp_path, "x070", "bytes", flag, "--overwrite")
        assert not (folder / gone).exists()
        assert ("modeling_rwkv7.py" in os.listdir(folder)) == (flag == "--to=")


@pytest.mark.parametrize("package", ["rwkvtune", "rwkvserve"])
@pytest.mark.parametrize("tokenizer", ["bytes", "world"])
def test_rwkvtunes_loader_computes_the_same(package, tokenizer, tmp_path):
    pytest.importorskip(package)
    auto_model = importlib.import_module(f"{package}.models.auto_model").AutoModel
    auto_tokenizer = importlib.import_module(f"{package}.data.tokenizers.auto_tokenizer")
    model, ours, _, folder = written(tmp_path, "x070", tokenizer, "--to=rwkvtune")
    theirs = auto_model.from_pretrained(str(folder))
    hub = auto_tokenizer.AutoTokenizer.from_pretrained(str(folder))
    ids = ours.encode(TEXT)
    assert hub.encode(TEXT) == ids and hub.decode(ids) == TEXT and hub.eos_token_id == 0
    assert hub.decode([*ids, 0]) == TEXT + "<|endoftext|>"
    for n in (3, 4):
        want = prepare.render_chat(CHAT[:n], ours, generation_prompt=n == 4)[0]
        assert hub.apply_chat_template(CHAT[:n], add_generation_prompt=n == 4) == want
    with torch.no_grad():
        assert close(theirs(torch.tensor([ids])), logits(model, ids))
    got = theirs.generate(torch.tensor([ids]), max_new_tokens=48, do_sample=False, eos_token_id=-1)
    assert got[0, len(ids) :].tolist() == greedy(model, ids)


# ----------------------------------------------------------------------------------------------
# transformers, with the folder's own model


def test_the_folders_model_needs_torch_and_transformers_alone(tmp_path):
    _, _, _, folder = written(tmp_path, "x070", "bytes")
    text = (folder / "modeling_rwkv7.py").read_text(encoding="utf-8")
    assert text == (ROOT / "gosling/hub_model.py").read_text(encoding="utf-8")
    imported = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    assert imported == {"dataclasses", "math", "torch", "transformers"}


@pytest.fixture
def hf(monkeypatch, tmp_path):
    """transformers' Auto classes; the code that they take from a folder is copied to tmp_path."""
    transformers = pytest.importorskip("transformers")
    if "fla" in sys.modules:
        pytest.skip("fla was imported by another test, and its own class goes first")
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        monkeypatch.delitem(sys.modules, name)
    return transformers


def of_the_folder(hf, folder, **options):
    return hf.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()


def batch_of(hf, folder, texts):
    """Prompts of three lengths, with padding on the left."""
    tokenizer = hf.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    return {key: batch[key] for key in ("input_ids", "attention_mask")}


PLAIN = dict(do_sample=False, eos_token_id=None)
TEXTS = ["Hello!", "今天 is a much longer prompt", "x"]


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_transformers_computes_the_same_by_the_folders_own_model(tokenizer, hf, tmp_path):
    model, ours, _, folder = written(tmp_path, "x070", tokenizer)
    theirs = of_the_folder(hf, folder)
    assert type(theirs).__module__.startswith("transformers_modules")
    ids = ours.encode(TEXT)
    with torch.no_grad():
        assert close(theirs(torch.tensor([ids])).logits, logits(model, ids))
    got = theirs.generate(torch.tensor([ids]), max_new_tokens=48, **PLAIN)
    assert got[0, len(ids) :].tolist() == greedy(model, ids)
    batch = batch_of(hf, folder, TEXTS)
    assert batch["attention_mask"][:2, 0].tolist() == [0, 1]
    got = theirs.generate(**batch, max_new_tokens=48, **PLAIN)[:, batch["input_ids"].shape[1] :]
    assert got.tolist() == [greedy(model, ours.encode(text)) for text in TEXTS]


def test_padding_anywhere_changes_nothing(hf, tmp_path):
    """Before, inside and after the text, from a state that is not zero, in two pieces."""
    model, _, _, folder = written(tmp_path, "x070", "bytes")
    theirs, ids, g = of_the_folder(hf, folder), IDX[0, :9], torch.Generator().manual_seed(3)
    start = {name: torch.randn(w.shape, generator=g) for name, w in model.zero_state(1).items()}
    places = torch.tensor([2, 3, 4, 7, 8, 9, 10, 13, 14])
    padded, mask = torch.full((1, 17), 5), torch.zeros(1, 17, dtype=torch.int64)
    padded[0, places], mask[0, places] = ids, 1
    with torch.no_grad():
        want, after = model(ids[None], start)
        one = theirs(padded[:, :8], attention_mask=mask[:, :8], state=start)
        two = theirs(padded[:, 8:], attention_mask=mask, state=one.state)
    got = torch.cat([one.logits, two.logits], 1)[:, places]
    assert close(got, want) and two.state["seen"] == 17
    for name, value in after.items():
        assert (two.state[name] - value).abs().max() < 1e-4


def test_what_else_transformers_does(hf, tmp_path):
    """Samples, beams, hidden states, a tuned state, the loss and its gradient, bfloat16."""
    model, ours, _, folder = written(tmp_path, "x070", "bytes")
    theirs, batch = of_the_folder(hf, folder), batch_of(hf, folder, TEXTS)
    torch.manual_seed(1)
    samples = theirs.generate(**batch, max_new_tokens=12, num_return_sequences=2, eos_token_id=None)
    assert samples.shape == (6, batch["input_ids"].shape[1] + 12) and len(samples.unique(dim=0)) > 3
    beams = dict(max_new_tokens=12, num_beams=3, **PLAIN)
    assert torch.equal(
        theirs.generate(**batch, **beams), theirs.generate(**batch, **beams, use_cache=False)
    )
    hidden = theirs(IDX, output_hidden_states=True).hidden_states
    assert len(hidden) == 4 and close(theirs.lm_head(hidden[-1]), model(IDX)[0])
    g = torch.Generator().manual_seed(5)
    start = {name: torch.randn(w.shape, generator=g) for name, w in model.zero_state(1).items()}
    want = generate(model, [ours.encode("Hi")], max_new_tokens=9, temperature=0, state=start)[0]
    ids = torch.tensor([ours.encode("Hi")])
    assert theirs.generate(ids, state=start, max_new_tokens=9, do_sample=False)[0, 2:].tolist() == (
        want.tokens
    )
    with torch.no_grad():  # a state of one row is for all
        assert close(theirs(IDX.view(4, 10), state=start).logits[2], model(IDX[:, 20:30], start)[0])
    with pytest.raises(ValueError, match="the state has read 40 tokens already"):
        theirs.generate(ids, state=theirs(IDX).state, max_new_tokens=1)
    loss = theirs(IDX, labels=IDX).loss
    ours_loss = -model(IDX[:, :-1], targets=IDX[:, 1:])[0].logps.mean()
    loss.backward()
    ours_loss.backward()
    assert abs(loss.item() - ours_loss.item()) < 1e-5
    got = theirs.model.layers[1].attn.w_lora.lora[0].weight.grad
    want = model.blocks[1].att.w1.grad.T
    assert (got - want).abs().max() < 1e-4 * want.abs().max()
    half = of_the_folder(hf, folder, torch_dtype=torch.bfloat16)
    rounded = RWKV.from_pretrained(folder, dtype=torch.bfloat16)(IDX)[0].float()
    assert (half(IDX).logits.float() - rounded).abs().max() < 0.1 * rounded.std()


def test_what_transformers_saves_is_the_same_model(hf, tmp_path):
    model, _, _, folder = written(tmp_path, "x070", "bytes")
    theirs = of_the_folder(hf, folder)
    theirs.save_pretrained(tmp_path / "again")
    same(load_file(tmp_path / "again/model.safetensors"), load_file(folder / "model.safetensors"))
    again = of_the_folder(hf, tmp_path / "again")
    assert torch.equal(again(IDX).logits, theirs(IDX).logits)
    assert torch.equal(RWKV.from_pretrained(tmp_path / "again")(IDX)[0], model(IDX)[0])


# ----------------------------------------------------------------------------------------------
# other engines: 48 greedy tokens


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("version", ["x060", "x070"])
def test_the_rwkv_package_gives_the_same_text(version, tokenizer, official, tmp_path):
    pytest.importorskip("rwkv")
    model, name, file = saved(tmp_path, version, tokenizer)
    theirs = official(file, version == "x070")
    ids = prepare.load_tokenizer(name).encode(TEXT)
    got, state = theirs.forward(ids, None, full_output=True)
    assert close(got.float(), logits(model, ids)[0])
    found = []
    for _ in range(48):
        found.append(int(got.reshape(-1, got.shape[-1])[-1].argmax()))
        got, state = theirs.forward(found[-1:], state)
    assert found == greedy(model, ids)


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_rwkv7_hf_gives_the_same_text(tokenizer, tmp_path):
    rwkv7_hf = pytest.importorskip("rwkv7_hf")
    model, ours, _, folder = written(tmp_path, "x070", tokenizer)
    theirs, ids = rwkv7_hf.RWKV7ForCausalLM.from_pretrained(folder).eval(), ours.encode(TEXT)
    with torch.no_grad():
        assert close(theirs(torch.tensor([ids])).logits, logits(model, ids))
    got = theirs.generate(torch.tensor([ids]), max_new_tokens=48, **PLAIN)
    assert got[0, len(ids) :].tolist() == greedy(model, ids)


FLA = """
import sys
import triton.runtime.autotuner as autotuner
autotuner.Autotuner.do_bench = property(lambda self: lambda f, **k: [0.0] * 3, lambda self, f: None)
import fla, torch
from fla.models.utils import Cache
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
folder, ids = sys.argv[1], [int(i) for i in sys.argv[2].split(",")]
model = AutoModelForCausalLM.from_pretrained(folder, fuse_norm=False).eval()
assert type(model).__module__.startswith("fla.")
found, cache = [], None
if len(sys.argv) > 4:
    state, cache = load_file(sys.argv[4]), Cache()
    for i in range(model.config.num_hidden_layers):
        wkv, att, ffn = (
            state[f"layers.{i}.{kind}"]
            for kind in ("recurrent_state", "attention_shift", "ffn_shift")
        )
        cache.update(recurrent_state=wkv, conv_state=att, ffn_state=ffn, layer_idx=i, offset=0)
with torch.no_grad():
    out = model(torch.tensor([ids]), past_key_values=cache, use_cache=True)
    torch.save(out.logits, sys.argv[3])
    for _ in range(48):
        found.append(int(out.logits[0, -1].argmax()))
        step = torch.tensor([found[-1:]])
        out = model(step, past_key_values=out.past_key_values, use_cache=True)
print(found)
"""


def by_fla(folder, ids, tmp_path, *state):
    """Its own kernels, on a CPU in Triton's interpreter, step by step through its cache; its
    generate() is wrong with the newest transformers. -> (logits of the prompt, 48 greedy tokens)"""
    for package in ("fla", "triton"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    out = tmp_path / "logits.pt"
    done = subprocess.run(
        [sys.executable, "-c", FLA, folder, ",".join(map(str, ids)), out, *state],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return torch.load(out), json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_fla_gives_the_same_text(tokenizer, tmp_path):
    model, ours, _, folder = written(tmp_path, "x070", tokenizer)
    ids = ours.encode("Hello, 今天.")
    got, found = by_fla(folder, ids, tmp_path)
    assert close(got, logits(model, ids)) and found == greedy(model, ids)


def test_fla_starts_from_a_tuned_state(tmp_path):
    model, ours, _, folder = written(tmp_path, "x070", "bytes")
    g = torch.Generator().manual_seed(5)
    start = {name: torch.randn(w.shape, generator=g) for name, w in model.zero_state(1).items()}
    write_state(start, tmp_path / "s.pth")
    state = tmp_path / "s.safetensors"
    run("state", f"--state={tmp_path}/s.pth", f"--out={state}", "--to=transformers")
    ids = ours.encode("Hello.")
    got, found = by_fla(folder, ids, tmp_path, state)
    with torch.no_grad():
        assert close(got, model(torch.tensor([ids]), start)[0])
    assert found == greedy(model, ids, state=start) != greedy(model, ids)


@pytest.mark.parametrize("tokenizer", ["bytes", "world"])
@pytest.mark.parametrize("version", ["x060", "x070"])
def test_llama_cpps_converter_writes_the_tensors_of_our_gguf(version, tokenizer, tmp_path):
    """With a checkout of llama.cpp on PYTHONPATH, and the package gguf."""
    gguf = pytest.importorskip("gguf")
    found = importlib.util.find_spec("conversion.rwkv")
    if found is None:
        pytest.skip("no checkout of llama.cpp is on PYTHONPATH")
    script = Path(found.origin).parent.parent / "convert_hf_to_gguf.py"
    _, _, file, folder = written(tmp_path, version, tokenizer)
    out = [tmp_path / "theirs.gguf", tmp_path / "ours.gguf"]
    argv = [sys.executable, script, folder, "--outfile", out[0], "--outtype", "f16"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    flags = [f"--tokenizer={tokenizer}", "--dtype=float16"]
    run("gguf", f"--model={file}", f"--out={out[1]}", *flags)
    theirs, ours = ({t.name: t for t in gguf.GGUFReader(path).tensors} for path in out)
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        assert tensor.tensor_type == ours[name].tensor_type, name
        assert tensor.data.tobytes() == ours[name].data.tobytes(), name
