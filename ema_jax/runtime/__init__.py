"""Files, processes, progress and command lines: what every package stands on."""
