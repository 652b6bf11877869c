"""export.py gguf: names, shapes and numbers against a table read off llama.cpp, where the package
gguf is installed; logits, greedy text, ids and the chat against llama.cpp itself, where
llama-cpp-python is."""

import ctypes
import sys
import textwrap

import export
import prepare
from gosling.config import UserError
from gosling.engine import generate
from gosling.gguf import gguf_name, unlike_gpt2
from gosling.hub_folder import CHAT_TEMPLATE
from gosling.tokenizer import train_bpe
from gosling.tune import write_tuned
from gosling.weights import write_state
from model import RWKV

import pytest
import torch
from helpers import CHAT, RANKS, ROOT, TEXT, blocks_of, random_model

# What llama.cpp creates for a layer of width 128 with 2 heads (src/models/rwkv7.cpp, rwkv6.cpp), of
# RANKS, as numpy has it: the last axis first there. "f": float32 in every file.
NORMS = {
    f"{norm}.{leaf}": ([128], "f")
    for norm in ("attn_norm", "attn_norm_2", "time_mix_ln")
    for leaf in ("weight", "bias")
}
MATRICES = {f"time_mix_{x}.weight": ([128, 128], "") for x in ("receptance", "key", "value")}
MATRICES["time_mix_output.weight"] = ([128, 128], "")
LAYER = {
    "x070": {
        **NORMS,
        **MATRICES,
        "time_mix_w0.weight": ([128], "f"),
        "time_mix_w1.weight": ([24, 128], "f"),
        "time_mix_w2.weight": ([128, 24], "f"),
        "time_mix_a0.weight": ([128], "f"),
        "time_mix_a1.weight": ([40, 128], ""),
        "time_mix_a2.weight": ([128, 40], ""),
        "time_mix_v0.weight": ([128], "f"),
        "time_mix_v1.weight": ([8, 128], ""),
        "time_mix_v2.weight": ([128, 8], ""),
        "time_mix_g1.weight": ([56, 128], ""),
        "time_mix_g2.weight": ([128, 56], ""),
        "time_mix_k_k.weight": ([128], "f"),
        "time_mix_k_a.weight": ([128], "f"),
        "time_mix_r_k.weight": ([128], "f"),
        "time_mix_lerp_fused.weight": ([6, 1, 1, 128], "f"),
        "channel_mix_lerp_k.weight": ([128], "f"),
        "channel_mix_key.weight": ([512, 128], ""),
        "channel_mix_value.weight": ([128, 512], ""),
    },
    "x060": {
        **NORMS,
        **MATRICES,
        "time_mix_gate.weight": ([128, 128], ""),
        "time_mix_lerp_x.weight": ([128], "f"),
        "time_mix_lerp_fused.weight": ([5, 1, 1, 128], "f"),
        "time_mix_w1.weight": ([80, 128], "f"),
        "time_mix_w2.weight": ([5, 128, 16], "f"),
        "time_mix_first.weight": ([2, 64], "f"),
        "time_mix_decay.weight": ([128], "f"),
        "time_mix_decay_w1.weight": ([48, 128], "f"),
        "time_mix_decay_w2.weight": ([128, 48], "f"),
        "channel_mix_lerp_k.weight": ([128], "f"),
        "channel_mix_lerp_r.weight": ([128], "f"),
        "channel_mix_key.weight": ([448, 128], ""),
        "channel_mix_value.weight": ([128, 448], ""),
        "channel_mix_receptance.weight": ([128, 128], ""),
    },
}
TOP = {
    "token_embd.weight": ([320, 128], ""),
    "output.weight": ([320, 128], ""),
    **{
        f"{norm}.{leaf}": ([128], "f")
        for norm in ("token_embd_norm", "output_norm")
        for leaf in ("weight", "bias")
    },
}


def expected_tensors(version):
    found = dict(TOP)
    for i in range(3):
        found |= {f"blk.{i}.{name}": what for name, what in LAYER[version].items()}
    if version == "x070":  # layer 0's are there, of the sizes of a0, a1, a2, and never used
        for n in "012":
            found[f"blk.0.time_mix_v{n}.weight"] = found[f"blk.0.time_mix_a{n}.weight"]
    return found


def run(*argv):
    export.main(["gguf", *(str(word) for word in argv)])


def exported(tmp_path, version, tokenizer, dtype="float32", **sizes):
    """-> (our model, what load_tokenizer takes, the GGUF file)"""
    pytest.importorskip("gguf")
    model = random_model(version, **{**RANKS[version], **sizes}).eval()
    model.save_pretrained(tmp_path / "a.pth")
    if tokenizer == "bpe":
        train_bpe([TEXT] * 3, 300).save(tmp_path)
        tokenizer = tmp_path / "tokenizer.json"
    elif tokenizer == "vocab":
        tokenizer = tmp_path / "vocab.txt"
        tokens = [bytes([i]) for i in range(256)] + [b"Hello", b"He", "今天".encode(), b"\n\n"]
        lines = [f"{i} {token!r} {len(token)}\n" for i, token in enumerate(tokens, 1) if i != 9]
        tokenizer.write_text("".join(lines))
    out = tmp_path / "a.gguf"
    run(
        f"--model={tmp_path}/a.pth",
        f"--out={out}",
        f"--tokenizer={tokenizer}",
        f"--dtype={dtype}",
        "--overwrite",
    )
    return model, tokenizer, out


def read(file):
    reader = pytest.importorskip("gguf").GGUFReader(file)
    values = {name: field.contents() for name, field in reader.fields.items()}
    return values, {tensor.name: tensor for tensor in reader.tensors}


# ----------------------------------------------------------------------------------------------
# the file


@pytest.mark.parametrize("version", ["x060", "x070"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_tensors(version, dtype, tmp_path):
    gguf = pytest.importorskip("gguf")
    model, _, file = exported(tmp_path, version, "bytes", dtype)
    _, tensors = read(file)
    types = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
    found, numbers = {}, {}
    for name, tensor in tensors.items():
        kept = "f" if tensor.tensor_type.name == "F32" else ""
        found[name] = ([int(n) for n in tensor.shape[::-1]], kept)
        assert tensor.tensor_type.name in ("F32", types[dtype])
        numbers[name] = torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    want = expected_tensors(version)
    if dtype == "float32":
        want = {name: (shape, "f") for name, (shape, _) in want.items()}
    assert found == want
    w = model.state_dict()
    to = getattr(torch, dtype)
    key, low = "blocks.1.att.key.weight", "time_maa_w1" if version == "x060" else "a1"
    assert torch.equal(numbers["blk.1.time_mix_key.weight"], w[key].to(to).float())
    assert torch.equal(numbers["token_embd.weight"], w["emb.weight"].to(to).float())
    name = "blk.2.time_mix_w1.weight" if version == "x060" else "blk.2.time_mix_a1.weight"
    kept = torch.float32 if version == "x060" else to
    assert torch.equal(numbers[name], w[f"blocks.2.att.{low}"].T.to(kept).float())
    fused = numbers["blk.2.time_mix_lerp_fused.weight"].reshape(-1, 128)
    order = "wkvrg" if version == "x060" else "rwkvag"
    prefix = "blocks.2.att.time_maa_" if version == "x060" else "blocks.2.att.x_"
    for row, x in zip(fused, order, strict=True):
        assert torch.equal(row, w[prefix + x].flatten())


@pytest.mark.parametrize("version", ["x060", "x070"])
def test_what_the_file_says(version, tmp_path):
    _, _, file = exported(tmp_path, version, "vocab")
    says, _ = read(file)
    arch = "rwkv7" if version == "x070" else "rwkv6"
    facts = {
        "general.architecture": arch,
        "general.file_type": 0,
        f"{arch}.block_count": 3,
        f"{arch}.embedding_length": 128,
        f"{arch}.feed_forward_length": 512 if version == "x070" else 448,
        f"{arch}.wkv.head_size": 64,
        f"{arch}.attention.head_count": 0,
        "tokenizer.ggml.model": "rwkv",
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.eot_token_id": 260,  # "\n\n"
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }
    if version == "x070":
        facts |= {
            f"{arch}.attention.decay_lora_rank": 24,
            f"{arch}.attention.iclr_lora_rank": 40,
            f"{arch}.attention.value_residual_mix_lora_rank": 8,
            f"{arch}.attention.gate_lora_rank": 56,
        }
    else:
        facts |= {f"{arch}.time_mix_extra_dim": 16, f"{arch}.time_decay_extra_dim": 48}
        facts[f"{arch}.rescale_every_n_layers"] = 0
    assert {key: says.get(key) for key in facts} == facts
    assert says[f"{arch}.attention.layer_norm_epsilon"] == pytest.approx(1e-5)
    tokens, types = says["tokenizer.ggml.tokens"], says["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == 320
    assert tokens[0] == "<|endoftext|>" and types[0] == 3  # control
    assert tokens[9] == "[PAD9]" and types[9] == 5 and tokens[261] == "[PAD261]"  # unused
    assert tokens[11] == r"\n" and tokens[40] == "'" and tokens[93] == r"\\"
    assert tokens[201] == r"\xc8" and types[201] == 1 and tokens[259] == r"\xe4\xbb\x8a\xe5\xa4\xa9"


def test_a_bpe(tmp_path):
    _, file_of_tokenizer, file = exported(tmp_path, "x070", "bpe")
    says, _ = read(file)
    ours = prepare.load_tokenizer(file_of_tokenizer)
    assert (says["tokenizer.ggml.model"], says["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    tokens, types = says["tokenizer.ggml.tokens"], says["tokenizer.ggml.token_type"]
    assert tokens[: ours.vocab_size] == [ours.hub.id_to_token(i) for i in range(ours.vocab_size)]
    assert types[ours.end_id] == 3 and types[ours.vocab_size - 1] == 1 and types[-1] == 5
    for merge in says["tokenizer.ggml.merges"]:
        assert merge.replace(" ", "") in tokens and merge.count(" ") == 1


def test_official_forms(tmp_path):
    """Squeezed vectors, no v0/v1/v2 in layer 0, and one head: the same file."""
    _, _, file = exported(tmp_path, "x070", "bytes", n_embd=64, n_layer=2, value_rank=1)
    before = file.read_bytes()
    weights = torch.load(tmp_path / "a.pth")
    for n in "012":
        del weights[f"blocks.0.att.v{n}"]
    weights = {name: w.squeeze() if w.dim() == 3 else w for name, w in weights.items()}
    torch.save(weights, tmp_path / "b.pth")
    run(f"--model={tmp_path}/b.pth", f"--out={tmp_path}/b.gguf", "--tokenizer=bytes")
    assert (tmp_path / "b.gguf").read_bytes() == before


def test_a_lora_is_merged_as_merge_does(tmp_path):
    base, _, plain = exported(tmp_path, "x070", "bytes")
    base.set_tune("lora", r=4, alpha=6.0)
    with torch.no_grad():
        for p in base.parameters():
            if p.requires_grad:
                p += 0.05 * torch.randn_like(p)
    lora = write_tuned(base, tmp_path, "lora")
    model = f"--model={tmp_path}/a.pth"
    run(model, f"--adapter={lora}", f"--out={tmp_path}/l.gguf", "--tokenizer=bytes")
    export.main(["merge", model, f"--adapter={lora}", f"--out={tmp_path}/m.pth"])
    run(f"--model={tmp_path}/m.pth", f"--out={tmp_path}/m.gguf", "--tokenizer=bytes")
    merged = (tmp_path / "m.gguf").read_bytes()
    assert (tmp_path / "l.gguf").read_bytes() == merged != plain.read_bytes()
    with pytest.raises(UserError, match=r"is a LoRA; merge first: .* --adapter="):
        run(f"--model={lora}", f"--out={tmp_path}/x.gguf", "--tokenizer=bytes")


def test_refusals(tmp_path):
    pytest.importorskip("gguf")
    model = random_model("x070", **RANKS["x070"])
    model.save_pretrained(tmp_path / "a.pth")
    weights = torch.load(tmp_path / "a.pth")
    state = {f"blocks.{i}.att.time_state": torch.zeros(2, 64, 64) for i in range(3)}
    torch.save(state, tmp_path / "state.pth")
    torch.save({**weights, **state}, tmp_path / "both.pth")
    torch.save({**weights, "score.weight": torch.zeros(1, 128)}, tmp_path / "reward.pth")
    torch.save({**weights, "head.weight": weights["head.weight"] + 7e4}, tmp_path / "large.pth")
    torch.save({**weights, "extra": torch.zeros(1)}, tmp_path / "extra.pth")
    (tmp_path / "v.txt").write_text("1 'ab' 2\n2 'b' 1\n")

    def refused(message, model="a.pth", out="x.gguf", **flags):
        flags = {"tokenizer": "bytes", **flags}
        words = [f"--{key}={value}" for key, value in flags.items()]
        with pytest.raises(UserError, match=message) as e:
            run(f"--model={tmp_path}/{model}", f"--out={tmp_path}/{out}", *words)
        assert "\n" not in str(e.value) and not (tmp_path / out).exists()

    refused(r"state\.pth is a tuned state, for which a GGUF file has no place", "state.pth")
    refused(r"both\.pth has a tuned state inside, for which a GGUF", "both.pth")
    refused(r"reward\.pth is a reward model; a GGUF file", "reward.pth")
    random_model("x070", head_size=32).save_pretrained(tmp_path / "small.pth")
    refused(r"small\.pth is RWKV-7 with heads of 32; .* 64 alone", "small.pth")
    refused(r"extra \[1\] is extra; expected a whole RWKV", "extra.pth")
    refused(r"output\.weight would be NaN or infinite as float16", "large.pth", dtype="float16")
    refused(r"x\.pth: expected a name in \.gguf", out="x.pth")
    refused(r"cuts at white space, and llama\.cpp has none", tokenizer="integers:9")
    refused(r"token b'ab', but none for its first byte", tokenizer=tmp_path / "v.txt")
    refused(r"of a LoRA: give --adapter=LORA", alpha=8)
    refused(r"tokenizer has 401 ids", tokenizer="integers:399")


def test_a_missing_package_is_one_line(tmp_path, monkeypatch):
    random_model("x070").save_pretrained(tmp_path / "a.pth")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"needs the package gguf .*pip install gguf") as e:
        run(f"--model={tmp_path}/a.pth", f"--out={tmp_path}/x.gguf", "--tokenizer=bytes")
    assert "\n" not in str(e.value) and not (tmp_path / "x.gguf").exists()


def test_names():
    for name, theirs in (
        ("emb.weight", "token_embd.weight"),
        ("blocks.0.ln0.bias", "token_embd_norm.bias"),
        ("blocks.11.ln2.weight", "blk.11.attn_norm_2.weight"),
        ("blocks.3.att.r_k", "blk.3.time_mix_r_k.weight"),
        ("blocks.3.ffn.x_k", "blk.3.channel_mix_lerp_k.weight"),
        ("blocks.3.att.time_faaaa", "blk.3.time_mix_first.weight"),
        ("blocks.3.att.ln_x.bias", "blk.3.time_mix_ln.bias"),
    ):
        assert gguf_name(name) == theirs


def test_which_tokenizer_json_is_refused():
    cut = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    good = {"model": {"type": "BPE", "merges": ["a b"]}, "pre_tokenizer": cut}
    assert unlike_gpt2(good) == ""
    for change, words in (
        ({"model": {"type": "Unigram"}}, "model.type is 'Unigram'"),
        ({"model": {"type": "BPE", "merges": []}}, "no merges"),
        ({"model": {**good["model"], "ignore_merges": True}}, "ignore_merges"),
        ({"normalizer": {"type": "NFC"}}, "normalizer, 'NFC'"),
        ({"pre_tokenizer": {"type": "Sequence"}}, "expected ByteLevel"),
        ({"pre_tokenizer": {**cut, "add_prefix_space": True}}, "expected ByteLevel"),
    ):
        assert words in unlike_gpt2({**good, **change})


# ----------------------------------------------------------------------------------------------
# llama.cpp

CASES = [
    ("x070", "bytes", {}),
    ("x060", "bytes", {}),
    ("x070", "bpe", dict(n_embd=192, dim_ffn=608, n_layer=2)),
    ("x060", "bpe", {}),
    ("x070", "vocab", {}),
    ("x060", "vocab", dict(head_size=32)),
    ("x070", "world", dict(vocab_size=65536, n_embd=64, n_layer=1)),
    ("x060", "world", dict(vocab_size=65536, n_embd=64, n_layer=1)),
]


@pytest.fixture
def llama():
    pytest.importorskip("gguf")
    module = pytest.importorskip("llama_cpp")

    def load(file):
        options = dict(n_ctx=512, n_batch=512, n_threads=1, logits_all=True, verbose=False)
        return module.Llama(str(file), **options)

    return load


def detokenized(theirs, ids):
    """llama.cpp's own function; the Python one leaves out tokens of more than 32 bytes."""
    import llama_cpp

    array, room = (llama_cpp.llama_token * len(ids))(*ids), 16 * len(ids) + 1000
    buffer = ctypes.create_string_buffer(room)
    vocab = theirs._model.vocab
    n = llama_cpp.llama_detokenize(vocab, array, len(ids), buffer, room, False, False)
    return buffer.raw[:n].decode()


@pytest.mark.parametrize("version, tokenizer, sizes", CASES)
def test_llama_cpp_computes_the_same(version, tokenizer, sizes, llama, tmp_path):
    model, name, file = exported(tmp_path, version, tokenizer, **sizes)
    ours, theirs = prepare.load_tokenizer(name), llama(file)
    for text in (TEXT, (ROOT / "README.md").read_text(encoding="utf-8")):
        text = text.replace("<|endoftext|>", "")  # which there is the end of a document
        ids = ours.encode(text)
        assert theirs.tokenize(text.encode(), add_bos=False, special=False) == ids
        assert detokenized(theirs, ids) == text
    ids = ours.encode(TEXT)
    with torch.no_grad():
        want, state = model(torch.tensor([ids]))
    theirs.eval(ids)
    got = torch.tensor(theirs.scores[: len(ids)])
    print("largest difference", float((got - want[0]).abs().max() / want.std()))
    assert (got - want[0]).abs().max() < 1e-4 * want.std()
    for _ in range(48):  # greedy, each from its own last choice
        token = int(want[0, -1].argmax())
        assert int(torch.tensor(theirs.scores[theirs.n_tokens - 1]).argmax()) == token
        theirs.eval([token])
        with torch.no_grad():
            want, state = model(torch.tensor([[token]]), state)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("version", ["x060", "x070"])
def test_llama_cpp_reads_half_precision(version, dtype, llama, tmp_path):
    """Against our forward pass of the matrices as rounded; activations are rounded there, too."""
    _, _, file = exported(tmp_path, version, "bytes", dtype)
    rounded = RWKV.from_pretrained(tmp_path / "a.pth", dtype=getattr(torch, dtype)).float()
    ids = prepare.load_tokenizer("bytes").encode(TEXT)
    with torch.no_grad():
        want = rounded(torch.tensor([ids]))[0][0]
    theirs = llama(file)
    theirs.eval(ids)
    got = torch.tensor(theirs.scores[: len(ids)])
    tolerance = 0.01 if dtype == "float16" else 0.05
    assert (got - want).abs().max() < tolerance * want.std()


def test_llama_cpp_chats_as_render_chat_does(llama, tmp_path):
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    _, name, file = exported(tmp_path, "x070", "world", vocab_size=65536, n_embd=64, n_layer=1)
    ours, theirs = prepare.load_tokenizer(name), llama(file)
    end = theirs._model.token_get_text(theirs.token_eos())
    assert (theirs.token_eos(), end) == (0, "<|endoftext|>")
    assert theirs._model.token_eot() == ours.encode("\n\n")[0]
    template = theirs.metadata["tokenizer.chat_template"]
    chat = Jinja2ChatFormatter(template=template, eos_token=end, bos_token=end)
    prompt = chat(messages=CHAT).prompt
    ids = theirs.tokenize(prompt.encode(), add_bos=False, special=True)
    assert ids == prepare.render_chat(CHAT, ours, generation_prompt=True)[0]
    assert theirs.create_chat_completion(CHAT, max_tokens=4, temperature=0)["choices"]


def recipe():
    """What docs/files.md shows for a tuned state."""
    (block,) = [b for b in blocks_of(ROOT / "docs/files.md", "python") if "state_seq_set_data" in b]
    return textwrap.dedent(block)


@pytest.mark.parametrize("version", ["x060", "x070"])
def test_llama_cpp_starts_from_a_tuned_state(version, llama, tmp_path, monkeypatch):
    """By the lines of docs/files.md, word for word."""
    model, name, file = exported(tmp_path, version, "bytes")
    g = torch.Generator().manual_seed(5)
    start = model.zero_state(1)
    start["wkv"] = torch.randn(start["wkv"].shape, generator=g)
    write_state(start, tmp_path / "state-final.pth")
    llm, ids = llama(file), prepare.load_tokenizer(name).encode(TEXT)
    monkeypatch.chdir(tmp_path)
    names = dict(llm=llm, is_v7=version == "x070", prompt=ids)
    exec(recipe(), names)
    found = []
    for token in llm.generate(names["tokens"], temp=0):
        found.append(token)
        if len(found) == 48:
            break
    with torch.no_grad():
        want, zero = (model(torch.tensor([ids]), state)[0][0] for state in (start, None))
    got = torch.tensor(llm.scores[1 : 1 + len(ids)])
    print(float((got - want).abs().max() / want.std()))
    assert (got - want).abs().max() < 1e-4 * want.std()
    assert (zero - want).abs().max() > 0.1 * want.std()  # the state matters
    options = dict(max_new_tokens=48, temperature=0, stop_ids=[], state=start)
    assert found == generate(model, [ids], **options)[0].tokens


@pytest.mark.parametrize("version", ["x060", "x070"])
@pytest.mark.parametrize("kind, tolerance, size", [("Q8_0", 0.02, 0.4), ("Q4_K_M", 0.15, 0.3)])
def test_llama_cpp_quantises_the_file(version, kind, tolerance, size, llama, tmp_path):
    import llama_cpp

    model, name, file = exported(tmp_path, version, "bytes", n_embd=256, n_layer=4, vocab_size=512)
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.nthread = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}"), 1
    names = [str(path).encode() for path in (file, tmp_path / "q.gguf")]
    assert llama_cpp.llama_model_quantize(*names, ctypes.byref(options)) == 0
    ids = prepare.load_tokenizer(name).encode((ROOT / "README.md").read_text("utf-8")[:400])
    theirs = llama(tmp_path / "q.gguf")
    theirs.eval(ids)
    got = torch.tensor(theirs.scores[: len(ids)])
    with torch.no_grad():
        want = model(torch.tensor([ids]))[0][0]
    share = (tmp_path / "q.gguf").stat().st_size / file.stat().st_size
    print(f"{share:.2f} of the size, {float((got - want).std() / want.std()):.3f}")
    assert (got - want).std() < tolerance * want.std() and share < size
