"""What a layer keeps for its backward pass, by name, and what it computes again or lets wait in host memory.

full       the layer's input alone
attention  and what attention returned, with its log-sum-exp: its kernel runs once a step
dots       the results of matrix products
minimal    queries, keys, values, attention's result and the two halves of the FFN; not what one product or norm away
none       everything
"""

from collections.abc import Callable

import jax

from model.config import KEPT, ModelConfig


def rematerialized(layer: Callable, config: ModelConfig) -> Callable:
    """The layer under the policy of `config.remat`; `remat_save` keeps more, `remat_offload` in host memory."""
    policies = jax.checkpoint_policies
    if config.remat == "none":
        return layer
    if config.remat == "dots":
        kept = policies.save_only_these_names(*KEPT["dots"], *config.remat_save)
        policy = policies.save_from_both_policies(policies.dots_with_no_batch_dims_saveable, kept)
    else:
        names = dict.fromkeys((*KEPT[config.remat], *config.remat_save))
        policy = policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[name for name in names if name not in config.remat_offload],
            names_which_can_be_offloaded=list(config.remat_offload),
            offload_src="device",
            offload_dst="pinned_host",
        )
    return jax.checkpoint(layer, policy=policy, prevent_cse=not config.scan_layers)
