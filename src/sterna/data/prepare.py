"""Sources to token shards: tokenise once, train often."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from sterna.core.errors import DataError
from sterna.data.ahead import mapped
from sterna.data.config import DataConfig
from sterna.data.counts import Counts
from sterna.data.mix import Mixer
from sterna.data.pack import Document
from sterna.data.shards import write_shards
from sterna.data.source import Source
from sterna.data.tokenize import DocumentMaker
from sterna.text.tokenizer import Tokenizer

# No document is cut when it is packed: that is for the run that reads it to choose.
_ANY_LENGTH = (1 << 31) - 1


def whole_documents(data: DataConfig, tokenizer: Tokenizer, counts: Counts) -> Iterator[Document]:
    """Every document of every source once, whole, in the files' order; `counts` grows with them.

    Of `data` what makes a document counts (sources, train_on, on_bad_row, template_kwargs,
    document_end, prefetch); order, mix and length do not.
    """
    if data.split:
        raise DataError(
            "data.split parts rows by their prompts, which packed shards no longer tell; pack the "
            "parts from files of their own, or leave the split out"
        )
    for config in data.sources:
        once = config.model_copy(update={"epochs": 1})
        plain = data.model_copy(
            update={"sources": (once,), "shuffle": "none", "seq_len": _ANY_LENGTH, "held_out": 0.0}
        )
        sources = [Source(once, plain, 0)]
        mixer, maker = Mixer(sources, plain), DocumentMaker(plain, sources, tokenizer)
        batches = (batch.rows for batch in mixer.batches(mixer.start))
        for documents, made in mapped(maker.make, batches, data.prefetch):
            counts.add(made)
            yield from documents


def pack_shards(
    data: DataConfig,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    shard_tokens: int = 1 << 27,
    tick: Callable[[Counts], None] | None = None,
) -> Counts:
    """Write the documents of `data` as shards into `folder`; `tick` is told the counts so far.

    Raises DataError for unreadable sources, for a folder with shards and when nothing is left to
    train on.
    """
    counts = Counts()

    def ticking() -> Iterator[Document]:
        for document in whole_documents(data, tokenizer, counts):
            if tick is not None:
                tick(counts)
            yield document

    if shard_tokens < 1:
        raise DataError(f"shard_tokens is {shard_tokens}, at least 1 is needed")
    write_shards(ticking(), folder, tokenizer.fingerprint, tokenizer.vocab_size, shard_tokens)
    return counts
