"""Which chat template a model was trained with: no file records it, so it is inferred from architecture and
names."""

import re

from stic_min.runtime.files import printable

# Models with other templates, by their own name or that of their base.
OTHER_TEMPLATES = {
    r"llama-?[23]": "Llama's own template",
    r"(^|\D)34b|(^|-)yi-|hermes": "chatml",
    r"bakllava": "a template of its own",
    r"^mistral-7b-v0": "no template, as it is a base model",
    r"(^|-)(mpt|qwen|gemma|phi)(\d|-|$)": "a template of its own",
}
LLAVA_V0 = {r"(^|-)v0($|-)": "a template of its own"}  # for a base only: a user's folder may well end in -v0
LARGEST_VOCABULARY = 32128  # Llama-2's and Mistral's 32000 and a few added tokens


def model_name(path):
    """A model's name: the last part of a hub id or a folder, or the id of a snapshot in the hub's cache."""
    parts = str(path).rstrip("/").split("/")
    if len(parts) > 2 and parts[-2] == "snapshots":
        return parts[-3].split("--")[-1]
    return parts[-1]


def chat_template(options, decoder, folder):
    """(name of the template that a model was trained with, the reason); the name is None if it is not
    available here."""
    base = model_name(options.get("_name_or_path", ""))
    architecture = (options.get("architectures") or [options.get("model_type", "llava")])[0]
    kind = re.fullmatch(r"(llava_?)?(llama|mistral)?(forcausallm)?", architecture.lower())
    if not kind:
        return None, f"its architecture is {printable(architecture)[:60]}"
    for name, patterns in (base, OTHER_TEMPLATES | LLAVA_V0), (model_name(folder.resolve()), OTHER_TEMPLATES):
        for pattern, template in patterns.items():
            if re.search(pattern, name.lower()):
                return None, f"{printable(name)[:60]} has {template}"
    if decoder.vocab_size > LARGEST_VOCABULARY:
        return None, f"its vocabulary of {decoder.vocab_size} is neither Llama-2's nor Mistral's"
    mistral = kind[2] == "mistral"
    mistral_v01 = mistral and decoder.rope_theta == 10000 and "sliding_window" in options
    if mistral_v01 and "instruct" not in base.lower():
        return None, "it is built on Mistral-7B-v0.1, a base model"
    reason = "a Mistral decoder" if mistral else "a Llama decoder"
    if base:
        reason += f" built on {printable(base)[:60]}"
    return "mistral_instruct" if mistral else "vicuna_v1", reason
