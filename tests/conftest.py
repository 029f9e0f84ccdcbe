"""Eight virtual CPU devices for every test, to test meshes without hardware; LLVM's expensive passes are disabled."""

import os

# Compiling is most of what these tests cost, and tiny models run fast whatever the code: a third less CPU time.
# Runs that tests start in processes of their own compile as users' do.
os.environ["XLA_FLAGS"] = " ".join(
  [os.environ.get("XLA_FLAGS", ""), "--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
).strip()

import jax

jax.config.update("jax_num_cpu_devices", 8)
