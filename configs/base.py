"""A run is a value: RunConfig joins the records of every room and checks what only their sum shows. Imports no jax.

Overrides are in configs/overrides.py; JSON, back and comparison in parallel/records.py, which knows every record.
"""

import dataclasses
import functools
import itertools
import math
import re
import typing

from data.config import DataConfig, PairsConfig, bucket_edges
from model.config import ModelConfig
from model.seq2seq_config import Seq2SeqConfig
from parallel.chips import CHIPS, Chip
from parallel.config import AxisRules, ExecutionConfig, HostsConfig, MeshAxes, MeshConfig
from parallel.records import nearest
from parallel.topology import find
from perf.candidates import Candidate, Precision, Step, divisors, training_meshes
from training.config import OptimConfig, TrainConfig

if typing.TYPE_CHECKING:
    from perf.plan import Question

UNKNOWN_VOCABULARY = 32_768  # entries of a tokenizer that is not opened to plan a run
EXPERTS_APART = 8  # devices that experts are spread over by mesh=auto: tokens of a round go to that many


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides a run."""

    name: str  # the run's folder is out/name
    out: str = "runs"  # folder of runs
    seed: int = 0  # initial weights, order of examples, sampling
    model: ModelConfig | Seq2SeqConfig
    mesh: MeshConfig = MeshConfig()
    rules: AxisRules = AxisRules()
    execution: ExecutionConfig = ExecutionConfig()
    hosts: HostsConfig = HostsConfig()
    data: DataConfig | PairsConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig
    topologies: tuple[str, ...] = ()  # TPU slices that this run is meant for, e.g. v5e:16x16; *2 is two of them

    def __post_init__(self):
        check_name(self.name)
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed} must be between 0 and {2**32 - 1}; it seeds 32-bit generators")
        for name in self.topologies:
            find(name)
        check_lengths(self.model, self.optim, self.train)
        check_data(self.model, self.data, self.train)
        check_rules(self.rules, self.mesh)
        check_splits(self, {axis: max(size, 1) for axis, size in self.mesh.axes.items()})

    def check_devices(self, num_devices: int) -> None:
        """Raise ValueError where the mesh does not come out on so many devices, or splits a dimension unevenly."""
        sizes = self.mesh.sizes(num_devices)
        check_splits(self, sizes)
        check_used(self, sizes)

    def on(self, num_devices: int, kind: str = "", slices: int = 1) -> "RunConfig":
        """The run for so many devices, its mesh picked where it is `auto`; raises ValueError as check_devices does.

        `kind` is what jax calls the devices (`device_kind`); where it is a known chip, the planner picks. `slices` is
        how many groups of them only a data centre's network joins.
        """
        run = dataclasses.replace(self, mesh=picked_mesh(self, num_devices, kind, slices)) if self.mesh.auto else self
        run.check_devices(num_devices)
        return run


def check_name(name: str) -> None:
    """A run's name is one folder's name."""
    if not re.fullmatch(r"[\w][\w.+=-]*", name):
        raise ValueError(
            f"name={name!r} must be one folder's name (letters, digits and . + = - _); out=DIR moves the runs folder"
        )


def check_lengths(model: ModelConfig | Seq2SeqConfig, optim: OptimConfig, train: TrainConfig) -> None:
    """Sequences fit the model, micro-batches the batch, warm-up the run."""
    if train.seq_len > model.max_length:
        raise ValueError(
            f"train.seq_len={train.seq_len} is longer than model.max_length={model.max_length}; "
            "shorten the sequences or raise model.max_length"
        )
    if train.batch_size % train.accumulate:
        raise ValueError(
            f"train.batch_size={train.batch_size} is not a multiple of train.accumulate={train.accumulate}; "
            "the batch is computed in that many equal parts"
        )
    if optim.warmup_steps > train.steps:
        raise ValueError(
            f"optim.warmup_steps={optim.warmup_steps} is more than train.steps={train.steps}; "
            f"lower it to at most {train.steps} or train longer"
        )


def check_data(model: ModelConfig | Seq2SeqConfig, data: DataConfig | PairsConfig, train: TrainConfig) -> None:
    """An encoder–decoder learns from pairs of texts, a decoder from text."""
    if not isinstance(model, Seq2SeqConfig):
        if isinstance(data, PairsConfig):
            raise ValueError("data=PairsConfig(…) holds pairs of texts, which need model=Seq2SeqConfig(…)")
        if train.patience:
            raise ValueError(
                f"train.patience={train.patience} counts evaluations by BLEU, which text alone has not; give 0"
            )
        return
    if not isinstance(data, PairsConfig):
        raise ValueError("model=Seq2SeqConfig(…) learns from pairs of texts; give data=PairsConfig(…)")
    if model.shared and not data.shared:
        raise ValueError(
            "model.shared=true is one table for both languages but data.shared=false gives each a vocabulary; "
            "make both true or both false"
        )
    bucket_edges(data.buckets, seq_len=train.seq_len)


def check_rules(rules: AxisRules, mesh: MeshConfig) -> None:
    """Every rule names axes of the mesh, each once."""
    axes = mesh.axes
    for name, rule in named(rules).items():
        split = axes_of(rule)
        for axis in split:
            if axis not in axes:
                raise ValueError(
                    f"rules.{name}={axis} is no mesh axis; they are {', '.join(axes)}{nearest(axis, axes)}"
                )
        if len(set(split)) < len(split):
            raise ValueError(f"rules.{name}={','.join(split)} names a mesh axis twice; an axis splits a dimension once")


@functools.cache
def named(rules: AxisRules) -> dict[str, MeshAxes]:
    """Rules by logical name."""
    return dataclasses.asdict(rules)


def axes_of(rule) -> tuple[str, ...]:
    """A rule's mesh axes: `None` is (), `"tensor"` is ("tensor",)."""
    return (rule,) if isinstance(rule, str) else tuple(rule or ())


def check_splits(run: RunConfig, sizes: dict[str, int]) -> None:
    """Every dimension is a multiple of the product of the mesh axes that split it (an unknown axis has size 1)."""
    for name, rule in named(run.rules).items():
        parts = math.prod(sizes[axis] for axis in axes_of(rule))
        for dim, size in split_dims(run.model, run.train).get(name.removeprefix("act_"), {}).items():
            if size % parts:
                shape = " x ".join(f"mesh.{axis}={sizes[axis]}" for axis in axes_of(rule) if sizes[axis] > 1)
                raise ValueError(
                    f"{dim}={size} does not divide over {shape} (rules.{name}): {size} is not a multiple of {parts}; "
                    "change one of them so that every device has an equal part"
                )


def split_dims(model: ModelConfig | Seq2SeqConfig, train: TrainConfig) -> dict[str, dict[str, int]]:
    """The sizes behind each logical name. A vocabulary of 0 is not known yet, and a multiple of anything."""
    batch = {
        "batch": {"train.batch_size / train.accumulate": train.batch_size // train.accumulate},
        **{"gates": {}, "recurrent": {}},
    }
    if isinstance(model, Seq2SeqConfig):
        ways = 2 if model.bidirectional else 1
        return batch | {
            "embed": {"model.embed_dim": model.embed_dim, "model.recurrent_dim": model.recurrent_dim},
            "heads": {"model.num_heads": model.num_heads},
            "head": {"model.head_dim": model.head_dim},
            "ffn": {"model.ffn_dim": model.ffn_dim},
            "vocab": {"model.vocab_size": model.vocab_size, "model.source_vocab_size": model.source_vocab_size},
            "recurrent": {f"model.recurrent_dim / {ways}": model.recurrent_dim // ways},
        }
    return batch | {
        "seq": {"train.seq_len": train.seq_len},
        "residual_seq": {"train.seq_len": train.seq_len},
        "embed": {"model.embed_dim": model.embed_dim},
        "heads": {"model.num_heads": model.num_heads, "model.num_kv_heads": model.num_kv_heads},
        "head": {"model.head_dim": model.head_dim},
        "rank": {"model.kv_rank": model.kv_rank, "model.q_rank": model.q_rank},
        "ffn": {"model.ffn_dim": model.ffn_dim},
        "vocab": {"model.vocab_size": model.vocab_size},
        "layers": {"model.num_layers": model.num_layers},
        "experts": {"model.num_experts": model.num_experts},
        "expert_embed": {"model.embed_dim": model.embed_dim},
        "expert_ffn": {"model.expert_ffn_dim": model.expert_ffn_dim},
    }


def check_used(run: RunConfig, sizes: dict[str, int]) -> None:
    """Every axis has something to split, in the way that a step goes about it."""
    model, train, execution = run.model, run.train, run.execution
    bound = {axis for rule in named(run.rules).values() for axis in axes_of(rule)}
    for axis, size in sizes.items():
        if size > 1 and axis not in bound:
            raise ValueError(
                f"mesh.{axis}={size} but no rule names {axis}; bind one of rules.* to it, or take mesh.{axis}=1"
            )
    if isinstance(model, Seq2SeqConfig):
        for axis in ("pipe", "expert", "context"):
            if sizes[axis] > 1:
                raise ValueError(
                    f"mesh.{axis}={sizes[axis]} does not go with model.kind={model.kind}: an encoder–decoder runs over "
                    f"data, fsdp and tensor; take mesh.{axis}=1"
                )
        return check_meeting(run.rules.with_whole_rows(), sizes)
    if sizes["expert"] > 1 and not model.num_experts:
        raise ValueError(
            f"mesh.expert={sizes['expert']} but model.num_experts=0: nobody uses rules.experts; take mesh.expert=1 and "
            "more of mesh.fsdp"
        )
    parts = math.prod(sizes[axis] for axis in axes_of(run.rules.seq))
    if parts > 1 and execution.context == "ring" and train.seq_len % (2 * parts):
        raise ValueError(
            f"train.seq_len={train.seq_len} is not a multiple of 2 x {parts} (rules.seq): a ring gives every device a "
            "chunk from the front and one from the back; change train.seq_len, or take execution.context=gather"
        )
    check_meeting(run.rules, sizes)
    check_pipe(run, sizes)


def check_pipe(run: RunConfig, sizes: dict[str, int]) -> None:
    """Layers come out in equal chunks, and a device's batch in microbatches that fill the pipe."""
    model, train, execution, ranks = run.model, run.train, run.execution, sizes["pipe"]
    assert isinstance(model, ModelConfig)
    if ranks == 1:
        if execution.repeats > 1 or execution.microbatches or execution.pipeline != "circular":
            raise ValueError(
                f"execution.pipeline={execution.pipeline}, microbatches={execution.microbatches}, repeats="
                f"{execution.repeats} are set but mesh.pipe=1 has no pipe; set mesh.pipe, or leave them as they are"
            )
        return
    if model.num_dense_layers:
        raise ValueError(
            f"mesh.pipe={ranks} needs layers that are alike, but model.num_dense_layers={model.num_dense_layers}; "
            "take mesh.pipe=1 and more of mesh.fsdp"
        )
    if not model.scan_layers:
        raise ValueError(f"mesh.pipe={ranks} needs stacked layers, but model.scan_layers=false; take true")
    chunks = ranks * execution.repeats
    if model.num_layers % chunks:
        raise ValueError(
            f"model.num_layers={model.num_layers} is not a multiple of mesh.pipe={ranks} x execution.repeats="
            f"{execution.repeats}: every stage has equal chunks; change one of the three"
        )
    split = math.prod(sizes[axis] for axis in axes_of(run.rules.batch))
    rows, parts = train.batch_size // train.accumulate // split, execution.microbatches or ranks
    if parts % ranks or rows % parts:
        raise ValueError(
            f"{parts} microbatches (execution.microbatches) must be a multiple of mesh.pipe={ranks} and divide the "
            f"{rows} sequences of a device's batch; change execution.microbatches or train.batch_size"
        )
    tokens = train.seq_len // math.prod(sizes[axis] for axis in axes_of(run.rules.residual_seq))
    if execution.pipeline == "1f1b" and tokens % ranks:
        raise ValueError(
            f"the {tokens} tokens of a sequence on one device are not a multiple of mesh.pipe={ranks}, whose stages "
            "share the loss in execution.pipeline=1f1b; change train.seq_len, or take circular"
        )


def check_meeting(rules: AxisRules, sizes: dict[str, int]) -> None:
    """Activations are split where the weights are that they meet: a step computes each device's part in place."""
    split = {name: tuple(axis for axis in axes_of(rule) if sizes[axis] > 1) for name, rule in named(rules).items()}
    for weights in ("heads", "ffn", "vocab", "recurrent"):
        activations = f"act_{weights}"
        if split[weights] != split[activations]:
            raise ValueError(
                f"rules.{weights} splits over {split[weights]} but rules.{activations} over {split[activations]}: a "
                "device multiplies its part of both; bind them to the same axes"
            )
    whole, apart = split["seq"], split["residual_seq"]
    if apart[: len(whole)] != whole:
        raise ValueError(
            f"rules.residual_seq splits over {apart}, which does not begin with the {whole} of rules.seq: between "
            "blocks a sequence is split further; put the axes of rules.seq first"
        )


# mesh=auto ------------------------------------------------------------------------------------------------------------


def picked_mesh(run: RunConfig, num_devices: int, kind: str = "", slices: int = 1) -> MeshConfig:
    """The mesh that the planner finds quickest on chips that it knows, else the simplest one that divides the run."""
    chip = next((chip for chip in CHIPS if kind in chip.kinds), None)
    if chip is None or isinstance(run.model, Seq2SeqConfig):  # the planner knows decoders
        return simplest_mesh(run, num_devices)
    return planned_mesh(run, num_devices, chip, slices)


def simplest_mesh(run: RunConfig, num_devices: int) -> MeshConfig:
    """A mesh that divides the run: experts apart, fully sharded data, and as little tensor and context as will do.

    Weights travel least where tokens stay; tensor and context come in where the batch has no more sequences to split.
    """
    reasons = []
    num_experts = run.model.num_experts if isinstance(run.model, ModelConfig) else 0
    for tensor, context in sorted(itertools.product(divisors(num_devices), repeat=2), key=lambda pair: math.prod(pair)):
        if num_devices % (tensor * context):
            continue
        for expert in sorted(divisors(math.gcd(num_experts, num_devices)), reverse=True):
            if num_devices % (tensor * context * expert) or expert > EXPERTS_APART:
                continue
            fsdp = num_devices // (tensor * context * expert)
            mesh = MeshConfig(data=1, fsdp=fsdp, expert=expert, context=context, tensor=tensor)
            try:
                dataclasses.replace(run, mesh=mesh).check_devices(num_devices)
            except ValueError as error:
                reasons.append(str(error))
                continue
            return mesh
    raise ValueError(
        f"mesh=auto finds no mesh of {num_devices} devices that divides this run; of the simplest: {reasons[0]}"
    )


def planned_mesh(run: RunConfig, num_devices: int, chip: Chip, slices: int = 1) -> MeshConfig:
    """Of all meshes that divide the run as it is, the one whose step takes the least time by perf/plan.py.

    Where none of them fits by its arithmetic, the one that needs the least: the compiler has the last word.
    """

    from perf.plan import quickest  # numpy, which no other run needs before its loop

    def check(candidate: Candidate) -> None:
        dataclasses.replace(run, mesh=candidate.mesh).check_devices(candidate.devices)

    base = planned_candidate(run, MeshConfig(data=1), slices)
    ways = training_meshes(decoder_of(run)[0], base, num_devices, check).allowed
    return quickest(planned_question(run, num_devices, chip), ways).mesh if ways else simplest_mesh(run, num_devices)


def decoder_of(run: RunConfig) -> tuple[ModelConfig, DataConfig]:
    """Its model and text; ValueError for an encoder–decoder, whose time and memory nobody predicts yet."""
    if isinstance(run.model, ModelConfig) and isinstance(run.data, DataConfig):
        return run.model, run.data
    raise ValueError(
        f"{run.name} is an encoder–decoder, and the performance model knows decoder-only models; "
        "docs/lineage.md has its costs"
    )


def planned_candidate(run: RunConfig, mesh: MeshConfig, slices: int = 1) -> Candidate:
    """The run as it is, on a mesh."""
    model, _ = decoder_of(run)
    return Candidate(
        mesh=mesh,
        slices=slices,
        batch=run.train.batch_size,
        accumulate=run.train.accumulate,
        microbatches=run.execution.microbatches,
        repeats=run.execution.repeats,
        remat=model.remat,
        precision=own_precision(run, "train"),
    )


def planned_question(run: RunConfig, num_devices: int, chip: Chip) -> "Question":
    """What the planner is asked about a run whose mesh alone is open."""
    from perf.plan import Question

    return Question(
        step="train",
        model=with_usual_vocabulary(*decoder_of(run)),
        optim=run.optim,
        train=run.train,
        chip=chip,
        chips=(max(num_devices // chip.devices_per_chip, 1),),
        length=run.train.seq_len,
        precisions=(own_precision(run, "train"),),
    )


def applied(run: RunConfig, candidate: Candidate) -> RunConfig:
    """The run in the way that a candidate says."""
    compute = candidate.precision.compute
    execution = dataclasses.replace(run.execution, microbatches=candidate.microbatches, repeats=candidate.repeats)
    if candidate.mesh.pipe == 1:
        execution = dataclasses.replace(execution, pipeline="circular")
    return dataclasses.replace(
        run,
        model=dataclasses.replace(
            decoder_of(run)[0],
            remat=candidate.remat,
            compute_dtype="float32" if compute == "fp32" else "bfloat16",
            matmul=compute if compute in ("int8", "fp8") else "float",
        ),
        mesh=candidate.mesh,
        execution=execution,
        train=dataclasses.replace(run.train, batch_size=candidate.batch, accumulate=candidate.accumulate),
    )


def own_precision(run: RunConfig, step: Step) -> Precision:
    """The numbers that a run asks for: parameters are float32 in training, and in serving what they multiply in."""
    model, _ = decoder_of(run)
    number = "fp32" if model.compute_dtype == "float32" else "bf16"
    if step == "train":
        return Precision("fp32", model.matmul if model.matmul != "float" else number, number)
    return Precision(number, number, number)


def with_usual_vocabulary(model: ModelConfig, data: DataConfig) -> ModelConfig:
    """The model with the vocabulary that its tokenizer will have, as near as can be said without opening it."""
    if model.vocab_size:
        return model
    size = {"byte": 258, "char": 128, "bpe": data.bpe_vocab}.get(data.tokenizer, UNKNOWN_VOCABULARY)
    return dataclasses.replace(model, vocab_size=-(-size // 64) * 64)
