"""proof.json: the check that exported files serve the trained model, and the loss of each export step."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tune2gguf.files.atomic import write_json
from tune2gguf.files.json_files import read_json
from tune2gguf.files.records import make_record
from tune2gguf.runs.files import PROOF_FILE


@dataclass(frozen=True)
class ProofRecord:
    """The content of proof.json.

    Attributes:
        passed: True if there are no failures
        rows, supervised_tokens: number of measured validation rows, and of their supervised tokens
        steps: base, adapter, merged, each type, and `TYPE + adapter` for an adapter's GGUF beside the base -> loss
            in nats, its increase over the adapter's as a fraction, KL divergence to the adapter's model in nats, share
            of tokens with the same likeliest token
        lost_most: the step that raised the loss most
        merge: the base merged into, if there were two candidates; else None
        general: the same steps on the base's own answers to general prompts -> loss, its increase over the base's and
            KL divergence from the base, in nats with their 95 % intervals, and top1; empty if the run scored none
        general_prompts: number of general prompts
        served_by_llama_cpp: type, or `TYPE + adapter` -> llama.cpp's results on the same conversations
    """

    passed: bool
    failures: list[str]
    rows: int
    supervised_tokens: int
    losses_computed_by: str
    steps: dict[str, dict[str, float]]
    lost_most: str
    merge: str | None
    served_by_llama_cpp: dict[str, dict[str, Any]]
    general: dict[str, dict[str, float]] = field(default_factory=dict)
    general_prompts: int = 0


def write_proof(export_dir: Path, proof: ProofRecord) -> None:
    """Write proof.json."""
    write_json(export_dir / PROOF_FILE, asdict(proof))


def read_proof(export_dir: Path) -> ProofRecord | None:
    """Read proof.json; None if it is missing.

    Raises:
        ValueError: if it is damaged
    """
    path = export_dir / PROOF_FILE
    if not path.is_file():
        return None
    return read_json(path, partial(make_record, ProofRecord))
