"""export.py onnx: what it refuses, and, where onnxruntime is installed, the same numbers."""

import sys

import export
from gosling.config import UserError
from gosling.onnx_file import STATE, check_onnx, write_onnx

import pytest
import torch
from helpers import RANKS, random_model

both = pytest.mark.parametrize("version", ["x060", "x070"])


def run(*words):
    export.main(["onnx", *map(str, words)])


# ----------------------------------------------------------------------------------------------
# onnxruntime


@pytest.fixture
def session():
    """session(file) -> step(ids [B, T], state) -> (logits, state), in tensors."""
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")

    def load(file):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        engine = onnxruntime.InferenceSession(str(file), options)

        def step(ids, state):
            fed = {"ids": ids.numpy(), **{name: state[name].numpy() for name in STATE}}
            names = ["logits", *(f"{name}_out" for name in STATE)]
            logits, *after = map(torch.from_numpy, engine.run(names, fed))
            return logits, dict(zip(STATE, after, strict=True))

        return step

    return load


def graph_of(file):
    """(operators outside and inside of loops, number of nodes) of a file."""
    import onnx

    file = onnx.load(file)
    onnx.checker.check_model(file)
    assert {opset.domain for opset in file.opset_import} == {""} and not file.functions
    nodes = list(file.graph.node)
    for node in file.graph.node:
        for attribute in node.attribute:
            nodes += attribute.g.node
    return {node.op_type for node in nodes}, len(nodes)


@both
def test_onnxruntime_writes_the_same_text(version, session, official, tmp_path):
    """48 greedy tokens of the official package, ranks that no table has: a prompt, then steps."""
    model = random_model(version, scale=0.3, **RANKS[version])
    model.save_pretrained(tmp_path / "a.pth")
    run(f"--model={tmp_path}/a.pth", f"--out={tmp_path}/a.onnx")
    theirs, ours = official(tmp_path / "a.pth", version == "x070"), session(tmp_path / "a.onnx")
    ids = torch.randint(320, (1, 40), generator=torch.Generator().manual_seed(1))
    want, their_state = theirs.forward(ids[0].tolist(), None)
    logits, state = ours(ids, model.zero_state(1))
    got, said = logits[0, -1], []
    for _ in range(48):
        assert (got - want).abs().max() < 2e-5 * want.std()
        token = int(want.argmax())
        assert int(got.argmax()) == token
        said.append(token)
        want, their_state = theirs.forward([token], their_state)
        logits, state = ours(torch.tensor([[token]]), state)
        got = logits[0, -1]
    assert len(set(said)) > 8


@both
def test_given_lengths(version, session, tmp_path):
    """A prompt of 40 by one file, a step by another, of three rows: as the model itself."""
    model = random_model(version, n_layer=2)
    model.save_pretrained(tmp_path / "a.pth")
    for length in (40, 1):
        run(f"--model={tmp_path}/a.pth", f"--out={tmp_path}/{length}.onnx", f"--length={length}")
    ids = torch.randint(320, (3, 41))
    state = {name: torch.randn_like(x) for name, x in model.zero_state(3).items()}
    logits, after = session(tmp_path / "40.onnx")(ids[:, :40], state)
    last, after = session(tmp_path / "1.onnx")(ids[:, 40:], after)
    with torch.no_grad():
        want, want_state = model(ids, state)
    assert (torch.cat([logits, last], 1) - want).abs().max() < 1e-5 * want.std()
    for name in STATE:
        assert (after[name] - want_state[name]).abs().max() < 1e-5 * want_state[name].std()
    operators, n_step = graph_of(tmp_path / "1.onnx")
    assert not operators & {"Scan", "Loop", "If"}
    operators, n_prompt = graph_of(tmp_path / "40.onnx")
    assert "Scan" in operators and n_prompt < n_step + 40  # the loop is not unrolled


def test_weights_apart(session, tmp_path):
    """As for models above 2 GB; the files may be moved together."""
    model = random_model("x070", n_layer=1)
    (tmp_path / "a.onnx").write_text("an old one")
    write_onnx(model, tmp_path / "a.onnx", 1, largest=1000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.onnx", "a.onnx.data"]
    assert (tmp_path / "a.onnx").stat().st_size < (tmp_path / "a.onnx.data").stat().st_size / 5
    assert check_onnx(model, tmp_path / "a.onnx", 1) < 1e-5
    (tmp_path / "b").mkdir()
    for name in ("a.onnx", "a.onnx.data"):
        (tmp_path / name).rename(tmp_path / "b" / name)
    assert check_onnx(model, tmp_path / "b/a.onnx", 1) < 1e-5


def test_another_model_is_seen(session, tmp_path):
    write_onnx(random_model("x070", n_layer=1), tmp_path / "a.onnx", 1)
    with pytest.raises(UserError, match=r"computes something else .*a\.onnx was removed"):
        check_onnx(random_model("x070", seed=1, n_layer=1), tmp_path / "a.onnx", 1)
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------
# without any package


@pytest.fixture
def packages(monkeypatch):
    """As if onnx and onnxscript were installed, for what is refused before they are needed."""
    monkeypatch.setattr(export, "onnx_package", lambda: None)


def test_refusals(packages, tmp_path):
    model = random_model("x070")
    model.save_pretrained(tmp_path / "a.pth")
    weights = torch.load(tmp_path / "a.pth")
    state = {f"blocks.{i}.att.time_state": torch.zeros(2, 64, 64) for i in range(3)}
    torch.save(state, tmp_path / "state.pth")
    torch.save({**weights, "score.weight": torch.zeros(1, 128)}, tmp_path / "reward.pth")
    lora = {"blocks.0.att.key.lora_A": torch.zeros(4, 128)}
    torch.save(lora | {"blocks.0.att.key.lora_B": torch.zeros(128, 4)}, tmp_path / "lora.pth")
    torch.save({**weights, "extra": torch.zeros(1)}, tmp_path / "extra.pth")

    def refused(message, model="a.pth", out="x.onnx", *flags):
        with pytest.raises(UserError, match=message) as e:
            run(f"--model={tmp_path}/{model}", f"--out={tmp_path}/{out}", *flags)
        assert "\n" not in str(e.value) and not (tmp_path / out).exists()

    refused(r"state\.pth is a tuned state, for which an ONNX file has no place", "state.pth")
    refused(r"reward\.pth is a reward model; an ONNX file", "reward.pth")
    refused(r"lora\.pth is a LoRA; merge first", "lora.pth")
    refused(r"extra\.pth: .*extra", "extra.pth")
    refused(r"x\.pth: expected a name in \.onnx", out="x.pth")
    refused(r"--dtype=float16: onnx is written in float32", "a.pth", "x.onnx", "--dtype=float16")
    (tmp_path / "x.onnx.data").touch()
    refused(r"x\.onnx\.data is already there; .*--overwrite")
    with pytest.raises(UserError, match="length"):
        run(f"--model={tmp_path}/a.pth", f"--out={tmp_path}/x.onnx", "--length=-1")


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_a_missing_package_is_one_line(package, tmp_path, monkeypatch):
    random_model("x070").save_pretrained(tmp_path / "a.pth")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=r"pip install onnx onnxscript") as e:
        run(f"--model={tmp_path}/a.pth", f"--out={tmp_path}/x.onnx")
    assert "\n" not in str(e.value) and not (tmp_path / "x.onnx").exists()
