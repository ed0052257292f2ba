"""The model against transformers' on the same tiny weights, packed sequences against one at a time, and where the
features of the pictures go."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from stic_min import InputError, lora
from stic_min.batch import Example, collate
from stic_min.images import Tiles, open_image
from stic_min.llava import arrange
from stic_min.loader import load_llava
from stic_min.loss import token_logps
from stic_min.text import IMAGE, TEMPLATES

V15, V16 = "llava-v1.5-tiny", "llava-v1.6-tiny"
FILES = {1: "scene_01.jpg", 2: "scene_02.png", 7: "scene_07.png"}  # 300 x 200, 200 x 280, 48 x 40
close = lambda a, b, tolerance=1e-5: torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


@pytest.fixture(scope="module")
def pictures(tiny):
    return {number: open_image(tiny / "images" / file) for number, file in FILES.items()}


@pytest.fixture(scope="module", params=[V15, V16], ids=["pad", "anyres"])
def llava(tiny, request):
    return load_llava(tiny / request.param)


@pytest.fixture(scope="module")
def trainable(tiny):
    """v1.6 with a LoRA that does something, and gradients on it, the embeddings and the projector."""
    llava, generator = load_llava(tiny / V16), torch.Generator().manual_seed(1)
    adapter = lora.new_adapter(llava, 4, 8, 0.0, seed=0)
    lora.attach(llava, adapter)
    for name in adapter.tensors:
        llava.get_parameter(name).data.normal_(std=0.1, generator=generator)
    llava.model.embed_tokens.requires_grad_(True)
    llava.mm_projector.requires_grad_(True)
    return llava


# ---------------------------------------------------------------- transformers


def test_clip_against_transformers(tiny, pictures):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.CLIPVisionModel.from_pretrained(tiny / "clip-tiny").eval()
    llava = load_llava(tiny / V15)  # takes its tower from clip-tiny
    pixels = torch.cat([llava.tiles(p).pixels for p in pictures.values()])
    expected = theirs(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    close(llava.vision_tower(pixels), expected.detach())


@pytest.mark.parametrize("name, kind, keys, theta", [(V15, "Llama", 4, 1e4), (V16, "Mistral", 2, 1e6)])
def test_decoder_against_transformers(tiny, name, kind, keys, theta):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": keys, "vocab_size": 600, "rms_norm_eps": 1e-5, "rope_theta": theta}
    theirs = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**sizes)).eval()
    published = {k: t.float() for file in (tiny / name).glob("*.safetensors") for k, t in load_file(file).items()}
    theirs.load_state_dict({key: published[key] for key in theirs.state_dict()})
    llava = load_llava(tiny / name)
    prompt = "Look at the " + "red house with a brown door under a yellow sun. " * 6
    ids = torch.tensor([llava.tokenizer.encode_prompt(prompt)])  # more than 100
    close(llava.logits(prompt, []), theirs(ids).logits[0].detach(), 2e-5)


# ---------------------------------------------------------------- packed branches


def conversations(llava, pictures):
    """[(trunk, branches, pictures)]: two pairs of stage 1, one of stage 2's conversations, one without a picture."""
    users = "<image>\nDescribe the image.", "Look at <image>\nand then at <image>", "<image>\nIs it day?", "Why?"
    answers = "A red house.", "Two boats, a river and a bridge.", "Yes", "It is night now."
    turns = [llava.tokenizer.encode_prompt(TEMPLATES[llava.config.template].prompt(user)) for user in users]
    answers = [llava.tokenizer.encode_response(answer) for answer in answers]
    return [
        ([(turns[0], False)], answers[:2], [pictures[1]]),
        ([(turns[1], False)], [answers[3], answers[2]], [pictures[7], pictures[2]]),
        ([(turns[2], False), (answers[2], True), (turns[3], False), (answers[1], True)], [], [pictures[2]]),
        ([(turns[3], False)], [answers[1]], []),
    ]


def pack(llava, parts):
    examples = [Example(f"example {i}", trunk, branches) for i, (trunk, branches, _) in enumerate(parts)]
    return collate(examples, [[llava.tiles(p) for p in pictures] for *_, pictures in parts], llava.config)


def one_by_one(parts):
    """For each row of `Batch.scored`, its scored segments, each as the only branch of its prompt."""
    for trunk, branches, pictures in parts:
        before = lambda i: [(sum((ids for ids, _ in trunk[:i]), []), False)]  # noqa: B023
        if row := [(before(i), [ids], pictures) for i, (ids, scored) in enumerate(trunk) if scored]:
            yield row
        for branch in branches:
            yield [(trunk, [branch], pictures)]


def test_packed_logits_equal_plain_sequences(llava, pictures):
    parts = conversations(llava, pictures)
    batch = pack(llava, parts)
    logits = llava(batch)
    rows = list(one_by_one(parts))
    longest = max(sum(1 + len(branch) for _, [branch], _ in row) for row in rows)
    assert logits.shape == (6, longest, 600) and logits.dtype == torch.float32
    for row, labels, segments in zip(logits, batch.labels, rows, strict=True):
        expected, end = [], 0
        for trunk, [branch], shown in segments:
            # all in the trunk: one causal sequence, the attention that was compared with transformers'
            plain = pack(llava, [([(trunk[0][0] + branch, False)], [], shown)])
            total, begin = len(plain.ids), end
            end += 1 + len(branch)
            plain.scored = torch.arange(total - len(branch) - 1, total)[None]
            close(row[begin:end], llava(plain)[0])
            expected += [-100, *branch]
        assert labels.tolist() == expected + [-100] * (longest - end)


def test_branches_do_not_see_each_other(llava, pictures):
    trunk, (first, second), shown = conversations(llava, pictures)[0]
    logits = {len(b): llava(pack(llava, [(trunk, [b], shown)]))[0] for b in (first, second)}
    for branches in ([first, second], [second, first], [second, second, first]):
        for row, branch in zip(llava(pack(llava, [(trunk, branches, shown)])), branches):
            close(row[: 1 + len(branch)], logits[len(branch)])


def gradients(llava, batches):
    """Sums of log p of all scored rows (S,), and the gradients of a sum in which each row weighs differently.
    `batches` may hold lists: their rows belong to one."""
    row = lambda batch: token_logps(llava(batch), batch.labels).sum(-1)
    logps = torch.cat([sum(map(row, b)) if isinstance(b, list) else row(b) for b in batches])
    parameters = {name: p for name, p in llava.named_parameters() if p.requires_grad}
    loss = logps @ torch.linspace(-1, 2, len(logps))
    return logps.detach(), dict(zip(parameters, torch.autograd.grad(loss, parameters.values())))


def same_gradients(first, second):
    close(first[0], second[0], 1e-4)
    assert len(first[1]) == 2 * 7 * 2 + 1 + 4  # layers * LoRA's targets * (A, B), embeddings, projector
    for name, gradient in first[1].items():
        assert gradient.norm() > 1e-3, name
        close(gradient / gradient.norm(), second[1][name] / gradient.norm(), 1e-4)


def test_packed_gradients(trainable, pictures):
    parts = conversations(trainable, pictures)
    packed = gradients(trainable, [pack(trainable, parts)])
    same_gradients(packed, gradients(trainable, [pack(trainable, [part]) for part in parts]))
    apart = [[pack(trainable, [segment]) for segment in row] for row in one_by_one(parts)]
    same_gradients(packed, gradients(trainable, apart))


def test_checkpointed_activations_give_the_same_gradients(trainable, pictures, monkeypatch):
    batch, calls = pack(trainable, conversations(trainable, pictures)), []
    hook = trainable.model.layers[1].self_attn.register_forward_hook(lambda *_: calls.append(1))
    plain = gradients(trainable, [batch])
    for layer in trainable.model.layers:
        monkeypatch.setattr(layer, "checkpoint_activations", True)
    same_gradients(gradients(trainable, [batch]), plain)
    assert len(calls) == 1 + 2  # once more in the backward
    hook.remove()


@pytest.mark.parametrize("name", [V15, V16])
def test_bfloat16(tiny, pictures, name):
    llava, half = load_llava(tiny / name), load_llava(tiny / name, dtype=torch.bfloat16)
    batch = pack(llava, conversations(llava, pictures))
    exact, rounded = llava(batch), half(batch)
    assert half.lm_head.weight.dtype == torch.bfloat16 and rounded.dtype == torch.float32
    assert 1e-4 < (rounded - exact).norm() / exact.norm() < 0.03  # 8 bits of mantissa, rounded again and again


# ---------------------------------------------------------------- pictures in the sequence

# Positions by hand: 4 x 4 patches a tile. pad: 16. anyres: 16 for the whole picture, and rows with a newline each:
# 300 x 200: 2 x 2 tiles, 8 x 8 patches; 200 * 8 / 300 = 5 rows are picture, (8 - 5) // 2 = 1 goes on both sides: 6 * 9
# 200 x 280: 2 x 2 again, 200 * 8 / 280 = 5 columns, 6 stay: 8 * 7
# 48 x 40: fits as it is; 1 x 2 tiles waste least, 4 x 8 patches; 40 * 4 / 48 = 3 rows, (8 - 3) // 2 = 2 go: 4 * 5
SIZES = {"pad": {1: 16, 2: 16, 7: 16}, "anyres": {1: 70, 2: 72, 7: 36}}


SHOWN = [("None", []), ("<image>\nOne in front", [1]), ("One <image> in mid-text", [7])]


@pytest.mark.parametrize("prompt, shown", [*SHOWN, ("<image>\n<image> and <image>", [2, 7, 1])])
def test_merged_sequence(llava, pictures, prompt, shown):
    seen, expected, left = [], [], list(shown)
    hook = llava.model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    logits = llava.logits(prompt, [pictures[i] for i in shown])
    hook.remove()
    for i in llava.tokenizer.encode_prompt(prompt):
        if i == IMAGE:
            number = left.pop(0)
            expected.append(llava.encode_images([llava.tiles(pictures[number])]))
            assert len(expected[-1]) == SIZES[llava.config.image_mode][number]
        else:
            expected.append(llava.model.embed_tokens.weight[[i]])
    assert not left
    close(seen[0], torch.cat(expected))
    assert llava.prompt_length(prompt, [pictures[i] for i in shown]) == len(seen[0])
    assert logits.shape == (len(seen[0]), 600) and logits.dtype == torch.float32


@pytest.mark.parametrize("prompt, given", [("Where?", 1), ("<image> Why?", 0), ("<image><image>", 1), ("<image>", 2)])
def test_pictures_have_to_match_the_prompt(llava, pictures, prompt, given):
    images, counts = [pictures[1]] * given, f"{prompt.count('<image>')} <image> in the text but {given} picture"
    for call in (lambda: llava.logits(prompt, images), lambda: llava.response_logp(prompt, "Here", images),
                 lambda: llava.generate([prompt], [images], max_new_tokens=1)):
        with pytest.raises(InputError) as error:
            call()
        assert repr(prompt) in str(error.value) and counts in str(error.value) and "\n" not in str(error.value)


def test_too_long_is_an_error(llava, pictures, monkeypatch):
    prompt, shown = "<image>\nIs it day or night?", [pictures[1]]
    length, answer = len(llava.logits(prompt, shown)), len(llava.tokenizer.encode_response("It is night."))
    limit = lambda n: monkeypatch.setattr(llava, "config", replace(llava.config, max_length=n))
    limit(length)
    assert len(llava.logits(prompt, shown)) == length
    limit(length - 1)
    with pytest.raises(InputError, match=f"Is it day.* {length} tokens.* {length - 1}$"):
        llava.logits(prompt, shown)
    with pytest.raises(InputError, match=f"Is it day.* {length + answer} tokens"):  # the end token counts
        llava.response_logp(prompt, "It is night.", shown)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_pictures_of_any_mode(llava, pictures, mode):
    picture = pictures[7].convert(mode)
    assert torch.equal(llava.logits("<image>", [picture]), llava.logits("<image>", [picture.convert("RGB")]))


def test_arrange_by_hand():
    """2 x 2 patches a tile. Whole picture 0..3, first tile 10..13, second tile 20..23, newline -1."""
    features = torch.tensor([[0.0, 1, 2, 3], [10, 11, 12, 13], [20, 21, 22, 23]])[..., None]  # (N, S, C = 1)
    place = lambda size, grid: arrange(features, Tiles(None, size, grid), torch.tensor([-1.0])).flatten().tolist()
    assert place((200, 100), (2, 1)) == [0, 1, 2, 3, 10, 11, 20, 21, -1, 12, 13, 22, 23, -1]  # side by side
    # a square picture fills only the two columns in the middle
    assert place((100, 100), (2, 1)) == [0, 1, 2, 3, 11, 20, -1, 13, 22, -1]
    assert place((100, 200), (1, 2)) == [0, 1, 2, 3, 10, 11, -1, 12, 13, -1, 20, 21, -1, 22, 23, -1]  # stacked
    assert place((100, 100), (1, 2)) == [0, 1, 2, 3, 12, 13, -1, 20, 21, -1]  # the two rows


def test_v16_in_pad_mode_has_no_newline(tiny, pictures):
    llava = load_llava(tiny / V16, image_mode="pad")
    tiles = llava.tiles(pictures[1])
    close(llava.encode_images([tiles]), llava.mm_projector(llava.vision_tower(tiles.pixels))[0])
    assert len(llava.logits("<image>", [pictures[1]])) == 1 + 16


def test_response_logp_by_hand(llava, pictures):
    prompt = TEMPLATES[llava.config.template].prompt("<image>\nIs it day or night?")
    logps = llava.logits(prompt + " It is night.", [pictures[1]]).log_softmax(-1)
    # the template's blank before the answer is the answer's own leading-space piece, so the ids are the same
    response = llava.tokenizer.pieces.encode("It is night.") + [2]
    assert llava.tokenizer.encode_prompt(prompt + " It is night.")[-len(response) + 1 :] == response[:-1]
    expected = sum(logps[i - len(response), id] for i, id in enumerate(response))
    actual = llava.response_logp(prompt, "It is night.", [pictures[1]])
    assert actual.shape == () and actual.dtype == torch.float32
    close(actual, expected, 1e-4)
    assert actual != llava.response_logp(prompt, "It is night.", [pictures[2]])
