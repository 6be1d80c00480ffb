"""Packaging metadata of atesd and atesd_kernels. pyproject.toml holds the build system and tool settings only.

Version ranges stop at the next major release. What the tests run on is the newest of each range; constraints.txt pins
torch and triton, whose versions belong together. `make test-oldest` runs on the lower bounds of torch, triton and
transformers, pinned in requirements-oldest.txt. The extras resolve together, except flash: flash-attn is built, and
looks for torch before pip has installed it (`--no-build-isolation`). vllm pins its own torch and transformers, within
these ranges.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

# What every command needs without a GPU: gguf reads the quickstart's model, math-verify grades answers, reasoning-gym
# writes the problems of gsm-symbolic.
BASE = [
    "torch>=2.11",
    "transformers>=5.17,<6",
    "accelerate>=1.10,<2",
    "peft>=0.18,<1",
    "datasets>=4.0,<6",
    "safetensors>=0.5,<1",
    "gguf>=0.17,<1",
    "reasoning-gym>=0.1.23,<0.2",
    "matplotlib>=3.8,<4",
    "math-verify>=0.8,<1",
    "numpy>=1.26,<3",
    "pyyaml>=6,<7",
    "tqdm>=4.66,<5",
    "rich>=13.7,<16",
]
GPU = ["triton>=3.6; platform_system == 'Linux'", "liger-kernel>=0.6,<1; platform_system == 'Linux'"]
TRL = ["trl>=1.0,<2"]
LIGER = ["liger-kernel>=0.6,<1; platform_system == 'Linux'"]
# The peers that stand beside the losses. Those of BENCH run on a CPU too.
PEERS = ["orda-kernel>=0.1,<0.2", "cut-cross-entropy>=25.1,<26; platform_system == 'Linux'", *TRL, *LIGER]
BENCH = ["pytest>=8,<10", "pytest-benchmark>=5,<6", "psutil>=5.9,<8", *PEERS]
BENCH_GPU = [*BENCH, "flash-linear-attention>=0.6,<1; platform_system == 'Linux'"]
# triton: its interpreter and its offline compiler run on machines without a GPU.
TEST = [
    "pytest>=8,<10",
    "pytest-xdist>=3.6,<4",
    "hypothesis>=6.100,<7",
    "ruff>=0.9,<1",
    "mypy>=1.15,<3",
    "triton>=3.6; platform_system == 'Linux'",
]
TEST += [*TRL, *LIGER, "pytorch-lightning>=2.4,<3"]

README = Path(__file__).parent / "README.md"


def long_description() -> str:
    """The front page for a package index. Paths of the repository lead nowhere there: such links become their text."""
    text = README.read_text(encoding="utf-8") if README.exists() else ""
    without_pictures = re.sub(r"^\|? *!\[[^\]]*\]\((?!https?:).*\n\|[-|]*\|\n.*\n", "", text, flags=re.MULTILINE)
    return re.sub(
        r"\[([^\]]*)\]\((?!https?:|#)([^)#]*)[^)]*\)",
        lambda link: link[1] if link[1] == link[2] else f"{link[1]} ({link[2]})",
        without_pictures,
    )


setup(
    name="atesd",
    version="0.1.0",
    description="Adaptive teacher exposure for on-policy self-distillation, and the fused losses it trains with",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(include=["atesd", "atesd.*", "atesd_kernels", "atesd_kernels.*"]),
    package_data={
        "atesd": [
            *("py.typed", "README.md", "studies/shipped/*.yaml"),
            *("recipes/*.yaml", "recipes/quickstart/*", "recipes/accelerate/*.yaml"),
        ],
        "atesd_kernels": ["py.typed", "README.md", "cpp/*.cpp", "cpp/*.h"],
    },
    zip_safe=False,
    install_requires=BASE,
    extras_require={
        "gpu": GPU,
        "flash": ["flash-attn>=2.7,<3; platform_system == 'Linux'"],
        "4bit": ["bitsandbytes>=0.50,<1; platform_system == 'Linux'"],
        "trl": TRL,
        "vllm": ["vllm>=0.32,<1; platform_system == 'Linux'"],
        # a narrow range: a checkpoint's optimizer states are put back by names DeepSpeed keeps for itself
        "deepspeed": ["deepspeed>=0.19.8,<0.20; platform_system == 'Linux'"],
        "bench": BENCH,
        "bench-gpu": BENCH_GPU,
        "test": TEST,
    },
    entry_points={"console_scripts": ["atesd=atesd.cli:main"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
