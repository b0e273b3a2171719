"""Package metadata. Tool settings live in pyproject.toml, tested versions in constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="cogvlm-ft",
    version="0.1.0",
    description="Full-parameter fine-tuning of CogVLM for visual grounding, with DeepSpeed ZeRO-3 and WebDataset",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.10,<3.13",
    packages=find_packages(include=["cogvlm_ft", "cogvlm_ft.*", "launch", "shards", "shards.*"]),
    package_data={
        "cogvlm_ft.grounding": ["wordings/*.yaml"],
        "shards.negatives": ["*.yaml"],
        "shards.reviewing": ["page.html", "page.css", "page.js"],
    },
    install_requires=[
        "torch>=2.8",
        "deepspeed>=0.19.8,<0.20",
        "transformers>=5.20,<6",
        "sentencepiece>=0.2",
        "webdataset>=1.0.2",
        "wandb>=0.31",
        "omegaconf>=2.4",
        "numpy>=1.26",
        "scipy>=1.11",
        "pillow>=10.1",
        "safetensors>=0.5",
        "PyYAML>=6",
        "requests>=2.28",
        "tqdm>=4.66",
    ],
    extras_require={"dev": ["pytest>=8", "pytest-timeout>=2.3", "ruff", "mypy", "pre-commit"]},
    entry_points={
        "console_scripts": [
            "cogvlm-train = launch.train:main",
            "cogvlm-evaluate = launch.evaluate:main",
            "cogvlm-predict = launch.predict:main",
            "cogvlm-export = launch.export:main",
            "cogvlm-build-shards = shards.build:main",
            "cogvlm-review = shards.review:main",
        ]
    },
)
