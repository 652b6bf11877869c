"""export.py for other engines: PEFT's adapters, web-rwkv's .st, the caches of transformers.

Names and shapes are compared with tables that are written out here. What needs a package runs
where it is installed.
"""

import json

import export
from gosling.config import UserError
from gosling.tune import load_model, lora_options
from gosling.weights import read_metadata, read_weights, write_state
from model import RWKV

import pytest
import torch
import torch.nn as nn
from helpers import RANKS, lora, random_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

IDX = torch.randint(0, 320, (1, 40), generator=torch.Generator().manual_seed(1))
MATRICES = [
    f"blocks.{i}.{name}"
    for i in range(3)
    for name in ("att.receptance", "att.key", "att.value", "att.output", "ffn.key", "ffn.value")
]


def run(*argv):
    export.main([str(word) for word in argv])


def saved(version, path, dtype=None, **sizes):
    model = random_model(version, **{**RANKS[version], **sizes})
    model.save_pretrained(path, dtype=dtype)
    return model


def logits(model, state=None):
    with torch.no_grad():
        return model(IDX, state)[0]


def same(one, other):
    assert one.keys() == other.keys()
    for name, w in one.items():
        assert w.dtype == other[name].dtype and torch.equal(w, other[name]), name


# ----------------------------------------------------------------------------------------------
# PEFT

ABOUT = {"model": "a.pth", "tokenizer": "bytes"}  # what an adapter's file says


def to_peft(tmp_path, to="peft", **options):
    """-> (base, base with its adapter on, the folder that PEFT reads)"""
    base = saved("x070", tmp_path / "a.pth")
    on = lora(base, tmp_path / "l.safetensors", ABOUT, **options)
    folder = tmp_path / "theirs"
    run("convert", f"--model={tmp_path}/l.safetensors", f"--out={folder}", f"--to={to}")
    return base, on, folder


def test_a_lora_for_peft_has_its_names_and_settings(tmp_path):
    _, _, folder = to_peft(tmp_path, r=4, alpha=6.0, rslora=True, extra=("ln1", "ln_out"))
    norms = ["ln_out", *(f"blocks.{i}.ln1" for i in range(3))]
    expected = {f"base_model.model.{m}.lora_{x}.weight" for m in MATRICES for x in "AB"}
    expected |= {f"base_model.model.{norm}.{x}" for norm in norms for x in ("weight", "bias")}
    theirs = load_file(folder / "adapter_model.safetensors")
    assert theirs.keys() == expected
    assert theirs["base_model.model.blocks.1.ffn.key.lora_A.weight"].shape == (4, 128)
    assert theirs["base_model.model.blocks.1.ffn.key.lora_B.weight"].shape == (512, 4)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert sorted(config.pop("target_modules")) == sorted(MATRICES)
    assert sorted(config.pop("modules_to_save")) == sorted(norms)
    wanted = dict(peft_type="LORA", r=4, lora_alpha=6, use_rslora=True, bias="none")
    assert config.items() >= wanted.items()
    assert config["base_model_name_or_path"] == "../a.pth"


def test_a_lora_for_a_hub_folders_model_has_flas_names(tmp_path):
    _, _, folder = to_peft(tmp_path, "peft-hub", r=4, alpha=6.0, extra=("ln1", "emb"))
    kinds = ["attn.r_proj", "attn.k_proj", "attn.v_proj", "attn.o_proj", "ffn.key", "ffn.value"]
    modules = {f"model.layers.{i}.{kind}" for i in range(3) for kind in kinds}
    whole = {"model.embeddings", *(f"model.layers.{i}.attn_norm" for i in range(3))}
    expected = {f"base_model.model.{m}.lora_{x}.weight" for m in modules for x in "AB"}
    expected |= {f"base_model.model.{module}.weight" for module in whole}
    expected |= {f"base_model.model.model.layers.{i}.attn_norm.bias" for i in range(3)}
    assert load_file(folder / "adapter_model.safetensors").keys() == expected
    config = json.loads((folder / "adapter_config.json").read_text())
    assert set(config["target_modules"]) == modules and set(config["modules_to_save"]) == whole


@pytest.mark.parametrize("to", ["peft", "peft-hub"])
@pytest.mark.parametrize("says", ["metadata", "adapter_config.json"])
def test_our_reader_reads_back_what_went_to_peft(says, to, tmp_path):
    """From a file that PEFT has saved again there is adapter_config.json alone."""
    _, on, folder = to_peft(tmp_path, to, r=4, alpha=6.5, rslora=True, extra=("ln_out",))
    file = folder / "adapter_model.safetensors"
    if says != "metadata":
        save_file(load_file(file), file, {"format": "pt"})
    ours, back = tmp_path / "l.safetensors", tmp_path / "back.safetensors"
    run("convert", f"--model={folder}", f"--out={back}")
    same(load_file(back), load_file(ours))
    options = lora_options(ours)
    for path in (folder, file, back):
        assert {**lora_options(path), "targets": 0} == {**options, "targets": 0}
        assert set(lora_options(path)["targets"]) == set(options["targets"])
    about = read_metadata(folder)
    assert (float(about["alpha"]), about["rslora"], about["model"]) == (6.5, "True", "../a.pth")
    assert torch.equal(logits(load_model(folder)[0]), logits(on))


class Branch(nn.Module):
    """A place in a tree of modules, for the names alone."""


def as_modules(weights):
    """{official name: tensor} -> a tree of torch's own modules with the same names."""
    root = Branch()
    for name, w in weights.items():
        *path, module, leaf = name.split(".")
        place = root
        for part in path:
            if not hasattr(place, part):
                place.add_module(part, Branch())
            place = getattr(place, part)
        if leaf == "weight" and w.dim() == 2 and module != "emb":
            place.add_module(module, nn.Linear(w.shape[1], w.shape[0], bias=False))
        elif leaf == "weight":
            place.add_module(module, nn.Embedding(*w.shape) if w.dim() == 2 else norm(w))
    with torch.no_grad():
        for name, p in root.named_parameters():
            p.copy_(weights[name])
    return root


def norm(w):
    return nn.LayerNorm(w.shape)


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_loads_the_folder_and_merges_to_our_weights(rslora, tmp_path):
    peft = pytest.importorskip("peft")
    extra = ("ln_out", "ln1")
    base, _, folder = to_peft(tmp_path, r=4, alpha=6.0, rslora=rslora, extra=extra)
    run(
        "merge",
        f"--model={tmp_path}/a.pth",
        f"--adapter={tmp_path}/l.safetensors",
        f"--out={tmp_path}/m.pth",
    )
    model = peft.PeftModel.from_pretrained(as_modules(base.state_dict()), folder)
    merged, ours = model.merge_and_unload().state_dict(), read_weights(tmp_path / "m.pth")
    assert {f"{name}.weight" for name in MATRICES} | {"ln_out.bias"} <= merged.keys()
    for name, w in merged.items():
        assert (w - ours[name].reshape(w.shape)).abs().max() < 1e-6, name
    changed = [name for name, w in merged.items() if not torch.equal(w, base.state_dict()[name])]
    assert len(changed) == len(MATRICES) + 8  # all of them, and four norms


def test_peft_puts_the_folder_on_a_hub_folders_model(tmp_path):
    peft, rwkv7_hf = pytest.importorskip("peft"), pytest.importorskip("rwkv7_hf")
    extra = ("ln_out", "ln1", "emb")
    _, on, folder = to_peft(tmp_path, "peft-hub", r=4, alpha=6.0, rslora=True, extra=extra)
    run("hub", f"--model={tmp_path}/a.pth", f"--out={tmp_path}/hub", "--tokenizer=bytes")
    theirs = rwkv7_hf.RWKV7ForCausalLM.from_pretrained(tmp_path / "hub")
    with torch.no_grad():
        before = theirs(IDX).logits
        theirs = peft.PeftModel.from_pretrained(theirs, folder)
        got = theirs(IDX).logits
    expected = logits(on)
    assert (got - expected).abs().max() < 1e-5 * expected.std()
    assert (before - expected).abs().max() > 0.1 * expected.std()  # the adapter matters
    theirs.save_pretrained(tmp_path / "again")
    same(read_weights(tmp_path / "again"), read_weights(tmp_path / "l.safetensors"))


def test_what_peft_cannot_hold_is_refused(tmp_path):
    saved("x070", tmp_path / "a.pth")
    out = [f"--out={tmp_path}/theirs", "--to=peft"]
    with pytest.raises(UserError, match=r"a\.pth is not a LoRA, it has no lora_A"):
        run("convert", f"--model={tmp_path}/a.pth", *out)
    file = tmp_path / "l.safetensors"
    for extra, name in (("att.w0", "att.w0"), ("ffn.key", "ffn.key.weight")):
        lora(random_model("x070", **RANKS["x070"]), file, r=4, alpha=6.0, extra=(extra,))
        with pytest.raises(UserError, match=rf"PEFT cannot hold blocks\.0\.{name}.*merge it"):
            run("convert", f"--model={file}", *out)
    lora(random_model("x060", **RANKS["x060"]), file, r=4, alpha=6.0)
    with pytest.raises(UserError, match=r"is of an RWKV-6 \(blocks\.0\.att\.gate\)"):
        run("convert", f"--model={file}", f"--out={tmp_path}/theirs", "--to=peft-hub")
    lora(random_model("x070", **RANKS["x070"]), file, r=4, alpha=6.0)
    weights = load_file(file)
    save_file(weights, file)
    with pytest.raises(UserError, match="does not say its alpha"):
        run("convert", f"--model={file}", *out)
    for x, axis in (("A", 0), ("B", 1)):
        name = f"blocks.1.att.key.lora_{x}"
        weights[name] = weights[name].narrow(axis, 0, 2).contiguous()
    save_file(weights, file, {"alpha": "6"})
    with pytest.raises(UserError, match=r"has ranks \[2, 4\], expected one"):
        run("convert", f"--model={file}", *out)
    with pytest.raises(UserError, match=r"--out=.*x\.safetensors: expected a folder"):
        run("convert", f"--model={file}", f"--out={tmp_path}/x.safetensors", "--to=peft")
    assert not (tmp_path / "theirs").exists()


# ----------------------------------------------------------------------------------------------
# web-rwkv

# What its loader asks for, in file order of axes: L = 3 layers, C = 128, F the FFN's width, N = 64.
C, V = 128, 320
NORMS = {"ln_out": C, "blocks.0.ln0": C}
NORMS |= {f"blocks.{i}.{norm}": C for i in range(3) for norm in ("ln1", "ln2", "att.ln_x")}
EVERY = {"emb.weight": (V, C), "head.weight": (V, C)}
EVERY |= {f"{norm}.{x}": (C,) for norm in NORMS for x in ("weight", "bias")}
SEVEN = {
    **{f"att.x_{x}": (C,) for x in "rwkvag"},
    **{f"att.{x}": (C,) for x in ("w0", "a0", "v0", "k_k", "k_a")},
    **{"att.w1": (24, C), "att.w2": (C, 24), "att.a1": (40, C), "att.a2": (C, 40)},
    **{"att.v1": (8, C), "att.v2": (C, 8), "att.g1": (56, C), "att.g2": (C, 56)},
    **{f"att.{x}.weight": (C, C) for x in ("receptance", "key", "value", "output")},
    **{"att.r_k": (2, 64), "ffn.x_k": (C,)},
    **{"ffn.key.weight": (4 * C, C), "ffn.value.weight": (C, 4 * C)},
}
SIX = {
    **{f"att.time_mix_{x}": (C,) for x in "xwkvrg"},
    **{"att.time_mix_w1": (5 * 16, C), "att.time_mix_w2": (5, C, 16)},
    **{"att.time_decay": (C,), "att.time_decay_w1": (48, C), "att.time_decay_w2": (C, 48)},
    "att.time_first": (2, 64),
    **{f"att.{x}.weight": (C, C) for x in ("receptance", "key", "value", "output", "gate")},
    **{"ffn.time_mix_k": (C,), "ffn.time_mix_r": (C,), "ffn.receptance.weight": (C, C)},
    **{"ffn.key.weight": (448, C), "ffn.value.weight": (C, 448)},
}


@pytest.mark.parametrize("version, layer", [("x060", SIX), ("x070", SEVEN)])
def test_a_model_for_web_rwkv_has_its_names_shapes_and_float16(version, layer, tmp_path):
    saved(version, tmp_path / "a.pth", torch.bfloat16)
    run("convert", f"--model={tmp_path}/a.pth", f"--out={tmp_path}/a.st", "--to=web-rwkv")
    theirs = load_file(tmp_path / "a.st")
    expected = EVERY | {f"blocks.{i}.{name}": s for i in range(3) for name, s in layer.items()}
    assert {name: tuple(n for n in w.shape if n > 1) for name, w in theirs.items()} == expected
    assert all(w.dtype == torch.float16 for w in theirs.values())
    # Linear layers with the small matrices as they are stored compute what ours do.
    first, second = ("w1", "w2") if version == "x070" else ("time_decay_w1", "time_decay_w2")
    one, two = (theirs[f"blocks.1.att.{name}"].float() for name in (first, second))
    ours = {name: w.float() for name, w in read_weights(tmp_path / "a.pth").items()}
    x = torch.randn(5, C)
    got = nn.functional.linear(nn.functional.linear(x, one), two)
    expected = x @ ours[f"blocks.1.att.{first}"] @ ours[f"blocks.1.att.{second}"]
    assert (got - expected).abs().max() < 1e-2 * expected.std()


@pytest.mark.parametrize("version", ["x060", "x070"])
def test_web_rwkv_and_back_is_bit_exact(version, tmp_path):
    saved(version, tmp_path / "a.pth", torch.float16)
    weights = torch.load(tmp_path / "a.pth")
    name = "blocks.1.att.x_k" if version == "x070" else "blocks.1.att.time_maa_k"
    weights[name] = weights[name].reshape(1, 1, -1)  # upstream's form of a vector stays
    torch.save(weights, tmp_path / "a.pth")
    run("convert", f"--model={tmp_path}/a.pth", f"--out={tmp_path}/a.st", "--to=web-rwkv")
    run("convert", f"--model={tmp_path}/a.st", f"--out={tmp_path}/b.pth")
    same(torch.load(tmp_path / "b.pth"), weights)
    one, other = (RWKV.from_pretrained(tmp_path / file) for file in ("a.pth", "a.st"))
    assert torch.equal(logits(one), logits(other))


def test_what_web_rwkv_does_not_read_is_refused(tmp_path):
    model = saved("x070", tmp_path / "a.pth")

    def refused(words, name="a.pth", *flags):
        with pytest.raises(UserError, match=words):
            run(
                "convert",
                f"--model={tmp_path / name}",
                f"--out={tmp_path}/x.st",
                "--to=web-rwkv",
                *flags,
            )

    refused("--dtype=bfloat16: web-rwkv reads float16 alone", "a.pth", "--dtype=bfloat16")
    lora(model, tmp_path / "l.safetensors", r=4)
    refused("it is a LoRA, which goes beside the model", "l.safetensors")
    saved("x070", tmp_path / "one.pth", n_layer=1)
    refused(r"one\.pth has one layer; web-rwkv reads sizes of RWKV-7 from the second", "one.pth")
    weights = model.state_dict()
    torch.save({**weights, "score.weight": torch.zeros(1, C)}, tmp_path / "r.pth")
    refused(r"r\.pth is a reward model", "r.pth")
    torch.save({**weights, "blocks.1.att.w0": torch.full((C,), 1e5)}, tmp_path / "big.pth")
    refused("w0 would be NaN or infinite as torch.float16", "big.pth")
    torch.save({**weights, "more": torch.zeros(1)}, tmp_path / "more.pth")
    refused(r"more\.pth: more \[1\] is extra; --to=web-rwkv is for a whole model", "more.pth")
    with pytest.raises(UserError, match=r"x\.pth: expected a name in \.st"):
        run("convert", f"--model={tmp_path}/a.pth", f"--out={tmp_path}/x.pth", "--to=web-rwkv")
    assert not (tmp_path / "x.st").exists()


# ----------------------------------------------------------------------------------------------
# transformers' caches


def state_for_transformers(tmp_path, model):
    """-> (a random state with shift vectors, the file for transformers)"""
    g = torch.Generator().manual_seed(5)
    start = {name: torch.randn(w.shape, generator=g) for name, w in model.zero_state(1).items()}
    write_state(start, tmp_path / "s.pth", model="a.pth", fingerprint="of a")
    out = tmp_path / "s.safetensors"
    run("state", f"--state={tmp_path}/s.pth", f"--out={out}", "--to=transformers")
    return start, out


def test_a_state_for_transformers_is_transposed_by_hand(tmp_path):
    start, out = state_for_transformers(tmp_path, random_model("x070"))
    theirs = load_file(out)
    kinds = ("recurrent_state", "attention_shift", "ffn_shift")
    assert theirs.keys() == {f"layers.{i}.{kind}" for i in range(3) for kind in kinds}
    assert all(w.dtype == torch.float32 for w in theirs.values())
    for i in range(3):
        turned = theirs[f"layers.{i}.recurrent_state"]
        assert turned.shape == (1, 2, 64, 64)
        for value, key in ((0, 63), (5, 6), (40, 2)):
            for h in range(2):
                assert turned[0, h, key, value] == start["wkv"][i, 0, h, value, key]
        assert torch.equal(theirs[f"layers.{i}.attention_shift"], start["att_shift"][i])
        assert torch.equal(theirs[f"layers.{i}.ffn_shift"], start["ffn_shift"][i])
    with safe_open(out, "pt") as f:
        assert f.metadata()["fingerprint"] == "of a" and f.metadata()["model"] == "a.pth"
    with pytest.raises(UserError, match=r"y\.pth: expected a name in \.safetensors"):
        run("state", f"--state={tmp_path}/s.pth", f"--out={tmp_path}/y.pth", "--to=transformers")
    st = [f"--state={tmp_path}/s.st", f"--out={tmp_path}/t.safetensors", "--to=transformers"]
    run("state", f"--state={tmp_path}/s.pth", f"--out={tmp_path}/s.st", "--to=web-rwkv")
    run("state", *st)
    again = load_file(tmp_path / "t.safetensors")["layers.1.recurrent_state"]
    assert (again - theirs["layers.1.recurrent_state"]).abs().max() < 4e-3  # a .st is float16


def test_rwkv7_hf_starts_from_the_state(tmp_path):
    rwkv7_hf = pytest.importorskip("rwkv7_hf")
    model = saved("x070", tmp_path / "a.pth")
    start, out = state_for_transformers(tmp_path, model)
    run("hub", f"--model={tmp_path}/a.pth", f"--out={tmp_path}/hub", "--tokenizer=bytes")
    theirs = rwkv7_hf.RWKV7ForCausalLM.from_pretrained(tmp_path / "hub")
    state, cache = load_file(out), rwkv7_hf.RWKV7Cache()
    for i in range(3):
        kinds = ("recurrent_state", "attention_shift", "ffn_shift")
        cache.set_layer(i, *(state[f"layers.{i}.{kind}"] for kind in kinds))
    with torch.no_grad():
        got = theirs(IDX, past_key_values=cache, use_cache=True).logits
    expected = logits(model, start)
    print(float((got - expected).abs().max() / expected.std()))
    assert (got - expected).abs().max() < 1e-5 * expected.std()
    assert (logits(model) - expected).abs().max() > 0.1  # the state matters
