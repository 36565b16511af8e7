"""Use a model: `infer.py generate|chat|translate|score|serve MODEL …`, or route between servers of it. The door.

Nothing heavy is imported before the command line is understood, so `--help` and most errors answer at once.
"""

import argparse
import dataclasses
import json
import math
import os
import pathlib
import sys
import time
import typing
from collections.abc import Iterator, Sequence

from configs.help import comments
from configs.overrides import override
from inference.balancing import BalancingConfig
from inference.config import BeamConfig, EngineConfig, GenerationConfig, SamplingConfig, ServerConfig
from inference.disaggregation import DisaggregationConfig
from inference.location import KINDS, Location, check_decoder, check_translation, locate
from inference.routing import RouterConfig, addresses
from parallel.config import AxisRules, MeshConfig
from parallel.records import to_dict

if typing.TYPE_CHECKING:
    from jax.sharding import Mesh

    from inference.engine import Engine
    from inference.generate import Answer
    from inference.translator import Translation
    from inference.weights import Model

STARTED = time.perf_counter()
BEAMS = 5  # of a translation


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What the command line asks for."""

    verb: str
    location: Location
    options: argparse.Namespace
    generation: GenerationConfig
    beam: BeamConfig
    mesh: MeshConfig


class Parser(argparse.ArgumentParser):
    """argparse whose every refusal is a ValueError, so that all errors look alike."""

    def error(self, message: str) -> typing.NoReturn:
        """Refuse."""
        raise ValueError(f"{message} (--help shows all options)")


def parser() -> Parser:
    """The command line's grammar. Options of answers are the fields of their records."""
    top = Parser(
        prog="infer.py",
        description="Use a language model: continue a text, converse, translate, measure it, or serve it.",
    )
    verbs = top.add_subparsers(dest="verb", required=True, metavar="generate|chat|translate|score|serve|quantize|route")
    placed = Parser(add_help=False)
    placed.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="float32", help="of matmuls and the cache; default float32"
    )
    placed.add_argument(
        "--mesh", action="append", default=[], metavar="AXIS=N", help="devices along an axis, as tensor=4; default 1"
    )
    common = Parser(add_help=False, parents=[placed])
    common.add_argument("model", metavar="MODEL", help=KINDS)
    common.add_argument(
        "--weights", choices=["int8", "int4", "fp8"], help="quantize the matrices when they are loaded; default not"
    )
    common.add_argument("--draft", metavar="MODEL", help="a smaller model of the same tokenizer, which guesses ahead")
    answers = Parser(add_help=False, parents=[common])
    for record in (SamplingConfig, GenerationConfig):
        add_fields(answers, record)
    generate = verbs.add_parser("generate", parents=[answers], help="continue a text")
    generate.add_argument("prompt", metavar="PROMPT", help="the text to continue; - reads it from standard input")
    generate.add_argument(
        "-n", type=int, default=1, metavar="N", help="samples; sample i draws with seed + i; default 1"
    )
    generate.add_argument(
        "--speculation", choices=["off", "ngram"], default="off", help="ngram guesses ahead from the text; default off"
    )
    generate.add_argument("--json", action="store_true", help="print one JSON object at the end instead of the text")
    add_fields(generate, BeamConfig)
    chat = verbs.add_parser("chat", parents=[answers], help="converse, with memory between turns")
    chat.add_argument(
        "--context", type=int, default=8192, metavar="N", help="tokens of a conversation, at most; default 8192"
    )
    chat.add_argument("--system", metavar="TEXT", help="what the model is told before the conversation")
    add_translate(verbs.add_parser("translate", parents=[placed], help="lines of one language into another"))
    serve = verbs.add_parser("serve", parents=[common], help="answer many users at once, as OpenAI's API does")
    for record in (EngineConfig, ServerConfig, DisaggregationConfig):
        add_fields(serve, record)
    score = verbs.add_parser("score", parents=[common], help="measure how well the model predicts a text")
    score.add_argument("--file", required=True, type=pathlib.Path, metavar="TEXT", help="the text, UTF-8")
    score.add_argument("--window", type=int, metavar="N", help="tokens read at once; default the context, at most 2048")
    score.add_argument("--stride", type=int, metavar="N", help="tokens between windows; default half a window")
    score.add_argument("--json", action="store_true", help="print one JSON object")
    quantize = verbs.add_parser("quantize", parents=[common], help="write a model with weights of fewer bits")
    quantize.add_argument("out", metavar="OUT", type=pathlib.Path, help="the folder to write; it is a MODEL then")
    route = verbs.add_parser("route", help="one address in front of several servers")
    route.add_argument("replicas", nargs="+", metavar="URL", help="a server's address, as http://10.0.0.2:8000")
    route.add_argument("--host", default="127.0.0.1", help="address to listen at; default 127.0.0.1, this machine only")
    route.add_argument("--port", type=int, default=8080, metavar="N", help="port to listen at; default 8080")
    for record in (RouterConfig, BalancingConfig):
        add_fields(route, record)
    return top


def add_translate(to: argparse.ArgumentParser) -> None:
    """What `translate` takes."""
    to.add_argument("model", metavar="RUN", help="the run folder of an encoder–decoder")
    to.add_argument("text", nargs="?", metavar="TEXT", help="lines to translate; - reads them from standard input")
    to.add_argument("--file", type=pathlib.Path, metavar="FILE", help="lines to translate, UTF-8, may be .gz")
    to.add_argument(
        "--beam", "--beams", dest="beams", type=int, default=BEAMS, metavar="N",
        help=f"beginnings that are kept at each step; 1 takes the likeliest token after each; default {BEAMS}",
    )  # fmt: skip
    to.add_argument("--json", action="store_true", help="print a JSON object for each line instead of its translation")
    to.add_argument(
        "--average", type=int, default=0, metavar="N", help="the mean of the last N checkpoints; default the best alone"
    )
    add_fields(to, BeamConfig, without=("beams",))


def add_fields(to: argparse.ArgumentParser, record: type, *, without: Sequence[str] = ()) -> None:
    """An option for each plain field of a record, with its comment; where it takes several values, it is repeated."""
    notes, hints = comments(record), typing.get_type_hints(record)
    for field in dataclasses.fields(record):
        if field.name in without:
            continue
        flag, kind = f"--{field.name.replace('_', '-')}", hints[field.name]
        if dataclasses.is_dataclass(kind):
            continue
        if kind in (int, float):
            note = f"{notes[field.name]}; default {field.default}"
            to.add_argument(flag, type=kind, default=field.default, metavar="N" if kind is int else "X", help=note)
        elif kind is str:
            to.add_argument(flag, default=field.default, metavar="TEXT", help=notes[field.name])
        elif kind is bool:
            note = f"{notes[field.name]}; default {'yes' if field.default else 'no'}"
            to.add_argument(flag, action=argparse.BooleanOptionalAction, default=field.default, help=note)
        elif typing.get_origin(kind) is typing.Literal:
            note = f"{notes[field.name]}; default {field.default}"
            to.add_argument(flag, choices=typing.get_args(kind), default=field.default, help=note)
        else:
            note = f"{notes[field.name]}; may be repeated"
            read, metavar = (token_bias, "TOKEN=X") if field.name == "logit_bias" else (str, "TEXT")
            to.add_argument(flag, action="append", default=[], type=read, metavar=metavar, help=note)


def token_bias(text: str) -> tuple[int, float]:
    """What is added to one token's logit: `50=-100` -> (50, -100.0)."""
    token, _, value = text.partition("=")
    try:
        return int(token), float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a token's id and a number, as 50=-100") from None


def understand(arguments: Sequence[str]) -> Request:
    """The command line, checked as far as that goes without loading anything."""
    options = parser().parse_args(arguments)
    given = vars(options)
    sampling = {name: given[name] for name in to_dict(SamplingConfig()) if name in given}
    sampling["logit_bias"] = tuple(given.get("logit_bias", ()))
    generation = {name: given[name] for name in ("max_tokens",) if name in given}
    if given.get("n", 1) < 1:
        raise ValueError(f"-n {options.n} must be at least 1; it counts the samples")
    beam = BeamConfig(**{name: given[name] for name in to_dict(BeamConfig()) if name in given})
    if beam.beams == 1 and beam != BeamConfig():
        raise ValueError("--length-penalty and --early-stopping are for a search; give --beams 2 or more")
    if beam.beams > 1 and (SamplingConfig(**sampling) != SamplingConfig() or given.get("stop")):
        raise ValueError(
            f"--beams {beam.beams} searches and draws nothing; leave --stop and the options of sampling out"
        )
    if beam.beams > 1 and given.get("n", 1) > beam.beams:
        raise ValueError(
            f"-n {options.n} answers need as many beams and there are {beam.beams}; give --beams {options.n}"
        )
    if given.get("context", 2) < 2:
        raise ValueError(f"--context {options.context} must be at least 2: a prompt and an answer of one token")
    if options.verb == "translate" and (options.text is None) == (options.file is None):
        raise ValueError("translate takes either TEXT or --file FILE; give one of the two")
    if given.get("average", 0) < 0:
        raise ValueError(f"--average {options.average} must be at least 0; it counts checkpoints")
    if given.get("file") is not None and not options.file.is_file():
        raise ValueError(f"--file {options.file} is no file; give the text to {options.verb}")
    location = locate(options.model)
    (check_translation if options.verb == "translate" else check_decoder)(location)
    return Request(
        verb=options.verb,
        location=location,
        options=options,
        generation=GenerationConfig(
            sampling=SamplingConfig(**sampling), stop=tuple(given.get("stop", ())), **generation
        ),
        beam=beam,
        mesh=override(MeshConfig(data=1), options.mesh),
    )


def main(arguments: Sequence[str]) -> int:
    """Run the command line; the exit status is 0 when done, 2 after an error that the user can mend."""
    try:
        if arguments and arguments[0] == "route":
            return route(parser().parse_args(arguments))
        request = understand(arguments)
        verbs = (generate, chat, translate, score, serve, quantize)
        return {verb.__name__: verb for verb in verbs}[request.verb](request)
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as error:
        if sys.flags.dev_mode:  # python -X dev infer.py … shows where
            raise
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130


def generate(request: Request) -> int:
    """Continue the prompt: words to stdout as they come, or one JSON object at the end."""
    from inference import generate

    options, clock, model = request.options, Clock(), opened(request)
    text = sys.stdin.read() if options.prompt == "-" else options.prompt
    tokens = generate.text_tokens(text, model.tokenizer)
    prompt = generate.check_room(tokens, max_length=model.config.max_length)
    room = min(len(prompt) + request.generation.max_tokens, model.config.max_length)
    rows = max(options.n, request.beam.beams)
    cache_tokens = generate.cache_for([room] * rows)
    engine = started(
        model, request, EngineConfig(max_rows=rows, cache_tokens=cache_tokens, speculation=options.speculation)
    )
    clock.lap("load")
    answers = [generate.Answer(prompt, model.tokenizer, request.generation.stop) for _ in range(options.n)]
    for pieces in continued(engine, model, answers, request):
        clock.lap("decode" if "prefill" in clock.laps else "prefill")
        if not options.json:
            sys.stdout.write(pieces[0])
            sys.stdout.flush()
    num_read = engine.stats().prompt_tokens - engine.stats().cached_tokens
    timings = clock.timings(num_read, sum(len(answer.tokens) - 1 for answer in answers))
    if options.json:
        print(as_json(answers, [None, *engine.logprobs([prompt])[0]], timings))
    else:
        print("", *(answer.text for answer in answers[1:]), sep="\n", flush=True)
        print(summary(answers, num_read, timings), file=sys.stderr)
    return 0


def continued(engine: "Engine", model: "Model", answers: "Sequence[Answer]", request: Request) -> Iterator[list[str]]:
    """Fill the answers; -> their new text, step by step when they are drawn, at once after a search."""
    from inference import generate
    from inference.engine_search import search

    if request.beam.beams == 1:
        yield from generate.generate(engine, model.tokenizer, answers, request.generation)
        return
    end_ids, most = model.tokenizer.end_ids, request.generation.max_tokens
    yield [""] * len(answers)
    found = search(engine, answers[0].prompt, request.beam, max_tokens=most, end_ids=end_ids)
    taken = [answer.take(beam.tokens, beam.logprobs) for answer, beam in zip(answers, found, strict=False)]
    yield [text + answer.finish() for answer, text in zip(answers, taken, strict=False)]


def as_json(answers: "Sequence[Answer]", prompt_logprobs: list[float | None], timings: dict[str, float]) -> str:
    """The first answer, and all of them under `samples` where there are several."""
    samples = [
        {"tokens": a.tokens, "text": a.text, "logprobs": a.logprobs, "finish_reason": a.finish_reason} for a in answers
    ]
    record = {
        "prompt_tokens": list(answers[0].prompt),
        **samples[0],
        "prompt_logprobs": prompt_logprobs,
        "timings": timings,
        **({"samples": samples} if len(samples) > 1 else {}),
    }
    return json.dumps(record, ensure_ascii=False, allow_nan=False)


def summary(answers: "Sequence[Answer]", num_read: int, timings: dict[str, float]) -> str:
    """One line on how it went."""
    new = " + ".join(f"{len(answer.tokens)} ({answer.finish_reason})" for answer in answers)
    return (
        f"{num_read} prompt tokens at {timings['prefill_tokens_per_second']:.1f}/s, {new} new ones at "
        f"{timings['decode_tokens_per_second']:.1f}/s; first after {timings['first_token']:.1f} s"
    )


def chat(request: Request) -> int:
    """Converse till the input ends."""
    from inference import generate
    from inference.conversation import Conversation, required_template
    from inference.terminal import COMMANDS, converse

    model = opened(request)
    tokenizer, template = required_template(model.tokenizer)
    room = min(request.options.context, model.config.max_length)
    engine = started(model, request, EngineConfig(max_rows=1, cache_tokens=generate.cache_for([room]), max_length=room))
    conversation = Conversation(engine, tokenizer, template, request.generation, system=request.options.system)
    at_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if at_terminal:
        import readline  # noqa: F401  so that lines can be edited and called back

        print(COMMANDS, file=sys.stderr)
    return converse(conversation, ask=lambda: input("> " if at_terminal else ""))


def translate(request: Request) -> int:
    """Lines of one language into lines of the other, in their order."""
    from data.pairs import read_lines

    options = request.options
    if options.file is not None:
        texts = read_lines(options.file)
    else:
        text = sys.stdin.read() if options.text == "-" else options.text
        texts = text.removesuffix("\n").split("\n")
    get_ready()
    from inference.translator import open_translator, translated

    translator = open_translator(request.location.path, dtype=options.dtype, average=options.average)
    mesh, rules = mesh_of(request), AxisRules()
    parameters = translator.load(mesh, rules)
    for found in translated(translator, parameters, mesh, rules, texts, beam=request.beam):
        print(translation_json(found) if options.json else found.text)
    return 0


def translation_json(found: "Translation") -> str:
    """A line's translation for programs; an empty line has no tokens."""
    beam = found.beam
    tokens, logprobs, finish = (beam.tokens, beam.logprobs, beam.finish) if beam else ((), (), "stop")
    record = {"text": found.text, "tokens": tokens, "logprobs": logprobs, "finish_reason": finish}
    return json.dumps(record, ensure_ascii=False, allow_nan=False)


def score(request: Request) -> int:
    """Measure a text."""
    from tqdm import tqdm

    from inference.generate import text_tokens
    from inference.score import score

    options, model = request.options, opened(request)
    content = options.file.read_bytes()
    tokens = text_tokens(utf8(content, options.file), model.tokenizer)
    engine = started(model, request, EngineConfig(max_rows=1, cache_tokens=1))
    result = score(
        engine, tokens, num_bytes=len(content), window=options.window, stride=options.stride,
        watch=lambda batches: tqdm(batches, disable=None, unit="batch", leave=False),
    )._asdict()  # fmt: skip
    lines = (
        json.dumps(result) if options.json else "\n".join(f"{name:<13} {value:.7g}" for name, value in result.items())
    )
    print(lines)
    return 0


def quantize(request: Request) -> int:
    """Write the model with quantized weights."""
    if request.options.weights is None:
        raise ValueError("quantize needs --weights int8, int4 or fp8")
    from inference.weights import save_quantized

    save_quantized(request.options.out, opened(request), mesh_of(request), AxisRules())
    return 0


def route(options: argparse.Namespace) -> int:
    """Stand in front of servers till SIGTERM. The admin key comes from the environment, where `ps` does not show it."""
    config, balancing = chosen(RouterConfig, options), chosen(BalancingConfig, options)
    replicas, key = addresses(options.replicas), os.environ.get("MESHLIGHT_ADMIN_KEY") or None
    from inference import listening, router

    bound = listening.listening_socket(options.host, options.port)
    return router.serve(router.Router(replicas, config, balancing, admin_key=key, say=router.say), bound)


def serve(request: Request) -> int:
    """Answer over HTTP till a signal comes."""
    options, config = chosen(EngineConfig, request.options), chosen(ServerConfig, request.options)
    shared = chosen(DisaggregationConfig, request.options)
    secret = shared.secret(os.environ, options)
    from inference import listening

    listening.check_free(config.host, config.port)
    from inference import server
    from inference.exchange import exchange

    model = opened(request)
    engine = started(model, request, options)
    engine.warm_up(server.say)
    others = exchange(engine, shared, secret=secret) if secret else None
    name = pathlib.Path(request.options.model).name
    return server.serve(engine, model.tokenizer, config, name=name, max_rows=options.max_rows, others=others)


Record = typing.TypeVar("Record")


def chosen(record: type[Record], options: argparse.Namespace) -> Record:
    """The record as the options say."""
    values = {field.name: getattr(options, field.name) for field in dataclasses.fields(record)}  # pyright: ignore[reportArgumentType]
    return record(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def utf8(content: bytes, path: pathlib.Path) -> str:
    """Text of a file, or ValueError where it has none."""
    if not content:
        raise ValueError(f"{path} is empty; give a text of at least two tokens")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        byte = content[error.start]
        raise ValueError(f"{path} is not UTF-8 text: byte {error.start} is {byte:#04x}; convert it first") from error


def get_ready() -> None:
    """Before anything is computed: jax looks where chips are, and keeps what it compiles."""
    from parallel.platforms import look_only_where_chips_are

    look_only_where_chips_are()
    from parallel.compilation import cache_compilations

    cache_compilations()


def opened(request: Request) -> "Model":
    """The model's shape and tokenizer, jax ready to compile for it."""
    get_ready()
    from inference.weights import open_model

    return open_model(request.location, dtype=request.options.dtype, scheme=request.options.weights)


def started(model: "Model", request: Request, options: EngineConfig) -> "Engine":
    """An engine with the model's weights on the mesh."""
    from inference.drafting import Draft
    from inference.engine import Engine
    from inference.weights import serving_parameters

    mesh, rules = mesh_of(request), AxisRules()
    config, parameters = serving_parameters(model.config, model.load(mesh, rules), mesh)
    draft = None
    if request.options.draft is not None:
        draft, options = opened_draft(request, model), dataclasses.replace(options, speculation="draft")
        draft = Draft(*serving_parameters(draft.config, draft.load(mesh, rules), mesh))
    num_tokens = model.tokenizer.vocab_size
    return Engine(config, parameters, mesh, rules, num_tokens=num_tokens, options=options, draft=draft)


def opened_draft(request: Request, model: "Model") -> "Model":
    """The model that guesses; ValueError where its tokens are not the model's."""
    from data.tokenizer import fingerprint
    from inference.weights import open_model

    draft = open_model(locate(request.options.draft), dtype=request.options.dtype)
    if fingerprint(draft.tokenizer) != fingerprint(model.tokenizer):
        raise ValueError(
            f"--draft {request.options.draft} has another tokenizer ({draft.tokenizer.vocab_size} tokens) than "
            f"{request.options.model} ({model.tokenizer.vocab_size}); a draft model speaks in the same tokens"
        )
    return draft


def mesh_of(request: Request) -> "Mesh":
    """The devices that the command line asks for."""
    import jax

    from parallel.mesh import make_mesh

    sizes, devices = request.mesh.axes.values(), jax.devices()
    return make_mesh(request.mesh, devices if -1 in sizes else devices[: math.prod(sizes)])


@dataclasses.dataclass
class Clock:
    """Seconds between the parts of a run."""

    laps: dict[str, float] = dataclasses.field(default_factory=dict)
    last: float = STARTED

    def lap(self, name: str) -> None:
        """What came since the last lap belongs to `name`."""
        now = time.perf_counter()
        self.laps[name] = self.laps.get(name, 0.0) + now - self.last
        self.last = now

    def timings(self, num_read: int, num_decoded: int) -> dict[str, float]:
        """All laps, the time from the start of the program to the first token, and tokens per second."""
        return {
            **self.laps,
            "first_token": self.laps["load"] + self.laps["prefill"],
            "prefill_tokens_per_second": num_read / self.laps["prefill"],
            "decode_tokens_per_second": num_decoded / self.laps["decode"],
        }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
