#!/usr/bin/env bash
# What a machine with a GPU has to say, in one command, in less than nine minutes and without a network: tests on the
# device, the kernels' bandwidths, c(rows), the peers and the engines end to end, how busy the GPU is, a profile.
#
#     OUT=results bash bench/gpu_check.sh
#     bash bench/gpu_check.sh --parts rows busy      # these only
#     bash bench/gpu_check.sh --smoke                # the smallest size of everything; runs on a CPU as well
#
# $OUT (bench/results/latest) gets gpu_check.json (every part's figures), summary.txt (60 lines at most), logs.txt,
# trace.json (a Chrome trace of a few calls) and, where there is nsys, what profiling/nsys.sh writes. Nothing is
# installed: the package is laid out in a temporary folder, from this checkout. Python ($PYTHON, python3 by default)
# must have torch, triton, diffusers, transformers, nvtx, pytest and hypothesis. A part that fails, or runs out of its
# time, loses only itself; see bench/gpu_check.py. Without a GPU and without --smoke it runs through all the same, on
# small networks: that it runs is all that shows.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-bench/results/latest}
mkdir -p "$out"
out=$(cd "$out" && pwd)
. profiling/lay_out.sh
gpu=()
has_gpu && gpu=(--gpu)
"$python" -m bench.gpu_check --out "$out" ${gpu[@]+"${gpu[@]}"} "$@"
