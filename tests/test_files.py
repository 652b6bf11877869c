"""Files that appear whole or not at all."""

import datetime
import enum
import json
import os
import subprocess
import sys
import zipfile
from dataclasses import dataclass

from gosling import files, schemas
from gosling.config import UserError

import numpy as np
import pytest
import torch
from helpers import ROOT


@dataclass
class Pickled:
    lr: float = 1.0


def test_atomic_write_keeps_the_old_file_on_any_failure(tmp_path):
    path = tmp_path / "x" / "f"
    with files.atomic_write(path) as tmp:
        tmp.write_text("old")
        tmp.chmod(0o600)
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    with pytest.raises(ZeroDivisionError), files.atomic_write(path) as tmp:
        tmp.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old" and [f.name for f in path.parent.iterdir()] == ["f"]
    with (
        pytest.raises(UserError, match="cannot write .*f/g: "),
        files.atomic_write(path / "g") as tmp,
    ):
        tmp.write_text("under a file")


def test_what_a_killed_process_left_goes_with_the_next_write(tmp_path):
    pid = subprocess.Popen([sys.executable, "-c", ""])
    pid.wait()
    left, others = tmp_path / f".a[1].json.{pid.pid}.gosling.tmp", tmp_path / ".b.json.1.tmp"
    alive = tmp_path / f".a[1].json.{os.getppid()}.gosling.tmp"
    for path in (left, others, alive):
        path.write_text("half")
    files.write_json(tmp_path / "a[1].json", {})
    assert [path.exists() for path in (left, others, alive)] == [False, True, True]


def test_a_checkpoint_of_pickled_classes_is_refused(tmp_path):
    torch.save({"cfg": Pickled()}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="x.pt cannot be read"):
        files.load_torch(tmp_path / "x.pt")


def test_whole_lines_cuts_off_what_a_kill_tore(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert files.whole_lines(path) == []
    rows = [{"a": 1}, {"b": "é"}]
    files.write_jsonl(path, rows)
    with open(path, "ab") as f:
        f.write('{"c": "é'.encode()[:-1])  # half a character, too
    assert files.whole_lines(path) == rows
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == rows
    path.write_text("no json\n")
    with pytest.raises(UserError, match="rows.jsonl is not JSON Lines"):
        files.whole_lines(path)


def test_text_that_is_not_utf8_is_named_with_its_place(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin.txt is not UTF-8 text \(byte 3 is 0xe9\)"):
        files.read_text(path)
    path.write_bytes(b"\xef\xbb\xbfa\r\nb")
    assert files.read_text(path) == "a\r\nb"


def test_json_that_is_not_there_is_empty_and_a_broken_one_is_named(tmp_path):
    assert files.read_json(tmp_path / "none.json") == {}
    files.write_json(tmp_path / "a.json", {"a": [1, "é"]})
    assert files.read_json(tmp_path / "a.json") == {"a": [1, "é"]}
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(UserError, match="b.json is not JSON"):
        files.read_json(tmp_path / "b.json")


class Level(enum.IntEnum):
    HIGH = 3


@pytest.mark.parametrize(
    "value, expected",
    [
        (np.float32(0.5), 0.5),
        (np.float64(0.5), 0.5),
        (np.bool_(True), True),
        (np.str_("a"), "a"),
        (np.arange(4).reshape(2, 2), [[0, 1], [2, 3]]),
        (torch.tensor(1.5, requires_grad=True), 1.5),
        ([torch.tensor([1, 2]), None], [[1, 2], None]),
        (datetime.datetime(2026, 1, 2, 3), "2026-01-02T03:00:00"),
        (np.datetime64("2026-01-02"), "2026-01-02"),
        ({"a": (1, {"b": Level.HIGH})}, {"a": [1, {"b": 3}]}),
        (np.array([{"a": np.int64(1)}], dtype=object), [{"a": 1}]),
    ],
)
def test_what_users_bring_is_made_primitive(value, expected):
    made = files.primitive(value, "x")
    assert made == expected and type(made) is type(expected)
    assert json.loads(json.dumps(made)) == expected


def test_what_cannot_be_primitive_is_refused_with_its_place():
    row = {"prompt": "hi", "images": [b"PNG"]}
    with pytest.raises(UserError, match=r"^row 3\['images'\]\[0\] is a bytes; expected numbers"):
        files.primitive(row, "row 3")
    with pytest.raises(UserError, match=r"^x has the key \(1, 2\); expected text"):
        files.primitive({(1, 2): 3}, "x")


def test_a_digest_is_of_content_and_sees_the_end_of_a_large_file(tmp_path):
    (tmp_path / "a").mkdir()
    for path in (tmp_path / "a" / "x", tmp_path / "y"):
        path.write_bytes(b"one")
    assert files.digest(tmp_path / "a") == files.digest(tmp_path / "y")
    large = tmp_path / "large"
    with open(large, "wb") as f:
        f.truncate(files.SAMPLE * (files.PARTS + 9) + 5)
    before = files.digest(large)
    with open(large, "r+b") as f:
        f.seek(-1, os.SEEK_END)
        f.write(b"x")
    assert files.digest(large) != before and before.startswith("76,546,053 bytes")


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path):
    """In a second process that may not write files above 200 kB."""
    files.save_torch({"a": torch.zeros(1000)}, tmp_path / "last.pt")
    code = f"""
import resource, signal, sys, torch
from gosling import config, files
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
sys.excepthook = config.one_line_errors
files.save_torch({{"a": torch.ones(1000_000)}}, {str(tmp_path / "last.pt")!r})
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (
        done.returncode == 1
        and done.stderr.startswith("error: cannot write")
        and done.stderr.count("\n") == 1
    ), done.stderr
    assert torch.equal(torch.load(tmp_path / "last.pt", weights_only=True)["a"], torch.zeros(1000))
    assert [f.name for f in tmp_path.iterdir()] == ["last.pt"]


def test_a_picture_that_cannot_be_written_ends_nothing(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with files.figure(tmp_path / "file/metrics.png") as ax:
        ax.plot([1, 2])
    assert "no " in capsys.readouterr().out
    with files.figure(tmp_path / "metrics.png") as ax:
        ax.plot([1, 2])
    assert (tmp_path / "metrics.png").read_bytes().startswith(b"\x89PNG")


def test_a_name_that_is_not_utf8_goes_through_json(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    files.write_json(tmp_path / "a.json", {"out_dir": name})
    assert files.read_json(tmp_path / "a.json") == {"out_dir": name}


class Kind(schemas.Note):
    step: int
    names: list[str] = []


@pytest.mark.parametrize(
    "text, words",
    [
        ("[1]", "a.json: it is .1.; expected a valid dictionary or instance of Kind"),
        ("{}", "a.json: step is missing"),
        ('{"step": "3"}', "a.json: step is '3'; expected a valid integer"),
        ('{"step": 3, "names": ["a", 5]}', "a.json: names.1 is 5; expected a valid string"),
        ("[" * 100_000, "a.json is not JSON"),
        ("9" * 5000, "a.json is not JSON"),
    ],
)
def test_a_json_file_of_another_kind_is_refused_by_the_place(text, words, tmp_path):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=f"{words}.*mend or remove it"):
        files.read_json(tmp_path / "a.json", Kind)


def test_lines_of_another_kind_are_refused_by_the_number(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"step": 1}\n{"step": null}\n')
    with pytest.raises(UserError, match="a.jsonl:2: step is None; expected a valid integer"):
        files.whole_lines(path, Kind)
    path.write_text('{"step": 1}\n5\n')
    with pytest.raises(UserError, match="a.jsonl:2: it is 5; expected a valid dict"):
        files.whole_lines(path)


def test_a_pth_whose_records_are_packed_is_refused_before_they_take_memory(tmp_path):
    torch.save({"a": torch.zeros(2**20)}, tmp_path / "a.pth")
    with (
        zipfile.ZipFile(tmp_path / "a.pth") as whole,
        zipfile.ZipFile(tmp_path / "b.pth", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in whole.namelist():
            packed.writestr(name, whole.read(name))
    with pytest.raises(UserError, match="b.pth cannot be read .*its records are packed"):
        files.load_torch(tmp_path / "b.pth")
