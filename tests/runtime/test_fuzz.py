"""Files damaged at random, 2,000 in all, through everything that reads them. Each is read as if nothing were wrong, or
refused by an InputError of one line that names the file: no other exception, no hang, no gigabytes. What is read is
then used as the commands would use it.

Every case has a generator of its own. `FUZZ_SEED=7 FUZZ_TIMES=10 python -m pytest tests/runtime/test_fuzz.py` draws
others, ten times as many.
"""

import copy
import io
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import zlib
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from stic_min import InputError, checkpoint, data, images, lora
from stic_min.formats import adapters, image_folder
from stic_min.loader import load_llava, open_llava
from stic_min.runtime.output import Output
from stic_min.runtime.ranks import Ranks

SEED, TIMES = int(os.environ.get("FUZZ_SEED", 0)), int(os.environ.get("FUZZ_TIMES", 1))
SECONDS, GIGABYTES = 10, 2  # for one case; for all of a group. Pillow's limit, 89 million pixels, is 1.4 in pad mode
V15, V16 = "llava-v1.5-tiny", "llava-v1.6-tiny"
SETTINGS = {"model": "tiny", "seed": 0, "top_p": None}
PINPOINTS = [(56, 112), (112, 56), (112, 112), (168, 56), (56, 168)]


# ---------------------------------------------------------------- damage: bytes


def mutate_bytes(data, rng):
    """Some bytes flipped, overwritten, cut, put in or doubled, half of the times among the first 500."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 20))):
        at = rng.randrange(min(len(data), rng.choice((500, len(data)))) + 1) if data else 0
        end = at + rng.choice((1, 1, 2, 4, 16, 300))
        number = rng.choice((0, 1, 255, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, rng.randrange(2**32)))
        match rng.randrange(8):
            case 0:
                data[at : at + 1] = bytes(byte ^ 1 << rng.randrange(8) for byte in data[at : at + 1])
            case 1:
                data[at:end] = rng.randbytes(len(data[at:end]))
            case 2:
                data[at : at + 4] = struct.pack(rng.choice("<>") + "I", number)
            case 3:
                data[at : at + 2] = struct.pack(rng.choice("<>") + "H", number & 0xFFFF)
            case 4:
                del data[at:end]
            case 5:
                data[at:at] = rng.randbytes(end - at)
            case 6:
                data[at:at] = data[at:end]
            case 7 if rng.random() < 0.3:
                del data[at:]
    return bytes(data)


# ---------------------------------------------------------------- damage: values of JSON

ODD = [
    "null", "true", "false", "-1", "0", "1", "3", "0.5", "-0.0", "1e-400", "1e400", "-1e400", "NaN", "99999", "9" * 30,
    "9" * 400, "9" * 5000, '""', '" "', '"a"', '"0"', '"\\ud83d"', '"\\udc80b"', '"\\u0000"', '"a\\nb"', '"\\u2028\\r"',
    '"\\u001b[31m"', '"' + "a" * 5000 + '"', '"<image>"', '"<image><image>"', '"</s>"', '".."', '"../x"', '"/"', "[]",
    "[1]", '[""]', "[null]", "[[]]", "{}", '{"": {}}', '{"from": "gpt"}', "[" * 10000 + "]" * 10000,
    '{"a":' * 10000 + "1" + "}" * 10000, *("[" * depth + "]" * depth for depth in (100, 900, 920, 940, 960)),
]  # fmt: skip
MARK, TWIN = "<<odd %d>>", "<<twin>>"


def places(value):
    """(holder, key) of everything inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield value, key
        yield from places(inner)


def mutate_value(value, rng):
    """A JSON value with some of what is inside it replaced, dropped, renamed, given twice or put elsewhere."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        found = list(places(value))
        if not found:
            break
        (holder, key), (other, other_key) = rng.choice(found), rng.choice(found)
        odd, action = MARK % rng.randrange(len(ODD)), rng.randrange(8)
        if action == 0:
            del holder[key]
        elif action == 1 and isinstance(holder, dict):
            holder[rng.choice((odd, "a", "a\nb", key.upper(), f" {key}"))] = holder.pop(key)
        elif action == 1:
            holder.insert(rng.randrange(len(holder) + 1), copy.deepcopy(holder[key]))
        elif action == 2 and isinstance(holder, dict):
            holder[TWIN + key] = odd
        elif action == 3:
            holder[key] = copy.deepcopy(other[other_key])
        else:
            holder[key] = odd
    return value


def encode(value, rng):
    """The bytes of a mutated value, the marks in it replaced by what they stand for."""
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5, indent=rng.choice((None, 2))).replace(TWIN, "")
    for number, odd in enumerate(ODD):
        text = text.replace(json.dumps(MARK % number), odd)
    return text.encode("utf-8", "surrogatepass")


def mutate_json(value, rng):
    """One JSON value, as bytes; one in four is damaged as bytes only."""
    if rng.random() < 0.25:
        return mutate_bytes(json.dumps(value).encode(), rng)
    return (b"\xef\xbb\xbf" if rng.random() < 0.03 else b"") + encode(mutate_value(value, rng), rng)


def mutate_records(records, rng):
    """The same of a list of objects, in half of the cases as JSON lines."""
    if rng.random() < 0.5:
        return mutate_json(records, rng)
    lines = [json.dumps(record).encode() for record in records]
    if rng.random() < 0.25:
        return mutate_bytes(b"\n".join(lines) + b"\n", rng)
    at = rng.randrange(len(lines))
    lines[at] = encode(mutate_value(records[at], rng), rng).replace(b"\n", b" ")
    return rng.choice((b"\n", b"\r\n", b"\n\n")).join(lines) + rng.choice((b"", b"\n"))


def mutate_safetensors(content, rng):
    """A safetensors file: eight bytes of length, a header in JSON, the numbers. Mostly the header's values change."""
    if rng.random() < 0.3:
        return mutate_bytes(content, rng)
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    if rng.random() < 0.5:
        entry = header[rng.choice([name for name in header if name != "__metadata__"])]
        kinds = ("BOOL", "I16", "U16", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "F6_E2M3", "C64", "U8")
        entry["dtype"] = rng.choice(kinds)
        if entry["shape"] and rng.random() < 0.5:  # as many bytes as before
            entry["shape"] = entry["shape"][:-1] + [entry["shape"][-1] * rng.choice((2, 4, 8)) // rng.choice((1, 2, 4))]
    else:
        header = mutate_value(header, rng)
    header = encode(header, rng)
    return len(header).to_bytes(8, "little") + header + content[end:]


def mutate_tokenizer(content, rng):
    """A sentencepiece model: pieces, each behind a 10 and its length, then settings."""
    if rng.random() < 0.3:
        return mutate_bytes(content, rng)
    pieces, at = [], 0
    while content[at] == 10 and content[at + 1] < 128:
        end = at + 2 + content[at + 1]
        pieces.append(content[at + 2 : end])
        at = end
    for _ in range(rng.choice((1, 1, 2, 5))):
        number, action = rng.choice((rng.randrange(3), rng.randrange(259, len(pieces)))), rng.randrange(4)
        if action == 0:
            del pieces[number]
        elif action == 1:
            pieces.insert(rng.randrange(len(pieces)), pieces[number])
        elif action == 2:
            pieces[number] = mutate_bytes(pieces[number], rng)[:100]
        else:
            byte = rng.randrange(2, 11)  # in its text, number or kind; it starts with the length of its text
            pieces[number] = pieces[number][:byte] + rng.randbytes(1) + pieces[number][byte + 1 :]
    return b"".join(bytes((10, len(piece))) + piece for piece in pieces) + content[at:]


def mutate_file(path, rng):
    """Damages a file of a folder in place, by its kind; now and then it is gone, or empty."""
    chance = rng.random()
    if chance < 0.03:
        path.unlink()
    elif chance < 0.06:
        path.write_bytes(b"")
    elif path.suffix == ".json":
        path.write_bytes(mutate_json(json.loads(path.read_text()), rng))
    elif path.suffix == ".safetensors":
        path.write_bytes(mutate_safetensors(path.read_bytes(), rng))
    else:
        path.write_bytes(mutate_bytes(path.read_bytes(), rng))


# ---------------------------------------------------------------- what is damaged


@pytest.fixture(scope="module")
def good(tiny, tmp_path_factory):
    """Values and files that are right, of every kind."""
    talk = lambda answer: [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": answer}]
    names = sorted(path.name for path in (tiny / "images").iterdir())
    pairs = [{"image": name, "chosen": talk("A."), "rejected": talk("B é."), "seed": 0} for name in names[:4]]
    pairs[1] |= {"chosen_finish": "stop", "rejected_finish": "length"}
    records = json.loads((tiny / "instructions.json").read_text())[:6]
    with_image = [record for record in records if "image" in record]
    told = [{"id": r["id"], "image": r["image"], "description": "Red."} for r in with_image]
    del told[0]["id"]
    lines = [{"image": name, "text": "é\n", **SETTINGS} for name in names]
    root = tmp_path_factory.mktemp("fuzz")
    shutil.copytree(tiny / "clip-tiny", root / "clip-tiny")
    for name in (V15, V16):
        shutil.copytree(tiny / name, root / name)
    as_bin = shutil.copytree(tiny / V15, root / "bin")
    torch.save(load_file(as_bin / "model.safetensors"), as_bin / "pytorch_model.bin")
    (as_bin / "model.safetensors").unlink()
    with_huggingface_config(shutil.copytree(tiny / V16, root / "huggingface"), tiny / "clip-tiny")
    llava, _ = open_llava(tiny / V15)
    adapter = lora.new_adapter(llava, 2, 4, 0.0, seed=0)
    for name, tensor in adapter.tensors.items():
        adapter.tensors[name] = tensor + 0.1
    adapter.tensors |= {name: torch.zeros(p.shape) for name, p in llava.named_parameters() if "mm_projector" in name}
    moments = {f"{kind}.{name}": t.clone() for name, t in adapter.tensors.items() for kind in ("exp_avg", "exp_avg_sq")}
    (root / "out").mkdir()
    checkpoint.save(root / "out", 3, adapter, moments, SETTINGS, keep=1)
    adapters.write_adapter(root / "adapter", adapter)
    adapters.write_adapter(root / "adapter-bin", adapter)
    names = {"adapter_model.safetensors": "adapter_model.bin", adapters.PROJECTOR_FILE: "non_lora_trainables.bin"}
    for old, new in names.items():
        torch.save(load_file(root / "adapter-bin" / old), root / "adapter-bin" / new)
        (root / "adapter-bin" / old).unlink()
    return SimpleNamespace(root=root, images=tiny / "images", pairs=pairs, records=records, told=told, lines=lines,
                           llava=llava, pictures=list(make_pictures()))


def with_huggingface_config(folder, clip):
    """Gives a checkpoint the configuration that transformers would write."""
    file, vision = folder / "config.json", json.loads((clip / "config.json").read_text())["vision_config"]
    old = json.loads(file.read_text())
    own = ("mm_", "image_", "tokenizer_", "unfreeze_", "use_mm_proj")  # LLaVA's
    text = {key: value for key, value in old.items() if not key.startswith(own)}
    text["model_type"] = "mistral"
    new = {"model_type": "llava_next", "text_config": text, "vision_config": vision, "vision_feature_layer": -2}
    file.write_text(json.dumps(new | {"image_grid_pinpoints": old["image_grid_pinpoints"]}))


def make_pictures():
    """(name, bytes) of a picture in many forms."""
    colours = Image.frombytes("RGB", (40, 30), random.Random(0).randbytes(3600))
    colours.paste("red", (5, 5, 20, 25))
    forms = {
        "png": [{}, {"mode": "L"}, {"mode": "P"}, {"mode": "RGBA"}, {"mode": "1"}, {"mode": "I;16"}, {"mode": "LA"}],
        "jpeg": [{}, {"mode": "L"}, {"mode": "CMYK"}, {"progressive": True}, {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0"}],
        "webp": [{}, {"lossless": True}, {"mode": "RGBA"}],
        "gif": [{}, {"mode": "L"}],
        "bmp": [{}, {"mode": "L"}, {"mode": "P"}, {"mode": "1"}, {"mode": "RGBA"}],
        "tiff": [{}, {"mode": "L"}, {"mode": "I;16"}, {"mode": "F"}, {"mode": "CMYK"}, {"big_tiff": True}]
        + [{"compression": c} for c in ("tiff_lzw", "jpeg", "tiff_deflate", "packbits")]
        + [{"mode": "1", "compression": "group4"}],
    }
    for kind, options in forms.items():
        for number, option in enumerate(options):
            file, option = io.BytesIO(), dict(option)
            picture = colours.convert("L") if option.get("mode") in ("I;16", "LA") else colours
            picture.convert(option.pop("mode", "RGB")).save(file, kind, **option)
            yield f"{number}.{kind}", file.getvalue()
    for kind in ("gif", "webp", "png"):
        file = io.BytesIO()
        colours.save(file, kind, save_all=True, append_images=[colours.rotate(90)])
        yield f"moving.{kind}", file.getvalue()


def mend_png(data):
    """Puts the right checksum on every chunk, so that damage gets past it."""
    data, at = bytearray(data), 8
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        data[end : end + 4] = struct.pack(">I", zlib.crc32(data[at + 4 : end])) if end + 4 <= len(data) else data[end:]
        at = end + 4
    return bytes(data)


def mutate_tiff(data, rng):
    """Another kind, count or value in an entry of the directory."""
    data, order = bytearray(data), "<" if data[:2] == b"II" else ">"
    [start] = struct.unpack_from(f"{order}I", data, 4)
    [entries] = struct.unpack_from(f"{order}H", data, start)
    entry = start + 2 + 12 * rng.randrange(entries)
    if rng.random() < 0.6:
        struct.pack_into(f"{order}H", data, entry + 2, rng.randrange(14))
    else:
        struct.pack_into(f"{order}I", data, entry + rng.choice((4, 8)), rng.choice((0, 1, 2, 9, 2**31)))
    return bytes(data)


# ---------------------------------------------------------------- the cases: what to run, the file, what names it


def pairs_case(rng, good, folder):
    file = folder / "pairs.jsonl"
    file.write_bytes(mutate_records(good.pairs, rng))
    problems = rng.choice((None, []))

    def use():
        pairs = data.read_pairs(file, problems)
        data.each(lambda pair: data.pair_item(pair, good.llava, good.images, 300), pairs, problems)
        return problems

    return use, file, [str(file), "no such image: ", "points outside the image folder"]


def instructions_case(rng, good, folder):
    files = folder / "instructions.json", folder / "descriptions.jsonl"
    broken = rng.choice((0, 1))
    for number, (file, records) in enumerate(zip(files, (good.records, good.told))):
        file.write_bytes(mutate_records(records, rng) if number == broken else json.dumps(records).encode())
    problems, plain = rng.choice((None, [])), rng.random() < 0.3

    def use():
        if plain:
            instructions = data.each(lambda e: data.parse_instruction(*e), data.image_records(files[0])[0], problems)
        else:
            instructions, _ = data.read_infused(*files, problems=problems)
        data.each(lambda i: data.instruction_item(i, good.llava, good.images, 300), instructions, problems)
        return problems

    return use, files[broken], [*map(str, files), "no such image: ", "points outside the image folder"]


def output_case(rng, good, folder):
    for old in folder.iterdir():
        old.unlink()
    files = [folder / f"out.jsonl{end}" for end in ("", ".part0", ".part1")]
    broken = rng.randrange(3)
    for number, file in enumerate(files):
        records = good.lines[number::3]
        whole = "".join(json.dumps(record) + "\n" for record in records).encode()
        file.write_bytes(mutate_records(records, rng) if number == broken else whole)
    kept = shutil.copy(files[broken], folder / "kept")

    def use():
        output = Output(files[0], "image", SETTINGS, Ranks(0, 1, torch.device("cpu"))).start()
        output.append({"image": "new.png"})
        output.finish(["new.png"])
        assert [json.loads(line) for line in files[0].read_text(encoding="utf-8").split("\n")[:-1]][0]["seed"] == 0

    return use, kept, [str(file) for file in files]


def picture_case(rng, good, folder):
    name, content = rng.choice(good.pictures)
    file = folder / f"picture{Path(name).suffix}"
    directory = content[2:4] in (b"*\0", b"\0*") and rng.random() < 0.5
    content = mutate_tiff(content, rng) if directory else mutate_bytes(content, rng)
    file.write_bytes(mend_png(content) if file.suffix == ".png" else content)

    def use():
        size = images.image_size(file)
        picture = images.open_image(file)
        assert picture.mode == "RGB" and picture.size == size
        images.corrupt(picture, seed=rng.randrange(9))
        for mode in ("pad", "anyres"):
            tiles = images.make_tiles(picture, mode, 56, PINPOINTS)
            assert tiles.pixels.isfinite().all() and images.image_tokens(size, mode, 56, 14, PINPOINTS) > 0

    return use, file, [str(file)]


def name_case(rng, good, folder):
    inside = folder / "in"
    if not inside.exists():
        (inside / "sub").mkdir(parents=True)
        name, content = good.pictures[0]
        for path in (folder / "out.png", inside / "a.png", inside / "sub" / "b.png", inside / "a\nb.png"):
            path.write_bytes(content)
        (inside / "c\n.png").write_bytes(content[:100])
        links = {"in.png": "a.png", "out.png": "../out.png", "loop.png": "loop.png", "none.png": "nowhere", "up": ".."}
        for name, target in links.items():
            (inside / name).symlink_to(target)
        os.mkfifo(inside / "pipe.png")
    words = ["a.png", "sub", "b.png", "in.png", "out.png", "loop.png", "none.png", "up", "pipe.png", "a\nb.png",
             "c\n.png", "..", ".", "", "in", "\0", "~", "\ud83d", "\udc80", "\u2028", "\x1b[2J", "a" * 300, "a/" * 3000]
    name = rng.choice(("/", "", "/")).join(rng.choice(words) for _ in range(rng.choice((1, 1, 1, 2, 3))))
    name = rng.choice((name, name, name, name, 5, None, [name])) if rng.random() < 0.2 else name

    def use():
        path = image_folder.image_path(inside, name)
        assert path.resolve().is_relative_to(inside.resolve())
        images.image_size(path)
        images.open_image(path)

    return use, ascii(name), [ascii(Path(str(name)).name)[1:-1][-20:]]  # a long name is shown by its ends


def model_case(rng, good, folder):
    name = rng.choice((V15, V16, V16, "bin", "huggingface"))
    for part in (name, "clip-tiny"):
        shutil.rmtree(folder / part, ignore_errors=True)
        shutil.copytree(good.root / part, folder / part)
    own = sorted(p for p in (folder / name).iterdir() if p.name != "tokenizer.model")
    file = rng.choice([*own, folder / name / "config.json", *(folder / "clip-tiny").glob("[cm]*")])
    mutate_file(file, rng)

    def use():
        llava = load_llava(folder / name)
        llava.logits("USER: <image>\nWhat? ASSISTANT:", [Image.new("RGB", (40, 30))])

    return use, file, [str(folder), "prompt 'USER: "]


def tokenizer_case(rng, good, folder):
    file = folder / "tokenizer.model"
    file.write_bytes(mutate_tokenizer((good.root / V15 / "tokenizer.model").read_bytes(), rng))

    def use():
        llava, _ = open_llava(good.root / V15, tokenizer=file)
        ids = llava.tokenizer.encode_prompt("USER: <image>\nWhat é \U0001f600 \0?")
        ids += llava.tokenizer.encode_response("A.")
        assert max(ids) < llava.config.decoder.vocab_size and min(set(ids) - {-200}) >= 0
        llava.tokenizer.decode(range(600))

    return use, file, [str(file)]


def adapter_case(rng, good, folder):
    adapter = folder / "adapter"
    shutil.rmtree(adapter, ignore_errors=True)
    shutil.copytree(good.root / rng.choice(("adapter", "adapter", "adapter-bin")), adapter)
    file = rng.choice(sorted(adapter.iterdir()))
    mutate_file(file, rng)

    def use():
        read = adapters.read_adapter(adapter, good.llava)
        layer = lora.LoRALinear(torch.nn.Linear(4, 4, bias=False), read.r, read.alpha, read.dropout).train()
        assert layer(torch.ones(1, 4)).isfinite().all()

    return use, file, [str(adapter)]


def checkpoint_case(rng, good, folder):
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(good.root / "out", out)
    file = rng.choice([*(out / "checkpoint-3").glob("[!a]*"), out / "checkpoint-3" / "adapter_model.safetensors"])
    mutate_file(file, rng)
    if rng.random() < 0.1:
        (out / rng.choice(("checkpoint-", "checkpoint-²", "checkpoint-x", "checkpoint--1", "checkpoint-٣"))).mkdir()

    def use():
        step, tensors, moments = checkpoint.newest(out, SETTINGS, print)
        assert step == 3 and type(step) is int
        for kind in ("exp_avg", "exp_avg_sq"):
            assert all(moments[f"{kind}.{name}"].shape == tensor.shape for name, tensor in tensors.items())

    return use, file, [str(out)]


CASES = {
    "pairs": (pairs_case, 250),
    "instructions": (instructions_case, 250),
    "output": (output_case, 150),
    "pictures": (picture_case, 500),
    "names": (name_case, 100),
    "models": (model_case, 400),
    "tokenizers": (tokenizer_case, 110),
    "adapters": (adapter_case, 120),
    "checkpoints": (checkpoint_case, 120),
}
assert sum(count for _, count in CASES.values()) == 2000


# ---------------------------------------------------------------- the test


class TooLong(BaseException):
    """No Exception, so that nothing on the way takes it for a damaged file."""


@contextmanager
def time_limit(seconds):
    def stop(number, frame):
        raise TooLong(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def peak():
    """Most memory of this process so far, in GB."""
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss; Linux counts in KB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


@pytest.mark.filterwarnings("ignore")  # Pillow, torch and others warn of some damage
@pytest.mark.parametrize("kind", CASES)
def test_it_is_read_or_refused_in_one_line(kind, good, tmp_path):
    make, count = CASES[kind]
    before, read, refused = peak(), 0, 0
    for case in range(count * TIMES):
        use, file, names = make(random.Random(f"{SEED} {kind} {case}"), good, tmp_path)
        what = f"case {case} of {kind}, FUZZ_SEED={SEED}: {file}"
        said = []
        try:
            with time_limit(SECONDS):
                said = use() or []
        except InputError as error:
            said = [str(error)]
        except (Exception, TooLong) as error:
            raise AssertionError(f"{what}: {type(error).__name__}") from error
        for message in said:
            assert len(message.splitlines()) == 1 and message.isprintable(), (what, message)
            assert any(name in message for name in names), (what, message)
        read, refused = read + (not said), refused + bool(said)
    assert read and refused  # the damage is neither too small nor too large
    assert peak() - before < GIGABYTES
