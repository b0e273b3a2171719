"""Package metadata. Tool settings live in pyproject.toml, tested versions in constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "(.+)"$', (HERE / "cogvlm_ft/__init__.py").read_text(encoding="utf-8"), re.MULTILINE
)

setup(
    name="cogvlm-ft",
    version=VERSION[1],  # read, not imported: nothing is installed yet
    description="Full-parameter fine-tuning of CogVLM for visual grounding, with DeepSpeed ZeRO-3 and WebDataset",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="cogvlm-ft contributors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 14)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
    python_requires=">=3.10,<3.14",
    # launch, shards, configs and slurm are links inside cogvlm_ft/: as top-level packages their names could clash.
    packages=find_packages(include=["cogvlm_ft", "cogvlm_ft.*"]),
    package_data={
        "cogvlm_ft": ["py.typed", "html_page.*", "configs/*.yaml", "configs/deepspeed/*.json", "slurm/*"],
        "cogvlm_ft.evaluate": ["fonts/*"],
        "cogvlm_ft.grounding": ["wordings/*.yaml"],
        "cogvlm_ft.predict": ["page.*"],
        "cogvlm_ft.report": ["page.*"],
        "cogvlm_ft.report.preview": ["page.*"],
        "cogvlm_ft.shards.negatives": ["*.yaml"],
        "cogvlm_ft.shards.reviewing": ["page.*"],
    },
    install_requires=[
        "torch>=2.8",
        "deepspeed>=0.19.8,<0.20",
        "transformers>=5.20,<6",
        "sentencepiece>=0.2",
        "peft>=0.19",  # adapters
        "webdataset>=1.0.2",
        "wandb>=0.31",
        "omegaconf>=2.4",
        "numpy>=1.26",
        "scipy>=1.11",
        "imagehash>=4.3",  # near-duplicates in a review
        "sacrebleu>=2.4",
        "pillow>=11.3",
        "safetensors>=0.5",
        "PyYAML>=6",
        "jinja2>=3.1",
        "requests>=2.28",
        "urllib3>=2.2",
        "fsspec>=2024.6",
        "braceexpand>=0.1.7",
        "psutil>=5.9",
        "packaging>=22",
        "tqdm>=4.66",
    ],
    extras_require={
        "dev": [
            "pytest>=8.2,<9.2",  # pytest-xdist 3.8 does not see its groups in 9.2
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.7",
            "hypothesis>=6.100",
            "ruff",
            "mypy",
            "pre-commit",
            "wandb-workspaces>=0.4.13",
            "tensorboard>=2.18",
            "starlette>=0.40",
            "uvicorn>=0.30",
            "openai>=1.50",  # the client that asks launch/serve.py
            "pycocotools>=2.0.8",  # reads what predict and evaluate write
            "playwright>=1.48",  # drives an installed Chromium
            "s3fs>=2024.6",
            "moto[s3]>=5",  # an S3 server for tests
            "flask>=3",
            "flask-cors>=4",
            "gcsfs>=2024.6",
            "gcp-storage-emulator>=2024.8",  # a server of Google Cloud Storage for tests
            "pyvips[binary]>=3.1",
        ],
        "serve": ["starlette>=0.40", "uvicorn>=0.30"],  # for launch/serve.py and launch/predict.py --serve
        "s3": ["s3fs>=2024.6"],  # for data.shards=s3://
        "tiles": ["pyvips[binary]>=3.1"],  # photos above 100 megapixels in tiles; its binary wheel of libvips is LGPL
        "gcs": ["gcsfs>=2024.6"],  # for data.shards=gs://
        "tensorboard": ["tensorboard>=2.18"],  # for tracking.tensorboard=true
        "workspace": ["wandb-workspaces>=0.4.13"],  # for launch/workspace.py
        "bench": ["accelerate>=1.1"],  # what bench/loading.py compares with
    },
    entry_points={
        "console_scripts": [
            "cogvlm-train = cogvlm_ft.launch.train:main",
            "cogvlm-evaluate = cogvlm_ft.launch.evaluate:main",
            "cogvlm-plan = cogvlm_ft.launch.plan:main",
            "cogvlm-doctor = cogvlm_ft.launch.doctor:main",
            "cogvlm-predict = cogvlm_ft.launch.predict:main",
            "cogvlm-serve = cogvlm_ft.launch.serve:main",
            "cogvlm-export = cogvlm_ft.launch.export:main",
            "cogvlm-blend = cogvlm_ft.launch.blend:main",
            "cogvlm-convert-sat = cogvlm_ft.launch.convert_sat:main",
            "cogvlm-report = cogvlm_ft.launch.report:main",
            "cogvlm-best = cogvlm_ft.launch.best:main",
            "cogvlm-submit = cogvlm_ft.launch.submit:main",
            "cogvlm-stop = cogvlm_ft.launch.stop:main",
            "cogvlm-replay-step = cogvlm_ft.launch.replay_step:main",
            "cogvlm-wandb-sync = cogvlm_ft.launch.wandb_sync:main",
            "cogvlm-workspace = cogvlm_ft.launch.workspace:main",
            "cogvlm-demo = cogvlm_ft.launch.demo:main",
            "cogvlm-rehearse = cogvlm_ft.launch.rehearse:main",
            "cogvlm-init = cogvlm_ft.launch.init:main",
            "cogvlm-replay = cogvlm_ft.launch.replay:main",  # the former name of cogvlm-wandb-sync, for one version
            "cogvlm-build-shards = cogvlm_ft.shards.build:main",
            "cogvlm-review = cogvlm_ft.shards.review:main",
        ]
    },
)
