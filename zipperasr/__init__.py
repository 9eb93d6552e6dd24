"""Multilingual speech recognition with Speech-LLMs and language-routed low-rank adapters."""

__version__ = "0.1.0"
