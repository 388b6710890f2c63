"""Export a run: merge its adapter into the base, write GGUF, Modelfile and model card to the run's export folder."""

from __future__ import annotations

import argparse
import sys

from tune2gguf.commands import expand_path
from tune2gguf.export.merge_choice import MERGE_BASES
from tune2gguf.export.modelfile import DEFAULT_TEMPERATURE
from tune2gguf.export.pipeline import DEFAULT_VALIDATION_ROWS, Export, export_run
from tune2gguf.ggml.types import QUANTIZATIONS
from tune2gguf.runs.files import PROOF_FILE
from tune2gguf.runs.proof import ProofRecord
from tune2gguf.serve.ollama import Ollama, ask_as_proven, check_ollama_name, find_ollama, format_answers


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Exit code 1 if the proof fails. A run without validation rows is exported without a proof, and not "
        "handed to Ollama.",
    )
    parser.add_argument("run", type=expand_path, help="folder of a finished run, such as runs/quickstart")
    parser.add_argument(
        "--quantization",
        nargs="+",
        action="extend",
        metavar="TYPE",
        help=f"one or more of {', '.join(QUANTIZATIONS)}; default: the run's own",
    )
    parser.add_argument("--adapter", choices=("best", "last"), help="default: best if there is one, else last")
    parser.add_argument(
        "--adapter-gguf",
        action="store_true",
        help="also write the adapter as a GGUF, its base as a GGUF of the first type, and Modelfile-adapter",
    )
    parser.add_argument("--merged-hf", action="store_true", help="also write the merged model as a Hugging Face folder")
    parser.add_argument("--base-dir", type=expand_path, help="the base folder, if it has moved since the run")
    parser.add_argument(
        "--merge-base",
        choices=MERGE_BASES,
        help="the base to merge into after 4-bit training; default: the one with the lower validation loss",
    )
    parser.add_argument(
        "--original-base",
        type=expand_path,
        metavar="DIR",
        help="the 16-bit weights of a 4-bit base; default: beside it",
    )
    importance = parser.add_mutually_exclusive_group()
    importance.add_argument(
        "--imatrix",
        type=expand_path,
        metavar="FILE",
        help="importance matrix to quantize with, as llama-imatrix writes it; default: one of the training rows, for "
        "types that have a lower validation loss with it",
    )
    importance.add_argument("--no-imatrix", action="store_true", help="quantize without an importance matrix")
    parser.add_argument(
        "--ollama",
        metavar="NAME",
        help="create the model in Ollama and ask it the proof's questions; only if proven, or with --proof-rows 0",
    )
    parser.add_argument(
        "--proof-rows",
        type=int,
        default=DEFAULT_VALIDATION_ROWS,
        help="validation rows to prove the files on; 0: no proof",
    )
    parser.add_argument(
        "--max-loss-increase",
        type=float,
        default=0.05,
        help="accepted increase of the validation loss over the trained model's; 0.05 = 5 %%",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=DEFAULT_TEMPERATURE,
        help="the Modelfile's; default: %(default)g, the most probable tokens, which the proof checks",
    )
    parser.add_argument("--force", action="store_true", help="replace files of an earlier export")
    parser.add_argument("--threads", type=int, help="threads to quantize and prove with; default: all cores")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if not arguments.max_loss_increase >= 0:  # nor NaN
        raise ValueError(f"--max-loss-increase must be at least 0, got {arguments.max_loss_increase:g}")
    ollama = None if arguments.ollama is None else open_ollama(arguments.ollama)
    export = export_run(
        arguments.run,
        quantizations=arguments.quantization,
        adapter=arguments.adapter,
        base_dir=arguments.base_dir,
        merge_base=arguments.merge_base,
        original_base_dir=arguments.original_base,
        num_validation_rows=arguments.proof_rows,
        with_adapter_gguf=arguments.adapter_gguf,
        with_merged_hf=arguments.merged_hf,
        imatrix=arguments.imatrix,
        with_importance=not arguments.no_imatrix,
        temperature=arguments.temperature,
        overwrite=arguments.force,
        num_threads=arguments.threads,
    )
    print("\n".join([*map(str, export.list_paths()), *export.importance.describe()]))
    proof = None if arguments.proof_rows == 0 else show_proof(export, arguments)
    is_refused = proof is not None and not proof.passed
    if ollama is not None and arguments.proof_rows > 0 and (proof is None or is_refused):
        print(f"not handed to Ollama as {arguments.ollama}, because it is not proven")
        is_refused = True
    elif ollama is not None:
        ollama.create_model(arguments.ollama, export.served)
        answers = ask_as_proven(ollama, arguments.ollama, export, proof)
        print(format_answers(arguments.ollama, ollama.version, answers))
    if is_refused:
        sys.exit(1)


def open_ollama(name: str) -> Ollama:
    """Return the running Ollama, before anything slow; print a warning if it has a model of this name."""
    check_ollama_name(name)
    ollama = find_ollama()
    if ollama.has_model(name):
        print(f"{name} is in Ollama already and will be replaced")
    return ollama


def show_proof(export: Export, arguments: argparse.Namespace) -> ProofRecord | None:
    """Prove the export, print the result and return it; None without validation rows."""
    # Imported here because it imports torch, which an export without proof does not need.
    from tune2gguf.serve.proof import format_table, prove_export

    proof = prove_export(
        export,
        num_rows=arguments.proof_rows,
        max_loss_increase=arguments.max_loss_increase,
        num_threads=arguments.threads,
    )
    if proof is None:
        print("not proven: the run has no validation rows (dataset.validation_files or dataset.validation_split)")
    else:
        print(f"{export.run.export_dir / PROOF_FILE}\n\n{format_table(proof)}")
    return proof
