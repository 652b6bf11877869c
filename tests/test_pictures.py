"""runs/report.py and runs/pictures.py: the page and the pictures of a ladder that stopped early."""

import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import tasks
from runs import demo, pictures, report

import pytest
from helpers import random_model, write

RESULT = {"what": "w", "metric": "exact_match", "is_control": False, "before": 0.1, "after": 0.4}
VOID = {"meta", "!doctype", "br", "img", "link"}


class Tags(HTMLParser):
    """Notes tags that are closed in another order than they were opened."""

    def __init__(self):
        super().__init__()
        self.open, self.wrong = [], []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open and self.open[-1] in ("p", "li", "td", "tr") and self.open[-1] != tag:
            self.open.pop()
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)


def numbers_in(svg):
    """The texts of a picture that are numbers with two digits behind the point."""
    return re.findall(r">\s*(-?\d\.\d\d)\s*<", svg)


def test_bars_have_the_mean_of_the_runs():
    rows = [{**RESULT, "stage": "sft", "after": value} for value in (0.4, 0.5, 0.9)]
    rows.append({**RESULT, "stage": "pretrain", "metric": "val_loss"})  # not a share: no bar
    rows.append({**RESULT, "stage": "more", "is_control": True, "before": None, "after": 0.25})
    svg = pictures.ladder_svg(rows)
    ET.fromstring(svg)
    assert numbers_in(svg)[-2:] == ["0.60", "0.25"]
    assert pictures.CONTROL in svg and "pretraining" not in svg
    assert svg == pictures.ladder_svg(rows)  # the same file of the same numbers


def test_a_curve_has_what_was_logged_and_nothing_else(tmp_path):
    rows = [{"step": step, "loss": 1 / step, "lr": 1.0} for step in (1, 2, 3)]
    write(tmp_path / "metrics.jsonl", *rows)
    svg = pictures.curve_svg(pictures.metrics_of(tmp_path), "sft")
    ET.fromstring(svg)
    assert "loss" in svg and "val_loss" not in svg
    assert pictures.curve_svg([], "sft") is None


def test_rounds_of_self_rewarding_and_their_judge(tmp_path):
    """A stage that trains a judge measures no answers."""
    for name, done in (("00-start", 0.2), ("01-train_judge", None), ("02-self_reward", 0.3)):
        (tmp_path / name).mkdir()
        found = {"eval": {"exact_match": done}} if done else {"stage": name}
        (tmp_path / name / "done.json").write_text(json.dumps(found))
    points = [(row["step"], row["exact_match"]) for row in pictures.metrics_of(tmp_path)]
    assert points == [(0, 0.2), (1, 0.3)]


@pytest.mark.parametrize("version", ["x070", "x060"])
def test_the_report_of_a_small_ladder(version, tmp_path):
    """Two models; what they answer is in the page, and marked as the checker says."""
    stages = demo.ladder(demo.Config("quick", version))
    for name in ("pretrain", "sft"):
        model = random_model(version, n_layer=1, n_embd=64, vocab_size=257)
        (tmp_path / name).mkdir()
        model.save_pretrained(tmp_path / name / "rwkv-final.pth")
        (tmp_path / name / "config.json").write_text('{"tokenizer": "bytes"}')
        write(tmp_path / name / "metrics.jsonl", {"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0})
    write(tmp_path / "results.jsonl", {**RESULT, "stage": "sft"})
    logs = {stage.name: f"<log of {stage.name}> & more" for stage in stages}
    report.write_report(stages, tmp_path, "a title & more", logs)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(page)
    assert not tags.wrong
    assert "&lt;log of sft&gt; &amp; more" in page and "a title &amp; more" in page
    rows = report.held_out_tasks()
    assert len(rows) == 10 and all(tasks.is_held_out(r["prompt"][-1]["content"]) for r in rows)
    found = report.answers(["pretrain", "sft", "grpo"], tmp_path, rows)
    assert list(found) == ["pretrain", "sft"]
    right = sum(
        tasks.is_right(row, text)
        for texts in found.values()
        for row, text in zip(rows, texts, strict=True)
    )
    assert page.count("✓") == right and page.count("✗") == 20 - right
    for stage in stages:
        assert page.count(f"<h2>{stage.what}</h2>") == 1


def test_right_answers_are_marked_right(tmp_path, monkeypatch):
    rows = report.held_out_tasks()
    said = [row["answer"] for row in rows[:9]] + ["<b>"]
    monkeypatch.setattr(report, "answers", lambda *_: {"sft": said})
    table = report.answers_table(demo.ladder(demo.Config("quick")), tmp_path)
    assert (table.count("✓"), table.count("✗")) == (9, 1) and "&lt;b&gt;" in table
