import numpy as np
import pytest

from models.policy import build_policy
from rspo_jax import mesh
from rspo_jax.types import Layout
from tests.support import tiny


@pytest.mark.parametrize(
  ("shape", "message"),
  [({"data": 3}, "does not cover 8 devices"), ({"model": 8}, "unknown"), ({"data": -1, "fsdp": -1}, "does not cover")],
)
def test_impossible_meshes_are_refused(shape, message):
  with pytest.raises(ValueError, match=message):
    mesh.make_layout(shape)


def test_axis_of_size_minus_one_takes_the_remaining_devices():
  layout = mesh.make_layout({"expert": 2, "data": -1})
  assert dict(layout.mesh.shape) == {"data": 4, "fsdp": 1, "expert": 2, "tensor": 1}
  assert isinstance(layout, Layout) and layout.batch_shards == 8


def test_error_names_parameters_and_rows_that_do_not_divide_over_the_mesh():
  layout = mesh.make_layout({"tensor": 8})
  with pytest.raises(ValueError, match=r"'attention.*'key'.*\n"):
    mesh.param_shardings(build_policy(tiny.CONFIG, layout), layout)
  with pytest.raises(ValueError, match="6 rows do not divide over the 8 batch shards"):
    mesh.put_batch(np.zeros((6, 2)), mesh.make_layout())
