"""eval.py: lm-evaluation-harness on tasks of local files, against the model's own numbers one text at a time."""

import json
import math

import pytest
import torch

import prepare
import sample
from model import RWKV, RWKVConfig

pytest.importorskip("lm_eval")
ROWS = [
    {
        "question": f"{a} + {b} =",
        "choices": [f" {a + b}", f" {a - b}", f" {a + b + 10}"],
        "answer": (a + b) % 3,
        "text": f"{a} and {b}",
    }
    for a in range(4)
    for b in range(1, 4)
]
COMMON = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
TASKS = {
    "choose": """task: choose
output_type: multiple_choice
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}]
""",
    "write": """task: write
output_type: generate_until
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: ["7"], max_gen_toks: 12}}
metric_list: [{{metric: exact_match}}]
""",
    "roll": """task: roll
output_type: loglikelihood_rolling
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: byte_perplexity}}]
""",
}


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.manual_seed(0)
    model, tokenizer = RWKV(RWKVConfig("x070", 2, 64, 257)), prepare.load_tokenizer("bytes")
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    model.save_pretrained(tmp_path / "m.pth")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for name, text in TASKS.items():
        (tmp_path / f"{name}.yaml").write_text((COMMON + text).format(data=tmp_path / "rows.jsonl"))
    return tmp_path, model.eval(), tokenizer


def logp(model, tokenizer, context, text):
    """alone, token by token"""
    ids, state, total, greedy = (
        [0, *tokenizer.encode(context)] if not context else tokenizer.encode(context),
        None,
        0.0,
        True,
    )
    rest = tokenizer.encode(text)
    for i, token in enumerate(ids + rest):
        if i >= len(ids):
            total += logits.log_softmax(-1)[token].item()
            greedy &= logits.argmax().item() == token
        with torch.no_grad():
            logits, state = model(torch.tensor([[token]]), state)
        logits = logits[0, -1].float()
    return total, greedy


def test_three_kinds_of_tasks(files):
    import eval

    folder, model, tokenizer = files
    got = eval.main(
        eval.Config(
            model=str(folder / "m.pth"),
            tasks=("choose", "write", "roll"),
            include_path=str(folder),
            tokenizer="bytes",
            device="cpu",
        )
    )
    right = [
        max(range(3), key=lambda i: logp(model, tokenizer, row["question"], row["choices"][i])[0])
        == row["answer"]
        for row in ROWS
    ]
    assert got["results"]["choose"]["acc,none"] == pytest.approx(sum(right) / len(right))
    for row, said in zip(ROWS, got["samples"]["choose"]):
        for text, ((value, greedy),) in zip(row["choices"], said["resps"]):
            assert (float(value), greedy in (True, "True")) == (
                pytest.approx(logp(model, tokenizer, row["question"], text)[0], abs=1e-4),
                logp(model, tokenizer, row["question"], text)[1],
            )
    nats = sum(logp(model, tokenizer, "", row["text"])[0] for row in ROWS)
    size = sum(len(row["text"]) for row in ROWS)
    assert got["results"]["roll"]["byte_perplexity,none"] == pytest.approx(
        math.exp(-nats / size), rel=1e-4
    )
    for row, said in zip(ROWS, got["samples"]["write"]):
        (alone,) = sample.generate(
            model,
            [tokenizer.encode(row["question"])],
            temperature=0,
            max_new_tokens=12,
            stop=("7",),
            tokenizer=tokenizer,
        )
        assert said["resps"][0][0] == alone.text and "7" not in alone.text


def test_a_greedy_continuation_is_seen(files):
    import eval

    folder, model, tokenizer = files
    lm = eval.adapter(model, tokenizer)
    (best,) = sample.generate(
        model, [tokenizer.encode("1 + 1 =")], temperature=0, max_new_tokens=3, tokenizer=tokenizer
    )
    (_, yes), (_, no) = lm._loglikelihood_tokens(
        [
            (None, tokenizer.encode("1 + 1 ="), best.tokens),
            (None, tokenizer.encode("1 + 1 ="), [9, 9]),
        ]
    )
    assert yes and not no
