"""Texts in, vectors or scores out: tokenised a chunk ahead of the compute, in the order given."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from sterna.core.errors import RequestError, TaskError
from sterna.engine.embed import Embedder, Floats
from sterna.text.inputs import EncodedText

Input = str | Sequence[int]
# Texts tokenised at once: about 0.3 s of MiniLM, so little waits for the first and little is kept.
CHUNK = 2048


def embed_inputs(
    embedder: Embedder,
    inputs: Sequence[Input],
    *,
    dimensions: int | None = None,
    prompt: str = "",
    truncate: int | None = None,
    note: Callable[[int], None] | None = None,
) -> Floats:
    """float32 [N, D or dimensions]. prompt: put before every text (not before token ids).

    Raises RequestError for inputs that cannot be embedded, TaskError for a model that scores.
    """
    check_dimensions(embedder, dimensions)
    out = np.empty((len(inputs), dimensions or embedder.width), np.float32)
    done = 0
    for texts in _ahead(inputs, lambda part: encode_inputs(embedder, part, prompt, truncate)):
        found = embedder.embed(texts, note)
        out[done : done + len(texts)] = shortened(embedder, found, dimensions)
        done += len(texts)
    return out


def pair_scores(
    embedder: Embedder,
    pairs: Sequence[tuple[str, str]],
    truncate: int | None = None,
    note: Callable[[int], None] | None = None,
) -> Floats:
    """float32 [N]: a cross encoder's score of each pair, or the cosine of the two vectors."""
    if embedder.model.head is not None:
        parts = [
            embedder.embed(texts, note)[:, 0]
            for texts in _ahead(pairs, lambda part: embedder.encoder.pairs(part, truncate))
        ]
        return np.concatenate(parts) if parts else np.empty(0, np.float32)
    texts = list(dict.fromkeys(text for pair in pairs for text in pair))
    vectors = embed_inputs(embedder, texts, truncate=truncate, note=note)
    return cosines(vectors, texts, pairs)


def cosines(vectors: Floats, texts: Sequence[str], pairs: Sequence[tuple[str, str]]) -> Floats:
    """float32 [N]: the cosine of each pair; `vectors` [T, D] are those of `texts`, each once."""
    row_of = {text: i for i, text in enumerate(texts)}
    lengths = np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    unit = vectors / lengths
    left, right = (unit[[row_of[pair[side]] for pair in pairs]] for side in (0, 1))
    found: Floats = np.einsum("nd,nd->n", left, right)
    return found


def encode_inputs(
    embedder: Embedder, inputs: Sequence[Input], prompt: str, truncate: int | None
) -> list[EncodedText]:
    """Texts tokenised as one batch; token ids checked and taken as they are."""
    texts = [prompt + item for item in inputs if isinstance(item, str)]
    encoded = iter(embedder.encoder.texts(texts, truncate) if texts else [])
    vocab = embedder.model.body.config.vocab_size
    return [
        next(encoded) if isinstance(item, str) else embedder.encoder.check_ids(item, vocab)
        for item in inputs
    ]


def check_dimensions(embedder: Embedder, dimensions: int | None) -> None:
    """RequestError for a number that the model does not have; TaskError when it has no vectors."""
    if embedder.model.head is not None:
        raise TaskError(
            "this model scores pairs of texts and has no embeddings; use rerank or score"
        )
    if dimensions is not None and not 1 <= dimensions <= embedder.width:
        raise RequestError(
            f"dimensions is {dimensions}, the model has {embedder.width}; ask for 1 to "
            f"{embedder.width}",
            param="dimensions",
        )


def shortened(embedder: Embedder, vectors: Floats, dimensions: int | None) -> Floats:
    """The first `dimensions` columns, at length 1 again where the model normalises."""
    if dimensions is None or dimensions == vectors.shape[1]:
        return vectors
    cut = vectors[:, :dimensions]
    if not embedder.model.pooling.is_normalized:
        return cut
    lengths = np.linalg.norm(cut, axis=1, keepdims=True)
    found: Floats = cut / np.maximum(lengths, 1e-12)
    return found


def _ahead(
    inputs: Sequence[Input] | Sequence[tuple[str, str]],
    encode: Callable[..., list[EncodedText]],
) -> Iterator[list[EncodedText]]:
    """Each chunk tokenised in a thread while the one before it is computed."""
    chunks = [inputs[i : i + CHUNK] for i in range(0, len(inputs), CHUNK)]
    if len(chunks) == 1:
        yield encode(chunks[0])
        return
    with ThreadPoolExecutor(1) as beside:
        pending: Future[list[EncodedText]] | None = None
        for chunk in chunks:
            following = beside.submit(encode, chunk)
            if pending is not None:
                yield pending.result()
            pending = following
        if pending is not None:
            yield pending.result()
