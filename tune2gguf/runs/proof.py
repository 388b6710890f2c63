"""proof.json: whether exported files serve what was trained, and what each step cost."""

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
        passed: whether there are no failures
        rows, supervised_tokens: of validation rows that the losses were measured on
        steps: base, adapter, merged, each type, and `TYPE + adapter` for an adapter's GGUF beside the base -> loss
            in nats, its increase over the adapter's as a fraction, KL divergence to the adapter's model in nats, share
            of tokens with the same likeliest token
        lost_most: the step that raised the loss most
        merge: which of two possible bases was merged into; None where there was one
        general: the same steps on the base's own answers to general prompts -> loss, its increase over the base's and
            KL divergence from the base, in nats with their 95 % intervals, and top1; empty where the run scored none
        general_prompts: how many there are
        served_by_llama_cpp: type, or `TYPE + adapter` -> what llama.cpp made of the same conversations
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
    """Read proof.json; None where there is none.

    Raises:
        ValueError: if it is not readable
    """
    path = export_dir / PROOF_FILE
    if not path.is_file():
        return None
    return read_json(path, partial(make_record, ProofRecord))
