#!/bin/sh
# Compiles the .cu files here to the .ptx beside them. The PTX is committed, so that the tests need no nvcc.
# Usage: NVCC=/path/to/nvcc tests/kernels/build.sh [name ...]
set -e
cd "$(dirname "$0")"
for cu in ${*:-*.cu}; do
    name=${cu%.cu}
    case $name in
        hopper*) arch=compute_90a ;;
        *) arch=compute_80 ;;
    esac
    "${NVCC:-nvcc}" -ptx -arch=$arch -lineinfo -O3 -std=c++17 "$name.cu" -o "$name.ptx"
    # File names without folders: the output must not depend on where it is made.
    sed -i 's|\(\.file[[:space:]]*[0-9]*[[:space:]]*\)".*/\([^/"]*\)".*|\1"\2"|' "$name.ptx"
done
