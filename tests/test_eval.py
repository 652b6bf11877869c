"""eval.py: lm-evaluation-harness on tasks of local files, against one text at a time."""

import json
import math
import threading

import export
import sample
from gosling import serve
from gosling.config import UserError, read_flags
from gosling.data import render_chat
from gosling.engine import generate
from gosling.tokenizer import load_tokenizer

import pytest
import torch
from helpers import random_model

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


@pytest.mark.parametrize(
    "kwargs, want",
    [
        ({}, dict(max_new_tokens=256, temperature=0.0, stop=[], top_p=1.0, top_k=0)),
        ({"max_gen_toks": 3, "max_new_tokens": 5}, dict(max_new_tokens=3)),
        ({"max_gen_toks": None, "max_new_tokens": 5}, dict(max_new_tokens=5)),
        ({"max_tokens": "7"}, dict(max_new_tokens=7)),
        ({"max_completion_tokens": 12.0}, dict(max_new_tokens=12)),
        ({"until": ""}, dict(stop=[])),
        ({"until": None}, dict(stop=[])),
        ({"until": "7"}, dict(stop=["7"])),
        ({"until": [" ", "", "7"]}, dict(stop=[" ", "7"])),
        ({"temperature": "0.8", "top_p": "0.9"}, dict(temperature=0.8, top_p=0.9)),
        ({"do_sample": True}, dict(temperature=1.0)),
        ({"do_sample": True, "temperature": 0.0}, dict(temperature=0.0)),
        ({"do_sample": False, "temperature": 0.7}, dict(temperature=0.0)),
        ({"do_sample": True, "top_k": -1, "top_p": 1}, dict(top_k=0, top_p=1.0)),
        ({"do_sample": True, "top_k": "40", "min_p": 0.1}, dict(top_k=40, min_p=0.1)),
        ({"do_sample": "false", "temperature": 0.7}, dict(temperature=0.0)),
        ({"do_sample": "True"}, dict(temperature=1.0)),
        ({"do_sample": 1, "temperature": "0.5"}, dict(temperature=0.5)),
        ({"temperature": 0.0, "top_p": 0, "top_k": 5}, dict(temperature=0.0, top_p=1.0, top_k=0)),
    ],
)
def test_generation_kwargs_are_read_as_the_harness_does(kwargs, want):
    import eval

    got = eval.sampling_of(kwargs)
    assert {key: got[key] for key in want} == want


@pytest.mark.parametrize(
    "kwargs, words",
    [
        ({"max_gen_toks": "many"}, "max_gen_toks='many': expected a number"),
        ({"max_tokens": 0}, "max_tokens=0: expected 1 or more"),
        ({"max_new_tokens": float("nan")}, "max_new_tokens=nan: expected a number"),
        ({"temperature": "hot"}, "temperature='hot': expected a number"),
        ({"do_sample": True, "top_p": [0.9]}, "top_p=.0.9.: expected a number"),
        ({"do_sample": "perhaps"}, "do_sample='perhaps': expected true or false"),
        ({"until": 7}, "until=7: expected text"),
        ({"until": ["a", 7]}, "until=.*7.: expected text"),
    ],
)
def test_generation_kwargs_that_make_no_sense_are_named(kwargs, words):
    import eval

    with pytest.raises(UserError, match=f"generation_kwargs {words}"):
        eval.sampling_of(kwargs)


@pytest.mark.parametrize(
    "old, new, words",
    [
        ("{data}", "no.jsonl", "FileNotFoundError"),
        ("{{{{question}}}}", "{{{{asked.of}}}}", "UndefinedError: 'asked' is undefined"),
        ("test_split: test", "test_split: dev", "KeyError: 'dev'"),
        ("exact_match", "no_such_metric", "KeyError"),
    ],
    ids=["no data", "a column that is not there", "no such split", "no such metric"],
)
def test_what_the_harness_makes_nothing_of_is_a_line_with_the_task(old, new, words, files):
    import eval

    folder, _, _ = files
    text = (COMMON + "task: broken\n" + TASKS["write"].split("\n", 1)[1]).replace(old, new)
    (folder / "broken.yaml").write_text(text.format(data=folder / "rows.jsonl"))
    cfg = eval.Config(
        model=str(folder / "m.pth"),
        tasks=("broken",),
        include_path=str(folder),
        tokenizer="bytes",
        device="cpu",
    )
    with pytest.raises(UserError, match=f"the harness cannot run broken: {words}") as e:
        eval.main(cfg)
    assert "\n" not in str(e.value)


def test_an_error_of_our_own_keeps_its_traceback(files, monkeypatch):
    import eval

    def broken(*args):
        raise KeyError("ours")

    folder, _, _ = files
    monkeypatch.setattr(eval, "score_continuations", broken)
    with pytest.raises(KeyError, match="ours"):
        eval.main(
            eval.Config(
                model=str(folder / "m.pth"),
                tasks=("choose",),
                include_path=str(folder),
                tokenizer="bytes",
                device="cpu",
            )
        )


def test_generation_kwargs_act_and_what_is_unknown_is_said(files, capsys):
    import eval

    from lm_eval.api.instance import Instance

    _, model, tokenizer = files
    lm = eval.adapter(model, tokenizer)

    def ask(text, kwargs, times=1):
        request = Instance(request_type="generate_until", doc={}, arguments=(text, kwargs), idx=0)
        return lm.generate_until([request] * times)

    greedy = ask("1 + 1 =", {"max_new_tokens": 6})
    for kwargs in ({"top_p": 1e-9}, {"top_k": 1}):
        assert ask("1 + 1 =", {"max_tokens": 6, "temperature": 1.0, **kwargs}) == greedy
    assert len(set(ask("1 + 1 =", {"do_sample": True, "max_gen_toks": 6}, times=4))) > 1
    (alone,) = generate(
        model, [[0]], temperature=0, max_new_tokens=6, tokenizer=tokenizer
    )  # an empty context is the token that begins a document
    assert ask("", {"max_gen_toks": 6, "until": [""], "num_beams": 1}) == [alone.text]
    assert "generation_kwargs num_beams are not used" in capsys.readouterr().err
    with pytest.raises(UserError, match="a task's text is not UTF-8"):
        ask("hello \ud83d", {"max_gen_toks": 6})


def test_empty_texts_and_pairs_that_merge(files):
    """Empty texts score 0. A pair whose border lies in a token of World loses no character."""
    import eval

    from lm_eval.api.instance import Instance

    _, model, tokenizer = files
    lm = eval.adapter(model, tokenizer)

    def requests(kind, *arguments):
        return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]

    rolled = lm.loglikelihood_rolling(requests("loglikelihood_rolling", ("abc",), ("",)))
    assert rolled[0] == pytest.approx(logp(model, tokenizer, "", "abc")[0], abs=1e-4)
    assert rolled[1] == 0
    assert lm.loglikelihood_rolling(requests("loglikelihood_rolling", ("",))) == [0]
    pairs = [("sort", "abc"), ("sort", ""), ("", "abc"), ("", ""), ("   ", "abc"), ("a ", "b")]
    got = lm.loglikelihood(requests("loglikelihood", *pairs))
    whole = [("sort", "abc"), ("sort", ""), ("", "abc"), ("", ""), ("", "   abc"), ("a", " b")]
    for (value, greedy), (context, text) in zip(got, whole, strict=True):
        want, is_greedy = logp(model, tokenizer, context, text)
        assert value == pytest.approx(want, abs=1e-4) and greedy == is_greedy
    world = load_tokenizer("world")
    for context, text in (
        ("the", "re"),
        ("Answer: 1", "0"),
        ("Q:", " A"),
        ("Q: ", "A"),
        (".", "\n"),
    ):
        ids = eval.encode_pair(world, context, text)
        assert world.decode(ids[0] + ids[1]) == context + text and ids[1]
    assert eval.encode_pair(world, "the", "re") == (world.encode("the"), world.encode("re"))
    assert eval.encode_pair(world, "Q: ", "A") == (world.encode("Q:"), world.encode(" A"))


def test_tasks_limits_and_results(files, capsys):
    import eval

    folder, _, _ = files
    common = [f"--model={folder / 'm.pth'}", f"--include_path={folder}", "--tokenizer=bytes"]
    common += ["--device=cpu"]

    def run(*flags):
        return eval.main(read_flags(eval.Config, [*common, *flags]))

    got = run(
        "--tasks", "choose,roll", "wri*", "--limit=0.25", f"--out={folder / 'out' / 's.json'}"
    )
    assert set(got["results"]) == {"choose", "roll", "write"}
    assert {count["effective"] for count in got["n-samples"].values()} == {3}  # of 12
    scores = json.loads((folder / "out" / "s.json").read_text())
    assert scores["results"]["choose"]["acc,none"] == got["results"]["choose"]["acc,none"]
    assert scores["config"]["limit"] == 0.25 and "samples" not in scores
    got = run(f"--tasks={folder / 'choose.yaml'}", "--limit=2")
    assert [count["effective"] for count in got["n-samples"].values()] == [2]
    for flags, words in (
        (["--tasks=choose,rol"], "'rol' is no task; did you mean .*roll"),
        (["--tasks=,"], "names no task"),
        (["--tasks=choose", "--limit=2.5"], "limit=2.5: expected a whole number, or a share"),
        (["--tasks=choose", f"--include_path={folder / 'no'}"], "no is not a folder"),
    ):
        with pytest.raises(UserError, match=words):
            run(*flags)


def test_chat_template(files):
    """Questions become a user's turns; answers are scored behind "Assistant:" and a blank."""
    import eval

    folder, model, tokenizer = files
    config = dict(model=str(folder / "m.pth"), include_path=str(folder), tokenizer="bytes")
    got = eval.main(
        eval.Config(
            tasks=("choose", "write"),
            device="cpu",
            limit=3,
            apply_chat_template=True,
            system_instruction="Count.",
            **config,
        )
    )
    for row, chosen, written in zip(
        ROWS[:3], got["samples"]["choose"], got["samples"]["write"], strict=True
    ):
        messages = [("system", "Count."), ("user", row["question"])]
        messages = [{"role": role, "content": text} for role, text in messages]
        ids, _ = render_chat(messages, tokenizer, generation_prompt=True)
        chat = tokenizer.decode(ids)
        for text, ((value, _),) in zip(row["choices"], chosen["resps"], strict=True):
            want, _ = logp(model, tokenizer, chat, f" {text}")
            assert float(value) == pytest.approx(want, abs=1e-4)
        options = dict(temperature=0, max_new_tokens=12, stop=("7",), tokenizer=tokenizer)
        (alone,) = generate(model, [ids], **options)
        assert written["resps"][0][0] == alone.text
    assert (
        eval.chat_text(
            [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "So"}],
            tokenizer,
            False,
        )
        == "User: hi\n\nAssistant: So"
    )


def test_the_harness_through_the_server(files):
    """Its own client of OpenAI's API, with the tokenizer of the hub folder."""
    pytest.importorskip("transformers")
    pytest.importorskip("tenacity")
    import lm_eval.tasks

    folder, model, tokenizer = files
    export.main(
        ["hub", f"--model={folder / 'm.pth'}", f"--out={folder / 'hub'}", "--tokenizer=bytes"]
    )
    defaults = sample.options_of(sample.Config(), tokenizer)
    server = serve.Server(("127.0.0.1", 0), model, {"m": None}, defaults)
    thread = threading.Thread(target=server.run)
    thread.start()
    url = f"http://127.0.0.1:{server.port}/v1/completions"
    found = lm_eval.simple_evaluate(
        model="local-completions",
        model_args=dict(model="m", base_url=url, tokenizer=str(folder / "hub"), num_concurrent=4),
        tasks=list(TASKS),
        task_manager=lm_eval.tasks.TaskManager(include_path=str(folder)),
    )["samples"]
    server.should_exit = True
    thread.join()
    for row, choose, write, roll in zip(ROWS, *map(found.get, TASKS), strict=True):
        question = row["question"]
        assert choose["doc"]["question"] == write["doc"]["question"] == question
        for choice, ((total, is_greedy),) in zip(row["choices"], choose["resps"], strict=True):
            want = logp(model, tokenizer, question, choice)
            assert (total, is_greedy) == (pytest.approx(want[0], abs=1e-3), want[1])
        want = logp(model, tokenizer, "", row["text"])[0]
        assert roll["resps"][0][0] == pytest.approx(want, abs=1e-3)
        options = dict(temperature=0, max_new_tokens=12, stop=("7",), tokenizer=tokenizer)
        (want,) = generate(model, [tokenizer.encode(question)], **options)
        assert write["resps"] == [[want.text]]
