"""export.py: merged files against the network with its adapter on and against the official package,
bit-exact round trips, fla's layout by its own names, what inspect says, and every refusal."""

import json
import re

import export
import prepare
from gosling.config import UserError
from gosling.hub_folder import CHAT_TEMPLATE
from gosling.tokenizer import train_bpe
from model import RWKV
from wkv_cuda import wkv7

import pytest
import torch
from helpers import RANKS, lora, random_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

IDX = torch.randint(0, 320, (1, 40), generator=torch.Generator().manual_seed(1))
V012 = ["blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2"]


def run(*argv):
    export.main([str(word) for word in argv])


def saved(version, path, **sizes):
    model = random_model(version, **{**RANKS[version], **sizes})
    model.save_pretrained(path)
    return model


def logits(model, state=None):
    with torch.no_grad():
        return model(IDX, state)[0]


def same(one, other, names=None):
    assert list(one) == list(other)
    for name in names or one:
        assert one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]), name


# ----------------------------------------------------------------------------------------------
# merge


@pytest.mark.parametrize("version", ["x060", "x070"])
@pytest.mark.parametrize(
    "rslora, extra", [(False, ()), (True, ("ln", "ffn."))]
)  # "ffn.": matrices with a LoRA, too
def test_merged_equals_adapter_on(version, rslora, extra, tmp_path, official):
    base = saved(version, tmp_path / "base.pth")
    on = lora(base, tmp_path / "lora.safetensors", r=4, alpha=6.0, rslora=rslora, extra=extra)
    run(
        "merge",
        f"--model={tmp_path}/base.pth",
        f"--adapter={tmp_path}/lora.safetensors",
        f"--out={tmp_path}/m.pth",
    )
    merged = RWKV.from_pretrained(tmp_path / "m.pth")
    assert (logits(on) - logits(base)).abs().max() > 0.1  # the adapter matters
    assert (logits(merged) - logits(on)).abs().max() < 1e-5
    theirs = official(tmp_path / "m.pth", version == "x070").forward(
        IDX[0].tolist(), None, full_output=True
    )[0]
    assert (theirs - logits(on)[0]).abs().max() < 1e-4
    # one matrix and one extra tensor by hand
    weights, a = torch.load(tmp_path / "m.pth"), load_file(tmp_path / "lora.safetensors")
    before = {**base.state_dict(), **a}
    scale = 6 / 2 if rslora else 6 / 4
    name = "blocks.1.ffn.value"
    want = before[f"{name}.weight"].double() + scale * (
        a[f"{name}.lora_B"].double() @ a[f"{name}.lora_A"].double()
    )
    assert (weights[f"{name}.weight"] - want).abs().max() < 1e-6
    assert ("ffn.value.weight" in str(list(a))) == bool(extra)
    for name in [n for n in a if "lora_" not in n and not n.startswith("blocks.") or ".ln" in n]:
        assert torch.equal(weights[name], a[name])
    untouched = "blocks.0.att.r_k" if version == "x070" else "blocks.0.att.time_faaaa"
    assert torch.equal(weights[untouched], base.state_dict()[untouched])


def test_merge_keeps_the_bases_dtype_or_takes_dtype(tmp_path):
    base = random_model("x070")
    base.save_pretrained(tmp_path / "b.pth", dtype=torch.bfloat16)
    lora(base, tmp_path / "l.safetensors", r=4, alpha=8.0)
    args = ["merge", f"--model={tmp_path}/b.pth", f"--adapter={tmp_path}/l.safetensors"]
    run(*args, f"--out={tmp_path}/m.pth")
    run(*args, f"--out={tmp_path}/m32.safetensors", "--dtype=float32")
    m, m32, b = (
        torch.load(tmp_path / "m.pth"),
        load_file(tmp_path / "m32.safetensors"),
        torch.load(tmp_path / "b.pth"),
    )
    a, name = load_file(tmp_path / "l.safetensors"), "blocks.2.att.key"
    exact = b[f"{name}.weight"].float() + 2 * (a[f"{name}.lora_B"] @ a[f"{name}.lora_A"])
    assert (m32[f"{name}.weight"] - exact).abs().max() < 1e-6  # not rounded to bfloat16 on the way
    assert torch.equal(m[f"{name}.weight"], m32[f"{name}.weight"].bfloat16())
    assert {w.dtype for w in m.values()} == {torch.bfloat16} and {
        w.dtype for w in m32.values()
    } == {torch.float32}


def test_merge_without_metadata_wants_alpha(tmp_path):
    base = saved("x070", tmp_path / "b.pth")
    on = lora(base, tmp_path / "l.pth", r=4, alpha=6.0, rslora=True)
    args = [
        "merge",
        f"--model={tmp_path}/b.pth",
        f"--adapter={tmp_path}/l.pth",
        f"--out={tmp_path}/m.pth",
    ]
    with pytest.raises(UserError, match=r"l\.pth does not say its alpha; give the --alpha"):
        run(*args)
    assert not (tmp_path / "m.pth").exists()
    run(*args, "--alpha=6", "--rslora")
    assert (logits(RWKV.from_pretrained(tmp_path / "m.pth")) - logits(on)).abs().max() < 1e-5


def test_merge_refusals(tmp_path):
    base = saved("x070", tmp_path / "b.pth")
    saved("x070", tmp_path / "wide.pth", n_embd=192)
    saved("x070", tmp_path / "short.pth", n_layer=2)
    lora(base, tmp_path / "l.safetensors", r=4, alpha=6.0)
    good = load_file(tmp_path / "l.safetensors")
    out = f"--out={tmp_path}/m.pth"

    def refused(message, model="b.pth", adapter="l.safetensors", *more):
        with pytest.raises(UserError, match=message) as e:
            run(
                "merge",
                f"--model={tmp_path}/{model}",
                f"--adapter={tmp_path}/{adapter}",
                out,
                *more,
            )
        assert "\n" not in str(e.value) and not (tmp_path / "m.pth").exists()

    refused(
        r"another base, .*: blocks\.\d\.\S+\.weight, \[\d+, \d+\] in \S+wide\.pth, "
        r"has lora_A \[4, \d+\]",
        "wide.pth",
    )
    refused(
        r"blocks\.2\.\S+, absent in \S+short\.pth, has lora_A \[4, \d+\], lora_B \[\d+, 4\]",
        "short.pth",
    )
    refused(r"neither RWKV-7", "l.safetensors")

    def changed(name, **tensors):
        torch.save(
            {
                **{k: w for k, w in good.items() if k not in tensors},
                **{k: w for k, w in tensors.items() if w is not None},
            },
            tmp_path / name,
        )

    key = "blocks.1.att.key"
    changed("half.pth", **{f"{key}.lora_B": None})
    refused(
        r"not whole: blocks\.1\.att\.key\.weight, .* has lora_A \[4, 128\], lora_B absent",
        "b.pth",
        "half.pth",
        "--alpha=6",
    )
    changed("ranks.pth", **{f"{key}.lora_B": torch.zeros(128, 5)})
    refused(
        r"blocks\.1\.att\.key\.weight, .* has lora_A \[4, 128\], lora_B \[128, 5\]",
        "b.pth",
        "ranks.pth",
        "--alpha=6",
    )
    changed("extra.pth", **{"ln_out.weight": torch.zeros(64)})
    refused(
        r"ln_out\.weight, \[128\] in \S+b\.pth, .* replacement \[64\]",
        "b.pth",
        "extra.pth",
        "--alpha=6",
    )
    changed("nan.pth", **{f"{key}.lora_B": torch.full((128, 4), float("nan"))})
    refused(
        r"nan\.pth: blocks\.1\.att\.key\.lora_B has 512 values that are NaN",
        "b.pth",
        "nan.pth",
        "--alpha=6",
    )
    torch.save({f"{key}.disha": torch.zeros(4, 128)}, tmp_path / "disha.pth")
    refused(
        r"not a LoRA, it has no lora_A but blocks\.1\.att\.key\.disha",
        "b.pth",
        "disha.pth",
        "--alpha=6",
    )
    with pytest.raises(UserError, match="give --adapter=LORA or --state=STATE"):
        run("merge", f"--model={tmp_path}/b.pth", out)


@pytest.mark.parametrize("version", ["x060", "x070"])
def test_merge_state(version, tmp_path, official, capsys):
    model = saved(version, tmp_path / "b.pth")
    state = {f"blocks.{i}.att.time_state": torch.randn(2, 64, 64) for i in range(3)}
    torch.save(state, tmp_path / "s.pth")
    args = ["merge", f"--model={tmp_path}/b.pth", f"--out={tmp_path}/m.pth"]
    run(*args, f"--state={tmp_path}/s.pth")
    assert ("warning: the rwkv package silently ignores" in capsys.readouterr().err) == (
        version == "x070"
    )
    same(torch.load(tmp_path / "m.pth"), {**torch.load(tmp_path / "b.pth"), **state})
    run("inspect", tmp_path / "m.pth")
    assert "a tuned state of 3 layers is inside" in capsys.readouterr().out
    if version == "x060":  # the engine starts from it
        start = {**model.zero_state(1), "wkv": torch.stack(list(state.values()))[:, None]}
        theirs = official(tmp_path / "m.pth", False).forward(
            IDX[0].tolist(), None, full_output=True
        )[0]
        assert (theirs - logits(model, start)[0]).abs().max() < 1e-4
        assert (logits(model, start) - logits(model)).abs().max() > 1e-2
    for wrong in (
        state | {"blocks.2.att.time_state": torch.zeros(3, 64, 64)},
        dict(list(state.items())[:2]),
        state | {"blocks.3.att.time_state": torch.zeros(2, 64, 64)},
    ):
        torch.save(wrong, tmp_path / "w.pth")
        with pytest.raises(
            UserError, match=r"w\.pth does not fit \S+: blocks\.[23]\.att\.time_state (is|\[2, 64)"
        ):
            run(*args, f"--state={tmp_path}/w.pth", "--overwrite")
    torch.save(
        state | {"blocks.1.att.time_state": torch.full((2, 64, 64), float("inf"))},
        tmp_path / "w.pth",
    )
    with pytest.raises(UserError, match=r"w\.pth: blocks\.1\.att\.time_state has 8,192 values"):
        run(*args, f"--state={tmp_path}/w.pth", "--overwrite")
    with pytest.raises(UserError, match="a tuned state goes to --state"):
        run(*args, f"--adapter={tmp_path}/s.pth", "--overwrite")


# ----------------------------------------------------------------------------------------------
# convert


@pytest.mark.parametrize("version", ["x060", "x070"])
def test_convert_there_and_back_is_bit_exact(version, tmp_path):
    random_model(version).save_pretrained(tmp_path / "a.pth", dtype=torch.bfloat16)
    weights = torch.load(tmp_path / "a.pth")
    weights["blocks.1.ln1.weight"] = weights["blocks.1.ln1.weight"].float()  # mixed dtypes
    weights["blocks.1.att.key.weight"] = (
        weights["blocks.1.att.key.weight"].T.contiguous().T
    )  # a view
    weights["head.weight"] = weights["emb.weight"]  # one memory, two names
    torch.save(weights, tmp_path / "a.pth")
    run("convert", f"--model={tmp_path}/a.pth", f"--out={tmp_path}/b.safetensors")
    run("convert", f"--model={tmp_path}/b.safetensors", f"--out={tmp_path}/c.pth")
    back = torch.load(tmp_path / "c.pth")
    assert back.keys() == weights.keys()
    same({name: back[name] for name in weights}, weights)
    run("convert", f"--model={tmp_path}/a.pth", f"--out={tmp_path}/d.pth", "--dtype=float32")
    wide = torch.load(tmp_path / "d.pth")
    assert all(
        w.dtype == torch.float32 and torch.equal(w, weights[name].float())
        for name, w in wide.items()
    )


def test_convert_carries_a_loras_scale_and_warns_where_it_cannot(tmp_path, capsys):
    lora(saved("x070", tmp_path / "b.pth"), tmp_path / "l.safetensors", r=4, alpha=6.0)
    run(
        "convert",
        f"--model={tmp_path}/l.safetensors",
        f"--out={tmp_path}/l16.safetensors",
        "--dtype=bfloat16",
    )
    with safe_open(tmp_path / "l16.safetensors", "pt") as f:
        assert f.metadata()["alpha"] == "6.0" and f.metadata()["rslora"] == "False"
    capsys.readouterr()
    run("convert", f"--model={tmp_path}/l.safetensors", f"--out={tmp_path}/l.pth")
    assert "a .pth cannot carry this LoRA's alpha=6.0" in capsys.readouterr().err


@pytest.mark.parametrize(
    "value, dtype, words",
    [
        (7e4, "float16", r"blocks\.1\.att\.w0 would be NaN or infinite as torch\.float16"),
        (float("nan"), "bfloat16", r"a\.pth: blocks\.1\.att\.w0 has 1 values that are NaN"),
    ],
)
def test_convert_to_a_dtype_refuses_what_is_not_finite_there(value, dtype, words, tmp_path):
    weights = saved("x070", tmp_path / "a.pth").state_dict()
    weights["blocks.1.att.w0"][0, 0, 5] = value
    torch.save(weights, tmp_path / "a.pth")
    with pytest.raises(UserError, match=words):
        run("convert", f"--model={tmp_path}/a.pth", f"--out={tmp_path}/b.pth", f"--dtype={dtype}")
    run(
        "convert", f"--model={tmp_path}/a.pth", f"--out={tmp_path}/b.pth"
    )  # bit for bit is anything


# ----------------------------------------------------------------------------------------------
# hub

# flash-linear-attention's RWKV7ForCausalLM with hidden 128, 3 layers, 2 heads, 320 ids, FFN 512,
# ranks w 24, a 40, v 8, g 56; read off its modules (fla/layers/rwkv7.py,
# fla/models/rwkv7/modeling_rwkv7.py), not off export.py
LAYER = {
    "attn_norm.weight": [128],
    "attn_norm.bias": [128],
    "ffn_norm.weight": [128],
    "ffn_norm.bias": [128],
    "attn.x_r": [1, 1, 128],
    "attn.x_w": [1, 1, 128],
    "attn.x_k": [1, 1, 128],
    "attn.x_v": [1, 1, 128],
    "attn.x_a": [1, 1, 128],
    "attn.x_g": [1, 1, 128],
    "attn.k_k": [128],
    "attn.k_a": [128],
    "attn.r_k": [2, 64],
    "attn.r_proj.weight": [128, 128],
    "attn.k_proj.weight": [128, 128],
    "attn.v_proj.weight": [128, 128],
    "attn.o_proj.weight": [128, 128],
    "attn.g_norm.weight": [128],
    "attn.g_norm.bias": [128],
    "attn.w_lora.lora.0.weight": [24, 128],
    "attn.w_lora.lora.2.weight": [128, 24],
    "attn.w_lora.lora.2.bias": [128],
    "attn.a_lora.lora.0.weight": [40, 128],
    "attn.a_lora.lora.2.weight": [128, 40],
    "attn.a_lora.lora.2.bias": [128],
    "attn.g_lora.lora.0.weight": [56, 128],
    "attn.g_lora.lora.2.weight": [128, 56],
    "ffn.x_k": [128],
    "ffn.key.weight": [512, 128],
    "ffn.value.weight": [128, 512],
}
VALUE = {
    "attn.v_lora.lora.0.weight": [8, 128],
    "attn.v_lora.lora.2.weight": [128, 8],
    "attn.v_lora.lora.2.bias": [128],
}
FLA = {
    "model.embeddings.weight": [320, 128],
    "lm_head.weight": [320, 128],
    "model.norm.weight": [128],
    "model.norm.bias": [128],
    "model.layers.0.pre_norm.weight": [128],
    "model.layers.0.pre_norm.bias": [128],
    **{
        f"model.layers.{i}.{name}": shape
        for i in range(3)
        for name, shape in (LAYER | (VALUE if i else {})).items()
    },
}


def test_hub_folder_has_flas_names_and_config(tmp_path):
    model = saved("x070", tmp_path / "a.pth")
    run("hub", f"--model={tmp_path}/a.pth", f"--out={tmp_path}/hub", "--tokenizer=bytes")
    assert sorted(p.name for p in (tmp_path / "hub").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "modeling_rwkv7.py",
        "rwkv_vocab_v20230424.txt",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.txt",
    ]
    theirs = load_file(tmp_path / "hub" / "model.safetensors")
    assert {name: list(w.shape) for name, w in theirs.items()} == FLA
    with safe_open(tmp_path / "hub" / "model.safetensors", "pt") as f:
        assert f.metadata()["format"] == "pt"
    ours = model.state_dict()
    assert torch.equal(
        theirs["model.layers.2.attn.w_lora.lora.0.weight"], ours["blocks.2.att.w1"].T
    )
    assert torch.equal(
        theirs["model.layers.2.attn.a_lora.lora.2.bias"], ours["blocks.2.att.a0"].flatten()
    )
    assert torch.equal(theirs["model.layers.1.attn.k_proj.weight"], ours["blocks.1.att.key.weight"])
    assert torch.equal(theirs["model.layers.1.ffn.key.weight"], ours["blocks.1.ffn.key.weight"])
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    facts = dict(
        model_type="rwkv7",
        architectures=["RWKV7ForCausalLM"],
        hidden_size=128,
        num_hidden_layers=3,
        head_dim=64,
        num_heads=2,
        intermediate_size=512,
        hidden_ratio=4,
        vocab_size=320,
        value_dim=[128] * 3,
        decay_low_rank_dim=24,
        a_low_rank_dim=40,
        v_low_rank_dim=8,
        gate_low_rank_dim=56,
        hidden_act="sqrelu",
        norm_eps=1e-5,
        norm_first=True,
        norm_bias=True,
        attn=None,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
        torch_dtype="float32",
        auto_map={
            "AutoConfig": "modeling_rwkv7.RWKV7Config",
            "AutoModelForCausalLM": "modeling_rwkv7.RWKV7ForCausalLM",
        },
    )
    assert {key: config.get(key) for key in facts} == facts and "pad_token_id" not in config
    assert (
        json.loads((tmp_path / "hub" / "generation_config.json").read_text())["eos_token_id"] == 0
    )


@pytest.fixture
def fla(monkeypatch):
    """flash-linear-attention and transformers, where they are installed. Its kernels want a GPU;
    what the library itself says they compute stands in for them, and wkv_cuda for the recurrence.
    """
    pytest.importorskip("fla.models")
    pytest.importorskip("transformers")
    from fla.layers import rwkv7 as layer
    from fla.models.rwkv7 import modeling_rwkv7 as network
    from fla.modules.token_shift import token_shift_ref
    from fla.ops.rwkv7.fused_addcmul import torch_addcmul_rwkv7
    from fla.ops.rwkv7.fused_k_update import k_update_ref
    from fla.ops.rwkv7.gate_output_correction import gate_output_correction_ref

    for module in (layer, network):
        monkeypatch.setattr(
            module,
            "token_shift",
            lambda x, cu_seqlens, **kw: (token_shift_ref(x, cu_seqlens), None),
        )
    for name, plain in (
        ("fused_addcmul_rwkv7", torch_addcmul_rwkv7),
        ("fused_k_rwkv7", k_update_ref),
        ("gate_output_correction", gate_output_correction_ref),
        ("chunk_rwkv7", lambda r, w, k, v, a, b, **kw: wkv7(r, w, k, v, a, b, backend="naive")),
    ):
        monkeypatch.setattr(layer, name, plain)


@pytest.mark.parametrize(
    "sizes", [{}, dict(n_embd=192, dim_ffn=608, n_layer=2)]
)  # an FFN that is no multiple of C
def test_fla_reads_the_folder_and_computes_the_same(sizes, fla, tmp_path):
    from fla.models import RWKV7Config
    from transformers import AutoConfig, AutoModelForCausalLM

    model = saved("x070", tmp_path / "a.pth", **sizes)
    run("hub", f"--model={tmp_path}/a.pth", f"--out={tmp_path}/hub", "--tokenizer=bytes")
    c, theirs = model.config, RWKV7Config.from_pretrained(tmp_path / "hub")
    assert type(AutoConfig.from_pretrained(tmp_path / "hub")) is RWKV7Config
    assert (
        theirs.hidden_size,
        theirs.num_hidden_layers,
        theirs.vocab_size,
        theirs.intermediate_size,
    ) == (c.n_embd, c.n_layer, c.vocab_size, c.dim_ffn)
    assert (theirs.head_dim, theirs.num_heads, theirs.value_dim) == (
        64,
        c.n_embd // 64,
        [c.n_embd] * c.n_layer,
    )
    assert (
        theirs.decay_low_rank_dim,
        theirs.a_low_rank_dim,
        theirs.v_low_rank_dim,
        theirs.gate_low_rank_dim,
    ) == (c.decay_rank, c.iclr_rank, c.value_rank, c.gate_rank)
    assert (
        theirs.hidden_act,
        theirs.norm_eps,
        theirs.norm_bias,
        theirs.norm_first,
        theirs.tie_word_embeddings,
    ) == ("sqrelu", 1e-5, True, True, False)
    assert str(theirs.dtype) == "torch.float32" and (
        theirs.bos_token_id,
        theirs.eos_token_id,
        theirs.pad_token_id,
    ) == (0, 0, None)
    # what the file has and this class does not know would be silently without effect
    known = RWKV7Config().to_dict().keys() | {"dtype", "torch_dtype", "architectures", "auto_map"}
    assert json.loads((tmp_path / "hub" / "config.json").read_text()).keys() <= known
    network, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "hub", output_loading_info=True, fuse_norm=False
    )
    assert not any(info.values()), info
    if not sizes:
        assert {name: list(w.shape) for name, w in network.state_dict().items()} == FLA
    got, want = (
        network.eval()(IDX, use_cache=False).logits.detach(),
        logits(model),
    )  # with gradients: so it takes chunk_rwkv7
    assert (got - want).abs().max() < 1e-4 * want.std()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hub_there_and_back_is_bit_exact(dtype, tmp_path):
    model = random_model("x070", **RANKS["x070"])
    model.save_pretrained(tmp_path / "a.pth", dtype=dtype)
    run("hub", f"--model={tmp_path}/a.pth", f"--out={tmp_path}/hub", "--tokenizer=bytes")
    assert (
        json.loads((tmp_path / "hub" / "config.json").read_text())["torch_dtype"] == str(dtype)[6:]
    )
    run("hub", f"--model={tmp_path}/hub", f"--out={tmp_path}/b.pth")
    run("hub", f"--model={tmp_path}/hub", f"--out={tmp_path}/b.safetensors")
    a, b = torch.load(tmp_path / "a.pth"), torch.load(tmp_path / "b.pth")
    same(a, b, [name for name in a if name not in V012])
    for name, w in b.items():  # what RWKV-LM's trainer loads with strict=True
        assert w.shape == a[name].shape and w.dtype == a[name].dtype
        assert w.any() == (name not in V012)
    run("convert", f"--model={tmp_path}/hub", f"--out={tmp_path}/c.pth")
    same(b, torch.load(tmp_path / "c.pth"))
    safe = load_file(tmp_path / "b.safetensors")
    same(b, {name: safe[name] for name in b})
    one, other = (RWKV.from_pretrained(tmp_path / name) for name in ("a.pth", "b.pth"))
    assert torch.equal(logits(one), logits(other))


def test_hub_of_official_forms_and_odd_sizes(tmp_path):
    """Squeezed vectors, no v0/v1/v2 in layer 0, one head of 64, an FFN that is not 4 C."""
    model = random_model("x070", n_embd=64, dim_ffn=160, value_rank=1)
    weights = {
        n: w.squeeze() if w.dim() == 3 else w
        for n, w in model.state_dict().items()
        if n not in V012
    }
    torch.save(weights, tmp_path / "a.pth")
    run("hub", f"--model={tmp_path}/a.pth", f"--out={tmp_path}/hub", "--tokenizer=bytes")
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert (config["hidden_ratio"], config["intermediate_size"], config["num_heads"]) == (
        2.5,
        160,
        1,
    )
    run("hub", f"--model={tmp_path}/hub", f"--out={tmp_path}/b.pth")
    same(
        {n: w for n, w in model.state_dict().items() if n not in V012},
        {n: w for n, w in torch.load(tmp_path / "b.pth").items() if n not in V012},
    )


def test_hub_refusals(tmp_path):
    saved("x070", tmp_path / "seven.pth")
    saved("x070", tmp_path / "small.pth", head_size=32)
    weights = torch.load(tmp_path / "seven.pth")
    torch.save({**weights, "score.weight": torch.zeros(1, 128)}, tmp_path / "reward.pth")

    def refused(message, *argv):
        with pytest.raises(UserError, match=message) as e:
            run("hub", *argv, "--tokenizer=bytes")
        assert "\n" not in str(e.value)

    hub = f"--out={tmp_path}/hub"
    refused(r"small\.pth is RWKV-7 with heads of 32", f"--model={tmp_path}/small.pth", hub)
    refused(r"is a reward model; a hub folder has no", f"--model={tmp_path}/reward.pth", hub)
    lora(RWKV.from_pretrained(tmp_path / "seven.pth"), tmp_path / "l.safetensors", r=4, alpha=6.0)
    refused(r"is a LoRA; merge first: .* --adapter=", f"--model={tmp_path}/l.safetensors", hub)
    state = {f"blocks.{i}.att.time_state": torch.randn(2, 64, 64) for i in range(3)}
    torch.save(state, tmp_path / "state.pth")
    refused(r"state\.pth is a tuned state, for which a hub", f"--model={tmp_path}/state.pth", hub)
    torch.save({**weights, **state}, tmp_path / "both.pth")
    refused(r"both\.pth has a tuned state inside, for", f"--model={tmp_path}/both.pth", hub)
    refused(r"expected a folder", f"--model={tmp_path}/seven.pth", f"--out={tmp_path}/x.pth")
    with pytest.raises(UserError, match=r"the tokenizer has 401 ids, \S+seven\.pth only 320"):
        run("hub", f"--model={tmp_path}/seven.pth", hub, "--tokenizer=integers:399")
    assert not (tmp_path / "hub").exists()
    run("hub", f"--model={tmp_path}/seven.pth", hub, "--tokenizer=bytes")
    refused(r"hub is already there", f"--model={tmp_path}/seven.pth", hub)
    refused(r"expected a name in \.pth", f"--model={tmp_path}/hub", f"--out={tmp_path}/hub2")
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    for key, value in (("model_type", "llama"), ("norm_eps", 1e-6), ("tie_word_embeddings", True)):
        (tmp_path / "hub" / "config.json").write_text(json.dumps({**config, key: value}))
        refused(
            rf"config\.json: {key} is {value!r}, expected",
            f"--model={tmp_path}/hub",
            f"--out={tmp_path}/x.pth",
        )
    (tmp_path / "hub" / "config.json").write_text(json.dumps(config))
    theirs = load_file(tmp_path / "hub" / "model.safetensors")
    del theirs["model.layers.1.attn.a_lora.lora.0.weight"]
    save_file(theirs, tmp_path / "hub" / "model.safetensors")
    refused(r"blocks\.1\.att\.a1 is missing", f"--model={tmp_path}/hub", f"--out={tmp_path}/x.pth")


MIXED = (
    "Hello, world!  Two spaces,\n\n\ttabs - 今天是美好的一天。 наука 🎉 <|endoftext|> 3.14159 "
    "----------------\n"
    "fn(x) {\n    y = x;\n}"
)


def test_the_hub_folders_tokenizer_gives_the_same_ids(tmp_path):
    """A tokenizer.json goes along as it is, any other as a vocab file, which is what is read
    again; each time the folder is over an older export."""
    (tmp_path / "vocab.txt").write_text(
        "1 'a' 1\n2 'ab' 2\n3 'b' 1\n4 'bc' 2\n5 'c' 1\n6 ' ' 1\n7 'ca ' 3\n"
    )
    train_bpe([MIXED] * 3, 300).save(tmp_path)
    saved("x070", tmp_path / "small.pth")
    saved("x070", tmp_path / "large.pth", vocab_size=65536, n_embd=64, n_layer=1)
    for model, name, text, file in (
        ("large", "", MIXED, "vocab.txt"),
        ("small", "bytes", MIXED, "vocab.txt"),
        ("small", tmp_path / "tokenizer.json", MIXED, "tokenizer.json"),
        ("small", tmp_path / "vocab.txt", "abca bcab cab ca c", "vocab.txt"),
        ("small", "integers:300", "3 300 0", "vocab.txt"),
    ):
        run(
            "hub",
            f"--model={tmp_path}/{model}.pth",
            f"--out={tmp_path}/hub",
            f"--tokenizer={name}",
            "--overwrite",
        )
        tokenizer, theirs = (
            prepare.load_tokenizer(name or "world"),
            prepare.load_tokenizer(tmp_path / "hub"),
        )
        assert theirs.encode(text) == tokenizer.encode(text) and theirs.end_id == tokenizer.end_id
        assert (
            theirs.decode(theirs.encode(text)) == text and theirs.vocab_size == tokenizer.vocab_size
        )
        assert theirs.digest == tokenizer.digest
        present = {p.name for p in (tmp_path / "hub").iterdir()}
        made = {"tokenizer.json", "vocab.txt", "rwkv_vocab_v20230424.txt"} & present
        if file == "tokenizer.json":
            assert made == {"tokenizer.json"}
        elif "integers" in str(name):  # words: no engine with that file cuts at white space
            assert made == {"tokenizer.json", "vocab.txt"}
        else:
            assert made == {"tokenizer.json", "vocab.txt", "rwkv_vocab_v20230424.txt"}
        if name and "integers" not in str(name) and name != "bytes":
            assert (tmp_path / "hub" / file).read_bytes() == (tmp_path / file).read_bytes()
        says = json.loads((tmp_path / "hub" / "tokenizer_config.json").read_text())
        assert says["eos_token"] == "<|endoftext|>" and says["chat_template"] == CHAT_TEMPLATE


def test_chat_template_writes_what_render_chat_writes():
    jinja2 = pytest.importorskip("jinja2")
    tokenizer, chat = (
        prepare.load_tokenizer("bytes"),
        [
            {"role": "system", "content": "Be kind.\n\n\nAlways. "},
            {"role": "user", "content": " Hi\nthere"},
            {"role": "assistant", "content": "Hello!\n\nYes?\n"},
            {"role": "user", "content": ""},
            {"role": "assistant", "content": "Well."},
            {"role": "user", "content": "  two\r\n\r\n  lines\r\n"},
            {"role": "assistant", "content": "\n    if a:\r\n\r\n        b()\n"},  # code
            {"role": "user", "content": "more"},
            {"role": "assistant", "content": "\tfor\n\n\t\tx"},
            {"role": "user", "content": "more"},
            {"role": "assistant", "content": "  one line"},
            {"role": "user", "content": "more"},
            {"role": "assistant", "content": "   \n  a\n  b"},
        ],
    )
    for options in ({}, dict(trim_blocks=True, lstrip_blocks=True)):  # transformers uses the latter
        template = jinja2.Environment(**options).from_string(CHAT_TEMPLATE)
        for n in range(1, len(chat) + 1):
            for kw, more in (
                ({}, {}),
                (dict(generation_prompt=True), {}),
                (dict(generation_prompt=True, think="on"), {"enable_thinking": True}),
                (dict(generation_prompt=True, think="off"), {"enable_thinking": False}),
            ):
                ids = prepare.render_chat(chat[:n], tokenizer, **kw)[0]
                want = bytes(i - 1 for i in ids if i).decode() + "<|endoftext|>" * (ids[-1] == 0)
                assert (
                    template.render(
                        messages=chat[:n],
                        eos_token="<|endoftext|>",
                        add_generation_prompt=bool(kw),
                        **more,
                    )
                    == want
                )


# ----------------------------------------------------------------------------------------------
# inspect, and the command line


def test_inspect(tmp_path, capsys):
    def inspect(weights):
        torch.save(weights, tmp_path / "x.pth")
        run("inspect", tmp_path / "x.pth")
        return capsys.readouterr().out

    seven = random_model("x070", **RANKS["x070"]).state_dict()
    out = inspect(seven)
    assert (
        "RWKV-7: version x070, n_layer 3, n_embd 128, vocab_size 320, head_size 64, dim_ffn 512, "
        in out
    )
    assert "decay_rank 24, iclr_rank 40, value_rank 8, gate_rank 56" in out
    assert f"{sum(w.numel() for w in seven.values()):,} parameters, float32, 3." in out
    assert out.endswith("odd: nothing\n")
    six = inspect(random_model("x060", **RANKS["x060"]).state_dict())
    assert (
        "RWKV-6: version x060" in six
        and "dim_ffn 448, decay_rank 48, mix_rank 16" in six
        and "odd: nothing" in six
    )
    odd = dict(seven)
    for name in V012:
        del odd[name]
    odd["blocks.1.att.x_r"] = odd[
        "blocks.1.att.x_r"
    ].squeeze()  # it and what is absent above: as good
    odd["blocks.1.att.w0"] = odd["blocks.1.att.w0"].bfloat16()
    odd["blocks.2.ffn.key.weight"] = odd["blocks.2.ffn.key.weight"].index_fill(
        0, torch.tensor([3]), float("nan")
    )
    odd["blocks.2.att.k_a"] = torch.zeros(1, 1, 64)
    odd["score.weight"] = torch.zeros(1, 128)
    odd["extra"] = torch.zeros(2)
    del odd["ln_out.bias"]
    out = inspect(odd)
    for line in (
        r"parameters, bfloat16, float32, ",
        r"odd: blocks\.2\.ffn\.key\.weight has 128 values that are NaN or infinite",
        r"odd: blocks\.2\.att\.k_a is \[1, 1, 64\], expected \[1, 1, 128\]",
        r", a reward model \(score\.weight\)",
        r"odd: extra \[2\] is extra",
        r"odd: ln_out\.bias is missing",
    ):
        assert re.search(line, out), (line, out)
    assert out.count("odd: ") == 4


def test_inspect_other_files(tmp_path, capsys):
    base = saved("x070", tmp_path / "b.pth")
    lora(base, tmp_path / "l.safetensors", r=4, alpha=6.0, targets=("att.key",), extra=("ln_out",))
    torch.save(load_file(tmp_path / "l.safetensors"), tmp_path / "l.pth")
    torch.save(
        {f"blocks.{i}.att.time_state": torch.randn(2, 64, 64) for i in range(3)}, tmp_path / "s.pth"
    )
    torch.save(dict(model=base.state_dict(), optimizer={}, step=12, best=1.0), tmp_path / "last.pt")
    run("hub", f"--model={tmp_path}/b.pth", f"--out={tmp_path}/hub", "--tokenizer=bytes")
    for file, lines in (
        ("l.safetensors", ["a LoRA of rank 4, alpha 6.0, rslora False, 3 matrices, 2 ex"]),
        ("l.pth", ["a LoRA of rank 4, alpha ?"]),
        ("s.pth", ["a tuned state of 3 layers, each [2, 64, 64]", "odd: nothing"]),
        ("hub", ["RWKV-7: version x070, n_layer 3", "odd: nothing"]),
    ):
        capsys.readouterr()
        run("inspect", tmp_path / file)
        out = capsys.readouterr().out
        assert all(line in out for line in lines), out
    with pytest.raises(UserError, match=r"last\.pt is not a file of weights"):
        run("inspect", tmp_path / "last.pt")


def test_nothing_is_overwritten_and_out_must_say_its_format(tmp_path):
    saved("x070", tmp_path / "a.pth")
    before = (tmp_path / "a.pth").read_bytes()
    a = f"--model={tmp_path}/a.pth"
    for argv, message in (
        ((a, f"--out={tmp_path}/a.pth"), r"a\.pth is already there; choose another --out"),
        ((a, f"--out={tmp_path}/b.bin"), r"b\.bin: expected a name in \.pth or \.saf"),
        ((f"--model={tmp_path}/no.pth", f"--out={tmp_path}/b.pth"), r"no\.pth does not exist"),
        ((f"--model={tmp_path}/no.safetensors", f"--out={tmp_path}/b.pth"), "cannot be read"),
    ):
        with pytest.raises(UserError, match=message):
            run("convert", *argv)
    assert (tmp_path / "a.pth").read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [
        "a.pth"
    ]
    run("convert", a, f"--out={tmp_path}/a.pth", "--overwrite", "--dtype=bfloat16")
    assert torch.load(tmp_path / "a.pth")["emb.weight"].dtype == torch.bfloat16


def test_help_and_unknown_command(capsys):
    run("--help")
    assert "export.py merge --model=base.pth" in capsys.readouterr().out
    for command, flag in (
        ("merge", "--adapter"),
        ("convert", "--dtype"),
        ("hub", "--token"),
        ("gguf", "--adapter"),
        ("inspect", "a LoRA"),
    ):
        with pytest.raises(SystemExit) as e:
            run(command, "--help")
        assert e.value.code == 0 and flag in capsys.readouterr().out
    with pytest.raises(
        SystemExit,
        match="error: unpack is not a command of export.py; expected one of merge, convert",
    ):
        run("unpack")
