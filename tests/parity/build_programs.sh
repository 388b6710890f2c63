#!/usr/bin/env bash
# build_programs.sh SOURCE: llama-imatrix and llama-quantize from llama.cpp's source, in about ten CPU-minutes, linked with
# the library that llama-cpp-python has built from the same source.
set -euo pipefail
cd "$1"
library=$(python -c 'import llama_cpp, pathlib; print(pathlib.Path(llama_cpp.__file__).parent / "lib")')
export flags="-std=c++17 -fPIC -Iinclude -Icommon -Iggml/include -Ivendor -Isrc -Itools/quantize
    -DGGML_SHARED -DLLAMA_SHARED -DGGML_USE_CPU -DLLAMA_SUBPROCESS -ffp-contract=off"
export objects=programs/objects
rm -rf programs
mkdir -p "$objects"
sed 's/@LLAMA_BUILD_NUMBER@/0/; s/@[A-Z_]*@/unknown/' common/build-info.cpp.in > "$objects/build-info.cpp"
compile() {
    # What the programs share parses arguments; only the sums are worth optimizing.
    level=-O0
    [ "$1" = tools/imatrix/imatrix.cpp ] && level=-O2
    c++ $flags $level -c "$1" -o "$objects/${1//\//-}.o"
}
export -f compile
printf '%s\n' "$objects"/build-info.cpp common/*.cpp common/jinja/*.cpp common/parsers/*.cpp vendor/cpp-httplib/*.cpp \
    tools/imatrix/imatrix.cpp tools/quantize/quantize.cpp tools/quantize/main.cpp |
    xargs -P "$(nproc)" -I{} bash -ec 'compile {}'
shared=$(ls "$objects"/*.o | grep -v -- "/tools-")
link=(-L"$library" -lllama -lggml -lggml-base -lggml-cpu -lpthread "-Wl,-rpath,$library")
c++ -o programs/llama-imatrix "$objects"/tools-imatrix-*.o $shared "${link[@]}"
c++ -o programs/llama-quantize "$objects"/tools-quantize-*.o $shared "${link[@]}"
rm -rf "$objects"
