"""Text in and out: every prompt of STIC, the two chat templates, and sentencepiece around <image>.

Ids are built segment by segment (template text, image slot, response, end token), and labels follow from the
segments, so that labels and ids cannot disagree. Only the code here inserts control tokens: text that happens
to contain `<s>` or `</s>` stays text. (In the official code it becomes control tokens, so that a user who
writes `</s>` ends the turn. This difference is deliberate.)
"""

from dataclasses import dataclass
from pathlib import Path

import sentencepiece

from stic_min import InputError

IMAGE = -200  # the id that stands for one image, as in LLaVA's code
IMAGE_MARK = "<image>"

# ---------------------------------------------------------------- STIC's prompts

# P, the captioning prompts of Algorithms 1 and 2. The paper does not print them; these are the release's.
CAPTION_PROMPTS = (
    "Illustrate the details of the picture.",
    "Summarize the visual content presented.",
    "Explain what is depicted in the photograph.",
    "Outline the key elements captured in the image.",
    "Detail the composition and subjects within the frame.",
    "Convey the atmosphere and mood represented in the snapshot.",
    "Interpret the scene shown in the image.",
    "Identify and describe the main focal points in the visual.",
)

# P_hallu, the "bad" prompts (Appendix A).
HALLUCINATION_PROMPTS = (
    "Describe the image with imaginative objects that may exist in the scene.",
    "Enrich the description by adding hypothetical objects or characters that could be part of the scene.",
    "Suggest and detail practical items or people that could logically inhabit the image's setting.",
    "Incorporate elements that, though absent, would seamlessly fit into the context of the picture.",
    "Imagine and describe additional everyday objects or activities taking place just out of frame.",
    "Augment the scene with details of potential events or items that are plausible.",
    "Conceive of and detail natural elements, such as weather or animals, that could realistically enter the "
    "scene. Make the description affirmative.",
    "Invent and incorporate details of practical tools, vehicles, or gadgets that could be expected in a "
    "similar scenario.",
)

# x_g, the well-curated step-by-step prompt (Appendix A).
GOOD_PROMPT = (
    "Please provide a detailed description of the image, focusing on the following. "
    "Identify the main subjects (people, animals, objects) in the image and describe what they are doing. "
    "Describe the setting of the image. Is it indoors or outdoors? "
    "What kind of environment or location does it depict? What mood does the image convey? "
    "Are there any specific elements (such as lighting, weather, expressions) that contribute to this "
    "atmosphere? "
    "Describe the dominant colors and the overall composition. "
    "How do these elements affect the image's impact? "
    "Point out any details or symbols that might be relevant to understanding the image's meaning or "
    "context. "
    "If applicable, provide interpretations of what the image might represent or communicate."
)

DESCRIBE_PROMPT = CAPTION_PROMPTS[4]  # what DaR asks first, at test time

# PAPER vs RELEASED (L): the paper prints one line; the release, which produced the published numbers, three.
INFUSED = "Image description:\n{description}\n\n{instruction}"
INFUSED_ONE_LINE = "Image description: {description}\n{instruction}"


def without_marks(text: str) -> str:
    """Text without <image>, even where removing one mark creates another ("<im<image>age>")."""
    while IMAGE_MARK in text:
        text = text.replace(IMAGE_MARK, "")
    return text.strip()


def with_description(description: str, instruction: str, one_line: bool = False) -> str:
    """An instruction prefixed with the model's own description (section 4: stage 2 and DaR); no <image> yet.

    <image> is removed from the description: a mark that the model wrote by chance would ask for an image.
    """
    form = INFUSED_ONE_LINE if one_line else INFUSED
    return form.format(description=without_marks(description), instruction=instruction)


def with_image(text: str, images: int = 1) -> str:
    return f"{IMAGE_MARK}\n" * images + text


# ---------------------------------------------------------------- chat templates


@dataclass(frozen=True)
class Template:
    name: str
    system: str  # precedes the first turn
    turn: str  # one user turn, up to where the answer starts

    def prompt(self, user: str) -> str:
        """The single-turn prompt string of the official code; the answer follows after one space."""
        return self.system + self.turn.format(user=user)

    def turns(self, users: list[str]) -> list[str]:
        """The prompt strings of a conversation; each is followed by its answer and the end token."""
        return [self.prompt(user) if i == 0 else self.turn.format(user=user) for i, user in enumerate(users)]


TEMPLATES = {
    "mistral_instruct": Template("mistral_instruct", "", "[INST] {user} [/INST]"),
    "vicuna_v1": Template(
        "vicuna_v1",
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. ",
        "USER: {user} ASSISTANT:",
    ),
}


# ---------------------------------------------------------------- tokenizer


class Tokenizer:
    """A Llama/Mistral `tokenizer.model`. Raises InputError if the file is not a sentencepiece model.

    `legacy` is transformers' flag of that name, read from tokenizer_config.json: whether text right after an
    end token (in a later turn) gets its own leading-space piece.
    """

    def __init__(self, path, legacy: bool = True):
        if not Path(path).is_file():
            raise InputError(f"no tokenizer: {path} (choose another with --tokenizer)")
        self.path = Path(path)
        self.pieces = sentencepiece.SentencePieceProcessor()
        try:
            self.pieces.Load(str(path))
            self.pieces.decode(list(range(len(self.pieces))))  # fails unless every piece is valid text
        except (RuntimeError, OSError, UnicodeDecodeError):
            raise InputError(f"not a sentencepiece model: {path}") from None
        self.legacy = legacy
        self.bos = self.pieces.bos_id()
        self.eos = self.pieces.eos_id()
        self.size = len(self.pieces)
        if min(self.bos, self.eos) < 0:
            raise InputError(f"{path}: no begin or end token")
        self.newline = self.pieces.encode("\n")  # the leading-space piece and the newline itself

    def encode(self, text: str) -> list[int]:
        """Ids of a piece of text, with sentencepiece's own leading space and without control tokens."""
        return self.pieces.encode(text)

    def encode_bare(self, text: str) -> list[int]:
        """The same without the leading space: encoded after a newline, which no piece spans."""
        return self.pieces.encode("\n" + text)[len(self.newline) :]

    def encode_prompt(self, prompt: str, first: bool = True) -> list[int]:
        """Ids of a prompt string, with IMAGE in place of each <image>.

        The text between images is tokenized piece by piece, each with its own leading space, as in the
        official code; an empty piece adds no ids. The first turn starts with the begin token.
        """
        ids = [self.bos] if first else []
        for i, text in enumerate(prompt.split(IMAGE_MARK)):
            if i > 0:
                ids.append(IMAGE)
            follows_end_token = i == 0 and not first
            ids += self.encode_bare(text) if follows_end_token and not self.legacy else self.encode(text)
        return ids

    def encode_response(self, response: str, end: bool = True) -> list[int]:
        """Ids of a response. Its leading-space piece is the space that the templates put before an answer.

        There is no space before the end token: the loss scores exactly what the model generates. (The
        official training code for mistral_instruct supervises a lone space piece there, which the model never
        generates.)
        """
        return self.encode(response) + ([self.eos] if end else [])

    def decode(self, ids: list[int]) -> str:
        """Text of generated ids, stripped, without control and unknown tokens."""
        skip = lambda i: i >= self.size or self.pieces.is_control(i) or self.pieces.is_unknown(i)
        return self.pieces.decode([i for i in ids if not skip(i)]).strip()
