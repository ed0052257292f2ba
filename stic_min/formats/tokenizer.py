"""A checkpoint's tokenizer: tokenizer.model, and those settings in the JSON files next to it that change ids
or text.

Not read: tokenizer.json and special_tokens_map.json, which repeat them, and chat templates, which are in
text.py.
"""

from stic_min import InputError
from stic_min.formats.options import FLAG, OBJECT, check_options
from stic_min.runtime.files import printable, read_json
from stic_min.text import Tokenizer

TOKEN = lambda x: isinstance(x, str) or (isinstance(x, dict) and isinstance(x.get("content"), str)), "a token"
USED = {"legacy": FLAG, "bos_token": TOKEN, "eos_token": TOKEN, "added_tokens_decoder": OBJECT}
REQUIRED = {
    "tokenizer_class": ("LlamaTokenizer", "LlamaTokenizerFast", None),
    "add_bos_token": (True, None),
    "add_prefix_space": (True, None),
}
REFUSED = {
    "add_eos_token": "prompts would end with the end token",
    "clean_up_tokenization_spaces": "text is decoded as it is",
    "sp_model_kwargs": "sentencepiece uses its own settings",
}
HARMLESS = {
    "sequences are not padded or truncated here": "pad_token padding_side truncation_side model_max_length "
    "max_length stride truncation_strategy pad_to_multiple_of pad_token_type_id",
    "added_tokens_decoder lists all tokens that are not pieces": "unk_token additional_special_tokens "
    "extra_special_tokens image_token",
    "templates are in text.py": "chat_template use_default_system_prompt",
    "text never contains control tokens": "spaces_between_special_tokens",
    "records": "name_or_path tokenizer_file special_tokens_map_file processor_class auto_map backend "
    "is_local local_files_only from_slow use_fast trust_remote_code",
}
WITHOUT_TEXT = "<image>", "<pad>", "[PAD]", "<im_patch>"  # added tokens that no prompt and no answer contains


def read_tokenizer(folder, path=None):
    """The Tokenizer of a checkpoint folder, or `path` with the folder's settings. A setting that would change
    ids or text is an error."""
    source = folder / "tokenizer_config.json"
    options = {}
    if source.is_file():
        options = check_options(read_json(source), source, USED, REQUIRED, REFUSED, HARMLESS)
    tokenizer = Tokenizer(path or folder / "tokenizer.model", options.get("legacy", True))
    for name, token_id in (("bos_token", tokenizer.bos), ("eos_token", tokenizer.eos)):
        piece = tokenizer.pieces.id_to_piece(token_id)
        token = options.get(name)
        token = token["content"] if isinstance(token, dict) else token
        if token not in (None, piece):
            raise InputError(f"{source}: {name} {printable(token)[:40]!r}, but {piece!r} in {tokenizer.path}")
    unknown = tokenizer.pieces.unk_id()
    for token in added_tokens(folder, options):
        if token in WITHOUT_TEXT or tokenizer.pieces.piece_to_id(token) != unknown:
            continue
        if token != tokenizer.pieces.id_to_piece(unknown):
            raise InputError(f"{folder}: the added token {printable(token)[:40]!r} is not supported")
    return tokenizer


def added_tokens(folder, options):
    """The tokens that the JSON files add to tokenizer.model; some may be among its own pieces."""
    for entry in options.get("added_tokens_decoder", {}).values():
        yield str(entry["content"] if isinstance(entry, dict) and "content" in entry else entry)
    if (folder / "added_tokens.json").is_file():
        yield from read_json(folder / "added_tokens.json")
