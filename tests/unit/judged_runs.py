"""Run folders with given curves, as the recipe leaves them, without a model."""

import json
from pathlib import Path

from omegaconf import OmegaConf

from tests.conftest import REPOSITORY
from tune2gguf.config import read_config
from tune2gguf.data.ledger import RowLedger
from tune2gguf.runs.config_file import write_config
from tune2gguf.runs.curves import Curves


def write_run(
    run_dir: Path, curves: Curves, *overrides: str, heldout: str = "question", fingerprint: str = "f"
) -> Path:
    """Write config.yaml, data.json, environment.json, heldout.jsonl and metrics.jsonl of a finished run.

    Args:
        heldout: what the validation rows ask; another text makes them other rows
    """
    run_dir.mkdir(parents=True)
    overrides = ("base_dir=nowhere", f"output_dir={run_dir}", *overrides)
    write_config(run_dir, read_config(REPOSITORY / "examples/quickstart/lora.yaml", list(overrides)))
    rows = curves.final.rows if curves.final else 0
    split = {"rows": 100, "tokens": 6000, "supervised_tokens": 3000}
    data = {
        **dict.fromkeys(RowLedger.__required_keys__, 0),
        "fingerprint": fingerprint,
        "training": split,
        "validation": split | {"rows": rows},
        **{key: [] for key in ("notes", "files", "rows_truncated", "rows_dropped")},
    }
    (run_dir / "data.json").write_text(json.dumps(data))
    (run_dir / "environment.json").write_text(json.dumps({"started": "2026-01-01T10:00:00+00:00"}))
    lines = [{"source": f"a:{row}", "messages": [], "text": f"{heldout} {row}"} for row in range(rows)]
    (run_dir / "heldout.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    records = [
        {
            "step": one.step,
            "epoch": one.epoch,
            "val_loss": one.loss,
            "val_low": one.loss - 0.1,
            "val_high": one.loss + 0.1,
            "val_rows": one.rows,
            "val_tokens": one.tokens,
            "val_row_losses": one.row_losses,
            "val_row_tokens": one.row_tokens,
            "val_row_indices": one.row_indices or tuple(range(one.rows)),
        }
        for one in curves.validations
    ]
    records += [
        {
            "step": step.step,
            "epoch": step.epoch,
            "loss": step.loss,
            "lr": step.lr,
            "tokens_per_second": 1000.0,
            "peak_memory_bytes": 2_000_000_000,
        }
        for step in curves.training
    ]
    records.sort(key=lambda record: record["step"])
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (run_dir / "last").mkdir()
    return run_dir


def read_resolved(run_dir: Path) -> dict:
    return OmegaConf.to_container(OmegaConf.load(run_dir / "config.yaml"), resolve=True)
