#!/usr/bin/env bash
# Install what the tests marked `oracle` compare with: llama.cpp's own quantizer (llama-cpp-python, built here in 8 to 10
# CPU-minutes, needs a C++ compiler) and its converter, which that package's source distribution carries; llama-imatrix and
# llama-quantize are built from it, too.
# Then: python -m pytest -m oracle
set -euo pipefail
requirement=$(grep -o 'llama-cpp-python==[0-9.]*' "$(dirname "$0")/../../pyproject.toml")
version=${requirement#*==}
cache=${TUNE2GGUF_CACHE:-$HOME/.cache/tune2gguf}
source=$cache/llama.cpp
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python -m pip download --no-deps --no-binary :all: --dest "$folder" "$requirement"
if [ "$(python -c 'import llama_cpp; print(llama_cpp.__version__)' 2>/dev/null)" != "$version" ]; then
    python -m pip install "$folder/llama_cpp_python-$version.tar.gz"
fi
tar -xzf "$folder/llama_cpp_python-$version.tar.gz" -C "$folder"
rm -rf "$source"
mkdir -p "$cache"
mv "$folder/llama_cpp_python-$version/vendor/llama.cpp" "$source"
bash "$(dirname "$0")/build_programs.sh" "$source"
echo "llama.cpp's source: $source"
