"""How a command starts, reports progress, writes and ends."""
