"""Only torchtune gets torchao's names from this package, and its import stays small."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import REPOSITORY
from tune2gguf.model import torchao_names

NEWEST, OLD = "torchao of now", "torchao of then"


@pytest.fixture
def torchao_of(tmp_path):
    """Write a fake torchao of a given kind, and return the folder for the path."""

    def write(kind: str) -> Path:
        package = tmp_path / "site" / "torchao"
        (package / "dtypes").mkdir(parents=True)
        (package / "__init__.py").write_text(f"kind = {kind!r}\n")
        (package / "dtypes" / "__init__.py").touch()
        if kind == OLD:
            names = "class NF4Tensor: pass\nlinear_nf4 = to_nf4 = None\ndef implements(operators): return lambda f: f\n"
            (package / "dtypes" / "nf4tensor.py").write_text(names)
        return package.parent

    return write


def run_python(program: str, *, path: Path | None = None) -> str:
    paths = [str(part) for part in (path, REPOSITORY, os.environ.get("PYTHONPATH")) if part]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


OURS_FIRST = """
import sys
import tune2gguf.base.load
from torchtune import training
from torchtune.modules import common_utils
print("torchao" in sys.modules, common_utils.NF4Tensor.__module__)
import torchao
print(torchao.kind)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", [NEWEST, OLD])
def test_a_users_own_import_finds_the_torchao_that_torchtune_did_not_get(torchao_of, kind):
    assert run_python(OURS_FIRST, path=torchao_of(kind)) == f"False tune2gguf.model.nf4_tensor\n{kind}"


ON_A_GPU = """
import torch
torch.cuda.is_available, torch.cuda.get_device_capability = lambda: True, lambda *device: (9, 0)
torch.compile = lambda *args, **kwargs: print("called")
import tune2gguf.model.lora
from torchtune.modules import attention_utils
print(attention_utils.__name__)
"""


@pytest.mark.slow
def test_the_compiler_is_not_called_for_an_attention_that_is_not_used():
    assert run_python(ON_A_GPU) == "torchtune.modules.attention_utils"


NO_TORCHAO = """
import sys
sys.modules["torchao"] = None  # as where it is not installed
from torchtune._cli.tune import TuneCLIParser
import tune2gguf.base.load
from torchtune import training, utils
from torchtune.modules import common_utils
print(common_utils.NF4Tensor.__module__)
"""


@pytest.mark.slow
def test_torchao_is_not_needed():
    assert run_python(f"import tune2gguf.model.lora\n{NO_TORCHAO}") == "tune2gguf.model.nf4_tensor"


@pytest.mark.parametrize("kind, is_ours", [(NEWEST, True), (OLD, False)])
def test_torchtune_without_this_package_keeps_a_torchao_that_it_can_import(torchao_of, kind, is_ours):
    program = "from tune2gguf._local_recipes import LeanTorchtune as f; f.find_spec('torchtune'); print(f.is_needed)"
    assert run_python(program, path=torchao_of(kind)) == str(is_ours)


@pytest.mark.slow
def test_torchtunes_own_4_bit_layer_computes_with_our_weight():
    from torchtune.modules.low_precision import FrozenNF4Linear

    torch.manual_seed(0)
    layer = FrozenNF4Linear(256, 128, dtype=torch.float32)
    rows = torch.randn(3, 256).requires_grad_()
    dense = layer.weight.dequantize(torch.float32)
    torch.testing.assert_close(layer(rows), rows @ dense.T)
    (gradient,) = torch.autograd.grad(layer(rows).sum(), rows)
    torch.testing.assert_close(gradient, dense.sum(dim=0).expand(3, -1))


def test_quantizers_of_torchao_say_that_they_are_not_there():
    with pytest.raises(ImportError, match="torchao's int4_weight_only is not available under tune2gguf"):
        torchao_names.int4_weight_only(32)
    with pytest.raises(ValueError, match="block_size=32, scaler_block_size=256: only 64 and 256 are supported"):
        torchao_names.to_nf4(torch.ones(4, 64), block_size=32)
