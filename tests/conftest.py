"""Strict mode for every test: eight CPU devices, no silent broadcasting of ranks or dtypes."""

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
