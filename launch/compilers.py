"""The compilers for chips that are not here: libtpu, and jax's plugin for CUDA. Both run on any CPU machine."""

import importlib.util
import os
from pathlib import Path

from launch.topologies import Topology
from qwen_jax.errors import InputError

H100 = Path(__file__).with_name("h100.txtpb")
INSTALL = "pip install -e '.[aot]'"


def find(topology: Topology) -> None:
    """Lets jax find the compiler for a topology's chips; before jax starts a backend.

    Raises:
      InputError: where it is not installed.
    """
    os.environ |= dict(JAX_PLATFORMS="cpu", TF_CPP_MIN_LOG_LEVEL="3", TPU_MIN_LOG_LEVEL="3", TPU_STDERR_LOG_LEVEL="3")
    if topology.of_chip.platform == "tpu":
        try:
            import libtpu
        except ImportError:
            raise InputError(f"libtpu, the compiler for TPUs, is not installed; {INSTALL}") from None
        os.environ |= dict(TPU_LIBRARY_PATH=libtpu.get_library_path(), TPU_SKIP_MDS_QUERY="1")
        os.environ |= dict(
            TPU_ACCELERATOR_TYPE="v5p-8", TPU_WORKER_HOSTNAMES="localhost", TPU_WORKER_ID="0"
        )  # asked for
        os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "true"
    elif importlib.util.find_spec("jax_cuda12_plugin") is None:
        raise InputError(f"jax's plugin for CUDA, the compiler for GPUs, is not installed; {INSTALL}")
    else:
        os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"


def devices(topology: Topology) -> list:
    """Returns the devices of a topology, to make a mesh of and compile for; none of them exists here.

    Raises:
      InputError: where the compiler is not installed, or knows no such slice.
    """
    find(topology)
    import jax
    from jax.experimental import topologies

    jax.config.update("jax_platforms", "cpu")
    try:
        if topology.of_chip.platform == "cuda":
            how = dict(topology_name=topology.chip, target_config=H100.read_text(), topology=f"1x{topology.shape}")
            return topologies.get_topology_desc(platform="cuda", **how).devices
        how = {"num_slices": topology.slices} if topology.slices > 1 else {}
        how |= {"chip_config_name": topology.of_chip.variant} if topology.of_chip.variant else {}
        found = topologies.get_topology_desc(platform="tpu", topology_name=f"{topology.chip}:{topology.shape}", **how)
        return found.devices
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        raise InputError(f"the compiler knows no {topology.name!r}: {str(error).splitlines()[0][:200]}") from None
