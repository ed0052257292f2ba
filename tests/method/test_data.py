"""Pairs, instructions and descriptions: what is read, what is scored, in which batches, and what is written."""

import itertools
import json
from collections import Counter
from types import SimpleNamespace

import pytest

from stic_min import InputError, data
from stic_min.batch import collate
from stic_min.formats.records import read_kind
from stic_min.loader import load_llava
from stic_min.runtime import files
from stic_min.runtime import output as output_module
from stic_min.runtime.output import Output
from stic_min.runtime.ranks import Ranks
from stic_min.runtime.work import subset
from stic_min.samples import global_batches, instruction_sample, load_tiles, pair_sample, split_batch
from stic_min.text import IMAGE
from stic_min.training import rate

names = lambda path: [record["image"] for _, record in files.read_records(path)]
talk = lambda *turns: [{"from": ("human", "gpt")[i % 2], "value": turn} for i, turn in enumerate(turns)]


def write(path, records, lines=False):
    path.write_text("".join(json.dumps(r) + "\n" for r in records) if lines else json.dumps(records), encoding="utf-8")
    return path


def pair_record(image="a.jpg", user="<image>\nDescribe it.", other=None, answer="A house.", **extra):
    talk = lambda user, answer: [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    return {"image": image, "chosen": talk(user, answer), "rejected": talk(other or user, "A boat."), **extra}


@pytest.mark.parametrize("lines", [True, False], ids=["JSON lines", "list"])
def test_read_pairs(tmp_path, lines):
    users = "<image>\nDescribe it.", "Describe it.", "Describe it.\n<image>", "  Describe\nit. <image> "
    records = [pair_record(f"{i}.jpg", user) for i, user in enumerate(users)]
    records[1] |= {"chosen_finish": "stop", "rejected_finish": "length"}
    records[2] |= {"chosen_finish": "length"}
    records[3] |= {"image_corruption": True, "hallu_prompt": "Imagine.", "new": [1]}  # the published keys, and others
    pairs = data.read_pairs(write(tmp_path / "pairs.json", records, lines))
    assert [p.image for p in pairs] == ["0.jpg", "1.jpg", "2.jpg", "3.jpg"]
    assert [p.prompt for p in pairs] == ["<image>\nDescribe it."] * 3 + ["<image>\nDescribe\nit."]
    assert {(p.chosen, p.rejected) for p in pairs} == {("A house.", "A boat.")}
    assert [p.chosen_stopped for p in pairs] == [True, True, False, True]
    assert [p.rejected_stopped for p in pairs] == [True, False, True, True]


def test_bad_pairs_are_named(tmp_path):
    turns = pair_record()["chosen"]
    for record, complaint in (
        *[(pair_record(image=""), "no image"), (pair_record(user="<image> or <image>?"), "2 <image>")],
        *[(pair_record(answer=" "), "chosen, assistant: no con"), (pair_record(other="Tell."), "different prompts")],
        *[(pair_record(chosen=turns * 2), "chosen is \\["), (pair_record(rejected=turns[::-1]), "rejected is \\[")],
        *[(pair_record(chosen=5), "chosen is"), ([1], "not a JSON object")],
    ):
        path = write(tmp_path / "pairs.jsonl", [pair_record(), pair_record("b.jpg"), record], lines=True)
        with pytest.raises(InputError, match=f"^{path}, line 3.*{complaint}"):
            data.read_pairs(path)


RECORDS = [
    {"id": "1", "image": "a.jpg", "conversations": talk("<image>\nQ1", "A1", "Q2", "A2")},
    {"id": "2", "conversations": talk("no picture", "A")},
    {"id": "3", "image": "b.jpg", "conversations": talk("Q3", "A3")},
    {"id": "1", "image": "a.jpg", "conversations": talk("Q4\n<image>", "A4")},
    {"image": "c.jpg", "conversations": [{"from": "gpt", "value": "Hi"}, *talk("<image>\nQ5", "A5")]},
    {"id": 0, "image": "d.jpg", "conversations": talk("Q6", "A6", "now <image>", "A7")},
]


def read_infused(folder, *described, records=RECORDS, **options):
    """described: (image, other fields) of each description -> the infused instructions, the line of counts."""
    described = [{"image": image, "prompt": "P", "description": f" D {image} "} | rest for image, rest in described]
    infusion = data.Infusion(write(folder / "x.json", records), **options)
    descriptions = read_kind(write(folder / "d.jsonl", described, lines=True), "descriptions")
    return [infusion(where, record) for where, record in descriptions], infusion.summary()


def test_descriptions_join(tmp_path):
    ids = ("a.jpg", {"id": "1#2"}), ("c.jpg", {"id": "c.jpg"}), ("a.jpg", {"id": 1}), ("d.jpg", {"id": 0})
    instructions, counts = read_infused(tmp_path, *ids)  # the second of an id is #2; without one it is the picture
    assert counts == "4 described of 5 records with an image, 6 in all"
    assert [i.key for i in instructions] == ["1#2", "c.jpg", "1", "0"]
    first, second, third = (i.turns for i in instructions[:3])
    assert first == [("<image>\nImage description:\nD a.jpg\n\nQ4", "A4")]
    assert second == [("<image>\nImage description:\nD c.jpg\n\nQ5", "A5")]  # without the leading gpt turn
    assert third == [("<image>\nImage description:\nD a.jpg\n\nQ1", "A1"), ("Q2", "A2")]  # in the first turn only
    pictures = ("a.jpg", {}), ("b.jpg", {}), ("a.jpg", {"description": "second"})
    instructions, counts = read_infused(tmp_path, *pictures, one_line=True)
    assert counts.startswith("3 described of 5") and [i.key for i in instructions] == ["1", "3", "1#2"]
    for instruction, text in zip(instructions, ("D a.jpg\nQ1", "D b.jpg\nQ3", "second\nQ4")):
        assert instruction.turns[0][0] == f"<image>\nImage description: {text}"
    instructions, counts = read_infused(tmp_path, *ids, plain=True)  # the same records, nothing put in front
    assert counts.startswith("4 described of 5") and [i.key for i in instructions] == ["1#2", "c.jpg", "1", "0"]
    assert [i.turns[0] for i in instructions[:3]] == [
        ("<image>\nQ4", "A4"), ("<image>\nQ5", "A5"), ("<image>\nQ1", "A1")]  # fmt: skip


def test_descriptions_that_do_not_fit(tmp_path):
    for complaint, *described in (
        ("describes 'z.jpg', which is not in .*x.json", ("z.jpg", {})),
        ("describes '7', which is not in .*x.json", ("a.jpg", {"id": "7"})),
        ("describes b.jpg, but .*record 0 .* has the image a.jpg", ("a.jpg", {"id": "1#2"}), ("b.jpg", {"id": "1"})),
        ("describes 'b.jpg', which is not in", ("b.jpg", {}), ("b.jpg", {})),  # more than it has
        ("3 is described twice", ("b.jpg", {"id": "3"}), ("b.jpg", {"id": "3"})),
        ("no description", ("b.jpg", {"description": ""})),
    ):
        with pytest.raises(InputError, match=f"d.jsonl, line {len(described)}: .*{complaint}"):
            read_infused(tmp_path, *described)
    for image, complaint in ((["a.jpg", "b.jpg"], "x.json, record 0: 2 images"), ("", "none of its 1 records has an")):
        with pytest.raises(InputError, match=complaint):
            read_infused(tmp_path, ("a.jpg", {"id": "1"}), records=[RECORDS[0] | {"image": image}])


def test_parse_instruction_and_infuse():
    parse = lambda *turns: data.parse_instruction("x", "1", {"image": "a.jpg", "conversations": talk(*turns)})
    late = parse("Q1", "A1", "Q2 <image>", "A2")
    assert late.turns == [("Q1", "A1"), ("<image>\nQ2", "A2")]  # the picture stays in its turn
    assert data.infuse(late, "D").turns == [("Image description:\nD\n\nQ1", "A1"), ("<image>\nQ2", "A2")]
    assert data.infuse(parse("Q", "A"), "D").turns == [("<image>\nImage description:\nD\n\nQ", "A")]
    for turns in ((), ("Q",), ("Q", "A", "Q"), ("Q", " "), ("<image> Q", "A", "<image>", "A")):
        with pytest.raises(InputError, match=r"^x \(1\): "):
            parse(*turns)


@pytest.fixture(scope="module")
def llava(tiny):
    return load_llava(tiny / "llava-v1.6-tiny", image_mode="pad")  # 16 positions for any picture


def layout(sample, llava):
    """Flat ids, labels of each scored segment and the place before it, as the model gets them."""
    batch = collate([sample], [load_tiles(sample, llava)], llava.config)
    scored = batch.labels != -100
    assert (len(batch.ids), scored.sum()) == (sample.length, sample.scored)
    assert (batch.labels == batch.ids[batch.scored])[scored].all() and not scored[:, 0].any()
    segments, before = [], []  # a label of -100 stands before each segment, and where a row is padded
    for row, labels in zip(batch.scored.tolist(), batch.labels.tolist()):
        for place, label, following in zip(row, labels, [*labels[1:], -100]):
            if label == -100 and following != -100:
                before.append(place)
                segments.append([])
            elif label != -100:
                segments[-1].append(label)
    return batch.ids.tolist(), segments, before


def test_pair_sample(llava, tiny):
    pieces, pair = llava.tokenizer.pieces.encode, ["x", "scene_01.jpg", "<image>\nWho?", "A red house.", "A boat"]
    build = lambda n: pair_sample(data.Pair(*pair, True, False), llava, tiny / "images", n)
    prompt = [1, *pieces("[INST] "), *[IMAGE] * 16, *pieces("\nWho? [/INST]")]
    chosen, rejected = [*pieces("A red house."), 2], pieces("A boat")  # it ended by length, so no end token
    sample = build(1024)  # both follow the prompt's last token
    assert layout(sample, llava) == (prompt + chosen + rejected, [chosen, rejected], [len(prompt) - 1] * 2)
    assert not sample.cut and sample.image == tiny / "images" / "scene_01.jpg"
    for room in (len(chosen), len(chosen) - 1, 1):  # exactly max_length tokens; the end token goes first
        sample = build(len(prompt) + room)
        assert layout(sample, llava)[1] == [chosen[:room], rejected[:room]] and sample.cut == (room < len(chosen))
    other = pair_sample(data.Pair(*pair, False, True), llava, tiny / "images", 1024)
    assert other.branches == [chosen[:-1], [*rejected, 2]]
    with pytest.raises(InputError, match=f"x: .* {len(prompt)} tokens"):
        build(len(prompt))


def test_instruction_sample(llava, tiny):
    pieces, turns = llava.tokenizer.pieces.encode, [("<image>\nWho?", "A house."), ("Why?", "It is."), ("When?", "Now")]
    instruction = data.Instruction("x", "1", "scene_01.jpg", turns)
    build = lambda n: instruction_sample(instruction, llava, tiny / "images", n)
    prompts = [[1, *pieces("[INST] "), *[IMAGE] * 16, *pieces("\nWho? [/INST]")]]
    prompts += [pieces("[INST] Why? [/INST]"), pieces("[INST] When? [/INST]")]
    answers = [[*pieces(answer), 2] for _, answer in turns]
    parts = [part for turn in zip(prompts, answers) for part in turn]
    whole, (_, a, b, c, d, e, end) = sum(parts, []), [sum(map(len, parts[:i])) for i in range(7)]
    assert layout(build(end), llava) == (whole, answers, [a - 1, c - 1, e - 1]) and not build(end).cut
    # inside an answer; before, in and behind a prompt, which is not kept without an answer
    for length, kept in ((a + 1, a + 1), (b, b), (b + 1, b), (c, b), (c + 1, c + 1), (e, d), (end - 1, end - 1)):
        ids, labels, _ = layout(build(length), llava)
        assert ids == whole[:kept] and build(length).cut
        assert labels == [x for x in (whole[a : min(b, kept)], whole[c : min(d, kept)], whole[e:kept]) if x]
    with pytest.raises(InputError, match=f"x: the first prompt .* {a} tokens"):
        build(a)
    turns[:2] = [("Who?", "A house."), ("<image>\nWhy?", "It is.")]
    with pytest.raises(InputError, match="x: its <image> appears only after 20 tokens"):
        build(20)


def test_global_batches():
    lengths = [(37 * i) % 101 for i in range(30)]
    batches = global_batches(lengths, 8, seed=3)
    assert [len(b) for b in batches] == [8, 8, 8, 6] and sorted(sum(batches, [])) == list(range(30))
    assert all(batch == sorted(batch, key=lambda i: -lengths[i]) for batch in batches)  # no two of a length here
    assert global_batches(lengths, 8, seed=3) == batches != global_batches(lengths, 8, seed=4)
    assert set(batches[0]) != set(range(8)) and global_batches([1], 4, 0) == [[0]]


def test_split_batch():
    for world, size, n in itertools.product((1, 2, 3, 4), (1, 2, 3), range(1, 14)):
        batch = [10 * i for i in range(n)]
        shares = [split_batch(batch, Ranks(rank, world, "cpu"), size) for rank in range(world)]
        assert {len(share) for share in shares} == {-(-n // (world * size))}  # all ranks compute in step
        chunks = [chunk for share in shares for chunk in share]
        assert Counter(sample for samples, real in chunks if real for sample in samples) == Counter(batch)
        assert all(0 < len(samples) <= size and set(samples) <= set(batch) for samples, _ in chunks)


def test_rate():
    # 100 steps: 3 of warm-up, then half a cosine over 97, (1 + cos(pi * 96 / 97)) / 2 at last
    assert [rate(i, 100) for i in range(4)] == pytest.approx([1 / 3, 2 / 3, 1, 1])
    assert rate(3 + 97 / 2, 100) == pytest.approx(0.5) and rate(99, 100) == pytest.approx(0.0002622, abs=1e-7)
    # 5 steps: ceil(0.15) = 1 of warm-up, then (1 + cos(pi * k / 4)) / 2
    assert [rate(i, 5) for i in range(5)] + [rate(0, 1)] == pytest.approx([1, 1, 0.853553, 0.5, 0.146447, 1], abs=1e-6)


def test_subset():
    items = [f"{i:03}" for i in range(100)]
    chosen = subset(items, 10, seed=1)
    assert len(set(chosen)) == 10 and chosen == sorted(chosen) and set(chosen) <= set(subset(items, 20, seed=1))
    assert chosen == subset(items, 10, seed=1) != subset(items, 10, seed=2)
    assert subset(items, None, 1) == subset(items, 100, 1) == subset(items, 101, 1) == items


RUNNING = []


def output(path, rank=0, world=1, **settings):
    # Here one after another: each is told what the others, which have started too, have finished by then.
    gather = lambda value: [o.appended for o in RUNNING] if isinstance(value, int) else [value]
    ranks = SimpleNamespace(rank=rank, world=world, first=rank == 0, barrier=lambda: None, gather=gather,
                            check_shared=lambda *_: None)  # fmt: skip
    if rank == 0:
        for earlier in RUNNING[:1]:  # it has been killed
            earlier.lock.close()
        RUNNING.clear()
    started = Output(path, "image", {"model": "M", "seed": 0} | settings, ranks).start()
    RUNNING.append(started)
    return started


def test_output_after_a_kill(tmp_path):
    path = tmp_path / "runs" / "out.jsonl"
    first = output(path)
    for name in ("é", "c"):
        first.append({"image": name})
        assert names(path)[-1] == name and name in first.done  # there at once
    whole = path.read_bytes()
    for cut in range(1, whole.index(b"\n")):  # a line that was cut off anywhere, in the midst of a letter too
        path.write_bytes(whole + whole[:cut])
        again = output(path)
        assert list(again.done) == ["é", "c"] and path.read_bytes() == whole
    again.append({"image": "a"})
    assert again.finish(["a", "b", "c"]) == [{"image": name, "model": "M", "seed": 0} for name in "ac"]
    assert names(path) == ["a", "c", "é"]  # in the order of the keys, others behind


def test_output_forgets_a_part_without_a_whole_line(tmp_path):
    (tmp_path / "out.jsonl.part0").write_text('{"image": "a"')
    (tmp_path / "out.jsonl.partial").write_text("somebody's own")
    two = [output(tmp_path / "out.jsonl", rank, 2) for rank in range(2)]
    two[0].append({"image": "a"})
    assert [r["image"] for r in two[0].finish("a")] == ["a"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.jsonl", "out.jsonl.partial"]


def test_output_of_several_ranks(tmp_path):
    path = tmp_path / "out.jsonl"
    three = [output(path, rank, 3) for rank in range(3)]
    for rank, name in ((1, "c"), (0, "d"), (1, "a"), (0, "b")):
        three[rank].append({"image": name})
    with open(tmp_path / "out.jsonl.part1", "a") as file:
        file.write('{"image": "z", "mod')  # killed here
    two = [output(path, rank, 2) for rank in range(2)]  # started again with fewer ranks
    assert [set(o.done) for o in two] == [set("abcd")] * 2
    two[1].append({"image": "e"})
    assert two[1].finish("abcdef") == [] and [r["image"] for r in two[0].finish("abcdef")] == list("abcde")
    assert names(path) == list("abcde") and list(tmp_path.iterdir()) == [path]


def test_output_that_one_rank_does_not_see_is_kept(tmp_path, monkeypatch):
    """As where each node has a disk of its own."""
    monkeypatch.setattr(output_module, "wait_until", lambda true: true())
    path, elsewhere = tmp_path / "out.jsonl", tmp_path / "elsewhere"
    two = [output(path, rank, 2) for rank in range(2)]
    two[0].append({"image": "a"})
    two[1].append({"image": "b"})
    two[1].file.rename(elsewhere)
    with pytest.raises(InputError, match="rank 1 wrote 1 records, but .*part1 has 0: --out must be on a"):
        two[0].finish("ab")
    assert (tmp_path / "out.jsonl.part0").is_file() and not path.exists()
    elsewhere.rename(two[1].file)
    assert [r["image"] for r in output(path).finish("ab")] == ["a", "b"]


def test_output_of_a_run_that_is_going_on_is_refused(tmp_path):
    path = tmp_path / "out.jsonl"
    first = output(path)
    first.append({"image": "a"})
    second = Output(path, "image", first.settings, first.ranks)
    with pytest.raises(InputError, match=f"another run is writing to {path}"):
        second.start()
    first.append({"image": "b"})
    assert [r["image"] for r in first.finish("ab")] == ["a", "b"] and list(tmp_path.iterdir()) == [path]
    assert list(second.start().done) == ["a", "b"]


def test_output_of_another_run_is_refused(tmp_path):
    path = tmp_path / "out.jsonl"
    output(path, 1, 2).append({"image": "a"})  # in a part file
    with pytest.raises(InputError, match="part1 was written with seed 0, but this run has 1"):
        output(path, seed=1)
    assert output(path).finish("a")
    with pytest.raises(InputError, match=f"{path} was written with model 'M', but this run has 'N'"):
        output(path, model="N")
    assert names(path) == ["a"]
    path.write_text('{"id": 1}\n')
    with pytest.raises(InputError, match=f"{path}, line 1: not a line written by this command"):
        output(path)


def test_a_file_that_can_not_be_written_is_not_called_a_folder(tmp_path, monkeypatch):
    (tmp_path / "out.jsonl").touch()
    monkeypatch.setattr(files.os, "access", lambda path, mode: False)
    for path in (tmp_path / "out.jsonl", tmp_path):
        with pytest.raises(InputError, match=f"can't write to {path}: {path} is not writable"):
            files.check_place(path)
