"""Pairs, instructions and descriptions: what is read, which tokens are scored, and in which batches."""

import itertools
import json
import random
from collections import Counter

import pytest

from stic_min import InputError, data
from stic_min.batch import collate
from stic_min.formats.records import read_kind
from stic_min.loader import load_llava
from stic_min.runtime.ranks import Ranks
from stic_min.runtime.work import row_seed
from stic_min.samples import global_batches, instruction_sample, load_tiles, pair_sample, split_batch
from stic_min.text import IMAGE
from stic_min.training import rate

talk = lambda *turns: [{"from": ("human", "gpt")[i % 2], "value": turn} for i, turn in enumerate(turns)]


def write(path, records, lines=False):
    text = "".join(json.dumps(record) + "\n" for record in records) if lines else json.dumps(records)
    path.write_text(text, encoding="utf-8")
    return path


def pair_record(image="a.jpg", user="<image>\nDescribe it.", other=None, answer="A house.", **extra):
    talk = lambda user, answer: [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    return {"image": image, "chosen": talk(user, answer), "rejected": talk(other or user, "A boat."), **extra}


@pytest.mark.parametrize("lines", [True, False], ids=["JSON Lines", "list"])
def test_read_pairs(tmp_path, lines):
    users = "<image>\nDescribe it.", "Describe it.", "Describe it.\n<image>", "  Describe\nit. <image> "
    records = [pair_record(f"{i}.jpg", user) for i, user in enumerate(users)]
    records[1] |= {"chosen_finish": "stop", "rejected_finish": "length"}
    records[2] |= {"chosen_finish": "length"}
    records[3] |= {"image_corruption": True, "hallu_prompt": "Imagine.", "new": [1]}  # published keys, and others
    pairs = data.read_pairs(write(tmp_path / "pairs.json", records, lines))
    assert [p.image for p in pairs] == ["0.jpg", "1.jpg", "2.jpg", "3.jpg"]
    assert [p.prompt for p in pairs] == ["<image>\nDescribe it."] * 3 + ["<image>\nDescribe\nit."]
    assert {(p.chosen, p.rejected) for p in pairs} == {("A house.", "A boat.")}
    assert [p.chosen_stopped for p in pairs] == [True, True, False, True]
    assert [p.rejected_stopped for p in pairs] == [True, False, True, True]


def test_a_bad_pair_is_named_by_file_and_line(tmp_path):
    turns = pair_record()["chosen"]
    for record, complaint in (
        (pair_record(image=""), "no image"),
        (pair_record(user="<image> or <image>?"), "2 <image>"),
        (pair_record(answer=" "), "chosen, assistant: no content"),
        (pair_record(other="Tell."), "different prompts"),
        (pair_record(chosen=turns * 2), "chosen is \\["),
        (pair_record(rejected=turns[::-1]), "rejected is \\["),
        (pair_record(chosen=5), "chosen is"),
        ([1], "not a JSON object"),
    ):
        path = write(tmp_path / "pairs.jsonl", [pair_record(), pair_record("b.jpg"), record], lines=True)
        with pytest.raises(InputError, match=f"^{path}, line 3.*{complaint}"):
            data.read_pairs(path)


RECORDS = [
    {"id": "1", "image": "a.jpg", "conversations": talk("<image>\nQ1", "A1", "Q2", "A2")},
    {"id": "2", "conversations": talk("no image", "A")},
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


def test_descriptions_are_joined_with_their_records(tmp_path):
    ids = ("a.jpg", {"id": "1#2"}), ("c.jpg", {"id": "c.jpg"}), ("a.jpg", {"id": 1}), ("d.jpg", {"id": 0})
    instructions, counts = read_infused(tmp_path, *ids)  # #2: the second of an id; no id: the image
    assert counts == "4 described of 5 records with an image, 6 in all"
    assert [i.key for i in instructions] == ["1#2", "c.jpg", "1", "0"]
    first, second, third = (i.turns for i in instructions[:3])
    assert first == [("<image>\nImage description:\nD a.jpg\n\nQ4", "A4")]
    assert second == [("<image>\nImage description:\nD c.jpg\n\nQ5", "A5")]  # without the leading gpt turn
    assert third == [("<image>\nImage description:\nD a.jpg\n\nQ1", "A1"), ("Q2", "A2")]  # in the first turn only
    images = ("a.jpg", {}), ("b.jpg", {}), ("a.jpg", {"description": "second"})
    instructions, counts = read_infused(tmp_path, *images, one_line=True)
    assert counts.startswith("3 described of 5") and [i.key for i in instructions] == ["1", "3", "1#2"]
    for instruction, text in zip(instructions, ("D a.jpg\nQ1", "D b.jpg\nQ3", "second\nQ4")):
        assert instruction.turns[0][0] == f"<image>\nImage description: {text}"
    instructions, counts = read_infused(tmp_path, *ids, plain=True)  # the same records without descriptions
    assert counts.startswith("4 described of 5") and [i.key for i in instructions] == ["1#2", "c.jpg", "1", "0"]
    assert [i.turns[0] for i in instructions[:3]] == [
        ("<image>\nQ4", "A4"), ("<image>\nQ5", "A5"), ("<image>\nQ1", "A1")]  # fmt: skip


def test_a_description_without_its_record_is_an_error(tmp_path):
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
    assert late.turns == [("Q1", "A1"), ("<image>\nQ2", "A2")]  # the image stays in its turn
    assert data.infuse(late, "D").turns == [("Image description:\nD\n\nQ1", "A1"), ("<image>\nQ2", "A2")]
    assert data.infuse(parse("Q", "A"), "D").turns == [("<image>\nImage description:\nD\n\nQ", "A")]
    for turns in ((), ("Q",), ("Q", "A", "Q"), ("Q", " "), ("<image> Q", "A", "<image>", "A")):
        with pytest.raises(InputError, match=r"^x \(1\): "):
            parse(*turns)


@pytest.fixture(scope="module")
def llava(tiny):
    return load_llava(tiny / "llava-v1.6-tiny", image_mode="pad")  # 16 positions for any image


def layout(sample, llava):
    """The sample as the model gets it: flat ids, the ids of each scored segment, and the position before each."""
    batch = collate([sample], [load_tiles(sample, llava)], llava.config)
    scored = batch.labels != -100
    assert (len(batch.ids), scored.sum()) == (sample.length, sample.scored)
    assert (batch.labels == batch.ids[batch.scored])[scored].all() and not scored[:, 0].any()
    segments, before = [], []  # a label of -100 is before each segment, and in the padding
    for row, labels in zip(batch.scored.tolist(), batch.labels.tolist()):
        for position, label, following in zip(row, labels, [*labels[1:], -100]):
            if label == -100 and following != -100:
                before.append(position)
                segments.append([])
            elif label != -100:
                segments[-1].append(label)
    return batch.ids.tolist(), segments, before


def test_pair_sample(llava, tiny):
    pieces = llava.tokenizer.pieces.encode
    pair = ["x", "scene_01.jpg", "<image>\nWho?", "A red house.", "A boat"]
    build = lambda max_length: pair_sample(data.Pair(*pair, True, False), llava, tiny / "images", max_length)
    prompt = [1, *pieces("[INST] "), *[IMAGE] * 16, *pieces("\nWho? [/INST]")]
    chosen = [*pieces("A red house."), 2]
    rejected = pieces("A boat")  # it was cut off at the maximum length, so it has no end token
    sample = build(1024)  # both follow the prompt's last token
    assert layout(sample, llava) == (prompt + chosen + rejected, [chosen, rejected], [len(prompt) - 1] * 2)
    assert not sample.cut and sample.image == tiny / "images" / "scene_01.jpg"
    for room in (len(chosen), len(chosen) - 1, 1):  # exactly max_length tokens; the end token is cut first
        sample = build(len(prompt) + room)
        assert layout(sample, llava)[1] == [chosen[:room], rejected[:room]]
        assert sample.cut == (room < len(chosen))
    other = pair_sample(data.Pair(*pair, False, True), llava, tiny / "images", 1024)
    assert other.branches == [chosen[:-1], [*rejected, 2]]
    with pytest.raises(InputError, match=f"x: .* {len(prompt)} tokens"):
        build(len(prompt))


def test_instruction_sample(llava, tiny):
    pieces = llava.tokenizer.pieces.encode
    turns = [("<image>\nWho?", "A house."), ("Why?", "It is."), ("When?", "Now")]
    instruction = data.Instruction("x", "1", "scene_01.jpg", turns)
    build = lambda max_length: instruction_sample(instruction, llava, tiny / "images", max_length)
    prompts = [[1, *pieces("[INST] "), *[IMAGE] * 16, *pieces("\nWho? [/INST]")]]
    prompts += [pieces("[INST] Why? [/INST]"), pieces("[INST] When? [/INST]")]
    answers = [[*pieces(answer), 2] for _, answer in turns]
    parts = [part for turn in zip(prompts, answers) for part in turn]
    row = sum(parts, [])
    _, a, b, c, d, e, end = [sum(map(len, parts[:i])) for i in range(7)]  # where each prompt and answer begins
    assert layout(build(end), llava) == (row, answers, [a - 1, c - 1, e - 1]) and not build(end).cut
    # A limit inside an answer cuts it. A prompt without room for an answer is dropped.
    for limit, n in ((a + 1, a + 1), (b, b), (b + 1, b), (c, b), (c + 1, c + 1), (e, d), (end - 1, end - 1)):
        ids, segments, _ = layout(build(limit), llava)
        assert ids == row[:n] and build(limit).cut
        assert segments == [ids for ids in (row[a : min(b, n)], row[c : min(d, n)], row[e:n]) if ids]
    with pytest.raises(InputError, match=f"x: the first prompt .* {a} tokens"):
        build(a)
    turns[:2] = [("Who?", "A house."), ("<image>\nWhy?", "It is.")]
    with pytest.raises(InputError, match="x: its <image> appears only after 20 tokens"):
        build(20)


def test_global_batches_are_shuffled_and_sorted_within():
    lengths = [(37 * i) % 101 for i in range(30)]
    batches = global_batches(lengths, 8, seed=3)
    assert [len(b) for b in batches] == [8, 8, 8, 6] and sorted(sum(batches, [])) == list(range(30))
    assert all(batch == sorted(batch, key=lambda i: -lengths[i]) for batch in batches)  # no two of a length here
    assert global_batches(lengths, 8, seed=3) == batches != global_batches(lengths, 8, seed=4)
    assert set(batches[0]) != set(range(8)) and global_batches([1], 4, 0) == [[0]]


def test_every_epoch_has_all_samples_in_its_own_order():
    lengths = [(37 * i) % 101 for i in range(7)]
    one, three = (global_batches(lengths, 3, 5, epochs) for epochs in (1, 3))
    assert [len(b) for b in three] == [3, 3, 1] * 3 and three[:3] == one  # the first epoch is as without the flag
    epochs = [three[:3], three[3:6], three[6:]]
    assert all(sorted(sum(epoch, [])) == list(range(7)) for epoch in epochs)
    assert len({str(epoch) for epoch in epochs}) == 3
    order = list(range(7))
    random.Random(row_seed(5, "epoch", 1)).shuffle(order)  # by hand
    assert [sorted(batch) for batch in epochs[1]] == [sorted(order[:3]), sorted(order[3:6]), order[6:]]


def test_split_batch_gives_every_rank_as_many_micro_batches():
    for world, size, n in itertools.product((1, 2, 3, 4), (1, 2, 3), range(1, 14)):
        batch = [10 * i for i in range(n)]
        shares = [split_batch(batch, Ranks(rank, world, "cpu"), size) for rank in range(world)]
        assert {len(share) for share in shares} == {-(-n // (world * size))}  # equal on all ranks
        chunks = [chunk for share in shares for chunk in share]
        assert Counter(sample for samples, real in chunks if real for sample in samples) == Counter(batch)
        assert all(0 < len(samples) <= size and set(samples) <= set(batch) for samples, _ in chunks)


def test_rate_is_linear_warm_up_then_a_cosine():
    # 100 steps: 3 of warm-up, then half a cosine over 97; the last is (1 + cos(pi * 96 / 97)) / 2
    assert [rate(i, 100) for i in range(4)] == pytest.approx([1 / 3, 2 / 3, 1, 1])
    assert rate(3 + 97 / 2, 100) == pytest.approx(0.5) and rate(99, 100) == pytest.approx(0.0002622, abs=1e-7)
    # 5 steps: ceil(0.15) = 1 of warm-up, then (1 + cos(pi * k / 4)) / 2
    assert [rate(i, 5) for i in range(5)] == pytest.approx([1, 1, 0.853553, 0.5, 0.146447], abs=1e-6)
    assert rate(0, 1) == 1
