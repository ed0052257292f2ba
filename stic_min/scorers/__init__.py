"""The benchmarks' protocols, one file each: prompts, parsing and scores. No model code is imported here."""
