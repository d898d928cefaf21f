#!/usr/bin/env bash
# What a machine with a GPU has to say, in one command, in less than nine minutes and without a network: tests on the
# device, the kernels' bandwidths, c(rows), the peers and the engines end to end, how busy the GPU is, a profile.
#
#     OUT=results bash bench/gpu_check.sh
#     OUT=results/more bash bench/gpu_check.sh --parts busy profile nsys engines peers_policy     # a second call
#     OUT=results/rest bash bench/gpu_check.sh --parts switches sanitizer                         # and a third
#     bash bench/gpu_check.sh --smoke                # the smallest size of everything; runs on a CPU as well
#
# The first has the tests, c(rows), the kernels' bandwidths and peers with digits and with a network of Stable
# Diffusion's size; its limits fill the time, so what the others name is left out of it unless parts end early.
#
# $OUT (bench/results/latest) gets gpu_check.json (every part's figures), summary.txt (60 lines at most), logs.txt,
# rows.png (c(rows) as a picture), trace.json (a Chrome trace of a few calls) and, where there is nsys, its recording
# and the report on it: eight files at most of each call, none over 15 MiB, each written when its part has ended.
# Nothing is installed: the package is laid out in a temporary folder, from this checkout. Python ($PYTHON, python3 by
# default) must have torch, triton, diffusers, transformers, nvtx, pytest, hypothesis and peft; with pytest-xdist tests
# run side by side, without it they may not fit into their time; matplotlib draws. Where the checkout has no git, COMMIT
# tells which commit it is. A part that fails, or runs out of its time, loses only itself; see bench/gpu/gpu_check.py.
# Without a GPU that torch can use, and without --smoke, it ends at once with status 2.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-bench/results/latest}
mkdir -p "$out"
out=$(cd "$out" && pwd)
. profiling/lay_out.sh
gpu=()
has_gpu && gpu=(--gpu)
# in the background, so that a signal reaches it, and the folder it runs from stays until it has ended
"$python" -m bench.gpu.gpu_check --out "$out" ${gpu[@]+"${gpu[@]}"} --budget $((530 - SECONDS)) "$@" &
check=$!
trap 'kill "$check" 2>/dev/null' INT TERM
wait "$check" # also ends when a signal comes
wait "$check"
