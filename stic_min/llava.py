"""LLaVA: CLIP patches through a projector into the decoder's sequence; the LVLM p_theta(y | v, x) of section 3.

v1.5 puts the 576 patch features of one padded square at <image>; v1.6 in anyres mode puts the whole picture's 576,
then the picture region of its tiles with one `image_newline` at the end of each row.
"""

from dataclasses import dataclass

import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from stic_min import InputError, sampler
from stic_min.batch import Example, collate
from stic_min.clip import ClipConfig, VisionTower
from stic_min.images import image_tokens, make_tiles, to_rgb, unpadded
from stic_min.loss import token_logps
from stic_min.mistral import Decoder, DecoderConfig
from stic_min.runtime.work import row_seed
from stic_min.text import IMAGE


@dataclass(frozen=True)
class LlavaConfig:
    decoder: DecoderConfig
    vision: ClipConfig
    image_mode: str  # pad or anyres
    pinpoints: tuple | None  # the (width, height) resolutions of anyres; None where the checkpoint knows only pad
    template: str  # mistral_instruct or vicuna_v1
    max_length: int  # longest merged sequence the checkpoint was trained on

    def image_tokens(self, size):
        """Positions a picture of `size` (width, height) takes in the sequence."""
        return image_tokens(size, self.image_mode, self.vision.image_size, self.vision.patch_size, self.pinpoints)


# ---------------------------------------------------------------- sequences


# ---------------------------------------------------------------- pictures into the sequence


class Projector(nn.Sequential):
    """g(.) of section 3, `mlp2x_gelu`: patch features (..., Cv) -> (..., C). Computes in the dtype of its input, so
    that fp32 weights can be trained inside a bf16 model."""

    def __init__(self, vision_width, width):
        super().__init__(nn.Linear(vision_width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, x):
        linear = lambda layer, x: F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))
        return linear(self[2], self[1](linear(self[0], x)))


def arrange(features, tiles, newline):
    """Projected features (N, S, C) of one picture -> its positions in the sequence (n, C), row by row."""
    if tiles.grid is None:
        return features.flatten(0, 1)  # (S, C)
    (columns, rows), side = tiles.grid, int(features.shape[1] ** 0.5)
    grid = features[1:].view(rows, columns, side, side, -1)  # tiles row by row
    grid = grid.permute(0, 2, 1, 3, 4).reshape(rows * side, columns * side, -1)  # (rows * side, columns * side, C)
    top, bottom, left, right = unpadded(tiles.size, tiles.grid, side)
    grid = grid[top:bottom, left:right]
    grid = torch.cat([grid, newline.to(grid.dtype).expand(len(grid), 1, -1)], dim=1)  # one newline a row
    return torch.cat([features[0], grid.flatten(0, 1)])  # the whole picture first


# ---------------------------------------------------------------- the model


def check_images(images):
    """Raises TypeError unless `images` is a list of PIL images; a path or a single image are likely slips."""
    if not isinstance(images, list | tuple):
        raise TypeError(f"images is one {type(images).__name__}, it has to be a list of PIL images (empty for none)")
    for image in images:
        if not isinstance(image, Image.Image):
            raise TypeError(f"images holds a {type(image).__name__}, not a PIL image: open it with PIL.Image.open")


class LLaVA(nn.Module):
    """Made by `stic_min.loader.load_llava`, which also sets `tokenizer`."""

    def __init__(self, config, tokenizer=None):
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.vision_tower = VisionTower(config.vision)
        self.mm_projector = Projector(config.vision.hidden_size, config.decoder.hidden_size)
        if config.pinpoints is not None:
            self.image_newline = nn.Parameter(torch.empty(config.decoder.hidden_size))
        else:
            self.image_newline = None
        self.model = Decoder(config.decoder)
        self.lm_head = nn.Linear(config.decoder.hidden_size, config.decoder.vocab_size, bias=False)
        self.reference_projector = None  # theta_0's, where stage 1 trains the projector

    @torch.no_grad()  # the tower is never trained
    def patch_features(self, tiles):
        """list of Tiles -> CLIP's patch features of them all (N, S, Cv)."""
        weight = self.lm_head.weight
        return self.vision_tower(torch.cat([t.pixels for t in tiles]).to(weight.device, weight.dtype))

    def encode_images(self, tiles, patches=None, reference=False):
        """Tiles (and optionally their CLIP features) -> image embeddings, concatenated in sequence order (n, C).

        `reference` takes theta_0's projector.
        """
        projector = self.reference_projector if reference and self.reference_projector else self.mm_projector
        patches = self.patch_features(tiles) if patches is None else patches
        features = projector(patches).split([len(t.pixels) for t in tiles])  # (N_i, S, C) each
        return torch.cat([arrange(f, t, self.image_newline) for f, t in zip(features, tiles)])

    def hidden_states(self, batch, attend=None, reference=False):
        """Batch -> the decoder's last hidden states (G, R, C) at `batch.scored`; as `forward`."""
        x = self.model.embed_tokens(batch.ids.clamp_min(0))  # (T, C)
        if batch.tiles:
            batch.patches = self.patch_features(batch.tiles) if batch.patches is None else batch.patches
            features = self.encode_images(batch.tiles, batch.patches, reference).to(x.dtype)
            x = x.masked_scatter((batch.ids == IMAGE)[:, None], features)
        x = self.model(x, batch.positions, attend or batch.attend)
        return x[batch.scored]

    def forward(self, batch, reference=False):
        """Batch -> logits (G, R, V) float32 at `batch.scored`. `reference` takes theta_0's projector."""
        return self.lm_head(self.hidden_states(batch, reference=reference)).float()

    # ------------------------------------------------------------ one prompt at a time, strings in

    @property
    def device(self):
        return self.lm_head.weight.device

    def tiles(self, picture):
        """PIL picture -> Tiles in this model's image mode."""
        config = self.config
        return make_tiles(to_rgb(picture), config.image_mode, config.vision.image_size, config.pinpoints)

    def prompt_length(self, prompt, images):
        """Positions that a prompt with its PIL pictures takes in the sequence."""
        pictures = sum(self.config.image_tokens(image.size) for image in images)
        return len(self.tokenizer.encode_prompt(prompt)) - len(images) + pictures

    def prompt_ids(self, prompt, images, extra_tokens=0):
        """Ids of a prompt.

        Raises InputError if <image> marks and `images` disagree, or if it is too long with `extra_tokens` more.
        """
        check_images(images)
        ids, name = self.tokenizer.encode_prompt(prompt), f"prompt {prompt[:60]!r}"
        Example(name, [(ids, False)], []).check(len(images))
        if (length := self.prompt_length(prompt, images) + extra_tokens) > self.config.max_length:
            raise InputError(f"{name}: {length} tokens, more than the model's limit of {self.config.max_length}")
        return ids

    def single_batch(self, ids, branches, tiles):
        """Batch of one prompt and what may follow it, of its pictures' Tiles."""
        return collate([Example("prompt", [(ids, False)], branches)], [tiles], self.config, self.device)

    def batch(self, prompt, images, response=None):
        """Batch of one sequence of strings and pictures. Raises InputError as `prompt_ids`, the response included."""
        branches = [] if response is None else [self.tokenizer.encode_response(response)]
        ids = self.prompt_ids(prompt, images, sum(map(len, branches)))
        return self.single_batch(ids, branches, [self.tiles(image) for image in images])

    @torch.no_grad()
    def logits(self, prompt, images):
        """(T, V) float32 over one sequence; T counts every position that a picture takes.

        `prompt` is a finished template string (text.TEMPLATES), `images` the list of its PIL pictures. Raises
        InputError as `batch` does.
        """
        batch = self.batch(prompt, images)
        batch.scored = torch.arange(len(batch.ids), device=self.device)[None]
        return self(batch)[0]

    @torch.no_grad()
    def response_logp(self, prompt, response, images):
        """() float32: log p_theta(response and end token | images, prompt), Eq. 3.1 summed. Raises as `logits`."""
        batch = self.batch(prompt, images, response)
        return token_logps(self(batch), batch.labels).sum()

    def generate(self, prompts, images, *, max_new_tokens=1024, temperature=0.0, top_p=None, seed=0):
        """list[str], stripped. images[i]: the list of pictures of prompts[i]. temperature 0 is greedy.

        A row's sample depends on `seed` and its own prompt, not on the other rows; of equal prompts in one call, each
        gets a sample of its own. Raises InputError as `sampler.sample` does.
        """
        if isinstance(prompts, str):
            raise TypeError("prompts is one str, it has to be a list of them; images[i] are the images of prompts[i]")
        for own in images:
            check_images(own)
        seeds = [row_seed(seed, p, prompts[:i].count(p)) for i, p in enumerate(prompts)]
        samples = sampler.sample(
            self, prompts, images, seeds, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p
        )
        return [self.tokenizer.decode(sample.ids) for sample in samples]
