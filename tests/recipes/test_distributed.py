"""Several processes: the same steps and the same result as one, with a replicated or a sharded model."""

import json
import signal
from pathlib import Path

import pytest
import torch

from tests.conftest import make_conversations, write_rows
from tests.recipes.launch import Launch, count_lines, read_outcome, run_to_end
from tests.recipes.test_resume import HARD
from tests.recipes.test_training import measure_difference, read_records
from tune2gguf.runs.run import Run


@pytest.mark.parametrize("base", ["fp32", "bf16", "fp8", "nf4"])
def test_shard_equals_replicate(run_arguments, wide_base, tmp_path, base):
    precision = {"fp32": ["dtype=fp32", "base_weights=fp32"], "bf16": ["dtype=bf16", "base_weights=bf16"]}
    precision |= {kind: ["dtype=fp32", f"base_weights={kind}"] for kind in ("fp8", "nf4")}
    arguments = [*run_arguments, *precision[base], f"base_dir={wide_base}", "batch_size=2", "learning_rate=0.01"]
    arguments += ["gradient_accumulation_steps=2", "score_general_prompts=true"]
    for parallel in ("replicate", "shard"):
        folder = tmp_path / parallel
        run_to_end(
            [*arguments, f"output_dir={folder}", f"parallel={parallel}"], tmp_path / f"{parallel}.log", num_processes=2
        )
        newest = max((folder / "checkpoints").iterdir(), key=lambda path: path.stat().st_mtime)
        assert json.loads((newest / "progress.json").read_text())["run"]["parallel"] == parallel
    assert measure_difference(tmp_path / "replicate", tmp_path / "shard") < 1e-5
    for key in ("loss", "val_loss", "grad_norm"):
        found = [[record.get(key) for record in read_records(tmp_path / name, key)] for name in ("replicate", "shard")]
        assert found[0] == pytest.approx(found[1], rel=1e-5)
    lost = [Run(tmp_path / name).forgetting for name in ("replicate", "shard")]
    assert [one.answer_ids for one in lost[0].answers] == [one.answer_ids for one in lost[1].answers]
    assert lost[0].divergence.value == pytest.approx(lost[1].divergence.value, rel=1e-3) and lost[0].divergence.low > 0


def test_processes_of_a_machine_share_the_pages_of_the_base(run_arguments, wide_base, tmp_path):
    """Every process maps the file, and memory has its pages once."""
    folder, log = tmp_path / "runs/tiny", tmp_path / "log"
    stored = ["base_weights=fp32", f"base_dir={wide_base}", "epochs=50"]
    launch = Launch([*run_arguments, *stored], log, num_processes=2)
    launch.wait_until(lambda: count_lines(folder / "metrics.jsonl") >= 3)
    mapped = [measure_map(process.pid, wide_base / "model.safetensors") for process in launch.processes]
    launch.kill()
    for resident, proportional in mapped:
        # Norms, and q and k, whose rows are permuted, are read instead of mapped: 22 % of this base.
        assert resident > 0.7 * (wide_base / "model.safetensors").stat().st_size
        assert proportional < 0.6 * resident


def measure_map(pid: int, path: Path) -> tuple[int, int]:
    """Return a file's bytes in a process's memory, and its share of them, as shared pages are divided."""
    sizes, is_wanted = {"Rss": 0, "Pss": 0}, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        name, *values = line.split()
        if not name.endswith(":"):
            is_wanted = line.endswith(str(path))
        elif is_wanted and name[:-1] in sizes:
            sizes[name[:-1]] += int(values[0]) * 1024
    return sizes["Rss"], sizes["Pss"]


SEED = 8  # its first step has three long rows, two of them in one of two processes


def make_unequal_rows(count: int) -> list[dict]:
    """Return rows whose replies have from one to sixty words."""
    rows = make_conversations(count)
    for number, row in enumerate(rows):
        row["messages"][1]["content"] = "Tea. " * (1 + 59 * (number % 7 == 0))
    return rows


def test_losses_and_adapter_do_not_depend_on_the_processes(run_arguments, tiny_base, tmp_path):
    """1 x 8 = 2 x 4 = 4 x 2 = 8 x 1 rows. 19 rows leave a last step of 3, in which some processes have no row."""
    train = write_rows(tmp_path / "unequal.jsonl", make_unequal_rows(19))
    arguments = [*run_arguments, f"dataset.files=[{train}]", "max_seq_len=512", "epochs=2", f"seed={SEED}"]
    cases = [(1, "replicate"), (2, "replicate"), (4, "replicate"), (4, "shard"), (8, "replicate"), (8, "shard")]
    folders = {(size, parallel): tmp_path / f"{size}-{parallel}" for size, parallel in cases}
    for (size, parallel), folder in folders.items():
        cut = [f"batch_size={8 // size}", f"parallel={parallel}", f"output_dir={folder}"]
        run_to_end([*arguments, *cut], folder.with_suffix(".log"), num_processes=size)
    alone = folders[1, "replicate"]
    for folder in folders.values():
        assert measure_difference(alone, folder) < 1e-5
        for key in ("loss", "val_loss"):
            one, other = ([record[key] for record in read_records(run, key)] for run in (alone, folder))
            assert one == pytest.approx(other, abs=1e-5)
    # Negative control: the mean of the processes' means is not the mean over the step's tokens.
    losses = measure_first_step(tiny_base, train, num_processes=2)
    own = [one.mean() for one in losses]
    first = read_records(folders[2, "replicate"], "loss")[0]["loss"]
    assert first == pytest.approx(float(torch.cat(losses).mean()), abs=1e-5)
    assert abs(first - float(sum(own) / 2)) > 1e-3


def measure_first_step(base_dir: Path, train: Path, *, num_processes: int) -> list[torch.Tensor]:
    """Return the base's losses of the supervised tokens in the first step, by process."""
    from tune2gguf.base.load import load_base
    from tune2gguf.data import chat_dataset, collate, plan_epoch
    from tune2gguf.model.llama import lora_llama
    from tune2gguf.model.lora import initialize_adapters
    from tune2gguf.tokenizer.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(base_dir, chat_template="chatml")
    data = chat_dataset([str(train)], tokenizer=tokenizer, max_seq_len=512, seed=SEED)
    model = lora_llama(
        str(base_dir),
        architecture=None,
        lora_rank=4,
        lora_alpha=4,
        lora_dropout=0.0,
        lora_attn_modules=["q_proj"],
        apply_lora_to_mlp=False,
        max_seq_len=512,
    )
    load_base(model, str(base_dir), device=torch.device("cpu"), base_weights="fp32", show=False)
    initialize_adapters(model, SEED)
    how = {"seed": SEED, "epoch": 0, "rows_per_step": 8, "world_size": num_processes}
    shares = [plan_epoch(data.sequence_lengths, **how, rank=rank)[0] for rank in range(num_processes)]
    with torch.no_grad():
        return [model(**vars(collate([data.sequences[row] for row in share]))) for share in shares]


@pytest.mark.parametrize(
    ("size", "parallel"),
    [
        (2, "replicate"),
        (2, "shard"),
        (4, "shard"),
        (8, "replicate"),
    ],
)
def test_processes_killed_and_resumed_equal_never_stopped(run_arguments, tmp_path, size, parallel):
    """Each process draws its own dropout masks and restores its own random state. One process is killed."""
    arguments = [*run_arguments, *HARD, "save_every_n_steps=1", f"parallel={parallel}", "batch_size=1"]
    arguments += [f"gradient_accumulation_steps={max(1, 4 // size)}"]
    run_to_end([*arguments, f"output_dir={tmp_path / 'whole'}"], tmp_path / "whole.log", num_processes=size)
    arguments += [f"output_dir={tmp_path / 'killed'}", "resume=auto"]
    metrics, log = tmp_path / "killed/metrics.jsonl", tmp_path / "killed.log"
    for rank, lines in ((size - 1, 3), (0, 8)):
        launch = Launch(arguments, log, num_processes=size)
        launch.wait_until(lambda lines=lines: count_lines(metrics) >= lines)
        launch.signal(signal.SIGKILL, rank=rank)
        codes = launch.wait(timeout=30)
        assert codes.pop(rank) == -signal.SIGKILL and set(codes) == {1}, log.read_text()
    assert log.read_text().count("error: another process of the run is gone") == 2
    assert "Traceback" not in log.read_text()
    run_to_end(arguments, log, num_processes=size)
    assert read_outcome(tmp_path / "killed") == read_outcome(tmp_path / "whole")
