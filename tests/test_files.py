"""Files that appear whole or not at all."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from helpers import ROOT

from gosling import files
from gosling.config import UserError


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
