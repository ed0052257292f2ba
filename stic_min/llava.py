"""LLaVA: CLIP's patch features, projected into the decoder's sequence; the LVLM p_theta(y | v, x) of section
3.

At <image>, v1.5 inserts the 576 patch features of one padded square. v1.6 in anyres mode inserts the 576 of
the whole image, then those of its tiles that show the image, with one `image_newline` after each row.

Shapes: N tiles, S patches per tile, T positions in the sequence, Cv channels in CLIP and C in the decoder,
V vocabulary; G groups of R scored positions (see batch.Batch).
"""

from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from stic_min import InputError, lora
from stic_min.batch import Batch, Example, collate
from stic_min.clip import ClipConfig, VisionTower
from stic_min.images import Tiles, image_tokens, make_tiles, to_rgb, unpadded
from stic_min.loss import token_logps
from stic_min.mistral import Decoder, DecoderConfig
from stic_min.runtime.work import row_seed, to_device
from stic_min.text import IMAGE, TEMPLATES, with_image


@dataclass(frozen=True)
class LlavaConfig:
    decoder: DecoderConfig
    vision: ClipConfig
    image_mode: str  # pad or anyres
    pinpoints: tuple | None  # the (width, height) resolutions of anyres; None if the checkpoint has only pad
    template: str  # mistral_instruct or vicuna_v1
    max_length: int  # longest sequence the checkpoint was trained on, image tokens included

    def image_tokens(self, size: tuple[int, int]) -> int:
        """Number of positions that an image of `size` (width, height) takes in the sequence."""
        vision = self.vision
        return image_tokens(size, self.image_mode, vision.image_size, vision.patch_size, self.pinpoints)


# ---------------------------------------------------------------- images into the sequence


class Projector(nn.Sequential):
    """g(.) of section 3, `mlp2x_gelu`: patch features (..., Cv) -> (..., C).

    Computes in the dtype of its input, so that fp32 weights can be trained inside a bf16 model.
    """

    def __init__(self, vision_width, width):
        super().__init__(nn.Linear(vision_width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, x):
        linear = lambda layer, x: F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))
        return linear(self[2], self[1](linear(self[0], x)))


def arrange(features: Tensor, tiles: Tiles, newline: Tensor | None) -> Tensor:
    """Projected features (N, S, C) of one image -> its embeddings in sequence order (n, C)."""
    if tiles.grid is None:
        return features.flatten(0, 1)  # pad: (S, C)
    columns, rows = tiles.grid
    side = int(features.shape[1] ** 0.5)  # patches along a tile's side
    # Put the tiles next to each other: one feature map of the whole canvas.
    grid = features[1:].view(rows, columns, side, side, -1)
    grid = grid.permute(0, 2, 1, 3, 4).reshape(rows * side, columns * side, -1)
    # Cut off what shows only black bars, and end each row with a newline.
    top, bottom, left, right = unpadded(tiles.size, tiles.grid, side)
    grid = grid[top:bottom, left:right]
    grid = torch.cat([grid, newline.to(grid.dtype).expand(len(grid), 1, -1)], dim=1)
    return torch.cat([features[0], grid.flatten(0, 1)])  # tile 0, the whole image, comes first


# ---------------------------------------------------------------- the model


def check_images(images):
    """Raises TypeError unless `images` is a list of PIL images: a path or one image is an easy slip."""
    if not isinstance(images, list | tuple):
        kind = type(images).__name__
        raise TypeError(f"images is a single {kind}; pass a list of PIL images (empty for none)")
    for image in images:
        if not isinstance(image, Image.Image):
            kind = type(image).__name__
            raise TypeError(f"images contains a {kind}, not a PIL image: open it with PIL.Image.open")


class LLaVA(nn.Module):
    """The model and its string interface; `stic_min.loader.load_llava` creates it from a checkpoint."""

    def __init__(self, config: LlavaConfig, tokenizer=None):
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.vision_tower = VisionTower(config.vision)
        self.mm_projector = Projector(config.vision.hidden_size, config.decoder.hidden_size)
        if config.pinpoints is not None:
            self.image_newline = nn.Parameter(torch.empty(config.decoder.hidden_size))
        else:
            self.image_newline = None
        self.model = Decoder(config.decoder)
        self.lm_head = nn.Linear(config.decoder.hidden_size, config.decoder.vocab_size, bias=False)
        self.reference_projector = None  # in stage 1, the reference's own
        self.is_reference = False

    @contextmanager
    def as_reference(self):
        """Inside, the model is DPO's reference: theta_0 (or --reference), with its LoRA and projector."""
        self.is_reference = True
        try:
            with lora.disabled(self):
                yield
        finally:
            self.is_reference = False

    @torch.no_grad()  # the tower is never trained
    def patch_features(self, tiles: list[Tiles]) -> Tensor:
        """Tiles -> CLIP's patch features of all of them (N, S, Cv)."""
        weight = self.lm_head.weight
        return self.vision_tower(torch.cat([t.pixels for t in tiles]).to(weight.device, weight.dtype))

    def encode_images(self, tiles: list[Tiles], patches: Tensor | None = None) -> Tensor:
        """Tiles (and optionally their CLIP features) -> image embeddings in sequence order (n, C)."""
        projector = self.mm_projector
        if self.is_reference and self.reference_projector is not None:
            projector = self.reference_projector
        if patches is None:
            patches = self.patch_features(tiles)
        features = projector(patches).split([len(t.pixels) for t in tiles])  # per image: (N_i, S, C)
        return torch.cat([arrange(f, t, self.image_newline) for f, t in zip(features, tiles)])

    def hidden_states(self, batch: Batch, attend=None) -> Tensor:
        """Batch -> the decoder's last hidden states (G, R, C) at `batch.scored`.

        `attend` replaces batch.attend where the sampler fills its cache.
        """
        x = self.model.embed_tokens(batch.ids.clamp_min(0))  # (T, C); at IMAGE, overwritten below
        if batch.tiles:
            if batch.patches is None:
                batch.patches = self.patch_features(batch.tiles)
            images = self.encode_images(batch.tiles, batch.patches).to(x.dtype)  # (n, C)
            x = x.masked_scatter((batch.ids == IMAGE)[:, None], images)
        x = self.model(x, batch.positions, attend or batch.attend)  # (T, C)
        return x[batch.scored]

    def forward(self, batch: Batch) -> Tensor:
        """Batch -> logits (G, R, V) float32 at `batch.scored`: only there, as (T, V) would take gigabytes."""
        return self.lm_head(self.hidden_states(batch)).float()

    # ------------------------------------------------------------ strings and images in

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    def chat_prompt(self, text: str, images: int = 1) -> str:
        """A user's text about `images` images -> prompt in this checkpoint's chat template.

        Pass images=0 if there are none, or if the text has its <image> marks already.
        """
        return TEMPLATES[self.config.template].prompt(with_image(text, images))

    def tiles(self, image: Image.Image) -> Tiles:
        """The image ready for CLIP, on the model's device; called in threads, ahead of the model."""
        config = self.config
        tiles = make_tiles(to_rgb(image), config.image_mode, config.vision.image_size, config.pinpoints)
        return replace(tiles, pixels=to_device(tiles.pixels, self.device))

    def prompt_length(self, prompt: str, images: list[Image.Image]) -> int:
        """Number of positions that a prompt with its images takes in the sequence."""
        image_tokens = sum(self.config.image_tokens(image.size) for image in images)
        return len(self.tokenizer.encode_prompt(prompt)) - len(images) + image_tokens

    def prompt_ids(self, prompt: str, images: list[Image.Image], extra_tokens: int = 0) -> list[int]:
        """Ids of a prompt, with one IMAGE per image.

        Raises InputError if <image> marks and `images` disagree, or if it is too long with `extra_tokens`.
        """
        check_images(images)
        ids = self.tokenizer.encode_prompt(prompt)
        name = f"prompt {prompt[:60]!r}"
        if ids.count(IMAGE) != len(images):
            raise InputError(f"{name}: {ids.count(IMAGE)} <image> in the text but {len(images)} image(s)")
        length = self.prompt_length(prompt, images) + extra_tokens
        limit = self.config.max_length
        if length > limit:
            raise InputError(f"{name}: {length} tokens, more than the model's limit of {limit}")
        return ids

    def single_batch(self, ids: list[int], branches: list[list[int]], tiles: list[Tiles]) -> Batch:
        """Batch of one prompt, its images' Tiles, and the branches that may follow it."""
        return collate([Example("prompt", [(ids, False)], branches)], [tiles], self.config, self.device)

    def batch(self, prompt: str, images: list[Image.Image], response: str | None = None) -> Batch:
        """Batch of one prompt, with or without a response. Raises InputError as `prompt_ids` does."""
        branches = [] if response is None else [self.tokenizer.encode_response(response)]
        ids = self.prompt_ids(prompt, images, sum(map(len, branches)))
        return self.single_batch(ids, branches, [self.tiles(image) for image in images])

    @torch.no_grad()
    def logits(self, prompt: str, images: list[Image.Image]) -> Tensor:
        """(T, V) float32 at every position of one sequence, those of the images included.

        `prompt` is a complete prompt string (see `chat_prompt`). Raises InputError as `batch` does.
        """
        batch = self.batch(prompt, images)
        batch.scored = torch.arange(len(batch.ids), device=self.device)[None]
        return self(batch)[0]

    @torch.no_grad()
    def response_logp(self, prompt: str, response: str, images: list[Image.Image]) -> Tensor:
        """() float32: log p_theta(response and end token | images, prompt), Eq. 3.1. Raises as `logits`."""
        batch = self.batch(prompt, images, response)
        return token_logps(self(batch), batch.labels).sum()

    def generate(
        self,
        prompts: list[str],
        images: list[list[Image.Image]],
        *,
        max_new_tokens: int = 1024,
        temperature: float = 0.0,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int = 0,
    ) -> list[str]:
        """Responses as stripped text. images[i] are the images of prompts[i]; temperature 0 is greedy.

        A response depends on `seed` and its own prompt, not on the other prompts in the call; equal prompts
        in one call get different samples. Raises InputError as `sampler.sample` does.
        """
        from stic_min import sampler  # here, not at the top: the sampler is built on this model

        if isinstance(prompts, str):
            raise TypeError("prompts is a single str; pass a list (images[i] are the images of prompts[i])")
        for prompt_images in images:
            check_images(prompt_images)
        seeds = [row_seed(seed, p, prompts[:i].count(p)) for i, p in enumerate(prompts)]
        samples = sampler.sample(
            self, prompts, images, seeds, max_new_tokens=max_new_tokens, temperature=temperature,
            top_p=top_p, top_k=top_k,
        )  # fmt: skip
        return [self.tokenizer.decode(sample.ids) for sample in samples]
