"""The options of JSON files that others write: a reader lists every option it knows, and what is in no list is refused.

An option that is passed over in silence gives another model than its author's. So each is used, or has to have a
certain value, or is harmless for a reason that is written down.
"""

from stic_min import InputError
from stic_min.runtime.files import printable

UNSET = (None, False, 0, "", [], {})

# Kinds of values for `used`: (test, what the value has to be).
SIZE = lambda n: type(n) is int and 0 < n <= 2**20, "a whole number from 1 to 2^20"
REAL = lambda x: type(x) in (int, float) and 0 < x <= 1e12, "a positive number"
FLAG = lambda x: type(x) is bool, "true or false"
TEXT = lambda x: isinstance(x, str), "a text"
NAMES = lambda x: isinstance(x, list) and all(isinstance(name, str) for name in x), "a list of names"
OBJECT = lambda x: isinstance(x, dict), "a JSON object"

# In the config.json of every model of transformers.
HARMLESS = {
    "records": "transformers_version name_or_path _commit_hash",
    "no code of a checkpoint runs": "auto_map trust_remote_code",
    "the flag --dtype decides": "torch_dtype dtype",
    "how transformers computes, not what": "use_cache return_dict output_attentions output_hidden_states torchscript "
    "use_bfloat16 chunk_size_feed_forward _attn_implementation attn_implementation _attn_implementation_autoset "
    "_flash_attn_2_enabled",
    "before training": "initializer_range initializer_factor",
    "flags decide how to sample": "max_length min_length do_sample temperature top_k top_p typical_p num_beams "
    "num_beam_groups num_return_sequences early_stopping repetition_penalty length_penalty no_repeat_ngram_size "
    "encoder_no_repeat_ngram_size encoder_repetition_penalty diversity_penalty epsilon_cutoff eta_cutoff "
    "num_assistant_tokens num_assistant_tokens_schedule assistant_confidence_threshold assistant_lookbehind "
    "target_lookbehind return_dict_in_generate output_scores",
    "heads of other tasks": "id2label label2id num_labels problem_type finetuning_task task_specific_params",
    "no row is padded with a token": "pad_token_id",
}
REFUSED = {
    "quantization_config": "quantized weights are not read",
    "pruned_heads": "all heads have to be there",
    "is_encoder_decoder": "only decoders are",
    "add_cross_attention": "only self-attention is",
}


def check_options(config, source, used, required, refused, harmless):
    """The options of a JSON object that the caller uses, as {name: value}; null ones are left out.

    used      {name: kind}
    required  {name: the values it may have}
    refused   {name: why it may not be set}
    harmless  {why the model stays the same: names, separated by blanks}
    Raises InputError naming the option for a value that does not fit, and for one in no list that is set.
    """
    if not isinstance(config, dict):
        raise InputError(f"{source}: not a JSON object")
    harmless = {name for names in harmless.values() for name in names.split()}
    for name, value in config.items():
        shown = f"{source}: {printable(name)[:40]} {printable(repr(value))[:60]}"
        if name in used:
            test, expected = used[name]
            if value is not None and not test(value):
                raise InputError(f"{shown} is not {expected}")
        elif name in required:
            if value not in required[name]:
                raise InputError(f"{shown} is not supported, only {' or '.join(map(repr, required[name]))}")
        elif name in refused:
            if value not in UNSET:
                raise InputError(f"{shown} is not supported: {refused[name]}")
        elif name not in harmless and value not in UNSET:
            raise InputError(f"{shown} is an option unknown here; if it changes nothing, delete it from the file")
    return {name: config[name] for name in used if config.get(name) is not None}


def heads_fit(config, source):
    """A DecoderConfig or ClipConfig as it is. Raises InputError if its width does not split into its heads."""
    width, heads = config.hidden_size, config.num_attention_heads
    if width % (2 * heads):
        raise InputError(f"{source}: hidden_size {width} does not split into {heads} heads of even width")
    return config
