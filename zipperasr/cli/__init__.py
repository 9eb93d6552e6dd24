"""One command, `zipperasr <verb>`: recipes call nothing else but the scripts of local/."""
