"""What is odd or damaged: texts of JSON, files of tensors, bytes. Used by fuzz.py."""

import copy
import io
import json
import pickle
import struct

import torch

NUMBERS = ("0", "-1", "2", "300", "1.5", "1e308", "1e999", "NaN", "-Infinity", "1" + "0" * 400)
NUMBERS += ("9" * 5000, "12345678901234567890", "4294967296", "99999999999")
TEXTS = ('""', '" "', '"x"', r'"\ud800"', r'"\u0000"', '"' + "a" * 50000 + '"', r'"\n\nUser: x"')
TEXTS += ('"."', '"/"', '"/dev/zero"', '"../../../etc/passwd"', '"integers:99999999999999"')
TEXTS += ('"1e400"', '"nan"', '"bytes"', '"~"', '"integers:3"', '"integers:2000000000"')
LISTS = ("[]", "[null]", "[[]]", "[{}]", "[1,2]", '["a"]', "[1.5]", "[true]", "[1e999]", "[-1]")
LISTS += ("[" * 5000 + "]" * 5000, f"[{','.join(['0.5'] * 64)}]", "[[0.5],[0.5,1]]")
TURNS = ('[{"role":[],"content":"x"}]', '[{"role":null,"content":null}]', '{"role":"user"}')
TURNS += ('[{"role":"user","content":["x"]}]', '[{"role":"tool","content":"x"}]', '{"a":[1]}')
ODD = ("null", "true", "false", "{}", *NUMBERS, *TEXTS, *LISTS, *TURNS)
ODD_VALUES = (None, 0, -1, 1.5, True, "x", [], {}, 10**30, float("nan"), [1, 2], {"a": 1})
ODD_TENSORS = [torch.zeros(*shape) for shape in ((0,), (1,), (64,), (257, 64), (1, 64, 64))]
ODD_TENSORS += [torch.zeros(64, 64), torch.zeros(257, 64, dtype=torch.int64), torch.zeros(2, 2)]
ODD_TENSORS += [torch.zeros(257, 64).to_sparse(), torch.empty(257, 64, device="meta")]
ODD_TENSORS += [torch.zeros(1).expand(257, 64), torch.full((257, 64), float("nan"))]
ODD_TENSORS += [torch.zeros(257, 64, dtype=torch.complex64), torch.full((1, 2), float("nan"))]
SIZES = (0, 1, 2, 5, 2**31, 2**62, 2**64 - 1)  # of an index
VOCAB = ["99999999999999999999 'a' 1", "0 'a' 1", "1 'a' 2", "1 '' 0", "1 'a', 'b' 2", "1 1 1"]
VOCAB += ["1 b'x', b'y' 2", "1 'a' 'b' 2", r"1 '\ud800' 3", r"1 '\N{SNOWMAN}' 3", r"1 '\x' 1"]
VOCAB += ["1 " + "'a'" * 50000 + " 50000", "1 'a', " + "-" * 200000 + "1, 'b' 3", "1 \"a' 1"]
VOCAB += ["1 'a', " + "[" * 100000 + ", 'b' 3", "1 'a'+'b' 2", "1 'a'*10**10+'' 1", "२ 'a' 1"]
VOCAB += ["1 'a' २", "1 'a'\0'b' 2", "1 {'a'} 1", "2000000000 'a' 1", "1 'a' " + "9" * 5000]
VOCAB = [(line + "\n2 'zz' 2\n").encode() for line in VOCAB]
DEEP = b'{"a":' * 100000


def places(value, at=()):
    """Where something stands in a value of JSON: tuples of keys."""
    yield at
    inside = value.items() if isinstance(value, dict) else ()
    inside = enumerate(value[:3]) if isinstance(value, list) else inside
    for key, item in inside:
        yield from places(item, (*at, key))


def changed(value, at, item=None, remove=False):
    """The value with another item at that place, or without it."""
    if not at:
        return item
    value = copy.copy(value)
    if len(at) == 1 and remove:
        value.pop(at[0])
    else:
        value[at[0]] = changed(value[at[0]], at[1:], item, remove)
    return value


def odd_json(good, rng, n):
    """n texts: the value with something else, or nothing, at one of its places."""
    where = list(places(good))
    for _ in range(n):
        at = rng.choice(where)
        if at and rng.random() < 0.1:
            yield json.dumps(changed(good, at, remove=True))
        else:
            yield json.dumps(changed(good, at, "@")).replace('"@"', rng.choice(ODD), 1)


def damaged(data, rng, n):
    """n times the bytes with bits flipped, stretches cut, zeroed, put in or doubled."""
    for _ in range(n):
        b = bytearray(data)
        for _ in range(rng.choice([1, 1, 2, 8])):
            at, length = rng.randrange(len(b) or 1), rng.choice([1, 4, 40, 4000])
            way = rng.randrange(8)
            if way < 4 and b:
                b[min(at, rng.choice([len(b) - 1, 5000]), len(b) - 1)] ^= 1 << rng.randrange(8)
            elif way == 4:
                del b[at : at + length]
            elif way == 5:
                b[at : at + length] = bytes(len(b[at : at + length]))
            elif way == 6:
                b[at:at] = rng.randbytes(rng.randrange(1, 9))
            else:
                del b[at:]
        yield bytes(b)


def files(good, rng, n):
    """A JSON file with odd values, odd bytes."""
    data = json.dumps(good).encode()
    extra = [data, b"", b"\0" * 500, b"[" * 100000, DEEP, b"\xff", b"9" * 5000]
    return [
        *extra,
        *(text.encode() for text in odd_json(good, rng, n)),
        *damaged(data, rng, n // 3),
    ]


def lines(rows, rng, n):
    """JSON Lines, one of them odd."""
    good = [json.dumps(row).encode() for row in rows]
    whole = b"".join(line + b"\n" for line in good)
    found = [
        whole,
        b"",
        b"\n\n",
        b"\0" * 4096,
        b"\xef\xbb\xbf" + whole,
        whole.decode().encode("utf-16"),
    ]
    found += [DEEP, b"9" * 5000, b'{"text":"' + b"a" * 3_000_000 + b'"}', whole[:-9], whole[:-1]]
    for _ in range(n):
        number = rng.randrange(len(rows))
        odd = next(odd_json(rows[number], rng, 1)).encode()
        found.append(b"\n".join([*good[:number], odd, *good[number + 1 :], b""]))
    return found + list(damaged(whole, rng, n // 3))


def odd_tensors(good, rng, n):
    """{name: tensor} with another tensor or something else under one of the names."""
    names = ("blocks.7.att.x", "blocks.3000000.ffn.x_k", "blocks.999999999999.att.x", "blocks.-1.x")
    names += ("model.layers.5.x", "model.layers.3000000.x", "base_model.model.x", "score.weight")
    names += ("a.lora_A", ".lora_A", "", "\ud800", "x" * 10000, 1, None, ("a",), "model.layers")
    names += ("blocks.99.att.time_state", "blocks..x", "head.lora_A", "blocks.0.s_emb")
    yield from (*ODD_VALUES, [torch.zeros(2)], torch.zeros(3), {"state_dict": good})
    for _ in range(n):
        name, odd = rng.choice([*good, *names, *names]), rng.choice([*ODD_TENSORS, *ODD_VALUES])
        if rng.random() < 0.1:
            yield {key: value for key, value in good.items() if key != name}
        else:
            yield {**good, name: odd}


def torch_bytes(obj, **options):
    buffer = io.BytesIO()
    torch.save(obj, buffer, **options)
    return buffer.getvalue()


def torch_files(good, rng, n, nested=False):
    """.pth files of {name: tensor}: odd in content, in bytes, and in PyTorch's old format.

    nested: dicts and lists within, whose items are changed, too.
    """
    found = [torch_bytes(good), pickle.dumps(print), DEEP]
    for obj in odd_items(good, rng, n) if nested else odd_tensors(good, rng, n):
        try:
            found.append(torch_bytes(obj))
        except Exception:  # what cannot be written is no file
            continue
    found += damaged(torch_bytes(good), rng, n // 2)
    return [*found, *damaged(torch_bytes(good, _use_new_zipfile_serialization=False), rng, n // 4)]


def odd_items(good, rng, n):
    """The value with something else, or nothing, at one of its places."""
    where = [at for at in places(good) if "same" not in at or rng.random() < 0.2]
    for _ in range(n):
        at = rng.choice(where)
        if at and isinstance(at[-1], str) and rng.random() < 0.2:
            yield changed(good, at, remove=True)
        else:
            yield changed(good, at, rng.choice([*ODD_VALUES, *ODD_TENSORS]))


def safetensors(data, rng, n):
    """.safetensors with an odd header, or odd bytes."""
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    header.get("__metadata__", {}).pop("crc32", None)  # or nothing else would be seen
    found = [data, b"", DEEP]
    for claimed in (0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1, 10**8):
        found.append(struct.pack("<Q", claimed) + data[8:])
    for text in odd_json(header, rng, n):
        found.append(struct.pack("<Q", len(text.encode())) + text.encode() + body)
    return [*found, *damaged(data, rng, n // 2)]
