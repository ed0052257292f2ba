"""How a command starts, reports progress, writes its results and ends. Nothing here knows the method.

flags        command-line flags that several commands share
console      lines, warnings and progress on the terminal
files        reading files, writing them safely, text fit for messages
output       JSON Lines output that survives a kill and can be resumed
work         random subsets, seeds, background preparation
ranks        the processes of a run, their devices, and what they exchange
process      signals, error messages, exit status
provenance   the record of a training run in run.json
consistency  warnings about inputs that are valid but probably unintended
"""
