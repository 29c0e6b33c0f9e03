#!/bin/sh
# Removes from the environment of the cpu image what only a GPU runs: a third of a torch that is built for CUDA.
# The other CUDA libraries stay: such a torch does not load without them. Of a torch for CPUs nothing of this is there.
set -eu
packages=$(python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
rm -rf "$packages"/triton "$packages"/triton-*.dist-info # compiles kernels for GPUs
[ -d "$packages/nvidia" ] || exit 0
cd "$packages/nvidia"
rm -f ./*/lib/libcudnn_*.so.* ./*/lib/libcusolver*.so.* ./*/lib/libnvperf_*.so # loaded only when a GPU asks for them
rm -rf ./*/include ./*/lib/*.a ./*/lib/*.bc # for compilers
