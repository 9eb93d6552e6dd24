"""Benchmarks, a file each: they time this code beside what it is compared with, in one run.

This module is light: torch is imported by the files.
"""

ENCODERS = {
    "tiny": (80, 384, 6, 4),
    "base": (80, 512, 8, 6),
    "small": (80, 768, 12, 12),
    "medium": (80, 1024, 16, 24),
    "large-v3": (128, 1280, 20, 32),
}  # Whisper's encoders: mel bins, width, heads, layers
