"""What an engine of given options has room for: lengths, blocks, the size of a step. Imports no jax."""

from inference.config import EngineConfig
from inference.scheduler import Kind, Limits
from model.config import ModelConfig

TILE = 16  # Q, tokens of one prompt that stand together


def limits_of(config: ModelConfig, options: EngineConfig) -> Limits:
    """What one step can hold."""
    tiles = max(1, options.chunk // TILE)
    return Limits(options.max_rows, options.block_size, TILE, tiles, most_tokens(config, options))


def most_tokens(config: ModelConfig, options: EngineConfig) -> int:
    """Tokens of a sequence: what the model takes, the options allow and the cache holds."""
    asked = options.max_length or config.max_length
    if asked > config.max_length:
        raise ValueError(f"engine.max_length={asked} is more than the model's context of {config.max_length} tokens")
    return min(asked, max(options.cache_tokens, 2 * options.block_size) - options.block_size)


def kinds_of(config: ModelConfig, options: EngineConfig) -> list[Kind]:
    """The kinds of layers that a model has, with as many blocks as hold the cache's tokens."""
    num = -(-max(options.cache_tokens, 2 * options.block_size) // options.block_size) + 1
    windows = {"global": None, "window": config.window}
    return [Kind(kind, windows[kind], num) for kind in sorted(set(config.layer_kinds))]
