"""torch's compiler is imported when something needs it, and then is the real one."""

import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY

PROGRAM = """
import sys, torch
from tune2gguf.machine.compiler import is_postponed, postpone_compiler

postpone_compiler()
weight = torch.nn.Parameter(torch.ones(2))

@torch.compiler.disable
def double(x):
    return 2 * x

optimizer = torch.optim.AdamW([weight], lr=0.5, weight_decay=0.0)
double(weight).sum().backward()
optimizer.step()
optimizer.zero_grad()
assert is_postponed() and weight.grad is None
torch.testing.assert_close(weight.data, torch.tensor([0.5, 0.5]))
weight.data.fill_(0.5)
"""
USES = {
    "a module": "from torch._dynamo.utils import counters\nassert torch._dynamo.utils.counters is counters",
    "a name": "from torch._dynamo import OptimizedModule\nassert OptimizedModule is torch._dynamo.OptimizedModule",
    "an attribute": "torch._dynamo.reset()",
    "torch.compile": "assert torch.compile(lambda x: x + 1, backend='eager')(weight).tolist() == [1.5, 1.5]",
}
WHAT_IS_DISABLED_STAYS_SO = """
graphs = []

def keep(graph, inputs):
    graphs.append(graph.code)
    return graph.forward

assert torch.compile(lambda x: double(x + 1) + 1, backend=keep)(weight).tolist() == [4.0, 4.0]
assert len(graphs) == 2 and not any("2" in code and "*" in code for code in graphs), graphs
assert torch.compile(lambda x: 2 * x + 1, backend=keep)(weight).tolist() == [2.0, 2.0]
assert "*" in graphs[-1], "negative control: " + graphs[-1]
"""


def run(program: str) -> None:
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_an_optimizer_does_without_the_compiler_and_whatever_needs_it_gets_the_real_one(use):
    run(f"{PROGRAM}\n{use}\nassert not is_postponed() and torch._dynamo.__file__ and torch._dynamo.eval_frame")


@pytest.mark.slow
def test_what_must_not_be_compiled_is_not_compiled_afterwards():
    run(PROGRAM + WHAT_IS_DISABLED_STAYS_SO)


@pytest.mark.slow
def test_a_compiler_that_is_there_already_stays():
    run(
        "import torch._dynamo as before, torch\nfrom tune2gguf.machine.compiler import postpone_compiler\n"
        "postpone_compiler()\nassert torch._dynamo is before"
    )
