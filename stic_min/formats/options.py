"""The options in JSON files from other projects: readers list every option they know, and any other is an
error.

A silently ignored option could change the model that its author meant. So each option is used, or must have a
certain value, or is harmless for a stated reason.
"""

from stic_min import InputError
from stic_min.runtime.files import printable

UNSET = (None, False, 0, "", [], {})

# Types of values for `used`: (test, what the value must be).
SIZE = lambda n: type(n) is int and 0 < n <= 2**20, "a whole number from 1 to 2^20"
REAL = lambda x: type(x) in (int, float) and 0 < x <= 1e12, "a positive number"
FLAG = lambda x: type(x) is bool, "true or false"
TEXT = lambda x: isinstance(x, str), "text"
NAMES = lambda x: isinstance(x, list) and all(isinstance(name, str) for name in x), "a list of names"
OBJECT = lambda x: isinstance(x, dict), "a JSON object"

# Options in the config.json of every transformers model.
HARMLESS = {
    "records": "transformers_version name_or_path _commit_hash",
    "code in a checkpoint is never run": "auto_map trust_remote_code",
    "the flag --dtype sets it": "torch_dtype dtype",
    "how transformers computes, not what": "use_cache return_dict output_attentions output_hidden_states "
    "torchscript use_bfloat16 chunk_size_feed_forward _attn_implementation attn_implementation "
    "_attn_implementation_autoset _flash_attn_2_enabled",
    "for initialization": "initializer_range initializer_factor",
    "flags set the sampling": "max_length min_length do_sample temperature top_k top_p typical_p num_beams "
    "num_beam_groups num_return_sequences early_stopping repetition_penalty length_penalty "
    "no_repeat_ngram_size encoder_no_repeat_ngram_size encoder_repetition_penalty diversity_penalty "
    "epsilon_cutoff eta_cutoff num_assistant_tokens num_assistant_tokens_schedule "
    "assistant_confidence_threshold assistant_lookbehind target_lookbehind return_dict_in_generate "
    "output_scores",
    "heads of other tasks": "id2label label2id num_labels problem_type finetuning_task task_specific_params",
    "sequences are not padded with a token": "pad_token_id",
}
REFUSED = {
    "quantization_config": "quantized weights can't be read",
    "pruned_heads": "all heads must be present",
    "is_encoder_decoder": "only decoders are",
    "add_cross_attention": "only self-attention is",
}


def check_options(config, source, used, required, refused, harmless):
    """The options of a JSON object that the caller uses, as {name: value} without null values.

    used      {name: type}
    required  {name: allowed values}
    refused   {name: why it must not be set}
    harmless  {why it does not change the model: names, separated by spaces}

    A value that does not fit is an error, and so is an option in none of these lists, if it is set.
    """
    if not isinstance(config, dict):
        raise InputError(f"{source}: not a JSON object")
    harmless = {name for names in harmless.values() for name in names.split()}
    for name, value in config.items():
        option = f"{source}: {printable(name)[:40]} {printable(repr(value))[:60]}"
        if name in used:
            test, expected = used[name]
            if value is not None and not test(value):
                raise InputError(f"{option} is not {expected}")
        elif name in required:
            if value not in required[name]:
                raise InputError(f"{option} is not supported, only {' or '.join(map(repr, required[name]))}")
        elif name in refused:
            if value not in UNSET:
                raise InputError(f"{option} is not supported: {refused[name]}")
        elif name not in harmless and value not in UNSET:
            raise InputError(f"{option} is an unknown option; if it does not matter, delete it from the file")
    return {name: config[name] for name in used if config.get(name) is not None}


def heads_fit(config, source):
    """Returns a DecoderConfig or ClipConfig after checking that its width splits into its heads."""
    width, heads = config.hidden_size, config.num_attention_heads
    if width % (2 * heads):
        raise InputError(f"{source}: hidden_size {width} does not split into {heads} heads of even width")
    return config
