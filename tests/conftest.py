"""Eight virtual CPU devices for every test, so that meshes are tested without hardware."""

import jax

jax.config.update("jax_num_cpu_devices", 8)
