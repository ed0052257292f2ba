"""The fast paths of sampling and training against the plain code that defines them."""

import pytest
import tiny
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from stic_min import fused, lora, sampler, slots
from stic_min.cache import KVCache, Prefill
from stic_min.images import open_image
from stic_min.loader import load_llava
from stic_min.mistral import Packed, Span, has_fused_attention


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny.write_all(folder)
    return folder


def load(folder, name, adapter):
    llava = load_llava(folder / name, device="cpu")
    if adapter:
        generator = torch.Generator().manual_seed(0)
        lora.attach(llava, lora.new_adapter(llava, 4, 8, 0.0, seed=0))
        for parameter_name, parameter in llava.named_parameters():
            if ".lora_" in parameter_name:
                parameter.data.normal_(std=0.05, generator=generator)
    return llava


def samples(llava, folder, slots_of=None):
    images = [open_image(path) for path in sorted((folder / "images").iterdir())]
    texts = "What is this?", "Describe it in detail, please."
    requests = []
    for i, image in enumerate(images):
        tiles = llava.tiles(image)
        for text in texts[: 1 + i % 2]:
            ids = llava.tokenizer.encode_prompt(llava.chat_prompt(text))
            requests.append(sampler.Request((i, text), ids, [tiles], i))
    stream = sampler.stream(llava, iter(requests), slots=slots_of or len(requests), max_new_tokens=24, temperature=0.7)
    return {key: sample.ids for key, sample in stream}


# ---------------------------------------------------------------- fused linears


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("name", ["llava-v1.5-tiny", "llava-v1.6-tiny"])
def test_fused_linears_compute_the_same(folder, name, adapter):
    llava = load(folder, name, adapter)
    layer = llava.model.layers[0]
    x = torch.randn(fused.FEW, llava.config.decoder.hidden_size, generator=torch.Generator().manual_seed(0))
    plain = [*layer.self_attn.project(x), *layer.mlp.project(x)]
    before = samples(llava, folder)
    weights = {n: p.clone() for n, p in llava.named_parameters()}
    fused.fuse(llava)
    for n, p in llava.named_parameters():
        assert torch.equal(p, weights[n]), n
    attention, mlp = layer.self_attn, layer.mlp
    for rows in (1, fused.FEW):
        for one, other in zip([*attention.project(x[:rows]), *mlp.project(x[:rows])], plain):
            torch.testing.assert_close(one, other[:rows], rtol=1e-5, atol=1e-5)
    assert samples(llava, folder) == before
    # No second copy of the weights.
    memory = attention.project.weight.untyped_storage().data_ptr()
    for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
        assert linear.weight.untyped_storage().data_ptr() == memory


def test_many_rows_take_the_plain_layers(folder):
    llava = load(folder, "llava-v1.6-tiny", adapter=False)
    attention = llava.model.layers[0].self_attn
    x = torch.randn(fused.FEW + 1, llava.config.decoder.hidden_size)
    plain = attention.project(x)
    fused.fuse(llava)
    assert all(map(torch.equal, attention.project(x), plain))


def test_a_layer_with_lora_on_some_linears_stays_plain(folder):
    llava = load(folder, "llava-v1.6-tiny", adapter=False)
    adapter = lora.new_adapter(llava, 4, 8, 0.0, seed=0)
    adapter.modules[:] = [m for m in adapter.modules if m.endswith(("q_proj", "v_proj"))]
    lora.attach(llava, adapter)
    before = samples(llava, folder)
    fused.fuse(llava)
    layer = llava.model.layers[0]
    assert not isinstance(layer.self_attn.project, fused.FusedLinear)
    assert isinstance(layer.mlp.project, fused.FusedLinear)
    assert samples(llava, folder) == before


# ---------------------------------------------------------------- prefill of several groups


@pytest.mark.parametrize("name", ["llava-v1.5-tiny", "llava-v1.6-tiny"])
@pytest.mark.parametrize("slots_of", [6, None])
def test_prompts_prefilled_together_are_sampled_alike(folder, name, slots_of, monkeypatch):
    llava = load(folder, name, adapter=False)
    one_by_one = samples(llava, folder, slots_of)
    monkeypatch.setitem(slots.PREFILLED, "cpu", 10**6)
    groups = []
    admit = slots.SlotDecoder.admit
    monkeypatch.setattr(slots.SlotDecoder, "admit", lambda self, g, s: groups.append(len(g)) or admit(self, g, s))
    assert samples(llava, folder, slots_of) == one_by_one
    assert max(groups) > 1


def test_prefill_stops_at_its_limit_of_tokens(folder, monkeypatch):
    llava = load(folder, "llava-v1.5-tiny", adapter=False)
    image = open_image(next((folder / "images").iterdir()))
    tiles = llava.tiles(image)
    ids = llava.tokenizer.encode_prompt(llava.chat_prompt("What is this?"))
    requests = [sampler.Request(i, ids, [llava.tiles(image)], i) for i in range(6)]
    tokens = len(ids) - 1 + llava.config.image_tokens(tiles.size)
    monkeypatch.setitem(slots.PREFILLED, "cpu", 2 * tokens)
    sizes = []
    admit = slots.SlotDecoder.admit
    monkeypatch.setattr(slots.SlotDecoder, "admit", lambda self, g, s: sizes.append(len(g)) or admit(self, g, s))
    assert len(dict(sampler.stream(llava, iter(requests), slots=6, max_new_tokens=3))) == 6
    assert sizes == [2, 2, 2]


def test_prefill_writes_each_prompt_into_its_slot(folder):
    config = load(folder, "llava-v1.6-tiny", adapter=False).config.decoder
    cache = KVCache(config, 4, torch.device("cpu"), torch.float32)
    cache.reserve(12)
    for tensor in (*cache.keys, *cache.values):
        tensor.fill_(float("nan"))
    # a prompt alone in slot 2; a prefix of 3 tokens with texts of 2 and 1 tokens, in slots 0 and 3
    spans = [Span(0, 4), Span(4, 7), Span(7, 9, (4, 7)), Span(9, 10, (4, 7))]
    D, K, H = config.head_dim, config.num_key_value_heads, config.num_attention_heads
    q, k, v = torch.randn(10, H, D), torch.randn(10, K, D), torch.randn(10, K, D)
    Prefill(spans, cache, [2, 0, 3])(0, q, k, v)
    for cached, new in ((cache.keys[0], k), (cache.values[0], v)):
        for slot, tokens in ((2, [0, 1, 2, 3]), (0, [4, 5, 6, 7, 8]), (3, [4, 5, 6, 9])):
            assert torch.equal(cached[slot, : len(tokens)], new[tokens])
            assert (cached[slot, len(tokens) :] == 0).all()
        assert cached[1].isnan().all()


# ---------------------------------------------------------------- packed attention


class Traffic(TorchDispatchMode):
    """Counts the numbers that operations write."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, list | tuple) else [out]:
            is_view = isinstance(tensor, torch.Tensor) and any(
                isinstance(a, torch.Tensor) and a.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
                for a in args
            )
            self.numbers += tensor.numel() if isinstance(tensor, torch.Tensor) and not is_view else 0
        return out


def backward_traffic(pairs):
    """Numbers written in the backward of packed attention, per number of the row's gradient."""
    T, H, D = 40, 2, 8
    spans = []
    for i in range(0, pairs * T, T):
        spans += [Span(i, i + 20), Span(i + 20, i + 30, (i, i + 20)), Span(i + 30, i + T, (i, i + 20))]
    q, k, v = (torch.randn(pairs * T, H, D, requires_grad=True) for _ in range(3))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        y = Packed(spans)(0, q, k, v)
        with Traffic() as traffic:
            torch.autograd.grad(y.sum(), (q, k, v))
    return traffic.numbers / y.numel()


def test_backward_traffic_does_not_grow_with_the_number_of_pairs():
    one, four, eight = map(backward_traffic, (1, 4, 8))
    assert eight == pytest.approx(one, rel=0.05) and four == pytest.approx(one, rel=0.05)
    print(f"numbers written in the backward per number of the gradient: {one:.1f}, {four:.1f}, {eight:.1f}")


@pytest.mark.parametrize("cuda, capability, expected", [
    ("13.0", (9, 0), True), ("12.8", (8, 0), True), ("12.8", (7, 5), False), (None, (9, 4), False)])  # None: ROCm
def test_older_gpus_use_the_plain_attention(monkeypatch, cuda, capability, expected):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    has_fused_attention.cache_clear()
    assert has_fused_attention(torch.device("cuda", 0)) == expected
    has_fused_attention.cache_clear()
