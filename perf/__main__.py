"""`python -m perf bench train|prefill|decode`: the measured figure, this machine's roof, and the ratio of the two."""

import argparse
import json
import sys
from collections.abc import Sequence

USUAL = {"train": (4, 512), "prefill": (1, 512), "decode": (1, 64)}  # batch, length


def main(arguments: Sequence[str]) -> int:
    """Run the command line; exit status 2 after an error that the user can mend."""
    parser = argparse.ArgumentParser(prog="python -m perf", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    bench = commands.add_parser("bench", help="measure this machine")
    bench.add_argument("kind", choices=USUAL)
    bench.add_argument("--batch", type=_positive, help="sequences (default: train 4, else 1)")
    bench.add_argument("--length", type=_positive, help="tokens of a sequence or prompt (default: decode 64, else 512)")
    bench.add_argument("--tokens", type=_positive, default=32, help="tokens decoded a round (decode; default 32)")
    bench.add_argument("--rounds", type=_positive, default=5, help="rounds, of which medians are taken (default 5)")
    bench.add_argument("--peer", default="", metavar="PYTHON", help="interpreter with torch and transformers")
    bench.add_argument("--json", action="store_true", help="one JSON object, last on stdout")
    asked = parser.parse_args(arguments)
    batch, length = USUAL[asked.kind]

    from parallel.compilation import cache_compilations
    from parallel.host_memory import keep_freed_memory

    keep_freed_memory()
    cache_compilations()
    from perf.bench import BenchConfig, run

    config = BenchConfig(
        kind=asked.kind,
        batch=asked.batch or batch,
        length=asked.length or length,
        tokens=asked.tokens,
        rounds=asked.rounds,
        peer=asked.peer,
    )
    try:
        result = run(config, lambda line: print(line, file=sys.stderr, flush=True))
    except (ValueError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    print(json.dumps(result) if asked.json else "\n".join(_lines(result)))
    return 0


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be at least 1")
    return value


def _lines(result: dict) -> list[str]:
    return [
        f"{key:>26}  {value:,.4g}" if isinstance(value, float) else f"{key:>26}  {value}"
        for key, value in result.items()
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
