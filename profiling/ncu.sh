#!/usr/bin/env bash
# Look into the kernels of the solver with Nsight Compute: how near memory's bandwidth they are, what they occupy.
#
#     bash profiling/ncu.sh digits
#     OUT=profiles LAUNCHES=10 bash profiling/ncu.sh sd15 --engine graph --steps 25
#
# The arguments are those of `python -m profiling.run`. $OUT (default: profiles) gets NAME.ncu-rep for the Nsight Compute
# window and NAME.ncu.txt; $NAME is the workload if not told. The first $LAUNCHES (default: 20) of the captured calls
# are looked at. $PYTHON (python3) must have what the package needs, $NCU (ncu) is the profiler. Nothing is installed.
# Each kernel is run several times over: times of calls mean nothing here, those are for nsys.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
ncu=${NCU:-ncu}
. profiling/lay_out.sh
begin_with "$ncu" "Nsight Compute" NCU "$@"
has_gpu || refuse "There is no GPU, so no kernel to look into. Use profiling/nsys.sh: it records ranges without one."

replays=()
case " ${*/=/ } " in
  *" --engine graph "* | *" --engine network-graphs "*)
    replays=(--only-replays)
    # a replay launches nothing in Python: there are no ranges to go by, only names
    filter=(--graph-profiling=node --kernel-name=regex:wave_update) ;;
  *)
    # all that the solver launches between two network calls, whatever the method
    filter=(--nvtx --nvtx-include=srds_fast@wave_update/) ;;
esac
# clocks as they are: the figures are to be those of the machine in use
"$ncu" --target-processes=all --profile-from-start=off --clock-control=none --force-overwrite --export="$to" \
  --section=SpeedOfLight --section=MemoryWorkloadAnalysis --section=LaunchStats --section=Occupancy \
  --launch-count="${LAUNCHES:-20}" "${filter[@]}" "$python" -m profiling.run "$@" ${replays[@]+"${replays[@]}"} ||
  { echo "ncu failed. If it said ERR_NVGPUCTRPERM, it may not read the counters: run it as root." >&2 && exit 1; }
"$ncu" --import="$to.ncu-rep" --page=details | tee "$to.ncu.txt"
