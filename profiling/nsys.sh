#!/usr/bin/env bash
# Record calls of a workload with Nsight Systems, and report on them.
#
#     bash profiling/nsys.sh digits
#     OUT=profiles bash profiling/nsys.sh sd15 --engine graph --steps 25
#
# The arguments are those of `python -m profiling.run`. $OUT (default: profiles) gets NAME.nsys-rep for the Nsight
# window, NAME.sqlite, NAME.txt (the report), NAME.json (its figures) and NAME.png (the last call); $NAME is the
# workload if not told. $PYTHON (python3) must have what the package needs, $NSYS (nsys) is the profiler. Nothing is
# installed. $GRAPHS: "node" (default) records what graphs do kernel by kernel, which slows replays down; "graph" each
# launch as one piece. Without a GPU ranges are recorded, and nothing else.
set -euo pipefail
cd "$(dirname "$0")/.."
nsys=${NSYS:-nsys}
if [[ ${1:--} == -* ]]; then
  echo "What is to be recorded? Name a workload first: bash profiling/nsys.sh digits" >&2
  exit 2
fi
if ! command -v "$nsys" >/dev/null; then
  echo "There is no $nsys. It comes with the CUDA toolkit and alone as 'Nsight Systems'; name it in NSYS=/path/to/nsys." >&2
  exit 2
fi
out=${OUT:-profiles}
mkdir -p "$out"
out=$(cd "$out" && pwd)
to="$out/${NAME:-$1}"
. profiling/lay_out.sh

# no sampling and no context switches: they cost, and the report does not look at them
flags=(--sample=none --cpuctxsw=none --force-overwrite=true --output="$to")
if has_gpu; then
  flags+=(--trace=cuda,nvtx --cuda-graph-trace="${GRAPHS:-node}" --capture-range=cudaProfilerApi --capture-range-end=stop)
else
  echo "There is no GPU: host times of ranges are recorded, from the start of the program to its end."
  flags+=(--trace=nvtx)
fi
"$nsys" profile "${flags[@]}" "$python" -m profiling.run "$@"
"$nsys" export --type=sqlite --force-overwrite=true --output="$to.sqlite" "$to.nsys-rep" >"$to.export.log" 2>&1 ||
  { cat "$to.export.log" >&2 && exit 1; }
rm -f "$to.export.log"
picture=(--png "$to.png")
"$python" -c 'import matplotlib' 2>/dev/null || picture=()
"$python" -m profiling.report "$to.sqlite" --json "$to.json" ${picture[@]+"${picture[@]}"} | tee "$to.txt"
