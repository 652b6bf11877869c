"""Weights, adapters and states as others bring them: what a file says of itself counts."""

import argparse
import copy
import json
import random
from dataclasses import dataclass

import export
import sample
from gosling import engine
from gosling.config import UserError
from gosling.runs import Run
from gosling.tokenizer import load_tokenizer, tokenizer_of
from gosling.tune import load_model, load_to_tune, load_tuned, origin, write_tuned
from gosling.weights import fingerprint, read_metadata, read_state, read_weights, write_state
from model import RWKV

import pytest
import torch
from helpers import RANKS, random_model
from safetensors.torch import load_file, save_file

IDX = torch.randint(0, 320, (1, 24), generator=torch.Generator().manual_seed(1))


@dataclass
class Config:
    """The fields that load_to_tune reads, with the defaults of the training scripts."""

    init_from: str
    adapter: str = ""
    tune: str = "lora"
    lora_r: int = 32
    lora_alpha: float = 64.0
    lora_dropout: float = 0.0
    lora_rslora: bool = False
    lora_targets: tuple = ()
    lora_extra: tuple = ()
    another_base: bool = False
    seed: int = 0
    grad_cp: bool = False


RUN = Run(0, 1, torch.device("cpu"), torch.float32)


def export_(*argv):
    export.main([str(word) for word in argv])


def logits(model, state=None):
    with torch.no_grad():
        return model.eval()(IDX, state)[0]


def shake(model):
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.05 * torch.randn_like(p)
    return model


@pytest.fixture
def seven(tmp_path):
    """A model, and a.pth of it."""
    model = random_model("x070", **RANKS["x070"])
    model.save_pretrained(tmp_path / "a.pth")
    return model


def adapter(model, folder, name="l", about=None, **options):
    """A saved LoRA that matters -> (its path, the model with it on)."""
    on = copy.deepcopy(model)
    on.set_tune("lora", **options)
    said = {"model": "a.pth", "fingerprint": fingerprint(model)} if about is None else about
    return write_tuned(shake(on), folder, name, about=said), on


def refused(words, path, **more):
    with pytest.raises(UserError, match=words) as e:
        RWKV.from_pretrained(path, **more)
    assert "\n" not in str(e.value)


# ----------------------------------------------------------------------------------------------
# a whole network


@pytest.mark.parametrize(
    "name, kind", [("ffn.s_emb.weight", "7a"), ("ffn.s_emb_x", "7a"), ("qkv.k_emb.weight", "7b")]
)
def test_deep_embed_is_called_by_its_name(name, kind, seven, tmp_path):
    weights = {**seven.state_dict(), f"blocks.1.{name}": torch.zeros(320, 128)}
    torch.save(weights, tmp_path / "deep.pth")
    refused(rf"deep\.pth is an RWKV-{kind}: DeepEmbed .*not supported", tmp_path / "deep.pth")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.uint8])
def test_quantised_weights_are_refused_by_name(dtype, seven, tmp_path, capsys):
    weights = dict(seven.state_dict())
    weights["blocks.1.ffn.key.weight"] = weights["blocks.1.ffn.key.weight"].to(dtype)
    torch.save(weights, tmp_path / "q.pth")
    words = rf"blocks\.1\.ffn\.key\.weight is {str(dtype)[6:]}, expected float32"
    refused(words, tmp_path / "q.pth")
    export_("inspect", tmp_path / "q.pth")
    assert f"odd: blocks.1.ffn.key.weight is {str(dtype)[6:]}" in capsys.readouterr().out
    with pytest.raises(UserError, match=words):
        export_(
            "convert", f"--model={tmp_path}/q.pth", f"--out={tmp_path}/b.pth", "--dtype=float32"
        )

    path, _ = adapter(seven, tmp_path, r=2)
    merge = ["merge", f"--model={tmp_path}/q.pth", f"--out={tmp_path}/m.pth", f"--adapter={path}"]
    with pytest.raises(UserError, match=words):
        export_(*merge, "--another_base")
    saved = load_file(path)
    saved["blocks.1.att.key.lora_A"] = saved["blocks.1.att.key.lora_A"].to(dtype)
    save_file(saved, path, read_metadata(path))
    with pytest.raises(UserError, match=rf"att\.key\.lora_A is {str(dtype)[6:]}, expected"):
        load_to_tune(Config(str(tmp_path / "a.pth"), str(path)), RUN)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_numbers_are_refused_by_name(value, seven, tmp_path):
    weights = seven.state_dict()
    weights["blocks.2.att.value.weight"][3, 4:6] = value
    torch.save(weights, tmp_path / "n.pth")
    refused(r"n\.pth: blocks\.2\.att\.value\.weight has 2 values that are NaN", tmp_path / "n.pth")
    path, _ = adapter(seven, tmp_path, r=2)
    saved = load_file(path)
    saved["blocks.1.att.key.lora_B"][0, 0] = value
    save_file(saved, path, {"alpha": "64.0", "rslora": "False"})
    with pytest.raises(UserError, match=r"blocks\.1\.att\.key\.lora_B has 1 values"):
        load_to_tune(Config(str(tmp_path / "a.pth"), str(path)), RUN)


@pytest.mark.parametrize("version", ["x060", "x070"])
def test_a_state_inside_is_the_initial_state(version, tmp_path):
    model = random_model(version, **RANKS[version])
    model.save_pretrained(tmp_path / "a.pth")
    start = {**model.zero_state(1), "wkv": torch.randn(3, 1, 2, 64, 64)}
    write_state(start, tmp_path / "s.pth")
    export_(
        "merge",
        f"--model={tmp_path}/a.pth",
        f"--state={tmp_path}/s.pth",
        f"--out={tmp_path}/m.pth",
    )
    merged, want = RWKV.from_pretrained(tmp_path / "m.pth"), logits(model, start)
    assert torch.equal(logits(merged), want)
    assert (want - logits(model)).abs().max() > 1e-2
    assert torch.equal(logits(load_model(tmp_path / "m.pth")[0]), want)
    assert fingerprint(merged) == fingerprint(model)
    merged.save_pretrained(tmp_path / "again.pth", torch.bfloat16)
    again = read_weights(tmp_path / "again.pth")
    assert torch.equal(again["blocks.2.att.time_state"], start["wkv"][2, 0])
    for tune in ("full", "lora", "state"):  # it stays, frozen, or is what a tuned one starts from
        merged.set_tune(tune)
        assert torch.equal(logits(merged), want)
        trained = [name for name, p in merged.named_parameters() if p.requires_grad]
        assert any(name.startswith("tuned.") for name in trained) == (tune == "state")
        with merged.reference():
            expected = logits(model) if tune == "state" else want
            assert torch.equal(logits(merged), expected)


def test_a_state_inside_that_does_not_fit_is_named(tmp_path):
    weights = random_model("x060").state_dict()
    weights["blocks.0.att.time_state"] = torch.zeros(2, 64, 64)
    torch.save(weights, tmp_path / "m.pth")
    refused(r"blocks\.1\.att\.time_state is missing", tmp_path / "m.pth")


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda w: w.half(), id="float16"),
        pytest.param(lambda w: w.double(), id="float64"),
        pytest.param(torch.nn.Parameter, id="parameters"),
        pytest.param(lambda w: w[None, None] if w.dim() == 1 else w, id="vectors as [1, 1, C]"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_forms_of_one_file_are_one_network(change, zipped, seven, tmp_path):
    weights = {name: change(w) for name, w in seven.state_dict().items()}
    torch.save(weights, tmp_path / "b.pth", _use_new_zipfile_serialization=zipped)
    assert (logits(RWKV.from_pretrained(tmp_path / "b.pth")) - logits(seven)).abs().max() < 1e-2


@pytest.mark.parametrize(
    "version, sizes",
    [("x070", dict(head_size=32)), ("x060", dict(head_size=16)), ("x070", dict(n_layer=1))],
)
def test_sizes_are_read_from_the_tensors(version, sizes, tmp_path):
    model = random_model(version, **sizes)
    never_used = ("blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2")
    weights = {name: w for name, w in model.state_dict().items() if name not in never_used}
    torch.save(weights, tmp_path / "a.pth")
    assert torch.equal(logits(RWKV.from_pretrained(tmp_path / "a.pth")), logits(model))


def without(weights, part):
    return {name: w for name, w in weights.items() if part not in name}


@pytest.mark.parametrize(
    "change, words",
    [
        pytest.param(lambda w: {f"module.{n}": x for n, x in w.items()}, "module.emb", id="DDP"),
        pytest.param(lambda w: {f"_orig_mod.{n}": x for n, x in w.items()}, "_orig", id="compiled"),
        pytest.param(lambda w: {"model": w, "step": 3}, "not a file of weights", id="nested"),
        pytest.param(lambda w: [w], "not a file of weights", id="a list"),
        pytest.param(lambda w: w["emb.weight"], "not a file of weights", id="one tensor"),
        pytest.param(lambda w: {}, "holds no tensors", id="nothing"),
        pytest.param(
            lambda w: without(w, "head.weight"), "head.weight is missing", id="a tied head"
        ),
        pytest.param(
            lambda w: without(w, "blocks.1."),
            "2 layers have .*none is number 1",
            id="a layer missing",
        ),
        pytest.param(
            lambda w: {n: x.to(torch.complex64) for n, x in w.items()},
            "emb.weight is complex64, expected",
            id="complex numbers",
        ),
        pytest.param(
            lambda w: {**w, "args": argparse.Namespace(lr=1)},
            "it holds argparse.Namespace, which is no tensor",
            id="an object of Python",
        ),
    ],
)
def test_what_is_no_whole_network_is_named(change, words, seven, tmp_path):
    torch.save(change(dict(seven.state_dict())), tmp_path / "b.pth")
    refused(rf"b\.pth.*{words}", tmp_path / "b.pth")


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00"


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("b.pth", b"", "it is empty"),
        ("b.safetensors", b"", "it is empty"),
        ("b.pth", LFS, "it is a Git LFS pointer; .*git lfs pull"),
        ("b.safetensors", LFS, "it is a Git LFS pointer"),
        ("b.pth", b"<!doctype html><html>", "it is a web page; download"),
        ("b.safetensors", b"\n<html>not found</html>", "it is a web page; download"),
        ("b.pth", b"hello there, no model", "truncated, or not a checkpoint$"),
        ("b.pth", "a.safetensors", r"it holds safetensors; name it \.safetensors"),
        ("b.safetensors", "a.pth", r"it is a PyTorch file; name it \.pth"),
    ],
)
def test_a_file_that_is_something_else_says_what_it_is(name, content, words, seven, tmp_path):
    seven.save_pretrained(tmp_path / "a.safetensors")
    if isinstance(content, str):
        content = (tmp_path / content).read_bytes()
    (tmp_path / name).write_bytes(content)
    refused(rf"{name} cannot be read as .*{words}", tmp_path / name)


def test_a_lora_and_a_state_in_place_of_a_model_are_called_so(seven, tmp_path):
    path, _ = adapter(seven, tmp_path, r=2)
    write_state(seven.zero_state(1), tmp_path / "s.pth")
    for file in (path, peft(path, tmp_path / "theirs")):
        refused("it is a LoRA, which goes beside the model", file)
    refused("it is a tuned state, which goes beside the model", tmp_path / "s.pth")


@pytest.mark.parametrize(
    "config", ['{"model_type": "rwkv7"}', "{}", "[1]", "null", '"text"', '{"tokenizer": 5}']
)
def test_another_programs_config_beside_an_official_file_is_passed_over(config, tmp_path):
    (tmp_path / "config.json").write_text(config)
    assert tokenizer_of(tmp_path / "m.pth", 65536).name == "world"
    with pytest.raises(UserError, match="m.pth has a vocabulary of 320 .*say --tokenizer=NAME"):
        tokenizer_of(tmp_path / "m.pth", 320)


@pytest.mark.parametrize("command", ["merge", "convert", "hub"])
def test_export_names_the_file_of_wrong_numbers(command, seven, tmp_path):
    weights = seven.state_dict()
    weights["blocks.1.att.key.weight"][0, 0] = float("nan")
    torch.save(weights, tmp_path / "n.pth")
    write_state(seven.zero_state(1), tmp_path / "s.pth")
    more = {"merge": [f"--state={tmp_path}/s.pth"], "convert": ["--dtype=bfloat16"]}
    out = tmp_path / ("hub" if command == "hub" else "m.pth")
    with pytest.raises(UserError, match=r"n\.pth: blocks\.1\.att\.key\.weight has 1 values"):
        export_(command, f"--model={tmp_path}/n.pth", f"--out={out}", *more.get(command, []))
    assert not out.exists()


# ----------------------------------------------------------------------------------------------
# folders and shards


def shards(weights, folder):
    """Two shards and their index, as transformers writes them."""
    folder.mkdir()
    names, files = sorted(weights), ["model-00001-of-00002.safetensors"]
    files.append("model-00002-of-00002.safetensors")
    half = len(names) // 2
    for file, some in zip(files, (names[:half], names[half:]), strict=True):
        save_file({name: weights[name].contiguous() for name in some}, folder / file)
    where = {name: files[names.index(name) >= half] for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


@pytest.mark.parametrize("names", ["ours", "fla's"])
def test_shards_work_wherever_a_file_does(names, seven, tmp_path):
    weights = dict(seven.state_dict())
    if names == "fla's":
        export_("hub", f"--model={tmp_path}/a.pth", f"--out={tmp_path}/one", "--tokenizer=bytes")
        weights = load_file(tmp_path / "one/model.safetensors")
    folder = shards(weights, tmp_path / "hub")
    first = folder / "model-00001-of-00002.safetensors"
    for path in (folder, first, folder / "model.safetensors.index.json"):
        assert torch.equal(logits(RWKV.from_pretrained(path)), logits(seven))
    model = load_to_tune(Config(str(folder), tune="full"), RUN)
    assert torch.equal(logits(model), logits(seven))
    export_("convert", f"--model={folder}", f"--out={tmp_path}/b.pth")
    assert torch.equal(logits(RWKV.from_pretrained(tmp_path / "b.pth")), logits(seven))
    (folder / "model-00002-of-00002.safetensors").unlink()
    refused(r"00002-of-00002\.safetensors does not exist; .* 2 files", folder)


def test_pytorchs_own_shards_are_read(seven, tmp_path):
    """pytorch_model.bin, whole or in shards."""
    weights = seven.state_dict()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    torch.save(weights, tmp_path / "one/pytorch_model.bin")
    for number in (1, 2):
        some = {name: weights[name].clone() for name in list(weights)[number - 1 :: 2]}
        torch.save(some, tmp_path / f"two/pytorch_model-0000{number}-of-00002.bin")
    for path in ("one", "two", "two/pytorch_model-00002-of-00002.bin"):
        assert torch.equal(logits(RWKV.from_pretrained(tmp_path / path)), logits(seven))


def test_the_index_says_which_files_are_the_shards(seven, tmp_path):
    """What else lies in the folder, of an older upload, is not read."""
    folder = shards(dict(seven.state_dict()), tmp_path / "hub")
    save_file({"x": torch.zeros(1)}, folder / "model-00001-of-00001.safetensors")
    assert torch.equal(logits(RWKV.from_pretrained(folder)), logits(seven))
    for file in folder.glob("model-*"):
        file.unlink()
    refused(r"model-00001-of-00002\.safetensors does not exist; .* 2 files", folder)
    index = folder / "model.safetensors.index.json"
    index.write_text("[1]")
    refused(r"index\.json: it is \[1\]; expected a valid dictionary", folder)
    index.unlink()
    refused(r"index\.json does not exist", index)


def test_a_hub_folder_works_wherever_a_file_does(seven, tmp_path):
    export_("hub", f"--model={tmp_path}/a.pth", f"--out={tmp_path}/hub", "--tokenizer=bytes")
    for path in (tmp_path / "hub", tmp_path / "hub/model.safetensors"):
        assert torch.equal(logits(RWKV.from_pretrained(path)), logits(seven))
    assert fingerprint(RWKV.from_pretrained(tmp_path / "hub")) == fingerprint(seven)


def test_a_folder_is_called_a_folder(seven, tmp_path):
    refused(r"is a folder without model\.safetensors; give a file of it: .*a\.pth", tmp_path)
    (tmp_path / "none").mkdir()
    refused(r"none is a folder .* there is none in it", tmp_path / "none")
    refused(r"nowhere does not exist", tmp_path / "nowhere")


# ----------------------------------------------------------------------------------------------
# LoRA


@pytest.mark.parametrize("alpha, rslora", [(8.0, False), (6.0, True)])
def test_a_lora_is_read_with_the_scale_it_was_trained_with(alpha, rslora, seven, tmp_path):
    targets, extra = ("att.key", "ffn"), ("ln_out",)
    path, on = adapter(
        seven, tmp_path, r=8, alpha=alpha, rslora=rslora, targets=targets, extra=extra
    )
    cfg = Config(str(tmp_path / "a.pth"), str(path))
    assert torch.equal(logits(load_to_tune(cfg, RUN)), logits(on))
    assert (cfg.lora_r, cfg.lora_alpha, cfg.lora_rslora) == (8, alpha, rslora)
    assert torch.equal(logits(load_model(path)[0]), logits(on))
    agrees = dict(lora_r=8, lora_alpha=alpha, lora_targets=("ffn", "att.key"), lora_extra=("ln_o",))
    model = load_to_tune(Config(str(tmp_path / "a.pth"), str(path), **agrees), RUN)
    assert torch.equal(logits(model), logits(on))
    with model.reference():
        assert torch.equal(logits(model), logits(seven))


@pytest.mark.parametrize(
    "flag, words",
    [
        (dict(lora_alpha=32.0), r"lora_alpha=8\.0, and --lora_alpha=32\.0"),
        (dict(lora_r=4), r"lora_r=8, and --lora_r=4"),
        (dict(lora_rslora=True), r"lora_rslora=False, and --lora_rslora=True"),
        (dict(lora_targets=("ffn",)), r"lora_targets=blocks.*, and --lora_targets=\('ffn',\)"),
        (dict(lora_extra=("ln",)), r"lora_extra=none, and --lora_extra=\('ln',\)"),
    ],
)
def test_a_flag_that_says_otherwise_names_both(flag, words, seven, tmp_path):
    path, _ = adapter(seven, tmp_path, r=8, alpha=8.0)
    with pytest.raises(UserError, match=words):
        load_to_tune(Config(str(tmp_path / "a.pth"), str(path), **flag), RUN)


def test_loading_into_another_scale_is_an_error(seven, tmp_path):
    path, _ = adapter(seven, tmp_path, r=8, alpha=8.0)
    seven.set_tune("lora", r=8)
    with pytest.raises(UserError, match="trained with alpha 8, .* the model has alpha 64"):
        load_tuned(seven, path)


def test_a_lora_that_does_not_say_its_alpha_takes_the_flag(seven, tmp_path, capsys):
    path, on = adapter(seven, tmp_path, r=8, alpha=16.0)
    torch.save(load_file(path), tmp_path / "l.pth")
    given = dict(adapter=str(tmp_path / "l.pth"), lora_alpha=16.0)
    model = load_to_tune(Config(str(tmp_path / "a.pth"), **given), RUN)
    assert torch.equal(logits(model), logits(on))
    assert "does not say its alpha; lora_alpha=16 is taken" in capsys.readouterr().out


def test_another_base_is_an_error_unless_it_is_meant(seven, tmp_path):
    path, on = adapter(seven, tmp_path, r=8, alpha=8.0)
    other = random_model("x070", seed=5, **RANKS["x070"])
    other.save_pretrained(tmp_path / "other.pth")
    words = r"was trained on a\.pth, and \S+other\.pth has other weights; .*--another_base"
    with pytest.raises(UserError, match=words):
        load_to_tune(Config(str(tmp_path / "other.pth"), str(path)), RUN)
    load_to_tune(Config(str(tmp_path / "other.pth"), str(path), another_base=True), RUN)
    merge = ["merge", f"--model={tmp_path}/other.pth", f"--out={tmp_path}/m.pth"]
    with pytest.raises(UserError, match=words):
        export_(*merge, f"--adapter={path}")
    export_(*merge, f"--adapter={path}", "--another_base")
    other.save_pretrained(tmp_path / "a.pth")  # the base that the file names is no longer the same
    with pytest.raises(UserError, match="other weights"):
        load_model(path)
    load_model(path, another_base=True)
    flags = dict(model=str(path), tokenizer="bytes", device="cpu")
    with pytest.raises(UserError, match="other weights; .*--another_base"):
        sample.load(sample.Config(**flags))
    sample.load(sample.Config(**flags, another_base=True))
    # a state, too
    write_state(seven.zero_state(1), tmp_path / "s.pth", model="b.pth", fingerprint="00")
    with pytest.raises(UserError, match=r"s\.pth was trained on b\.pth"):
        load_to_tune(Config(str(tmp_path / "a.pth"), str(tmp_path / "s.pth"), "state"), RUN)
    with pytest.raises(UserError, match=r"s\.pth was trained on b\.pth"):
        export_(*merge, f"--state={tmp_path}/s.pth", "--overwrite")


def test_merge_takes_the_files_scale_and_no_other(seven, tmp_path):
    path, on = adapter(seven, tmp_path, r=8, alpha=8.0)
    merge = ["merge", f"--model={tmp_path}/a.pth", f"--adapter={path}", f"--out={tmp_path}/m.pth"]
    for flag, words in (("--alpha=64", "--alpha=64, but .* alpha 8"), ("--rslora", "rslora False")):
        with pytest.raises(UserError, match=words):
            export_(*merge, flag)
    export_(*merge, "--alpha=8")
    assert (logits(RWKV.from_pretrained(tmp_path / "m.pth")) - logits(on)).abs().max() < 1e-5


def peft(path, folder, **settings):
    """A LoRA of ours as PEFT writes one: its names, and adapter_config.json."""
    folder.mkdir()
    theirs = {}
    for name, w in read_weights(path).items():
        end = ".weight" if ".lora_" in name else ""
        theirs[f"base_model.model.{name}{end}"] = w
    save_file(theirs, folder / "adapter_model.safetensors", {"format": "pt"})
    config = dict(peft_type="LORA", r=8, lora_alpha=12, use_rslora=False, init_lora_weights=True)
    config |= dict(base_model_name_or_path=None, use_dora=False, alpha_pattern={}, **settings)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_a_peft_adapter_is_read_and_merged(seven, tmp_path, capsys):
    path, on = adapter(seven, tmp_path, r=8, alpha=12.0, extra=("ln_out",))
    folder = peft(path, tmp_path / "theirs")
    for number, given in enumerate((folder, folder / "adapter_model.safetensors")):
        out = tmp_path / f"m{number}.pth"
        export_("merge", f"--model={tmp_path}/a.pth", f"--adapter={given}", f"--out={out}")
        assert (logits(RWKV.from_pretrained(out)) - logits(on)).abs().max() < 1e-5
    model = load_to_tune(Config(str(tmp_path / "a.pth"), str(folder)), RUN)
    assert torch.equal(logits(model), logits(on))
    export_("inspect", folder)
    assert "a LoRA of rank 8, alpha 12, rslora False" in capsys.readouterr().out
    export_("convert", f"--model={folder}", f"--out={tmp_path}/ours.safetensors")
    assert read_metadata(tmp_path / "ours.safetensors")["alpha"] == "12"
    with pytest.raises(UserError, match="does not say which model .*export.py merge"):
        load_model(folder)
    # an older form: a .bin, which says its base
    theirs = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(theirs, folder / "adapter_model.bin")
    config = json.loads((folder / "adapter_config.json").read_text())
    base = {**config, "base_model_name_or_path": "../a.pth"}
    (folder / "adapter_config.json").write_text(json.dumps(base))
    assert torch.equal(logits(load_model(folder)[0]), logits(on))


@pytest.mark.parametrize(
    "setting", [dict(use_dora=True), dict(alpha_pattern={"att.key": 4}), dict(peft_type="LOHA")]
)
def test_a_peft_adapter_of_another_kind_is_refused(setting, seven, tmp_path):
    path, _ = adapter(seven, tmp_path, r=8, alpha=12.0)
    folder = peft(path, tmp_path / "theirs")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **setting}))
    args = [f"--model={tmp_path}/a.pth", f"--adapter={folder}", f"--out={tmp_path}/m.pth"]
    with pytest.raises(UserError, match=rf"{next(iter(setting))} is .* merge_and_unload"):
        export_("merge", *args)


# ----------------------------------------------------------------------------------------------
# states


def test_a_st_is_turned_wherever_a_state_is_read(seven, tmp_path):
    start = {**seven.zero_state(1), "wkv": torch.randn(3, 1, 2, 64, 64).half().float()}
    write_state(start, tmp_path / "s.pth", model="a.pth", fingerprint=fingerprint(seven))
    to = [f"--state={tmp_path}/s.pth", f"--out={tmp_path}/s.st", "--to=web-rwkv"]
    export_("state", *to)
    stored = load_file(tmp_path / "s.st")["blocks.1.att.time_state"]
    assert torch.equal(stored.float(), start["wkv"][1, 0].mT)  # [H, key, value], as web-rwkv has it
    (tmp_path / "s.json").unlink()
    state, about = read_state(tmp_path / "s.st")
    assert torch.equal(state["wkv"], start["wkv"])
    assert about == {"model": "a.pth", "fingerprint": fingerprint(seven)}
    assert torch.equal(logits(load_model(tmp_path / "s.st")[0]), logits(seven, start))
    for number, flags in enumerate(([], ["--from=web-rwkv"])):
        back = tmp_path / f"back{number}.pth"
        export_("state", f"--state={tmp_path}/s.st", f"--out={back}", *flags)
        assert torch.equal(read_state(back)[0]["wkv"], start["wkv"])
    merge = ["merge", f"--model={tmp_path}/a.pth", f"--out={tmp_path}/m.pth"]
    export_(*merge, f"--state={tmp_path}/s.st")
    assert torch.equal(logits(RWKV.from_pretrained(tmp_path / "m.pth")), logits(seven, start))
    model = load_to_tune(Config(str(tmp_path / "a.pth"), str(tmp_path / "s.st"), "state"), RUN)
    assert torch.equal(logits(model), logits(seven, start))
    random_model("x070", seed=5, **RANKS["x070"]).save_pretrained(tmp_path / "other.pth")
    merge = ["merge", f"--model={tmp_path}/other.pth", f"--out={tmp_path}/o.pth"]
    with pytest.raises(UserError, match=r"s\.st was trained on a\.pth, and .* has other weights"):
        export_(*merge, f"--state={tmp_path}/s.st")


def test_one_flipped_bit_of_a_file_is_seen(seven, tmp_path):
    """Weights and adapters load as they were written, or not at all."""
    path, _ = adapter(seven, tmp_path, r=2)
    seven.save_pretrained(tmp_path / "m.pth")
    rng = random.Random(0)
    for file in (path, tmp_path / "m.pth"):
        whole, good, about = file.read_bytes(), read_weights(file), read_metadata(file)
        n_seen = 0
        for _ in range(60):
            damaged = bytearray(whole)
            damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
            file.write_bytes(damaged)
            try:
                weights = read_weights(file)
            except UserError as e:
                n_seen += 1
                assert str(file) in str(e)
                continue
            assert weights.keys() == good.keys() and read_metadata(file) == about
            assert all(torch.equal(weights[name], good[name]) for name in good)
        assert n_seen > 50
    save_file(good, tmp_path / "theirs.safetensors", {"format": "pt"})  # without a checksum
    assert read_weights(tmp_path / "theirs.safetensors").keys() == good.keys()


def test_a_base_is_found_from_a_folder_behind_a_link(seven, tmp_path):
    """As where out_dir is a link to another disk."""
    (tmp_path / "disk/deep/run").mkdir(parents=True)
    (tmp_path / "out").symlink_to(tmp_path / "disk/deep/run")
    seven.save_pretrained(tmp_path / "m.pth")
    cfg = Config(str(tmp_path / "m.pth"), lora_r=2)
    cfg.out_dir = str(tmp_path / "out")
    about = origin(cfg, load_to_tune(cfg, RUN), load_tokenizer("bytes"))
    path = write_tuned(load_to_tune(cfg, RUN), cfg.out_dir, "1", about=about)
    for folder in ("out", "disk/deep/run"):
        model, _ = load_model(tmp_path / folder / path.name)
        assert torch.equal(logits(model), logits(seven))


SPARSE, CLAIMED = torch.zeros(320, 128).to_sparse(), torch.zeros(1).expand(320, 10**12)


@pytest.mark.parametrize(
    "name, w, words",
    [
        ("emb.weight", SPARSE, r"emb.weight .float32 .320, 128.*sparse.* does not have all its"),
        ("emb.weight", CLAIMED, "emb.weight .*does not have all its numbers in the file"),
        (5, torch.zeros(1), "has a tensor of the name 5, which no weights have"),
        ("x" * 10_000, torch.zeros(1), "has a tensor of the name 'xxx"),
        ("blocks.3000000.ffn.x_k", torch.zeros(1), "4 layers have tensors, but none is number 3"),
        ("blocks.-1.ffn.x_k", torch.zeros(1), "1 tensors are missing, misshapen or extra"),
    ],
)
def test_tensors_that_are_not_what_they_say_are_refused_at_once(name, w, words, tmp_path):
    weights = {**random_model("x070").state_dict(), name: w}
    torch.save(weights, tmp_path / "m.pth")
    with pytest.raises(UserError, match=f"m.pth.*{words}"):
        RWKV.from_pretrained(tmp_path / "m.pth")


@pytest.mark.parametrize(
    "about, words",
    [
        ({"alpha": "high"}, "alpha is 'high'; expected a number above 0"),
        ({"alpha": "1e400"}, "alpha is '1e400'; expected a number above 0"),
        ({"model": "a" * 5000}, "model is 'aaa.*expected the name of a file"),
        ({"tokenizer": "integers:99999999999999"}, "names a tokenizer: .*integers go up to"),
    ],
)
def test_what_an_adapter_says_of_itself_is_looked_at(about, words, seven, tmp_path):
    path, _ = adapter(seven, tmp_path, r=4)
    said = {**read_metadata(path), "model": "m.pth", "tokenizer": "bytes"}
    seven.save_pretrained(tmp_path / "m.pth")
    save_file(load_file(path), path, {**said, **about})
    with pytest.raises(UserError, match=f"{path.name}.*{words}"):
        engine.load(path, "cpu", torch.float32)


@pytest.mark.parametrize(
    "settings, words",
    [
        ([1], "it is .1.; expected a valid dictionary"),
        ({"lora_alpha": "12"}, "lora_alpha is '12'; expected a valid number"),
        ({"use_rslora": [1]}, "use_rslora is .1.; expected a valid boolean"),
        ({"base_model_name_or_path": 7}, "base_model_name_or_path is 7; expected the name"),
    ],
)
def test_settings_of_peft_are_of_their_kinds(settings, words, seven, tmp_path):
    path, _ = adapter(seven, tmp_path, r=4)
    folder = peft(path, tmp_path / "theirs")
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=f"adapter_config.json: {words}"):
        load_model(folder)
