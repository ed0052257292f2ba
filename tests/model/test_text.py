"""Templates and prompts character by character; ids around <image>, control tokens and turns."""

import re

import pytest

from stic_min import InputError
from stic_min.text import (
    CAPTION_PROMPTS,
    DESCRIBE_PROMPT,
    GOOD_PROMPT,
    HALLUCINATION_PROMPTS,
    IMAGE,
    TEMPLATES,
    Tokenizer,
    with_description,
    with_image,
    without_marks,
)

BOS, EOS, UNK = 1, 2, 0


@pytest.fixture(scope="module")
def model(tiny):
    return tiny / "llava-v1.6-tiny" / "tokenizer.model"


@pytest.fixture(scope="module", params=[True, False], ids=["legacy", "not legacy"])
def tokenizer(model, request):
    return Tokenizer(model, legacy=request.param)


def spelled(tokenizer, ids):
    """Ids as readable pieces; sentencepiece writes a space as "▁"."""
    return [i if i in (IMAGE, BOS, EOS) else tokenizer.pieces.id_to_piece(i) for i in ids]


# ---------------------------------------------------------------- templates

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)


def test_templates():
    assert sorted(TEMPLATES) == ["mistral_instruct", "vicuna_v1"]
    mistral, vicuna = TEMPLATES["mistral_instruct"], TEMPLATES["vicuna_v1"]
    assert mistral.prompt("<image>\nWho is it?") == "[INST] <image>\nWho is it? [/INST]"
    assert vicuna.prompt("<image>\nWho is it?") == SYSTEM + "USER: <image>\nWho is it? ASSISTANT:"
    users = ["<image>\nWho?", "And where?", "When?"]
    assert mistral.turns(users) == [
        "[INST] <image>\nWho? [/INST]", "[INST] And where? [/INST]", "[INST] When? [/INST]"
    ]
    assert vicuna.turns(users) == [
        SYSTEM + "USER: <image>\nWho? ASSISTANT:", "USER: And where? ASSISTANT:", "USER: When? ASSISTANT:"
    ]
    assert mistral.prompt("{user} {0} %s") == "[INST] {user} {0} %s [/INST]"


def test_with_image():
    assert with_image("Who?") == "<image>\nWho?"
    assert with_image("Who?", 2) == "<image>\n<image>\nWho?"
    assert with_image("Who?", 0) == "Who?"


# ---------------------------------------------------------------- STIC's prompts


def test_prompts_are_plain_lines():
    assert len(set(CAPTION_PROMPTS)) == len(CAPTION_PROMPTS) == 8
    assert len(set(HALLUCINATION_PROMPTS)) == len(HALLUCINATION_PROMPTS) == 8
    for prompt in (*CAPTION_PROMPTS, *HALLUCINATION_PROMPTS, GOOD_PROMPT):
        assert prompt.isascii() and prompt.isprintable(), prompt  # no curly apostrophe, no newline
        assert "  " not in prompt and prompt == prompt.strip() and prompt.endswith(".")
        assert not re.search(r"[.?,][A-Za-z]", prompt), prompt  # no space is missing between sentences
    assert DESCRIBE_PROMPT == "Detail the composition and subjects within the frame."
    assert GOOD_PROMPT.count("?") == 5 and GOOD_PROMPT.count(".") == 6


def plain(text):
    """Straight quotes and single spaces."""
    return " ".join(re.sub("[‘’]", "'", re.sub("[“”]", '"', text)).split())


def test_prompts_are_the_papers(shared):
    paper = (shared / "paper" / "stic-paper.md").read_text(encoding="utf-8")
    appendix = paper[paper.index("## A Experimental Details") :]
    quoted = [plain(text) for text in re.findall(r"^- “(.+)”$", appendix, flags=re.MULTILINE)]
    assert quoted[:9] == [*HALLUCINATION_PROMPTS, GOOD_PROMPT]  # the bad prompts, then the good one
    assert f'simple instructions like "{CAPTION_PROMPTS[2]}"' in plain(appendix)


def test_caption_prompts_are_the_releases(shared):
    text = (shared / "paper_vs_release.md").read_text(encoding="utf-8")
    for prompt in CAPTION_PROMPTS:  # the paper does not print them
        assert prompt in plain(text)


def test_with_description():
    description, question = " A red house.\n", "What is it?\nAnswer with a word."
    three_lines = "Image description:\nA red house.\n\nWhat is it?\nAnswer with a word."
    assert with_description(description, question) == three_lines
    one_line = "Image description: A red house.\nWhat is it?\nAnswer with a word."
    assert with_description(description, question, one_line=True) == one_line
    assert with_description("<image>\nA red house.<image> ", question) == three_lines  # no second image
    braces = with_description("{instruction} {0}", "{description}")
    assert braces == "Image description:\n{instruction} {0}\n\n{description}"


# ---------------------------------------------------------------- ids


def test_control_tokens_in_text_stay_text(tokenizer):
    for text in ("</s>", "Say </s> and <s> and <unk>, then go on.", "a</s>b"):
        response = tokenizer.encode_response(text, end=False)
        for ids in (tokenizer.encode(text), tokenizer.encode_bare(text), response):
            assert not {BOS, EOS, UNK} & set(ids)
            assert tokenizer.decode(ids) == text
    ids = tokenizer.encode_prompt("[INST] </s><s> [/INST]")
    assert ids[0] == BOS and not {BOS, EOS, UNK} & set(ids[1:])
    assert tokenizer.decode(ids) == "[INST] </s><s> [/INST]"


def test_encode(tokenizer):
    assert (tokenizer.bos, tokenizer.eos, tokenizer.size) == (BOS, EOS, 600)
    assert spelled(tokenizer, tokenizer.encode("A house")) == ["▁A", "▁house"]
    assert spelled(tokenizer, tokenizer.encode_bare("A house")) == ["A", "▁house"]
    assert tokenizer.encode("") == tokenizer.encode_bare("") == []
    assert spelled(tokenizer, tokenizer.encode_response("A house")) == ["▁A", "▁house", EOS]
    assert spelled(tokenizer, tokenizer.encode_response("A house", end=False)) == ["▁A", "▁house"]
    for text in ("\n", " two\n\nlines", "é漢字 ✓"):  # newlines and unknown characters become bytes
        assert tokenizer.decode(tokenizer.encode_bare(text)) == text.strip()


def test_prompt_ids_around_images(tokenizer):
    ids = lambda prompt: spelled(tokenizer, tokenizer.encode_prompt(prompt))
    assert ids("[INST] A [/INST]") == [BOS, "▁[", "INST", "]", "▁A", "▁[/", "INST", "]"]
    # each piece of text has its own leading space; a space before a mark stays; an empty piece adds nothing
    assert ids("A<image>A") == [BOS, "▁A", IMAGE, "▁A"]
    assert ids("A <image>\nA") == [BOS, "▁A", "▁", IMAGE, "▁", "<0x0A>", "A"]
    assert ids("<image>") == [BOS, IMAGE]
    assert ids("<image><image>A<image>") == [BOS, IMAGE, IMAGE, "▁A", IMAGE]
    assert ids("") == [BOS]


def test_later_turns(model):
    legacy, modern = Tokenizer(model, legacy=True), Tokenizer(model, legacy=False)
    turn = "USER: A <image> A"
    for tokenizer, start in ((legacy, "▁USER"), (modern, "USER")):
        spelt = spelled(tokenizer, tokenizer.encode_prompt(turn, first=False))
        # no begin token; only the first piece differs
        assert "".join(map(str, spelt)) == f"{start}:▁A▁{IMAGE}▁▁A"
        assert tokenizer.encode_prompt(turn)[0] == BOS
    assert legacy.encode_prompt(turn) == modern.encode_prompt(turn)  # first turns are the same
    assert legacy.encode_prompt(turn)[1:] == legacy.encode_prompt(turn, first=False)
    assert modern.encode_prompt(turn)[1:] != modern.encode_prompt(turn, first=False)


def test_conversation_ids(tokenizer):
    """Two turns as the model reads them, in one sequence."""
    prompts = TEMPLATES["mistral_instruct"].turns(["<image>\nA", "A?"])
    ids = tokenizer.encode_prompt(prompts[0]) + tokenizer.encode_response("A")
    ids += tokenizer.encode_prompt(prompts[1], first=False) + tokenizer.encode_response("A")
    second = "▁[" if tokenizer.legacy else "["
    assert spelled(tokenizer, ids) == [
        *[BOS, "▁[", "INST", "]", "▁", IMAGE, "▁", "<0x0A>", "A", "▁[/", "INST", "]", "▁A", EOS],
        *[second, "INST", "]", "▁A", "?", "▁[/", "INST", "]", "▁A", EOS],
    ]


def test_decode(tokenizer):
    house = tokenizer.encode("A red house.")
    assert tokenizer.decode(house) == "A red house."
    assert tokenizer.decode([BOS, *house[:2], UNK, *house[2:], EOS]) == "A red house."
    # a checkpoint's vocabulary may be larger than its tokenizer's
    assert tokenizer.decode([600, *house, 601, 31999]) == "A red house."
    assert tokenizer.decode([599]) == tokenizer.pieces.id_to_piece(599).replace("▁", "")
    assert tokenizer.decode([]) == tokenizer.decode([EOS]) == ""
    assert tokenizer.decode(tokenizer.encode("  two spaces,\n and a line \n")) == "two spaces,\n and a line"


def test_no_tokenizer(tmp_path):
    (tmp_path / "tokenizer.model").write_text("not a sentencepiece model")
    for name in ("tokenizer.model", "nothing.model"):
        with pytest.raises(InputError, match=str(tmp_path / name)):
            Tokenizer(tmp_path / name)


def test_removing_a_mark_leaves_no_other_mark():
    assert without_marks(" <im<image>age>What <image>is it? ") == "What is it?"
    assert with_description("A <im<image>age> boat", "Why?") == "Image description:\nA  boat\n\nWhy?"
