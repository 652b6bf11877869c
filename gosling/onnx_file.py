"""ONNX: a whole RWKV-6 or 7 as a graph of standard operators, the state going in and coming out.

export.py onnx writes it, with two packages: pip install onnx onnxscript. With onnxruntime installed
as well, the file is run against the model before it is called done.

Inputs: ids [B, T] int64, wkv [L, B, H, N, N], att_shift and ffn_shift [L, B, C], as in model.py.
Outputs: logits [B, T, V], and the state under the same names with _out behind. All is float32.
"""

import contextlib
import logging
import warnings
from pathlib import Path

from gosling.config import UserError
from gosling.files import atomic_write

import torch

STATE = ("wkv", "att_shift", "ffn_shift")
LARGEST = 1_900_000_000  # bytes of weights within the file itself; it can hold 2 GB in all
TOLERANCE = 1e-3  # of onnxruntime's logits, in standard deviations; 1e-6 is usual


def onnx_package():
    """The package; UserError if it or onnxscript, which torch.onnx wants, is not installed."""
    try:
        import onnx
        import onnxscript  # noqa: F401
    except ImportError as e:
        raise UserError(
            f"export.py onnx needs the packages onnx and onnxscript ({e}); install them: "
            "pip install onnx onnxscript"
        ) from e
    return onnx


class Graph(torch.nn.Module):
    """The network with a state of three tensors instead of a dict."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, wkv, att_shift, ffn_shift):
        state = dict(zip(STATE, (wkv, att_shift, ffn_shift), strict=True))
        logits, state = self.model(ids, state)
        return logits, *(state[name] for name in STATE)


def example(model, B, T):
    """Random ids [B, T] and a state that is not zero, as Graph takes them."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (B, T), generator=g)
    state = model.zero_state(B)
    return ids, *(torch.randn(state[name].shape, generator=g) * 0.1 for name in STATE)


def write_onnx(model, out, length=0, largest=LARGEST):
    """The model, on the CPU in float32, as `out`. length: tokens of each call; 0 = any number.

    Of any length, the recurrence is a Scan; of one token, there is no loop in the graph. Weights of
    more than `largest` bytes go to a file of their own, <out>.data.
    """
    onnx = onnx_package()
    model.requires_grad_(False).eval()
    graph = traced(model, length)
    n_bytes = sum(p.nbytes for p in model.parameters())
    with atomic_write(out) as tmp:
        if n_bytes <= largest:
            graph.save(tmp)
        else:
            Path(out).unlink(missing_ok=True)  # never an old graph beside new weights
            with atomic_write(f"{out}.data") as tmp_data:
                save_apart(onnx, graph, tmp, tmp_data, f"{Path(out).name}.data")


def traced(model, length):
    """torch.onnx's program for this model."""
    by_batch, by_both = {1: "batch"}, {0: "batch"}
    if not length:
        by_both[1] = "length"
    with quiet():
        graph = torch.onnx.export(
            Graph(model),
            example(model, 2, length or 5),
            dynamo=True,
            verbose=False,
            input_names=["ids", *STATE],
            output_names=["logits", *(f"{name}_out" for name in STATE)],
            dynamic_shapes=[by_both, *[by_batch] * 3],
        )
    from onnx_ir.passes.common import RemoveUnusedNodesPass  # comes with onnxscript

    RemoveUnusedNodesPass()(graph.model)  # onnxruntime would warn of them
    return graph


@contextlib.contextmanager
def quiet():
    """Without torch.onnx's lines on torchvision, on names of axes and on what torch should mend."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def save_apart(onnx, graph, tmp, tmp_data, name):
    """The graph as `tmp`, its weights as `tmp_data`, which the graph knows as `name`."""
    import onnx_ir

    onnx_ir.save(graph.model, tmp, external_data=tmp_data.name)
    file = onnx.load(tmp, load_external_data=False)
    for tensor in file.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = name
    onnx.save(file, tmp)


def check_onnx(model, out, length=0):
    """Run the file in onnxruntime -> the largest difference of a logit, in standard deviations.

    None if onnxruntime is not installed. UserError, and no file, if the logits are others.
    """
    try:
        import onnxruntime
    except ImportError:
        return None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # not on what it tidies up
    session = onnxruntime.InferenceSession(str(out), options, ["CPUExecutionProvider"])
    inputs = example(model, 3, length or 9)
    fed = {name: x.numpy() for name, x in zip(("ids", *STATE), inputs, strict=True)}
    with torch.no_grad():
        wanted = Graph(model)(*inputs)
    differences = []
    for want, got in zip(wanted, session.run(None, fed), strict=True):
        differences.append(float((want - torch.from_numpy(got)).abs().max() / want.std()))
    if not max(differences) < TOLERANCE:
        for file in (Path(out), Path(f"{out}.data")):
            file.unlink(missing_ok=True)
        raise UserError(
            f"onnxruntime {onnxruntime.__version__} computes something else from this model: off by"
            f" {max(differences):.1e} standard deviations; {out} was removed. Try other versions of"
            " torch, onnxscript and onnxruntime"
        )
    return differences[0]
