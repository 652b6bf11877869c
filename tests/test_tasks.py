"""The task family: every rule by hand, the checker's strictness, the split, the files."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import tasks
from gosling.config import UserError

import pytest

ROOT = Path(tasks.__file__).parent

EXAMPLES = {  # worked out by hand
    "reverse bdac": "cadb",
    "sort bdaca": "aabcd",
    "upper lfka": "LFKA",
    "next abl": "bcm",
    "double abca": "aabbccaa",
    "replace a by f in abca": "fbcf",
    "remove a in abcab": "bcb",
    "rotate abcd": "bcda",
    "shift abcd": "bcda",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """{name: rows} of a small run of the command line."""
    out = tmp_path_factory.mktemp("tasks") / "deep" / "t"
    flags = [f"--out={out}", "--text_tokens=200_000", "--heldout=150", "--prompts=400"]
    command = [sys.executable, ROOT / "tasks.py", *flags]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    read = {
        p.stem[2:]: [json.loads(line) for line in p.read_text().splitlines()]
        for p in out.parent.glob("t_*.jsonl")
    }
    assert len(list(out.parent.iterdir())) == len(read) == len(printed.splitlines())
    return read


def task_of(row):
    return (row.get("prompt") or row["messages"])[0]["content"]


def text_lines(rows):
    """(task, the answer as shown, "ok", "no" or None) of every line of the pretraining text."""
    for row in rows:
        for line in row["text"].split("\n"):
            m = re.fullmatch(r"(check )?([a-z ]+) = (\w+)(?: : (ok|no))?", line)
            assert m and bool(m[1]) == bool(m[4]), line
            yield m[2], m[3], m[4]


# ----------------------------------------------------------------------------------------------
# rules and checker


@pytest.mark.parametrize("task, answer", EXAMPLES.items())
def test_rules_by_hand(task, answer):
    assert tasks.solve(task) == answer
    for text in (answer, " " + answer, f"  {answer}\n"):
        assert tasks.check(task, text)


@pytest.mark.parametrize("task, answer", EXAMPLES.items())
def test_checker_rejects(task, answer):
    wrong = [
        "",
        " ",
        answer[:-1],
        answer + "a",
        answer[0] + answer,
        answer.swapcase(),
        answer[:2] + " " + answer[2:],
        answer + ".",
        answer + " " + answer,
        f"The answer is {answer}",
        task,
        answer + "\n\nUser: " + task,
    ]
    assert not [text for text in wrong if tasks.check(task, text)]


def test_every_skill_is_in_the_examples():
    assert {task.split()[0] for task in EXAMPLES} == {*tasks.ALL_SKILLS, tasks.UNSEEN}
    assert tasks.UNSEEN not in tasks.ALL_SKILLS


NO_TASKS = [
    "",
    "reverse",
    "sing abc",
    "reverse ab cd",
    "replace a by f in",
    " reverse abc",
    "reverse  abc",
]


@pytest.mark.parametrize("text", NO_TASKS)
def test_what_is_no_task_is_an_error(text):
    with pytest.raises(ValueError, match="is not a task"):
        tasks.check(text, "abc")


@pytest.mark.parametrize("skill", tasks.ALL_SKILLS)
def test_generated_tasks(skill):
    rng, seen = random.Random(1), []
    for _ in range(300):
        task, answer = tasks.make_task(skill, rng)
        assert (
            tasks.check(task, answer)
            and re.fullmatch(r"\w+", answer)
            and not tasks.is_held_out(task)
        )
        assert len(answer) <= 12
        seen.append(task)
        if skill in ("replace", "remove"):
            assert task.split()[1] in task.split()[-1] and answer != task.split()[-1]
    assert {len(t.split()[-1]) for t in seen} >= {4, 5, 6} and len(set(seen)) > 250


@pytest.mark.parametrize("word", ["abcd", "AABB", "ab", "a", "aaaa"])
def test_a_slip_is_one_wrong_letter(word):
    rng = random.Random(2)
    slips = {tasks.corrupt(word, rng) for _ in range(300)}
    assert word not in slips and "" not in slips
    for slip in slips:
        assert abs(len(slip) - len(word)) <= 1 and slip.isupper() == word.isupper()
        if len(slip) == len(word):  # changed: one place; swapped: the same letters
            assert sum(a != b for a, b in zip(slip, word, strict=True)) == 1 or sorted(
                slip
            ) == sorted(word)


# ----------------------------------------------------------------------------------------------
# the split


def test_the_split_never_moves():
    held = [
        "reverse hhdif",
        "sort jggfakgc",
        "upper gkcdlfl",
        "double eec",
        "replace f by e in bfddbfff",
        "rotate gbaakjje",
    ]
    kept = [
        "rotate kfhbhkgi",
        "sort ljdhilfd",
        "replace j by c in kkjeffj",
        "reverse lkefgh",
        "double idgg",
        "next gehhaakd",
        "sort blgjac",
        "rotate kbbcl",
        "next dbfhfeak",
    ]  # crc32 % 10 = 1 .. 9
    assert all(map(tasks.is_held_out, held)) and not any(map(tasks.is_held_out, kept))


def test_no_held_out_task_is_trained_on(files):
    trained = {task for task, _, _ in text_lines(files["text"])}
    trained |= {task_of(row) for name in ("sft", "prompts", "unseen") for row in files[name]}
    measured = {task_of(row) for name in ("heldout", "unseen_heldout") for row in files[name]}
    assert len(trained) > 4000 and not any(map(tasks.is_held_out, trained))
    assert len(measured) == 300 and all(map(tasks.is_held_out, measured))


def test_prompts_are_disjoint_by_split_and_differ_by_seed():
    one, two, held = (
        set(map(task_of, tasks.prompts(210, *a))) for a in ((0,), (1,), (0, tasks.SKILLS, True))
    )
    assert len(one) == len(two) == len(held) == 210
    assert not one & held and len(one & two) < 5
    assert tasks.prompts(50, 0) == tasks.prompts(210, 0)[:50] == tasks.prompts(50, 0)


# ----------------------------------------------------------------------------------------------
# the files


def test_chat_files(files):
    assert {name: len(rows) for name, rows in files.items() if name != "text"} == dict(
        sft=500, sft_val=200, prompts=400, heldout=150, unseen=400, unseen_heldout=150
    )
    for name in ("sft", "sft_val", "unseen"):
        for row in files[name]:
            ((user, reply),) = row.values()
            assert list(row) == ["messages"] and (user["role"], reply["role"]) == (
                "user",
                "assistant",
            )
            assert (
                tasks.check(user["content"], reply["content"])
                and reply["content"] == reply["content"].strip()
            )
    for name in ("prompts", "heldout", "unseen_heldout"):
        for row in files[name]:
            assert list(row) == ["prompt", "skill", "answer"] and [
                m["role"] for m in row["prompt"]
            ] == ["user"]
            assert (
                tasks.check(task_of(row), row["answer"]) and task_of(row).split()[0] == row["skill"]
            )
    for name, rows in files.items():
        skills = {tasks.UNSEEN} if name.startswith("unseen") else set(tasks.SKILLS)
        assert name == "text" or {task_of(row).split()[0] for row in rows} == skills
        assert name == "text" or len(set(map(task_of, rows))) == len(rows)


def test_pretraining_text(files):
    lines = list(text_lines(files["text"]))
    assert 200_000 <= sum(len(row["text"]) + 1 for row in files["text"]) < 201_000
    assert {len(row["text"].split("\n")) for row in files["text"]} == set(range(1, 9))
    for task, shown, verdict in lines:
        assert tasks.check(task, shown) == (verdict != "no"), (task, shown, verdict)
    share = {v: sum(verdict == v for *_, verdict in lines) / len(lines) for v in (None, "ok", "no")}
    assert (
        abs(share[None] - 0.7) < 0.02
        and abs(share["ok"] - 0.15) < 0.02
        and abs(share["no"] - 0.15) < 0.02
    )
    assert {task.split()[0] for task, *_ in lines} == set(tasks.ALL_SKILLS)  # UNSEEN is not there


def test_same_seed_same_bytes_other_seed_others(tmp_path):
    small = dict(text_tokens=5_000, sft=20, prompts=20, heldout=20, unseen=20)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        tasks.main(tasks.Config(out=str(tmp_path / name), seed=seed, **small))
    for a in tmp_path.glob("a_*"):
        b, c = (a.with_name(a.name.replace("a_", other, 1)).read_bytes() for other in ("b_", "c_"))
        assert a.read_bytes() == b != c


def test_report():
    rows = tasks.prompts(14, 0)
    text = tasks.report(
        [(row, " " + row["answer"] if i else " nonsense") for i, row in enumerate(rows)]
    )
    assert re.search(r"^reverse +0\.500 of 2$", text, re.M) and re.search(
        r"^sort +1\.000 of 2$", text, re.M
    )
    assert re.search(r"^all +0\.929 of 14$", text, re.M)
    assert text.count(" -> ") == 10 and f"'nonsense', should be '{rows[0]['answer']}'" in text


def test_the_tiny_config_reads_no_window_twice():
    import train_pretrain
    from gosling.config import load_config

    cfg = load_config(train_pretrain.Config, [str(ROOT / "config/pretrain_tasks.py")])
    assert cfg.max_steps * cfg.global_bsz * cfg.ctx_len < 0.99 * tasks.Config().text_tokens


def test_pairs_are_one_right_and_one_wrong_answer(tmp_path, capsys):
    samples, rows = tmp_path / "samples.jsonl", tasks.prompts(20, 0)
    for row in rows:
        row["completions"] = [{"text": " " + row["answer"]}, "", row["answer"] + "x", row["answer"]]
    rows[3]["completions"] = ["wrong"]
    samples.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tasks.pairs(tasks.PairsConfig(str(samples), out=str(tmp_path / "p")))
    assert re.findall(r"([0-9]+) pairs", capsys.readouterr().out) == ["17", "2"]
    for name in ("p.jsonl", "p_val.jsonl"):
        for line in (tmp_path / name).read_text(encoding="utf-8").splitlines():
            pair = json.loads(line)
            assert list(pair) == ["prompt", "chosen", "rejected", "skill"]
            assert tasks.is_right(pair, pair["chosen"])
            assert pair["rejected"] and not tasks.is_right(pair, pair["rejected"])


def test_exact_match_asks_the_held_out_tasks(monkeypatch, capsys):
    from gosling import engine
    from gosling.tokenizer import load_tokenizer

    tokenizer, asked = load_tokenizer("bytes"), []

    def generate(model, prompts, **options):
        """A model that always answers as it should, but for the first task."""
        completions = []
        for ids in prompts:
            text = tokenizer.decode(ids)
            task = text.removeprefix("User: ").removesuffix("\n\nAssistant:")
            answer = tasks.solve(task) if asked else "?"
            asked.append(task)
            completions.append(SimpleNamespace(text=" " + answer))
        return completions

    monkeypatch.setattr(engine, "generate", generate)
    assert tasks.exact_match(None, tokenizer, rows=20) == {"exact_match": 0.95}
    assert all(map(tasks.is_held_out, asked)) and len(set(asked)) == 20
    assert "all       0.950 of 20" in capsys.readouterr().out
    asked.clear()
    tasks.exact_match(None, tokenizer, skills=[tasks.UNSEEN], rows=20)
    assert {task.split()[0] for task in asked} == {tasks.UNSEEN}


@pytest.mark.parametrize(
    "change, words",
    [
        ({"completions": None}, "completions is None; expected a valid list"),
        ({"completions": [{"text": 5}]}, "completions.0.* is .*5.*; expected a valid"),
        ({"prompt": []}, "prompt is ..; List should have at least 1 item"),
        ({"prompt": [{"content": 5}]}, "prompt.0.content is 5; expected a valid string"),
        ({"prompt": [{"content": "hello"}]}, "'hello' is not a task"),
        ({"skill": 1}, "skill is 1; expected a valid string"),
    ],
)
def test_rows_that_are_no_samples_are_lines_with_their_place(change, words, tmp_path):
    row = {"prompt": [{"role": "user", "content": "upper abc"}], "skill": "upper"}
    row["completions"] = [{"text": "ABC"}, "abc"]
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row | change) + "\n")
    with pytest.raises(UserError, match=f"a.jsonl:2: .*{words}"):
        tasks.pairs(tasks.PairsConfig(str(tmp_path / "a.jsonl"), str(tmp_path / "p")))
