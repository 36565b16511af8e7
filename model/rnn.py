"""Recurrent encoders and decoders as scans of their papers' equations. Knows no token and no loss.

GRU (arXiv:1406.1078, eq. 5 to 8; the reset gate after the product, as cuDNN and PyTorch have it):
    r = σ(W_r x + U_r h)    z = σ(W_z x + U_z h)    n = tanh(W_n x + r (U_n h))    h' = (1 - z) n + z h
LSTM (arXiv:1409.3215, after Graves):
    i = σ(W_i x + U_i h)    f = σ(W_f x + U_f h)    o = σ(W_o x + U_o h)    g = tanh(W_g x + U_g h)
    c' = f c + i g          h' = o tanh(c')
What depends on the inputs alone, W x, is one product over all tokens before the scan; in it remains U h.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from model.decoder import gathered
from model.dropout import Seeds, dropout
from model.layers import Key, constant, matrix
from model.looks import Looks
from model.seq2seq_config import GATES, CellKind, Seq2SeqConfig
from model.soft_search import SoftSearch, Source, attend
from ops.recurrence import Linear, linear_of, recur
from parallel.sharding import einsum, relaid

INSIDE, OUTSIDE = ("batch", "act_recurrent"), ("batch", None)  # a state where gates are computed, and in a product


class CellState(NamedTuple):
    """What a cell carries from token to token, each device its part of U."""

    h: Float[Array, "B u"]
    c: Float[Array, "B c"]  # u wide in an LSTM; a GRU has none


class Cell(nnx.Module):
    """The weights of one layer in one direction."""

    def __init__(self, kind: CellKind, key: Key, *, inputs: int, size: int):
        x, h = jax.random.split(key)
        J, names = GATES[kind], ("embed", "gates", "recurrent")
        self.x = matrix(x, (inputs, J, size), names, fan_in=inputs)
        self.h = matrix(h, (size, J, size), names, fan_in=size)
        self.x_bias = constant(0.0, (J, size), ("gates", "recurrent"))
        self.h_bias = constant(0.0, (J, size), ("gates", "recurrent"))

    def gates(self, x: Float[Array, "T B d"]) -> Float[Array, "T B J u"]:
        """The inputs' share of the gates, biases included, for all tokens at once."""
        y = einsum("TBD,DJU->TBJU", x, self.x[...], out=("seq", "batch", None, "act_recurrent"))
        return y + self.x_bias[...].astype(y.dtype)[None, None]


def advanced(kind: CellKind, gates: Float[Array, "B J u"], back: Float[Array, "B J u"], was: CellState) -> CellState:
    """The state after one token: `gates` is the inputs' share, `back` the old state's."""
    if kind == "gru":
        r, z = jnp.split(jax.nn.sigmoid(gates[:, :2] + back[:, :2]), 2, axis=1)
        n = jnp.tanh(gates[:, 2] + r[:, 0] * back[:, 2])
        return CellState(n + z[:, 0] * (was.h - n), was.c)
    both = gates + back
    i, f, o = (gate[:, 0] for gate in jnp.split(jax.nn.sigmoid(both[:, :3]), 3, axis=1))
    c = f * was.c + i * jnp.tanh(both[:, 3])
    return CellState(o * jnp.tanh(c), c)


def flat(w: nnx.Param) -> Float[Array, "i o"]:
    """A weight as the scan multiplies by it."""
    return w[...].reshape(w[...].shape[0], -1)


def whole_state(h: Float[Array, "B u"]) -> Float[Array, "B U"]:
    """A state gathered from the devices that split it."""
    return relaid(h, INSIDE, OUTSIDE)


def blank(kind: CellKind, gates: Float[Array, "T B J u"]) -> CellState:
    """The state before the first token."""
    _, B, _, u = gates.shape
    return CellState(jnp.zeros((B, u), gates.dtype), jnp.zeros((B, u if kind == "lstm" else 0), gates.dtype))


# Encoder


class Read(NamedTuple):
    """A batch of sources as the encoder has read them."""

    states: Float[Array, "B S U"]  # of the last layer, at each token
    last: tuple[CellState, ...]  # of each layer, after the last token, whole
    mask: Float[Array, "B S"]  # 1 where a token stands


class Encoder(nnx.Module):
    """L layers that read the source one way or both ways."""

    def __init__(self, config: Seq2SeqConfig, key: Key):
        self.config = config
        ways = 2 if config.bidirectional else 1
        U, D = config.recurrent_dim, config.embed_dim
        keys = jax.random.split(key, config.num_layers * ways)
        self.layers = nnx.List(
            [
                Cell(config.cell, keys[number], inputs=U if number // ways else D, size=U // ways)
                for number in range(config.num_layers * ways)
            ]
        )

    def __call__(self, x: Float[Array, "B S D"], mask: Float[Array, "B S"], seeds: Seeds | None) -> Read:
        """What the source says, token by token and at its end."""
        config, own, last = self.config, gathered(self), []
        ways = [False, True] if config.bidirectional else [config.reversed_source]
        for number in range(config.num_layers):
            cells = list(own.layers)[number * len(ways) : (number + 1) * len(ways)]
            read = [
                read_through(config.cell, cell, x, mask, reverse=way) for cell, way in zip(cells, ways, strict=True)
            ]
            x = jnp.concatenate([states for states, _ in read], axis=-1)
            last.append(
                CellState(*(jnp.concatenate(parts, axis=-1) for parts in zip(*(end for _, end in read), strict=True)))
            )
            x = dropout(x, config.dropout, seeds, number + 1)
        return Read(x, tuple(last), mask)

    def looked(self, x: Float[Array, "B S D"], mask: Float[Array, "B S"], seeds: Seeds | None) -> tuple[Read, None]:
        """The same; a recurrence looks at nothing."""
        return self(x, mask, seeds), None


def read_through(
    kind: CellKind, cell: Cell, x: Float[Array, "B S D"], mask: Float[Array, "B S"], *, reverse: bool
) -> tuple[Float[Array, "B S U"], CellState]:
    """One layer, one way: its states and the last of them, whole. Padding leaves a state as it is."""
    gates, shown = cell.gates(x.swapaxes(0, 1)), mask.swapaxes(0, 1).astype(x.dtype)[..., None]
    if reverse:
        gates, shown = gates[::-1], shown[::-1]
    weights, bias = {"h": flat(cell.h)}, cell.h_bias[...].astype(x.dtype)
    end, states = recur(functools.partial(_read, kind), weights, bias, blank(kind, gates), (gates, shown))
    states = relaid(states, ("seq", *INSIDE), ("seq", *OUTSIDE))
    end = CellState(whole_state(end.h), whole_state(end.c) if kind == "lstm" else end.c)
    return (states[::-1] if reverse else states).swapaxes(0, 1), end


def _read(kind: CellKind, linear: Linear, bias, was: CellState, turn):
    gates, shown = turn
    back = linear("h", whole_state(was.h)).reshape(gates.shape) + bias[None]
    now = CellState(
        *(shown * new + (1 - shown) * old for new, old in zip(advanced(kind, gates, back, was), was, strict=True))
    )
    return now, now.h


# Decoder


class Encoded(NamedTuple):
    """A batch of sources as the decoder uses them; every array begins with B."""

    source: Source
    first: tuple[CellState, ...]  # the decoder's states before the first token, by layer
    context: Float[Array, "B U"]  # the one vector of the fixed context


class DecoderState(NamedTuple):
    """What the decoder carries from token to token; every array begins with B."""

    cells: tuple[CellState, ...]  # by layer
    fed: Float[Array, "B D"]  # the last attentional state, where it is read


class Told(NamedTuple):
    """What a turn of the decoder gives."""

    state: Float[Array, "B U"]  # of the last layer
    context: Float[Array, "B U"]
    weights: Float[Array, "B S"]
    hidden: Float[Array, "B D"]  # the attentional state, where it is fed back


class Decoder(nnx.Module):
    """L layers, of which the first reads the last token and, as the config has it, what it was told of the source."""

    def __init__(self, config: Seq2SeqConfig, key: Key):
        self.config = config
        cells, first, context, search, out = jax.random.split(key, 5)
        D, U, L = config.embed_dim, config.recurrent_dim, config.num_layers
        J, keys = GATES[config.cell], jax.random.split(cells, L)
        self.layers = nnx.List([Cell(config.cell, keys[l], inputs=U if l else D, size=U) for l in range(L)])
        self.first = nnx.List([matrix(k, (U, U), ("embed", "recurrent"), fan_in=U) for k in jax.random.split(first, L)])
        reads = config.kind == "fixed" or config.score == "additive"
        self.context = nnx.data(None)
        if reads or config.input_feeding:
            width = U if reads else D
            self.context = matrix(context, (width, J, U), ("embed", "gates", "recurrent"), fan_in=width)
        self.search = SoftSearch(config, search) if config.kind == "attention" else nnx.data(None)
        by_state, by_context, by_token = jax.random.split(out, 3)
        self.out_state = matrix(by_state, (U, D), ("embed", "rank"), fan_in=U)
        self.out_context = matrix(by_context, (U, D), ("embed", "rank"), fan_in=U)
        self.out_token = matrix(by_token, (D, D), ("embed", "rank"), fan_in=D) if reads else nnx.data(None)
        self.out_bias = constant(0.0, (D,), (None,))

    def encoded(self, read: Read) -> Encoded:
        """What the encoder read, as the turns need it: h_0 = tanh(W h) of its last state (arXiv:1406.1078, 2.2)."""
        source = Source(read.states, read.states, read.mask)
        if self.search is not None:
            source = self.search.source(read.states, read.mask)
        first = []
        for w, end in zip(self.first, read.last, strict=True):
            h = jnp.tanh(einsum("BU,UV->BV", end.h, w[...], out=INSIDE))
            first.append(CellState(h, relaid(end.c, OUTSIDE, INSIDE) if self.config.cell == "lstm" else end.c))
        return Encoded(source, tuple(first), read.last[-1].h)

    def __call__(self, read: Read, y: Float[Array, "B T D"], seeds: Seeds | None) -> Float[Array, "B T D"]:
        """Hidden states of all tokens of known targets."""
        return self.looked(read, y, seeds)[0]

    def looked(self, read: Read, y: Float[Array, "B T D"], seeds: Seeds | None) -> tuple[Float[Array, "B T D"], Looks]:
        """The same, and what each token looked at."""
        own = gathered(self)
        hidden, weights = own.hidden(own.encoded(read), y)
        looks = Looks() if self.config.kind == "fixed" else Looks(cross=weights[:, None, None])
        return dropout(hidden, self.config.dropout, seeds, 101), looks

    def hidden(self, encoded: Encoded, y: Float[Array, "B T D"]) -> tuple[Float[Array, "B T D"], Float[Array, "B T S"]]:
        """Without dropout, and the weights. What the scan need not wait for comes before or after it."""
        turn = functools.partial(_turn, self.config)
        gates = self._gates(encoded, y.swapaxes(0, 1))
        _, told = recur(turn, self._weights(), self._constants(encoded), self.start(encoded, 0), gates)
        told = Told(*(x.swapaxes(0, 1) for x in told))
        return self._finished(encoded, told, y)

    def _finished(
        self, encoded: Encoded, told: Told, y: Float[Array, "B T D"]
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T S"]]:
        """Hidden states and weights of T turns: what of them the turns themselves did not need."""
        config, context, weights = self.config, told.context, told.weights
        if config.input_feeding:
            return told.hidden, weights
        if config.kind == "fixed":
            (B, T, _), S = told.state.shape, encoded.source.mask.shape[1]
            context = jnp.broadcast_to(encoded.context[:, None], told.state.shape)
            weights = jnp.zeros((B, T, S), encoded.source.mask.dtype)
        elif not config.attends_in_scan:
            context, weights = self._search(encoded, told.state)
        return self._readout(told.state, context, y), weights

    def start(self, encoded: Encoded, length: int) -> DecoderState:
        """Before the first token; a state has room for any length."""
        B, dtype = encoded.context.shape[0], encoded.context.dtype
        return DecoderState(encoded.first, jnp.zeros((B, self.config.embed_dim), dtype))

    def step(
        self, encoded: Encoded, state: DecoderState, y: Float[Array, "B D"]
    ) -> tuple[Float[Array, "B D"], DecoderState, Float[Array, "B S"]]:
        """One token further: hidden state, what is carried on, and the weights over the source."""
        gates = self._gates(encoded, y[None])[0]
        state, told = _turn(self.config, linear_of(self._weights()), self._constants(encoded), state, gates)
        hidden, weights = self._finished(encoded, Told(*(x[:, None] for x in told)), y[:, None])
        return hidden[:, 0], state, weights[:, 0]

    def _gates(self, encoded: Encoded, y: Float[Array, "T B D"]) -> Float[Array, "T B J u"]:
        """The first layer's, of the tokens and of a context that does not change."""
        gates = self.layers[0].gates(y)
        if self.config.kind != "fixed":
            return gates
        assert self.context is not None
        return (
            gates
            + einsum("BU,UJV->BJV", encoded.context, self.context[...], out=("batch", None, "act_recurrent"))[None]
        )

    def _search(self, encoded: Encoded, states: Float[Array, "B T U"]):
        """Contexts and weights of many states at once."""
        assert self.search is not None
        queries = None
        if self.search.query is not None:
            queries = einsum("BTU,UV->BTV", states, self.search.query[...], out=("batch", "seq", "rank"))
        return attend(
            _energy(self.search), encoded.source, states, queries, score=self.config.score, window=self.config.window
        )

    def _readout(self, state, context, y) -> Float[Array, "B T D"]:
        """tanh(W s + C c + E y): what chooses the next token (arXiv:1409.0473, appendix A.2.2; arXiv:1508.04025, 5)."""
        names = ("batch", "seq", "act_embed")
        hidden = einsum("BTU,UD->BTD", state, self.out_state[...], out=names)
        hidden = hidden + einsum("BTU,UD->BTD", context, self.out_context[...], out=names)
        if self.out_token is not None:
            hidden = hidden + einsum("BTd,dD->BTD", y, self.out_token[...], out=names)
        return jnp.tanh(hidden + self.out_bias[...].astype(hidden.dtype)[None, None])

    def _weights(self) -> dict[str, Any]:
        """What a turn multiplies by."""
        weights = {f"h{l}": flat(cell.h) for l, cell in enumerate(self.layers)}
        weights |= {f"x{l}": flat(cell.x) for l, cell in enumerate(self.layers) if l}
        if self.config.attends_in_scan:
            assert self.search is not None
            assert self.context is not None
            weights["context"] = flat(self.context)
            if self.search.query is not None:
                weights["query"] = self.search.query[...]
        if self.config.input_feeding:
            weights |= {"out_state": self.out_state[...], "out_context": self.out_context[...]}
        return weights

    def _constants(self, encoded: Encoded) -> dict[str, Any]:
        """What every turn sees."""
        seen: dict[str, Any] = {"biases": [(cell.x_bias[...], cell.h_bias[...]) for cell in self.layers]}
        if self.config.attends_in_scan:
            assert self.search is not None
            seen |= {"source": encoded.source, "search": _energy(self.search)}
        if self.config.input_feeding:
            seen["out_bias"] = self.out_bias[...]
        return seen


def _energy(search: SoftSearch) -> dict[str, Any]:
    """The score's own vector, where it has one."""
    return {} if search.energy is None else {"energy": search.energy[...]}


def _turn(config: Seq2SeqConfig, linear: Linear, seen, was: DecoderState, gates: Float[Array, "B J u"]):
    """One token of the decoder."""
    B, J, u = gates.shape
    top = whole_state(was.cells[-1].h)
    context = weights = hidden = jnp.zeros((B, 0), gates.dtype)

    def back(l: int, h):
        return linear(f"h{l}", h).reshape(B, J, u) + seen["biases"][l][1].astype(gates.dtype)[None]

    if config.attends_in_scan and config.score == "additive":  # c_t from s_{t-1}, then s_t from c_t
        context, weights = _looked(config, linear, seen, top)
        gates = gates + linear("context", context).reshape(B, J, u)
    if config.input_feeding:
        gates = gates + linear("context", was.fed).reshape(B, J, u)
    cells, x = [], top
    for l, cell in enumerate(was.cells):
        if l:
            gates = linear(f"x{l}", x).reshape(B, J, u) + seen["biases"][l][0].astype(x.dtype)[None]
        h = top if l == len(was.cells) - 1 else whole_state(cell.h)
        cells.append(advanced(config.cell, gates, back(l, h), cell))
        x = whole_state(cells[-1].h)
    fed = was.fed
    if config.input_feeding:  # c_t from s_t, then h~_t
        context, weights = _looked(config, linear, seen, x)
        mixed = linear("out_state", x) + linear("out_context", context)
        fed = hidden = jnp.tanh(mixed + seen["out_bias"].astype(mixed.dtype)[None])
    return DecoderState(tuple(cells), fed), Told(x, context, weights, hidden)


def _looked(config: Seq2SeqConfig, linear: Linear, seen, state: Float[Array, "B U"]):
    """Context and weights of one state."""
    queries = linear("query", state)[:, None] if config.score in ("additive", "local") else None
    context, weights = attend(
        seen["search"], seen["source"], state[:, None], queries, score=config.score, window=config.window
    )
    return context[:, 0], weights[:, 0]
