"""Files that appear whole or not at all, and files that are read with an error that names them."""

import contextlib
import datetime
import functools
import gc
import glob
import hashlib
import json
import os
import re
import shutil
import zipfile
from pathlib import Path

from gosling.config import UserError, print0

import numpy as np
import pydantic
import torch

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@contextlib.contextmanager
def atomic_write(path):
    """`with atomic_write(path) as tmp:` write to `tmp`; then it is fsynced and renamed.

    A reader, or a run killed at any moment, sees the old file or the new one, never half of one.
    A full disk leaves the old file as it was and is a UserError.
    """
    path = Path(path)
    tmp = path.with_name(f".{path.name}.{os.getpid()}.gosling.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_half_written(path.parent, path.name)
        yield tmp
        put_in_place(tmp, path)
    except (OSError, RuntimeError) as e:
        # torch.save reports a failed write as a RuntimeError of its zip writer.
        zip_writer = "PytorchStreamWriter" in str(e) or "unexpected pos" in str(e)
        if isinstance(e, RuntimeError) and not zip_writer:
            raise
        reason = getattr(e, "strerror", None) or "the write failed: is the disk full?"
        raise UserError(
            f"cannot write {path}: {reason}; what was there before is untouched. "
            "Free some space or choose another folder, then run again"
        ) from e
    finally:
        with contextlib.suppress(OSError):
            tmp.unlink(missing_ok=True)


def put_in_place(tmp, path):
    """Make `tmp` durable, give it the usual permissions (some writers do not), and rename it."""
    with open(tmp, "rb") as f:
        os.fsync(f.fileno())
    umask = os.umask(0)
    os.umask(umask)
    tmp.chmod(0o666 & ~umask)
    os.replace(tmp, path)
    sync_folder(path.parent)


def sync_folder(path):
    """Make the names in a folder durable; Windows cannot open one."""
    if hasattr(os, "O_DIRECTORY"):
        folder = os.open(path, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


@contextlib.contextmanager
def locked(path):
    """`with locked(path):` a file or folder for one process at a time; UserError in another.

    It is the system's own lock, which a process that is killed leaves, too; Windows has none.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"{path} is in use by another process; wait for its end, or choose another"
                ) from None
        yield
    finally:
        os.close(descriptor)


def seen_from(path, folder):
    """Where a file lies, as seen from a folder; links of either are followed."""
    return os.path.relpath(os.path.realpath(path), os.path.realpath(folder))


def remove_half_written(folder, name=None):
    """Delete what atomic_write left in a folder when its process died, and nothing else there.

    name: of the one file that was to be written; None = of all.
    """
    start = "*" if name is None else glob.escape(name)
    for tmp in Path(folder).glob(f".{start}.*.gosling.tmp"):
        written_by = re.fullmatch(r"\..+\.(\d+)\.gosling\.tmp", tmp.name)
        if written_by and not is_running(int(written_by[1])):
            if tmp.is_dir():  # of last.write_shares
                shutil.rmtree(tmp, ignore_errors=True)
            else:
                tmp.unlink(missing_ok=True)


def is_running(pid):
    """Whether another process of that number lives here; on Windows it is not asked, but True."""
    if pid == os.getpid():
        return False
    if os.name == "posix":
        try:
            os.kill(pid, 0)
        except (ProcessLookupError, OverflowError):
            return False
        except PermissionError:
            return True
    return True


PRIMITIVES = (bool, int, float, str)


def primitive(value, where, keep_tensors=False):
    """A value of the user's, as JSON and last.pt can hold it: numbers, text, lists, dicts, None.

    Numbers, arrays and tensors of numpy and torch become numbers and lists, dates ISO text.
    UserError, beginning with `where`, names the place of anything else. keep_tensors: torch's with
    a dimension stay what they are, for last.pt.
    """
    if keep_tensors and isinstance(value, torch.Tensor) and value.dim() > 0:
        return value
    if isinstance(value, (np.generic, np.ndarray, torch.Tensor)):
        value = value.tolist()
    if value is None or type(value) in PRIMITIVES:
        return value
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, (str, int)):
                raise UserError(f"{where} has the key {key!r}; expected text")
        return {
            key: primitive(item, f"{where}[{key!r}]", keep_tensors) for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        if all(type(item) in PRIMITIVES for item in value):  # as tokens are
            return list(value)
        return [primitive(item, f"{where}[{i}]", keep_tensors) for i, item in enumerate(value)]
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    for kind in PRIMITIVES:
        if isinstance(value, kind):  # a class of the user's, or of a library
            return kind(value)
    raise UserError(
        f"{where} is a {type(value).__name__}; expected numbers, text, dates, None, or lists and "
        "dicts of them"
    )


SAMPLE = 2**20  # bytes of a file's parts that are read for its digest
PARTS = 64


def digest(path):
    """What a file or a folder of files holds, in words: bytes, and a hash of them.

    Up to 64 MiB all is hashed, of a larger file 64 parts of 1 MiB, evenly spread.
    """
    path, hashed, n_bytes = Path(path), hashlib.blake2b(digest_size=8), 0
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        if not file.is_file():
            continue
        size = file.stat().st_size
        step = max(-(-(size - SAMPLE) // (PARTS - 1)), SAMPLE)  # rounded up: the end is read
        with open(file, "rb") as f:
            for start in range(0, size, step):
                f.seek(start)
                hashed.update(f.read(SAMPLE))
        n_bytes += size
    return f"{n_bytes:,} bytes, digest {hashed.hexdigest()}"


def save_torch(obj, path, previous=None):
    """torch.save, atomically. `obj`: tensors and primitives, so that weights_only=True reads it.

    previous: what the file that was there before is called afterwards; None = it goes.
    """
    with atomic_write(path) as tmp:
        torch.save(obj, tmp)
        if previous and Path(path).exists():
            keep_as(path, previous)


def keep_as(path, previous):
    """The file `path` under a second name, so that at no moment it is missing."""
    second = previous.with_name(f".{previous.name}.{os.getpid()}.gosling.tmp")
    try:
        os.link(path, second)
        os.replace(second, previous)
        second.unlink(missing_ok=True)  # still there if both were names of one file already
    except OSError:  # a file system without links
        os.replace(path, previous)


def load_torch(path, device="cpu", in_place=False):
    """torch.load of tensors and primitives; a file that is none is an error that names it.

    in_place: numbers are read from the file when they are used.
    """
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist")
    try:
        damage = damage_of(path)
        if damage:
            raise UserError(f"{path} cannot be read as a PyTorch file of tensors: {damage}")
        in_place = in_place and zipfile.is_zipfile(path)  # PyTorch's old format cannot be
        return torch.load(path, map_location=device, weights_only=True, mmap=in_place)
    except UserError:
        raise
    except Exception as e:
        other = re.search(r"Unsupported global: GLOBAL (\S+)", str(e))
        reason = f"it holds {other[1]}, which is no tensor" if other else looks_like(path)
        reason = reason or "truncated, or not a checkpoint"
        raise UserError(f"{path} cannot be read as a PyTorch file of tensors: {reason}") from e


def looks_like(path):
    """What a file that cannot be read is in place of what its name says; "" if nothing is seen."""
    try:
        with open(path, "rb") as f:
            start = f.read(100)
    except OSError as e:
        return e.strerror
    named_so = Path(path).suffix in (".safetensors", ".st")
    if not start:
        return "it is empty"
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer; get the file itself with git lfs pull"
    if start.lstrip().startswith(b"<"):
        return "it is a web page; download the file itself"
    if start[8:9] == b"{" and not named_so:
        return "it holds safetensors; name it .safetensors"
    if start.startswith(b"PK") and named_so:
        return "it is a PyTorch file; name it .pth"
    return ""


def first_line(error):
    """What an exception of a library's says, in a few words."""
    return " ".join(str(error).split())[:120] or type(error).__name__


def damage_of(path):
    """What is wrong with the records of a .pth, a zip file, in words; "" if nothing is.

    Where no checksum is right the file was written without them, and is read as it is.
    """
    if not zipfile.is_zipfile(path):  # PyTorch's old format has none
        return ""
    with zipfile.ZipFile(path) as archive:
        records = [record for record in archive.infolist() if record.file_size]
        if sum(record.file_size for record in records) > Path(path).stat().st_size:
            return "its records are packed, which PyTorch never does, and may take all memory"
        wrong = [record.filename for record in records if not is_whole(archive, record)]
    if 0 < len(wrong) < len(records):
        return f"{wrong[0]} is not what was written, its checksum is another"
    return ""


def is_whole(archive, record):
    """Whether a zip file's record has its checksum; zipfile looks at it while it reads."""
    try:
        with archive.open(record) as f:
            while f.read(2**20):
                pass
    except zipfile.BadZipFile:
        return False
    return True


def read_text(path, errors="strict"):
    """A UTF-8 file -> str, its line ends as they are, without a byte order mark."""
    try:
        return Path(path).read_bytes().decode("utf-8-sig", errors)
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror}") from None
    except UnicodeDecodeError as e:
        byte = e.object[e.start]
        raise UserError(
            f"{path} is not UTF-8 text (byte {e.start} is 0x{byte:02x}); convert it"
        ) from None


def read_json(path, kind=dict):
    """A JSON file -> its value, which is as `kind` says; {} if there is no such file."""
    if not Path(path).is_file():
        return {}
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError):
        raise UserError(f"{path} is not JSON; mend or remove it") from None
    return checked(value, kind, path)


def checked(value, kind, where):
    """The value that a file holds at `where`. kind: a class of schemas.py, or a type.

    UserError names the first place that is not as the kind says.
    """
    try:
        validator(kind).validate_python(value)
    except RecursionError:
        raise UserError(f"{where} is nested too deeply; mend or remove it") from None
    except pydantic.ValidationError as e:
        first = e.errors(include_url=False)[0]
        place, found = [], value
        for key in first["loc"]:  # it has the names of types, too
            with contextlib.suppress(KeyError, IndexError, TypeError):
                found = found[key]
                place.append(str(key))
        if first["type"] == "missing":
            problem = f"{'.'.join([*place, first['loc'][-1]])} is missing"
        else:
            expected = re.sub("Input should be|Value error,", "expected", first["msg"], count=1)
            expected = expected.replace("expected expected", "expected")
            shown = found.shape if isinstance(found, torch.Tensor) else found
            shown = " ".join(repr(shown).split())
            problem = f"{'.'.join(place) or 'it'} is {shown:.60}; {expected:.120}"
        raise UserError(f"{where}: {problem}; mend or remove it") from None
    return value


@functools.cache
def validator(kind):
    """What checks values of a kind; strictly, so that no text passes for a number."""
    if isinstance(kind, type) and issubclass(kind, pydantic.BaseModel):
        return pydantic.TypeAdapter(kind)
    return pydantic.TypeAdapter(kind, config=pydantic.ConfigDict(strict=True))


def write_json(path, value):
    """A JSON file, readable by people."""
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    with atomic_write(path) as tmp:
        # Half a character, in a file's name, becomes the escape that JSON has for it.
        tmp.write_bytes(text.encode("utf-8", "backslashreplace"))


def write_jsonl(path, rows):
    """JSON Lines, a row each."""
    with atomic_write(path) as tmp, open(tmp, "w", encoding="utf-8") as f:
        for row in rows:
            f.write(json.dumps(row, ensure_ascii=False) + "\n")


def whole_lines(path, kind=dict):
    """The rows of a JSONL file that lines are appended to, [] if it is not there yet.

    A kill can tear the last line: what follows the last line's end is cut off the file. kind: of
    each row, see `checked`.
    """
    if not Path(path).exists():
        return []
    *lines, torn = Path(path).read_bytes().split(b"\n")
    rows = list(each_row(path, lines, kind))
    if torn:
        os.truncate(path, sum(len(line) + 1 for line in lines))
    return rows


def each_row(path, lines, kind=dict):
    """The row of each of the lines of a JSONL file; UserError names the first that is none."""
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise UserError(f"{path} is not JSON Lines; mend or remove it") from None
        yield checked(row, kind, f"{path}:{number}")


@contextlib.contextmanager
def figure(path):
    """`with figure(path) as ax:` a PNG of one pair of axes, drawn without a screen.

    Without pyplot, which keeps figures. One that cannot be written ends no run.
    """
    from matplotlib.figure import Figure

    fig = Figure(figsize=(7, 4))
    yield fig.subplots()
    try:
        with atomic_write(path) as tmp:
            fig.savefig(tmp, format="png", dpi=120, bbox_inches="tight")
    except UserError as e:
        print0(f"no {path}: {e}")
    del fig
    gc.collect()  # a figure is a knot of cycles, half a MB that would stay until Python looks
