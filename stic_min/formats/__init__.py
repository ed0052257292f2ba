"""Formats of others, read and written: what LLaVA, transformers, PEFT and data sets publish.

config        config.json of a LLaVA checkpoint -> LlavaConfig
tower         config.json and preprocessor_config.json of CLIP
template      the chat template that a model was trained with
tokenizer     tokenizer.model and its settings
options       how all these treat known and unknown options
tensors       tensor files, and the names of tensors in them
adapters      LoRA adapters in PEFT's format
records       preference pairs, instructions, lists of image names
image_folder  a folder of images
"""
