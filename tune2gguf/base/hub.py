"""Downloads of base folders from Hugging Face's hub: needed files only, resumable, every digest checked."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers
from huggingface_hub.utils.sha import git_hash

from tune2gguf.base.checkpoint import open_base
from tune2gguf.base.digest import RECORD_FILE
from tune2gguf.base.safetensors_file import INDEX_FILE, SINGLE_FILE
from tune2gguf.files.atomic import publish, refuse_existing, write_json
from tune2gguf.files.digest import digest_file, digest_file_once
from tune2gguf.tokenizer.tokenizer import TOKENIZER_FILES

SHARD_NAME = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
CONFIGS = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json")
FREE_DISK_MARGIN = 1.01
# The HTTP library's base error: huggingface_hub 0 uses requests, later ones httpx, whose error is no OSError.
_HTTP_ERRORS = [base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError"]

# Gated repositories and their ungated 4-bit counterparts, with the config that uses them.
UNGATED_ALTERNATIVES = {
    "meta-llama/llama-3.2-1b-instruct": ("unsloth/Llama-3.2-1B-Instruct-bnb-4bit", "configs/llama3_2_1b/qlora.yaml"),
    "meta-llama/llama-3.2-3b-instruct": ("unsloth/Llama-3.2-3B-Instruct-bnb-4bit", "configs/llama3_2_3b/qlora.yaml"),
    "meta-llama/llama-3.1-8b-instruct": (
        "unsloth/Meta-Llama-3.1-8B-Instruct-bnb-4bit",
        "configs/llama3_1_8b/qlora.yaml",
    ),
}


@dataclass(frozen=True)
class HubFile:
    """One file of a revision. Large files have a `sha256`, others a `git_blob` (git's sha1 of the content)."""

    name: str
    num_bytes: int
    sha256: str | None
    git_blob: str | None


@dataclass(frozen=True)
class HubRevision:
    """A repository at one commit, with the files that a base needs."""

    repo: str
    commit: str
    files: tuple[HubFile, ...]


def download_from_hub(repo: str, base_dir: str | Path, *, revision: str | None = None) -> Path:
    """Download a base into a new folder, and record repository, commit and digests in its base.json.

    Files go to `BASE_DIR.partial`, which is renamed to BASE_DIR when it is complete and checked. After an interruption
    the same call continues inside the file where it stopped.

    Args:
        repo: `OWNER/NAME`
        revision: branch, tag or commit; None takes the newest commit of the default branch

    Raises:
        ValueError: if the folder exists, the repository cannot be reached or read with this token, has no safetensors
            weights, does not fit on the disk, or arrives damaged
    """
    base_dir = Path(base_dir)
    refuse_existing(base_dir)
    partial = base_dir.with_name(base_dir.name + ".partial")
    try:
        found = find_revision(repo, revision=revision)
        check_free_disk(found, partial)
        # Small files first: a gated repository refuses config.json as well as the weights.
        for file in sorted(found.files, key=lambda file: file.num_bytes):
            _fetch_file(found, file, partial)
    except (OSError, *_HTTP_ERRORS) as error:
        raise ValueError(explain_hub_error(error, repo, revision=revision)) from None
    open_base(partial)
    digests = {file.name: file.sha256 or digest_file(partial / file.name) for file in found.files}
    write_json(partial / RECORD_FILE, {"source": f"hf://{repo}", "revision": found.commit, "sha256": digests})
    refuse_existing(base_dir)
    publish(partial, base_dir)
    return base_dir


def find_revision(repo: str, *, revision: str | None = None) -> HubRevision:
    """Resolve a revision to its commit and choose the files to download.

    Raises:
        ValueError: if the repository has no safetensors weights
        OSError: or an HTTP library's error, if the hub refuses or cannot be reached
    """
    info = HfApi().model_info(repo, revision=revision, files_metadata=True)
    siblings = {sibling.rfilename: sibling for sibling in info.siblings or ()}
    files = []
    for name in choose_files(list(siblings), repo=repo):
        sibling = siblings[name]
        sha256 = None if sibling.lfs is None else sibling.lfs["sha256"]
        files.append(HubFile(name, sibling.size, sha256, None if sha256 else sibling.blob_id))
    return HubRevision(repo, info.sha, tuple(files))


def choose_files(names: list[str], *, repo: str) -> list[str]:
    """Return the files that a base needs: safetensors weights, configs, tokenizer; never pickles or Meta's originals.

    Raises:
        ValueError: if there is no config.json, no tokenizer, or no safetensors weights
    """
    if INDEX_FILE in names:
        weights = [INDEX_FILE, *(name for name in names if SHARD_NAME.fullmatch(name))]
    else:
        weights = [name for name in names if name == SINGLE_FILE]
    configs = [name for name in CONFIGS if name in names]
    # Meta's original/ tokenizer is needed only if the top folder has none.
    tokenizers = [name for name in TOKENIZER_FILES if name in names]
    tokenizers = [name for name in tokenizers if "/" not in name] or tokenizers
    lacking = [
        what
        for what, is_there in (
            ("weights as safetensors (pickles are never read)", weights),
            ("config.json", "config.json" in names),
            ("tokenizer", tokenizers),
        )
        if not is_there
    ]
    if lacking:
        raise ValueError(f"{repo}: not usable as a base; it has no {', no '.join(lacking)}")
    return configs + tokenizers + weights


def check_free_disk(revision: HubRevision, partial: Path) -> None:
    """Raise ValueError if the rest of the download does not fit on the disk."""
    present = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file()) if partial.exists() else 0
    needed = int((sum(file.num_bytes for file in revision.files) - present) * FREE_DISK_MARGIN)
    existing = next(folder for folder in (partial, *partial.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ValueError(
            f"{revision.repo} needs {needed / 1e9:.1f} GB on the disk of {existing}, which has {free / 1e9:.1f} GB "
            "free; make room or choose another base_dir"
        )


def _fetch_file(revision: HubRevision, file: HubFile, partial: Path) -> None:
    target = partial / file.name
    if target.is_file() and is_intact(target, file):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    # The digest in the name keeps revisions apart.
    incomplete = target.with_name(f"{target.name}.{(file.sha256 or file.git_blob or revision.commit)[:12]}.incomplete")
    if incomplete.exists() and incomplete.stat().st_size > file.num_bytes:
        incomplete.unlink()
    # huggingface_hub's snapshot_download would restart an interrupted file from its first byte.
    with incomplete.open("ab") as stream:
        http_get(
            hf_hub_url(revision.repo, file.name, revision=revision.commit),
            stream,
            resume_size=stream.tell(),
            headers=build_hf_headers() | {"Accept-Encoding": "identity"},
            expected_size=file.num_bytes,
            displayed_filename=file.name,
        )
    if not is_intact(incomplete, file):
        incomplete.unlink()
        raise ValueError(f"{revision.repo}: {file.name} arrived damaged and was removed; run the same command again")
    os.replace(incomplete, target)


def is_intact(path: Path, file: HubFile) -> bool:
    """Whether a file on disk has the hub's size and digest."""
    if path.stat().st_size != file.num_bytes:
        return False
    if file.sha256 is not None:
        return digest_file_once(path) == file.sha256
    return file.git_blob is None or git_hash(path.read_bytes()) == file.git_blob


def explain_hub_error(error: Exception, repo: str, *, revision: str | None) -> str:
    """Return one sentence with the problem and the way out; never a token or a signed address."""
    page = f"{constants.ENDPOINT}/{repo}"
    ungated, config = UNGATED_ALTERNATIVES.get(repo.lower(), (None, None))
    instead = f", or use the ungated {ungated} ({config})" if ungated else ""
    login = "log in with `hf auth login` or set HF_TOKEN"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, OfflineModeIsEnabled):
        return f"{repo}: not downloaded, because HF_HUB_OFFLINE is set; unset it and run the same command again"
    if isinstance(error, GatedRepoError):
        return f"{repo} is gated: ask for access at {page}, then {login} with that account's token{instead}"
    if isinstance(error, RevisionNotFoundError):
        return f"{repo} has no revision {revision!r}; see {page}/commits"
    if isinstance(error, RepositoryNotFoundError):
        return f"{repo} does not exist, or this token cannot see it: see {page}, then {login}{instead}"
    if status == 401:
        tokens_page = f"{constants.ENDPOINT}/settings/tokens"
        return f"{repo}: the hub rejects the token: {login} with a valid one from {tokens_page}{instead}"
    if status == 403:
        return f"{repo}: the token may not read it: ask for access at {page}{instead}"
    if status is not None:
        return f"{repo}: the hub answered with status {status}; run the same command again later"
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    reason = type(error).__name__
    return f"{repo}: the download broke off ({reason}); check the network and run the same command again to continue it"
