"""The same weights for every peer, made once under .peers/model from Sterna's default model.

The GGUF's 4-bit weights are dequantised and rounded to bfloat16 here; transformers and vLLM read
that folder, OpenVINO an fp16 export of it (it computes in bf16), llama.cpp a BF16 GGUF that its own
tool makes from the same file. So all hold the same values, 269 MB of them.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from peers.setup import PEERS, python_of, run

MODEL = PEERS / "model"
HF_FOLDER = MODEL / "hf-bf16"
OPENVINO_FOLDER = MODEL / "openvino-fp16"
LLAMA_BIN = PEERS / "llamacpp" / "build" / "bin"

_TOKENIZER = """
import sys
from pathlib import Path
from transformers import AutoTokenizer
source = Path(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
tokenizer.save_pretrained(sys.argv[2])
"""


def default_gguf() -> Path:
    """The GGUF file of Sterna's default model."""
    from sterna.model.hub import resolve_model

    return Path(resolve_model(""))


def prepare(peers: list[str]) -> None:
    """Make what the named peers read and is not there yet."""
    MODEL.mkdir(parents=True, exist_ok=True)
    if not (HF_FOLDER / "tokenizer.json").exists():
        _save_hf()
    for name in peers:
        if name.startswith("llamacpp"):
            _quantize_gguf(name.removeprefix("llamacpp").removeprefix("-"))
    if any(name.startswith("openvino") for name in peers) and not OPENVINO_FOLDER.exists():
        run([python_of("openvino").with_name("optimum-cli"), "export", "openvino", "--model",
             HF_FOLDER, "--task", "text-generation-with-past", "--weight-format", "fp16",
             OPENVINO_FOLDER])  # fmt: skip


def gguf_file(weights: str = "") -> Path:
    """llama.cpp's file of one of its formats; "" = BF16."""
    return MODEL / f"{weights or 'bf16'}.gguf"


def _quantize_gguf(weights: str) -> None:
    """The BF16 file from the default model, the others from the BF16 file."""
    if gguf_file(weights).exists():
        return
    if weights:
        _quantize_gguf("")
    source = gguf_file() if weights else default_gguf()
    quantize = LLAMA_BIN / "llama-quantize"
    run([quantize, "--allow-requantize", source, gguf_file(weights), (weights or "bf16").upper()])


def _save_hf() -> None:
    from sterna.model.load import load_model
    from sterna.model.save import save_model

    source = default_gguf()
    save_model(load_model(source, dtype="bfloat16").decoder, HF_FOLDER)
    command = [str(python_of("transformers")), "-c", _TOKENIZER, str(source), str(HF_FOLDER)]
    subprocess.run(command, check=True)
