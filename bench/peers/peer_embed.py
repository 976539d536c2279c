"""The rivals of bench/embed.py, each in its own process: texts in, unit vectors out.

`peer_embed.py NAME MODEL THREADS`: one JSON request a line in, one JSON answer a line out. A
request {"texts": [...], "batch": B} is answered with {"seconds": s, "path": vectors as .npy}. Every
rival gets texts, sorts them by length itself (as sentence-transformers does), tokenises with the
model's own tokenizer, pads its batches, takes the mean of the rows and normalises.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Batch = Callable[[np.ndarray, np.ndarray], np.ndarray]  # ids, mask [B, L] -> hidden [B, L, D]
MAX_TOKENS = 512


def pooled(model: Batch, tokenizer: Any, texts: list[str], size: int) -> np.ndarray:
    """Unit vectors [N, D] in the order of the texts."""
    encoded = tokenizer.encode_batch(texts)
    order = sorted(range(len(texts)), key=lambda i: -len(encoded[i].ids))
    out = np.empty((len(texts), 384), np.float32)
    for at in range(0, len(order), size):
        part = order[at : at + size]
        longest = max(len(encoded[i].ids) for i in part)
        ids = np.zeros((len(part), longest), np.int64)
        mask = np.zeros((len(part), longest), np.int64)
        for row, i in enumerate(part):
            ids[row, : len(encoded[i].ids)] = encoded[i].ids
            mask[row, : len(encoded[i].ids)] = 1
        hidden = model(ids, mask) * mask[:, :, None]
        mean = hidden.sum(1) / mask.sum(1, keepdims=True)
        out[part] = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    return out


def fast_tokenizer(folder: str) -> Any:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(MAX_TOKENS)
    return tokenizer


def onnx_file(folder: str) -> str:
    """The model exported once by torch.onnx: hidden states of ids and mask."""
    path = Path(tempfile.gettempdir()) / "sterna-bench-minilm.onnx"
    if not path.exists():
        import torch
        from transformers import AutoModel

        model = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()

        class Hidden(torch.nn.Module):
            """Hidden states of ids and mask; a mask of four dims is taken as it is."""

            def __init__(self) -> None:
                super().__init__()
                self.model = model

            def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
                added = (1.0 - mask[:, None, None, :].float()) * -1e9
                return self.model(input_ids=ids, attention_mask=added).last_hidden_state

        ids = torch.ones(2, 8, dtype=torch.int64)
        axes = {0: "batch", 1: "length"}
        torch.onnx.export(
            Hidden(), (ids, ids.clone()), str(path), input_names=["input_ids", "attention_mask"],
            output_names=["last_hidden_state"], dynamo=False, opset_version=17,
            dynamic_axes={"input_ids": axes, "attention_mask": axes, "last_hidden_state": axes},
        )  # fmt: skip
    return str(path)


def openvino(folder: str, threads: int, precision: str) -> Any:
    import openvino as ov

    core = ov.Core()
    options = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": precision,
               "PERFORMANCE_HINT": "LATENCY"}  # fmt: skip
    request = core.compile_model(onnx_file(folder), "CPU", options).create_infer_request()
    names = [next(iter(port.names)) for port in request.model_inputs]

    def run(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        return request.infer({name: given[name] for name in names})[0]

    tokenizer = fast_tokenizer(folder)
    return lambda texts, size: pooled(run, tokenizer, texts, size)


def onnxruntime(folder: str, threads: int) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(onnx_file(folder), options, ["CPUExecutionProvider"])
    wanted = {i.name for i in session.get_inputs()}

    def run(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        return session.run(None, {k: v for k, v in given.items() if k in wanted})[0]

    tokenizer = fast_tokenizer(folder)
    return lambda texts, size: pooled(run, tokenizer, texts, size)


def sentence_transformers(folder: str, threads: int, dtype: str) -> Any:
    import torch
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(threads)
    model = SentenceTransformer(folder, device="cpu", model_kwargs={"dtype": dtype})
    model.max_seq_length = MAX_TOKENS
    return lambda texts, size: np.asarray(
        model.encode(texts, batch_size=size, convert_to_tensor=True).float()
    )


def ctranslate2(folder: str, threads: int, kind: str) -> Any:
    import ctranslate2 as ct

    converted = Path(tempfile.gettempdir()) / "sterna-bench-minilm-ct2"
    if not converted.exists():
        ct.converters.TransformersConverter(folder).convert(str(converted))
    encoder = ct.Encoder(str(converted), compute_type=kind, intra_threads=threads)
    tokenizer = fast_tokenizer(folder)

    def run(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        lengths = ct.StorageView.from_array(mask.sum(1).astype(np.int32))
        view = ct.StorageView.from_array(np.ascontiguousarray(ids.astype(np.int32)))
        return np.array(encoder.forward_batch(view, lengths).last_hidden_state)

    return lambda texts, size: pooled(run, tokenizer, texts, size)


PEERS: dict[str, Callable[[str, int], Any]] = {
    "openvino-bf16": lambda f, t: openvino(f, t, "bf16"),
    "sentence-transformers-bf16": lambda f, t: sentence_transformers(f, t, "bfloat16"),
    "ctranslate2-int8": lambda f, t: ctranslate2(f, t, "int8_float32"),
    "openvino-f32": lambda f, t: openvino(f, t, "f32"),
    "onnxruntime-f32": onnxruntime,
    "sentence-transformers-f32": lambda f, t: sentence_transformers(f, t, "float32"),
}


def sterna(folder: str, threads: int, **settings: str) -> Any:
    from sterna.engine.llm import LLM

    llm = LLM(folder, threads=threads, max_model_len=MAX_TOKENS, **settings)
    return lambda texts, _: llm.embed(texts, truncate=-1, progress=False)


PEERS["sterna-bf16"] = sterna
PEERS["sterna-int8"] = lambda f, t: sterna(f, t, weights="int8", activations="int8")
PEERS["sterna-f32"] = lambda f, t: sterna(f, t, dtype="float32")


def main() -> None:
    name, folder, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
    out = os.fdopen(os.dup(1), "w", buffering=1)  # libraries print to stdout
    os.dup2(2, 1)
    embed = PEERS[name](folder, threads)
    out.write("ready\n")
    path = str(Path(tempfile.gettempdir()) / f"sterna-bench-{name}.npy")
    for line in sys.stdin:
        asked = json.loads(line)
        started = time.perf_counter()
        vectors = embed(asked["texts"], asked["batch"])
        seconds = time.perf_counter() - started
        np.save(path, vectors)
        out.write(json.dumps({"seconds": seconds, "path": path}) + "\n")


if __name__ == "__main__":
    main()
