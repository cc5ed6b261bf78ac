"""Valid files made into faulty ones; every change follows from a ``random.Random``."""

import io
import json
import warnings
import zipfile
from copy import deepcopy
from datetime import date
from random import Random

import numpy as np
import torch
import yaml

LARGEST = 1 << 19
#: what people, spreadsheets and attackers put where a word is expected
WORDS = ["", " ", "-1", "0", "1e400", "-1e-400", "nan", "inf", "-inf", "1_0", "0x1F", "1" * 400, "9" * 5000,
         "NA", "null", "None", "true", "[PAD]", '"', "'", "\\", "\0", "\r", "\r\n", "\u2028", "\u200b",
         "\ufeff", "é", "\U0001f600", "user_id:token", "item_id:float", "a:b:c", "../../x", "/dev/null",
         "=1+1", "x" * 70_000]
#: values of every type, for any place of a file that has types
VALUES = [None, True, False, 0, -1, 1, 3, 2**31, 10**30, -(10**400), 0.5, -0.0, 1e308, float("nan"),
          float("inf"), "", " ", "x", "\0", "1", "../../x", "y" * 20_000, [], [[]], [1, [2, [None]]], [None],
          ["a", "a"], {}, {"a": {"b": [1]}}, {"": None}]
YAML_VALUES = [*VALUES, date(2014, 3, 3), b"\0\xff", {"a", "b"}, {1: 2}, {None: 1}]
TORCH_VALUES = [*VALUES, torch.zeros(0), torch.ones(3, dtype=torch.int8), torch.full((2, 2), float("nan")),
                torch.tensor(1), (1, 2), {"__plain__": "array"}, {"__plain__": "what"}, {1: 2}]
ARRAYS = [np.zeros(0), np.array(3), np.array("x"), np.full((2, 3), np.nan), np.array(["a", "b\t"]),
          np.array([-5, 200]), np.zeros((0, 4), dtype=np.int8), np.array([1j]), np.array([b"x"]),
          np.array(["2014-01-01"], dtype="M8[D]"), np.zeros(2, dtype=[("a", "i4")])]
YAML_TEXTS = [
    "!!python/object/apply:os.getcwd []", "!!python/name:os.getcwd", "!!set {a, b}", "!!binary '@@@'",
    "!!int x", "!!float x", "!!timestamp x", "!unknown x", "2014-13-45", "&a [*a]", "&a {a: *a}", "*nobody",
    "{<<: 3}", "{<<: [1]}", "{[1, 2]: 3}", "{{a: 1}: 2}", "[" * 4000, "[" * 400 + "]" * 400, "{a: " * 2000,
    "{a: " * 200 + "}" * 200, "- " * 3000, "\t- a", "`", "@x", "0b_", "1:99:99", "1__e3", "1" * 5000, "'"]


def mutated(content: bytes, kind: str, draw: Random) -> bytes:
    """``content`` with a fault or a few, of any bytes or of its ``kind``, a key of ``KINDS``."""
    for _ in range(draw.choice([1, 1, 1, 2, 4])):
        change = draw.choice([*KINDS[kind] * (8 // len(KINDS[kind])), *BYTES])
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                content = change(content, draw)
        except Exception:   # An earlier change left no such file, and libraries say so in many ways.
            content = flip_bits(content, draw)
        content = content[:LARGEST]
    return content


# ---- any bytes --------------------------------------------------------------------------------------


def flip_bits(content: bytes, draw: Random) -> bytes:
    """Some bits the other way around."""
    changed = bytearray(content or b"\0")
    for _ in range(draw.choice([1, 1, 2, 8, 64])):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def cut(content: bytes, draw: Random) -> bytes:
    """It ends too early, or a part of it is gone."""
    start = draw.randint(0, len(content))
    return content[:start] + draw.choice([b"", content[start + draw.choice([1, 2, 8, 100, 5000]):]])


def duplicate(content: bytes, draw: Random) -> bytes:
    """A part stands there twice, between others or over them."""
    start, place = (draw.randint(0, len(content)) for _ in range(2))
    part = content[start:start + draw.choice([1, 8, 100, 5000])]
    return content[:place] + part + content[place + len(part) * draw.randint(0, 1):]


def insert_junk(content: bytes, draw: Random) -> bytes:
    """Bytes of no encoding."""
    junk = draw.choice([b"\0", b"\xff\xfe", b"\x80", b"\xc3\x28", b"\xed\xa0\x80", b"\x1a",
                        draw.randbytes(16), b"\0" * 5000])
    place = draw.randint(0, len(content))
    return content[:place] + junk + content[place:]


def replace_all(content: bytes, draw: Random) -> bytes:
    """Something else under the same name."""
    return draw.choice([b"", b"\n", b"\0", b"\x80\x04N.", b"PK\x03\x04" + bytes(60), b"{}", b"[]", b"null",
                        b"\x93NUMPY\x01\0v\0{", b"<!doctype html>", draw.randbytes(300)])


# ---- text -------------------------------------------------------------------------------------------


def reencode(content: bytes, draw: Random) -> bytes:
    """Other line ends, a byte order mark, or another encoding."""
    text = content.decode("utf-8")
    encoding, text = draw.choice([
        ("utf-8", text.replace("\n", "\r\n")), ("utf-8", text.replace("\n", "\r")), ("utf-8-sig", text),
        ("utf-8", text + "\n\n \n"), ("utf-8", text.replace("\n", "\n\n", 3)), ("utf-8", text.rstrip("\n")),
        ("utf-8", text.replace("\t", " ")), ("utf-16", text), ("utf-32", text), ("latin-1", f"{text}é")])
    return text.encode(encoding, "replace")


def change_line(content: bytes, draw: Random) -> bytes:
    """A line is gone, there twice, elsewhere, joined with the next, or very long."""
    lines = content.decode("utf-8").split("\n")
    place, other = (draw.randrange(len(lines)) for _ in range(2))
    line = lines[place]
    lines[place:place + 1] = draw.choice([[], [line, line], [line + lines[other]], [lines[other]],
                                          ["", line], [line * 3000]])
    return "\n".join(lines).encode()


def change_word(content: bytes, draw: Random) -> bytes:
    """A cell, or what stands between blanks, is another word."""
    return "".join(_with_another_word(content.decode("utf-8"), draw.choice("\t\t ,"), draw)).encode()


def _with_another_word(text: str, separator: str, draw: Random) -> str:
    lines = text.split("\n")
    place = draw.randrange(len(lines))
    words = lines[place].split(separator)
    number = draw.randrange(len(words))
    words[number:number + 1] = draw.choice([[draw.choice(WORDS)], [draw.choice(WORDS)], [],
                                            [words[number]] * 2, [words[number] + draw.choice(WORDS)]])
    return "\n".join([*lines[:place], separator.join(words), *lines[place + 1:]])


def change_column(content: bytes, draw: Random) -> bytes:
    """A column is gone, there twice, or filled with one word."""
    rows = [line.split("\t") for line in content.decode("utf-8").split("\n")]
    place, word = draw.randrange(len(rows[0])), draw.choice(WORDS)
    change = draw.choice([lambda cells: cells[:place] + cells[place + 1:],
                          lambda cells: cells + cells[place:place + 1],
                          lambda cells: [*cells[:place], word, *cells[place + 1:]]])
    body = rows[1:] if draw.random() < 0.5 else [change(cells) for cells in rows[1:]]
    return "\n".join("\t".join(cells) for cells in [change(rows[0]), *body]).encode()


# ---- values inside of values ------------------------------------------------------------------------


def places(value) -> list[tuple]:
    """(container, key) of everything inside of dictionaries and lists."""
    items = list(value.items()) if isinstance(value, dict) else \
        list(enumerate(value)) if isinstance(value, list) else []
    return [place for key, inner in items for place in [(value, key), *places(inner)]]


def change_value(value, choices: list, draw: Random):
    """``value``, changed in one place: another value, none, one more, or one of its own elsewhere."""
    found, another = places(value), deepcopy(draw.choice(choices))
    if not found or draw.random() < 0.02:
        return another
    container, key = draw.choice(found)
    kind = draw.randrange(8)
    if kind == 0:
        del container[key]
    elif kind == 1 and isinstance(container, dict):
        container[draw.choice(["x", "", "a" * 300, str(key) + "_", str(key).upper()])] = container.pop(key)
    elif kind == 2:
        other, where = draw.choice(found)
        container[key] = other[where] if where in range(len(other)) or where in other else None
    else:
        container[key] = another
    return value


def change_json(content: bytes, draw: Random) -> bytes:
    """A wrong type or value anywhere, or a nesting without end."""
    if draw.random() < 0.05:
        return draw.choice([b"[" * 100_000, b'{"a":' * 100_000, b"[" * 50_000 + b"]" * 50_000,
                            b"1" * 6000, b'"\\ud800"', b"NaN", b'{"rows": 1e999}'])
    return json.dumps(change_value(json.loads(content), VALUES, draw)).encode()


def change_yaml(content: bytes, draw: Random) -> bytes:
    """A wrong type or value anywhere."""
    if b"&b0" in content:
        raise ValueError("would go off here")
    value = change_value(yaml.safe_load(content), YAML_VALUES, draw)
    return yaml.safe_dump(value, allow_unicode=True).encode()


def change_yaml_text(content: bytes, draw: Random) -> bytes:
    """Tags, aliases, nesting and whatever else YAML has, in the place of a value."""
    lines = content.decode("utf-8").split("\n")
    place = draw.randrange(len(lines))
    key, colon, _ = lines[place].partition(":")
    if draw.random() < 0.2:
        lines[place:place + 1] = alias_bomb(key.strip() or "x", draw)
    else:
        lines[place] = f"{key}{colon or ':'} {draw.choice(YAML_TEXTS)}"
    return "\n".join(lines).encode()


def alias_bomb(key: str, draw: Random) -> list[str]:
    """Lines of YAML in which ``key`` has 10 ** 12 values, or mappings of mappings as many."""
    levels = ["b0: &b0 [x]" if draw.random() < 0.5 else "b0: &b0 {x: y}"]
    form = draw.choice(["[{}]", "{{{}}}"])
    for level in range(1, 13):
        aliases = [f"*b{level - 1}" if form[1] != "{" else f"k{n}: *b{level - 1}" for n in range(10)]
        levels.append(f"b{level}: &b{level} {form.format(', '.join(aliases))}")
    return draw.choice([[*levels, f"{key}: *b12"], [f"{key}:", *(f"  {line}" for line in levels)]])


# ---- archives ---------------------------------------------------------------------------------------


def change_archive(content: bytes, draw: Random) -> bytes:
    """A member renamed, left out, there twice, or with other bytes, under checksums that hold."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    place = draw.randrange(len(members))
    name, data = members[place]
    junk = draw.choice([flip_bits, cut, insert_junk, replace_all])
    members[place:place + 1] = draw.choice([
        [], [("../" + name, data)], [(name.upper(), data)], [(name, data)] * 2, [(name, junk(data, draw))],
        [(name, junk(data, draw))], [(name, members[0][1])], [("", data)], [(name, data), ("x", b"x")]])
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", draw.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return buffer.getvalue()


def change_arrays(content: bytes, draw: Random) -> bytes:
    """An array of another kind or shape, or none."""
    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    name = draw.choice(sorted(arrays))
    array = arrays.pop(name)
    kind = draw.randrange(6)
    if kind:
        arrays[name] = (draw.choice(ARRAYS), array[:-1] if array.ndim else array, array[..., None],
                        array.astype("S") if array.dtype.kind == "U" else -array.astype(np.int64),
                        draw.choice(list(arrays.values())))[kind - 1]
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def change_state(content: bytes, draw: Random) -> bytes:
    """A checkpoint with a wrong type or value anywhere."""
    state = torch.load(io.BytesIO(content), weights_only=True)
    buffer = io.BytesIO()
    torch.save(change_value(state, TORCH_VALUES, draw), buffer)
    return buffer.getvalue()


def change_header(content: bytes, draw: Random) -> bytes:
    """A .npy file that says it holds something else."""
    start, end = content.index(b"{"), content.index(b"\n")
    words = {"'fortran_order': False": ["'fortran_order': True", "'fortran_order': 3"],
             "'shape': (": [f"'shape': ({n}, " for n in ("0", "-1", "9" * 30, "2**40", "1e5", "'x'")],
             "'descr': '": [f"'descr': '{kind}" for kind in ("|O", ">", "<U", "|V", "x")]}
    word = draw.choice(list(words))
    header = content[start:end].decode("latin-1").replace(word, draw.choice(words[word])).rstrip()
    header = header.ljust(-(-(len(header) + 11) // 64) * 64 - 11).encode("latin-1") + b"\n"
    return content[:8] + len(header).to_bytes(2, "little") + header + content[end + 1:]


BYTES = (flip_bits, cut, duplicate, insert_junk, replace_all)
TEXT = (reencode, change_line, change_word, change_word)
KINDS = {"binary": BYTES, "table": (*TEXT, change_column), "text": TEXT, "json": (change_json,),
         "yaml": (change_yaml, change_yaml, change_yaml_text), "npy": (change_header,),
         "npz": (change_archive, change_arrays), "state": (change_archive, change_state, change_state)}
