"""eval.py: lm-evaluation-harness on tasks of local files, against one text at a time."""

import json
import math

import pytest
import torch
from helpers import random_model

from gosling.engine import generate
from gosling.tokenizer import load_tokenizer

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
    model, tokenizer = (
        random_model("x070", n_layer=2, n_embd=64, vocab_size=257),
        load_tokenizer("bytes"),
    )
    model.save_pretrained(tmp_path / "m.pth")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for name, text in TASKS.items():
        (tmp_path / f"{name}.yaml").write_text((COMMON + text).format(data=tmp_path / "rows.jsonl"))
    return tmp_path, model.eval(), tokenizer


@torch.no_grad()
def logp(model, tokenizer, context, text):
    """(log-probability of text after context, whether it is the greedy one), token by token."""
    context_ids, ids = tokenizer.encode(context) or [0], tokenizer.encode(text)
    total, greedy = 0.0, True
    logits, state = model(torch.tensor([context_ids]))
    for token in ids:
        total += logits[0, -1].log_softmax(-1)[token].item()
        greedy &= logits[0, -1].argmax().item() == token
        logits, state = model(torch.tensor([[token]]), state)
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
    for row, answer in zip(ROWS, got["samples"]["choose"], strict=True):
        for text, ((value, greedy),) in zip(row["choices"], answer["resps"], strict=True):
            want, is_greedy = logp(model, tokenizer, row["question"], text)
            assert float(value) == pytest.approx(want, abs=1e-4)
            assert (greedy in (True, "True")) == is_greedy
    nats = sum(logp(model, tokenizer, "", row["text"])[0] for row in ROWS)
    size = sum(len(row["text"]) for row in ROWS)
    assert got["results"]["roll"]["byte_perplexity,none"] == pytest.approx(
        math.exp(-nats / size), rel=1e-4
    )
    for row, answer in zip(ROWS, got["samples"]["write"], strict=True):
        (alone,) = generate(
            model,
            [tokenizer.encode(row["question"])],
            temperature=0,
            max_new_tokens=12,
            stop=("7",),
            tokenizer=tokenizer,
        )
        assert answer["resps"][0][0] == alone.text and "7" not in alone.text


def test_a_greedy_continuation_is_seen(files):
    import eval

    folder, model, tokenizer = files
    lm = eval.adapter(model, tokenizer)
    (best,) = generate(
        model, [tokenizer.encode("1 + 1 =")], temperature=0, max_new_tokens=3, tokenizer=tokenizer
    )
    (_, yes), (_, no) = lm._loglikelihood_tokens(
        [
            (None, tokenizer.encode("1 + 1 ="), best.tokens),
            (None, tokenizer.encode("1 + 1 ="), [9, 9]),
        ]
    )
    assert yes and not no
