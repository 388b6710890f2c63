"""Use from Python: `from tune2gguf import run_recipe, export_run, ask`."""

import subprocess

import pytest
import yaml

from tests.conftest import make_run_arguments


def test_a_program_trains_exports_and_asks(tiny_base, tmp_path):
    from tune2gguf import ask, export_run, run_recipe

    _, config, *words = make_run_arguments(tmp_path, tiny_base)
    overrides = {key: yaml.safe_load(value) for key, value in (word.split("=", 1) for word in words)}
    run_dir = run_recipe(config, overrides)
    assert run_dir == tmp_path / "runs" / "tiny" and (run_dir / "best").is_dir()
    paths = export_run(run_dir, quantizations=["F32"], show=False).list_paths()
    assert paths[0].suffix == ".gguf" and paths[0].is_file()
    assert ask(run_dir, "When does the ferry leave?", max_tokens=4)
    with pytest.raises(subprocess.CalledProcessError):
        run_recipe(config, overrides)  # a run never overwrites another
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        import tune2gguf

        tune2gguf.nothing  # noqa: B018
