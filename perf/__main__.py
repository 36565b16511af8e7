"""Predict and measure: what a step needs on a TPU slice, how tensors are split, how fast this machine is.

    python -m perf compile CONFIG [key=value ...] --topology v5e:16x16    the TPU compiler's own word, without a TPU
    python -m perf shardings CONFIG [key=value ...] [--topology v5e:4x4]   tensor by tensor, collective by collective
    python -m perf plan CONFIG|MODEL [key=value ...] --chip v5p --chips 128  the best meshes, by arithmetic
    python -m perf bench train|prefill|decode                              measured, beside this machine's roof
    python -m perf bench pairs [--model M] [--peer PYTHON]                 an encoder–decoder's training step, likewise
    python -m perf bench serve [--mix M] [--rate R] [--plot FILE]          requests answered, beside other ways to
    python -m perf simulate CONFIG|MODEL --chip v5e --chips 4 [--rate R]   requests answered on chips that are not here
    python -m perf calibrate [--check]                                     this machine as a chip; how well it predicts
    python -m perf calibrate --from MEASUREMENTS.csv                       the constants of other chips, fitted again
    python -m perf soak --url http://127.0.0.1:8000 [--pid N]               many clients of a server on this machine
    python -m perf score MEASUREMENTS.csv [--json]                         predicted beside published, and how wrong
    python -m perf quantize MODEL --file TEXT [--schemes int8 int4 fp8]    bytes, loss and speed of quantized weights

Nothing heavy is imported before the command line is read.
"""

import argparse
import dataclasses
import json
import math
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

USUAL = {"train": (4, 512), "prefill": (1, 512), "decode": (1, 64)}  # batch, length of a bench
PAIRS = ("fixed", "additive", "general", "transformer")  # of bench pairs
MIXES = ("sharegpt", "fixed", "prefix", "chat", "copy")  # of bench serve
DEFAULT = pathlib.Path(__file__).parents[1] / "configs" / "quickstart.py"


def main(arguments: Sequence[str]) -> int:
    """Run the command line; exit status 2 after an error that the user can mend."""
    parser = _parser()
    asked, extra = parser.parse_known_args(arguments)  # settings may stand between options, too
    alone = {"bench": _bench, "soak": _soak, "quantize": _quantize, "score": _score}
    alone |= {"simulate": _simulate, "calibrate": _calibrate}
    if extra and (asked.command in alone or any(word.startswith("-") for word in extra)):
        parser.error(f"unrecognized arguments: {' '.join(extra)}")
    try:
        if asked.command in alone:
            return alone[asked.command](asked)
        asked.words += extra
        return {"compile": _compile, "shardings": _shardings, "plan": _plan}[asked.command](asked)
    except (ValueError, OSError) as error:
        if sys.flags.dev_mode:  # python -X dev -m perf … shows where
            raise
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m perf",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)

    bench = commands.add_parser("bench", help="measure this machine", allow_abbrev=False)
    kinds = bench.add_subparsers(dest="kind", required=True, metavar="train|prefill|decode|serve|pairs")
    for kind, (batch, length) in USUAL.items():
        _add_kind(kinds.add_parser(kind, help=f"the {kind} step", allow_abbrev=False), batch, length)
    _add_serve(kinds.add_parser("serve", help="many requests at once", allow_abbrev=False))
    _add_pairs(kinds.add_parser("pairs", help="the train step of an encoder–decoder", allow_abbrev=False))

    soak = commands.add_parser("soak", help="many clients of a server on this machine", allow_abbrev=False)
    soak.add_argument("--url", required=True, help="of the server, such as http://127.0.0.1:8000")
    soak.add_argument("--clients", type=_positive, default=64, help="at once (default 64)")
    soak.add_argument("--seconds", type=_positive, default=120, help="after which none asks again (default 120)")
    soak.add_argument("--tokens", type=_positive, default=32, help="of the longest answer (default 32)")
    soak.add_argument("--key", default="", help="for the API")
    soak.add_argument("--pid", type=_positive, default=0, help="the server's process, whose memory is watched")
    soak.add_argument("--json", action="store_true", help="one JSON object, last on stdout")

    _add_simulate(commands.add_parser("simulate", help="what some chips would serve of a model", allow_abbrev=False))

    calibrate = commands.add_parser("calibrate", help="measure this machine as a chip", allow_abbrev=False)
    calibrate.add_argument(
        "--from",
        dest="rows",
        type=pathlib.Path,
        metavar="MEASUREMENTS.csv",
        help="fit the constants of plan to these instead (half a minute), and write them to --file",
    )
    calibrate.add_argument("--file", type=pathlib.Path, help="of the constants (default: in the user's cache)")
    calibrate.add_argument("--check", action="store_true", help="then steps of many sizes, predicted beside measured")
    calibrate.add_argument("--json", action="store_true", help="one JSON object, last on stdout")

    quantize = commands.add_parser("quantize", help="what quantized weights cost and save", allow_abbrev=False)
    quantize.add_argument("model", metavar="MODEL", help="as for infer.py")
    quantize.add_argument(
        "--file", required=True, type=pathlib.Path, metavar="TEXT", help="measured on this text, UTF-8"
    )
    quantize.add_argument("--schemes", nargs="+", default=["int8", "int4", "fp8"], metavar="S", help="default: all")
    quantize.add_argument("--tokens", type=int, default=16384, help="of the text; 0: no perplexity (default 16384)")
    quantize.add_argument("--decoded", type=int, default=48, help="tokens a round; 0: no speed (default 48)")
    quantize.add_argument("--rounds", type=_positive, default=5, help="of decoding, in turns (default 5)")
    quantize.add_argument(
        "--rescaled", action="store_true", help="measure the model's twin, whose weights lie on no grid"
    )
    quantize.add_argument("--json", action="store_true", help="one JSON object, last on stdout")

    score = commands.add_parser("score", help="predicted beside published measurements", allow_abbrev=False)
    score.add_argument("file", type=pathlib.Path, metavar="MEASUREMENTS.csv", help="columns as perf/measurements.csv")
    score.add_argument("--json", action="store_true", help="one JSON object, last on stdout")

    _add_plan(commands.add_parser("plan", help="the best meshes for some chips, by arithmetic", allow_abbrev=False))

    compile_ = commands.add_parser("compile", help="compile a run's step for a TPU slice", allow_abbrev=False)
    shardings = commands.add_parser("shardings", help="how a run's tensors are split", allow_abbrev=False)
    for command in (compile_, shardings):
        command.add_argument("words", nargs="*", metavar="CONFIG [key=value ...]", help="a run, as for train.py")
        command.add_argument(
            "--topology", default="", metavar="T", help="such as v5e:16x16 (default: the config's first)"
        )
        command.add_argument("--slices", type=_positive, default=1, help="slices of that shape (default 1)")
        command.add_argument("--effort", type=_effort, default=None, metavar="E", help="the compiler's, -1.0 to 1.0")
        command.add_argument("--json", action="store_true", help="one JSON object, last on stdout")
    compile_.add_argument("--step", choices=("train", "prefill", "decode"), default="train", help="default: train")
    compile_.add_argument("--batch", type=_positive, help="sequences of prefill and decode (default 1)")
    compile_.add_argument("--length", type=_positive, help="tokens of a prompt, or in the cache (default: the run's)")
    compile_.add_argument("--hlo", default="", metavar="FILE", help="write the scheduled HLO there")
    compile_.add_argument("--largest-batch", action="store_true", help="find the largest train batch that fits")
    shardings.add_argument("--devices", type=_positive, help="over so many devices (default: of the first topology)")
    return parser


def _add_plan(plan: argparse.ArgumentParser) -> None:
    """Options of the planner."""
    plan.add_argument(
        "words", nargs="*", metavar="CONFIG|MODEL [key=value ...]", help="a run, or a model: llama3_1_405b"
    )
    plan.add_argument("--step", choices=("train", "prefill", "decode", "serve"), default="train", help="default: train")
    plan.add_argument("--chip", default="", metavar="C", help="such as v5p or H100 (default: the config's topology)")
    plan.add_argument("--chips", type=_positive, default=0, metavar="N", help="with --by cost: at most so many")
    plan.add_argument("--topology", default="", metavar="T", help="instead of both, such as v5p:4x4x8")
    plan.add_argument("--slices", type=_positive, default=0, help="of equal size (default: as few as will do)")
    plan.add_argument(
        "--batch", type=_counts, default=(), metavar="B[,B ...]", help="sequences over all chips (default: the run's)"
    )
    plan.add_argument("--length", type=_positive, default=0, help="tokens of a sequence, a prompt or in the cache")
    plan.add_argument("--output", type=_positive, default=0, help="tokens of an answer (serve; default 256)")
    plan.add_argument(
        "--precision",
        default="",
        metavar="P[,P ...]",
        help="bf16, int8, …; weights/cache in serving (default: the run's)",
    )
    plan.add_argument("--tokens", type=_rate, default=0.0, metavar="N", help="of the whole run: 15e12; cost is of them")
    plan.add_argument("--by", choices=("time", "cost"), default="time", help="what counts (default time)")
    plan.add_argument("--top", type=_positive, default=10, help="plans (default 10)")
    plan.add_argument("--compile", type=_positive, default=0, metavar="K", help="ask the TPU compiler about the best K")
    plan.add_argument("--report", default="", metavar="FILE", help="write a page with pictures, such as plan.html")
    plan.add_argument("--json", action="store_true", help="one JSON object, last on stdout")


def _counts(text: str) -> tuple[int, ...]:
    return tuple(_positive(word) for word in text.split(","))


def _add_kind(bench: argparse.ArgumentParser, batch: int, length: int) -> None:
    """Options of a bench of one step."""
    bench.add_argument("--batch", type=_positive, default=batch, help=f"sequences (default {batch})")
    bench.add_argument("--length", type=_positive, default=length, help=f"tokens of each (default {length})")
    bench.add_argument("--tokens", type=_positive, default=32, help="tokens decoded a round (decode; default 32)")
    bench.add_argument("--rounds", type=_positive, default=5, help="rounds, of which medians are taken (default 5)")
    _add_ends(bench)


def _add_serve(serve: argparse.ArgumentParser) -> None:
    """Options of the bench of serving."""
    serve.add_argument("--mix", choices=MIXES, default="sharegpt", help="what is asked (default sharegpt)")
    serve.add_argument(
        "--rate", type=_rate, default=math.inf, metavar="R", help="Poisson arrivals a second (default: all at once)"
    )
    serve.add_argument("--requests", type=_positive, default=32, help="how many (default 32; chat: turns in all)")
    serve.add_argument(
        "--scale", type=_rate, default=0.125, help="lengths times this (default 0.125; not prefix, copy)"
    )
    serve.add_argument("--rows", type=_positive, default=32, help="sequences computed at once (default 32)")
    serve.add_argument("--rounds", type=_positive, default=3, help="rounds, of which medians are taken (default 3)")
    serve.add_argument("--seed", type=int, default=0, help="of the trace (default 0)")
    serve.add_argument("--model", default="", help="as infer.py takes it (default: SmolLM2-135M, random weights)")
    serve.add_argument("--plot", default="", metavar="FILE", help="draw the last round, such as serving.png")
    _add_ends(serve)


def _add_pairs(pairs: argparse.ArgumentParser) -> None:
    """Options of the bench of encoder–decoders."""
    pairs.add_argument("--model", choices=PAIRS, default="transformer", help="which (default transformer)")
    pairs.add_argument("--batch", type=_positive, default=96, help="pairs (default 96)")
    pairs.add_argument("--length", type=_positive, default=24, help="tokens of each side, padding included (24)")
    pairs.add_argument("--rounds", type=_positive, default=9, help="rounds, of which medians are taken (default 9)")
    pairs.add_argument("--peer-options", default="", metavar="TEXT", help="more for perf/peers/torch_seq2seq.py")
    _add_ends(pairs)


def _add_simulate(simulate: argparse.ArgumentParser) -> None:
    """Options of the simulator."""
    simulate.add_argument("model", metavar="CONFIG|MODEL", help="a run's .py file, a family, or as for infer.py")
    simulate.add_argument("--chip", required=True, help="such as v5e or H100")
    simulate.add_argument("--chips", type=_positive, default=1, help="of all servers together (default 1)")
    simulate.add_argument("--replicas", type=_positive, default=1, help="servers that answer (default 1)")
    simulate.add_argument(
        "--disaggregate", type=_ratio, metavar="P:D", help="P servers compute prompts for D that answer"
    )
    simulate.add_argument("--mix", choices=MIXES[:-1], default="sharegpt", help="what is asked (default sharegpt)")
    simulate.add_argument(
        "--rate", type=_rate, default=math.inf, metavar="R", help="Poisson arrivals a second (default: all at once)"
    )
    simulate.add_argument("--requests", type=_positive, default=1000, help="how many (default 1000)")
    simulate.add_argument("--scale", type=_rate, default=1.0, help="lengths times this (default 1; not prefix)")
    simulate.add_argument("--seed", type=int, default=0, help="of the trace (default 0)")
    simulate.add_argument("--rows", type=_positive, default=256, help="answers of a server at once (default 256)")
    simulate.add_argument("--chunk", type=_positive, default=2048, help="prompt tokens of a step (default 2048)")
    for name, what in (("weights", "parameters"), ("compute", "products"), ("cache", "keys and values")):
        simulate.add_argument(f"--{name}", default="bf16", metavar="N", help=f"numbers of {what} (default bf16)")
    simulate.add_argument("--json", action="store_true", help="one JSON object, last on stdout")


def _add_ends(bench: argparse.ArgumentParser) -> None:
    bench.add_argument("--peer", default="", metavar="PYTHON", help="interpreter with torch and transformers")
    bench.add_argument("--json", action="store_true", help="one JSON object, last on stdout")


def _rate(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{value} must be above 0")
    return value


def _ratio(text: str) -> tuple[int, int]:
    """1:2  ->  (1, 2)"""
    first, _, second = text.partition(":")
    if not (first.isdecimal() and second.isdecimal() and int(first) and int(second)):
        raise argparse.ArgumentTypeError(f"{text} must be P:D, numbers of servers of at least 1, such as 1:2")
    return int(first), int(second)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be at least 1")
    return value


def _effort(text: str) -> float:
    value = float(text)
    if not -1.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"{value} must be between -1.0 (hasty) and 1.0")
    return value


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _prepare() -> None:
    """Make jax ready to measure this machine: where it may look is said before it is imported."""
    from parallel.platforms import look_only_where_chips_are

    look_only_where_chips_are()
    from parallel.compilation import cache_compilations
    from parallel.host_memory import keep_freed_memory

    keep_freed_memory()
    cache_compilations()


def _bench(asked: argparse.Namespace) -> int:
    """Measure this machine."""
    _prepare()
    if asked.kind == "serve":
        return _serve(asked)
    if asked.kind == "pairs":
        from perf import bench_pairs

        options = tuple(asked.peer_options.split())
        sizes = {name: getattr(asked, name) for name in ("model", "batch", "length", "rounds", "peer")}
        result = bench_pairs.run(bench_pairs.PairsBench(**sizes, peer_options=options), _say)
        print(json.dumps(result) if asked.json else "\n".join(_lines(result)))
        return 0
    from perf.bench import BenchConfig, run

    config = BenchConfig(
        kind=asked.kind,
        batch=asked.batch,
        length=asked.length,
        tokens=asked.tokens,
        rounds=asked.rounds,
        peer=asked.peer,
    )
    result = run(config, _say)
    print(json.dumps(result) if asked.json else "\n".join(_lines(result)))
    return 0


def _soak(asked: argparse.Namespace) -> int:
    """Soak a server; exit status 1 where it did not stand."""
    from perf.soak import SoakConfig, run

    names = [field.name for field in dataclasses.fields(SoakConfig) if field.name != "longest"]
    result = run(SoakConfig(**{name: getattr(asked, name) for name in names}))
    print(json.dumps(result) if asked.json else "\n".join(_lines(result)))
    return 0 if result["passed"] else 1


def _simulate(asked: argparse.Namespace) -> int:
    """Serve a trace with servers that do not exist."""
    from perf import forecast
    from perf.workload import Workload

    names = ("mix", "requests", "rate", "scale", "seed")
    prefill, replicas = asked.disaggregate or (0, asked.replicas)
    if asked.disaggregate and asked.replicas > 1:
        raise ValueError("--disaggregate P:D says how many servers answer; leave out --replicas")
    settings = {
        name: getattr(asked, name) for name in ("chip", "chips", "rows", "chunk", "weights", "compute", "cache")
    }
    config = forecast.ForecastConfig(
        replicas=replicas, prefill=prefill, work=Workload(**{name: getattr(asked, name) for name in names}), **settings
    )
    if asked.model.endswith(".py"):
        from configs.base import decoder_of
        from perf.aot import with_assumed_vocabulary

        asked.words = [asked.model]
        run = _run(asked)
        model = with_assumed_vocabulary(*decoder_of(run))
    else:
        model = forecast.shape_of(asked.model)
    result, _ = forecast.run(model, config)
    print(json.dumps({"model": asked.model, **result}) if asked.json else "\n".join(_lines(result)))
    return 0


def _calibrate(asked: argparse.Namespace) -> int:
    """Measure this machine's constants and keep them; or fit the constants to published measurements."""
    if asked.rows:
        return _fit(asked)
    _prepare()
    from perf import calibration, this_machine

    path = asked.file or this_machine.usual_path()
    machine = calibration.measure(_say)
    this_machine.save(machine, path)
    result = {"file": str(path), "flops": machine.flops, "bandwidth": machine.bandwidth}
    if asked.check:
        result |= calibration.summary(calibration.check(machine, _say))
    print(json.dumps(result) if asked.json else "\n".join(_lines({k: v for k, v in result.items() if k != "rows"})))
    return 0


def _fit(asked: argparse.Namespace) -> int:
    """Fit the constants to a file of measurements."""
    from perf import fit
    from perf.measurements import read

    if asked.check:
        raise ValueError("--check measures this machine; with --from, python -m perf score says how far off they are")
    rows = [row for row in read(asked.rows) if row.job is not None]
    if not rows:
        raise ValueError(f"{asked.rows} has no row that can be modelled; python -m perf score {asked.rows} says why")
    _say(f"fitting to {len(rows)} rows")
    found = fit.constants(fit.fit(rows))
    path = asked.file or pathlib.Path("constants.json")
    fit.write(found, path)
    values = {name: f"{value:.4g} (×/÷ {math.exp(found.spread[name]):.2f})" for name, value in found.fitted.items()}
    print(json.dumps({"file": str(path), "constants": found.fitted}) if asked.json else "\n".join(_lines(values)))
    return 0


def _quantize(asked: argparse.Namespace) -> int:
    """Compare a model with itself in fewer bits."""
    _prepare()
    from perf.quantization import QuantizationConfig, run
    from perf.tables import quantization_lines

    config = QuantizationConfig(
        model=asked.model,
        file=asked.file,
        schemes=tuple(asked.schemes),
        tokens=asked.tokens,
        decoded=asked.decoded,
        rounds=asked.rounds,
        is_rescaled=asked.rescaled,
    )
    result = run(config, _say)
    print(json.dumps(result) if asked.json else "\n".join(quantization_lines(result)))
    return 0


def _score(asked: argparse.Namespace) -> int:
    """Predict what was measured."""
    from perf.measurements import read
    from perf.score import lines, report, score

    rows = score(read(asked.file))
    print(json.dumps(report(rows)) if asked.json else "\n".join(lines(rows)))
    return 0


def _serve(asked: argparse.Namespace) -> int:
    """Measure answering many requests."""
    from perf import serving
    from perf.workload import Workload

    mix = "sharegpt" if asked.mix == "copy" else asked.mix
    work = Workload(mix=mix, requests=asked.requests, rate=asked.rate, scale=asked.scale, seed=asked.seed)
    config = serving.ServeConfig(
        work=work,
        copy=asked.mix == "copy",
        model=asked.model,
        rows=asked.rows,
        rounds=asked.rounds,
        peer=asked.peer,
    )
    result, played = serving.run(config, _say)
    if asked.plot:
        from perf import serving_plot

        title = f"{result['model']}: {result['requests']} requests, mix {result['mix']}, arrivals {result['rate']}"
        serving_plot.draw(played, pathlib.Path(asked.plot), title)
    print(json.dumps(result) if asked.json else "\n".join(_lines(result)))
    return 0


def _lines(result: dict) -> list[str]:
    return [
        f"{key:>27}  {value:,.4g}" if isinstance(value, float) else f"{key:>27}  {value}"
        for key, value in result.items()
    ]


def _compile(asked: argparse.Namespace) -> int:
    """Compile one step of a run and say what the compiler made of it."""
    run = _run(asked)
    topology = _topology(asked, run)
    if asked.step == "train" or run.mesh.auto:
        run = _on(run, topology)
    if asked.step == "train" and (asked.batch or asked.length):
        raise ValueError("--batch and --length are of prefill and decode; a run has train.batch_size and train.seq_len")
    if asked.step != "train" and asked.largest_batch:
        raise ValueError(f"--largest-batch is of the train step; for {asked.step} give --batch")
    _ready()
    from perf import advice, aot, tables

    work = dataclasses.replace(
        _work(run), step=asked.step, batch=asked.batch or 1, length=asked.length or run.train.seq_len
    )
    effort = aot.FULL if asked.effort is None else asked.effort
    report = aot.compiled(work, topology, effort=effort)
    changes = [] if report.fits else advice.changes(report)
    found: dict[str, Any] = tables.compile_json(report, changes)
    if asked.hlo and report.text:
        pathlib.Path(asked.hlo).write_text(report.text)
    if not asked.json:
        print("\n".join(tables.compile_lines(report, changes)), flush=True)
    if asked.largest_batch:
        found["largest_batch"] = aot.largest_batch(work, topology, _say)
        if not asked.json:
            print(f"largest batch that fits: {found['largest_batch']} a device")
    if asked.json:
        print(json.dumps(found))
    return 0


def _shardings(asked: argparse.Namespace) -> int:
    """Say how each tensor of a run is split, and what the compiled step moves."""
    run = _run(asked)
    if asked.devices and asked.topology:
        raise ValueError("--devices and --topology both say how many devices there are; give one of them")
    if asked.devices and asked.slices > 1:
        raise ValueError("--slices is of a topology; give --topology T")
    topology = None if asked.devices else _topology(asked, run)
    num_devices = topology.num_devices if topology else asked.devices
    run = _on(run, topology) if topology else run.on(num_devices)
    if not asked.topology:  # any devices will do where nothing is compiled
        from parallel.platforms import cut_cpu

        cut_cpu(num_devices)
    _ready()
    from parallel.mesh import make_mesh, mesh_sizes
    from parallel.topology import topology_devices
    from perf import aot, shardings, tables

    devices = topology_devices(topology.name) if asked.topology and topology else None
    work, mesh = _work(run), make_mesh(run.mesh, devices)
    rows = shardings.report(work, mesh)
    found: dict[str, Any] = {
        "mesh": mesh_sizes(mesh),
        "tensors": [shardings.plain(row) for row in rows],
        "flagged": [row.path for row in rows if row.flag],
        "state_bytes": shardings.total(rows),
    }
    if not asked.json:
        print("\n".join(tables.sharding_lines(rows)), flush=True)
    if asked.topology and topology:
        report = aot.compiled(work, topology, effort=aot.FULL if asked.effort is None else asked.effort)
        found["collectives"] = [tables.collective_json(row) for row in report.collectives]
        if not asked.json:
            fits = "" if report.fits else "; the step does not fit: python -m perf compile says what would help"
            print(f"collectives of a step on {topology.name}{fits}")
            print("\n".join(tables.collective_lines(report.collectives)))
    if asked.json:
        print(json.dumps(found))
    return 0


def _plan(asked: argparse.Namespace) -> int:
    """Rank the ways to run a step on some chips."""
    import gc
    import time

    from configs.planning import Wishes, run_of
    from configs.planning import asked as question_of
    from perf import explanation
    from perf.plan import search

    start = time.perf_counter()
    run, is_bare = run_of(asked.words, DEFAULT)
    config = next((word for word in asked.words if "=" not in word), str(DEFAULT))
    precisions = tuple(word for word in asked.precision.split(",") if word)
    names = ("step", "chip", "chips", "topology", "slices", "length", "output", "tokens", "by", "top")
    wishes = Wishes(batches=asked.batch, precisions=precisions, **{name: getattr(asked, name) for name in names})
    question, check = question_of(run, is_bare, wishes)
    gc.disable()  # nothing that a search makes is garbage before it ends
    try:
        answer = search(question, check)
    finally:
        gc.enable()
    found: dict[str, Any] = explanation.plain(answer, run.name)
    found["seconds"] = round(time.perf_counter() - start, 3)
    if not asked.json:
        print("\n".join(explanation.lines(answer, run.name, config, found["seconds"])), flush=True)
    if asked.report:
        from perf import report

        page = report.page(answer, run.name, config, report.neighbours(answer, check), report.scored())
        pathlib.Path(asked.report).write_text(page, encoding="utf-8")
        _say(f"written to {asked.report}")
    for plan, row in zip(answer.plans[: asked.compile], found["plans"], strict=False):
        row["compiled"] = _prove(run, question, plan)
        _say(explanation.compiled_line(row))
    if asked.json:
        print(json.dumps(found))
    return 0


def _prove(run, question, plan) -> dict[str, Any]:
    """What the TPU compiler makes of a plan."""
    from configs.planning import as_planned

    planned, topology = as_planned(run, question, plan)
    _ready()
    from perf import aot

    one, length = plan.candidate, question.length + question.output
    step = "decode" if question.step == "serve" else question.step
    work = dataclasses.replace(_work(planned), step=step, batch=max(one.batch // one.replicas, 1), length=length)
    report = aot.compiled(work, topology)
    return {
        "topology": topology.name,
        "fits": report.fits,
        "peak_bytes": report.peak_bytes,
        "breakdown": report.breakdown,
        "compile_cpu_seconds": round(report.compile_cpu_seconds, 1),
    }


def _run(asked: argparse.Namespace):
    from configs.commandline import resolve

    return resolve(asked.words, DEFAULT)


def _topology(asked: argparse.Namespace, run):
    """The slices asked for, else the first that the config names."""
    from parallel.topology import find

    name = asked.topology or next(iter(run.topologies), "")
    if not name:
        raise ValueError(f"{run.name} names no topologies; give --topology T, such as --topology v5e:4x4")
    return find(name, asked.slices)


def _on(run, topology):
    """The run on slices that are not here, as train.py would run it there."""
    from parallel.chips import find

    return run.on(topology.num_devices, find(topology.generation.name).kinds[0], topology.slices)


def _ready() -> None:
    """Set this process up: computing on the CPU, compiling for TPUs, keeping nothing."""
    import jax

    from parallel.topology import prepare

    prepare()
    jax.config.update("jax_enable_compilation_cache", False)  # jax cannot read a TPU's program back without a TPU


def _work(run):
    from configs.base import decoder_of
    from perf.aot import Work, with_assumed_vocabulary

    return Work(
        model=with_assumed_vocabulary(*decoder_of(run)),
        mesh=run.mesh,
        rules=run.rules,
        execution=run.execution,
        optim=run.optim,
        train=run.train,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
