"""2,000 files damaged at random, through everything that reads them.

Each is either read, and then used as the commands would use it, or refused by an InputError of one line that
names the file: no other exception, no hang, no gigabytes. Every case has its own random generator.
`FUZZ_SEED=7 FUZZ_TIMES=10 python -m pytest tests/runtime/test_fuzz.py` runs others, ten times as many.
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
from small_world import pair

from stic_min import InputError, checkpoint, data, images, lora
from stic_min.check import Problems
from stic_min.formats import adapters, image_folder
from stic_min.formats.records import image_records, read_kind
from stic_min.loader import load_llava, open_llava
from stic_min.runtime.output import Output
from stic_min.runtime.ranks import Ranks
from stic_min.samples import instruction_sample, pair_sample

SEED, TIMES = int(os.environ.get("FUZZ_SEED", 0)), int(os.environ.get("FUZZ_TIMES", 1))
# Limits per case and per group. Pillow's largest image, 89 million pixels, takes 1.4 GB in pad mode.
SECONDS, GIGABYTES = 10, 2
V15, V16 = "llava-v1.5-tiny", "llava-v1.6-tiny"
SETTINGS = {"model": "tiny", "seed": 0, "top_p": None}
MOMENTS = "exp_avg", "exp_avg_sq"
PINPOINTS = [(56, 112), (112, 56), (112, 112), (168, 56), (56, 168)]


# ---------------------------------------------------------------- damage: bytes


def mutate_bytes(data, rng):
    """Some bytes flipped, overwritten, cut, inserted or doubled; half of the time among the first 500."""
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
    "null", "true", "false", "-1", "0", "1", "3", "0.5", "-0.0", "1e-400", "1e400", "-1e400", "NaN", "99999",
    "9" * 30, "9" * 400, "9" * 5000, '""', '" "', '"a"', '"0"', '"\\ud83d"', '"\\udc80b"', '"\\u0000"', '"a\\nb"',
    '"\\u2028\\r"', '"\\u001b[31m"', '"' + "a" * 5000 + '"', '"<image>"', '"<image><image>"', '"</s>"', '".."',
    '"../x"', '"/"', "[]", "[1]", '[""]', "[null]", "[[]]", "{}", '{"": {}}', '{"from": "gpt"}',
    "[" * 10000 + "]" * 10000, '{"a":' * 10000 + "1" + "}" * 10000,
    *("[" * depth + "]" * depth for depth in (100, 900, 920, 940, 960)),
]  # fmt: skip
MARK, TWIN = "<<odd %d>>", "<<twin>>"


def places(value):
    """(holder, key) of everything inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield value, key
        yield from places(inner)


def mutate_value(value, rng):
    """A JSON value with some of its parts replaced, dropped, renamed, repeated or moved."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        parts = list(places(value))
        if not parts:
            break
        (holder, key), (other, other_key) = rng.choice(parts), rng.choice(parts)
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
    """The bytes of a mutated value, with its marks replaced by the values they stand for."""
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5, indent=rng.choice((None, 2))).replace(TWIN, "")
    for number, odd in enumerate(ODD):
        text = text.replace(json.dumps(MARK % number), odd)
    return text.encode("utf-8", "surrogatepass")


def mutate_json(value, rng):
    """A mutated JSON value as bytes; one in four is damaged as bytes only."""
    if rng.random() < 0.25:
        return mutate_bytes(json.dumps(value).encode(), rng)
    return (b"\xef\xbb\xbf" if rng.random() < 0.03 else b"") + encode(mutate_value(value, rng), rng)


def mutate_records(records, rng):
    """The same for a list of objects; half of the time as JSON Lines."""
    if rng.random() < 0.5:
        return mutate_json(records, rng)
    lines = [json.dumps(record).encode() for record in records]
    if rng.random() < 0.25:
        return mutate_bytes(b"\n".join(lines) + b"\n", rng)
    at = rng.randrange(len(lines))
    lines[at] = encode(mutate_value(records[at], rng), rng).replace(b"\n", b" ")
    return rng.choice((b"\n", b"\r\n", b"\n\n")).join(lines) + rng.choice((b"", b"\n"))


def mutate_safetensors(content, rng):
    """A safetensors file: eight bytes of length, a JSON header, the numbers. Mostly the header changes."""
    if rng.random() < 0.3:
        return mutate_bytes(content, rng)
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    if rng.random() < 0.5:
        entry = header[rng.choice([name for name in header if name != "__metadata__"])]
        kinds = "BOOL I16 U16 F16 BF16 F8_E4M3 F8_E5M2 F8_E8M0 F4 F6_E2M3 C64 U8".split()
        entry["dtype"] = rng.choice(kinds)
        if entry["shape"] and rng.random() < 0.5:  # often the same number of bytes
            *rows, columns = entry["shape"]
            entry["shape"] = [*rows, columns * rng.choice((2, 4, 8)) // rng.choice((1, 2, 4))]
    else:
        header = mutate_value(header, rng)
    header = encode(header, rng)
    return len(header).to_bytes(8, "little") + header + content[end:]


def mutate_tokenizer(content, rng):
    """A sentencepiece model: pieces, each after a byte 10 and its length, then the settings."""
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
    """Damages a file in place, by its kind; now and then it is deleted or empty."""
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


# ---------------------------------------------------------------- the files to damage


@pytest.fixture(scope="module")
def good(tiny, tmp_path_factory):
    """Valid values and files of every kind."""
    names = sorted(path.name for path in (tiny / "images").iterdir())
    pairs = [pair(name, "A.", "B é.") | {"seed": 0} for name in names[:4]]
    pairs[1] |= {"chosen_finish": "stop", "rejected_finish": "length"}
    records = json.loads((tiny / "instructions.json").read_text())[:6]
    with_image = [record for record in records if "image" in record]
    descriptions = [{"id": r["id"], "image": r["image"], "description": "Red."} for r in with_image]
    del descriptions[0]["id"]
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
    projector = [(name, p) for name, p in llava.named_parameters() if "mm_projector" in name]
    adapter.tensors |= {name: torch.zeros(p.shape) for name, p in projector}
    moments = {f"{kind}.{name}": tensor.clone() for name, tensor in adapter.tensors.items() for kind in MOMENTS}
    (root / "out").mkdir()
    checkpoint.save(root / "out", 3, adapter, moments, SETTINGS, keep=1)
    adapters.write_adapter(root / "adapter", adapter)
    adapters.write_adapter(root / "adapter-bin", adapter)
    bins = {"adapter_model.safetensors": "adapter_model.bin", adapters.PROJECTOR_FILE: "non_lora_trainables.bin"}
    for old, new in bins.items():
        torch.save(load_file(root / "adapter-bin" / old), root / "adapter-bin" / new)
        (root / "adapter-bin" / old).unlink()
    return SimpleNamespace(root=root, images=tiny / "images", pairs=pairs, records=records, lines=lines,
                           descriptions=descriptions, llava=llava, image_files=list(make_images()))


def with_huggingface_config(folder, clip):
    """Replaces a checkpoint's configuration by the one that transformers would write."""
    file, vision = folder / "config.json", json.loads((clip / "config.json").read_text())["vision_config"]
    old = json.loads(file.read_text())
    llava_only = ("mm_", "image_", "tokenizer_", "unfreeze_", "use_mm_proj")
    text = {key: value for key, value in old.items() if not key.startswith(llava_only)}
    text["model_type"] = "mistral"
    new = {"model_type": "llava_next", "text_config": text, "vision_config": vision, "vision_feature_layer": -2,
           "image_grid_pinpoints": old["image_grid_pinpoints"]}  # fmt: skip
    file.write_text(json.dumps(new))


def make_images():
    """(name, bytes) of an image in many formats."""
    colors = Image.frombytes("RGB", (40, 30), random.Random(0).randbytes(3600))
    colors.paste("red", (5, 5, 20, 25))
    forms = {
        "png": [{}] + [{"mode": mode} for mode in ("L", "P", "RGBA", "1", "I;16", "LA")],
        "jpeg": [{}, {"mode": "L"}, {"mode": "CMYK"}, {"progressive": True},
                 {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0"}],  # fmt: skip
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
            image = colors.convert("L") if option.get("mode") in ("I;16", "LA") else colors
            image.convert(option.pop("mode", "RGB")).save(file, kind, **option)
            yield f"{number}.{kind}", file.getvalue()
    for kind in ("gif", "webp", "png"):
        file = io.BytesIO()
        colors.save(file, kind, save_all=True, append_images=[colors.rotate(90)])
        yield f"moving.{kind}", file.getvalue()


def mend_png(data):
    """Corrects the checksum of every chunk, so that the damage gets past it."""
    data, at = bytearray(data), 8
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        if end + 4 <= len(data):
            data[end : end + 4] = struct.pack(">I", zlib.crc32(data[at + 4 : end]))
        at = end + 4
    return bytes(data)


def mutate_tiff(data, rng):
    """Another type, count or value in one entry of the directory."""
    data, order = bytearray(data), "<" if data[:2] == b"II" else ">"
    [start] = struct.unpack_from(f"{order}I", data, 4)
    [entries] = struct.unpack_from(f"{order}H", data, start)
    entry = start + 2 + 12 * rng.randrange(entries)
    if rng.random() < 0.6:
        struct.pack_into(f"{order}H", data, entry + 2, rng.randrange(14))
    else:
        struct.pack_into(f"{order}I", data, entry + rng.choice((4, 8)), rng.choice((0, 1, 2, 9, 2**31)))
    return bytes(data)


# ---------------------------------------------------------------- the cases
# Each returns what to run, the damaged file, and texts of which a message must have one.


def pairs_case(rng, good, folder):
    file = folder / "pairs.jsonl"
    file.write_bytes(mutate_records(good.pairs, rng))
    problems = Problems(check=rng.random() < 0.5)

    def use():
        pairs = problems.collect(lambda entry: data.parse_pair(*entry), read_kind(file, "pairs"))
        problems.collect(lambda pair: pair_sample(pair, good.llava, good.images, 300), pairs)
        return problems

    return use, file, [str(file), "no such image: ", "points outside the image folder"]


def instructions_case(rng, good, folder):
    files = folder / "instructions.json", folder / "descriptions.jsonl"
    broken = rng.choice((0, 1))
    for number, (file, records) in enumerate(zip(files, (good.records, good.descriptions))):
        file.write_bytes(mutate_records(records, rng) if number == broken else json.dumps(records).encode())
    problems, plain = Problems(check=rng.random() < 0.5), rng.random() < 0.3

    def use():
        if plain:
            entries, _ = image_records(files[0])
            instructions = problems.collect(lambda entry: data.parse_instruction(*entry), entries)
        else:
            infusion = data.Infusion(files[0])
            entries = read_kind(files[1], "descriptions")
            instructions = problems.collect(lambda entry: infusion(*entry), entries)
        problems.collect(lambda i: instruction_sample(i, good.llava, good.images, 300), instructions)
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
        lines = files[0].read_text(encoding="utf-8").split("\n")[:-1]
        assert [json.loads(line) for line in lines][0]["seed"] == 0

    return use, kept, [str(file) for file in files]


def image_case(rng, good, folder):
    name, content = rng.choice(good.image_files)
    file = folder / f"image{Path(name).suffix}"
    directory = content[2:4] in (b"*\0", b"\0*") and rng.random() < 0.5
    content = mutate_tiff(content, rng) if directory else mutate_bytes(content, rng)
    file.write_bytes(mend_png(content) if file.suffix == ".png" else content)

    def use():
        size = images.image_size(file)
        image = images.open_image(file)
        assert image.mode == "RGB" and image.size == size
        images.corrupt(image, seed=rng.randrange(9))
        for mode in ("pad", "anyres"):
            tiles = images.make_tiles(image, mode, 56, PINPOINTS)
            assert tiles.pixels.isfinite().all() and images.image_tokens(size, mode, 56, 14, PINPOINTS) > 0

    return use, file, [str(file)]


def name_case(rng, good, folder):
    inside = folder / "in"
    if not inside.exists():
        (inside / "sub").mkdir(parents=True)
        name, content = good.image_files[0]
        for path in (folder / "out.png", inside / "a.png", inside / "sub" / "b.png", inside / "a\nb.png"):
            path.write_bytes(content)
        (inside / "c\n.png").write_bytes(content[:100])
        links = {"in.png": "a.png", "out.png": "../out.png", "loop.png": "loop.png", "none.png": "nowhere"}
        links["up"] = ".."
        for name, target in links.items():
            (inside / name).symlink_to(target)
        os.mkfifo(inside / "pipe.png")
    words = ["a.png", "sub", "b.png", "in.png", "out.png", "loop.png", "none.png", "up", "pipe.png",
             "a\nb.png", "c\n.png", "..", ".", "", "in", "\0", "~", "\ud83d", "\udc80", "\u2028", "\x1b[2J",
             "a" * 300, "a/" * 3000]  # fmt: skip
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
    files = sorted(path for path in (folder / name).iterdir() if path.name != "tokenizer.model")
    file = rng.choice([*files, folder / name / "config.json", *(folder / "clip-tiny").glob("[cm]*")])
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
    folder = out / "checkpoint-3"
    file = rng.choice([*folder.glob("[!a]*"), folder / "adapter_model.safetensors"])
    mutate_file(file, rng)
    if rng.random() < 0.1:
        (out / f"checkpoint-{rng.choice(('', '²', 'x', '-1', '٣'))}").mkdir()

    def use():
        step, tensors, moments = checkpoint.newest(out, SETTINGS, print)
        assert step == 3 and type(step) is int
        for kind in MOMENTS:
            assert all(moments[f"{kind}.{name}"].shape == tensor.shape for name, tensor in tensors.items())

    return use, file, [str(out)]


CASES = {
    "pairs": (pairs_case, 250),
    "instructions": (instructions_case, 250),
    "output": (output_case, 150),
    "images": (image_case, 500),
    "names": (name_case, 100),
    "models": (model_case, 400),
    "tokenizers": (tokenizer_case, 110),
    "adapters": (adapter_case, 120),
    "checkpoints": (checkpoint_case, 120),
}
assert sum(count for _, count in CASES.values()) == 2000


# ---------------------------------------------------------------- the test


class TooLong(BaseException):
    """Not an Exception, so that no reader takes it for a damaged file."""


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
    """Peak memory of this process so far, in GB."""
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss; Linux counts in KB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


@pytest.mark.filterwarnings("ignore")  # Pillow, torch and others warn of some damage
@pytest.mark.parametrize("kind", CASES)
def test_a_damaged_file_is_read_or_refused_in_one_line(kind, good, tmp_path):
    make, count = CASES[kind]
    before = peak()
    read = refused = 0
    for case in range(count * TIMES):
        use, file, names = make(random.Random(f"{SEED} {kind} {case}"), good, tmp_path)
        what = f"case {case} of {kind}, FUZZ_SEED={SEED}: {file}"
        messages = []
        try:
            with time_limit(SECONDS):
                messages = use() or []
        except InputError as error:
            messages = [str(error)]
        except (Exception, TooLong) as error:
            raise AssertionError(f"{what}: {type(error).__name__}") from error
        for message in messages:
            assert len(message.splitlines()) == 1 and message.isprintable(), (what, message)
            assert any(name in message for name in names), (what, message)
        if messages:
            refused += 1
        else:
            read += 1
    assert read and refused  # the damage is neither too small nor too large
    assert peak() - before < GIGABYTES
