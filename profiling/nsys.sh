#!/usr/bin/env bash
# Record calls of a workload with Nsight Systems, and print its summaries of ranges and kernels.
#
#     bash profiling/nsys.sh digits
#     OUT=profiles bash profiling/nsys.sh sd15 --engine graph --steps 25
#
# The arguments are those of `python -m profiling.run`. $OUT (default: profiles) gets NAME.nsys-rep for the Nsight
# window, NAME.sqlite (the same as tables) and NAME.txt (what is printed); $NAME is the workload if not told. $PYTHON
# (python3) must have what the package needs, $NSYS (nsys) is the profiler. Nothing is installed. $GRAPHS: "node"
# (default) records what graphs do kernel by kernel, which slows replays down; "graph" each launch as one piece.
# Without a GPU ranges are recorded, and nothing else. nsys 2022.4 (Debian 12) and later work, but 2022.4 does not see
# the ranges of the Python package nvtx 0.2.12 and later.
set -euo pipefail
cd "$(dirname "$0")/.."
nsys=${NSYS:-nsys}
. profiling/lay_out.sh
begin_with "$nsys" "Nsight Systems" NSYS "$@"

# no sampling and no context switches: they cost time, and are not reported
flags=(--sample=none --cpuctxsw=none --force-overwrite=true --output="$to")
if has_gpu; then
  flags+=(--trace=cuda,nvtx --cuda-graph-trace="${GRAPHS:-node}" --capture-range=cudaProfilerApi --capture-range-end=stop)
else
  echo "There is no GPU: host times of ranges are recorded, from the start of the program to its end."
  flags+=(--trace=nvtx)
fi
"$nsys" profile "${flags[@]}" "$python" -m profiling.run "$@"

# ranges on the host; what GPUs did in them; kernels; copies. The second name is that of releases before 2023.
known=$("$nsys" stats --help-reports 2>&1 || true) # 2022.4 ends with an error status
reports=()
for names in nvtx_pushpop_sum:nvtxppsum nvtx_gpu_proj_sum:nvtxkernsum cuda_gpu_kern_sum:gpukernsum \
  cuda_gpu_mem_time_sum:gpumemtimesum; do
  for name in ${names/:/ }; do
    if grep -qw "$name" <<<"$known"; then
      reports+=(--report="$name")
      break
    fi
  done
done
rm -f "$to.sqlite"
"$nsys" stats --format=column "${reports[@]}" "$to.nsys-rep" | tee "$to.txt"
