"""What others publish, read and written: key names, tensor files, config.json, PEFT adapters."""
