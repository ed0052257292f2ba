"""Which chat template a model was trained with: no file says it, so it is read off the architecture and the names."""

import re

from stic_min.runtime.files import printable

# Models whose template is another one, by the names of themselves and their base.
OTHER_TEMPLATES = {
    r"llama-?[23]": "Llama's own template",
    r"(^|\D)34b|(^|-)yi-|hermes": "chatml",
    r"bakllava": "a template of its own",
    r"^mistral-7b-v0": "no template, as it is a base model",
    r"(^|-)(mpt|qwen|gemma|phi)(\d|-|$)": "a template of its own",
}
LLAVA_V0 = {r"(^|-)v0($|-)": "a template of its own"}  # of a base alone: a folder of one's own may well end in -v0
LARGEST_VOCABULARY = 32128  # Llama-2's and Mistral's 32000 with whatever was added


def model_name(path):
    """The last part of a hub's name or a folder, also of a snapshot in the hub's cache: what a model is known as."""
    parts = str(path).rstrip("/").split("/")
    if len(parts) > 2 and parts[-2] == "snapshots":
        return parts[-3].split("--")[-1]
    return parts[-1]


def chat_template(options, decoder, folder):
    """(name of the template that a model was trained with, the reason); None is one that is not here."""
    base = model_name(options.get("_name_or_path", ""))
    architecture = (options.get("architectures") or [options.get("model_type", "llava")])[0]
    kind = re.fullmatch(r"(llava_?)?(llama|mistral)?(forcausallm)?", architecture.lower())
    if not kind:
        return None, f"it is a {printable(architecture)[:60]}"
    for name, patterns in (base, OTHER_TEMPLATES | LLAVA_V0), (model_name(folder.resolve()), OTHER_TEMPLATES):
        for pattern, template in patterns.items():
            if re.search(pattern, name.lower()):
                return None, f"{printable(name)[:60]} has {template}"
    if decoder.vocab_size > LARGEST_VOCABULARY:
        return None, f"its vocabulary of {decoder.vocab_size} is neither Llama-2's nor Mistral's"
    mistral = kind[2] == "mistral"
    if mistral and decoder.rope_theta == 10000 and "sliding_window" in options and "instruct" not in base.lower():
        return None, "it is made from Mistral-7B-v0.1, a base model"
    reason = f"a {'Mistral' if mistral else 'Llama'} decoder" + (f" made from {printable(base)[:60]}" if base else "")
    return "mistral_instruct" if mistral else "vicuna_v1", reason
