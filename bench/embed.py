"""Embeddings: Sterna against its rivals in one interleaved run, offline and through HTTP.

    python bench/embed.py MODEL --peers-python .peers/embed/bin/python [--repeats 5]
        [--peers sterna-int8,ctranslate2-int8 --no-http --into FILE.json]

MODEL: a folder of all-MiniLM-L6-v2. Three sets of 256 texts of random vocabulary words: about 128
tokens, about 16, and 8 to 512 mixed. Text in, unit vectors out. Every peer's vectors must agree
with sentence-transformers in float32 (cosine) before any clock starts. Rivals get their best batch
of 32 and 128. Peers that are not on turn are stopped; figures are medians of tokens/s. With --into
a long run is taken in pieces (one precision each, HTTP last): each call adds its figures.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from sterna.core.machine import fingerprint
from sterna.text.tokenizer import load_tokenizer

HERE = Path(__file__).resolve().parent
RIVALS = ("openvino-bf16", "sentence-transformers-bf16", "ctranslate2-int8", "openvino-f32",
          "onnxruntime-f32", "sentence-transformers-f32")  # fmt: skip
OURS = ("sterna-bf16", "sterna-int8", "sterna-f32")
ORACLE = "sentence-transformers-f32"
# Least cosine to the oracle. sentence-transformers in bfloat16 has 0.9967 on random words.
LEAST = {"bf16": 0.99, "int8": 0.95, "f32": 0.9999}
BATCHES = (32, 128)
NUM_TEXTS = 256


class Peer:
    """One process of peer_embed.py, stopped while it is not on turn."""

    def __init__(self, name: str, python: str, model: str, threads: int) -> None:
        self.name = name
        command = [python, str(HERE / "peers" / "peer_embed.py"), name, model, str(threads)]
        env = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        assert self.process.stdout is not None
        if self.process.stdout.readline() != "ready\n":
            raise RuntimeError(f"{name} did not start")
        self._signal(signal.SIGSTOP)

    def _signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def embed(self, texts: list[str], batch: int) -> tuple[float, np.ndarray]:
        """(seconds, vectors)."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self._signal(signal.SIGCONT)
        self.process.stdin.write(json.dumps({"texts": texts, "batch": batch}) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        self._signal(signal.SIGSTOP)
        return answer["seconds"], np.load(answer["path"])

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def text_sets(model: str) -> tuple[dict[str, list[str]], dict[str, int]]:
    """The texts, and how many tokens each set has."""
    tokenizer = load_tokenizer(model)
    draw = np.random.default_rng(0)
    words = [w for i in range(1996, 12_000) if (w := tokenizer.token_text(i)).isalpha()]

    def text(tokens: int) -> str:
        return " ".join(draw.choice(words, max(tokens - 2, 1)))

    lengths = {
        "128": [128] * NUM_TEXTS,
        "16": [16] * NUM_TEXTS,
        "mixed": np.exp(draw.uniform(np.log(8), np.log(512), NUM_TEXTS)).astype(int).tolist(),
    }
    sets = {name: [text(n) for n in ns] for name, ns in lengths.items()}
    counts = {
        name: sum(min(len(ids), 512) for ids in tokenizer.encode_batch(texts))
        for name, texts in sets.items()
    }
    return sets, counts


def start_peers(names: list[str], args: argparse.Namespace) -> tuple[list[Peer], dict[str, str]]:
    peers, missing = [], {}
    for name in names:
        python = sys.executable if name in OURS else args.peers_python
        try:
            peers.append(Peer(name, python, args.model, args.threads))
        except (RuntimeError, OSError) as error:
            missing[name] = str(error)
            print(f"{name}: skipped ({error})", flush=True)
    return peers, missing


def check(peers: list[Peer], texts: list[str]) -> dict[str, float]:
    """Least cosine of each peer to the oracle; those that are wrong stop the run."""
    found = {peer.name: peer.embed(texts, 32)[1] for peer in peers}
    want = found[ORACLE]
    lengths = {name: np.linalg.norm(v, axis=1) for name, v in found.items()}
    cosines = {n: float(((v * want).sum(1) / lengths[n]).min()) for n, v in found.items()}
    for name, cosine in cosines.items():
        assert cosine >= LEAST[name.rpartition("-")[2]], (name, cosine)
    return cosines


def time_all(
    peers: list[Peer], sets: dict[str, list[str]], counts: dict[str, int], repeats: int
) -> dict[str, dict[str, list[float]]]:
    """{set: {peer: tokens/s of each repeat}}, each peer with its better batch."""
    samples: dict[str, dict[str, list[float]]] = {}
    for name, texts in sets.items():
        batch = {p.name: min(BATCHES, key=lambda b: p.embed(texts, b)[0]) for p in peers}
        for _ in range(repeats):
            for peer in peers:
                seconds, _ = peer.embed(texts, batch[peer.name])
                samples.setdefault(name, {}).setdefault(peer.name, []).append(
                    counts[name] / seconds
                )
    return samples


def time_http(args: argparse.Namespace, sets: dict[str, list[str]], counts: dict[str, int]) -> Any:
    """tokens/s through `sterna serve`: 4 requests of 64 texts at once, base64."""
    import concurrent.futures

    import httpx

    port = 18_431
    options = {"port": port, "max-model-len": 512, "threads": args.threads}
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "sterna.cli", "serve", args.model, *flags, "--no-log-requests"]
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                httpx.get(url + "/health", timeout=1).raise_for_status()
                break
            except httpx.HTTPError:
                time.sleep(0.1)
        client = httpx.Client(base_url=url, timeout=120)

        def ask(texts: list[str]) -> None:
            body = {"input": texts, "encoding_format": "base64", "truncate_prompt_tokens": -1}
            client.post("/v1/embeddings", json=body).raise_for_status()

        found: dict[str, list[float]] = {}
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            for name, texts in sets.items():
                parts = [texts[i : i + 64] for i in range(0, len(texts), 64)] * 2
                list(pool.map(ask, parts))
                for _ in range(args.repeats):
                    started = time.perf_counter()
                    list(pool.map(ask, parts))
                    seconds = time.perf_counter() - started
                    found.setdefault(name, []).append(2 * counts[name] / seconds)
        return found
    finally:
        server.terminate()
        server.wait()


def matrix_share(args: argparse.Namespace, sets: dict[str, list[str]]) -> dict[str, float]:
    """Share of a step's time in linear and attention kernels."""
    from sterna.engine.build_embed import build_embedder
    from sterna.engine.config import EngineConfig
    from sterna.kernels.tape import StepTape

    tapes: list[Any] = []
    start = StepTape.__init__

    def keep(self: Any, *a: Any, **k: Any) -> None:
        start(self, *a, **k)
        tapes.append(self)

    StepTape.__init__ = keep  # type: ignore[method-assign]
    settings = EngineConfig.model_validate({"threads": args.threads, "max_model_len": 512})
    embedder = build_embedder(args.model, settings)
    StepTape.__init__ = start  # type: ignore[method-assign]
    shares = {}
    for name, texts in sets.items():
        encoded = embedder.encoder.texts(texts, -1)
        while sum(map(len, encoded)) > embedder.token_budget:
            encoded = encoded[: len(encoded) // 2]
        embedder.run(encoded)
        tokens, seqs = sum(map(len, encoded)), len(encoded)
        profile = min(
            (tapes[0].profile(tokens, seqs, seqs) for _ in range(9)),
            key=lambda calls: sum(s for _, s in calls),
        )
        inside = sum(s for kernel, s in profile if kernel in ("linear", "bidirectional"))
        shares[name] = inside / sum(s for _, s in profile)
    return shares


def report(result: dict[str, Any]) -> str:
    lines = ["| peer | " + " | ".join(result["medians"]) + " |", "|---|" + "---|" * 3]
    names = [*OURS, *RIVALS]
    for name in names:
        row = [result["medians"][s].get(name) for s in result["medians"]]
        if any(row):
            lines.append(f"| {name} | " + " | ".join(f"{v:,.0f}" if v else "-" for v in row) + " |")
    for kind in ("bf16", "int8"):
        gains = []
        for by_peer in result["medians"].values():
            rivals = [v for n, v in by_peer.items() if n in RIVALS and n.endswith(kind)]
            ours = by_peer.get(f"sterna-{kind}")
            gains.append(f"{ours / max(rivals):.2f}x" if ours and rivals else "-")
        lines.append(f"| **{kind}: Sterna / best rival** | " + " | ".join(gains) + " |")
    if "http" in result:
        shares = [
            median(v) / result["medians"][s]["sterna-bf16"] for s, v in result["http"].items()
        ]
        lines.append(
            "| sterna-bf16 over HTTP / offline | " + " | ".join(f"{s:.2f}" for s in shares) + " |"
        )
    if "matrix_share" in result:
        shares = result["matrix_share"].values()
        lines.append("| time in matrix kernels | " + " | ".join(f"{s:.1%}" for s in shares) + " |")
    return "\n".join(lines)


def merged(result: dict[str, Any], path: Path | None) -> dict[str, Any]:
    """What `path` holds already with this piece's figures over it."""
    if path is None or not path.exists():
        return result
    kept: dict[str, Any] = json.loads(path.read_text())
    if (kept["tokens"], kept["threads"]) != (result["tokens"], result["threads"]):
        raise ValueError(f"{path} was measured on other texts or with other threads")
    for name, by_peer in result.pop("samples", {}).items():
        kept["samples"].setdefault(name, {}).update(by_peer)
    for key in ("missing", "cosines"):
        kept[key] |= result.pop(key, {})
    return {**kept, **result}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--peers-python", default=str(HERE.parent / ".peers/embed/bin/python"))
    parser.add_argument("--peers", default=",".join([*OURS, *RIVALS]), help="'' = only over HTTP")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-http", action="store_true")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--into", type=Path, help="a JSON file of earlier pieces, perhaps new")
    args = parser.parse_args()
    sets, counts = text_sets(args.model)
    result: dict[str, Any] = {"date": datetime.now().isoformat(timespec="seconds"),
                              "machine": fingerprint().as_dict(), "threads": args.threads,
                              "tokens": counts}  # fmt: skip
    if args.peers:
        compare(args, sets, counts, result)
    if not args.no_http:
        result["http"] = time_http(args, sets, counts)
        result["matrix_share"] = matrix_share(args, sets)
    result = merged(result, args.into)
    result["medians"] = {
        name: {peer: median(v) for peer, v in by_peer.items()}
        for name, by_peer in result["samples"].items()
    }
    table = report(result)
    print(table)
    path = args.into or args.out / f"embed-{result['date'].replace(':', '')}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1))
    path.with_suffix(".md").write_text(f"{fingerprint().line()}, tokens/s\n\n{table}\n")


def compare(
    args: argparse.Namespace,
    sets: dict[str, list[str]],
    counts: dict[str, int],
    result: dict[str, Any],
) -> None:
    """Start the peers, check their vectors, time them."""
    asked = args.peers.split(",")
    names = asked if ORACLE in asked else [*asked, ORACLE]
    peers, result["missing"] = start_peers(names, args)
    try:
        result["cosines"] = check(peers, sets["16"][:64])
        timed = [peer for peer in peers if peer.name in asked]
        result["samples"] = time_all(timed, sets, counts, args.repeats)
    finally:
        for peer in peers:
            peer.close()


if __name__ == "__main__":
    main()
