"""The default model in the default format, quantised at first start and kept under STERNA_HOME.

3.5 s once on 2 cores, then mapped in 0.05. Two servers that start together take turns. Whatever
prevents keeping it (a read-only home, a full disk) costs speed at start, never an answer: the
weights are then rounded in memory. A damaged copy is made again.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from sterna.core.errors import ModelFileError, QuantizeError, UnsupportedModelError
from sterna.core.log import get_logger
from sterna.core.rundir import home
from sterna.model.load import load_model
from sterna.quant.calibrate import random_mean_squares
from sterna.quant.convert import QuantizeOptions, quantize_folder
from sterna.quant.file import FILE_NAME, VERSION, open_container
from sterna.quant.formats import parse_format
from sterna.quant.sources import STERNA, stored_method

# What the default model runs in when nothing is asked for: "bf16" or a format's name.
DEFAULT_MODEL_WEIGHTS = "fp6"
log = get_logger(__name__)


def cached_folder(source: Path, format_name: str) -> Path | None:
    """The kept folder of `source` in a format, made when missing; None when that is impossible."""
    folder = home() / "models" / _folder_name(source, format_name)
    try:
        if _is_sound(folder):
            return folder
        log.info("quantising %s to %s, once", source.name, format_name)
        quantize_folder(source, folder, _options(source, format_name))
    except (OSError, QuantizeError) as error:
        log.warning("%s cannot be kept (%s); weights are rounded in memory", folder, error)
        return None
    _remove_others(folder, source, format_name)
    return folder


def _options(source: Path, format_name: str) -> QuantizeOptions:
    fmt = parse_format(format_name)
    importance = random_mean_squares(load_model(source).decoder)
    return QuantizeOptions(fmt, search="fast", importance=importance, is_measured=False)


def _folder_name(source: Path, format_name: str) -> str:
    stat = source.stat()
    facts = f"{source.resolve()} {stat.st_size} {stat.st_mtime_ns} {VERSION}"
    return f"{source.stem}-{format_name}-{hashlib.sha256(facts.encode()).hexdigest()[:12]}"


def _is_sound(folder: Path) -> bool:
    """Whether the folder is whole, checksums compared; one that is not is removed, and said so."""
    if not folder.exists():
        return False
    try:
        if stored_method(folder) == STERNA:
            open_container(folder / FILE_NAME)
            return True
        log.warning("%s is no quantised model; making it again", folder)
    except (ModelFileError, UnsupportedModelError) as error:
        log.warning("%s; making it again", error.message)
    shutil.rmtree(folder)
    return False


def _remove_others(folder: Path, source: Path, format_name: str) -> None:
    """Copies of earlier versions of the same model."""
    for other in folder.parent.glob(f"{source.stem}-{format_name}-*"):
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)
