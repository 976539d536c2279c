"""`sterna bench latency | throughput | serve`: what this machine and that server can do."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from sterna.cli.bench_serve.options import LoadOptions, ReportOptions, TargetOptions
from sterna.cli.flags import DEFAULT_ENGINE, AsJson, ConfigFiles, EngineOptions
from sterna.core.log import setup_logging

EXIT_NOTHING_ANSWERED = 1
Count = Annotated[int, Parameter(validator=Number(gte=1))]
_TARGET, _LOAD, _REPORT = TargetOptions(), LoadOptions(), ReportOptions()


def serve(
    *,
    target: Annotated[TargetOptions, Parameter(name="*", group="Target")] = _TARGET,
    load: Annotated[LoadOptions, Parameter(name="*", group="Load")] = _LOAD,
    report: Annotated[ReportOptions, Parameter(name="*", group="Report")] = _REPORT,
    as_json: AsJson = False,
) -> int:
    """Load any OpenAI endpoint and measure it, with the options and keys of `vllm bench serve`."""
    from sterna.cli.bench_serve.session import Session

    setup_logging("WARNING")
    results = Session(target, load, report, as_json).run()
    return 0 if any(result["completed"] for result in results) else EXIT_NOTHING_ANSWERED


def latency(
    model: str = "",
    /,
    *,
    batch_size: Count = 1,
    input_len: Count = 32,
    output_len: Count = 128,
    num_iters: Count = 5,
    num_warmups: Annotated[int, Parameter(validator=Number(gte=0))] = 1,
    as_json: AsJson = False,
    config: ConfigFiles = (),
    engine: EngineOptions = DEFAULT_ENGINE,
) -> None:
    """Time one batch in this process: time to first token and decode speed.

    Parameters
    ----------
    model
        Folder, GGUF file or name; empty is the default model.
    batch_size
        Sequences that run together.
    input_len
        Prompt tokens of each.
    output_len
        Tokens generated for each.
    num_iters
        Timed repeats; medians are printed.
    num_warmups
        Repeats before, not counted.
    """
    from sterna.cli.bench_offline import OfflineBench, print_latency

    setup_logging("WARNING")
    bench = OfflineBench(model, engine)
    runs = [bench.run(batch_size, input_len, output_len) for _ in range(num_warmups + num_iters)]
    print_latency(runs[num_warmups:], as_json)


def throughput(
    model: str = "",
    /,
    *,
    num_prompts: Count = 64,
    input_len: Count = 128,
    output_len: Count = 64,
    as_json: AsJson = False,
    config: ConfigFiles = (),
    engine: EngineOptions = DEFAULT_ENGINE,
) -> None:
    """Run many prompts offline, all known at the start: tokens/s end to end.

    Parameters
    ----------
    model
        Folder, GGUF file or name; empty is the default model.
    num_prompts
        Prompts to run.
    input_len
        Prompt tokens of each.
    output_len
        Tokens generated for each.
    """
    from sterna.cli.bench_offline import OfflineBench, print_throughput

    setup_logging("WARNING")
    bench = OfflineBench(model, engine)
    bench.run(1, input_len, 2)  # warm-up: pages, recorded steps
    print_throughput(bench.run(num_prompts, input_len, output_len), as_json)
