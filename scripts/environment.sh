# Make .venv and install tune2gguf into it, then use it: `. scripts/environment.sh [extra]`.
# A second run finds everything in place and installs nothing, unless pyproject.toml changed.
_extra="${1:-}"
if [ ! -x .venv/bin/python ]; then
    echo "making .venv"
    "${PYTHON:-python3}" -m venv .venv
fi
. .venv/bin/activate
_stamp=".venv/installed-${_extra:-base}"
if ! cmp -s pyproject.toml "$_stamp"; then
    echo "installing tune2gguf${_extra:+ with the extra '$_extra'} (a few minutes the first time)"
    # Errors only: warnings are about the user's pip, not about what is installed.
    python -m pip install -qq --disable-pip-version-check --root-user-action=ignore --editable ".${_extra:+[$_extra]}"
    cp pyproject.toml "$_stamp"
fi
