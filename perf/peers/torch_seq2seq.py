"""The peer's side of `python -m perf bench pairs … --peer PYTHON`: encoder–decoders in plain PyTorch, a step a line.

Run by the other interpreter (`pip install torch==2.13.0 numpy`) as

    PYTHON perf/peers/torch_seq2seq.py '["transformer", "-B", "96", "--threads", "2"]'

Each line read from stdin starts a training step; its seconds are printed as one line. The shapes are ours:
docs/benchmarks/lineage.md says what is equal.

Tokens are random, lengths are not: they are spread evenly from (1 - 2 padded) of the longest to the longest, so that
every batch has the same number of real tokens. Padding changes no result: it is masked or packed away.
"""

import argparse
import json
import math
import sys
import time
import warnings

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

PAD, FIRST = 0, 4  # the id of padding, and the first of the ids that are drawn
BATCHES = 4  # taken in turns
SMOOTHING, CLIP, RATE = 0.1, 1.0, 1e-3


class Encoder(nn.Module):
    """Source embeddings through a GRU: states of all tokens, and the last state of each direction."""

    def __init__(self, asked, embedding, bidirectional):
        super().__init__()
        self.embedding, self.packed, self.dropout = embedding, asked.encoder == "packed", nn.Dropout(asked.dropout)
        directions = 2 if bidirectional and self.packed else 1
        self.gru = nn.GRU(asked.D, asked.U, batch_first=True, bidirectional=directions == 2)
        self.back = nn.GRU(asked.D, asked.U, batch_first=True) if bidirectional and not self.packed else None

    def forward(self, batch):
        x = self.dropout(self.embedding(batch["source"]))
        if self.packed:
            packed = pack_padded_sequence(x, batch["lengths"], batch_first=True, enforce_sorted=False)
            states, last = self.gru(packed)
            states, _ = pad_packed_sequence(states, batch_first=True, total_length=x.shape[1])
            return states, torch.cat(tuple(last), -1)
        states, _ = self.gru(x)
        rows = torch.arange(len(x))
        last = states[rows, batch["lengths"] - 1]
        if self.back is None:
            return states, last
        # the real tokens of each row backwards; padding stays behind them, where no real state sees it
        turned = batch["turned"]
        back, _ = self.back(x[rows[:, None], turned])
        last = torch.cat((last, back[rows, batch["lengths"] - 1]), -1)
        return torch.cat((states, back[rows[:, None], turned]), -1), last


class Output(nn.Module):
    """States [B, T, D] to the loss, over all positions or over the real ones alone."""

    def __init__(self, asked, embedding):
        super().__init__()
        self.linear, self.real = nn.Linear(asked.D, asked.V), asked.logits == "real"
        if not asked.untied:
            self.linear.weight = embedding.weight

    def forward(self, x, batch):
        x, targets = x.flatten(0, 1), batch["targets"].flatten()
        if self.real:
            x, targets = x[batch["real"]], targets[batch["real"]]
        return cross_entropy(self.linear(x), targets, ignore_index=PAD, label_smoothing=SMOOTHING)


class Fixed(nn.Module):
    """The source's last state starts a GRU and stands beside each of its inputs (Cho 2014)."""

    def __init__(self, asked, embeddings):
        super().__init__()
        self.embedding, self.dropout = embeddings[1], nn.Dropout(asked.dropout)
        self.encoder = Encoder(asked, embeddings[0], asked.bidirectional)
        width = 2 * asked.U if asked.bidirectional else asked.U
        self.bridge = nn.Linear(width, asked.W)
        self.gru = nn.GRU(asked.D + width, asked.W, batch_first=True)
        self.readout, self.output = nn.Linear(asked.W + width + asked.D, asked.D), Output(asked, embeddings[1])

    def forward(self, batch):
        _, last = self.encoder(batch)
        y = self.dropout(self.embedding(batch["inputs"]))
        context = last[:, None].expand(-1, y.shape[1], -1)
        states, _ = self.gru(torch.cat((y, context), -1), torch.tanh(self.bridge(last))[None])
        return self.output(self.dropout(torch.tanh(self.readout(torch.cat((states, context, y), -1)))), batch)


class Additive(nn.Module):
    """A GRU cell whose previous state looks for its context before each step (Bahdanau 2015)."""

    def __init__(self, asked, embeddings):
        super().__init__()
        self.embedding, self.dropout = embeddings[1], nn.Dropout(asked.dropout)
        self.encoder = Encoder(asked, embeddings[0], True)
        self.bridge = nn.Linear(2 * asked.U, asked.W)
        self.key, self.query = nn.Linear(2 * asked.U, asked.W), nn.Linear(asked.W, asked.W, bias=False)
        self.score = nn.Linear(asked.W, 1, bias=False)
        self.cell = nn.GRUCell(asked.D + 2 * asked.U, asked.W)
        width = asked.W + 2 * asked.U + asked.D
        self.readout, self.output = nn.Linear(width, asked.D), Output(asked, embeddings[1])

    def forward(self, batch):
        memory, last = self.encoder(batch)
        keys, bias = self.key(memory), batch["source_bias"]
        state, embedded = torch.tanh(self.bridge(last)), self.dropout(self.embedding(batch["inputs"]))
        states, contexts = [], []
        for x in embedded.unbind(1):
            scores = self.score(torch.tanh(keys + self.query(state)[:, None])).squeeze(-1)
            context = torch.bmm((scores + bias).softmax(-1)[:, None], memory)[:, 0]
            state = self.cell(torch.cat((x, context), -1), state)
            states.append(state)
            contexts.append(context)
        x = torch.cat((torch.stack(states, 1), torch.stack(contexts, 1), embedded), -1)
        return self.output(self.dropout(torch.tanh(self.readout(x))), batch)


class General(nn.Module):
    """A GRU over all targets, then one attention for all of its states (Luong 2015, without input feeding)."""

    def __init__(self, asked, embeddings):
        super().__init__()
        self.embedding, self.dropout = embeddings[1], nn.Dropout(asked.dropout)
        self.encoder = Encoder(asked, embeddings[0], True)
        self.bridge = nn.Linear(2 * asked.U, asked.W)
        self.gru = nn.GRU(asked.D, asked.W, batch_first=True)
        self.query = nn.Linear(asked.W, 2 * asked.U, bias=False)
        self.readout, self.output = nn.Linear(asked.W + 2 * asked.U, asked.D), Output(asked, embeddings[1])

    def forward(self, batch):
        memory, last = self.encoder(batch)
        x = self.dropout(self.embedding(batch["inputs"]))
        states, _ = self.gru(x, torch.tanh(self.bridge(last))[None])
        scores = self.query(states) @ memory.transpose(1, 2) + batch["source_bias"][:, None]
        x = torch.cat((scores.softmax(-1) @ memory, states), -1)
        return self.output(self.dropout(torch.tanh(self.readout(x))), batch)


class Transformer(nn.Module):
    """`nn.Transformer` with norms first and sinusoidal positions."""

    def __init__(self, asked, embeddings):
        super().__init__()
        self.embeddings, self.dropout, self.scale = nn.ModuleList(embeddings), nn.Dropout(asked.dropout), asked.D**0.5
        self.body = nn.Transformer(asked.D, asked.N, asked.layers, asked.layers, asked.F, asked.dropout,
                                   batch_first=True, norm_first=True)  # fmt: skip
        for module in self.body.modules():
            if isinstance(module, nn.MultiheadAttention):
                module.dropout = asked.attention_dropout
        length = max(asked.S, asked.T)
        angles = torch.arange(length)[:, None] * torch.exp(-math.log(1e4) * torch.arange(0, asked.D, 2) / asked.D)
        self.register_buffer("positions", torch.stack((angles.sin(), angles.cos()), -1).flatten(1), persistent=False)
        self.register_buffer("causal", self.body.generate_square_subsequent_mask(asked.T), persistent=False)
        self.output = Output(asked, embeddings[1])

    def forward(self, batch):
        x, y = self.embed(batch["source"], self.embeddings[0]), self.embed(batch["inputs"], self.embeddings[-1])
        mask = batch["source_bias"]
        # targets are padded at their ends, where causality already hides it from every real position
        x = self.body(x, y, tgt_mask=self.causal, tgt_is_causal=True, src_is_causal=False, memory_is_causal=False,
                      src_key_padding_mask=mask, memory_key_padding_mask=mask)  # fmt: skip
        return self.output(x, batch)

    def embed(self, tokens, embedding):
        return self.dropout(embedding(tokens) * self.scale + self.positions[: tokens.shape[1]])


def build(asked):
    """The model that was asked for."""
    embeddings = [nn.Embedding(asked.V, asked.D, padding_idx=PAD) for _ in range(1 if asked.shared else 2)]
    for embedding in embeddings:
        nn.init.normal_(embedding.weight, std=asked.D**-0.5)
    recurrent = {"additive": Additive, "general": General}[asked.attention]
    kinds = {"fixed": Fixed, "attention": recurrent, "transformer": Transformer}
    return kinds[asked.kind](asked, [embeddings[0], embeddings[-1]])


def spread(rows, longest, padded):
    """Lengths with the mean (1 - padded) longest, in random order."""
    lengths = torch.linspace(max(1, (1 - 2 * padded) * longest), longest, rows).round().long()
    return lengths[torch.randperm(rows)]


def draw(asked):
    """One batch, with all that its lengths imply."""
    lengths, ends = spread(asked.B, asked.S, asked.padded), spread(asked.B, asked.T, asked.padded)
    source, target = (torch.randint(FIRST, asked.V, (asked.B, n)) for n in (asked.S, asked.T + 1))
    steps = torch.arange(asked.S)
    behind, after = steps >= lengths[:, None], torch.arange(asked.T) >= ends[:, None]
    return {
        "source": source.masked_fill(behind, PAD),
        "inputs": target[:, :-1].masked_fill(after, PAD),
        "targets": target[:, 1:].masked_fill(after, PAD),
        "lengths": lengths,
        "turned": torch.where(behind, steps, lengths[:, None] - 1 - steps),
        "source_bias": torch.zeros(asked.B, asked.S).masked_fill(behind, -math.inf),
        "real": (~after).flatten().nonzero()[:, 0],
    }


def parse(arguments):
    """What is asked, as a command line has it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("fixed", "attention", "transformer"))
    parser.add_argument("-B", type=int, default=96, help="rows (default 96)")
    parser.add_argument("-S", type=int, default=24, help="source tokens of a row, padding included (default 24)")
    parser.add_argument("-T", type=int, default=24, help="target tokens of a row, padding included (default 24)")
    parser.add_argument("-V", type=int, default=6016, help="vocabulary, of each side (default 6016)")
    parser.add_argument("-D", type=int, default=256, help="of embeddings, and of the transformer (default 256)")
    parser.add_argument("-U", type=int, help="of GRU states, per direction (default fixed 512, attention 256)")
    parser.add_argument("-W", type=int, default=512, help="of the recurrent decoder's states (default 512)")
    parser.add_argument("-N", type=int, default=4, help="heads (transformer; default 4)")
    parser.add_argument("-F", type=int, default=1024, help="of the transformer's hidden layers (default 1024)")
    parser.add_argument("--layers", type=int, default=3, help="of each side of the transformer (default 3)")
    parser.add_argument("--attention", choices=("additive", "general"), default="additive")
    parser.add_argument("--bidirectional", action="store_true", help="fixed: the encoder (attention's always is)")
    parser.add_argument("--encoder", choices=("packed", "padded"), default="packed",
                        help="sequences, or all positions and the second direction turned by hand")  # fmt: skip
    parser.add_argument("--untied", action="store_true", help="the output's matrix is its own")
    parser.add_argument("--shared", action="store_true", help="one embedding for source and target")
    parser.add_argument("--logits", choices=("all", "real"), default="all", help="of all positions, or not of padding")
    parser.add_argument("--padded", type=float, default=0.2, help="share of padding on both sides (default 0.2)")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--attention-dropout", type=float, help="of the transformer's weights (default: as --dropout)")
    parser.add_argument("--optimizer", choices=("fused", "foreach", "plain"), default="fused", help="form of AdamW")
    parser.add_argument("--compile", action="store_true", help="torch.compile; nn.GRU stays as it is")
    parser.add_argument("--compile-gru", action="store_true", help="… and nn.GRU, unrolled (needs --encoder padded)")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(arguments)
    if not 0 <= asked.padded < 0.5:
        parser.error(f"--padded must be at least 0 and below 0.5, and is {asked.padded}")
    if asked.U is None:
        asked.U = 512 if asked.kind == "fixed" else 256
    if asked.attention_dropout is None:
        asked.attention_dropout = asked.dropout
    asked.compile |= asked.compile_gru
    return asked


def main():
    """Build, warm up, then one step for each line on stdin."""
    asked = parse(json.loads(sys.argv[1]))
    warnings.filterwarnings("ignore", message="enable_nested_tensor")
    torch.set_num_threads(asked.threads)
    torch.manual_seed(asked.seed)
    model = build(asked).train()
    forward = model
    if asked.compile:
        torch._dynamo.config.allow_rnn = asked.compile_gru
        forward = torch.compile(model)
    form = {"fused": {"fused": True}, "foreach": {"foreach": True}, "plain": {"foreach": False}}[asked.optimizer]
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.01, **form)
    batches = [draw(asked) for _ in range(BATCHES)]

    def step(number):
        optimizer.zero_grad(set_to_none=True)
        loss = forward(batches[number % BATCHES])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()

    for number in range(asked.warmup):
        step(number)
    print(json.dumps({"ready": f"torch {torch.__version__}"}), flush=True)
    for number, _ in enumerate(sys.stdin):
        start = time.perf_counter()
        step(number)
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main()
