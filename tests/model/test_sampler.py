"""The sampler against the forward pass of the loss: what it generates is fed back as one sequence, which must
give the same log-probs. That covers cache, positions, masks and bookkeeping without stored values."""

import gc
import math
import weakref
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from stic_min import InputError, sampler
from stic_min import slots as slots_module
from stic_min.cache import KVCache
from stic_min.images import open_image
from stic_min.loader import load_llava
from stic_min.loss import token_logps
from stic_min.runtime.work import row_seed
from stic_min.sampler import Request, filtered_probs, pick, sample, sample_naively, stream

GREEDY, SAMPLED = {"temperature": 0.0}, {"temperature": 0.7, "top_p": 0.9}
TOP_K = {"temperature": 1.5, "top_k": 5, "top_p": 0.9}
# text and the numbers of its images: prompts of many lengths, images of many shapes; none, two, one in
# mid-text
ROWS = [
    ("<image>\nDescribe the image concisely.", [1]),
    ("What is 12 + 30?", []),
    ("<image>\n<image>\nWhich of the two images has a boat in it, and what is in the other?", [2, 7]),
    ("Look at this: <image> Is it day or night?", [3]),
    ("<image>", [5]),
]


@pytest.fixture(scope="module", params=["llava-v1.5-tiny", "llava-v1.6-tiny"], ids=["pad", "anyres"])
def llava(tiny, request):
    return load_llava(tiny / request.param)


@pytest.fixture(scope="module")
def rows(llava, tiny):
    """(prompts, images, seeds) of ROWS."""
    scenes = {i: open_image(next((tiny / "images").glob(f"scene_0{i}.*"))) for i in range(1, 9)}
    prompts = [llava.chat_prompt(text, images=0) for text, _ in ROWS]
    return prompts, [[scenes[i] for i in numbers] for _, numbers in ROWS], [100 + i for i in range(len(ROWS))]


def one_sequence(llava, prompt, images, branches=()):
    ids = llava.tokenizer.encode_prompt(prompt)
    return llava.single_batch(ids, list(branches), [llava.tiles(image) for image in images])


@torch.no_grad()
def rescored(llava, prompt, images, ids):
    """log p of `ids` after the prompt, in one forward pass without a cache."""
    batch = one_sequence(llava, prompt, images, branches=[ids])
    return token_logps(llava(batch), batch.labels)[0, 1:].tolist()


def same(samples, expected):
    assert [s.ids for s in samples] == [s.ids for s in expected]
    assert [s.finish for s in samples] == [s.finish for s in expected]
    for s, e in zip(samples, expected):
        assert s.logps == pytest.approx(e.logps, abs=1e-4)


# ---------------------------------------------------------------- generate, then rescore


@pytest.mark.parametrize("how", [GREEDY, SAMPLED, {"temperature": 1.5}], ids=["greedy", "nucleus", "hot"])
def test_generate_then_rescore(llava, rows, how):
    samples = sample(llava, *rows, max_new_tokens=24, **how)
    assert sum(len(s.ids) for s in samples) > 60  # enough to mean something, should a row or two end early
    for prompt, images, s in zip(*rows[:2], samples):
        assert s.logps == pytest.approx(rescored(llava, prompt, images, s.ids), abs=1e-4)


@pytest.mark.parametrize("how", [GREEDY, SAMPLED, TOP_K], ids=["greedy", "nucleus", "top-k"])
def test_against_sampling_without_a_cache(llava, rows, how, monkeypatch):
    compare = lambda: same(sample(llava, *rows, max_new_tokens=8, **how),
                           [sample_naively(llava, *row, max_new_tokens=8, **how) for row in zip(*rows)])
    compare()
    monkeypatch.setattr(llava.tokenizer, "eos", sample(llava, *rows, max_new_tokens=8, **how)[0].ids[3])
    compare()  # the first row, at least, stops early


@pytest.mark.parametrize("how", [GREEDY, SAMPLED], ids=["greedy", "nucleus"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_an_error(llava, rows, monkeypatch, how, value):
    """Even if it is the logit of one unlikely token, in one row and one step. Rows that have ended do not
    count."""
    step, count = sampler.pick, []

    def breaks(logits, *args):
        count.append(0)
        if len(count) == 5:
            logits[2, 7] = value
        return step(logits, *args)

    monkeypatch.setattr(sampler, "pick", breaks)
    message = "^2: the model's logits in float32 are NaN or infinite; the checkpoint"
    with pytest.raises(InputError, match=message):
        sample(llava, *rows, max_new_tokens=16, **how)
    count.clear()
    sample(llava, *rows, max_new_tokens=4, **how)


def test_images_are_a_list_of_images(llava, rows, tiny):
    prompt, [image] = rows[0][0], rows[1][0]
    response_logp = lambda prompt, images: llava.response_logp(prompt, "Yes", images)
    generate = lambda prompt, images: llava.generate([prompt], [images])
    for call in llava.logits, response_logp, generate:
        with pytest.raises(TypeError, match="images is a single Image; pass a list of PIL images"):
            call(prompt, image)
        with pytest.raises(TypeError, match="images contains a str, not a PIL image: open it with PIL.Image"):
            call(prompt, [str(tiny / "images" / "scene_01.jpg")])
    with pytest.raises(TypeError, match="prompts is a single str; pass a list"):
        llava.generate(prompt, [[image]])


# ---------------------------------------------------------------- a row and its batch


@pytest.mark.parametrize("how", [GREEDY, SAMPLED], ids=["greedy", "nucleus"])
def test_ragged_batch_equals_its_rows(llava, rows, how):
    alone = [sample(llava, [p], [i], [s], max_new_tokens=16, **how)[0] for p, i, s in zip(*rows)]
    assert len({tuple(s.ids) for s in alone}) == len(ROWS)
    same(sample(llava, *rows, max_new_tokens=16, **how), alone)
    for order in ([3, 1, 4, 0, 2], [2, 2, 0]):  # other places, other company, the same row twice
        shuffled = [[column[i] for i in order] for column in rows]
        same(sample(llava, *shuffled, max_new_tokens=16, **how), [alone[i] for i in order])


def requests(llava, rows, order):
    """Requests of some of ROWS; repeated images are the same Tiles."""
    tiles = {id(image): llava.tiles(image) for images in rows[1] for image in images}
    for place, i in enumerate(order):
        prompt, images, seed = (column[i] for column in rows)
        ids = llava.prompt_ids(prompt, images)
        yield Request(place, ids, [tiles[id(image)] for image in images], seed)


@pytest.mark.parametrize("stride", [1, 5])
@pytest.mark.parametrize("slots", [1, 2, 3, 8])
@pytest.mark.parametrize("how", [GREEDY, SAMPLED], ids=["greedy", "nucleus"])
def test_slots_are_refilled(llava, rows, how, slots, stride, monkeypatch):
    """Rows end at different steps and make room for others, which get the same samples as on their own."""
    free = [sample(llava, [p], [i], [s], max_new_tokens=16, **how)[0] for p, i, s in zip(*rows)]
    monkeypatch.setattr(llava.tokenizer, "eos", free[0].ids[3])  # at least one row is short
    alone = [sample(llava, [p], [i], [s], max_new_tokens=16, **how)[0] for p, i, s in zip(*rows)]
    assert len({len(s.ids) for s in alone}) >= 2
    monkeypatch.setattr(slots_module, "STRIDES", {"cpu": stride})  # on a GPU, 8 steps at a time
    order = [0, 1, 2, 3, 4, 3, 0, 0, 1]
    got = dict(stream(llava, requests(llava, rows, order), slots=slots, max_new_tokens=16, **how))
    same([got[place] for place in range(len(order))], [alone[i] for i in order])


class Recorder(TorchDispatchMode):
    """A CUDA graph's semantics on the CPU: records operations without effect; `replay` runs the same
    operations on the same tensors, without the Python code between them."""

    def __enter__(self):
        self.operations, self.before, self.made = [], {}, set()
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, torch.Tensor) and id(x) not in self.made and id(x) not in self.before:
                self.before[id(x)] = x, x.clone()
        out = func(*args, **kwargs or {})
        self.operations.append((func, args, kwargs or {}, out))  # keeps all tensors, so that ids stay theirs
        new = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor) and id(x) not in self.before]
        self.made |= {id(x) for x in new}
        return out

    def __exit__(self, *error):
        super().__exit__(*error)
        for x, value in self.before.values():
            x.copy_(value)

    def replay(self):
        now = {}
        current = lambda x: now.get(id(x), x) if isinstance(x, torch.Tensor) else x
        for func, args, kwargs, out in self.operations:
            new = func(*tree_map(current, args), **tree_map(current, kwargs))
            now |= {id(x): y for x, y in zip(tree_leaves(out), tree_leaves(new)) if id(x) in self.made}

    def pool(self):
        return 0


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("how", [GREEDY, SAMPLED], ids=["greedy", "nucleus"])
def test_replayed_steps_give_the_same_samples(llava, rows, how, slots, monkeypatch):
    """With recorded steps, as on a GPU: no step may depend on Python code, or on a tensor that is
    replaced."""
    alone = [sample(llava, [p], [i], [s], max_new_tokens=40, **how)[0] for p, i, s in zip(*rows)]
    recorders, replays, replay = [], [], Recorder.replay
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: recorders.append(Recorder()) or recorders[-1])
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool: graph)
    monkeypatch.setattr(Recorder, "replay", lambda self: replays.append(self) or replay(self))
    for name, value in {"GRAPHED": {"cpu"}, "STRIDES": {"cpu": 8}, "WIDTHS": {"cpu": 32}}.items():
        monkeypatch.setattr(slots_module, name, value)
    monkeypatch.setattr(KVCache, "chunk", 32)
    order = [1, 3, 0, 4, 2, 1, 3]  # longer ones later, so that the cache grows; then short ones again
    got = dict(stream(llava, requests(llava, rows, order), slots=slots, max_new_tokens=40, **how))
    same([got[place] for place in range(len(order))], [alone[i] for i in order])
    assert len(recorders) > 1 and len(replays) > 3 * len(recorders)


@pytest.mark.parametrize("graphed", [set(), {"cpu"}])
def test_the_cache_is_freed_as_soon_as_the_samples_are_there(llava, rows, monkeypatch, graphed):
    """Not by the garbage collector, at some later time: on a GPU the next cache would not fit next to this
    one."""
    caches = []

    class Cache(KVCache):
        def __init__(self, *args):
            super().__init__(*args)
            caches.append(weakref.ref(self))

    monkeypatch.setattr(slots_module, "KVCache", Cache)
    monkeypatch.setattr(slots_module, "GRAPHED", graphed)
    gc.disable()
    try:
        sample(llava, *rows, max_new_tokens=1)
        assert [cache() for cache in caches] == [None]
    finally:
        gc.enable()


def test_requests_are_read_as_slots_become_free(llava, rows):
    read = []

    def watched():
        for request in requests(llava, rows, range(5)):
            read.append(request.key)
            yield request

    samples = stream(llava, watched(), slots=1, max_new_tokens=4)
    assert read == [] and next(samples)[0] == 0
    assert len(read) == 3  # the first, the next one, and another to see that the next one's group is complete


@pytest.mark.parametrize("slots, groups", [(12, [3, 1]), (4, [2, 1, 1]), (1, [1, 1, 1, 1])])
def test_an_image_is_prefilled_once(llava, rows, monkeypatch, slots, groups):
    """Prompts about one image share everything up to it, with the same samples as alone; CLIP encodes it
    once."""
    image = rows[1][0]
    texts = ["Describe the image.", "What is 12 + 30?", "Is it day or night?"]
    prompts = [llava.chat_prompt(text) for text in texts] + rows[0][3:4]
    images = [image, image, image, rows[1][3]]
    alone = [sample(llava, [p], [i], [7], max_new_tokens=8)[0] for p, i in zip(prompts, images)]
    seen, tower = [], llava.patch_features
    monkeypatch.setattr(llava, "patch_features", lambda tiles: seen.append(len(tiles)) or tower(tiles))
    four = requests(llava, (prompts, images, [7] * 4), range(4))
    got = dict(stream(llava, four, slots=slots, max_new_tokens=8))
    same([got[i] for i in range(4)], alone)
    assert len(seen) == len(groups)


def test_the_cache_has_room_for_the_longest_of_a_group(llava, rows, monkeypatch):
    monkeypatch.setattr(KVCache, "chunk", 1)
    prompts = [llava.chat_prompt(text) for text in ("Who?", "Which of the houses is closest to the boat?")]
    images, seeds = [rows[1][0]] * 2, [7, 7]
    alone = [sample(llava, [p], [i], [s], max_new_tokens=12)[0] for p, i, s in zip(prompts, images, seeds)]
    same(sample(llava, prompts, images, seeds, max_new_tokens=12), alone)


def test_a_slot_forgets_what_an_earlier_request_left(llava, rows):
    """A mask does not hide a NaN. A row that has ended may leave one: it runs on, and nobody looks at it."""
    for request in requests(llava, rows, range(len(ROWS))):
        decoder = slots_module.SlotDecoder(llava, 1, 8, lambda logits, _: logits.argmax(dim=-1))
        samples = []
        for _ in range(2):
            [length] = decoder.admit([[request]], [0])
            samples.append([decoder.advance(length + step) for step in range(8)])
            for tensor in (*decoder.cache.keys, *decoder.cache.values):
                tensor.fill_(math.nan)
        assert samples[0] == samples[1]


def test_a_sample_depends_on_its_seed_alone(llava, rows):
    draw = lambda seeds, n=16: sample(llava, *rows[:2], seeds, max_new_tokens=n, **SAMPLED)
    first, again, other = draw(rows[2]), draw(rows[2]), draw([s + 1 for s in rows[2]])
    assert [s.ids for s in first] == [s.ids for s in again]
    assert all(a.ids != b.ids for a, b in zip(first, other))
    assert [s.ids[:5] for s in first] == [s.ids for s in draw(rows[2], 5)], "depends on max_new_tokens"
    torch.manual_seed(1)  # torch's global state does not matter
    assert [s.ids for s in first] == [s.ids for s in draw(rows[2])]


def test_row_seed():
    # the first 8 bytes of sha256("0\x1fa.jpg\x1fchosen"), halved
    assert row_seed(0, "a.jpg", "chosen") == 6710431053525473600
    parts = [(0, "a.jpg", "rejected"), (1, "a.jpg", "chosen"), (0, "b.jpg", "chosen")]
    parts += [("ab", "c"), ("a", "bc")]
    seeds = {row_seed(*p) for p in parts} | {row_seed(0, "a.jpg", "chosen")}
    assert len(seeds) == 6 and all(0 <= s < 2**63 for s in seeds)


# ---------------------------------------------------------------- how a row ends


def test_rows_stop_at_the_end_token_at_different_steps(llava, rows, monkeypatch):
    hot = {"max_new_tokens": 40, "temperature": 1.0}
    monkeypatch.setattr(llava.tokenizer, "eos", -1)
    free = sample(llava, *rows, **hot)
    assert all(len(s.ids) == 40 and s.finish == "length" for s in free)
    # the id that most rows generate, at different steps, becomes the end token
    steps = {i: {s.ids.index(i) for s in free if i in s.ids} for s in free for i in s.ids}
    eos = max(steps, key=lambda i: len(steps[i]))
    assert len(steps[eos]) >= 2
    monkeypatch.setattr(llava.tokenizer, "eos", eos)
    for s, whole in zip(sample(llava, *rows, **hot), free):
        length = whole.ids.index(eos) + 1 if eos in whole.ids else 40
        assert s.ids == whole.ids[:length]
        assert s.logps == pytest.approx(whole.logps[:length], abs=1e-4)
        assert s.finish == ("stop" if eos in whole.ids else "length")


def test_greedy_sampling_stops_at_the_end_token(llava, rows, monkeypatch):
    [free] = sample(llava, *[column[:1] for column in rows], max_new_tokens=6)
    for step in (0, 3, 5):
        eos = free.ids[step]
        monkeypatch.setattr(llava.tokenizer, "eos", eos)
        [s] = sample(llava, *[column[:1] for column in rows], max_new_tokens=6)
        assert s.finish == "stop"  # even in the last step
        assert s.ids == free.ids[: free.ids.index(eos) + 1] and len(s.logps) == len(s.ids)
        prompt, [images] = rows[0][0], rows[1][:1]
        assert llava.generate([prompt], [images], max_new_tokens=6) == [llava.tokenizer.decode(s.ids)]


def test_finish_by_length(llava, rows, monkeypatch):
    monkeypatch.setattr(llava.tokenizer, "eos", -1)
    long, short = (sample(llava, *rows, max_new_tokens=n) for n in (7, 1))
    for l, s in zip(long, short):
        assert (len(l.ids), len(l.logps), l.finish) == (7, 7, "length")
        assert (s.ids, len(s.logps), s.finish) == (l.ids[:1], 1, "length")
    assert sample(llava, [], [], [], max_new_tokens=7) == []
    assert [(s.ids, s.finish) for s in sample(llava, *rows, max_new_tokens=0)] == [([], "length")] * len(ROWS)


def test_prompts_that_end_in_images(llava, rows):
    two = rows[1][2]
    [alone] = sample(llava, ["<image><image>"], [two], [1], max_new_tokens=5)
    same(sample(llava, ["<image><image>"] * 2, [two] * 2, [1, 1], max_new_tokens=5), [alone, alone])
    prompts = ["<image><image> Which of the two?", "<image><image>"]
    assert sample(llava, prompts, [two] * 2, [1, 1], max_new_tokens=5)[1].ids == alone.ids


@pytest.mark.parametrize("left", [0, 1, 5])  # for the longest prompt
def test_the_models_last_position(llava, rows, monkeypatch, left):
    monkeypatch.setattr(llava.tokenizer, "eos", -1)
    free = sample(llava, *rows, max_new_tokens=12)
    lengths = [len(one_sequence(llava, prompt, images).ids) for prompt, images in zip(*rows[:2])]
    positions = max(lengths) + left
    decoder = replace(llava.config.decoder, max_positions=positions)
    monkeypatch.setattr(llava, "config", replace(llava.config, decoder=decoder))
    samples = sample(llava, *rows, max_new_tokens=12)
    assert [len(s.ids) for s in samples] == [min(12, positions - length) for length in lengths]
    assert len({len(s.ids) for s in samples}) >= 2
    for s, whole in zip(samples, free):
        assert s.finish == "length" and s.ids == whole.ids[: len(s.ids)]
        assert s.logps == pytest.approx(whole.logps[: len(s.ids)], abs=1e-4)


# ---------------------------------------------------------------- picking a token

PROBS = [0.15, 0.5, 0.05, 0.3]
LOGITS = torch.tensor([PROBS]).log() + 3  # softmax ignores the constant 3


@pytest.mark.parametrize(
    "temperature, top_p, expected",
    [
        (1.0, None, PROBS),
        (1.0, 1.0, PROBS),
        # most probable first: 0.5, 0.3, 0.15, 0.05. 0.5 + 0.3 reach 0.7, so two stay: 0.5 / 0.8 and 0.3 / 0.8
        (1.0, 0.7, [0, 0.625, 0, 0.375]),
        # 0.8 does not reach 0.9, 0.95 does: three stay
        (1.0, 0.9, [3 / 19, 10 / 19, 0, 6 / 19]),
        (1.0, 0.4, [0, 1, 0, 0]),
        (1.0, 1e-9, [0, 1, 0, 0]),  # always one
        # temperature 1/2 squares: 0.0225, 0.25, 0.0025, 0.09, in all 0.365
        (0.5, None, [0.0225 / 0.365, 0.25 / 0.365, 0.0025 / 0.365, 0.09 / 0.365]),
        # and comes before top-p: now the most probable token alone reaches 0.6
        (0.5, 0.6, [0, 1, 0, 0]),
        # temperature 2 takes roots: 0.3873, 0.7071, 0.2236, 0.5477, in all 1.8657; the first two hold 0.673
        (2.0, 0.6, [0, 0.7071 / 1.2548, 0, 0.5477 / 1.2548]),
    ],
)
def test_filtered_probs(temperature, top_p, expected):
    rows = torch.cat([LOGITS, LOGITS.flip(-1)])  # each row is filtered by itself
    probs = filtered_probs(rows, temperature, top_p)
    torch.testing.assert_close(probs, torch.tensor([expected, expected[::-1]]).float(), rtol=0, atol=1e-4)
    assert [p > 0 for p in probs[0].tolist()] == [e > 0 for e in expected]


@pytest.mark.parametrize(
    "temperature, top_k, top_p, expected",
    [
        (1.0, 2, None, [0, 0.625, 0, 0.375]),  # 0.5 and 0.3 stay: 0.5 / 0.8 and 0.3 / 0.8
        (1.0, 1, None, [0, 1, 0, 0]),
        (1.0, 4, None, PROBS),
        (1.0, 50, None, PROBS),  # more than there are
        # temperature 2 takes roots, as above; 0.7071 and 0.5477 stay
        (2.0, 2, None, [0, 0.7071 / 1.2548, 0, 0.5477 / 1.2548]),
        # before top-p: 0.5 alone does not reach 0.6, but 0.625 does
        (1.0, 4, 0.6, [0, 0.625, 0, 0.375]),
        (1.0, 2, 0.6, [0, 1, 0, 0]),
    ],
)
def test_top_k_by_hand(temperature, top_k, top_p, expected):
    rows = torch.cat([LOGITS, LOGITS.flip(-1)])
    probs = filtered_probs(rows, temperature, top_p, top_k)
    torch.testing.assert_close(probs, torch.tensor([expected, expected[::-1]]).float(), rtol=0, atol=1e-4)
    assert [p > 0 for p in probs[0].tolist()] == [e > 0 for e in expected]


def test_all_that_tie_with_the_kth_stay():
    logits = torch.tensor([[0.0, 2.0, 1.0, 1.0, 1.0]])
    assert (filtered_probs(logits, 1.0, top_k=2) > 0).tolist() == [[False, True, True, True, True]]
    assert (filtered_probs(logits, 1.0, top_k=1) > 0).tolist() == [[False, True, False, False, False]]


@pytest.mark.parametrize("top_k", [1, 3, 50, 300])
@pytest.mark.parametrize("top_p", [None, 0.8])
def test_filters_are_those_of_transformers(top_k, top_p):
    process = pytest.importorskip("transformers.generation.logits_process")
    logits = torch.randn(20, 200, generator=torch.Generator().manual_seed(0)).mul(3).round()  # with ties
    filters = [process.TemperatureLogitsWarper(0.7), process.TopKLogitsWarper(top_k)]
    expected = logits
    for filter_logits in filters:
        expected = filter_logits(None, expected)
    if top_p:  # ties at its edge fall either way, so only without them
        logits = torch.randn(20, 200, generator=torch.Generator().manual_seed(0)).mul(3)
        expected = process.TopPLogitsWarper(top_p)(None, filters[1](None, filters[0](None, logits)))
    torch.testing.assert_close(filtered_probs(logits, 0.7, top_p, top_k), expected.softmax(-1))


def test_top_p_keeps_the_fewest_that_reach_it():
    # four of 1/4, exact in floating point: two reach 1/2, three reach any more
    for top_p, kept in ((0.5, 2), (0.51, 3), (0.75, 3), (0.25, 1)):
        assert (filtered_probs(torch.zeros(1, 4), 1.0, top_p) > 0).sum() == kept


def test_pick_never_takes_a_token_of_probability_0():
    # float32 probabilities of many tokens sum to a little more or less than 1
    logits = torch.randn(200, 50, generator=torch.Generator().manual_seed(0))
    logits[:, -1] = -math.inf
    highest = torch.full((200,), 1 - 2**-53, dtype=torch.float64)
    assert (pick(logits, 1.0, None, highest) < 49).all() and (pick(logits, 1.0, 0.9, highest) < 49).all()


def test_pick_follows_the_distribution():
    n = 2000
    uniforms = (torch.arange(n, dtype=torch.float64) + 0.5) / n  # evenly spaced in [0, 1)
    for top_p, expected in ((None, PROBS), (0.7, [0, 0.625, 0, 0.375])):
        counts = pick(LOGITS.expand(n, -1), 1.0, top_p, uniforms).bincount(minlength=4)
        assert counts.tolist() == pytest.approx([n * p for p in expected], abs=1)
    counts = pick(LOGITS.expand(n, -1), 1.0, None, uniforms, top_k=2).bincount(minlength=4)
    assert counts.tolist() == pytest.approx([0, 0.625 * n, 0, 0.375 * n], abs=1)
    # each row has its own logits and number; the cumulative distribution of the first row is 0.15, 0.65, 0.7,
    # 1
    uniforms = torch.tensor([0.0, 0.14, 0.16, 0.64, 0.66, 0.69, 0.71, 1 - 2**-53], dtype=torch.float64)
    assert pick(LOGITS.expand(8, -1), 1.0, None, uniforms).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    both = torch.cat([LOGITS, LOGITS.flip(-1)])
    assert pick(both, 1.0, None, torch.tensor([0.2, 0.2]).double()).tolist() == [1, 0]


def test_pick_at_the_edges():
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    logits = torch.tensor([[-math.inf, 0.0, 1.0, -math.inf]]).expand(2, -1)
    assert pick(logits, 1.0, None, ends).tolist() == [1, 2]  # never a token of probability 0
    assert pick(LOGITS.expand(2, -1), 1.0, 0.7, ends).tolist() == [1, 3]
    both = torch.cat([LOGITS, LOGITS.flip(-1)])
    assert pick(both, 0, 0.1, ends).tolist() == [1, 2]  # temperature 0: the largest


# ---------------------------------------------------------------- strings


def test_generate(llava, rows):
    prompts, images, _ = rows
    prompts, images = [*prompts, prompts[0], prompts[0]], [*images, images[0], images[0]]
    how = {"max_new_tokens": 12, "temperature": 1.0}
    texts = llava.generate(prompts, images, **how, seed=4)
    assert all(isinstance(t, str) and t == t.strip() and t for t in texts)
    assert len({texts[0], texts[5], texts[6]}) == 3  # equal prompts get different samples
    for prompt, shown, text in zip(prompts[:5], images, texts):  # and no row depends on the others
        assert llava.generate([prompt], [shown], **how, seed=4) == [text]
        assert llava.generate([prompt], [shown], **how, seed=5) != [text]
    seeds = [row_seed(4, prompt, 0) for prompt in prompts[:5]]
    ids = [s.ids for s in sample(llava, prompts[:5], images[:5], seeds, **how)]
    assert [llava.tokenizer.decode(i) for i in ids] == texts[:5]
    greedy = llava.generate(prompts, images, max_new_tokens=12)
    [alone] = llava.generate(prompts[:1], images[:1], max_new_tokens=12, seed=9)
    assert greedy[0] == greedy[5] == greedy[6] == alone
