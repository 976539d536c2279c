"""The `sterna` command: its verbs by name, and how it ends.

This file and what it imports stay light: `sterna --help` loads no torch and takes under 0.4 s.
Each verb is an import path that cyclopts resolves when the verb is called.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Sequence

from cyclopts import App, CycloptsError, Parameter

from sterna.cli.failures import EXIT_INTERRUPTED, EXIT_USAGE, describe_usage_error, say_error
from sterna.cli.settings import layer_files, without_sections
from sterna.core.errors import SternaError
from sterna.version import __version__

# A disk or a quota that is full, met while printing; files say it themselves.
_FULL = (errno.ENOSPC, errno.EDQUOT)

WELCOME = """\
Sterna {version}: one language-model stack, one forward.

What you can do next:
  sterna serve                    serve the default model at http://127.0.0.1:8000
  sterna serve PATH               serve a Hugging Face folder or a GGUF file
  sterna chat                     talk to a model in this terminal
  sterna complete "Once upon"     continue a prompt; --input/--output run a file of requests
  sterna embed FILE --model M -o V.npy   a file of texts to vectors
  sterna train RECIPE.toml        fine-tune or pretrain a model
  sterna align RECIPE.toml        teach a model what is better, by rewards
  sterna plan RECIPE.toml         what a run takes; --seq-len 65536: whether a long row fits
  sterna quantize -o FOLDER       a model in six bits a weight; serve the folder
  sterna quality A B --text FILE  how far a quantised model is from the original
  sterna bench serve              measure any OpenAI endpoint under load
  sterna doctor                   which kernels run here, and why

`sterna VERB --help` lists the settings of a verb."""


def welcome() -> None:
    """Say what you can do next."""
    print(WELCOME.format(version=__version__))


def build_app() -> App:
    """The command tree. Help lines are given here so that listing verbs imports none of them."""
    app = App(
        name="sterna",
        help="One language-model stack: train, align, compress and serve with one forward.",
        version=__version__,
        config=layer_files,
        default_parameter=Parameter(negative_iterable=()),
        help_format="plaintext",
        suppress_keyboard_interrupt=False,
    )
    app.command(
        "sterna.cli.serve:serve",
        name="serve",
        help="Serve a model over the OpenAI API, with a page.",
    )
    app.command("sterna.cli.chat:chat", name="chat", help="Talk to a model in this terminal.")
    app.command(
        "sterna.cli.complete:complete",
        name="complete",
        help="Complete a prompt, or a file of them.",
    )
    app.command("sterna.cli.embed:embed", name="embed", help="Turn a file of texts into vectors.")
    app.command("sterna.cli.train:train", name="train", help="Train a model by a recipe.")
    app.command(
        "sterna.cli.align:align", name="align", help="Align a model by a recipe: PPO, GRPO, RLOO."
    )
    app.command("sterna.cli.plan:plan", name="plan", help="Predict memory and time of training.")
    app.command(_convert_app())
    app.command(
        "sterna.cli.merge:merge", name="merge", help="Fold an adapter into its model's weights."
    )
    app.command(
        "sterna.cli.quantize:quantize",
        name="quantize",
        help="Write a model's weights in six bits, or another width.",
    )
    app.command(
        "sterna.cli.quantize:dequantize",
        name="dequantize",
        help="Write a quantised model's weights as plain ones.",
    )
    app.command(
        "sterna.cli.quality:quality",
        name="quality",
        help="Compare two models' predictions on texts: KL, top-1, perplexity.",
    )
    app.command(_bench_app())
    app.command(_data_app())
    app.command(
        "sterna.cli.doctor:doctor", name="doctor", help="Say which kernels run here, and why."
    )
    return app


def _convert_app() -> App:
    convert = App(name="convert", help="Distil a model into a form that does less work.")
    convert.command(
        "sterna.cli.convert:swiftkv",
        name="swiftkv",
        help="Prompt tokens run the first layers only (SwiftKV).",
    )
    return convert


def _data_app() -> App:
    data = App(name="data", help="Look at training data, or tokenise them once for all.")
    data.command(
        "sterna.cli.data:inspect", name="inspect", help="Count rows and show what is trained."
    )
    data.command("sterna.cli.data:pack", name="pack", help="Write sources as packed token shards.")
    return data


def _bench_app() -> App:
    bench = App(name="bench", help="Measure latency, throughput, or a server under load.")
    bench.command(
        "sterna.cli.bench:latency", name="latency", help="One batch in this process: TTFT, decode."
    )
    bench.command(
        "sterna.cli.bench:throughput", name="throughput", help="Many prompts offline: tokens/s."
    )
    bench.command(
        "sterna.cli.bench:serve", name="serve", help="Load any OpenAI endpoint and measure it."
    )
    return bench


def run(arguments: Sequence[str]) -> int:
    """Run one command line; returns the exit code, prints errors as one line on stderr."""
    if not arguments:
        welcome()
        return 0
    app = build_app()
    try:
        result = app(
            without_sections(arguments),
            exit_on_error=False,
            print_error=False,
            result_action="return_value",
        )
    except CycloptsError as error:
        say_error(describe_usage_error(error))
        return EXIT_USAGE
    except SternaError as error:
        say_error(error.message)
        return error.exit_code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone (`sterna complete ... | head`); that is its right.
        sys.stderr.close()
        return 0
    except OSError as error:
        if error.errno not in _FULL:
            raise
        say_error(f"cannot write the output: {error.strerror}; free space and run again")
        return SternaError.exit_code
    return result if isinstance(result, int) else 0


def main() -> None:
    """Entry point of the `sterna` script."""
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
