"""The model against transformers' with the same tiny weights, packed sequences against single ones, and the
order of image features in the sequence."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from stic_min import InputError, lora
from stic_min.batch import Batch, Example, collate
from stic_min.images import Tiles, open_image
from stic_min.llava import arrange
from stic_min.loader import load_llava
from stic_min.loss import IGNORE, token_logps
from stic_min.mistral import Span, rope_angles
from stic_min.text import IMAGE

V15, V16 = "llava-v1.5-tiny", "llava-v1.6-tiny"
FILES = {1: "scene_01.jpg", 2: "scene_02.png", 7: "scene_07.png"}  # 300 x 200, 200 x 280, 48 x 40
close = lambda a, b, tolerance=1e-5: torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


@pytest.fixture(scope="module")
def images(tiny):
    return {number: open_image(tiny / "images" / file) for number, file in FILES.items()}


@pytest.fixture(scope="module", params=[V15, V16], ids=["pad", "anyres"])
def llava(tiny, request):
    return load_llava(tiny / request.param)


@pytest.fixture(scope="module")
def trainable(tiny):
    """v1.6 with a LoRA that has an effect; gradients on LoRA, the embeddings and the projector."""
    llava, generator = load_llava(tiny / V16), torch.Generator().manual_seed(1)
    adapter = lora.new_adapter(llava, 4, 8, 0.0, seed=0)
    lora.attach(llava, adapter)
    for name in adapter.tensors:
        llava.get_parameter(name).data.normal_(std=0.1, generator=generator)
    llava.model.embed_tokens.requires_grad_(True)
    llava.mm_projector.requires_grad_(True)
    return llava


# ---------------------------------------------------------------- transformers


def test_clip_against_transformers(tiny, images):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.CLIPVisionModel.from_pretrained(tiny / "clip-tiny").eval()
    llava = load_llava(tiny / V15)  # takes its tower from clip-tiny
    pixels = torch.cat([llava.tiles(p).pixels for p in images.values()])
    expected = theirs(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    close(llava.vision_tower(pixels), expected.detach())


@pytest.mark.parametrize("name, kind, keys, theta", [(V15, "Llama", 4, 1e4), (V16, "Mistral", 2, 1e6)])
def test_decoder_against_transformers(tiny, name, kind, keys, theta):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": keys, "vocab_size": 600, "rms_norm_eps": 1e-5, "rope_theta": theta}
    config = getattr(transformers, f"{kind}Config")(**sizes)
    theirs = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    files = (tiny / name).glob("*.safetensors")
    published = {key: tensor.float() for file in files for key, tensor in load_file(file).items()}
    theirs.load_state_dict({key: published[key] for key in theirs.state_dict()})
    llava = load_llava(tiny / name)
    prompt = "Look at the " + "red house with a brown door under a yellow sun. " * 6
    ids = torch.tensor([llava.tokenizer.encode_prompt(prompt)])  # more than 100 ids
    close(llava.logits(prompt, []), theirs(ids).logits[0].detach(), 2e-5)


# ---------------------------------------------------------------- packed branches


def test_the_diagram_in_batch():
    """Collates exactly the example of Batch's docstring and compares it with every number printed there."""
    ids = {"<s>": 1, "[INST]": 10, "v": IMAGE, "x": 11, "[/INST]": 12}
    ids |= {"w1": 21, "w2": 22, "l1": 31, "</s>": 2, "-100": IGNORE}
    prompt = [ids[name] for name in ("<s>", "[INST]", "v", "x", "[/INST]")]
    chosen, rejected = [ids["w1"], ids["w2"], ids["</s>"]], [ids["l1"], ids["</s>"]]
    tiles = Tiles(torch.zeros(1, 3, 2, 2), (2, 2), None)
    config = SimpleNamespace(image_tokens=lambda size: 3)
    batch = collate([Example("pair", [(prompt, False)], [chosen, rejected])], [[tiles]], config)

    lines = [line.strip() for line in Batch.__doc__.splitlines()]
    text = lambda name: next(line.removeprefix(name) for line in lines if line.startswith(name))
    numbers = lambda name: [int(number) for number in re.findall(r"-?\b\d+\b", text(name))]
    labels = lambda name: [ids[word] for word in text(name).split()[:4]]
    assert numbers("flat index") == list(range(len(batch.ids))) == list(range(12))
    assert [ids[name] for name in text("ids").split()] == batch.ids.tolist()
    assert numbers("positions") == batch.positions.tolist()
    assert [numbers("scored[0]"), numbers("scored[1]")] == batch.scored.tolist()
    assert [labels("labels[0]"), labels("labels[1]")] == batch.labels.tolist()
    assert batch.attend.spans == [Span(0, 7), Span(7, 10, prefix=(0, 7)), Span(10, 12, prefix=(0, 7))]
    assert batch.tiles == [tiles]

def conversations(llava, images):
    """[(trunk, branches, images)]: two pairs, a conversation of stage 2, and one without an image."""
    users = "<image>\nDescribe it.", "Look at <image>\nand then at <image>", "<image>\nIs it day?", "Why?"
    answers = "A red house.", "Two boats, a river and a bridge.", "Yes", "It is night now."
    turns = [llava.tokenizer.encode_prompt(llava.chat_prompt(user, images=0)) for user in users]
    answers = [llava.tokenizer.encode_response(answer) for answer in answers]
    return [
        ([(turns[0], False)], answers[:2], [images[1]]),
        ([(turns[1], False)], [answers[3], answers[2]], [images[7], images[2]]),
        ([(turns[2], False), (answers[2], True), (turns[3], False), (answers[1], True)], [], [images[2]]),
        ([(turns[3], False)], [answers[1]], []),
    ]


def pack(llava, parts):
    examples = [Example(f"example {i}", trunk, branches) for i, (trunk, branches, _) in enumerate(parts)]
    tiles = [[llava.tiles(image) for image in shown] for *_, shown in parts]
    return collate(examples, tiles, llava.config)


def one_by_one(parts):
    """For each row of `Batch.scored`, its scored segments, each as the only branch of its prompt."""
    for trunk, branches, shown in parts:
        before = lambda i: [(sum((ids for ids, _ in trunk[:i]), []), False)]  # noqa: B023
        if row := [(before(i), [ids], shown) for i, (ids, scored) in enumerate(trunk) if scored]:
            yield row
        for branch in branches:
            yield [(trunk, [branch], shown)]


def test_packed_logits_equal_plain_sequences(llava, images):
    parts = conversations(llava, images)
    batch = pack(llava, parts)
    logits = llava(batch)
    rows = list(one_by_one(parts))
    longest = max(sum(1 + len(branch) for _, [branch], _ in row) for row in rows)
    assert logits.shape == (6, longest, 600) and logits.dtype == torch.float32
    for row, labels, segments in zip(logits, batch.labels, rows, strict=True):
        expected, end = [], 0
        for trunk, [branch], shown in segments:
            # everything in the trunk: one causal sequence, the attention compared with transformers' above
            plain = pack(llava, [([(trunk[0][0] + branch, False)], [], shown)])
            total, begin = len(plain.ids), end
            end += 1 + len(branch)
            plain.scored = torch.arange(total - len(branch) - 1, total)[None]
            close(row[begin:end], llava(plain)[0])
            expected += [-100, *branch]
        assert labels.tolist() == expected + [-100] * (longest - end)


def test_branches_do_not_see_each_other(llava, images):
    trunk, (first, second), shown = conversations(llava, images)[0]
    logits = {len(b): llava(pack(llava, [(trunk, [b], shown)]))[0] for b in (first, second)}
    for branches in ([first, second], [second, first], [second, second, first]):
        for row, branch in zip(llava(pack(llava, [(trunk, branches, shown)])), branches):
            close(row[: 1 + len(branch)], logits[len(branch)])


def gradients(llava, batches):
    """Sums of log p of all scored groups (S,), and the gradients of a weighted sum of them.

    `batches` may hold lists of batches; a list makes up one group.
    """
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


def test_packed_gradients(trainable, images):
    parts = conversations(trainable, images)
    packed = gradients(trainable, [pack(trainable, parts)])
    same_gradients(packed, gradients(trainable, [pack(trainable, [part]) for part in parts]))
    apart = [[pack(trainable, [segment]) for segment in row] for row in one_by_one(parts)]
    same_gradients(packed, gradients(trainable, apart))


def test_checkpointed_activations_give_the_same_gradients(trainable, images, monkeypatch):
    batch, calls = pack(trainable, conversations(trainable, images)), []
    hook = trainable.model.layers[1].self_attn.register_forward_hook(lambda *_: calls.append(1))
    plain = gradients(trainable, [batch])
    for layer in trainable.model.layers:
        monkeypatch.setattr(layer, "checkpoint_activations", True)
    same_gradients(gradients(trainable, [batch]), plain)
    assert len(calls) == 1 + 2  # once more in the backward
    hook.remove()


@pytest.mark.parametrize("name", [V15, V16])
def test_bfloat16(tiny, images, name):
    llava, half = load_llava(tiny / name), load_llava(tiny / name, dtype=torch.bfloat16)
    batch = pack(llava, conversations(llava, images))
    exact, rounded = llava(batch), half(batch)
    assert half.lm_head.weight.dtype == torch.bfloat16 and rounded.dtype == torch.float32
    assert 1e-4 < (rounded - exact).norm() / exact.norm() < 0.03  # 8 bits of mantissa, rounded repeatedly


def test_positions_are_exact_in_bfloat16(llava):
    """bfloat16 itself has no numbers between 256 and 258."""
    positions = torch.tensor([0, 257, 1001, 4095])
    for half, exact in zip(*(rope_angles(positions, llava.config.decoder, d) for d in (torch.bfloat16, torch.float32))):
        assert torch.equal(half, exact.bfloat16())


# ---------------------------------------------------------------- images in the sequence

# Positions by hand, with 4 x 4 patches per tile. pad: 16. anyres: 16 for the whole image, then the rows of
# the tiles, each with a newline.
#   300 x 200: 2 x 2 tiles, 8 x 8 patches; 200 * 8 / 300 = 5 rows show the image, (8 - 5) // 2 = 1 is cut off
#              on both sides: 6 * 9
#   200 x 280: 2 x 2 tiles again; 200 * 8 / 280 = 5 columns, 1 is cut off on both sides: 8 * 7
#   48 x 40:   fits as it is; 1 x 2 tiles waste least, 4 x 8 patches; 40 * 4 / 48 = 3 rows, (8 - 3) // 2 = 2
#              are cut off on both sides: 4 * 5
SIZES = {"pad": {1: 16, 2: 16, 7: 16}, "anyres": {1: 70, 2: 72, 7: 36}}


SHOWN = [("None", []), ("<image>\nOne in front", [1]), ("One <image> in mid-text", [7])]


@pytest.mark.parametrize("prompt, shown", [*SHOWN, ("<image>\n<image> and <image>", [2, 7, 1])])
def test_merged_sequence(llava, images, prompt, shown):
    seen, expected, numbers = [], [], iter(shown)
    hook = llava.model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    logits = llava.logits(prompt, [images[i] for i in shown])
    hook.remove()
    for i in llava.tokenizer.encode_prompt(prompt):
        if i == IMAGE:
            number = next(numbers)
            expected.append(llava.encode_images([llava.tiles(images[number])]))
            assert len(expected[-1]) == SIZES[llava.config.image_mode][number]
        else:
            expected.append(llava.model.embed_tokens.weight[[i]])
    assert next(numbers, None) is None
    close(seen[0], torch.cat(expected))
    assert llava.prompt_length(prompt, [images[i] for i in shown]) == len(seen[0])
    assert logits.shape == (len(seen[0]), 600) and logits.dtype == torch.float32


@pytest.mark.parametrize(
    "prompt, given", [("Where?", 1), ("<image> Why?", 0), ("<image><image>", 1), ("<image>", 2)]
)
def test_images_have_to_match_the_prompt(llava, images, prompt, given):
    shown = [images[1]] * given
    counts = f"{prompt.count('<image>')} <image> in the text but {given} image(s)"
    for call in (lambda: llava.logits(prompt, shown), lambda: llava.response_logp(prompt, "Here", shown),
                 lambda: llava.generate([prompt], [shown], max_new_tokens=1)):
        with pytest.raises(InputError) as error:
            call()
        message = str(error.value)
        assert repr(prompt) in message and counts in message and "\n" not in message


def test_too_long_is_an_error(llava, images, monkeypatch):
    prompt, shown = "<image>\nIs it day or night?", [images[1]]
    length = len(llava.logits(prompt, shown))
    answer = len(llava.tokenizer.encode_response("It is night."))
    limit = lambda n: monkeypatch.setattr(llava, "config", replace(llava.config, max_length=n))
    limit(length)
    assert len(llava.logits(prompt, shown)) == length
    limit(length - 1)
    with pytest.raises(InputError, match=f"Is it day.* {length} tokens.* {length - 1}$"):
        llava.logits(prompt, shown)
    with pytest.raises(InputError, match=f"Is it day.* {length + answer} tokens"):  # the end token counts
        llava.response_logp(prompt, "It is night.", shown)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_images_of_any_mode(llava, images, mode):
    image = images[7].convert(mode)
    assert torch.equal(llava.logits("<image>", [image]), llava.logits("<image>", [image.convert("RGB")]))


def test_arrange_by_hand():
    """2 x 2 patches per tile. Whole image 0..3, first tile 10..13, second tile 20..23, newline -1."""
    features = torch.tensor([[0.0, 1, 2, 3], [10, 11, 12, 13], [20, 21, 22, 23]])[..., None]  # (N, S, C = 1)
    newline = torch.tensor([-1.0])
    place = lambda size, grid: arrange(features, Tiles(None, size, grid), newline).flatten().tolist()
    assert place((200, 100), (2, 1)) == [0, 1, 2, 3, 10, 11, 20, 21, -1, 12, 13, 22, 23, -1]  # side by side
    # a square image fills only the two columns in the middle
    assert place((100, 100), (2, 1)) == [0, 1, 2, 3, 11, 20, -1, 13, 22, -1]
    stacked = [0, 1, 2, 3, 10, 11, -1, 12, 13, -1, 20, 21, -1, 22, 23, -1]
    assert place((100, 200), (1, 2)) == stacked
    assert place((100, 100), (1, 2)) == [0, 1, 2, 3, 12, 13, -1, 20, 21, -1]  # the two rows


def test_v16_in_pad_mode_has_no_newline(tiny, images):
    llava = load_llava(tiny / V16, image_mode="pad")
    tiles = llava.tiles(images[1])
    close(llava.encode_images([tiles]), llava.mm_projector(llava.vision_tower(tiles.pixels))[0])
    assert len(llava.logits("<image>", [images[1]])) == 1 + 16


def test_response_logp_by_hand(llava, images):
    prompt = llava.chat_prompt("Is it day or night?")
    logps = llava.logits(prompt + " It is night.", [images[1]]).log_softmax(-1)
    # the template's space before the answer is the answer's own leading-space piece, so the ids are the same
    response = llava.tokenizer.pieces.encode("It is night.") + [2]
    assert llava.tokenizer.encode_prompt(prompt + " It is night.")[-len(response) + 1 :] == response[:-1]
    expected = sum(logps[i - len(response), id] for i, id in enumerate(response))
    actual = llava.response_logp(prompt, "It is night.", [images[1]])
    assert actual.shape == () and actual.dtype == torch.float32
    close(actual, expected, 1e-4)
    assert actual != llava.response_logp(prompt, "It is night.", [images[2]])
